"""What is left of a defense when the adversary knows: a ladder of attacks, each knowing more than the one before.

The rungs follow from what the defense says of itself (`Answer`): whether it draws noise, masks gradients, has gates, or
offers a smooth stand-in. The last line is the worst case per image over all of them, beside that of the undefended
model. What each rung is asked for is in Athalye et al. 2018, Carlini et al. 2019, Tramer et al. 2020 and Croce et al.
2022.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from crossguard import files
from crossguard.answer import Answer, counting
from crossguard.attacks.apgd import APGD
from crossguard.attacks.base import GRAY, Attack, ImageAttack
from crossguard.attacks.gradient import PGD
from crossguard.attacks.knowledge import Adaptive, AtGate, Blind, Smooth
from crossguard.attacks.meta import EOT, PredictedLabel
from crossguard.attacks.query import RayS, Square
from crossguard.budgets import Both, Budget, PixelBudget
from crossguard.errors import CrossguardError
from crossguard.experiment import Experiment, Watch
from crossguard.goals import Goal
from crossguard.limits import at_least
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import layers
from crossguard.opening import evaluating
from crossguard.processes import joined
from crossguard.report import Outcomes, Ranks, Rate, Report
from crossguard.seeds import drawing, keys
from crossguard.table import worst
from crossguard.tasks.base import Task
from crossguard.words import quoted, show

PICTURE, TEXT = "ladder.png", "ladder.md"

_CLEAN = "clean"
_STRAIGHT = ("straight", "average over noise")
_WHY = {
    "own label": "the defense reads the label off the perturbation",
    "queries": "its gradients are masked",
    "query, hard labels": "its gradients are masked",
}
_MEASURED = 16  # images that the price is measured on
_Z = 1.959964  # of an interval of 95 %


@dataclass(frozen=True)
class Rung:
    """One adversary.

    Args:
        name: for people.
        report: what it left; None while it is not asked.
    """

    name: str
    report: Report

    @property
    def knows(self) -> str:
        """What the adversary knows."""
        return self.report.question.get("knowledge", "")

    @property
    def outcomes(self) -> Outcomes | Ranks:
        """What became of each sample: what most draws say, where there are several."""
        return self.report.drawn or self.report.outcomes

    def rate(self, part: int = 0) -> Rate:
        """The share that is right clean, and under attack where there is one."""
        _, clean, robust = self.outcomes.parts[part]
        return robust if self.report.attacked else clean


@dataclass(frozen=True)
class Price:
    """What one answer to one image costs.

    Args:
        forwards: of an image tower.
        backwards: gradients through one.
        seconds: on this machine.
        peak: bytes of tensors that were alive at once, weights not counted.
    """

    forwards: float
    backwards: float
    seconds: float
    peak: float


@dataclass(frozen=True)
class Ladder:
    """All rungs of one model.

    Args:
        name: the model, for people.
        price: None where it was not measured.
    """

    name: str
    rungs: tuple[Rung, ...]
    price: Price | None = None

    @property
    def clean(self) -> Report:
        return self.rungs[0].report

    @property
    def attacked(self) -> tuple[Rung, ...]:
        return tuple(rung for rung in self.rungs if rung.report.attacked)

    @property
    def worst(self) -> Outcomes | Ranks:
        """What is left of each sample after all rungs: right clean, and under every attack."""
        return worst([self.clean.outcomes, *(rung.outcomes for rung in self.attacked)])


@dataclass(frozen=True)
class Audit:
    """The ladders of a defense, of its base and of whatever stands beside them for comparison."""

    defense: Ladder
    base: Ladder | None
    others: tuple[Ladder, ...] = ()
    draws: int = 1
    doubts: tuple[str, ...] = field(default=())

    @property
    def ladders(self) -> tuple[Ladder, ...]:
        return (self.defense, *([] if self.base is None else [self.base]), *self.others)

    def difference(self, part: int = 0) -> tuple[float, float, float]:
        """The worst case of the defense minus that of its base, over the same images, with its interval of 95 %
        (Bonett and Price 2012, paired). For a classification; raises without a base."""
        if self.base is None:
            raise CrossguardError("a model without a defense has no base to be compared with")
        del part
        ours, theirs = ((one.correct & one.standing) for one in (self.defense.worst, self.base.worst))
        return paired(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(ours))

    def lines(self) -> list[str]:
        """The ladder as a table in markdown, and what it says."""
        found: list[str] = []
        for part, (score, _, _) in enumerate(self.defense.clean.parts):
            found += self._table(part, score)
            found.append("")
        if self.base is not None:
            middle, low, high = self.difference()
            found.append(
                f"The worst case of the defense minus that of its base: {_points(middle)} points "
                f"[{_points(low)}, {_points(high)}] (paired, 95 %)."
            )
        if any(rung.report.drawn is not None for rung in self.defense.rungs):
            found.append(f"The defense draws noise: each image under attack is judged by most of {self.draws} draws.")
        found += self._prices()
        if self.doubts:
            found += ["", *(f"- {doubt}" for doubt in self.doubts)]
        return found

    def _table(self, part: int, score: str) -> list[str]:
        title = f"robust{': ' * bool(score)}{score}"
        found = [f"| model | adversary | knows | n | {title} |", "|---|---|---|---:|---:|"]
        for ladder in self.ladders:
            for rung in ladder.rungs:
                if ladder is self.defense or not rung.report.attacked:
                    found.append(_row(ladder.name, rung.name, rung.knows, rung.rate(part)))
            label = f"{len(ladder.attacked)} adversaries"
            found.append(_row(ladder.name, "**worst case per image**", label, ladder.worst.parts[part][2]))
        return found

    def _prices(self) -> list[str]:
        priced = [(ladder.name, ladder.price) for ladder in self.ladders if ladder.price is not None]
        if not priced:
            return []
        return [
            "",
            "| an answer to one image | forwards | backwards | milliseconds | peak MB |",
            "|---|---:|---:|---:|---:|",
            *(
                f"| {_cell(name)} | {price.forwards:.3g} | {price.backwards:.3g} | {1000 * price.seconds:.3g} "
                f"| {price.peak / 1e6:.3g} |"
                for name, price in priced
            ),
        ]


@evaluating()
def audit(
    task: Task,
    model: VisionLanguageModel,
    budget: Budget,
    out: str | Path,
    *,
    attack: ImageAttack | None = None,
    against: Mapping[str, VisionLanguageModel] | None = None,
    transfer: Mapping[str, VisionLanguageModel] | None = None,
    samples: int = 8,
    queries: int = 1000,
    draws: int = 5,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 128,
    watch: Watch | None = None,
) -> Audit:
    """Attacks a defense in every way that its own construction allows, and says what is left.

    Each rung is an ordinary report in the folder `out`, so an audit that was stopped goes on, processes share it, and
    `crossguard table --worst` reads it.

    Args:
        budget: of pixels.
        attack: what is carried out on each rung; APGD, if None.
        against: other models by name, each with a worst case of its own for comparison.
        transfer: models by name that the attack is also crafted on.
        samples: draws that attacks average over (`EOT`), where the defense draws noise.
        queries: of `Square` and `RayS`, which ask the defense without gradients; 0 leaves them out.
        draws: by how many draws each image under attack is judged, where the defense draws noise; it stands where most
            of them say so.
        limit: how many samples; all, if None.
    """
    if not isinstance(model, VisionLanguageModel):
        raise CrossguardError(f"{quoted(model)} is no model to audit; give one, as 'TTC(Tiny())'")
    if isinstance(budget, Both) or not isinstance(budget, PixelBudget):
        raise CrossguardError(
            f"an audit is about pixels, and {quoted(budget)} is no budget of those, as 'Linf(4/255)' is"
        )
    if attack is not None and not isinstance(attack, ImageAttack):
        raise CrossguardError(f"{quoted(attack)} does not attack images; give an attack such as 'APGD()'")
    draws, samples = at_least("draws", draws, 1), at_least("samples", samples, 1)
    adaptive = Adaptive(attack or APGD(), samples, at_least("queries", queries, 0))
    bare = layers(model)[-1]
    names = {show(model, short=True): model}
    if bare is not model:
        names[show(bare, short=True)] = bare
    for name, other in (against or {}).items():
        if not isinstance(other, VisionLanguageModel):
            raise CrossguardError(f"{quoted(other)} is no model to compare with; give one, as 'Tiny()'")
        if other not in names.values():
            names[name] = other
    sources = {"None": None} | dict(transfer or {})
    rungs = dict[str, dict[str, Attack | None]]()
    grids = list[dict[str, dict[str, Any]]]()
    for name, one in names.items():
        answer, goal = _told(task, one, limit, seed)
        rungs[name] = {_CLEAN: None} | named(adaptive, answer, goal, budget)
        axes = {
            "task": {show(task, short=True): task},
            "model": {name: one},
            "budget": {show(budget, short=True): budget},
        }
        grids.append(axes | {"attack": rungs[name], "surrogate": {"None": None}})
        crafted = {label: source for label, source in sources.items() if source not in (None, one)}
        if crafted and one is model:
            grids.append(axes | {"attack": {"transfer": adaptive.attack}, "surrogate": crafted})
    experiment = Experiment(
        grids[0], seed, limit, batch, source=f"the audit in {out}", more=tuple(grids[1:]), draws=draws
    )
    cells = experiment.cells()
    reports = {report.key: report for report in experiment.run(out, watch)}
    found = dict[str, list[Rung]]()
    for cell in cells:
        name = next(name for name, one in names.items() if one == cell.words["model"])
        label = next((label for label, one in rungs[name].items() if one == cell.words["attack"]), "transfer")
        if cell.words["surrogate"] is not None:
            source = next(label for label, one in sources.items() if one == cell.words["surrogate"])
            label = f"crafted on {source}"
        found.setdefault(name, []).append(Rung(label, reports[cell.key]))
    ladders = [Ladder(name, tuple(found[name]), price(task, one, seed)) for name, one in names.items()]
    beside = ladders[1:] if bare is model else ladders[2:]
    made = Audit(ladders[0], None if bare is model else ladders[1], tuple(beside), draws)
    made = replace(made, doubts=tuple(_doubts(made)))
    if joined().first:
        files.write(Path(out) / TEXT, "\n".join(made.lines()) + "\n")
        files.write(Path(out) / PICTURE, picture(made))
    return made


def named(adaptive: Adaptive, answer: Answer | None, goal: Goal, budget: PixelBudget) -> dict[str, Attack | None]:
    """The adversaries of a ladder by name, from the one who knows least to the one who knows most."""
    found: dict[str, Attack | None] = {}
    if answer is not None and answer.inner is not None:  # what the literature reports
        found |= {"blind, PGD-10": Blind(PGD(steps=10)), "blind, PGD-100": Blind(PGD(steps=100))}
        if answer.random:
            found["straight"] = adaptive.attack  # without the average, to see what that is worth
    for part in adaptive.parts(answer, goal, budget):
        found.setdefault(_name(part), part)
    if adaptive.queries and isinstance(budget, RayS.norms):
        found["query, hard labels"] = RayS(queries=adaptive.queries)
    return dict(sorted(found.items(), key=lambda item: not item[0].startswith("blind")))


def _name(attack: ImageAttack) -> str:
    """What a rung is called."""
    match attack:
        case Blind():
            return "blind" if attack.unknown in (None, 1) else f"blind to {attack.unknown} defenses"
        case Smooth():
            return "smooth stand-in"
        case AtGate():
            return f"at the gate {attack.gate}"
        case PredictedLabel():
            return "own label"
        case Square():
            return "queries"
        case EOT():
            return "average over noise"
        case _:
            return "straight"


def _told(task: Task, model: VisionLanguageModel, limit: int | None, seed: int) -> tuple[Answer | None, Goal]:
    """What a model says of itself on this task, and what is climbed."""
    indices = task.chosen(min(limit or 2, 2))
    trial = task.prepare(model, None, None, None, indices, seed)
    answer, goal = trial.climb(next(task.batches(len(indices), indices)))
    return (answer if isinstance(answer, Answer) else None), goal


def price(task: Task, model: VisionLanguageModel, seed: int = 0) -> Price:
    """What an answer costs, from a few images of the task."""
    indices = task.chosen(_MEASURED)
    trial = task.prepare(model, None, None, None, indices, seed)
    batch = next(task.batches(len(indices), indices))
    answer, _ = trial.climb(batch)
    images, noise, count = batch.images.to(model.device), keys(batch.ids, seed), len(batch)
    with torch.no_grad(), drawing(noise), counting() as costs, _Peak() as memory:  # it also warms up
        answer(images)
    spent = math.inf
    for _ in range(2):
        began = time.perf_counter()
        with torch.no_grad(), drawing(noise):
            _ready(answer(images))
        spent = min(spent, time.perf_counter() - began)
    return Price(costs.forwards / count, costs.backwards / count, spent / count, memory.most / count)


def _ready(outputs: Tensor) -> None:
    """Waits until an accelerator has done its work."""
    if outputs.device.type == "cuda":
        torch.cuda.synchronize(outputs.device)


class _Peak(TorchDispatchMode):
    """How many bytes of the tensors that are made inside are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        outputs = func(*args, **(kwargs or {}))
        for one in tree_leaves(outputs):
            if isinstance(one, Tensor):
                self._see(one)
        return outputs

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if not size or place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def paired(more: int, less: int, n: int) -> tuple[float, float, float]:
    """The difference of two shares of the same n, and its interval of 95 % (Bonett and Price 2012).

    Args:
        more: how many count for the first alone.
        less: how many for the second alone.
    """
    one, other = (more + 1) / (n + 2), (less + 1) / (n + 2)
    middle, wide = one - other, _Z * math.sqrt((one + other - (one - other) ** 2) / (n + 2))
    return (more - less) / n, max(middle - wide, -1.0), min(middle + wide, 1.0)


