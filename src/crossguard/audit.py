"""What is left of a defense when the adversary knows: a ladder of attacks, each knowing more than the one before.

The rungs follow from what the defense says of itself (`Answer`): whether it draws noise, masks gradients, has gates, or
offers a smooth stand-in. The last line is the worst case per image over all of them, beside that of the undefended
model. What each rung is asked for is in Athalye et al. 2018, Carlini et al. 2019, Tramer et al. 2020 and Croce et al.
2022.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
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
from crossguard.compare import Difference, difference, paired
from crossguard.data import Dataset
from crossguard.diagnose import diagnose
from crossguard.errors import CrossguardError
from crossguard.experiment import Experiment, Further, Unanswered, Watch, answered_in, check_folder, files_of
from crossguard.figures import blank, clipped, png
from crossguard.goals import Drift, Goal
from crossguard.limits import at_least
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import is_random, layers
from crossguard.opening import evaluating
from crossguard.processes import joined
from crossguard.report import Outcomes, Ranks, Rate, Report
from crossguard.seeds import drawing, fold, keys
from crossguard.table import in_markdown, worst
from crossguard.tasks.base import Task
from crossguard.tasks.retrieval import Retrieval
from crossguard.words import given, quoted, show

PICTURE, TEXT = "ladder.png", "ladder.md"

_CLEAN = "clean"
_STRAIGHT = ("straight", "average over noise")
_ORDER = ("blind", "PGD", *_STRAIGHT, "own label", "at the gate", "smooth", "queries", "query")  # cheap before dear
_WHOLE = ("blind", "PGD", *_STRAIGHT)  # asked about all samples: what papers report, and what other rungs are held to
_MEASURED = 16  # images that the price is measured on
_TITLE = 34  # characters of the name of a model in the picture


@dataclass(frozen=True)
class Rung:
    """One adversary.

    Args:
        name: for people.
        report: what it left.
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
        return self.report.judged

    @property
    def staged(self) -> bool:
        """Whether it was asked about what the rungs before it had left standing, and no more."""
        return self.report.asked is not None

    def rate(self, part: int = 0) -> Rate:
        """The share that is right clean, and under attack where there is one; after the rungs before it, where it was
        asked about what these had left."""
        _, clean, robust = self.outcomes.parts[part]
        return robust if self.report.attacked else clean

    def asked(self, part: int = 0) -> int:
        """About how many samples it was asked."""
        return self.rate(part).n if self.report.asked is None else len(self.report.asked)

    def broken(self, part: int = 0) -> int:
        """How many samples that were right clean it turned wrong."""
        return int((self.report.broken & _of_part(self.outcomes, part)).sum())


@dataclass(frozen=True)
class Price:
    """What one answer to one image costs.

    Args:
        forwards: of an image tower.
        backwards: gradients through one.
        seconds: on this machine.
        peak: bytes of tensors that were alive at once, weights and the image itself not counted.
        moves: the same images, asked again, were answered otherwise.
    """

    forwards: float
    backwards: float
    seconds: float
    peak: float
    moves: bool = False


@dataclass(frozen=True)
class Ladder:
    """All rungs of one model.

    Args:
        name: the model, for people.
        price: None where it was not measured.
        missing: the names of adversaries that apply to it and could not be carried out.
    """

    name: str
    rungs: tuple[Rung, ...]
    price: Price | None = None
    missing: tuple[str, ...] = ()

    @property
    def clean(self) -> Report:
        return self.rungs[0].report

    @property
    def attacked(self) -> tuple[Rung, ...]:
        return tuple(rung for rung in self.rungs if rung.report.attacked)

    @property
    def among(self) -> str:
        """How many adversaries the worst case is of, and of how many."""
        count = len(self.attacked)
        return f"{count} of {count + len(self.missing)} adversaries" if self.missing else f"all {count} adversaries"

    @cached_property
    def worst(self) -> Outcomes | Ranks:
        """What is left of each sample after all rungs: right clean, and under every attack."""
        return worst([self.clean.outcomes, *(rung.outcomes for rung in self.attacked)])


