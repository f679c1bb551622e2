"""Attacks made of attacks, attacks through defenses, and the checks that doubt a number."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crossguard import (
    APGD,
    BF16,
    DLR,
    EOT,
    FAB,
    L1,
    L2,
    PGD,
    AutoAttack,
    BitDepth,
    Blind,
    CrossguardError,
    Drift,
    EachTarget,
    GaussianNoise,
    Linf,
    Margin,
    PredictedLabel,
    Restarts,
    RobustCLIP,
    Scenes,
    Smooth,
    Square,
    Targeted,
    Tiny,
    Untargeted,
    Worst,
    ZeroShot,
    evaluate,
)
from crossguard.answer import Answer, Said
from crossguard.attacks import meta
from crossguard.attacks.base import ImageAttack, ImageVictim, Made, Queries
from crossguard.attacks.meta import SURE, likeliest
from crossguard.data import Prompts
from crossguard.diagnose import _Case
from crossguard.goals import Goal, Towards
from crossguard.models.base import VisionLanguageModel
from crossguard.models.kinds import Transform
from crossguard.models.wrapper import Lent, Wrapper
from crossguard.report import Outcomes, Report
from crossguard.seeds import by_position, drawn, keys, normal, uniform
from crossguard.shapes import Images
from crossguard.table import Answers, render
from crossguard.testing import LinearVictim, check_model
from toys import Dots, Toy, middle, reach, with_fields

diagnose = importlib.import_module("crossguard.diagnose")  # the module, not the function of that name
TASK, BUDGET, TOYS = ZeroShot(Scenes("object", count=48)), Linf(5 / 255), ZeroShot(Dots())
WEAK = PGD(steps=1, step=0.3, random_start=False)
STILL = PGD(steps=2, step=0.2, random_start=False)


@dataclass(frozen=True)
class Logging(ImageAttack):
    """An attack that remembers which samples it was given, and under which goal."""

    attack: ImageAttack
    seen: tuple = ()

    def search(self, victim, clean, goal, budget, seeds):
        LOG.append((len(clean), goal, seeds.clone()))
        return self.attack.search(victim, clean, goal, budget, seeds)


LOG: list = []


# Ensembles


def test_the_worst_of_attacks_is_the_pointwise_worst_and_asks_only_those_who_stand() -> None:
    victim, images, budget = LinearVictim(2), middle(64), Linf(0.025)
    labels = victim(images).argmax(1).detach()
    goal, parts = Untargeted(labels), (PGD(steps=1, step=0.8, random_start=False), PGD(steps=20))
    LOG.clear()
    together = Worst((Logging(parts[0]), Logging(parts[1])))(victim, images, goal, budget)
    alone = [goal.won(victim(part(victim, images, goal, budget))) for part in parts]
    assert torch.equal(goal.won(victim(together)), alone[0] | alone[1])
    assert [count for count, _, _ in LOG] == [64, int((~alone[0]).sum())]
    assert 0 < int(alone[0].sum()) < 64


def test_restarts_have_other_noise_and_the_first_has_its_own() -> None:
    victim, images = LinearVictim(3), middle(8)
    goal = Untargeted(victim(images).argmax(1).detach())
    LOG.clear()
    Restarts(Logging(PGD(steps=1)), 3)(victim, images, goal.lasting(), Linf(0.001), by_position(8))
    assert len(LOG) == 3 and torch.equal(LOG[0][2], by_position(8))
    assert not torch.equal(LOG[1][2], LOG[2][2])


def test_where_somebody_else_judges_every_attack_runs_on_all_and_the_strongest_counts() -> None:
    victim, images, budget = LinearVictim(3), middle(16), Linf(0.02)
    goal, parts = Untargeted(victim(images).argmax(1).detach()).lasting(), (PGD(steps=20), WEAK)
    LOG.clear()
    made = Worst(tuple(map(Logging, parts)))(victim, images, goal, budget)
    assert [count for count, _, _ in LOG] == [16, 16]
    best = torch.stack([goal.merit(victim(part(victim, images, goal, budget))) for part in parts]).amax(0)
    assert torch.allclose(goal.merit(victim(made)), best, atol=1e-5)
    drift = Drift(victim(images).detach())
    assert bool((drift.loss(victim(Worst((PGD(), WEAK))(victim, images, drift, budget))) > 1e-4).all())


def test_each_target_goes_through_the_likeliest_classes() -> None:
    logits = torch.tensor([[5.0, 1.0, 4.0, 3.0], [0.0, 9.0, 9.0, 1.0]])
    first, second, third = likeliest(logits, torch.tensor([0, 1]), 9)
    assert first.tolist() == [2, 3] and second.tolist() == [3, 0]
    assert third.tolist() == [1, 2], "a class that can't be told from the label comes last"
    victim, images = LinearVictim(4), middle(8)
    labels = victim(images).argmax(1).detach()
    LOG.clear()
    EachTarget(Logging(PGD(steps=2)), 9)(victim, images, Untargeted(labels), Linf(1e-4))
    ways = [goal for _, goal, _ in LOG]
    assert len(ways) == 3 and all(isinstance(way, Towards) for way in ways)
    assert torch.stack([way.targets for way in ways], 1).sort(1).values.shape == (8, 3)
    with pytest.raises(CrossguardError, match="untargeted goal"):
        EachTarget()(victim, images, Targeted(labels), BUDGET)
    with pytest.raises(CrossguardError, match="try PGD"):
        EachTarget()(victim, images, Drift(victim(images).detach()), BUDGET)


@pytest.mark.parametrize("classes", [2, 3, 4, 1000])
@pytest.mark.parametrize("attack", [AutoAttack(), AutoAttack("rand"), RobustCLIP(steps=5)], ids=repr)
def test_any_number_of_classes_works(classes: int, attack: ImageAttack) -> None:
    if isinstance(attack, AutoAttack):
        attack = Worst(tuple(with_fields(part, steps=5, queries=50, samples=2) for part in attack.parts(BUDGET)))
    victim, images = LinearVictim(classes), middle(6)
    labels = victim(images).argmax(1).detach()
    made = attack(victim, images, Untargeted(labels), Linf(0.3))
    assert bool((victim(made).argmax(1) != labels).all())


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
def test_dlr_ignores_scale_and_offset_and_works_with_few_classes(classes: int) -> None:
    logits = uniform(by_position(5), (classes,)) * 4
    ranked = logits.argsort(1, descending=True)
    labels = ranked[:, 0]
    targets = torch.stack([ranked[row, min(row % (classes - 1) + 1, classes - 1)] for row in range(5)])
    logits.requires_grad_(True)
    for loss in (DLR().away(logits, labels), DLR().towards(logits, targets), DLR().between(logits, labels, targets)):
        (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        assert bool(torch.isfinite(loss).all()) and bool(gradient.any(1).all()), "a constant loss leads nowhere"
    if classes > 2:
        for shifted in (10 * logits, logits + 3):
            assert torch.allclose(DLR().away(shifted, labels), DLR().away(logits, labels), atol=1e-4)
            assert torch.allclose(
                DLR().between(shifted, labels, targets), DLR().between(logits, labels, targets), atol=1e-4
            )


def test_targeted_losses_have_the_right_sign() -> None:
    victim, images, budget = LinearVictim(5), middle(12), Linf(0.3)
    labels = victim(images).argmax(1).detach()
    targets = (labels + 1) % 5
    for loss in (None, Margin(), DLR()):
        made = APGD(steps=40, loss=loss)(victim, images, Targeted(targets), budget)
        assert bool((victim(made).argmax(1) == targets).all()), f"{loss} climbs away from its target"


# Through random, masking and gated defenses


def test_a_random_model_draws_the_same_noise_for_a_sample_in_any_batch() -> None:
    model = GaussianNoise(Tiny(), 0.1)
    check_model_without_noise(model)
    reports = [evaluate(TASK, model, EOT(PGD(steps=2), 3), BUDGET, batch=size) for size in (48, 7)]
    assert np.array_equal(*(report.outcomes.adversarial for report in reports))
    assert np.allclose(*(report.outcomes.clean_margin for report in reports), atol=1e-3)
    other = evaluate(TASK, model, seed=1)
    assert not np.allclose(other.outcomes.clean_margin, reports[0].outcomes.clean_margin, atol=1e-3)


def check_model_without_noise(model: GaussianNoise) -> None:
    check_model(replace(model, std=0.0))


def test_eot_averages_gradients_over_the_models_noise_and_counts_each() -> None:
    images, labels = middle(4, 16), torch.tensor([0, 1, 2, 0])
    answer = GaussianNoise(Tiny(), 0.1).classifier(Scenes("color", count=4).prompts())
    queries = Queries.none(4)
    victim = ImageVictim(answer, queries, by_position(4))
    LOG.clear()

    @dataclass(frozen=True)
    class Once(ImageAttack):
        def search(self, victim, clean, goal, budget, seeds):
            LOG.append(victim.ascend(clean, goal)[0])
            return Made(clean)

    EOT(Once(), 6)(victim, images, Untargeted(labels), BUDGET)
    assert queries.gradients.tolist() == [6] * 4
    again = ImageVictim(answer, Queries.none(4), by_position(4))
    singles = torch.stack([again.ascend(images, Untargeted(labels))[0] for _ in range(6)])
    assert torch.allclose(LOG[0], singles.mean(0), rtol=1e-3, atol=1e-5)
    assert not torch.allclose(singles[0], singles[1], rtol=1e-2, atol=1e-5)


def test_the_noise_of_eot_leaves_images_that_a_defense_may_attack_itself() -> None:
    """Defenses with an attack inside, and any other victim, are asked about pixels in [0, 1]."""
    images, seen = torch.cat([torch.zeros(2, 3, 6, 6), torch.ones(2, 3, 6, 6)]), list[torch.Tensor]()

    def answer(pixels: Images) -> torch.Tensor:
        seen.append(pixels.detach())
        inner = PGD(steps=1)(lambda x: x.flatten(1)[:, :3], pixels.detach(), torch.tensor([0] * len(pixels)), BUDGET)
        return (pixels + (inner - pixels).detach()).flatten(1)[:, :3]

    EOT(PGD(steps=2, stop=False), 3, noise=0.2)(answer, images, torch.tensor([0, 1, 2, 0]), BUDGET)
    assert min(one.min() for one in seen) == 0.0 and max(one.max() for one in seen) == 1.0
    spread = torch.stack([one[:2] for one in seen]).std(0).mean()  # half of what normal noise would be, cut at zero
    assert 0.09 < float(spread) < 0.14, "the noise is still there"


@dataclass(frozen=True)
class Masked(Transform):
    """Quantizes, and lets no gradient through: what a defense looks like to an attack that ignores it."""

    base: VisionLanguageModel
    bits: int = 4

    def transform(self, images: Images) -> torch.Tensor:
        return torch.round(images * (2**self.bits - 1)) / (2**self.bits - 1)


def test_a_masking_defense_looks_robust_until_it_is_attacked_adaptively() -> None:
    masked, open_, budget = Masked(Toy(), 4), BitDepth(Toy(), 4), Linf(8 / 255)
    attack = PGD(steps=20, step=0.1)
    naive = evaluate(TOYS, masked, attack, budget)
    bpda = evaluate(TOYS, open_, attack, budget)
    unrolled = evaluate(TOYS, open_, Smooth(attack), budget)
    assert naive.robust_accuracy > 0.9 and naive.clean_accuracy > 0.9
    assert bpda.robust_accuracy < 0.5 * naive.robust_accuracy
    assert unrolled.robust_accuracy < 0.5 * naive.robust_accuracy
    assert unrolled.question["knowledge"] == "white box, smooth" and bpda.question["knowledge"] == "white box, BPDA"


def test_a_random_defense_looks_robust_until_it_is_attacked_as_one() -> None:
    """An attack made for fixed models stops at the first draw that fails; the next draw stands."""
    noisy, attack, budget = GaussianNoise(Toy(), 0.06), PGD(steps=20, step=0.125), Linf(12 / 255)
    batch = next(TOYS.batches(64, range(64)))
    noise, trial = keys(batch.ids, 0), TOYS.prepare(noisy, None, None, None)
    naive = attack(ImageVictim(trial.climb(batch)[0]), batch.images, Untargeted(batch.labels), budget, noise)
    stand = int((trial.judge(naive, noise).argmax(1) == batch.labels).sum())
    single, averaged = (evaluate(TOYS, noisy, one, budget).adversarial.successes for one in (attack, EOT(attack, 4)))
    assert stand > 3 * single and stand > 3 * averaged and stand >= 24


def test_the_average_over_draws_finds_a_direction_that_single_draws_hide() -> None:
    """Linear answers whose slopes are half noise: what is within reach of the mean answer is known."""
    mean, images, seeds = LinearVictim(4), middle(128), by_position(128)
    slopes = mean.weight.detach()
    labels = mean(images).argmax(1).detach()

    def noisy(images: Images) -> torch.Tensor:
        noise = slopes.std() * normal(drawn(len(images)), tuple(slopes.shape))
        return mean(images) + ((images - 0.5).flatten(1)[:, None] * noise).sum(2)

    needed = reach(mean, images, labels)
    budget = Linf(float(needed.median()))
    within = needed <= budget.eps
    beaten = {}
    for samples in (1, 4, 16):
        attack = EOT(PGD(steps=10, random_start=False), samples)
        victim = ImageVictim(noisy, Queries.none(128), seeds)
        made = attack(victim, images, Untargeted(labels).lasting(), budget, seeds)
        wrong = mean(made).argmax(1) != labels
        assert not bool((wrong & ~within & (needed > 1.0001 * budget.eps)).any())
        beaten[samples] = int((wrong & within).sum())
    assert int(within.sum()) == 64
    assert beaten[1] < 16 < 32 < beaten[4] < 48 < beaten[16], beaten


def test_against_a_random_model_nobody_stops_at_a_lucky_draw() -> None:
    noisy = GaussianNoise(Tiny(), 0.12)
    report = evaluate(TASK, noisy, PGD(steps=6), BUDGET)
    assert np.all(np.asarray(report.outcomes.gradients) == 6) and np.all(np.asarray(report.outcomes.size) > 0)
    certain = evaluate(TASK, replace(noisy, std=0.0), PGD(steps=6), BUDGET)
    assert np.all(np.asarray(certain.outcomes.gradients) == 6), "a model that draws may answer another way next time"


def test_an_image_leaves_the_average_after_so_many_draws_in_a_row_that_have_beaten_it(monkeypatch) -> None:
    """And only where they are draws of the judge, and of one start. Here after fewer than in earnest."""
    assert 0.95**SURE < 0.05, "that often it is beaten by chance if it stands in 5 % of all draws"
    few = 16
    monkeypatch.setattr(meta, "SURE", few)
    images = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1, 1).expand(3, 3, 6, 6).clone()
    labels, budget = torch.zeros(3, dtype=torch.int64), Linf(0.05)

    def answer(images: Images) -> torch.Tensor:
        """Never right about dark images, always about light ones, and in four of ten draws about those between."""
        level = images.flatten(1).mean(1)
        odds = torch.where(level < 0.35, 0.0, torch.where(level < 0.65, 0.4, 1.0))
        right = (uniform(drawn(len(images)), (1,))[:, 0] < odds).float()
        return torch.stack([right + 0.1 * level, 1.0 - right], 1)

    def asked(attack: ImageAttack, goal: Goal, rows: list[int] | None = None) -> tuple[list[int], Images]:
        which = torch.arange(3) if rows is None else torch.tensor(rows)
        victim = ImageVictim(answer, Queries.none(len(which)), which)
        made = attack(victim, images[which], goal.at(which), budget, which)
        assert victim.queries is not None
        return victim.queries.gradients.tolist(), made

    again = Untargeted(labels, ends=False, redrawn=True)
    for attack in (PGD(steps=few // 2), APGD(steps=few // 2)):
        counts, made = asked(EOT(attack, 4), again)
        assert counts == [few, 2 * few, 2 * few]
        assert asked(EOT(attack, 4), again.lasting())[0] == [2 * few] * 3, "another model is the judge"
        assert asked(EOT(replace(attack, stop=False), 4), again)[0] == [2 * few] * 3
        assert asked(EOT(replace(attack, steps=few // 8, restarts=2), 4), again)[0] == [few] * 3
        assert asked(EOT(Restarts(attack, 1), 4), again)[0] == [2 * few] * 3, "its members are compared by other draws"
        alone = [asked(EOT(attack, 4), again, [row])[1] for row in range(3)]
        assert torch.equal(torch.cat(alone), made)
        with monkeypatch.context() as late:
            late.setattr(sys.modules[type(attack).__module__], "looks", lambda *_: False)
            counts, same = asked(EOT(attack, 4), again)
            assert counts == [2 * few] * 3 and torch.equal(same, made), "when it looks changes no image"


@dataclass(frozen=True)
class Vote(Wrapper):
    """The mean of several answers of a random base: each must have noise of its own."""

    base: VisionLanguageModel

    def around(self, inner: Answer, live: Lent) -> Answer:
        def hard(images: Images) -> Said:
            said = [inner.hard(images) for _ in range(4)]
            LOG.append(torch.stack([one.embeddings for one in said]))
            return said[0].moved(LOG[-1].mean(0))

        return replace(inner, hard=hard)


@dataclass(frozen=True)
class Some(Wrapper):
    """Asks its base about some of the images alone."""

    base: VisionLanguageModel

    def around(self, inner: Answer, live: Lent) -> Answer:
        return replace(inner, hard=lambda images: inner.hard(images[:3]))


def test_a_wrapper_that_asks_its_random_base_twice_gets_two_draws() -> None:
    LOG.clear()
    one, other = (evaluate(TASK, Vote(GaussianNoise(Tiny(), 0.1)), batch=size, limit=12) for size in (12, 5))
    assert bool((LOG[0].std(0) > 1e-4).any())
    assert np.allclose(one.outcomes.clean_margin, other.outcomes.clean_margin, atol=1e-3)
    with pytest.raises(CrossguardError, match="the same number of views"):
        evaluate(TASK, Some(GaussianNoise(Tiny(), 0.1)), limit=8)


def test_losses_look_past_a_class_of_the_same_name() -> None:
    """The margin over a twin is zero wherever the image goes: attacks that climb it would stand still."""
    victim, images, budget = LinearVictim(5), middle(24), Linf(0.3)

    def twins(images: Images) -> torch.Tensor:
        logits = victim(images)
        return torch.cat([logits, logits[:, victim(middle(1)).argmax(1)]], 1)

    labels = twins(images).argmax(1).detach()
    beaten = {}
    for attack in (PGD(steps=20), PGD(steps=20, loss=Margin()), APGD(steps=20, loss=DLR()), Square(queries=300)):
        made = attack(twins, images, Untargeted(labels), budget)
        beaten[attack] = int((twins(made).argmax(1) != labels).sum())
    assert min(beaten.values()) > 0 and min(beaten.values()) >= 0.6 * max(beaten.values()), beaten


def test_classes_of_one_name_have_one_column_in_any_batch() -> None:
    prompts = Prompts.of(("red circle", "blue star", "red circle", "green ring"), ("a photo of a {}",))
    answer, images = Tiny().classifier(prompts), middle(9, 32)
    for logits in (answer(images), torch.cat([answer(image[None]) for image in images])):
        assert torch.equal(logits[:, 0], logits[:, 2]) and not torch.equal(logits[:, 0], logits[:, 1])


def test_attacks_that_cannot_be_nested_say_so() -> None:
    with pytest.raises(CrossguardError, match="averages twice"):
        evaluate(TASK, Tiny(), EOT(EOT(PGD(steps=1))), BUDGET, limit=4)


def test_own_answer_attacks_what_the_model_said_and_not_the_truth() -> None:
    victim, images = LinearVictim(4), middle(10)
    said = victim(images).argmax(1).detach()
    wrong = (said + 1) % 4
    own = PredictedLabel(PGD(steps=5))(victim, images, Untargeted(wrong), Linf(0.05))
    assert torch.equal(own, PGD(steps=5)(victim, images, Untargeted(said), Linf(0.05)))
    assert not torch.equal(own, PGD(steps=5)(victim, images, Untargeted(wrong).lasting(), Linf(0.05)))


def test_an_attack_in_bfloat16_is_judged_in_float32_and_its_survivors_are_tried_again() -> None:
    attack, budget = PGD(steps=5, step=0.3, random_start=False), Linf(4 / 255)
    attacks = BF16(attack), attack, Worst((BF16(attack), attack))
    half, full, both = (evaluate(TOYS, Toy(), one, budget) for one in attacks)
    assert np.array_equal(half.outcomes.clean, full.outcomes.clean)
    assert np.allclose(half.outcomes.clean_margin, full.outcomes.clean_margin)
    falls = [np.mean(np.subtract(one.outcomes.clean_margin, one.outcomes.adversarial_margin)) for one in (half, full)]
    assert falls[0] == pytest.approx(falls[1], rel=0.05), "rounding costs an attack little"
    assert not np.any(both.standing & ~full.standing), "weaker than in full precision"
    assert not np.array_equal(half.outcomes.adversarial_margin, full.outcomes.adversarial_margin)


def test_bfloat16_is_what_the_victim_answers_in_and_nothing_else() -> None:
    batch, answer = next(TOYS.batches(16, range(16))), Toy().classifier(TOYS.data.prompts())

    def rounded(images: Images) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return answer(images).float()

    attack, goal = PGD(steps=4), Untargeted(batch.labels)
    made = BF16(attack)(answer, batch.images, goal, BUDGET)
    assert torch.equal(made, attack(rounded, batch.images, goal, BUDGET))
    assert not torch.equal(made, attack(answer, batch.images, goal, BUDGET))


# Doubts


def case(model: VisionLanguageModel, attack: ImageAttack, surrogate: VisionLanguageModel | None = None) -> _Case:
    return _Case(TASK, model, attack, BUDGET, surrogate, 0, TASK.chosen(12))


@dataclass(frozen=True)
class Probabilities(Wrapper):
    base: VisionLanguageModel

    def around(self, inner: Answer, live: Lent) -> Answer:
        return inner.then(lambda said: said.reread(lambda logits: logits.softmax(1)))


@dataclass(frozen=True)
class Optimizing(Wrapper):
    """Takes a gradient to answer."""

    base: VisionLanguageModel

    def around(self, inner: Answer, live: Lent) -> Answer:
        def still(images: Images) -> Images:
            return images + 0.0 * inner.ascend(images, lambda said: said.embeddings.square().sum(1))[0]

        return inner.before(still)


@pytest.mark.parametrize(
    ("check", "model", "attack", "said"),
    [
        (diagnose._random, GaussianNoise(Tiny(), 0.05), PGD(steps=2), "random model: 12 of 12"),
        (diagnose._probabilities, Probabilities(Tiny()), PGD(steps=2), "probabilities instead of logits"),
        (diagnose._zero_gradients, Masked(Tiny(), 3), PGD(steps=2), "zero gradients: for 12 of 12"),
        (diagnose._optimizes, Optimizing(Tiny()), PGD(steps=2), "optimization inside the forward"),
        (diagnose._large_budget, Masked(Tiny(), 3), STILL, "stand under 100 times the budget"),
        (diagnose._more_steps, Tiny(), PGD(steps=2, step=0.2, random_start=False), "twice the steps lower"),
        (diagnose._query_attack, Masked(Tiny(), 3), STILL, "a query attack beats the gradient"),
        (diagnose._undefended, Masked(Tiny(), 3), PGD(steps=5), "transfer beats the white box"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_sign_of_a_weak_evaluation_is_said(
    check, model: VisionLanguageModel, attack: ImageAttack, said: str, monkeypatch
) -> None:
    monkeypatch.setattr(diagnose, "_QUERIES", 40)
    assert said in (check(case(model, attack)) or "")
    assert check(case(Tiny(), PGD(steps=20, step=0.1))) is None, "a sound evaluation is doubted"


def test_a_gray_box_alone_is_said() -> None:
    for attack, surrogate in ((PGD(steps=2), Tiny()), (Blind(PGD(steps=2)), None)):
        said = diagnose._undefended(case(BitDepth(Tiny()), attack, surrogate))
        assert said is not None and "only a gray box" in said


def test_a_random_attack_on_a_random_model_is_not_doubted_for_it() -> None:
    assert diagnose._random(case(GaussianNoise(Tiny(), 0.05), EOT(PGD(steps=2)))) is None
    assert diagnose._random(case(GaussianNoise(Tiny(), 0.05), Worst((PGD(), EOT())))) is None


def test_twice_the_steps_reach_into_attacks_of_attacks() -> None:
    attack = Worst((PGD(steps=3), EachTarget(APGD(steps=4)), Square(queries=7)))
    assert diagnose._doubled(attack) == Worst((PGD(steps=6), EachTarget(APGD(steps=8)), Square(queries=7)))


def test_robust_above_clean_is_said_and_doubts_stand_in_the_report(monkeypatch) -> None:
    monkeypatch.setattr(diagnose, "_CHECKS", (diagnose._more_steps,))
    report = evaluate(TASK, Tiny(), STILL, BUDGET, limit=12, doubt=12)
    assert [note for note in report.notes if "twice the steps" in note]
    good = report.outcomes
    leaking = Report(
        report.question,
        replace(good, clean=(np.asarray(good.label) + 1) % 100, adversarial=good.label),
    )
    (first, *_) = diagnose._of_the_report(leaking)
    assert "robust above clean: 12 of 12" in first and "PredictedLabel" in first


# Pooling


def test_the_table_pools_the_worst_case_per_image(tmp_path: Path) -> None:
    base = evaluate(TASK, Tiny(), WEAK, BUDGET, limit=6).question

    def report(name: str, clean: list[int], adversarial: list[int], margins: list[float], seed: int, ids: str) -> None:
        zeros = [0] * 4
        outcomes = Outcomes(ids, zeros, clean, adversarial, [1.0] * 4, margins, [0.1 * seed] * 4, [seed] * 4, zeros)
        Report({**base, "seed": str(seed)}, outcomes, (f"note {seed}",)).save(tmp_path / f"{name}.json")

    report("a", [0, 0, 0, 2], [0, 1, 0, 0], [3.0, -1.0, 1.0, 1.0], 1, "wxyz")
    report("b", [0, 0, 0, 0], [0, 0, 2, 0], [2.0, 2.0, -2.0, 1.0], 2, "wxyz")
    report("c", [0] * 4, [3] * 4, [-9.0] * 4, 3, "abcd")
    pooled = Answers.load(tmp_path).pooled()
    one, alone = pooled.reports
    assert alone.outcomes.id == tuple("abcd") and list(alone.outcomes.adversarial) == [3] * 4
    assert list(one.outcomes.adversarial) == [0, 1, 2, 0] and list(one.outcomes.adversarial_margin) == [2, -1, -2, 1]
    assert list(one.outcomes.clean) == [0, 0, 0, 2], "a random model that is once wrong is wrong"
    assert one.robust.successes == 1 and list(one.outcomes.gradients) == [3] * 4
    assert np.allclose(one.outcomes.size, [0.2, 0.1, 0.2, 0.1]) and one.notes == ("note 1", "note 2")
    assert one.question["attack"] == "worst case" and "2 sets of images" in pooled.doubts[0]
    assert "2 reports" in one.question["knowledge"] and "| worst case, " in render(pooled, "markdown")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Worst(()), "does nothing"),
        (lambda: Restarts(count=0), "1 or more"),
        (lambda: EachTarget(targets=0), "1 or more classes"),
        (lambda: EOT(samples=0), "1 or more"),
        (lambda: EOT(noise=-1.0), "0 or more"),
        (lambda: AutoAttack("strong"), "standard, plus, rand"),
        (lambda: GaussianNoise(Tiny(), -1.0), "0 or more"),
    ],
)
def test_nonsense_is_one_sentence(make, sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        make()


def test_autoattack_stands_for_the_published_ensemble() -> None:
    standard = AutoAttack().parts(BUDGET)
    assert standard == (APGD(), EachTarget(APGD(loss=DLR()), 9), FAB(), Square())
    once, each, fab = AutoAttack().parts(L1(12.0))
    assert once == Restarts(APGD(large_eps=True), 5) and each == EachTarget(APGD(loss=DLR(), large_eps=True), 5)
    assert fab == FAB()
    assert AutoAttack("plus").parts(L2(0.5)) == (
        Restarts(APGD(), 5),
        Restarts(APGD(loss=DLR()), 5),
        FAB(targets=None, restarts=5),
        Square(),
        *standard[1:3],
    )
    assert AutoAttack("rand").parts(BUDGET) == (EOT(APGD(), 20), EOT(APGD(loss=DLR()), 20))
