"""What it costs to train each part of a model, beside its whole towers: the CPU time of a step with and without inner
attacks, and how many numbers learn.

    python benchmarks/parts.py

The model is a CLIP of random weights. Steps of the parts take turns, so that all meet the same machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from checkpoints import both

from crossguard import (
    ClassFrames,
    Combined,
    Context,
    Coupled,
    Deep,
    Frame,
    FTStandard,
    LoRA,
    MMCoA,
    Scenes,
    Towers,
    Trainable,
)
from crossguard.defenses.run import Run
from crossguard.processes import ALONE
from crossguard.words import show

PARTS: tuple[Trainable, ...] = (
    Towers(), Towers(last=2), LoRA(), Context(), Context(specific=True), Deep(2, depth=1), Deep(2), Coupled(depth=9),
    Frame(16), Combined((Frame(16), Deep(10, depth=1))), ClassFrames(16),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="the cost of a training step for each part of a model")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Scenes("color", "train", count=4 * options.batch)
    with tempfile.TemporaryDirectory() as folder:
        base, question = both(Path(folder) / "clip"), {"recipe": "", "model": "", "data": ""}
        runs: dict[tuple[str, str], Run] = {}
        for kind in (FTStandard, MMCoA):
            for part in PARTS:
                recipe = kind(steps=10_000, batch=options.batch, trains=part)
                where = Path(folder) / str(len(runs))
                runs[kind.__name__, show(part, short=True)] = Run(recipe, base, data, where, question, ALONE)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for turn in range(options.runs + 1):
            for key, run in runs.items():
                before = time.process_time()
                run.learner.take(turn)
                if turn:  # the first one fills caches
                    seconds[key].append(time.process_time() - before)
        whole = {recipe: seconds[recipe, show(Towers(), short=True)] for recipe in ("FTStandard", "MMCoA")}
        rows = []
        for part in PARTS:
            name = show(part, short=True)
            numbers = sum(one.numel() for one in runs["MMCoA", name].learner.trained.values())
            ratios = {
                recipe: statistics.median(
                    own / full for own, full in zip(seconds[recipe, name], whole[recipe], strict=True)
                )
                for recipe in whole
            }
            rows.append({"part": name, "numbers": numbers} | {k: round(v, 2) for k, v in ratios.items()})
            print(f"| `{name}` | {numbers:,} | {ratios['FTStandard']:.2f} | {ratios['MMCoA']:.2f} |", flush=True)
        whole_seconds = {recipe: round(statistics.median(values), 2) for recipe, values in whole.items()}
        print(json.dumps({"whole_seconds": whole_seconds, "rows": rows}))


if __name__ == "__main__":
    main()
