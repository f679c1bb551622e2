"""Defenses that move an image by what the model says of it, against restatements of their authors' code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import ET3, L2, RN, AntiAdversary, CrossguardError, HedgeDefense, Linf, Tiny
from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.seeds import drawing, keys
from crossguard.testing import check_wrapper
from toys import Toy, last_asked, middle

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",))
SEEDS = keys("abcdef")
IMAGES = middle(6)
BRIGHT = torch.cat([IMAGES[:3] - 0.4, IMAGES[3:] + 0.4])  # at the borders of the pixel range


def logits(pixels: Tensor) -> Tensor:
    return Toy().answer(PROMPTS)(pixels)


def anti_adversary(image: Tensor, step: Tensor, steps: int) -> Tensor:
    """One image, restated from the authors' code."""
    change = torch.zeros_like(image)
    label = logits(image).max(1)[1]
    for _ in range(steps):
        change.requires_grad_(True)
        loss = -F.cross_entropy(logits(image + change), label)
        (gradient,) = torch.autograd.grad(-loss, change)
        change = change.detach() - step * gradient.sign()
        change = torch.clamp(image + change, 0, 1) - image
    return image + change


def hedge(image: Tensor, eps: float, step: float, steps: int, start: Tensor) -> Tensor:
    """One image, restated from the code of Croce et al."""
    change = start.clone()
    for _ in range(steps):
        change.requires_grad_(True)
        output = logits(image + change)
        loss = sum(F.cross_entropy(output, torch.tensor([number])) for number in range(3))
        (gradient,) = torch.autograd.grad(loss, change)  # type: ignore[arg-type]
        change = (change.detach() + step * gradient.sign()).clamp(-eps, eps)
        change = (image + change).clamp(0, 1) - image
    return image + change


def energy_steps(image: Tensor, step: float, steps: int, eps: float, temperature: float, norm: str) -> Tensor:
    """One image, restated from the authors' code for CLIP (Linf) and for classifiers (L2)."""
    moved = image.clone()
    for _ in range(steps):
        moved.requires_grad_(True)
        energy = -temperature * torch.logsumexp(logits(moved) / temperature, 1)
        (gradient,) = torch.autograd.grad(energy.sum(), moved)
        change = (moved.detach() - step * gradient / gradient.norm()).clamp(0, 1) - image
        change = change.clamp(-eps, eps) if norm == "Linf" else change * min(1.0, eps / float(change.norm()))
        moved = (image + change).clamp(0, 1)
    return moved


@pytest.mark.parametrize("images", [IMAGES, BRIGHT], ids=["middle", "border"])
def test_an_anti_adversary_makes_the_model_surer_as_published(images: Tensor) -> None:
    model = AntiAdversary(Toy(), unit=(1.0, 2.0, 0.5), step=0.02, steps=3)
    found = last_asked(model, images, SEEDS, PROMPTS)
    step = 0.02 * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1)
    assert torch.allclose(found, torch.cat([anti_adversary(one[None], step, 3) for one in images]), atol=1e-6)
    before, after = logits(images).log_softmax(1).amax(1), logits(found).log_softmax(1)
    assert bool((after.gather(1, logits(images).argmax(1, keepdim=True))[:, 0] > before).all())


def test_the_step_of_an_anti_adversary_is_of_normalized_pixels() -> None:
    """Where nothing is cut, one step moves each pixel by 0.15 of what CLIP divides it by."""
    moved = (last_asked(AntiAdversary(Toy(), steps=1), IMAGES, SEEDS, PROMPTS) - IMAGES).abs()
    wanted = 0.15 * torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(moved, wanted.view(3, 1, 1).expand_as(moved), atol=1e-6)


@pytest.mark.parametrize("images", [IMAGES, BRIGHT], ids=["middle", "border"])
@pytest.mark.parametrize("random_start", [False, True])
def test_hedging_climbs_the_loss_of_all_classes(images: Tensor, random_start: bool) -> None:
    model = HedgeDefense(Toy(), steps=5, random_start=random_start)
    with drawing(SEEDS):
        start = (model.eps * model.uniform(images, "start")).clamp(min=-images, max=1 - images) * random_start
    found = last_asked(model, images, SEEDS, PROMPTS)
    each = zip(images, start, strict=True)
    wanted = torch.cat([hedge(one[None], 8 / 255, 4 / 255, 5, begin[None]) for one, begin in each])
    assert torch.allclose(found, wanted, atol=1e-6)
    everything = [-logits(one).log_softmax(1).sum(1) for one in (images, found)]
    assert bool((everything[1] > everything[0]).all())
    assert model.random == random_start == model.answer(PROMPTS).random