def _doubts(made: Audit) -> Iterator[str]:
    """What the rungs say of each other, each with its remedy."""
    ladder = made.defense
    final = ladder.worst.parts[0][2]
    gray = [rung.rate().value for rung in ladder.attacked if rung.knows == GRAY]
    if gray and max(gray) > final.interval[1]:
        yield (
            f"an adversary who does not know the defense leaves {100 * max(gray):.1f} % and one who does "
            f"{100 * final.value:.1f} %: the first number is one of ignorance; quote the worst case"
        )
    white = [rung for rung in ladder.attacked if rung.name in _STRAIGHT]
    best = min(white, key=lambda rung: rung.rate().value, default=None)
    for rung in ladder.attacked:
        if best is not None and rung not in white and rung.rate().value < best.rate().interval[0]:
            why = _WHY.get(rung.name, "gradients that go around it are not the ones to follow")
            yield (
                f"'{rung.name}' leaves {100 * rung.rate().value:.1f} % and the gradient of the defense itself "
                f"{100 * best.rate().value:.1f} %: {why}, so an attack straight at it is too kind; quote the worst case"
            )
    for rung in ladder.attacked:
        said, report = rung.outcomes, rung.report
        won, lost = int((~said.correct & said.standing).sum()), int((said.correct & ~said.standing).sum())
        if won - lost > 2.0 * math.sqrt(won + lost):
            yield (
                f"under '{rung.name}' {said.adversarial_rate.successes} of {report.n} answers are right and "
                f"{report.clean.successes} without an attack: the defense may read the label off the perturbation; "
                "look at 'own label'"
            )
            break
    if made.base is not None:
        _, low, _ = made.difference()
        if low <= 0.0:
            yield (
                "in the worst case the defense is not better than its base by more than the interval: what it costs "
                "buys nothing that this audit can see; ask about more samples, or leave it out"
            )