@dataclass(frozen=True)
class Audit:
    """The ladders of a defense, of its base and of whatever stands beside them for comparison.

    Args:
        draws: by which each image under attack is judged.
        doubts: about what the ladder says.
        unanswered: why adversaries are missing (`Ladder.missing`); None, if none is.
    """

    defense: Ladder
    base: Ladder | None
    others: tuple[Ladder, ...] = ()
    draws: int = 1
    doubts: tuple[str, ...] = field(default=())
    unanswered: Unanswered | None = None

    @property
    def ladders(self) -> tuple[Ladder, ...]:
        return (self.defense, *([] if self.base is None else [self.base]), *self.others)

    def difference(self, part: int = 0) -> Difference:
        """The worst case of the defense minus that of its base (`difference`); raises without a base.

        Args:
            part: which of the headlines; a retrieval has one for each direction.
        """
        if self.base is None:
            raise CrossguardError("a model without a defense has no base to be compared with")
        return difference(self.defense.worst, self.base.worst, part)

    def lines(self) -> list[str]:
        """The ladder as a table in markdown, and what it says."""
        found: list[str] = []
        for part, (score, _, _) in enumerate(self.defense.clean.parts):
            found += self._table(part, score)
            found.append("")
        for ladder in self.ladders:
            if ladder.missing:
                found.append(
                    f"**Not complete**: the worst case of {in_markdown(ladder.name)} is of {ladder.among}, and what is "
                    "left under all of them may be less."
                )
        for part, (score, _, _) in enumerate(self.defense.clean.parts):
            if self.base is not None:
                middle, low, high = self.difference(part)
                how = "bootstrap over images" if score else "paired"
                found.append(
                    f"{score}{': ' * bool(score)}the worst case of the defense minus that of its base is "
                    f"{_points(middle)} points [{_points(low)}, {_points(high)}] ({how}, 95 %)."
                )
        if any(rung.staged for ladder in self.ladders for rung in ladder.rungs):
            found.append(
                "A row of fewer samples was asked after all rows of its model above it, about what these had left "
                "standing: its share is what is left after all of them."
            )
        found += self._gates()
        if any(rung.report.drawn is not None for rung in self.defense.rungs):
            found.append(f"The defense draws noise: each image under attack is judged by most of {self.draws} draws.")
        found += self._prices()
        if self.doubts:
            found += ["", *(f"- {in_markdown(doubt)}" for doubt in self.doubts)]
        return found

    def _gates(self) -> list[str]:
        """How often each gate of the defense acted."""
        found: list[str] = []
        for name, (clean, _) in self.defense.clean.gates.items():
            under = [(rung.report.gates[name][1], rung.name) for rung in self.defense.attacked if rung.asked()]
            least, most = min(under, key=_share), max(under, key=_share)
            line = f"The gate '{name}' acts on {clean} of the clean images"
            if least[0].value == most[0].value:
                line += f", and on {100 * least[0].value:.1f} % under each attack."
            else:
                line += (
                    f"; under attack on {100 * least[0].value:.1f} % ('{least[1]}') to {100 * most[0].value:.1f} % "
                    f"('{most[1]}')."
                )
            found.append(in_markdown(line))
        return found

    def _table(self, part: int, score: str) -> list[str]:
        title = in_markdown(f"right{': ' * bool(score)}{score}")
        found = [f"| model | adversary | knows | asked | broke | {title} |", "|---|---|---|---:|---:|---:|"]
        for ladder in self.ladders:
            for rung in ladder.rungs:
                if ladder is self.defense or not rung.report.attacked:
                    found.append(_row(ladder.name, rung, part))
            for name in ladder.missing:
                found.append(f"| {in_markdown(ladder.name)} | {in_markdown(name)} | | | | not answered |")
            rate = ladder.worst.parts[part][2]
            found.append(
                f"| {in_markdown(ladder.name)} | **worst case per image** | {ladder.among} | {rate.n} | | {rate} |"
            )
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
                f"| {in_markdown(name)} | {price.forwards:.3g} | {price.backwards:.3g} | {1000 * price.seconds:.3g} "
                f"| {price.peak / 1e6:.3g} |"
                for name, price in priced
            ),
        ]


