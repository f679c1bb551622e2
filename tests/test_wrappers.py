"""Defenses around defenses: they compose or are refused, and their noise belongs to the sample."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from crossguard import (
    PGD,
    AtGate,
    BitDepth,
    Drift,
    GaussianNoise,
    ImageVictim,
    Linf,
    PairVictim,
    Tiny,
    Unrolled,
    Wrapper,
    words,
)
from crossguard.attacks.base import Queries
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import Purifier
from crossguard.seeds import by_position, drawing, drawn, fold, inherited, keys, normal, same_draw, uniform
from crossguard.shapes import Embeddings, Images, Logits, PerImage
from crossguard.testing import check_model, check_wrapper

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",))
IMAGES = uniform(by_position(4), (3, 32, 32))
SEEDS = keys("abcd")


@dataclass(frozen=True)
class Counterattack(Purifier):
    """Moves images whose embeddings noise hardly moves by an inner attack, as TTC does; here away from their mirror
    image, since at the image itself a gradient is of rounding alone."""

    base: VisionLanguageModel
    limit: float = 0.1
    random_start: bool = True
    random = True

    def gate(self, images: Images) -> PerImage:
        noise = 4 / 255 * normal(self.keys(len(images), "gate"), images.shape[1:])
        clean = self.base.encode_image(images)
        return self.limit - (self.base.encode_image((images + noise).clamp(0, 1)) - clean).norm(dim=1) / clean.norm(
            dim=1
        )

    def purify(self, images: Images) -> Images:
        gate, attack = self.gate(images), PGD(steps=2, step=0.5, random_start=self.random_start)
        moved = attack(self.base.encode_image, images, Drift(self.base.encode_image(images.flip(3))), Linf(4 / 255))
        acted.append(gate)
        return torch.where((gate > 0)[:, None, None, None], moved, images)


acted: list[PerImage] = []


@dataclass(frozen=True)
class Cautious(Wrapper):
    """Knows the prompts: halves the logits."""

    base: VisionLanguageModel

    def classifier(self, prompts: Prompts) -> Callable[[Images], Logits]:
        inner = self.base.classifier(prompts)
        return lambda images: inner(images) / 2


@dataclass(frozen=True)
class Centered(Wrapper):
    """Knows the prompts otherwise: from class embeddings it takes their mean."""

    base: VisionLanguageModel

    def class_embeddings(self, prompts: Prompts) -> Embeddings:
        found = self.base.class_embeddings(prompts)
        return found - found.mean(0)


def vocabulary() -> Iterator[type[Any]]:
    for name in words.names():
        try:
            kind = words.find(name)
        except CrossguardError:
            continue
        if issubclass(kind, Wrapper):
            yield kind


WRAPPERS = list(vocabulary())


def around(kind: type[Any], base: VisionLanguageModel) -> Any:
    assert dataclasses.fields(kind)[0].name == "base"
    return kind(base)


@pytest.mark.parametrize(("outer", "inner"), itertools.product(WRAPPERS, WRAPPERS))
def test_a_wrapper_around_a_wrapper_is_both(outer: type[Any], inner: type[Any]) -> None:
    within = around(inner, Tiny())
    answer = around(outer, within).classifier(PROMPTS)
    once, images = within.classifier(PROMPTS), IMAGES
    with drawing(SEEDS), torch.no_grad():
        if issubclass(outer, Purifier):
            images = around(outer, within).purify(images)
        elif outer is GaussianNoise:
            noise = normal(drawn(4, "GaussianNoise 3 "), images.shape[1:])
            images = (images + 8 / 255 * noise).clamp(0, 1)
        else:
            pytest.fail(f"say here what {outer.__name__} does, and that it is done around {inner.__name__}")
        expected = once(images)
    with drawing(SEEDS), torch.no_grad():
        found = answer(IMAGES)
    assert torch.allclose(found, expected, atol=1e-4)
    assert not torch.allclose(found, Tiny().classifier(PROMPTS)(IMAGES), atol=1e-3)


@pytest.mark.parametrize("knowing", [Cautious, Centered])
@pytest.mark.parametrize("outer", [*WRAPPERS, Counterattack])
def test_a_defense_that_knows_the_prompts_is_not_dropped(outer: type[Any], knowing: type[Any]) -> None:
    lost = "classifier" if knowing is Cautious else "class_embeddings"
    for model in (outer(knowing(Tiny())), outer(outer(knowing(Tiny())))):
        with pytest.raises(CrossguardError, match=f"would lose what {knowing.__name__} does .* {lost}"):
            model.classifier(PROMPTS)
    assert knowing(outer(Tiny())).classifier(PROMPTS)(IMAGES).shape == (4, 3)
    outer(knowing(Tiny())).encode_image(IMAGES)  # of embeddings nothing is lost


def test_a_smooth_version_drops_nothing_either() -> None:
    @dataclass(frozen=True)
    class Both(BitDepth):
        def classifier(self, prompts: Prompts) -> Callable[[Images], Logits]:
            inner = super().classifier(prompts)
            return lambda images: -inner(images)

    assert Both(Tiny()).classifier(PROMPTS)(IMAGES).shape == (4, 3)
    with pytest.raises(CrossguardError, match="would lose"):
        Unrolled(Both(Tiny())).classifier(PROMPTS)


# --- Noise belongs to the sample ---


@pytest.mark.parametrize("base", [Tiny(), GaussianNoise(Tiny(), std=2 / 255)])
@pytest.mark.parametrize("random_start", [True, False])
def test_a_counterattack_answers_alike_in_every_batch(base: VisionLanguageModel, random_start: bool) -> None:
    model = Counterattack(base, limit=1.0, random_start=random_start)
    with torch.no_grad():
        with drawing(SEEDS) as lent:
            whole = model.encode_image(IMAGES)
        assert lent.used
        singles = []
        for i in (2, 0, 3, 1):
            with drawing(SEEDS[i : i + 1]):
                singles.append(model.encode_image(IMAGES[i : i + 1]))
        assert torch.allclose(whole[[2, 0, 3, 1]], torch.cat(singles), atol=1e-3)
        with drawing(fold(SEEDS, 1)):
            same = torch.allclose(model.encode_image(IMAGES), whole, atol=1e-3)
        assert same == (not random_start and base == Tiny())
    check_wrapper(model)


def test_the_gate_is_the_one_that_acts() -> None:
    model = Counterattack(GaussianNoise(Tiny(), std=2 / 255))
    acted.clear()
    with torch.no_grad(), drawing(SEEDS):
        with same_draw():
            before = model.gate(IMAGES)
        with same_draw():
            model.encode_image(IMAGES)
        assert torch.equal(before, acted[0])
        with same_draw():
            assert torch.equal(model.gate(IMAGES), before)
        assert not torch.equal(model.gate(IMAGES), model.gate(IMAGES))  # who asks on gets other noise
    assert float(before.std()) > 0


def test_at_gate_aims_at_the_gate_that_acts() -> None:
    """In each question of the attack, what it is told of the gate is what the defense did."""
    model, told = Counterattack(Tiny()), list[PerImage]()

    def gate(images: Images) -> PerImage:
        told.append(model.gate(images))
        return told[-1]

    victim = PairVictim(*(ImageVictim(model.encode_image, Queries.none(4), SEEDS) for _ in range(3)))
    victim = dataclasses.replace(victim, gate=ImageVictim(gate))
    acted.clear()
    AtGate(PGD(steps=3)).perturb(victim, IMAGES, Drift(Tiny().encode_image(IMAGES)), Linf(4 / 255), SEEDS)
    assert len(told) == len(acted) >= 3
    assert all(torch.equal(said, done) for said, done in zip(told, acted, strict=True))
    assert not torch.equal(told[0], told[1])


def test_an_inner_attack_without_chance_makes_no_model_random() -> None:
    for draws in (True, False):
        with drawing(SEEDS) as outer:
            given = inherited(4, "PGD", draws)
            assert outer.used == draws
            with drawing(given) as lent:
                assert not lent.used
        assert outer.used == draws
    with drawing(SEEDS) as outer:
        with drawing(inherited(4, "PGD", False)):
            drawn(4, "what lies below")
        assert outer.used
    assert torch.equal(inherited(4, "PGD"), by_position(4))


def test_noise_is_named_by_who_draws_and_not_by_when() -> None:
    with drawing(SEEDS):
        one, other, again = drawn(4, "one"), drawn(4, "other"), drawn(4, "one")
    with drawing(SEEDS):
        assert torch.equal(drawn(4, "other"), other) and torch.equal(drawn(4, "one"), one)
        with same_draw():
            views = drawn(8, "one")
    assert not bool((one == other).any() or (one == again).any())
    assert len(set(views.tolist()) | set(one.tolist())) == 12
    with drawing(SEEDS[1:2]):
        assert torch.equal(drawn(1, "one"), one[1:2]) and torch.equal(drawn(1, "one"), again[1:2])
        with same_draw():
            assert torch.equal(drawn(2, "one"), views[2:4])
    with drawing(SEEDS), pytest.raises(CrossguardError, match="6 images where 4 samples"):
        drawn(6, "one")
    twice = GaussianNoise(GaussianNoise(Tiny()))
    with drawing(SEEDS), torch.no_grad():
        assert not torch.equal(twice.keys(4), twice.base.keys(4))  # type: ignore[attr-defined]


# --- Purifiers leave no graph ---


def test_purifying_is_done_without_gradients_unless_it_asks_for_some() -> None:
    seen: list[tuple[bool, bool]] = []

    @dataclass(frozen=True)
    class Climbing(Purifier):
        base: VisionLanguageModel

        def purify(self, images: Images) -> Images:
            seen.append((torch.is_grad_enabled(), images.requires_grad))
            with torch.enable_grad():
                pixels = images.clone().requires_grad_(True)
                (gradient,) = torch.autograd.grad(self.base.encode_image(pixels).square().sum(), pixels)
            return (images + 1 / 255 * gradient.sign()).clamp(0, 1)

    model, pixels = Climbing(Tiny()), IMAGES.clone().requires_grad_(True)
    found = model.encode_image(pixels)
    (gradient,) = torch.autograd.grad(found.sum(), pixels)
    assert seen == [(False, False)]
    pure = model.purify(IMAGES).requires_grad_(True)
    (expected,) = torch.autograd.grad(Tiny().encode_image(pure).sum(), pure)  # as if purifying were the identity
    assert torch.allclose(gradient, expected, atol=1e-5) and bool(gradient.any())
    check_wrapper(model)


# --- The contract of models takes random ones ---


def test_a_random_model_meets_the_contract() -> None:
    check_model(GaussianNoise(Tiny()))
    check_wrapper(BitDepth(GaussianNoise(Tiny())))


def test_noise_of_the_batch_or_of_nobody_does_not() -> None:
    @dataclass(frozen=True)
    class Noisy(Wrapper):
        base: VisionLanguageModel
        way: str = "batch"

        def encode_image(self, images: Images) -> Embeddings:
            if self.way == "batch":
                noise = uniform(by_position(len(images)) + len(images), images.shape[1:])
            elif self.way == "place":
                noise = uniform(by_position(len(images)), images.shape[1:])
            else:
                noise = torch.rand_like(images)
            return self.base.encode_image((images + 0.1 * noise).clamp(0, 1))

    for way, sentence in (("batch", "its singles"), ("place", "its singles"), ("torch", "the same images under")):
        with pytest.raises(AssertionError, match=sentence):
            check_model(Noisy(Tiny(), way))


def test_a_gate_of_two_draws_does_not() -> None:
    @dataclass(frozen=True)
    class Fickle(BitDepth):
        def gate(self, images: Images) -> PerImage:
            return torch.rand(len(images))

    with pytest.raises(AssertionError, match="two values"):
        check_wrapper(Fickle(Tiny()))
