"""Defenses of several views against restatements of the authors' code, and against what must come out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models import ensembles, views
from crossguard.models.embedded import Tiny
from crossguard.models.ensembles import DBD, MAC, MTA, TTE
from crossguard.models.wrapper import Wrapper
from crossguard.seeds import drawing, replay
from crossguard.testing import check_wrapper
from fixtures import floats, pictures

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",))
KEYS = torch.arange(4) + 50
IMAGES = floats(pictures(4, 32, 32, 40, 215))
IMAGES[:, :, 0, 0] = 1.0


def asked(word: Wrapper, rows: slice = slice(4)) -> Tensor:
    answer = word.answer(PROMPTS)
    with drawing(KEYS[rows]), torch.no_grad():
        return answer(IMAGES[rows])


def plain(images: Tensor) -> Tensor:
    with torch.no_grad():
        return Tiny().answer(PROMPTS)(images)


def keys_of(word: Wrapper, count: int, use: str) -> Tensor:
    with drawing(KEYS):
        return word.keys(count, use)


@pytest.mark.parametrize(
    "word", [TTE(Tiny()), MTA(Tiny(), views=8), DBD(Tiny()), MAC(Tiny())], ids=lambda w: type(w).__name__
)
def test_the_contract_of_a_defense(word: Wrapper) -> None:
    check_wrapper(word)
    together, alone = asked(word), torch.cat([asked(word, slice(i, i + 1)) for i in range(4)])
    assert torch.allclose(together, alone, atol=2e-3)


# --- TTE ---


def test_tte_with_one_view_is_the_model() -> None:
    assert torch.allclose(asked(TTE(Tiny(), crops=0, flip=False)), plain(IMAGES), atol=1e-5)


def test_the_views_of_tte() -> None:
    word = TTE(Tiny())
    found = word.views(IMAGES)
    assert found.shape == (4, 10, 3, 32, 32) and not word.random
    assert torch.equal(found[:, 0], IMAGES) and torch.equal(found[:, 1], IMAGES.flip(3))
    wide = F.pad(IMAGES, (4,) * 4, value=torch.nan)
    places = list[tuple[int, int]]()
    for crop, mirrored in zip(found[:, 2:6].unbind(1), found[:, 6:].unbind(1), strict=True):
        fits = [
            (top, left)
            for top in range(9)
            for left in range(9)
            if same(crop, wide[:, :, top : top + 32, left : left + 32])
        ]
        (place,) = fits
        places.append(place)
        assert same(mirrored, wide.flip(3)[:, :, place[0] : place[0] + 32, place[1] : place[1] + 32])
    assert len(set(places)) > 1
    expected = torch.stack([plain(view) for view in found.unbind(1)]).mean(0)
    assert torch.allclose(asked(word), expected, atol=1e-3)
    outside = found[:, 2:6].reshape(-1, 3, 32 * 32)[wide[:, :, places[0][0], places[0][1]].isnan().any(1).repeat(4)]
    assert len(outside) == 0 or torch.allclose(outside[0, :, 0], torch.tensor(word.fill))


def same(crop: Tensor, other: Tensor) -> bool:
    """Whether they are equal where the other is a number."""
    known = ~other.isnan()
    return bool(torch.allclose(crop[known], other[known], atol=1e-6))


def test_a_crop_never_begins_at_the_last_place() -> None:
    """As in the public code; of 9 places in each direction 8 are drawn, with equal probability."""
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 16, 16] = 1.0
    found = TTE(Tiny(), crops=400, flip=False, fill=(0.0, 0.0, 0.0)).views(image)[0, 1:, 0].nonzero()
    for axis in (1, 2):
        counts = (20 - found[:, axis]).bincount(minlength=9)  # the point moves up and to the left
        assert int(counts[8]) == 0 and int(counts[:8].min()) > 25


def test_the_slip_of_one_crop() -> None:
    usual, slipped = (TTE(Tiny(), one_crop=one).views(IMAGES) for one in (False, True))
    assert torch.equal(slipped[:, 2:6], usual[:, 5:6].expand(-1, 4, -1, -1, -1))
    assert torch.equal(slipped[:, 6:], usual[:, 9:].expand(-1, 4, -1, -1, -1))
    assert torch.equal(TTE(Tiny(), seed=1, one_crop=True).views(IMAGES)[:, 0], IMAGES)
    assert not torch.equal(TTE(Tiny(), seed=1).views(IMAGES), usual)


# --- MTA ---


def mean_shift(unit: Tensor, logits: Tensor) -> Tensor:
    """The authors' loops for one image."""
    distances = torch.cdist(unit, unit)
    near = distances.sort(1).values[:, 1 : 1 + int(0.3 * (len(unit) - 1))] ** 2
    width = (0.5 * near.mean(1)).sqrt()
    affinity = logits.softmax(1) @ logits.softmax(1).T
    weights, mode = torch.ones(len(unit)) / len(unit), unit[0]

    def density() -> Tensor:
        return torch.exp(-((unit - mode).norm(dim=1) ** 2) / (2 * width**2))

    for _ in range(5):
        at = density()
        for _ in range(5):
            old, weights = weights, (1 / 0.2 * (at + 4 * (affinity * weights[None]).sum(1))).softmax(0)
            if (old - weights).norm() < 1e-6:
                break
        for _ in range(5):
            shares = density() * weights
            old, mode = mode, (shares[:, None] * unit).sum(0) / shares.sum()
            mode = mode / mode.norm()
            if (old - mode).norm() < 1e-6:
                break
    return mode


