"""How long a network waits for its pixels: JPEGs decoded in its own thread, and ahead of their use by others.

    python benchmarks/loading.py --images 512 --side 224 --step 0.25

The network is a pause of `--step` seconds a batch, as an accelerator is one for the processor that feeds it; with
`--busy` it is a computation of so long on the same processors instead.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from crossguard import Images
from crossguard.data import Dataset
from crossguard.datasets.pixels import DECODED


def written(folder: Path, count: int, width: int, height: int) -> None:
    """So many JPEGs of two classes: smooth noise, about as large as photographs of this size are."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        file = folder / ("cat", "dog")[number % 2] / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, "JPEG", quality=90)


def step(seconds: float, busy: bool) -> None:
    """What the network does with a batch."""
    if not busy:
        time.sleep(seconds)
        return
    end, one = time.perf_counter() + seconds, torch.rand(256, 256)
    while time.perf_counter() < end:
        one @ one


def passed(data: Dataset, batch: int, workers: int, seconds: float, busy: bool) -> tuple[float, str]:
    """Seconds of one pass over the data, and a hash of all its batches."""
    DECODED.clear()
    told = hashlib.sha256()
    began = time.perf_counter()
    for samples in data.batches(batch, workers=workers):
        step(seconds, busy)
        told.update(" ".join(samples.ids).encode() + samples.images[:, :, ::16, ::16].numpy().tobytes())
    return time.perf_counter() - began, told.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=224, help="pixels that the images are resized to")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--step", type=float, default=0.25, help="seconds that the network takes for a batch")
    parser.add_argument("--busy", action="store_true", help="the network computes on the same processors")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        written(Path(place), options.images, options.width, options.height)
        data = Images(place, size=options.side)
        network = options.step * -(-options.images // options.batch)
        expected, slowest = "", 0.0
        for workers in (0, *options.workers):
            runs = [passed(data, options.batch, workers, options.step, options.busy) for _ in range(options.runs)]
            seconds = statistics.median(run for run, _ in runs)
            expected, slowest = expected or runs[0][1], slowest or seconds
            assert {told for _, told in runs} == {expected}, "threads changed the batches"
            name = f"{workers} threads ahead" if workers else "its own thread"
            print(
                f"{name:>16}: {seconds:6.2f} s, of which the network waited {max(0.0, seconds - network):5.2f} s; "
                f"{slowest / seconds:.2f} times as fast"
            )


if __name__ == "__main__":
    main()