@evaluating()
def audit(
    task: Task | Dataset | str | Path,
    model: VisionLanguageModel | str | Path,
    budget: Budget | str | None,
    out: str | Path,
    *,
    attack: Attack | type[Attack] | str | None = None,
    against: Mapping[str, VisionLanguageModel | str | Path] | None = None,
    transfer: Mapping[str, VisionLanguageModel | str | Path] | None = None,
    samples: int = 4,
    queries: int = 1000,
    draws: int = 5,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 128,
    doubt: int = 0,
    whole: bool = False,
    watch: Watch | None = None,
) -> Audit:
    """Attacks a defense in every way that its own construction allows, and says what is left.

    Each rung is an ordinary report in the folder `out`, so an audit that was stopped goes on, processes share it, and
    `crossguard table --worst` reads it. Where an adversary cannot be carried out the others go on; the ladder then says
    that it is not complete, and `Audit.unanswered` why.

    The first rungs of a model, which are cheap and what papers report, are asked about all samples; the others, from
    cheap to dear, each about those that all before it left standing, as in AutoAttack (Croce and Hein 2020). A sample
    is left out when the worst case counts it as fallen and not before, and the noise that it meets does not hang on
    the others, so the worst case is what it is with `whole`, but for how networks round in batches of another size. In
    a retrieval each answer hangs on all samples, and every rung is asked about all.

    Words may be given as text, as `evaluate` takes them.

    Args:
        task: data stand for the task that fits them.
        budget: of pixels.
        attack: what is carried out on each rung; APGD, if None.
        against: other models by name, each with a worst case of its own for comparison.
        transfer: models by name that the attack is also crafted on, against each model of the audit.
        samples: draws that attacks average over at each step (`EOT`), where the defense draws noise. With 100 steps of
            APGD, 4 left as many images as 8 on `TTC` and `GaussianNoise` at two thirds of the cost; AutoAttack takes
            20.
        queries: of `Square` and `RayS`, which ask the defense without gradients; 0 leaves them out.
        draws: by how many draws each image under attack is judged, where the defense draws noise; it stands where most
            of them say so.
        limit: how many samples; all, if None.
        doubt: run the checks of `diagnose` on so many samples, with the attack straight at the defense. They are run
            again when an audit is read again.
        whole: ask every rung about all samples, so that each has a rate of its own to compare; the worst case is the
            same and takes several times as long.
    """
    task, model, budget = given("task", task), given("model", model), given("budget", budget)
    attack = given("attack", attack)
    assert isinstance(task, Task) and isinstance(model, VisionLanguageModel)
    others, sources = (
        {label: given("model", one) for label, one in (some or {}).items()} for some in (against, transfer)
    )
    if isinstance(budget, Both) or not isinstance(budget, PixelBudget):
        raise CrossguardError(
            f"an audit is about pixels, and {quoted(budget)} is no budget of those, as 'Linf(4/255)' is"
        )
    if attack is not None and not isinstance(attack, ImageAttack):
        raise CrossguardError(f"{quoted(attack)} does not attack images; give an attack such as 'APGD()'")
    draws, samples, doubt = at_least("draws", draws, 1), at_least("samples", samples, 1), at_least("doubt", doubt, 0)
    adaptive = Adaptive(attack or APGD(), samples, at_least("queries", queries, 0))
    bare = layers(model)[-1]
    names = {show(model, short=True): model}
    if bare is not model:
        names[show(bare, short=True)] = bare
    for name, other in others.items():
        if other in names.values():
            continue  # it has its rows
        if name in names:
            raise CrossguardError(
                f"{quoted(name)} is a model of this audit already; give the one to compare with another label"
            )
        names[name] = other
    rungs = dict[str, dict[str, Attack | None]]()
    grids, chains = list[dict[str, dict[str, Any]]](), list[dict[str, dict[str, Any]]]()
    check_folder(Path(out))
    files.make_writable(Path(out))  # before networks are opened, and what is to be trained is trained
    for name, one in names.items():
        answer, goal = _told(task, one, limit, seed)
        rungs[name] = {_CLEAN: None} | named(adaptive, answer, goal, budget)
        axes = {
            "task": {show(task, short=True): task},
            "model": {name: one},
            "budget": {show(budget, short=True): budget},
        }
        apart = whole or isinstance(task, Retrieval)
        first = {label: one for label, one in rungs[name].items() if apart or label.startswith((_CLEAN, *_WHOLE))}
        later = {label: one for label, one in rungs[name].items() if label not in first}
        grids.append(axes | {"attack": first, "surrogate": {"None": None}})
        if later:
            chains.append(axes | {"attack": later, "surrogate": {"None": None}})
        crafted = {label: source for label, source in sources.items() if source != one}
        if crafted:
            grids.append(axes | {"attack": {"transfer": adaptive.attack}, "surrogate": crafted})
    experiment = Experiment(
        grids[0], seed, limit, batch, source=f"the audit in {out}", more=tuple(map(Further, grids[1:])), draws=draws,
        chains=tuple(chains),
    )  # fmt: skip
    cells = experiment.cells()
    missing: Unanswered | None = None
    try:
        answered = experiment.run(out, watch)
    except Unanswered as error:  # the other adversaries have come
        answered, missing = answered_in(out, cells), error
    reports = {report.key: report for report in answered}
    found, absent = dict[str, list[Rung]](), dict[str, list[str]]()
    for cell in cells:
        name = next(name for name, one in names.items() if one == cell.words["model"])
        label = next((label for label, one in rungs[name].items() if one == cell.words["attack"]), "transfer")
        if cell.words["surrogate"] is not None:
            source = next(label for label, one in sources.items() if one == cell.words["surrogate"])
            label = f"crafted on {source}"
        if cell.key in reports:
            found.setdefault(name, []).append(Rung(label, reports[cell.key]))
            continue
        assert missing is not None
        if cell.words["attack"] is None:
            raise missing
        absent.setdefault(name, []).append(label)
    for name, rungs_of in found.items():
        _check_gates(Path(out), name, rungs_of)
    ladders = [
        Ladder(name, tuple(found[name]), price(task, one, seed), tuple(absent.get(name, ())))
        for name, one in names.items()
    ]
    beside = ladders[1:] if bare is model else ladders[2:]
    made = Audit(ladders[0], None if bare is model else ladders[1], tuple(beside), draws, unanswered=missing)
    doubts, group = list(_doubts(made)), joined()
    if missing is not None:
        doubts.append(f"the worst case is of fewer adversaries than apply: {missing}")
    if ladders[0].price is not None and ladders[0].price.moves and not is_random(model):
        doubts.append(
            f"{type(model).__name__} answers otherwise when asked again and does not say so: set random = True and "
            "draw by self.normal or self.uniform, so that attacks average over it and several draws judge"
        )
    straight = {rung.name: rung for rung in ladders[0].attacked if rung.name in _STRAIGHT}
    if doubt and straight:
        name = next(name for name in _STRAIGHT if name in straight)

        def checked() -> tuple[str, ...]:
            asked = rungs[ladders[0].name][name]
            return diagnose(straight[name].report, task, model, asked, budget, None, doubt, seed)

        (told,) = group.each([checked], lambda work: work())
        doubts += told
    made = replace(made, doubts=tuple(doubts))
    if group.first:
        files.write(Path(out) / TEXT, "\n".join(made.lines()) + "\n")
        files.write(Path(out) / PICTURE, picture(made))
    return made