@pytest.mark.parametrize("images", [IMAGES, BRIGHT], ids=["middle", "border"])
@pytest.mark.parametrize("ball", [Linf(4 / 255), L2(0.2)])
def test_energy_goes_down_by_steps_of_fixed_length(images: Tensor, ball: Any) -> None:
    model = ET3(Toy(), step=0.15, steps=3, ball=ball, temperature=2.0)
    found = last_asked(model, images, SEEDS, PROMPTS)
    name = type(ball).__name__
    wanted = torch.cat([energy_steps(one[None], 0.15, 3, ball.eps, 2.0, name) for one in images])
    assert torch.allclose(found, wanted, atol=1e-6)
    assert float(ball.size(found - images).max()) > 0.9 * ball.eps, "the ball binds"
    free = last_asked(replace(model, ball=Linf(1.0), steps=1), IMAGES, SEEDS, PROMPTS) - IMAGES
    assert torch.allclose(free.flatten(1).norm(dim=1), torch.tensor(0.15), atol=1e-5)


@pytest.mark.parametrize("model", [AntiAdversary(Toy()), HedgeDefense(Toy(), steps=3), ET3(Toy(), step=0.2)])
def test_the_gradient_of_a_smooth_stand_in_is_its_own(model: Any) -> None:
    """Against differences of its values."""
    answer, images = model.answer(PROMPTS), middle(2)

    def value(pixels: Tensor) -> Tensor:
        with drawing(SEEDS[:2]):
            return answer.soft(pixels).logits[:, 0].sum()

    pixels = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    direction, width = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), 1e-3
    ends = [value((images + sign * width * direction).requires_grad_(True)).detach() for sign in (1, -1)]
    slope = float((ends[0] - ends[1]) / (2 * width))
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.03, abs=3e-3)


@pytest.mark.parametrize(
    ("model", "forwards", "backwards"),
    [(AntiAdversary(Toy()), 4, 2), (HedgeDefense(Toy()), 21, 20), (ET3(Toy()), 3, 2)],
)
def test_what_an_image_costs_is_counted(model: Any, forwards: int, backwards: int) -> None:
    with counting() as costs, torch.no_grad(), drawing(SEEDS):
        model.answer(PROMPTS)(IMAGES)
    assert (costs.forwards, costs.backwards) == (6 * forwards, 6 * backwards)


@pytest.mark.parametrize("kind", [AntiAdversary, HedgeDefense, ET3])
def test_they_meet_the_contract_and_need_classes(kind: Any) -> None:
    check_wrapper(kind(RN(Tiny()), steps=2))
    with pytest.raises(CrossguardError, match=f"{kind.__name__} compares images with the texts of classes, and none"):
        kind(Toy()).answer()
    captions = Toy().encode_text(["a red circle", "two blue stars"])
    with torch.no_grad():
        moved = kind(Toy()).answer(captions)(IMAGES)
    assert moved.shape == (6, 16), "in a retrieval the captions are the classes, and it answers with embeddings"
    assert not torch.allclose(moved, Toy().encode_image(IMAGES), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AntiAdversary(Toy(), steps=0), r"AntiAdversary\(steps=0\) does nothing; give 1 or more"),
        (lambda: AntiAdversary(Toy(), step=0.0), "does not move; give a positive number"),
        (lambda: AntiAdversary(Toy(), unit=(1.0, 0.0, 1.0)), "give three positive numbers"),
        (lambda: HedgeDefense(Toy(), eps=1.5), r"HedgeDefense\(eps=1.5\) is not possible; give 0 to 1"),
        (lambda: ET3(Toy(), step=float("inf")), "does not move"),
        (lambda: ET3(Toy(), temperature=0.0), "give a positive number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        make()
