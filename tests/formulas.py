"""What tests of recipes share: trainings of a tiny model, and the loss of a step against a formula written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import Combined, Context, Coupled, Deep, Frame, LoRA, Towers
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Linf
from crossguard.defenses.parts import Trainable
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.run import Run
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint
from crossguard.models.huggingface import HuggingFace
from crossguard.processes import ALONE
from fixtures import Blots

INNER = PGD(steps=3, step=0.5, best=False, stop=False)
BUDGET = Linf(16 / 255)
PROMPTS = [f"a photo of a {name}" for name in Blots().names]
PARTS: dict[str, Trainable] = {
    "towers": Towers(),
    "last two": Towers(("image", "text"), last=2),
    "LoRA": LoRA(2),
    "context": Context(),
    "contexts": Context(tokens=3, specific=True),
    "deep tokens": Deep(2),
    "both sides": Coupled(depth=2),
    "frame": Frame(4, start=0.1),
    "several": Combined((LoRA(2), Frame(4), Deep(2, depth=1), Context())),
}


def started(recipe: Recipe, base: Checkpoint, folder: Path, data: Any = None) -> Run:
    return Run(recipe, base, data or Blots(), folder, {"recipe": "", "model": "", "data": ""}, ALONE)


def refused(attempt: Callable[[], object]) -> str:
    with pytest.raises(CrossguardError) as raised:
        attempt()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def moved(base: Checkpoint, folder: Path) -> HuggingFace:
    """The base as it may be after some training, so that it differs from what it was."""
    network: Any = base.load()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    network.save(folder)
    return HuggingFace(str(folder))


def logits(network: Any, images: Tensor, scale: float | None = None, texts: Sequence[str] = PROMPTS) -> Tensor:
    """Written out: cosines of raw embeddings with the class prompts, or with other texts."""
    one, other = F.normalize(network.encode_image(images), dim=1), F.normalize(network.encode_text(texts), dim=1)
    return one @ other.T * (network.scale if scale is None else scale)


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of the distributions with these logits, for each row."""
    p, q = first.softmax(1), second.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def check_formula(recipe: Recipe, formula: Callable[..., Tensor], base: Checkpoint, proxy: Checkpoint, folder: Path,
                  **settings: Any) -> None:  # fmt: skip
    """The loss of a step against a formula written out: value and gradient at the views that the step itself made, of a
    student that has moved already.

    Args:
        formula: called with the student, the model as it was, another model, clean and adversarial images and labels;
            where the recipe trains on captions, labels are rows of the distinct captions, which come last.
        settings: of the recipe, beside those of a short training.
    """
    short: dict[str, Any] = {"steps": 2, "batch": 8, "warmup": 0, "clamp_scale": False, **settings}
    run = started(replace(recipe, image_attack=INNER, budget=BUDGET, **short), base, folder)  # type: ignore[call-arg]
    learner, other = run.learner, moved(base, folder / "moved").load()
    with torch.no_grad():
        for mine, theirs in zip(learner.network.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    learner._remembered.clear()  # texts of the weights before
    before: Any = copy.deepcopy(learner.network)
    inputs = learner.views(0)
    clean, bad = inputs.images["clean"], inputs.images["adversarial"]
    labels, captions = Blots().labels()[inputs.batch.indices], []
    if recipe.captions:
        (found, *_) = inputs.batch.texts.values()  # the same whatever they are over
        labels, captions = found.place, [found.texts]
    assert 0.0 < float((bad - clean).abs().max()) <= 16 / 255 + 1e-6
    teachers = base.load(), proxy.load()
    loss = formula(before, *teachers, clean, bad, labels, *captions)
    value, _ = learner.loss(0, inputs)
    assert float(value.detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    wanted = {name.removeprefix("network."): one for name, one in learner.trained.items()}
    left = torch.autograd.grad(value, list(wanted.values()))
    right = torch.autograd.grad(loss, [dict(before.named_parameters())[name] for name in wanted])
    for one, two in zip(left, right, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5 * float(loss.detach().abs()) + 1e-6)
    assert max(float(one.abs().max()) for one in left) > 1e-4