def test_mta_is_its_loop() -> None:
    word = MTA(Tiny(), views=12)
    made = views.tpt_views(IMAGES, keys_of(word, 4, "views"), 12, mixed=False)
    model, found = Tiny(), asked(word)
    with torch.no_grad():
        texts = model.class_embeddings(PROMPTS)
        for image, logits in zip(made, found, strict=True):
            unit = F.normalize(model.encode_image(image), dim=1)
            mode = mean_shift(unit, model.logits(unit, texts))
            assert torch.allclose(logits, model.logits(mode[None], texts)[0], atol=1e-3)
            assert float((logits - model.logits(unit[:1], texts)[0]).abs().max()) > 0.1


def test_views_that_are_one_have_it_for_a_mode() -> None:
    unit = F.normalize(torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)), dim=2)
    noise = 1e-3 * torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(1))
    near = F.normalize(unit + noise, dim=2)
    far = torch.cat([near[:, :9], -unit], 1)  # one view is of something else
    mode = MTA(Tiny(), views=10).mode(far, torch.zeros(2, 10, 3))
    assert float((mode - unit[:, 0]).norm(dim=1).max()) < 4e-3
    copies = torch.cat([unit.expand(-1, 9, -1), -unit], 1)
    assert torch.allclose(MTA(Tiny(), views=10).mode(copies, torch.zeros(2, 10, 3)), unit[:, 0], atol=1e-6)


# --- DBD ---