def named(adaptive: Adaptive, answer: Answer | None, goal: Goal, budget: PixelBudget) -> dict[str, Attack | None]:
    """The adversaries of a ladder by name: first those that do not know the defense, then those that see it, and behind
    them from cheap to dear those that are asked about what is left."""
    found: dict[str, Attack | None] = {}
    defended = answer is not None and answer.inner is not None
    for steps in (10, 100):  # what the literature reports; the base meets them as well, so that nobody is spared
        attack = PGD(steps=steps)
        found["blind, " * defended + f"PGD-{steps}"] = Blind(attack) if defended else attack
    if answer is not None and answer.random:
        found["straight"] = adaptive.attack  # without the average, to see what that is worth
    for part in adaptive.parts(answer, goal, budget):
        found.setdefault(_name(part, 0 if answer is None else answer.layers), part)
    if adaptive.queries and isinstance(budget, RayS.norms) and not isinstance(goal, Drift):  # which never says: won
        found["query, hard labels"] = RayS(queries=adaptive.queries)
    places = {name: next(at for at, one in enumerate(_ORDER) if name.startswith(one)) for name in found}
    return dict(sorted(found.items(), key=lambda item: places[item[0]]))


def _name(attack: ImageAttack, layers: int) -> str:
    """What a rung is called, on a model of so many defenses."""
    match attack:
        case Blind():
            return "blind" if attack.unknown in (None, layers) else f"blind to the outer {attack.unknown} of {layers}"
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


