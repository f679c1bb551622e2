"""What a PGD step costs beside a bare forward and backward through frozen weights, on the shipped model.

    python benchmarks/attacks.py

Both do the same number of gradients on the same images; the bare loop only lacks projection, budget and bookkeeping.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from crossguard import PGD, Linf, Scenes, Tiny, Untargeted, ZeroShot


def main() -> None:
    parser = argparse.ArgumentParser(description="PGD against a bare forward and backward")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = ZeroShot(Scenes("object", "test"))
    batch = next(task.batches(options.batch, range(options.batch)))
    answer = Tiny().classifier(task.data.prompts())
    goal, budget = Untargeted(batch.labels), Linf(8 / 255)
    attack = PGD(steps=options.steps, best=False, stop=False)

    def bare() -> None:
        for _ in range(options.steps):
            pixels = batch.images.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(answer(pixels), batch.labels, reduction="sum"), pixels)

    def ours() -> None:
        attack(answer, batch.images, goal, budget)

    ratios = paired(ours, bare, options.runs)
    print(
        f"PGD-{options.steps} on {options.batch} images of 32 pixels, {options.threads} threads, {options.runs} pairs"
    )
    print("ratio per pair: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
    print(json.dumps({"pgd_step_over_bare_step": round(statistics.median(ratios), 3)}))


def paired(first: Callable[[], None], second: Callable[[], None], runs: int) -> list[float]:
    """Seconds of the first over seconds of the second, run in turn, after one warm-up of each."""

    def seconds(call: Callable[[], None]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    first(), second()
    ratios = []
    for run in range(runs):
        if run % 2:
            below = seconds(second)
            ratios.append(seconds(first) / below)
        else:
            above = seconds(first)
            ratios.append(above / seconds(second))
    return ratios


if __name__ == "__main__":
    main()