def picture(made: Audit) -> bytes:
    """A bar for each rung, as PNG: the share of samples that stand, with its interval."""
    from matplotlib.figure import Figure

    part = 0
    bars: list[tuple[str, Rate, str]] = []
    for ladder in made.ladders:
        colors = ("#4472a8", "#b00020") if ladder is made.defense else ("#9aa7b5", "#5b6673")
        for rung in ladder.rungs:
            if ladder is made.defense or not rung.report.attacked:
                kind = "#6b9e57" if not rung.report.attacked else colors[0]
                bars.append((f"{_short(ladder.name)}: {rung.name}", rung.rate(part), kind))
        bars.append((f"{_short(ladder.name)}: worst case per image", ladder.worst.parts[part][2], colors[1]))
    canvas = Figure((9.0, 1.0 + 0.34 * len(bars)), dpi=110, facecolor="white", layout="constrained")
    axes = canvas.add_subplot()
    places = list(range(len(bars)))
    axes.barh(places, [100 * rate.value for _, rate, _ in bars], color=[kind for _, _, kind in bars], height=0.7)
    for place, (_, rate, _) in zip(places, bars, strict=True):
        low, high = (100 * end for end in rate.interval)
        axes.plot([low, high], [place, place], color="#222222", linewidth=1.2)
        axes.text(max(high, 100 * rate.value) + 1.2, place, f"{100 * rate.value:.1f}", va="center", fontsize=8)
    axes.set_yticks(places, [name for name, _, _ in bars], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"% right, clean and under attack (n = {bars[0][1].n}, 95 % intervals)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    question = made.defense.attacked[0].report.short if made.defense.attacked else {}
    axes.set_title(
        f"{question.get('budget', '')}: what is left when the adversary knows", fontsize=10, parse_math=False
    )
    content = io.BytesIO()
    canvas.savefig(content, format="png")
    return content.getvalue()


def _short(name: str) -> str:
    return name if len(name) <= 34 else f"{name[:31]}..."


def _row(model: str, adversary: str, knows: str, rate: Rate) -> str:
    return f"| {_cell(model)} | {adversary} | {knows} | {rate.n} | {rate} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