def test_the_views_of_dbd() -> None:
    word = DBD(Tiny())
    with drawing(KEYS):
        found = word.seen(IMAGES)
    assert found.shape == (4, 32, 3, 32, 32) and torch.equal(found[:, 0], IMAGES)
    levels = (IMAGES * 255).round()
    for view, rounded in ((17, levels // 32), (18, (levels / 32).round()), (19, (levels + 31) // 32)):
        assert torch.allclose(found[:, view] * 255, (rounded * 32) % 256, atol=1e-3)
    assert float(found[:, 19].amin()) == 0.0  # what was white
    with drawing(KEYS):
        tame = replace(word, wraps=False).seen(IMAGES)
    assert torch.allclose(tame[:, 19] * 255, ((levels + 31) // 32 * 32).clamp(max=255), atol=1e-3)
    for view, quality in ((20, 50), (21, 60), (22, 75)):
        assert torch.equal(found[:, view], views.jpeg(IMAGES, quality))
    noise = found[:, 23:29] - IMAGES[:, None]
    inside = (found[:, 23:29] > 0) & (found[:, 23:29] < 1)
    assert len(noise.flatten(2).flatten(0, 1).unique(dim=0)) == 24
    assert float(noise[inside].std()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(found[:, 29], views.median(IMAGES, 5)) and torch.equal(found[:, 30], views.box_blur(IMAGES, 5))
    assert torch.equal(found[:, 31], views.gaussian_blur(IMAGES, torch.full((4,), 1.1), 5))


@pytest.mark.parametrize("tau", [-1.0, 1.0, 0.35])
def test_dbd_is_its_loop(tau: float) -> None:
    word, model = DBD(Tiny(), tau=tau), Tiny()
    with drawing(KEYS):
        made = word.seen(IMAGES)
    answer = word.answer(PROMPTS)
    with drawing(KEYS), torch.no_grad():
        again = replay()
        said = answer.hard(IMAGES)
        with again():
            gate = answer.gates["agreement"](IMAGES)
        texts = model.class_embeddings(PROMPTS)
        for image, logits, agreement in zip(made, said.logits, said.gates["agreement"], strict=True):
            unit = F.normalize(model.encode_image(image), dim=1)
            scores = model.logits(unit, texts)
            entropy = -(scores.softmax(1) * scores.log_softmax(1)).sum(1)
            away = unit[1 + entropy[1:].argsort()[:16]] - unit[0]
            cosine = float((F.normalize(away, dim=1) @ F.normalize(away.mean(0), dim=0)).mean())
            assert float(agreement) == pytest.approx(cosine - tau, abs=1e-3)
            expected = unit[0] + (2.5 if cosine > tau else 1.0) * away.mean(0)
            assert torch.allclose(logits, model.logits(expected[None], texts)[0], atol=1e-2)
    assert torch.allclose(gate, said.gates["agreement"], atol=1e-4)


# --- MAC ---


def test_mac_is_its_loop() -> None:
    word, model = MAC(Tiny(), tau=0.6, temperature=0.3), Tiny()
    with drawing(KEYS):
        many, keys = views.repeated(IMAGES, word.keys(4, "views"), 1)
        both = torch.stack([IMAGES, views.mac_view(many, keys)], 1).flatten(0, 1)
        other = views.mac_view(both, word.keys(8, "corruption"))
        change = (8 / 255 * word.uniform(both, "start")).clamp(-both, 1 - both)
    with torch.no_grad():
        clean = model.encode_image(both)
        moved = (model.encode_image(other) - clean).norm(dim=1) / clean.norm(dim=1)
    for _ in range(4):
        pixels = (both + change).requires_grad_(True)
        loss = (model.encode_image(pixels) - clean).square().sum()
        (slope,) = torch.autograd.grad(loss, pixels)
        change = (change + 2 / 255 * slope.sign()).clamp(-8 / 255, 8 / 255).clamp(-both, 1 - both)
    weight = torch.sigmoid((moved - 0.6) / 0.3)
    assert float(weight.min()) > 0.05 and float(weight.max()) < 0.95
    expected = plain((both + weight[:, None, None, None] * change).clamp(0, 1)).view(4, 2, 3).mean(1)
    found = asked(word)
    assert torch.allclose(found, expected, atol=0.05)
    assert float((found - plain(both).view(4, 2, 3).mean(1)).abs().max()) > 1.0


def test_mac_that_moves_nothing_is_the_mean_of_its_views() -> None:
    word = MAC(Tiny(), eps=0.0)
    with drawing(KEYS):
        many, keys = views.repeated(IMAGES, word.keys(4, "views"), 1)
    expected = (plain(IMAGES) + plain(views.mac_view(many, keys))) / 2
    assert torch.allclose(asked(word), expected, atol=1e-3)


def test_what_they_cost() -> None:
    for word, forwards, backwards in ((TTE(Tiny()), 10, 0), (DBD(Tiny()), 32, 0), (MAC(Tiny()), 14, 8)):
        answer = word.answer(PROMPTS)
        with counting() as costs, drawing(KEYS), torch.no_grad():
            answer(IMAGES)
        assert (costs.forwards / 4, costs.backwards / 4) == (forwards, backwards)


# --- What is refused ---


@pytest.mark.parametrize("word", [MTA, DBD])
def test_who_needs_classes_says_so(word: Any) -> None:
    with pytest.raises(CrossguardError, match=f"{word.__name__} compares images with the texts of classes"):
        word(Tiny()).answer()


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        (TTE, {"crops": -1}),
        (TTE, {"pad": 1.5}),
        (TTE, {"fill": (0.0, 0.0, 2.0)}),
        (MTA, {"views": 1}),
        (MTA, {"nearest": 0.0}),
        (MTA, {"spread": 0.0}),
        (DBD, {"keep": 0}),
        (DBD, {"keep": 32}),
        (DBD, {"tau": 2.0}),
        (MAC, {"number": 0}),
        (MAC, {"temperature": 0.0}),
        (MAC, {"eps": 2.0}),
    ],
)
def test_settings_that_mean_nothing(word: Any, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(CrossguardError, match=f"{name}="):
        word(Tiny(), **changes)


def test_the_rounds_of_mta_are_the_authors() -> None:
    assert (ensembles._TURNS, ensembles._STILL) == (5, 1e-6)
