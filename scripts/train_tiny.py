"""Trains a shipped model: a small dual encoder on the captions of `Scenes`, by the library's own recipes.

    python scripts/train_tiny.py --model vit --out runs/tiny_vit --ship src/crossguard/assets/tiny_vit

`tiny` is `Tiny()`, a ConvNeXt; `vit` and `cnn` are its siblings `TinyViT()`, a vision transformer, and `TinyCNN()`, an
EfficientNet.

Two or three stages, about half an hour on one core: the names of shapes first, because a contrastive loss on captions
alone sits on a long plateau there (it finds colors at once and shapes late), then captions. A run that was stopped goes
on. The result is checked against the bars of the project and only then copied to the folder of --ship.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from crossguard import (
    PGD,
    AdamW,
    Augment,
    Contrastive,
    Fresh,
    FreshCNN,
    FreshViT,
    FTStandard,
    HuggingFace,
    Linf,
    Scenes,
    ZeroShot,
    evaluate,
)
from crossguard.models.base import Checkpoint

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
BARS = {"color": (0.95, 0.95), "shape": (0.90, 0.90), "object": (0.80, 0.80)}  # on test and on held-out combinations
FEWER = {
    "color": (0.95, 0.95),
    "shape": (0.90, 0.80),
    "object": (0.90, 0.80),
}  # for a short course of a plain CNN
LOWER = {"color": (0.95, 0.95), "shape": (0.80, 0.60), "object": (0.80, 0.65)}  # for what learns shapes slowly


@dataclass(frozen=True)
class Course:
    """Where a model starts, and how long and at which learning rate each stage trains it: shapes, then captions."""

    start: Checkpoint
    steps: tuple[int, ...]
    rates: tuple[float, ...]
    augment: Augment | None = None
    bars: Mapping[str, tuple[float, float]] = field(default_factory=lambda: BARS)


COURSES = {
    "tiny": Course(Fresh(), (500, 1600, 1500), (2e-3, 2e-3, 1.5e-3)),
    "cnn": Course(FreshCNN(), (600, 1600), (2e-3, 2e-3), bars=FEWER),
    # Patches do not know that a thing may lie elsewhere: shifted images say so.
    "vit": Course(FreshViT(patch=8, width=128), (1500, 1400), (1e-3, 1e-3), Augment(flip=False, shift=3), bars=LOWER),
}


def train(course: Course, out: Path) -> Checkpoint:
    """The stages, each resumable."""
    rates = [AdamW(lr=rate, weight_decay=0.05) for rate in course.rates]
    model = FTStandard(
        steps=course.steps[0],
        optimizer=rates[0],
        warmup=100,
        cosine=True,
        clip=1.0,
        clamp_scale=True,
        augment=course.augment,
        save_every=400,
    ).fit(course.start, Scenes("shape", "train"), out / "1-shapes")
    for number in range(1, len(rates)):
        recipe = Contrastive(
            steps=course.steps[number],
            optimizer=rates[number],
            warmup=100 // number,
            clip=1.0,
            augment=course.augment,
            save_every=400,
        )
        model = recipe.fit(model, Scenes("object", "train"), out / f"{number + 1}-captions")
    return model


def measure(model: Checkpoint) -> dict[str, float]:
    """Accuracy on every class set, held-out combinations included, and what PGD-100 leaves of `object`."""
    found: dict[str, float] = {}
    for classes in BARS:
        for split in ("test", "heldout"):
            report = evaluate(ZeroShot(Scenes(classes, split)), model)
            print(f"{classes:8} {split:8} {report.clean}", flush=True)
            found[f"{classes} {split}"] = report.clean_accuracy
    for eps in (1, 2, 4, 8):
        report = evaluate(ZeroShot(Scenes("object", "test")), model, PGD(steps=100), Linf(eps / 255), limit=500)
        print(f"object under PGD-100 at {eps}/255: {report.robust}", flush=True)
        found[f"object {eps}/255"] = report.robust_accuracy
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=sorted(COURSES), default="tiny")
    parser.add_argument("--out", type=Path, help="by default runs/ and the name of the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ship", type=Path, help="copy the result into this folder if it reaches the bars")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = train(COURSES[options.model], options.out or Path("runs") / options.model)
    found = measure(model)
    missed = [
        f"{name} {split}"
        for name, bars in COURSES[options.model].bars.items()
        for split, bar in zip(("test", "heldout"), bars, strict=True)
        if found[f"{name} {split}"] < bar
    ]
    if missed:
        print(f"below the bar: {', '.join(missed)}", file=sys.stderr)
        return 1
    if options.ship is not None:
        assert isinstance(model, HuggingFace)
        options.ship.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(Path(model.path) / name, options.ship / name)
        # In half precision the package is half as large; the numbers of the model move by a thousandth.
        weights = load_file(Path(model.path) / "model.safetensors")
        half = {name: one.half() if one.ndim else one for name, one in weights.items()}
        save_file(half, options.ship / "model.safetensors", {"format": "pt"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
