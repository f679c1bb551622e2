"""What the adversary knows of a defense, as words around an attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from crossguard import (
    BF16,
    EOT,
    FAB,
    L1,
    PGD,
    TTC,
    Adaptive,
    Answer,
    AtGate,
    BitDepth,
    Blind,
    Changed,
    CrossguardError,
    Drift,
    EachTarget,
    GaussianNoise,
    ImageVictim,
    Linf,
    PredictedLabel,
    RayS,
    Restarts,
    Scenes,
    Smooth,
    Square,
    Tiny,
    Untargeted,
    Worst,
    ZeroShot,
    evaluate,
)
from crossguard.attacks.base import Attack, ImageAttack, Queries
from crossguard.evaluate import question
from crossguard.models.base import VisionLanguageModel
from crossguard.models.kinds import Purifier
from crossguard.models.wrapper import Lent, Wrapper
from crossguard.seeds import by_position, drawing, keys
from crossguard.shapes import Images, PerImage
from toys import Dots, Toy

TOYS, BUDGET, WIDE = ZeroShot(Dots()), Linf(4 / 255), Linf(8 / 255)
TASK = ZeroShot(Scenes("object", count=48))
QUICK = PGD(steps=6, random_start=False)


def victim(model: VisionLanguageModel, count: int) -> ImageVictim:
    return ImageVictim(model.answer(TOYS.data.prompts()), Queries.none(count), keys(map(str, range(count))))


# --- Blind ---


@pytest.mark.parametrize("unknown", [None, 1, 2])
def test_a_blind_attack_is_one_on_what_is_inside(unknown: int | None) -> None:
    """To its end: who falls without the defense may stand with it."""
    model = BitDepth(BitDepth(Toy(), 5), 3)
    inside = BitDepth(Toy(), 5) if unknown == 1 else Toy()
    batch = next(TOYS.batches(16, range(16)))
    goal, seeds, asked = Untargeted(batch.labels), by_position(16), victim(model, 16)
    found = Blind(PGD(steps=8), unknown)(asked, batch.images, goal, BUDGET, seeds)
    expected = PGD(steps=8)(victim(inside, 16), batch.images, goal.lasting(), BUDGET, seeds)
    assert torch.equal(found, expected)
    assert asked.queries is not None and asked.queries.gradients.tolist() == [8] * 16
    report = evaluate(TOYS, model, Blind(QUICK), BUDGET)
    gray = evaluate(TOYS, model, QUICK, BUDGET, surrogate=Toy())
    assert np.array_equal(report.outcomes.adversarial, gray.outcomes.adversarial)
    assert report.question["knowledge"] == gray.question["knowledge"] == "gray box"


def test_who_is_not_defended_has_nothing_to_be_blind_to() -> None:
    white, blind = (evaluate(TOYS, Toy(), attack, BUDGET) for attack in (QUICK, Blind(QUICK)))
    assert np.array_equal(white.outcomes.adversarial_margin, blind.outcomes.adversarial_margin)
    assert blind.question["knowledge"] == "white box"


# --- Smooth ---


@pytest.mark.parametrize("model", [BitDepth(Toy(), 4), GaussianNoise(BitDepth(Toy(), 4), 0.02), TTC(Toy(), tau=0.05)])
def test_value_and_success_are_those_of_the_defense_and_the_gradient_that_of_its_stand_in(model: Any) -> None:
    batch, seen = next(TOYS.batches(8, range(8))), list[tuple[Tensor, ...]]()

    @dataclass(frozen=True)
    class Once(PGD):
        def search(self, victim: Any, clean: Any, goal: Any, budget: Any, seeds: Any) -> Any:
            seen.append((*victim.ascend(clean, goal), victim.keys()))
            return super().search(victim, clean, goal, budget, seeds)

    goal, asked = Untargeted(batch.labels), victim(model, 8)
    Smooth(Once(steps=1))(asked, batch.images, goal, BUDGET)
    gradient, losses, outputs, noise = seen[0]
    answer = model.answer(TOYS.data.prompts())
    with drawing(noise), torch.no_grad():
        true = answer(batch.images)
    assert torch.allclose(outputs, true, atol=1e-5) and torch.allclose(losses, goal.loss(true), atol=1e-4)
    pixels = batch.images.clone().requires_grad_(True)
    with drawing(noise):
        near = answer.soft(pixels).logits
    # One graph: the loss has the slope that it has at the true answer, and from there on that of the stand-in.
    slope = torch.autograd.grad(goal.loss(leaf := true.clone().requires_grad_(True)).sum(), leaf)[0]
    (expected,) = torch.autograd.grad((near * slope).sum(), pixels)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(near, true, atol=1e-4)


def test_a_stand_in_is_asked_for_where_there_is_one() -> None:
    @dataclass(frozen=True)
    class Rough(Purifier):
        base: VisionLanguageModel

        def purify(self, images: Images, inner: Answer) -> Images:
            return (images * 7).round() / 7

    with pytest.raises(CrossguardError, match="offers a smooth stand-in"):
        evaluate(TOYS, Rough(Toy()), Smooth(QUICK), BUDGET)
    white, smooth = (evaluate(TOYS, Toy(), attack, BUDGET) for attack in (QUICK, Smooth(QUICK)))
    assert np.array_equal(white.outcomes.adversarial_margin, smooth.outcomes.adversarial_margin)


# --- AtGate ---


@dataclass(frozen=True)
class Shield(Wrapper):
    """Rounds the pixels of bright images, without a gradient: who wants to turn such an image must darken it first."""

    base: VisionLanguageModel
    threshold: float = 0.5

    def around(self, inner: Answer, live: Lent) -> Answer:
        def bright(images: Images) -> PerImage:
            return images.mean((1, 2, 3)) - self.threshold

        def shield(images: Images) -> Changed:
            acts = (bright(images) > 0).view(-1, 1, 1, 1)
            made = torch.where(acts, (images * 7).round().detach() / 7, images)
            return Changed(made, {"bright": bright(images).detach()})

        return inner.before(shield, gates={"bright": bright})


def test_an_attack_at_the_gate_switches_the_defense_off_and_turns_the_answer() -> None:
    batch = next(TASK.batches(48, range(48)))
    model = Shield(Tiny(), float(batch.images.mean((1, 2, 3)).median()) - 0.02)
    answer = model.answer(TASK.data.prompts())
    attack, budget = PGD(steps=12, step=0.2, random_start=False), Linf(12 / 255)
    left, shut = {}, {}
    for name, one in (("plain", attack), ("gate", AtGate(attack, 1000.0))):
        answers = TASK.prepare(model, one, budget, None).answer(batch, by_position(48))
        left[name] = sum(answers.right[1])
        shut[name] = int((answer.gates["bright"](answers.images) <= 0).sum())
    assert shut["gate"] > shut["plain"] + 4, "it slips below the threshold"
    assert left["gate"] < left["plain"] - 4, "and the answer falls: who only darkened the image would not do that"


def test_the_attack_at_the_gate_is_one_loss_less_the_open_gate() -> None:
    """Of one draw, at the gate that is named, and success is that of the answer alone."""
    model = GaussianNoise(Shield(TTC(Toy(), tau=0.05), 0.45), 0.05)
    batch, goals = next(TOYS.batches(8, range(8))), []

    @dataclass(frozen=True)
    class Once(PGD):
        def search(self, victim: Any, clean: Any, goal: Any, budget: Any, seeds: Any) -> Any:
            goals.append((goal, *victim.ascend(clean, goal), victim.keys()))
            return super().search(victim, clean, goal, budget, seeds)

    goal, answer = Untargeted(batch.labels), model.answer(TOYS.data.prompts())
    for name in ("bright", "tau", ""):
        asked = victim(model, 8)
        AtGate(Once(steps=1), 3.0, gate=name)(asked, batch.images, goal, BUDGET)
        used, _, losses, outputs, noise = goals[-1]
        with drawing(noise), torch.no_grad():
            said = answer.hard(batch.images)
        assert used is goal and torch.allclose(outputs, said.logits, atol=1e-4)
        above = sum(said.gates[one].clamp_min(0) for one in ([name] if name else ["bright", "tau"]))
        assert bool((above > 0).any())
        assert torch.allclose(losses, goal.loss(said.logits) - 3.0 * above, atol=1e-4)
        assert asked.queries is not None and asked.queries.gradients.tolist() == [4] * 8, "the gate is asked too"


def test_at_gate_needs_a_gate_of_that_name() -> None:
    for model in (BitDepth(Toy()), Toy()):
        with pytest.raises(CrossguardError, match="this model has none"):
            evaluate(TOYS, model, AtGate(PGD(steps=1)), BUDGET, limit=4)
    with pytest.raises(CrossguardError, match=r"'dark'.* its gates are bright, inner bright"):
        evaluate(TOYS, Shield(Shield(Toy())), AtGate(PGD(steps=1), gate="dark"), BUDGET, limit=4)


# --- Adaptive ---


def test_the_adaptive_attack_is_all_that_the_defense_declares() -> None:
    goal, prompts = Untargeted(torch.tensor([0])), TOYS.data.prompts()

    def parts(model: VisionLanguageModel, **settings: Any) -> tuple[Attack, ...]:
        return Adaptive(QUICK, **settings).parts(model.answer(prompts), goal, BUDGET)

    square = Square(queries=1000)
    assert parts(Toy()) == (QUICK, PredictedLabel(QUICK), square)
    assert parts(BitDepth(Toy())) == (QUICK, Blind(QUICK, 1), Smooth(QUICK), PredictedLabel(QUICK), square)
    assert parts(Shield(Toy()), queries=0) == (
        QUICK,
        Blind(QUICK, 1),
        AtGate(QUICK, gate="bright"),
        PredictedLabel(QUICK),
    )
    eot = EOT(QUICK, 3)
    assert parts(TTC(BitDepth(Toy())), samples=3, queries=50) == (
        eot, Blind(QUICK, 2), Blind(QUICK, 1), Smooth(eot), AtGate(eot, gate="tau"), PredictedLabel(eot),
        Square(queries=50),
    )  # fmt: skip
    assert parts(BitDepth(GaussianNoise(Toy())), samples=3, queries=0)[1:3] == (Blind(QUICK, 2), Blind(eot, 1))
    own = EOT(QUICK, 5)
    assert Adaptive(own).parts(GaussianNoise(Toy()).answer(prompts), goal, BUDGET)[0] == own, "it averages by itself"
    few = Adaptive(QUICK).parts(BitDepth(Toy()).answer(), Drift(torch.zeros(1, 16)), L1(1.0))
    assert few == (QUICK, Blind(QUICK, 1), Smooth(QUICK))


@pytest.mark.parametrize("model", [BitDepth(Toy(), 4), TTC(Toy(), tau=0.05)], ids=["rounding", "TTC"])
def test_the_adaptive_attack_is_never_weaker_than_its_parts(model: Any) -> None:
    """By success on the judge of the search, which asks about all by the same draws."""
    batch = next(TOYS.batches(48, range(48)))
    goal, seeds = Untargeted(batch.labels), by_position(48)
    attack = Adaptive(QUICK, samples=2, queries=20)

    def won(one: Any) -> Tensor:
        asked = victim(model, 48)
        return asked.judge(one(asked, batch.images, goal.lasting(), BUDGET, seeds), goal)[0]

    together, parts = won(attack), attack.parts(model.answer(TOYS.data.prompts()), goal, BUDGET)
    alone = [won(part) for part in parts]
    for part, beaten in zip(parts, alone, strict=True):
        assert not bool((beaten & ~together).any()), part
    assert 0 < int(together.sum()) < 48


# --- What a report says ---


@pytest.mark.parametrize(
    ("attack", "plain", "masked"),
    [
        (PGD(), "white box", "white box, BPDA"),
        (EOT(BF16(PGD())), "white box", "white box, BPDA"),
        (Blind(PGD()), "white box", "gray box"),
        (EOT(Blind(PGD())), "white box", "gray box"),
        (Smooth(PGD()), "white box, smooth", "white box, smooth"),
        (AtGate(Smooth(PGD())), "white box, smooth, at the gate", "white box, smooth, at the gate"),
        (Adaptive(), "white box, adaptive", "white box, adaptive"),
        (Worst((Blind(PGD()), Square())), "white box", "gray box"),
        (Worst((Blind(PGD()), PGD())), "white box", "white box, BPDA"),
        (Worst((Smooth(PGD()), AtGate(PGD()))), "white box, smooth, at the gate", "white box, smooth, at the gate"),
        (Restarts(Square()), "black box, scores", "black box, scores"),
        (Worst((RayS(), Square())), "black box, scores", "black box, scores"),
        (RayS(), "black box, decisions", "black box, decisions"),
        (Smooth(Square()), "black box, scores", "black box, scores"),
    ],
    ids=str,
)
def test_a_report_says_what_the_adversary_knew(attack: Attack, plain: str, masked: str) -> None:
    for model, said in ((Tiny(), plain), (GaussianNoise(BitDepth(Tiny())), masked)):
        assert question(TASK, model, attack, BUDGET)["knowledge"] == said


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Blind(unknown=0), "leave out Blind, or give 1 or more"),
        (lambda: Adaptive(samples=0), "1 or more"),
        (lambda: Adaptive(queries=-1), "0 or more"),
    ],
)
def test_nonsense_is_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        make()


@pytest.mark.parametrize("around", [Blind, Smooth, AtGate, Restarts, EachTarget, EOT, PredictedLabel, BF16])
def test_what_is_made_of_an_attack_draws_noise_where_that_does(around: type[ImageAttack]) -> None:
    still = PGD(random_start=False)
    options = {"count": 1} if around is Restarts else {}
    assert not around(still, **options).draws and around(PGD(), **options).draws
    assert not Worst((still, FAB())).draws and Worst((still, PGD())).draws and Adaptive(still).draws
