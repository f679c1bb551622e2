"""Signs that a robust number is too kind: checks that doubt an evaluation, each with its remedy.

They follow AutoAttack's warnings (Croce and Hein 2020, `checks.py`), the checklist of Carlini et al. 2019 and the
evaluation of test-time defenses by Croce et al. 2022. A check that stays silent proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks.base import GRAY, WHITE, Attack, ImageAttack, ImageVictim
from crossguard.attacks.knowledge import Adaptive, Blind
from crossguard.attacks.meta import EOT
from crossguard.attacks.query import Square
from crossguard.attacks.standard import AutoAttack
from crossguard.budgets import Both, Budget, Linf, PixelBudget
from crossguard.data import Batch
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import layers
from crossguard.opening import evaluating
from crossguard.report import Report
from crossguard.seeds import fold, keys
from crossguard.tasks.base import Task, Trial
from crossguard.words import mapped, within

_QUERIES = 1000  # of the query attack that looks for masked gradients
_LARGE = 100.0  # times the budget, under which nothing should stand


@evaluating()
def diagnose(
    report: Report,
    task: Task,
    model: VisionLanguageModel,
    attack: Attack | None,
    budget: Budget | None,
    surrogate: VisionLanguageModel | None = None,
    samples: int = 64,
    seed: int = 0,
) -> tuple[str, ...]:
    """Doubts about the report, each a sentence with its remedy.

    Args:
        samples: how many samples the checks that cost something look at.
    """
    doubts = list(_of_the_report(report))
    limit = report.question.get("limit", "None")
    few = max(samples, 2)  # one alone has no rank
    indices = task.chosen(few if limit == "None" else min(few, int(limit)))  # some of those that were asked about
    case = _Case(task, model, attack, budget, surrogate, seed, indices)
    if attack is not None and case.pixels is None:
        doubts.append(
            "the attack is on texts alone: most checks look at pixels, so that there are no other doubts says little; "
            "try more candidates (top=...), several sources (AnyOf) and a larger budget"
        )
    for check in _CHECKS:
        doubt = check(case)
        if doubt is not None:
            doubts.append(doubt)
    return tuple(doubts)


def _of_the_report(report: Report) -> Iterator[str]:
    """What the numbers alone say."""
    won, lost = int((~report.correct & report.standing).sum()), int((report.correct & ~report.standing).sum())
    if won - lost > 2.0 * (won + lost) ** 0.5:  # more than a random model's coin flips, which go either way
        yield (
            f"robust above clean: {report.adversarial.successes} of {report.n} answers are right under attack and "
            f"{report.clean.successes} without; the defense may read the label off the perturbation: attack with "
            "PredictedLabel(...), which doesn't know the label"
        )


@dataclass
class _Case:
    """The evaluation in doubt, on a few samples; of a retrieval, how its images fare among so few."""

    task: Task
    model: VisionLanguageModel
    attack: Attack | None
    budget: Budget | None
    surrogate: VisionLanguageModel | None
    seed: int
    indices: list[int]

    def batches(self) -> Iterator[Batch]:
        return self.task.batches(128, self.indices)

    def clean(self) -> Trial:
        return self.task.prepare(self.model, None, None, None, self.indices, self.seed)

    def standing(
        self, attack: Attack | None, budget: Budget | None, surrogate: VisionLanguageModel | None = None
    ) -> list[bool]:
        """Which samples are right both clean and under this attack."""
        trial = self.task.prepare(self.model, attack, budget, surrogate, self.indices, self.seed)
        found: list[bool] = []
        for batch in self.batches():
            clean, attacked = trial.answer(batch, keys(batch.ids, self.seed)).right
            found += [before and after for before, after in zip(clean, attacked, strict=True)]
        return found

    @cached_property
    def now(self) -> list[bool]:
        """Which samples stand under the attack in doubt: asked once, for all checks."""
        return self.standing(self.attack, self.budget, self.surrogate)

    @property
    def white(self) -> bool:
        """Whether the adversary has the gradients of the model itself."""
        return self.surrogate is None and self.attack is not None and self.attack.knows.startswith(WHITE)

    @property
    def pixels(self) -> PixelBudget | None:
        if self.attack is None or self.budget is None:
            return None
        return self.attack.spends(self.budget)[0]


def _random(case: _Case) -> str | None:
    """Two answers to the same images."""
    if averages(case.attack):
        return None
    trial, moved, most = case.clean(), 0, 0.0
    for batch in case.batches():
        noise = keys(batch.ids, case.seed)
        one, other = (F.normalize(trial.judge(batch.images, fold(noise, number)), dim=1) for number in (1, 2))
        apart = (one - other).norm(dim=1)
        moved, most = moved + int((apart > 1e-4).sum()), max(most, float(apart.max()))
    if not moved:
        return None
    return (
        f"random model: {moved} of {len(case.indices)} images get another answer when asked again (logits move by up "
        f"to {most:.2g} of their length); average over its noise with EOT(...) or AutoAttack('rand')"
    )


def _probabilities(case: _Case) -> str | None:
    """Outputs that sum to one."""
    trial = case.clean()
    for batch in case.batches():
        answers = trial.judge(batch.images, keys(batch.ids, case.seed))
        inside = bool((answers >= 0.0).all() and (answers <= 1.0).all())
        if not inside or not torch.allclose(answers.sum(1), torch.ones(len(answers), device=answers.device), atol=1e-5):
            return None
    return (
        "probabilities instead of logits: the model's outputs lie in [0, 1] and sum to one, so cross-entropy "
        "saturates; give logits"
    )


def _zero_gradients(case: _Case) -> str | None:
    """Images from which no gradient leads anywhere."""
    if case.pixels is None:
        return None
    count, trial = 0, case.task.prepare(case.surrogate or case.model, None, None, None, case.indices, case.seed)
    for batch in case.batches():
        answer, goal = trial.climb(batch)
        victim = ImageVictim(answer).drawing_from(keys(batch.ids, case.seed))
        gradient, _, _ = victim.ascend(batch.images.to(case.model.device), goal)
        victim.check()
        count += int((~gradient.flatten(1).any(1)).sum())
    if not count:
        return None
    return (
        f"zero gradients: for {count} of {len(case.indices)} images the gradient of the loss vanishes, so an attack by "
        "gradients stands still; attack with Square(), RayS() or Smooth(...), or with another loss (DLR(), Margin())"
    )


def _optimizes(case: _Case) -> str | None:
    """A forward that differentiates."""
    trial, batch = case.clean(), next(case.batches())
    with _watched() as calls:
        trial.judge(batch.images[:2], keys(batch.ids[:2], case.seed))
    if not calls:
        return None
    return (
        "optimization inside the forward: the model takes gradients to answer, so standard attacks see an "
        "approximation of it; attack with Adaptive(...), which also takes Blind(...), Smooth(...) and Square()"
    )


def _large_budget(case: _Case) -> str | None:
    """Nothing stands where the adversary may draw another image."""
    pixels = case.pixels
    if pixels is None or case.budget is None or pixels.eps == 0.0:
        return None
    largest = 1.0 if isinstance(pixels, Linf) else 1e4
    huge = replace(pixels, eps=min(pixels.eps * _LARGE, largest))  # type: ignore[type-var]
    wide: Budget = replace(case.budget, pixels=huge) if isinstance(case.budget, Both) else huge
    left = sum(case.standing(case.attack, wide, case.surrogate))
    if not left:
        return None
    return (
        f"{left} of {len(case.indices)} images stand under {_LARGE:.0f} times the budget, where nothing should: the "
        "attack is too weak or the gradients are masked; attack with Worst((APGD(), Square()))"
    )


def _more_steps(case: _Case) -> str | None:
    """An attack that has converged gains nothing by going on."""
    longer = _doubled(case.attack)
    if case.pixels is None or longer == case.attack:
        return None
    now, then = sum(case.now), sum(case.standing(longer, case.budget, case.surrogate))
    if then >= now:
        return None
    return (
        f"twice the steps lower robust accuracy: {then} instead of {now} of {len(case.indices)} images stand; give the "
        "attack more steps until the number stays"
    )


def _query_attack(case: _Case) -> str | None:
    """A black box that beats the gradient says that the gradient is masked."""
    pixels = case.pixels
    if pixels is None or not isinstance(case.attack, ImageAttack) or not isinstance(pixels, Square.norms):
        return None
    if not case.white:
        return None
    now, black = case.now, case.standing(Square(queries=_QUERIES), pixels)
    more = sum(stands and not beaten for stands, beaten in zip(now, black, strict=True))
    if not more:
        return None
    return (
        f"a query attack beats the gradient: Square with {_QUERIES} queries breaks {more} of the {sum(now)} images "
        "that stood; the gradients are masked: attack with AutoAttack() or Worst((..., Square(), RayS()))"
    )


def _undefended(case: _Case) -> str | None:
    """What the base of a defense gives away."""
    inner = layers(case.model)[1:]
    if not inner or case.pixels is None or not isinstance(case.attack, ImageAttack):
        return None
    if case.surrogate in inner or (case.surrogate is None and case.attack.knows == GRAY):
        return (
            "only a gray box: the attack was crafted on the undefended base and doesn't know the defense; leave out "
            "the surrogate or Blind(...) for an adaptive attack"
        )
    if not case.white:
        return None
    now, transferred = case.now, case.standing(Blind(case.attack), case.budget)
    more = sum(stands and not beaten for stands, beaten in zip(now, transferred, strict=True))
    if not more:
        return None
    return (
        f"transfer beats the white box: crafted on the undefended base, the same attack breaks {more} of the "
        f"{sum(now)} images that stood; attack with Adaptive(...), which takes the worst of both for each image"
    )


_CHECKS: tuple[Callable[[_Case], str | None], ...] = (
    _random,
    _probabilities,
    _zero_gradients,
    _optimizes,
    _large_budget,
    _more_steps,
    _query_attack,
    _undefended,
)


def averages(attack: Attack | None) -> bool:
    """Whether an attack averages over noise."""
    return (
        any(within(attack, EOT))
        or any(within(attack, Adaptive))
        or any(part.version == "rand" for part in within(attack, AutoAttack))
    )


def _doubled(attack: Attack | None) -> Attack | None:
    """The same attack with twice the steps, wherever it or an attack inside it has a number of steps."""

    def double(part: Any) -> Any:
        if isinstance(part, Attack) and is_dataclass(part) and isinstance(steps := getattr(part, "steps", None), int):
            return replace(part, steps=2 * steps)  # type: ignore[call-arg]
        return part

    return mapped(attack, double)


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Notes every call for a gradient inside. Compiled code isn't seen."""
    calls: list[str] = []
    kept = torch.autograd.grad, torch.autograd.backward, Tensor.backward

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*arguments, **options)

        return called

    torch.autograd.grad = noting("grad", kept[0])
    torch.autograd.backward = noting("backward", kept[1])
    Tensor.backward = noting("backward", kept[2])
    try:
        yield calls
    finally:
        torch.autograd.grad, torch.autograd.backward, Tensor.backward = kept
