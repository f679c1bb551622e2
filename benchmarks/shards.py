"""What it takes to open a data set in tar shards: seconds, and memory that the opened set keeps.

    python benchmarks/shards.py --samples 100000 --other ../old/src

Opens it in a process of its own each time: without an index, with the index that the first opening has left, and with
the package at another place (`--other`, say a checkout of an earlier version). Images are 2,000 bytes, noise after a
real one; `--captions` makes a retrieval set with a caption for each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

OPENING = """
import json, resource, sys, time
import torch, crossguard
from crossguard import Shards
from crossguard.datasets import shards

def held():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))

before, began, spent = held(), time.perf_counter(), time.process_time()
opened = Shards(sys.argv[1]).opened
wall, cpu = time.perf_counter() - began, time.process_time() - spent
print(json.dumps({"seconds": round(wall, 3), "cpu": round(cpu, 3), "MB kept": round((held() - before) / 1000),
                  "samples": len(opened.ids), "last": opened.ids[-1]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--size", type=int, default=2_000, help="bytes of an image")
    parser.add_argument("--captions", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--other", help="the src folder of another version")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        generate(root, options)
        here = str(Path(__file__).parents[1] / "src")
        for run in range(options.runs):
            cache = Path(folder) / f"cache{run}"
            for name, source in (("other", options.other), ("without an index", here), ("with an index", here)):
                if source:
                    print(json.dumps({"run": run, "opening": name, **opened(root, source, cache)}), flush=True)


def generate(root: Path, options: argparse.Namespace) -> None:
    """A set whose first image is a whole one; all images differ."""
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("".join(f"class {number}\n" for number in range(10)))
    if options.captions:
        (root / "dataset_type.txt").write_text("retrieval\n")
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    rng = np.random.default_rng(0)
    for shard in range(options.shards):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as opened:
            for number in range(shard, options.samples, options.shards):
                noise = rng.bytes(max(0, options.size - len(image.getvalue())))
                told = ("txt", f"a photo of the number {number}") if options.captions else ("cls", str(number % 10))
                for ending, data in (("png", image.getvalue() + noise), (told[0], told[1].encode())):
                    member = tarfile.TarInfo(f"s{number:07d}.{ending}")
                    member.size = len(data)
                    opened.addfile(member, io.BytesIO(data))


def opened(root: Path, source: str, cache: Path) -> dict[str, object]:
    """One opening in a new process, with the package in `source`."""
    environment = os.environ | {"PYTHONPATH": source, "CROSSGUARD_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(root)], env=environment, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
