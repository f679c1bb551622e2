"""Defenses that change every image, against closed forms and the real codec."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from crossguard import JPEG, Crops, CrossguardError, LowPass, ResizePad, Tiny, TotalVariation
from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.models.transforms import smooth_jpeg, smoothest
from crossguard.models.views import jpeg
from crossguard.seeds import by_position, drawing, fold, keys, uniform
from crossguard.testing import check_wrapper
from toys import Toy, last_asked, middle

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",))
SEEDS = keys("abcdef")
IMAGES = uniform(by_position(6), (3, 32, 32))


def seen(model: Any, images: Tensor, seeds: Tensor = SEEDS) -> Tensor:
    return last_asked(model, images, seeds[: len(images)], PROMPTS)


def soft_pictures(count: int, size: int) -> Tensor:
    """Pictures of long waves, as photographs are, in all colors."""
    place = torch.arange(size) / size
    phase = 6.3 * uniform(by_position(count), (3, 1, 1))
    waves = torch.sin(5 * place[:, None] + 3 * place + phase) + 0.3 * torch.sin(20 * place + 2 * phase)
    return 0.5 + 0.35 * waves.clamp(-1.3, 1.3)


# --- Filters ---


@pytest.mark.parametrize("cycles", [0, 3, 8, 15])
def test_a_wave_comes_out_as_the_filter_says(cycles: int) -> None:
    place = torch.arange(32) * 2 * math.pi * cycles / 32
    wave = torch.cos(place).expand(1, 3, 32, 32)
    kept = (seen(LowPass(Toy(), radius=0.5), 0.5 + 0.4 * wave) - 0.5) / 0.4
    wanted = math.exp(-((cycles / 16) ** 2) / (2 * 0.5**2))
    assert torch.allclose(kept, wanted * wave, atol=1e-5)
    kept = (seen(LowPass(Toy(), radius=0.5, ideal=True), 0.5 + 0.4 * wave.mT) - 0.5) / 0.4
    assert torch.allclose(kept, (cycles <= 8) * wave.mT, atol=1e-5)


# --- Resizing and crops ---


def test_resizing_and_padding_keeps_every_pixel_that_it_shows() -> None:
    images = IMAGES[:, :, :20]  # not square
    same = seen(ResizePad(Toy(), low=1.0, high=1.0), images)
    assert torch.equal(same, images)
    twice = seen(ResizePad(Toy(), low=2.0, high=2.0), images)
    assert torch.equal(twice, images.repeat_interleave(2, 2).repeat_interleave(2, 3)), "the nearest pixels"
    model = ResizePad(Toy(), low=1.0, high=1.5, fill=2 / 3)
    wide = seen(model, images)
    assert wide.shape == (6, 3, 30, 48)
    for image, made in zip(images, wide, strict=True):
        shown = (made != 2 / 3).all(0)
        rows, columns = shown.any(1).nonzero()[:, 0], shown.any(0).nonzero()[:, 0]
        assert int(shown.sum()) == len(rows) * len(columns), "one box"
        assert 20 <= len(rows) < 30 and len(columns) == pytest.approx(1.6 * len(rows), abs=2)
        assert set(made[:, shown].flatten().tolist()) <= set(image.flatten().tolist())
    assert not torch.equal(wide, seen(model, images, fold(SEEDS, 1)))


def test_resizing_passes_each_gradient_to_where_it_came_from() -> None:
    pixels, model = IMAGES.clone().requires_grad_(True), ResizePad(Toy(), low=1.2, high=1.6)
    with drawing(SEEDS):
        made = model.transform(pixels)
    made.sum().backward()
    gradient = pixels.grad
    assert gradient is not None and bool((gradient >= 1.0).all()) and bool((gradient == gradient.round()).all())
    shown = (made.detach() != 0).any(1).flatten(1).sum(1) * 3.0  # a single color may be 0 by chance
    assert torch.allclose(gradient.flatten(1).sum(1), shown), "as many copies as it shows pixels"


def test_sizes_and_places_are_drawn_as_published() -> None:
    """From 299 pixels to 310 up to 330, anywhere on 331."""
    rows = torch.ones(400, 3, 299, 1).expand(400, 3, 299, 299)[:, :, :, :1]
    wide = seen(ResizePad(Toy()), rows, keys(map(str, range(400))))[:, 0, :, 0]
    sizes, starts = wide.sum(1).int(), wide.argmax(1)
    assert wide.shape[1] == 331 and (int(sizes.min()), int(sizes.max())) == (310, 330)
    assert int((starts + sizes).max()) == 331 and int(starts.max()) > 15 and int(starts.min()) == 0


def test_crops_are_parts_of_the_image_at_its_size() -> None:
    model, images = Crops(Toy(), crops=8, share=0.5), middle(4, 12)
    with drawing(SEEDS[:4]):
        views = model.views(images)
    assert views.shape == (4, 8, 3, 12, 12)
    flat = torch.arange(12.0).view(12, 1) / 24 + torch.arange(12.0) / 48  # a slope, of which a crop has half
    with drawing(SEEDS[:1]):
        parts = model.views(flat.expand(1, 3, 12, 12))[0, :, 0]
    assert torch.allclose(parts[:, 2:10].diff(dim=1), torch.tensor(1 / 48), atol=1e-5)
    starts = ((parts[:, 6, 6] - parts[0, 6, 6]) * 48).round()
    assert len(set(starts.tolist())) > 3, "from different places"
    whole = Crops(Toy(), crops=2, share=1.0).answer(PROMPTS)(images)
    assert torch.allclose(whole, Toy().answer(PROMPTS)(images), atol=1e-4)


# --- Total variation ---


def variation(images: Tensor) -> Tensor:
    down, across = torch.zeros_like(images), torch.zeros_like(images)
    down[:, :, :-1], across[..., :-1] = images.diff(dim=2), images.diff(dim=3)
    return (down.square() + across.square()).sqrt().flatten(1).sum(1)


def test_the_smoothest_image_of_two_halves_is_known() -> None:
    """Each half moves by weight / (2 * width) towards the other: the derivative of width * (z - x)^2 + weight * |jump|
    in each row."""
    images = torch.cat([torch.full((1, 3, 8, 6), 0.2), torch.full((1, 3, 8, 10), 0.8)], 3)
    found = smoothest(images, torch.ones(1, 1, 8, 16), 0.5, 4000)
    assert torch.allclose(found[..., :6], torch.tensor(0.2 + 0.5 / 12), atol=1e-3)
    assert torch.allclose(found[..., 6:], torch.tensor(0.8 - 0.5 / 20), atol=1e-3)


def test_no_other_image_is_smoother_and_as_near() -> None:
    images, mask = middle(2, 10), (uniform(by_position(2) + 9, (1, 10, 10)) < 0.5).float()

    def cost(z: Tensor) -> Tensor:
        return (mask * (z - images)).square().flatten(1).sum(1) + 0.03 * variation(z)

    best = cost(smoothest(images, mask, 0.03, 3000))
    assert bool((cost(smoothest(images, mask, 0.03, 100)) < 1.02 * best).all()), "100 steps come near"
    for number in range(5):
        other = smoothest(images, mask, 0.03, 3000) + 0.01 * (uniform(by_position(2) + number, (3, 10, 10)) - 0.5)
        assert bool((cost(other) > best).all())


def test_what_was_forgotten_comes_from_around_it() -> None:
    images = torch.full((2, 3, 12, 12), 0.3)
    assert torch.allclose(seen(TotalVariation(Toy()), images), images, atol=1e-3)
    kept = seen(TotalVariation(Toy(), keep=1.0, weight=0.0), IMAGES)
    assert torch.allclose(kept, IMAGES, atol=1e-5)
    found = seen(TotalVariation(Toy()), IMAGES)
    assert bool((variation(found) < 0.6 * variation(IMAGES)).all())
    assert not torch.allclose(found, seen(TotalVariation(Toy()), IMAGES, fold(SEEDS, 1)), atol=1e-2)


def test_the_gradient_of_the_smoothest_image_is_that_of_the_mean_of_each_half() -> None:
    """z of a half is the mean of x there, and a constant (see above): what a pixel of x moves is its half alone."""
    images = torch.cat([torch.full((1, 3, 4, 3), 0.2), torch.full((1, 3, 4, 5), 0.8)], 3).requires_grad_(True)
    left = smoothest(images, torch.ones(1, 1, 4, 8), 0.2, 1000)[..., :3].sum()
    (gradient,) = torch.autograd.grad(left, images)
    assert torch.allclose(gradient[..., :3], torch.tensor(1.0), atol=1e-2)
    assert torch.allclose(gradient[..., 3:], torch.tensor(0.0), atol=1e-2)


def test_the_stand_in_of_total_variation_is_its_solver_cut_short() -> None:
    for model, equal in ((TotalVariation(Toy(), steps=20), True), (TotalVariation(Toy(), steps=21), False)):
        answer = model.answer(PROMPTS)
        assert answer.soft is not None
        with drawing(SEEDS):
            hard = answer.hard(IMAGES).logits
        with drawing(SEEDS):
            pixels = IMAGES.clone().requires_grad_(True)
            soft = answer.soft(pixels).logits
        assert torch.equal(hard, soft) == equal and torch.allclose(hard, soft, atol=0.1)
        (gradient,) = torch.autograd.grad(soft[:, 0].sum(), pixels)
        kept = (seen(TotalVariation(Toy(), weight=0.0), IMAGES) - IMAGES).abs().amax(1) < 1e-5
        assert torch.equal(gradient.abs().amax(1) > 0.0, kept), "none of what is forgotten"


# --- JPEG ---


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("size", [32, 40])
def test_the_smooth_stand_in_is_that_of_the_codec(quality: int, size: int) -> None:
    """Where rounding leaves things as they are: on what the codec itself wrote."""
    pictures = soft_pictures(4, size)
    written = jpeg(pictures, quality)
    assert torch.equal(seen(JPEG(Toy(), quality), pictures), written)
    again, near = jpeg(written, quality), smooth_jpeg(written, quality)
    assert float((near - again).abs().mean()) < 0.9 / 255
    assert float((smooth_jpeg(pictures, quality) - written).abs().mean()) < 2.5 / 255
    other = smooth_jpeg(written, 10)
    assert float((other - again).abs().mean()) > 3 * float((near - again).abs().mean()), "of this quality"


def test_the_smooth_stand_in_has_the_gradient_of_itself() -> None:
    pixels = (0.5 * soft_pictures(1, 16) + 0.25).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda one: smooth_jpeg(one, 75), pixels, eps=1e-7, atol=1e-3, fast_mode=True)


# --- All of them ---


@pytest.mark.parametrize(
    "model", [LowPass(Tiny()), ResizePad(Tiny()), Crops(Tiny(), 3), TotalVariation(Tiny()), JPEG(Tiny())]
)
def test_they_meet_the_contract(model: Any) -> None:
    check_wrapper(model)


@pytest.mark.parametrize(("model", "forwards"), [(LowPass(Toy()), 1), (Crops(Toy()), 30), (TotalVariation(Toy()), 1)])
def test_what_an_image_costs_is_counted(model: Any, forwards: int) -> None:
    with counting() as costs, torch.no_grad(), drawing(SEEDS):
        model.answer(PROMPTS)(middle(6))
    assert (costs.forwards, costs.backwards) == (6 * forwards, 0)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LowPass(Toy(), radius=0.0), "leaves nothing; give a share"),
        (lambda: ResizePad(Toy(), low=1.2, high=1.1), r"ResizePad\(low=1.2, high=1.1\).* the smaller one first"),
        (lambda: ResizePad(Toy(), fill=2.0), "no color; give one from 0 to 1"),
        (lambda: Crops(Toy(), crops=0), r"Crops\(crops=0\) looks at nothing; give 1 or more"),
        (lambda: Crops(Toy(), share=0.0), "give more than 0, at most 1"),
        (lambda: TotalVariation(Toy(), keep=0.0), "give more than 0, at most 1"),
        (lambda: TotalVariation(Toy(), weight=-1.0), "give 0 or more"),
        (lambda: TotalVariation(Toy(), steps=0), "does nothing; give 1 or more"),
        (lambda: JPEG(Toy(), quality=0), "give 1 to 95"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        make()
