"""Defenses that attack back, against restatements of what their authors published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossguard import RN, TTC, Answer, BitDepth, CrossguardError, GaussianNoise, HuggingFace, Tiny
from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import Live
from crossguard.seeds import by_position, drawing, fold, keys, uniform
from crossguard.testing import check_wrapper
from fixtures import save_clip
from toys import Toy, middle

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",))
SEEDS = keys("abcdef")
IMAGES = uniform(by_position(6), (3, 32, 32))


def seen(model: Any, images: Tensor, seeds: Tensor = SEEDS) -> Tensor:
    """The pixels that the model inside is asked about in the end."""
    asked = list[Tensor]()
    inner = model.base.answer(PROMPTS)

    def listening(images: Tensor) -> Any:
        asked.append(images.detach())
        return inner.hard(images)

    answer = model.around(replace(inner, hard=listening), Live(model, model.base, PROMPTS))
    with drawing(seeds), torch.no_grad():
        answer.hard(images)
    return asked[-1]


def published(encode: Any, images: Tensor, noise: Tensor, model: TTC, judge: Any = None) -> tuple[Tensor, Tensor]:
    """TTC restated from the steps of the authors' code: pixels and tau. Written one image at a time, so that nothing is
    shared with what it tests."""
    made, taus = [], []
    for image, start in zip(images, noise, strict=True):
        x, low, high = image[None], -image[None], 1.0 - image[None]
        delta = torch.max(torch.min(start[None], high), low)
        with torch.no_grad():
            anchor = encode(x)
            one, other = (judge or encode)(x), (judge or encode)(x + delta)
            taus.append((other - one).norm() / one.norm())
        deltas = [delta]
        for _ in range(model.steps):
            moving = deltas[-1].clone().requires_grad_(True)
            loss = (encode(x + moving) - anchor).pow(2).sum()
            (gradient,) = torch.autograd.grad(loss, moving)
            delta = torch.clamp(deltas[-1] + model.step * model.eps * torch.sign(gradient), -model.eps, model.eps)
            deltas.append(torch.max(torch.min(delta, high), low))
        weights = torch.tensor([torch.e ** (model.beta * number) for number in range(len(deltas))])
        weights = weights / weights.sum()
        weighted = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)]).sum(0)
        made.append(x + (weighted if taus[-1] < model.tau else deltas[0]))
    return torch.cat(made), torch.stack(taus)


def between(model: TTC, judge: Any = None) -> TTC:
    """The same with a threshold that half of the images are below."""
    _, taus = published(model.base.encode_image, IMAGES, model.eps * start(model), model, judge)
    return replace(model, tau=float(taus.median()) + 1e-4)


def start(model: Any) -> Tensor:
    with drawing(SEEDS):
        return model.uniform(IMAGES, "start")


@pytest.mark.parametrize("model", [TTC(Tiny()), TTC(Tiny(), eps=8 / 255, step=0.3, steps=4, beta=0.5)], ids=["", "4"])
def test_ttc_is_what_the_authors_published(model: TTC) -> None:
    model = between(model)
    wanted, taus = published(Tiny().encode_image, IMAGES, model.eps * start(model), model)
    found = seen(model, IMAGES)
    assert float((found - wanted).abs().amax((1, 2, 3)).median()) < 1e-6
    assert float(((found - wanted).abs() > 1e-6).float().mean()) < 2e-3, "signs of gradients of rounding alone"
    with drawing(SEEDS), torch.no_grad():
        gates = model.answer(PROMPTS).hard(IMAGES).gates
    assert torch.allclose(gates["tau"], model.tau - taus, atol=1e-4)
    assert 0 < int((gates["tau"] > 0).sum()) < 6, "some are judged attacked, some clean"


def test_the_threshold_may_be_that_of_another_model(tmp_path: Path) -> None:
    other = HuggingFace(str(save_clip(tmp_path / "clip")))
    model = between(TTC(Tiny(), tau_model=other), other.encode_image)
    wanted, taus = published(Tiny().encode_image, IMAGES, model.eps * start(model), model, other.encode_image)
    assert float(((seen(model, IMAGES) - wanted).abs() > 1e-6).float().mean()) < 2e-3
    with drawing(SEEDS), torch.no_grad(), counting() as costs:
        gates = model.answer(PROMPTS).hard(IMAGES).gates
    assert torch.allclose(gates["tau"], model.tau - taus, atol=1e-4)
    assert (costs.forwards, costs.backwards) == (6 * 6, 2 * 6), "two more forwards, of the other model"


def test_images_judged_clean_get_noise_as_published_or_stay() -> None:
    for tau in (0.0, 1.0):
        noisy, quiet = (seen(TTC(Tiny(), tau=tau, noise_on_clean=choice), IMAGES) for choice in (True, False))
        noise = (4 / 255 * start(TTC(Tiny()))).clamp(min=-IMAGES, max=1 - IMAGES)
        assert torch.allclose(quiet, IMAGES) == (tau == 0.0)
        assert torch.allclose(noisy, IMAGES + noise, atol=1e-6) == (tau == 0.0)
        assert torch.equal(noisy, quiet) == (tau == 1.0)


def test_without_steps_it_is_random_noise() -> None:
    assert torch.equal(seen(TTC(Tiny(), steps=0), IMAGES), seen(RN(Tiny()), IMAGES))
    assert torch.equal(seen(TTC(Tiny(), tau=0.0), IMAGES), seen(RN(Tiny()), IMAGES))
    moved = (seen(RN(Tiny(), eps=0.1), IMAGES) - IMAGES).abs()
    assert float(moved.max()) <= 0.1 + 1e-6 and float(moved.mean()) == pytest.approx(0.05, rel=0.1)
    assert not torch.equal(seen(RN(Tiny()), IMAGES), seen(RN(Tiny()), IMAGES, fold(SEEDS, 1)))
    assert RN(Tiny()).answer().gates == {} == TTC(Tiny(), steps=0).answer().gates


@pytest.mark.parametrize(
    ("model", "forwards", "backwards"),
    [(TTC(Toy()), 4, 2), (TTC(Toy(), steps=5), 7, 5), (RN(Toy()), 1, 0), (TTC(TTC(Toy())), 16, 10)],
)
def test_what_an_image_costs_is_counted(model: VisionLanguageModel, forwards: int, backwards: int) -> None:
    answer = model.answer(PROMPTS)
    with counting() as costs, torch.no_grad(), drawing(SEEDS):
        answer(middle(6))
    assert (costs.forwards, costs.backwards) == (6 * forwards, 6 * backwards)


@pytest.mark.parametrize("model", [TTC(Tiny()), TTC(GaussianNoise(BitDepth(Tiny())))], ids=["alone", "around others"])
def test_a_counterattack_meets_the_contract(model: Any) -> None:
    check_wrapper(model)


def test_a_batch_equals_its_singles() -> None:
    model, images = TTC(Toy(), tau=0.05), middle(6)
    whole = seen(model, images)
    singles = torch.cat([seen(model, images[i : i + 1], SEEDS[i : i + 1]) for i in range(6)])
    assert torch.allclose(whole, singles, atol=1e-6)


def test_the_gradient_of_the_smooth_stand_in_is_its_own() -> None:
    """Against differences of its values; that of BPDA is another."""
    answer, images = TTC(Toy(), tau=0.05).answer(PROMPTS), middle(2)
    assert answer.soft is not None

    def value(pixels: Tensor, soft: bool = True) -> Tensor:
        with drawing(SEEDS[:2]):
            said = (answer.soft if soft else answer.hard)(pixels)  # type: ignore[misc]
        return said.embeddings[:, 0].sum()

    pixels = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    (around,) = torch.autograd.grad(value(pixels, soft=False), pixels)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    width = 2e-3
    with torch.enable_grad():
        ends = [value((images + sign * width * direction).requires_grad_(True)).detach() for sign in (1, -1)]
    slope = float((ends[0] - ends[1]) / (2 * width))
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.05)
    assert not torch.allclose(gradient, around, rtol=1e-3)


def test_through_attention_the_smooth_stand_in_has_a_gradient(tmp_path: Path) -> None:
    """The fast kernels of attention cannot be differentiated twice."""
    answer = TTC(HuggingFace(str(save_clip(tmp_path / "clip")))).answer(PROMPTS)
    assert answer.soft is not None
    pixels = IMAGES[:2].clone().requires_grad_(True)
    with drawing(SEEDS[:2]):
        (gradient,) = torch.autograd.grad(answer.soft(pixels).logits[:, 0].sum(), pixels)
    assert bool(gradient.isfinite().all()) and bool(gradient.flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tau": 1.5}, r"TTC\(tau=1.5\) is no threshold.* from 0 to 1"),
        ({"tau": -0.1}, "from 0 to 1"),
        ({"eps": -0.1}, "0 to 1, in pixels"),
        ({"step": 0.0}, "does not climb"),
        ({"steps": -1}, "0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        TTC(Tiny(), **settings)
    with pytest.raises(CrossguardError, match="0 to 1"):
        RN(Tiny(), eps=2.0)


def test_answers_keep_what_is_judged() -> None:
    captions = Tiny().encode_text(["a red circle", "two blue stars"])
    answer = TTC(BitDepth(Tiny())).answer(captions)
    assert isinstance(answer, Answer) and answer(IMAGES).shape == (6, captions.shape[1])
    assert answer.without()(IMAGES).shape == (6, captions.shape[1])