def _check_gates(out: Path, name: str, rungs: Sequence[Rung]) -> None:
    """Refuses reports of which some say how often gates acted and others do not."""
    silent = [rung.report.key for rung in rungs if not rung.report.gates]
    if 0 < len(silent) < len(rungs):
        first, more = files_of(out, silent[0])[0].name, f" and {len(silent) - 1} more" * (len(silent) > 1)
        raise CrossguardError(
            f"{out}: {len(silent)} of {len(rungs)} reports on {name} are older than the others and do not say how "
            f"often its gates act; remove {first}{more}, or audit in another folder"
        )


def _told(task: Task, model: VisionLanguageModel, limit: int | None, seed: int) -> tuple[Answer | None, Goal]:
    """What a model says of itself on this task, and what is climbed."""
    indices = task.chosen(min(limit or 2, 2))
    trial = task.prepare(model, None, None, None, indices, seed)
    batch = next(task.batches(len(indices), indices))
    answer, goal = trial.climb(batch)
    if isinstance(task, Retrieval) and task.goal == "drift":
        goal = Drift(trial.judge(batch.images, keys(batch.ids, seed)))
    return (answer if isinstance(answer, Answer) else None), goal


def price(task: Task, model: VisionLanguageModel, seed: int = 0) -> Price:
    """What an answer costs, from a few images of the task."""
    indices = task.chosen(_MEASURED)
    trial = task.prepare(model, None, None, None, indices, seed)
    batch = next(task.batches(len(indices), indices))
    answer, _ = trial.climb(batch)
    images, noise, count = batch.images.to(model.device), keys(batch.ids, seed), len(batch)
    with torch.no_grad(), drawing(noise), counting() as costs, _Peak() as memory:  # it also warms up
        first = answer(images)
    spent, moves = math.inf, False
    for number in (1, 2):
        began = time.perf_counter()
        with torch.no_grad(), drawing(fold(noise, number)):
            again = _ready(answer(images))
        spent = min(spent, time.perf_counter() - began)
        moves |= not torch.allclose(again, first, rtol=1e-4, atol=1e-5)
    return Price(costs.forwards / count, costs.backwards / count, spent / count, memory.most / count, moves)


def _ready(outputs: Tensor) -> Tensor:
    """The outputs, when an accelerator has done its work."""
    if outputs.device.type == "cuda":
        torch.cuda.synchronize(outputs.device)
    return outputs


