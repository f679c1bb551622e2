"""Trainings that the model as it was holds in place: losses and gradients against formulas written out, and the
contract of every recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.defenses.anchored import AGFT, TGAZSR
from crossguard.defenses.optimizers import SGD
from crossguard.defenses.recipe import Recipe
from crossguard.models.fresh import Fresh, FreshViT
from crossguard.models.huggingface import HuggingFace
from crossguard.testing import check_recipe
from fixtures import Blots, save_clip, save_tokenizer, small
from formulas import BUDGET, INNER, PROMPTS, check_formula, logits, refused, started


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    folder = tmp_path_factory.mktemp("base") / "tokenizer"
    save_tokenizer(folder)
    return small(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return HuggingFace(str(save_clip(tmp_path_factory.mktemp("clip"))))


# --- AGFT ---


def test_agft_is_the_cross_entropy_with_a_softened_answer(base: Fresh, tmp_path: Path) -> None:
    """But for the entropy of the teacher, which has no gradient: 30 and 0.5 times 30 as factors on cosines."""

    def formula(student: Any, start: Any, other: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
        del other, labels
        with torch.no_grad():
            soft = logits(start, clean, 15.0).softmax(1)
        entropy = -(soft * soft.log()).sum(1).mean()
        return F.cross_entropy(logits(student, bad, 30.0), soft) - entropy

    check_formula(AGFT(scale=30.0, softened=0.5), formula, base, base, tmp_path)


# --- TGA-ZSR ---


def enlarged(side: int, size: int) -> Tensor:
    """The bilinear enlargement of a row of so many pixels, as a matrix: pixel centers at half numbers, borders held."""
    found = torch.zeros(size, side)
    for row in range(size):
        place = min(max((row + 0.5) * side / size - 0.5, 0.0), side - 1.0)
        left = min(int(place), side - 2)
        found[row, left], found[row, left + 1] = 1.0 - (place - left), place - left
    return found


def attention(network: Any, images: Tensor, texts: Tensor, size: int, over_tokens: bool) -> Tensor:
    """Written out from the layers of a stock CLIP."""
    vision = network.stock.vision_model
    layers = vision(pixel_values=network.preprocess(images)).last_hidden_state
    tokens = network.stock.visual_projection(vision.post_layernorm(layers))
    tokens = tokens / tokens.norm(dim=1 if over_tokens else 2, keepdim=True)
    near = torch.stack([one[1:] @ text for one, text in zip(tokens, texts, strict=True)])
    near = torch.stack([(one - one.min()) / (one.max() - one.min()) for one in near])
    stretch = enlarged(4, size)
    return torch.stack([stretch @ one.view(4, 4) @ stretch.T for one in near]).flatten(1)


@pytest.mark.parametrize("over_tokens", [False, True])
def test_tgazsr_is_the_formula_of_its_paper(clip: HuggingFace, tmp_path: Path, over_tokens: bool) -> None:
    def formula(student: Any, start: Any, other: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
        del other
        texts = F.normalize(student.encode_text(PROMPTS), dim=1)[labels].detach()
        with torch.no_grad():
            there = attention(start, clean, texts, 10, over_tokens)
        moved, mine = (attention(student, images, texts, 10, over_tokens) for images in (bad, clean))
        near = 0.08 * (moved - there).norm(dim=1) + 0.05 * (mine - there).norm(dim=1)
        return F.cross_entropy(logits(student, bad), labels) + near.mean()

    check_formula(TGAZSR(size=10, over_tokens=over_tokens), formula, clip, clip, tmp_path)


def test_tgazsr_without_patches_is_refused(base: Fresh, tmp_path: Path) -> None:
    run = started(TGAZSR(steps=1, batch=8, image_attack=INNER), base, tmp_path)
    assert "has no patch tokens" in refused(lambda: run.learner.take(0))


def test_patches_of_a_vit_are_pooled_as_its_class_token(base: Fresh) -> None:
    """The pooled embedding is that of the class token, written out; so are the patches."""
    word = FreshViT(tokenizer=base.tokenizer, size=16, patch=4, width=32, depth=2, dimensions=12)
    network, images = word.load(), torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    stock: Any = network.stock
    with torch.no_grad():
        embeddings, tokens = network.patches(images)
        layers = stock.vision_model(pixel_values=network.preprocess(images)).last_hidden_state  # type: ignore[operator]
        pooler = stock.vision_model.pooler
        every = stock.visual_projection(torch.tanh(layers @ pooler.dense.weight.T + pooler.dense.bias))
    assert torch.allclose(embeddings, network.encode_image(images), atol=1e-6)
    assert torch.allclose(every[:, 0], embeddings, atol=1e-5) and torch.allclose(every[:, 1:], tokens, atol=1e-5)


# --- The contract ---

SGDS = SGD(lr=0.05)
RECIPES: dict[str, Recipe] = {
    "AGFT": AGFT(optimizer=SGDS, image_attack=INNER, budget=BUDGET),
    "TGAZSR": TGAZSR(optimizer=SGDS, image_attack=INNER, budget=BUDGET, size=16),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "AGFT": (lambda: AGFT(softened=0.0), "AGFT(scale=180.0, softened=0.0) teaches nothing"),
    "TGAZSR": (lambda: TGAZSR(size=0), "TGAZSR(size=0)"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_contract(base: Fresh, clip: HuggingFace, name: str) -> None:
    check_recipe(RECIPES[name], clip if name == "TGAZSR" else base, Blots(count=8))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_take_the_steps_of_one(base: Fresh, clip: HuggingFace, name: str) -> None:
    check_recipe(RECIPES[name], clip if name == "TGAZSR" else base, Blots(count=8), processes=True)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_teach_nothing_are_refused(name: str) -> None:
    attempt, said = REFUSED[name]
    assert said in refused(attempt)
