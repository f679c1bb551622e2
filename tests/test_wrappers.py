"""Defenses around defenses: nothing is lost, and their noise belongs to the sample."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import (
    COLA,
    CSR,
    JPEG,
    PGD,
    SCC,
    TAPT,
    Answer,
    BitDepth,
    Changed,
    CLIPure,
    Drift,
    Gated,
    GaussianNoise,
    HedgeDefense,
    Linf,
    Said,
    Tiny,
    TotalVariation,
    Wrapper,
    words,
)
from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.kinds import Ensemble, Latent, Purifier, Transform
from crossguard.models.tuning import Tuner
from crossguard.models.wrapper import Lent
from crossguard.seeds import by_position, drawing, drawn, fold, inherited, keys, normal, replay, uniform
from crossguard.shapes import Embeddings, Images, PerImage
from crossguard.testing import check_model, check_wrapper
from toys import Toy, middle, with_fields

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",))
IMAGES = uniform(by_position(4), (3, 32, 32))
SEEDS = keys("abcd")


def vocabulary() -> Iterator[type[Any]]:
    for name in words.names():
        try:
            kind = words.find(name)
        except CrossguardError:
            continue
        if issubclass(kind, Wrapper) and kind is not TAPT:  # which needs a file; see test_alignment
            yield kind


WRAPPERS = list(vocabulary())
FEW = {"views": 5, "crops": 3, "draws": 3}
ACTS: dict[type[Any], dict[str, Any]] = {  # what would take long, or do nothing on some images, as published
    HedgeDefense: {"steps": 2},
    TotalVariation: {"steps": 5},
    CLIPure: {"step": 0.5, "steps": 1},
    CSR: {"radius": 0.3, "tau": 1.0},
    Gated: {"tau": 1.0},  # shut: what it stands around is left out, so that the gate changes the answer
}
TWICE = {BitDepth, COLA, JPEG}  # nothing is left to do for a second one


def around(kind: type[Any], base: VisionLanguageModel) -> Any:
    assert dataclasses.fields(kind)[0].name == "base"
    return kind(base, **ACTS.get(kind, {}))


def told(model: VisionLanguageModel | Answer, images: Tensor) -> Said:
    """What a model says to some images under fixed keys, without a graph."""
    answer = model if isinstance(model, Answer) else model.answer(PROMPTS)
    with drawing(keys("abcd"[: len(images)])), torch.no_grad():
        return answer.hard(images)


# --- Nothing is lost ---


def dear(outer: type[Any], inner: type[Any]) -> bool:
    """Whether a pair runs a text tower; of these only some are tested each time."""
    kinds = {outer, inner}
    return any(issubclass(kind, Tuner) for kind in kinds) and not kinds & {BitDepth, CLIPure, Gated}


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] if dear(*pair) else [])
        for pair in itertools.product(WRAPPERS, WRAPPERS)
    ],
)
def test_any_pair_of_defenses_composes(outer: type[Any], inner: type[Any]) -> None:
    """The outer one changes the answer, and what the inner one says, of its classes and of its gates, is still said."""
    tunes = issubclass(outer, Tuner) or issubclass(inner, Tuner)  # which needs a text tower
    bare: VisionLanguageModel = Tiny() if tunes else Toy()
    images, within = middle(4), with_fields(around(inner, bare), **FEW)
    model = with_fields(around(outer, within), **FEW)
    once, both = within.answer(PROMPTS), model.answer(PROMPTS)
    if outer is not inner or outer not in {*TWICE, Gated}:
        assert not torch.allclose(told(both, images).logits, told(once, images).logits, rtol=1e-6, atol=1e-5)
    assert both.layers == 2 and both.random == (model.random or within.random) and both.masks >= once.masks
    assert set(once.gates) <= set(told(both, images).gates) == set(both.gates)

    if outer is Gated:
        model = replace(model, tau=0.0)  # open for all
    loud = once.then(lambda said: said.reread(lambda logits: logits + torch.tensor([0.0, 1e3, 0.0])))
    heard = told(model.around(loud, Lent(model, bare, PROMPTS)), images)
    assert bool((heard.logits.argmax(1) == 1).all()), "the inner one is no longer asked"


NOISY = GaussianNoise(Toy(), 0.05)
GATED = [*(kind(NOISY) for kind in WRAPPERS if kind.thresholds), SCC(NOISY, random_start=True)]


@pytest.mark.parametrize("model", GATED, ids=lambda model: type(model).__name__)
def test_gates_are_asked_in_the_draw_of_the_answer_around_a_random_base_too(model: Wrapper) -> None:
    """However often the answer asks the base beside that."""
    images, answer = middle(4), model.answer(PROMPTS)
    assert answer.gates
    with drawing(SEEDS), torch.no_grad():
        again, said = replay(), answer.hard(images)
        for name, gate in answer.gates.items():
            with again():
                assert torch.equal(gate(images), said.gates[name]), name
    with drawing(fold(SEEDS, 1)), torch.no_grad():
        assert not any(torch.equal(gate(images), said.gates[name]) for name, gate in answer.gates.items())


@dataclass(frozen=True)
class Mirrored(Ensemble):
    """The image and its mirror image."""

    base: VisionLanguageModel

    def views(self, images: Images) -> Tensor:
        return torch.stack([images, images.flip(3)], 1)


@dataclass(frozen=True)
class Pulled(Latent):
    """A quarter of the way to the mean of the classes."""

    base: VisionLanguageModel
    share: float = 0.25

    def move(self, embeddings: Embeddings, anchors: Tensor) -> Embeddings:
        return torch.lerp(F.normalize(embeddings, dim=1), anchors.mean(0), self.share)


@dataclass(frozen=True)
class Padded(Transform):
    """Black borders: another size."""

    base: VisionLanguageModel

    def transform(self, images: Images) -> Images:
        return F.pad(images, (2, 2, 2, 2))


def test_the_kinds_of_defenses_do_what_they_say() -> None:
    plain = Tiny().answer(PROMPTS)
    one, other = plain(IMAGES), plain(IMAGES.flip(3))
    assert torch.allclose(told(Mirrored(Tiny()), IMAGES).logits, (one + other) / 2, atol=1e-4)
    assert torch.allclose(told(Padded(Tiny()), IMAGES).logits, plain(F.pad(IMAGES, (2, 2, 2, 2))), atol=1e-4)
    assert plain.texts is not None
    unit = F.normalize(plain.encode(IMAGES), dim=1)
    moved = unit + 0.25 * (plain.texts.mean(0) - unit)
    assert torch.allclose(told(Pulled(Tiny()), IMAGES).logits, Tiny().logits(moved, plain.texts), atol=1e-4)
    for model in (Padded(Tiny()), Pulled(Mirrored(Tiny()))):
        check_wrapper(model)


def test_what_moves_an_embedding_moves_that_of_all_views() -> None:
    """Read as the ensemble reads: the mean of what each view is taken for, here with logits that know their view."""
    first = torch.tensor([[0.0, 0.0, 6.0], [0.0, 0.0, 0.0]]).repeat(4, 1)
    inner = Tiny().answer(PROMPTS).then(lambda said: said.reread(lambda logits: logits + first[: len(logits)]))
    model = Mirrored(Tiny())
    views = model.around(inner, Lent(model, Tiny(), PROMPTS))
    still = Pulled(model, share=0.0)
    found = told(still.around(views, Lent(still, Tiny(), PROMPTS)), IMAGES)
    mean = told(views, IMAGES).embeddings
    assert inner.texts is not None
    assert torch.allclose(found.logits, Tiny().logits(mean, inner.texts) + torch.tensor([0.0, 0.0, 3.0]), atol=1e-4)


def test_defenses_that_know_the_classes_say_so_where_there_are_none() -> None:
    with pytest.raises(CrossguardError, match="Pulled compares images with the texts of classes, and none were given"):
        Pulled(Tiny()).encode_image(IMAGES)
    captions = Tiny().encode_text(["a red circle", "two blue stars"])
    answer = Pulled(BitDepth(Tiny())).answer(captions)
    assert answer(IMAGES).shape == (4, captions.shape[1]), "in a retrieval it answers with embeddings"
    assert told(answer, IMAGES).logits.shape == (4, 2)
    with pytest.raises(CrossguardError, match="no classes were given"):
        _ = BitDepth(Tiny()).answer().hard(IMAGES).logits


@pytest.mark.parametrize("kind", WRAPPERS)
def test_every_defense_checks_what_it_stands_around(kind: type[Any]) -> None:
    with pytest.raises(CrossguardError, match=r"base must be a VisionLanguageModel, and PGD\(\) was given"):
        words.build(f"{kind.__name__}(PGD())")
    checked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Wrapper, "_check_base", lambda self: checked.append(self))
        made = around(kind, Toy())
    assert checked == [made]


@pytest.mark.parametrize("base", [3, "runs/base", None, Tiny, PGD()])
def test_what_is_no_model_cannot_be_defended(base: Any) -> None:
    with pytest.raises(CrossguardError, match=r"Mirrored stands around a model, and .* is none"):
        Mirrored(base)

    @dataclass(frozen=True)
    class Own(Transform):
        base: VisionLanguageModel

        def __post_init__(self) -> None:
            pass

        def transform(self, images: Images) -> Images:
            return images

    with pytest.raises(CrossguardError, match="Own stands around a model"):
        Own(base).answer(PROMPTS)


def test_a_defense_that_nothing_around_it_would_ask_is_refused() -> None:
    for name in ("encode_image", "classifier", "answer"):
        with pytest.raises(CrossguardError, match=f"Old writes {name} itself.* writes around"):
            type("Old", (BitDepth,), {name: lambda self, images: images})

    @dataclass(frozen=True)
    class Lazy(Wrapper):
        base: VisionLanguageModel

        def around(self, inner: Answer, live: Lent) -> Any:
            return inner.encode

    with pytest.raises(CrossguardError, match=r"Lazy\.around returned .* instead of an Answer"):
        Lazy(Tiny()).answer()


def test_a_defense_may_ask_for_what_is_innermost() -> None:
    live = Lent(BitDepth(Tiny()), Tiny(), PROMPTS)
    assert live.network is Tiny().network
    assert torch.equal(live.anchors(["a red box"]), Tiny().encode_text(["a red box"]))
    with pytest.raises(CrossguardError, match="network of a checkpoint, and Toy has none"):
        _ = Lent(BitDepth(Toy()), Toy(), PROMPTS).network


def test_what_goes_through_the_towers_is_counted() -> None:
    with counting() as costs:
        told(Mirrored(Tiny()), IMAGES)
        assert (costs.forwards, costs.backwards) == (8, 0)
        with counting() as inside:
            Tiny().answer().ascend(IMAGES, lambda said: said.embeddings.sum(1))
    assert (inside.forwards, inside.backwards) == (4, 4) and (costs.forwards, costs.backwards) == (12, 4)


# --- Noise belongs to the sample ---


@dataclass(frozen=True)
class Counterattack(Purifier):
    """Moves images whose embeddings noise hardly moves by an attack of the vocabulary; here away from their mirror
    image, since at the image itself a gradient is of rounding alone."""

    base: VisionLanguageModel
    limit: float = 0.1
    random_start: bool = True
    says: bool = True
    random = True

    def gates(self) -> Mapping[str, Callable[[Images, Answer], PerImage]]:
        return {"limit": self.below}

    def below(self, images: Images, inner: Answer) -> PerImage:
        noisy = (images + 4 / 255 * self.normal(images, "gate")).clamp(0, 1)
        clean = inner.encode(images)
        return self.limit - (inner.encode(noisy) - clean).norm(dim=1) / clean.norm(dim=1)

    def purify(self, images: Images, inner: Answer) -> Tensor | Changed:
        gate, attack = self.below(images, inner), PGD(steps=2, step=0.5, random_start=self.random_start)
        moved = attack(inner.encode, images, Drift(inner.encode(images.flip(3))), Linf(4 / 255))
        made = torch.where((gate > 0)[:, None, None, None], moved, images)
        return Changed(made, {"limit": gate}) if self.says else made


@pytest.mark.parametrize("base", [Tiny(), GaussianNoise(Tiny(), std=2 / 255)])
@pytest.mark.parametrize("random_start", [True, False])
def test_a_counterattack_answers_alike_in_every_batch(base: VisionLanguageModel, random_start: bool) -> None:
    answer = Counterattack(base, limit=1.0, random_start=random_start).answer()
    with torch.no_grad():
        with drawing(SEEDS) as lent:
            whole = answer(IMAGES)
        assert lent.used
        singles = []
        for i in (2, 0, 3, 1):
            with drawing(SEEDS[i : i + 1]):
                singles.append(answer(IMAGES[i : i + 1]))
        assert torch.allclose(whole[[2, 0, 3, 1]], torch.cat(singles), atol=1e-3)
        with drawing(fold(SEEDS, 1)):
            same = torch.allclose(answer(IMAGES), whole, atol=1e-3)
        assert same == (not random_start and base == Tiny())


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("base", [Toy(), GaussianNoise(Toy(), std=2 / 255), Counterattack(Toy())])
@pytest.mark.parametrize("wrap", [lambda model: model, GaussianNoise, BitDepth, Mirrored])
def test_a_gate_says_what_acted(wrap: Any, base: VisionLanguageModel, says: bool) -> None:
    """In one draw, whether the defense says it itself or is asked once more; also when it is asked a second time."""
    images, answer = middle(4), wrap(Counterattack(base, says=says)).answer()
    with torch.no_grad(), drawing(SEEDS):
        values = []
        for _ in range(2):
            again, said = replay(), answer.hard(images)
            assert set(said.gates) == set(answer.gates) and "limit" in said.gates
            for name, gate in answer.gates.items():
                with again():
                    assert torch.allclose(gate(images), said.gates[name], atol=1e-5), name
            values.append(said.gates["limit"])
    assert not torch.equal(*values), "another answer has another draw"
    assert float(values[0].std()) > 0


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
        start = replay()
        assert torch.equal(drawn(4, "other"), other) and torch.equal(drawn(4, "one"), one)
        with start():
            views = drawn(8, "one")
        with start():
            assert torch.equal(drawn(4, "one"), one)
        assert torch.equal(drawn(4, "one"), again), "what was replayed did not count"
    assert not bool((one == other).any() or (one == again).any())
    assert len(set(views.tolist()) | set(one.tolist())) == 12
    with drawing(SEEDS[1:2]):
        start = replay()
        assert torch.equal(drawn(1, "one"), one[1:2]) and torch.equal(drawn(1, "one"), again[1:2])
        with start():
            assert torch.equal(drawn(2, "one"), views[2:4])
    with drawing(SEEDS), pytest.raises(CrossguardError, match="6 images where 4 samples"):
        drawn(6, "one")
    with drawing(SEEDS):
        twice = GaussianNoise(GaussianNoise(Tiny()))
        assert not torch.equal(twice.keys(4), twice.base.keys(4))  # type: ignore[attr-defined]


# --- Purifiers leave no graph ---


def test_purifying_is_done_without_gradients_unless_it_asks_for_some() -> None:
    seen: list[tuple[bool, bool]] = []

    @dataclass(frozen=True)
    class Climbing(Purifier):
        base: VisionLanguageModel

        def purify(self, images: Images, inner: Answer) -> Images:
            seen.append((torch.is_grad_enabled(), images.requires_grad))
            gradient, said = inner.ascend(images, lambda said: said.embeddings.square().sum(1))
            assert not gradient.requires_grad and not said.embeddings.requires_grad
            return (images + 1 / 255 * gradient.sign()).clamp(0, 1)

    model, pixels = Climbing(Tiny()), IMAGES.clone().requires_grad_(True)
    found = model.encode_image(pixels)
    (gradient,) = torch.autograd.grad(found.sum(), pixels)
    assert seen == [(False, False)]
    with torch.no_grad():
        pure = model.purify(IMAGES, Tiny().answer())
    assert torch.equal(found, Tiny().encode_image(pure)), "the forward is the purified image, to the bit"
    pure.requires_grad_(True)
    (expected,) = torch.autograd.grad(Tiny().encode_image(pure).sum(), pure)  # as if purifying were the identity
    assert torch.allclose(gradient, expected, atol=1e-5) and bool(gradient.any())
    check_wrapper(model)


def test_a_smooth_stand_in_reaches_through_what_is_around_it_and_inside() -> None:
    pixels = middle(3, 32).requires_grad_(True)

    def slope(model: VisionLanguageModel, soft: bool = True) -> Tensor:
        answer = model.answer()
        assert (answer.soft is not None) == soft
        with drawing(SEEDS[:3]):
            return torch.autograd.grad(answer.smooth(pixels).sum(), pixels)[0]

    alone = slope(BitDepth(Tiny(), 3))
    assert torch.allclose(slope(GaussianNoise(BitDepth(Tiny(), 3), 0.0)), alone, atol=1e-6)
    assert torch.allclose(slope(BitDepth(GaussianNoise(Tiny(), 0.0), 3)), alone, atol=1e-6)
    hard = torch.autograd.grad(BitDepth(Tiny(), 3).answer()(pixels).sum(), pixels)[0]
    assert not torch.allclose(hard, alone)
    assert torch.allclose(slope(GaussianNoise(Tiny(), 0.0), soft=False), slope(Tiny(), soft=False))


def test_the_smooth_staircase_follows_the_hard_one() -> None:
    defense, images, inner = BitDepth(Tiny(), 3), middle(4, 12), Tiny().answer()
    assert float((defense.smoothed(images, inner) - defense.purify(images, inner)).abs().max()) < 0.5 / 7 + 1e-3
    levels = torch.arange(8).view(1, 1, 1, 8).expand(1, 3, 1, 8) / 7
    assert torch.allclose(defense.smoothed(levels, inner), levels, atol=1e-4)


# --- The contract ---


def test_the_defense_of_the_page_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    """The file of `docs/writing_a_defense.md`, on fewer images and a weaker attack."""
    page = (Path(__file__).parents[1] / "docs" / "writing_a_defense.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.split("class Blur")[1].split("check_wrapper(Blur")[0].splitlines()) <= 20
    for long, short in (
        ("limit=50", "limit=6"),
        ("samples=4, queries=200", "samples=1, queries=2"),
        ("PGD()", "QUICK"),
    ):
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "blur.py", "exec"), {"QUICK": PGD(steps=2), "__name__": __name__})
    said = capsys.readouterr().out
    assert [word for word in ("gray box", "white box, BPDA", "white box, adaptive") if word not in said] == []


def test_a_random_model_meets_the_contract() -> None:
    check_model(GaussianNoise(Tiny()))
    check_wrapper(BitDepth(GaussianNoise(Tiny())))
    check_wrapper(Counterattack(Tiny()))
    check_wrapper(Counterattack(Tiny(), says=False))


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("batch", "its singles"),
        ("place", "its singles"),
        ("torch", "the same images under"),
        ("silent", "does not say so"),
        ("bright", "asked about pixels"),
        ("deaf", "asks nothing"),
    ],
)
def test_a_broken_defense_does_not(way: str, sentence: str) -> None:
    @dataclass(frozen=True)
    class Broken(Wrapper):
        base: VisionLanguageModel

        def around(self, inner: Answer, live: Lent) -> Answer:
            def change(images: Images) -> Images:
                noise = {
                    "batch": lambda: uniform(by_position(len(images)) + len(images), images.shape[1:]),
                    "place": lambda: uniform(by_position(len(images)), images.shape[1:]),
                    "torch": lambda: torch.rand_like(images),
                    "silent": lambda: self.uniform(images),
                    "bright": lambda: 30.0,
                }
                made = images + 0.1 * noise[way]()
                return made if way == "bright" else made.clamp(0, 1)

            if way == "deaf":
                fixed = Tiny().answer(PROMPTS)
                return replace(inner, hard=fixed.hard)
            return inner.before(change)

    with pytest.raises(AssertionError, match=sentence):
        check_wrapper(Broken(Tiny()))


def test_a_gate_of_two_draws_does_not() -> None:
    @dataclass(frozen=True)
    class Fickle(Purifier):
        base: VisionLanguageModel
        random = True

        def gates(self) -> Mapping[str, Callable[[Images, Answer], PerImage]]:
            return {"luck": lambda images, inner: normal(self.keys(len(images), "asked"), (1,))[:, 0]}

        def purify(self, images: Images, inner: Answer) -> Changed:
            return Changed(images, {"luck": normal(self.keys(len(images), "acted"), (1,))[:, 0]})

    with pytest.raises(AssertionError, match="two values"):
        check_wrapper(Fickle(Tiny()))
