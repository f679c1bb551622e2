"""How much of a step on a CPU is the allocator handing memory back to the system and getting it again.

    python benchmarks/memory.py --model ../shared/models/natural

For each way of allocating a process of its own, in turn: `plain` is glibc as it comes, `environment` has the three
MALLOC_ variables set from outside, `inside` is what Crossguard does when it opens a network on a CPU
(`device.keep_memory`). Measured are forward and gradient (`step`) and the forward alone on random images of 224 pixels,
on one thread, in seconds of the processor (user and system), so that other processes of the machine count little; and
the peak of the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

WAYS = {
    "plain": {"CROSSGUARD_KEEP_MEMORY": "0"},
    "environment": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
    },
    "inside": {},
}


def measure(path: str, batch: int, steps: int) -> dict[str, float]:
    """Seconds of the processor for a step and for a forward, and the peak in megabytes."""
    import resource

    import torch

    from crossguard import HuggingFace, ImageVictim, Prompts, Untargeted

    torch.set_num_threads(1)
    answer = HuggingFace(path).classifier(Prompts.of(("cat", "dog", "tree"), ("a photo of a {}",)))
    victim = ImageVictim(answer)
    images = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    goal = Untargeted(torch.zeros(batch, dtype=torch.long))
    found: dict[str, list[float]] = {"step": [], "forward": []}
    for _ in range(steps + 1):
        for name, ask in (("step", lambda: victim.ascend(images, goal)), ("forward", lambda: victim(images))):
            began = time.process_time()
            ask()
            found[name].append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {name: statistics.median(times[1:]) for name, times in found.items()} | {"peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="../shared/models/natural")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.model, options.batch, options.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    given = ["--worker", "--model", options.model, "--batch", str(options.batch), "--steps", str(options.steps)]
    for _ in range(options.rounds):
        for way, settings in WAYS.items():
            done = subprocess.run(
                [sys.executable, __file__, *given],
                env=os.environ | settings,
                capture_output=True,
                text=True,
                check=True,
            )
            found[way].append(json.loads(done.stdout))
    plain = {name: statistics.median(run[name] for run in found["plain"]) for name in ("step", "forward", "peak")}
    for way, runs in found.items():
        middle = {name: statistics.median(run[name] for run in runs) for name in plain}
        print(
            f"{way:12} step {middle['step']:.3f} s ({middle['step'] / plain['step']:.2f})  "
            f"forward {middle['forward']:.3f} s ({middle['forward'] / plain['forward']:.2f})  "
            f"peak {middle['peak']:.0f} MB"
        )


if __name__ == "__main__":
    main()