class _Peak(TorchDispatchMode):
    """How many bytes of the tensors that are made inside are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor):
                self._see(one, 0)  # from outside, unless it is known: its views are no memory of their own
        outputs = func(*args, **(kwargs or {}))
        for one in tree_leaves(outputs):
            if isinstance(one, Tensor):
                self._see(one, one.untyped_storage().nbytes())
        return outputs

    def _see(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if not place or place in self._known:
            return
        self._known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def _below(one: Outcomes | Ranks, other: Outcomes | Ranks, part: int) -> bool:
    """Whether the first leaves less than the second by more than the interval."""
    return difference(one, other, part)[2] < 0.0


def _doubts(made: Audit) -> Iterator[str]:
    """What the rungs say of each other, each with its remedy."""
    for part, (score, _, _) in enumerate(made.defense.clean.parts):
        for doubt in _of_the_ladder(made, part):
            yield f"{score}{': ' * bool(score)}{doubt}"


def _of_the_ladder(made: Audit, part: int) -> Iterator[str]:
    ladder, final = made.defense, made.defense.worst

    def left(said: Outcomes | Ranks) -> str:
        return f"{100 * said.parts[part][2].value:.1f} %"

    def least(rungs: Iterable[Rung]) -> Rung | None:
        return min(rungs, key=lambda rung: rung.rate(part).value, default=None)

    blind = least(rung for rung in ladder.attacked if rung.knows == GRAY)
    if blind is not None and _below(final, blind.outcomes, part):
        yield (
            f"an adversary who does not know the defense ('{blind.name}') leaves {left(blind.outcomes)} and one who "
            f"does {left(final)}: the first is a number of ignorance; quote the worst case"
        )
    white = {rung.name: rung for rung in ladder.attacked if rung.name in _STRAIGHT}
    assert not any(rung.staged for rung in white.values()), "they have rates of their own, which others are held to"
    best = least(white.values())
    if len(white) == 2 and _below(white[_STRAIGHT[1]].outcomes, white[_STRAIGHT[0]].outcomes, part):
        single, average = (left(white[name].outcomes) for name in _STRAIGHT)
        yield (
            f"noise hides the gradient: '{_STRAIGHT[0]}' leaves {single} and '{_STRAIGHT[1]}' {average}; attack with "
            "EOT(...)"
        )
    beating = dict[str, list[Rung]]()
    for rung in ladder.attacked:
        if best is not None and rung.name not in white and _beats(rung, best, part):
            beating.setdefault(_why(rung), []).append(rung)
    for why, those in beating.items():
        rung = max(those, key=lambda rung: rung.broken(part))
        assert best is not None
        told = (
            f"'{rung.name}' breaks {rung.broken(part)} of {rung.asked(part)} samples that '{best.name}' and all others "
            "before it left standing"
            if rung.staged
            else f"'{rung.name}' leaves {left(rung.outcomes)} and '{best.name}' {left(best.outcomes)}"
        )
        yield (f"{told}: {why}, so the gradient of the defense itself is no adversary to rely on; quote the worst case")
    yield from _leaks(ladder, part)
    yield from _idle(ladder)
    if made.base is not None and made.difference(part)[1] <= 0.0:
        yield (
            "in the worst case the defense is not better than its base by more than the interval: what it costs buys "
            "nothing that this audit can see; ask about more samples, or leave it out"
        )


def _beats(rung: Rung, best: Rung, part: int) -> bool:
    """Whether a rung leaves less than the best one that goes straight at the defense, by more than the interval. Of one
    that was asked about what that one had left, whether it alone takes away so much; what it would have left of the
    others is not known."""
    if rung.staged:
        return paired(rung.broken(part), 0, rung.rate(part).n).low > 0.0
    return _below(rung.outcomes, best.outcomes, part)


def _why(rung: Rung) -> str:
    """What it says of a defense that this adversary beats the gradient."""
    if rung.knows == GRAY:
        return "what is crafted without the defense passes through it, while its own gradients lead astray (masked)"
    if rung.knows.startswith("black box"):
        return "its gradients are masked"
    if rung.name.startswith("at the gate"):
        return "an image can slip below the threshold"
    if rung.name == "own label":
        return "the defense reads the label off the perturbation"
    if rung.name == "smooth stand-in":
        return "gradients that go around the hard steps are not the ones to follow"
    return "the gradient is weaker than an image crafted elsewhere"


def _leaks(ladder: Ladder, part: int) -> Iterator[str]:
    """An attack that sets more answers right than wrong."""
    for rung in ladder.attacked:
        if rung.staged:
            continue  # it was asked about right answers alone, and cannot set any right
        said = rung.outcomes
        asked = _of_part(said, part)
        won, lost = (
            int((~said.correct & said.standing & asked).sum()),
            int((said.correct & ~said.standing & asked).sum()),
        )
        if won - lost > 2.0 * math.sqrt(won + lost):
            yield (
                f"under '{rung.name}' {int((said.standing & asked).sum())} of {int(asked.sum())} answers are right and "
                f"{int((said.correct & asked).sum())} without an attack: the defense may read the label off the "
                "perturbation; look at 'own label', and count only what is right both clean and under attack"
            )
            return


def _idle(ladder: Ladder) -> Iterator[str]:
    """Gates that let pass what they are there to stop."""
    for name, (clean, _) in ladder.clean.gates.items():
        if clean.successes in (0, clean.n):
            yield (
                f"the gate '{name}' acts on {'no' if clean.successes == 0 else 'every'} clean image: its threshold "
                "may be that of another model; calibrate it on clean images of this one"
            )
        for rung in ladder.attacked:
            before, attacked = rung.report.gates[name]  # of the same images
            if attacked.interval[1] < before.interval[0]:
                yield (
                    f"under '{rung.name}' the gate '{name}' acts on {100 * attacked.value:.1f} % of the images and "
                    f"clean on {100 * before.value:.1f} %: it lets pass what was attacked, and there the defense does "
                    "nothing"
                )
                break


def picture(made: Audit) -> bytes:
    """A bar for each rung, as PNG: the share of samples that stand, with its interval."""
    scores = [score for score, _, _ in made.defense.clean.parts]
    height = 1.0 + 0.34 * sum(1 + len(_bars(made, ladder, 0)) for ladder in made.ladders)
    canvas = blank(8.0 * len(scores) + 1.0, height)
    for part, axes in enumerate(np.atleast_1d(canvas.subplots(1, len(scores), sharey=True))):
        place, names = 0.0, list[tuple[float, str]]()
        for ladder in made.ladders:
            names.append((place, clipped(ladder.name, _TITLE)))
            for name, rate, color in _bars(made, ladder, part):
                place += 1.0
                names.append((place, name))
                if rate is None:
                    axes.text(1.2, place, "not answered", va="center", fontsize=8, style="italic")
                    continue
                low, high = (100 * end for end in rate.interval)
                axes.barh([place], [100 * rate.value], color=color, height=0.7)
                axes.plot([low, high], [place, place], color="#222222", linewidth=1.2)
                axes.text(max(high, 100 * rate.value) + 1.2, place, f"{100 * rate.value:.1f}", va="center", fontsize=8)
            place += 1.6
        axes.set_yticks([at for at, _ in names], [name for _, name in names], fontsize=8, parse_math=False)
        titles = {clipped(ladder.name, _TITLE) for ladder in made.ladders}
        for label in axes.get_yticklabels():
            if label.get_text() in titles:
                label.set_fontweight("bold")
        axes.tick_params("y", length=0)
        axes.set_ylim(place - 0.6, -0.8)
        axes.set_xlim(0, 108)
        n = made.defense.clean.parts[part][1].n
        axes.set_xlabel(f"% right, clean and under attack (n = {n}, 95 % intervals)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(scores[part], fontsize=9, parse_math=False)
    question = made.defense.attacked[0].report.short if made.defense.attacked else {}
    canvas.suptitle(
        f"{question.get('budget', '')}: what is left when the adversary knows", fontsize=10, parse_math=False
    )
    return png(canvas)


def _bars(made: Audit, ladder: Ladder, part: int) -> list[tuple[str, Rate | None, str]]:
    """What is drawn of a ladder: names, rates (None of adversaries that are missing) and colors. Of the models beside
    the defense, how they fare clean and in the worst case."""
    attacked, final = ("#4472a8", "#b00020") if ladder is made.defense else ("#9aa7b5", "#5b6673")
    found = list[tuple[str, Rate | None, str]]()
    for rung in ladder.rungs:
        if rung.staged and ladder is made.defense:
            found.append(
                (f"then {rung.name}: broke {rung.broken(part)} of {rung.asked(part)}", rung.rate(part), "#a9c1dc")
            )
        elif ladder is made.defense or not rung.report.attacked:
            found.append((rung.name, rung.rate(part), attacked if rung.report.attacked else "#6b9e57"))
    absent = [(name, None, attacked) for name in ladder.missing]
    label = f"worst case of {ladder.among}" if ladder.missing else "worst case per image"
    return [*found, *absent, (label, ladder.worst.parts[part][2], final)]


def _row(model: str, rung: Rung, part: int) -> str:
    rate, asked = rung.rate(part), str(rung.asked(part)) + f" of {rung.rate(part).n}" * rung.staged
    broke = f" {rung.broken(part)}" * rung.report.attacked
    return (
        f"| {in_markdown(model)} | {in_markdown(rung.name)} | {in_markdown(rung.knows)} | {asked} |{broke} | {rate} |"
    )


def _of_part(said: Outcomes | Ranks, part: int) -> np.ndarray:
    """Which samples a headline is of: the queries in one direction, of a retrieval; else all."""
    return np.asarray(said.text) == part if isinstance(said, Ranks) else np.ones(len(said), bool)


def _share(told: tuple[Rate, str]) -> float:
    return told[0].value


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
