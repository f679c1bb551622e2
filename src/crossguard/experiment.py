"""A grid of words in a TOML file.

Each answer is a file whose name ends in the hash of its question, so that what was answered is not asked again: to
resume is to run again, and two processes on one folder share the grid. What stands before the hash is for people.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from crossguard import files, own, signatures, words
from crossguard.errors import CrossguardError
from crossguard.limits import at_least, shortly
from crossguard.printing import LogFormatter
from crossguard.processes import ALONE, Processes, joined
from crossguard.reading import Missing, read_toml
from crossguard.report import DIRECTIONS, Report, ReportError, key
from crossguard.sweep import Names, Point, Sweep, laid_out
from crossguard.telling import listening
from crossguard.turns import Note, noted, waiting, worker
from crossguard.words import expanded, within

if TYPE_CHECKING:
    from crossguard.claims import Claim
    from crossguard.models.base import VisionLanguageModel

INDEX = "experiment.json"  # beside the answers: which label stands for which word
LOCKS = ".locks"  # the folder of locks, and of notes of who holds them
POLL = 1.0  # seconds between looks at a cell that another process is working on
HASH = 6  # signs of the hash of a question in the name of its answer
_LONGEST = 100  # signs of such a name

_KINDS = ("task", "model", "attack", "budget", "surrogate")
_PLACES = ("device", "dtype")
_SETTINGS = {"seed": 0, "limit": 1, "batch": 1, "draws": 1}  # whole numbers and the least that they may be
_OWN = ("limit", "batch")  # of these, what a further grid may say itself


@dataclass(frozen=True)
class Cell:
    """One question of the grid, with the objects that answer it."""

    label: str
    question: Mapping[str, str]
    words: Mapping[str, Any]
    labels: Mapping[str, set[str]] = field(default_factory=dict)  # for each axis those that lead to this question
    points: list[Point] = field(default_factory=list)  # of lines of a sweep
    after: tuple[str, ...] = ()  # the keys of the cells whose answers say about which samples it is asked
    limit: int | None = None
    batch: int = 128

    @property
    def key(self) -> str:
        return key(self.question)

    @property
    def file(self) -> str:
        """The name of the answer: what people call the cell, and the hash that it is found by."""
        return f"{readable(self.label)}.{self.key[:HASH]}.json"

    @cached_property
    def craft(self) -> str:
        """The same for cells that share what is crafted on a surrogate; else like no other."""
        from crossguard.evaluate import craft_key

        alone = self.words["attack"] is None or self.words["surrogate"] is None
        return self.key if alone else craft_key(self.question)


class Unanswered(CrossguardError):
    """Some cells of an experiment could not be answered; the others are."""


class Watch:
    """What is told how a run gets on; this one listens to nothing."""

    def start(self, cells: int, answered: int) -> None:
        """The run starts: so many cells, some of them answered already."""

    def asks(self, cell: Cell) -> None:
        """A cell is being worked on."""

    def progress(self, done: int, total: int) -> None:
        """So many samples of the cell are done."""

    def part(self, text: str) -> None:
        """What the work at hand says of itself between two batches: "APGD() (1 of 4), 60 -> 22 standing"."""

    def answers(self, cell: Cell, report: Report) -> None:
        """A cell is answered, here or by another process."""

    def fails(self, cell: Cell, error: CrossguardError) -> None:
        """A cell cannot be answered; the others go on."""

    def waits(self, cells: int, others: Mapping[str, str]) -> None:
        """Only cells that other processes work on are left; who these are and what they do, where they have said so."""


@dataclass(frozen=True)
class Further:
    """A grid beside the first one of an experiment.

    Args:
        axes: for each part of a question its words by label.
        limit: how many samples of each task; as many as of the first grid, if None.
        batch: samples at once; as in the first grid, if None.
    """

    axes: Mapping[str, Mapping[str, Any]]
    limit: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Experiment:
    """The product of tasks, models, attacks, budgets and surrogates, asked one by one.

    Args:
        grid: for each part of a question its words by label.
        seed: of all noise.
        limit: how many samples of each task; all, if None.
        batch: samples at once; results do not depend on it.
        device: where networks live, such as 'cpu' or 'cuda:1'; as `device.choose` was told, if neither this nor
            `dtype` is given.
        dtype: the precision of networks, 'float32' or 'bfloat16'.
        source: where the grid comes from, for messages.
        more: further grids, whose cells belong to it too.
        draws: by how many draws of a random model each image under attack is judged (`evaluate`).
        published: what others have measured, in percent, and where it stands, by the labels of a cell: 'TeCoA, 4/255'.
        claims: what the answers are to bear out, each with its name.
        sweep: the number that runs through values in words of the grid, where there is one.
        chains: further grids, each cell of which is asked after all cells before it of the same task, model and budget
            (`evaluate(after=...)`), and so about the samples that still stand.
    """

    grid: Mapping[str, Mapping[str, Any]]
    seed: int = 0
    limit: int | None = None
    batch: int = 128
    device: str | None = None
    dtype: str | None = None
    source: str = "the experiment"
    more: tuple[Further, ...] = ()
    draws: int = 1
    published: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)
    sweep: Sweep | None = None
    chains: tuple[Mapping[str, Mapping[str, Any]], ...] = ()

    @staticmethod
    def load(path: str | Path, trust: bool = False) -> Experiment:
        """Reads a TOML file: task, model, attack, budget and surrogate, each a word, a list of words or a
        table of label = word; and seed, limit, batch, draws, device, dtype. Task and model must be there. A table `let`
        may give names to words, which the words after it may use; `words` lists Python files of words of one's own,
        beside the file; a table `published` holds [value, source] by the labels of a cell, and a table `claims` words
        such as Above('TeCoA, PGD-10', 'undefended, PGD-10'). Each table `[[more]]` adds the cells of another grid,
        which has the axes, limit and batch of the first one but for those that it gives itself.

        Args:
            trust: run the code of the files that `words` lists. Without, each of them must have been named by hand
                before (`--words`, CROSSGUARD_WORDS), since an experiment of a stranger could have anything run.
        """
        path = Path(path)
        try:
            content = read_toml(path, "give a TOML file with the keys task and model")
        except Missing:
            raise CrossguardError(f"there is no experiment file {path}") from None
        known = ("words", "let", "sweep", *_KINDS, *_SETTINGS, *_PLACES, "more", "published", "claims")
        for name in content:
            if name not in known:
                near = words.nearest(name, known)
                raise CrossguardError(f"{path}: unknown key {shortly(name)}{near} (keys: {', '.join(known)})")
        for name in ("task", "model"):
            if name not in content:
                raise CrossguardError(f"{path}: the key {name!r} is missing; give it a list of words")
        _add_words(path, content.get("words", []), trust)
        _check_names(path, content)
        settings = _settings(str(path), content)
        places = {name: _text(path, name, content[name]) for name in _PLACES if name in content}
        sweep = _sweep(path, content.get("sweep"))
        named = _let(path, content.get("let", {}), sweep)
        listed = _grids(path, content)
        grid, *more = [
            {kind: _axis(path, kind, one.get(kind, "None"), named, sweep) for kind in _KINDS} for one in listed
        ]
        _check_labels(path, (grid, *more))
        own = [_settings(f"{path}: more", {name: one[name] for name in _OWN if name in one}) for one in listed[1:]]
        return Experiment(
            grid=grid,
            seed=settings.get("seed", 0),
            limit=settings.get("limit"),
            batch=settings.get("batch", 128),
            device=places.get("device"),
            dtype=places.get("dtype"),
            source=str(path),
            draws=settings.get("draws", 1),
            more=tuple(Further(axes, **sizes) for axes, sizes in zip(more, own, strict=True)),
            published=_published(path, content.get("published", {})),
            claims=_claims(path, content.get("claims", {}), named.each[0]),
            sweep=swept(str(path), sweep),
        )

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Inside, networks live on the device and in the precision of the experiment, where it names one."""
        if self.device is None and self.dtype is None:
            yield
            return
        from crossguard.device import choosing

        with choosing(self.device, self.dtype or "float32"):
            yield

    def _grids(self) -> tuple[Further, ...]:
        return (Further(self.grid), *self.more, *map(Further, self.chains))

    def cells(self) -> list[Cell]:
        """Every question once: cells that differ only in what does not matter to them are one (a clean
        evaluation has no budget)."""
        with self.placed():
            return self._cells()

    def _cells(self) -> list[Cell]:
        from crossguard.evaluate import question

        found: dict[str, Cell] = {}
        grids = self._grids()
        every = {kind: {label for grid in grids for label in grid.axes[kind]} for kind in _KINDS}
        several = {kind for kind, labels in every.items() if len(labels) > 1}
        apart = set[str]()  # what tells lines of a sweep apart
        if (sweep := self.sweep) is not None:
            apart = {kind for kind, one in every.items() if len({sweep.line(kind, label) for label in one}) > 1}
            apart -= {"attack"}
        for number, further in enumerate(grids):
            grid, limit = further.axes, self.limit if further.limit is None else further.limit
            attacks = any(attack is not None for attack in grid["attack"].values())
            for labels in itertools.product(*(grid[kind] for kind in _KINDS)):
                named: dict[str, str] = dict(zip(_KINDS, labels, strict=True))
                values = self.sweep.at(named) if self.sweep is not None else ()
                if len(values) > 1:  # a number that runs through two words is the same in both
                    continue
                chosen = {kind: grid[kind][label] for kind, label in zip(_KINDS, labels, strict=True)}
                label = ", ".join(label for label in labels if label != "None")
                try:
                    if chosen["attack"] is None and attacks:  # the clean cell of attacks with budgets and surrogates
                        chosen |= {"budget": None, "surrogate": None}
                    after = _before(found.values(), chosen) if number > len(self.more) else ()
                    asked = question(
                        chosen["task"], chosen["model"], chosen["attack"], chosen["budget"], chosen["surrogate"],
                        limit, self.seed, self.draws, after,
                    )  # fmt: skip
                except CrossguardError as error:
                    raise CrossguardError(f"{self.source}: in the cell ({label}): {error}") from error
                # An adversary's budget and surrogate are no part of a clean cell.
                told = {
                    kind: "clean" if kind == "attack" and one == "None" else one
                    for kind, one in zip(_KINDS, labels, strict=True)
                    if chosen["attack"] is not None or kind not in ("budget", "surrogate")
                }
                varying = [one for kind, one in told.items() if kind in several and one != "None"]
                cell = Cell(
                    ", ".join(varying) or label, asked, chosen, {kind: set() for kind in _KINDS}, after=after,
                    limit=limit, batch=further.batch or self.batch,
                )  # fmt: skip
                cell = found.setdefault(cell.key, cell)
                for kind, one in told.items():
                    cell.labels[kind].update({one, "clean"} if kind == "attack" and chosen[kind] is None else {one})
                if self.sweep is not None and chosen["attack"] is not None:
                    lines = {kind: self.sweep.line(kind, one) for kind, one in named.items()}
                    line = ", ".join(one for kind, one in lines.items() if kind in apart and one != "None")
                    cell.points.append(Point(line, lines["attack"], next(iter(values), None)))
        return _told_apart(list(found.values()))

    def run(self, out: str | Path, watch: Watch | None = None, shard: tuple[int, int] | None = None) -> list[Report]:
        """Answers every question that has no answer in the folder yet; returns all answers, in the grid's order.

        Processes on one folder share the cells by file locks, those of `torchrun` too, each with a GPU of its own.

        Args:
            shard: (i, n) answers the i-th of n parts of the grid and no other, without locks: for machines between
                which file locks cannot be trusted. Returns what is answered so far, by whomever.

        Raises:
            Unanswered: some cells cannot be answered; they do not stop the others.
        """
        with self.placed():
            return self._run(Path(out), watch, shard)

    def _run(self, out: Path, watch: Watch | None, shard: tuple[int, int] | None) -> list[Report]:
        group = joined()
        check_folder(out)
        cells = self.cells()
        index = self._index(cells)  # which refuses cells that are not there, before anything is written
        files.make_writable(out)
        files.make_writable(out / LOCKS)
        if group.first:
            files.write(out / INDEX, json.dumps(index, indent=2) + "\n")
        with _logging(out / "log.txt") as log:
            work = _Work(self, cells, out, watch if watch and group.first else Watch(), log, group)
            work.go(cells if shard is None else dealt(cells, shard, group), shard is None)
            failures = work.failures
            if group.world > 1:
                failures = [failure for part in group.gather(failures) for failure in part]
            answers = [work.known(cell) for cell in cells]
        work.close()
        if failures:
            raise Unanswered(f"{self.source}: {_told(failures, len(cells))}")
        return [answer for answer in answers if answer is not None]

    def _index(self, cells: list[Cell]) -> dict[str, Any]:
        """What tables and `crossguard status` need: label -> word, as reports spell it, and what each cell is called
        and waits for."""
        grids = [one.axes for one in self._grids()]
        axes = {
            kind: {label: words.show(word) for grid in grids for label, word in grid[kind].items()}
            for kind in self.grid
        }
        asked = {cell.key: {"label": cell.label, "fits": _fits(cell)} for cell in cells}
        index: dict[str, Any] = {"source": self.source, "labels": axes, "cells": list(asked), "asked": asked}
        if self.sweep is not None:
            points = [{"cell": cell.key, **point._asdict()} for cell in cells for point in cell.points]
            index["sweep"] = {"name": self.sweep.name, "points": points}
        index["trained"] = _watched({name: one for grid in grids for name, one in grid["model"].items()})
        published = [
            dict(zip(("cell", "score"), self._named("published", name, cells), strict=True))
            | {"value": value, "source": source}
            for name, (value, source) in self.published.items()
        ]
        claims = [
            {
                "name": name,
                "word": words.show(claim),
                "cells": [list(self._named(f"claims: {name}", cell, cells)) for cell in claim.cells],
            }
            for name, claim in self.claims.items()
        ]
        return index | {"published": published, "claims": claims}

    def _named(self, where: str, name: str, cells: Sequence[Cell]) -> tuple[str, str]:
        """The key of the cell that has these labels, and the score that is meant where there are several."""
        scores = [f"{direction} R@1" for direction in DIRECTIONS]
        known = {one for cell in cells for labels in cell.labels.values() for one in labels}
        try:
            parts = _labels(name, known | set(scores))
            score = next((one for one in parts if one in scores), "")
            wanted = [one for one in parts if one != score]
            found = [cell for cell in cells if _leads(wanted, cell.labels)]
            if len(found) != 1:
                listed = "; ".join(cell.label for cell in found[:3])
                say = f"names {len(found)} cells ({listed}, ...); say which" if found else "names no cell of this grid"
                raise CrossguardError(f"{shortly(name)} {say}")
        except CrossguardError as error:
            raise CrossguardError(f"{self.source}: {where}: {error}") from None
        return found[0].key, score


class _Work:
    """What one process does for an experiment."""

    def __init__(
        self,
        experiment: Experiment,
        cells: Sequence[Cell],
        out: Path,
        watch: Watch,
        log: logging.Logger,
        group: Processes,
    ) -> None:
        self.experiment, self.out, self.watch, self.log, self.group = experiment, out, watch, log, group
        self.reports: dict[str, Report] = {}
        self.cells = {cell.key: cell for cell in cells}
        self.failures: list[tuple[str, str]] = []  # the label of a cell, and what went wrong
        self.hopeless: set[str] = set()  # the keys of cells that could not be answered, by whichever process
        self.unreadable: dict[VisionLanguageModel, CrossguardError] = {}
        self.notes: list[Note] = []  # beside the locks that this process holds
        self.so_far = ""  # how many samples of the cell at hand are done
        # What one process of `torchrun` could not answer, no other tries again.
        self.failed = out / ".failed" / group.tell(secrets.token_hex(4))

    def go(self, cells: Sequence[Cell], shared: bool) -> None:
        """Answers the cells, in an order of its own.

        Args:
            shared: other processes may work on the same cells; locks tell who works on which.
        """
        out, log, watch = self.out, self.log, self.watch
        left = [cell for cell in cells if self.known(cell) is None]
        log.info("%s: %d cells, %d answered", self.experiment.source, len(cells), len(cells) - len(left))
        unanswered = {cell.key for cell in left}
        for cell in cells:  # killed between the answer and the end of the outcomes so far
            for stale in out.glob(f".{cell.key}.part.*") if cell.key not in unanswered else ():
                stale.unlink(missing_ok=True)
        watch.start(len(cells), len(cells) - len(left))
        # Cells that share what is crafted on a surrogate come one after the other; behind the last it is dropped.
        sharing = Counter(cell.craft for cell in left)
        order = {craft: place for place, craft in enumerate(sharing)}
        left.sort(key=lambda cell: order[cell.craft])
        for stale in (out / ".crafts").glob("*") if shared else ():  # of a run that was killed behind its last answer
            if stale.name not in sharing:
                shutil.rmtree(stale, ignore_errors=True)
        while left:
            busy: list[Cell] = []
            for cell in left:
                crafting = any(cell.craft == other.craft for other in busy)  # another process
                if any(key not in self.hopeless and self.known(self.cells[key]) is None for key in cell.after):
                    busy.append(cell)  # another process works on what comes before it
                    continue
                with ExitStack() as locks:
                    wanted = list(self._locks(cell))
                    if shared and (crafting or not all(_taken(lock, locks) for lock in wanted)):
                        busy.append(cell)
                        continue
                    self.notes = [locks.enter_context(noted(lock, cell.label)) for lock in wanted]
                    crafts = out / ".crafts" / cell.craft
                    self._answer(cell, crafts.parent if sharing[cell.craft] > 1 or crafts.exists() else None)
                sharing[cell.craft] -= 1
                if not sharing[cell.craft]:
                    shutil.rmtree(crafts, ignore_errors=True)
            if len(busy) == len(left):
                others = self._others(busy)
                watch.waits(len(busy), others)
                who = " and ".join(f"{name} ({doing})" for name, doing in others.items()) or "another process"
                with waiting(out / LOCKS / "cells", f"waits for {who}"):
                    time.sleep(POLL)
            left = busy

    def _others(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Who works on these cells, and on what, as far as that is known."""
        found = [worker(lock) for cell in cells for lock in self._locks(cell)]
        return {one.name: one.doing for one in found if one is not None}

    def _locks(self, cell: Cell) -> Iterator[Path]:
        """Who works on a cell holds these locks: that of the cell, and those of the models that are to be trained for
        it, so that other processes take other cells meanwhile."""
        from crossguard.defenses.fit import Fit

        yield self.out / LOCKS / cell.key
        for fit in within(tuple(cell.words.values()), Fit):
            if not fit.trained:
                yield self.out / LOCKS / fit.folder.name

    def known(self, cell: Cell) -> Report | None:
        """The answer that is there already; None if there is none."""
        if cell.key not in self.reports and (report := _answer(self.out, cell, self.log)) is not None:
            self.reports[cell.key] = report
        return self.reports.get(cell.key)

    def _answer(self, cell: Cell, crafts: Path | None) -> None:
        log, watch = self.log, self.watch
        failed = self.failed / cell.key
        try:
            watch.asks(cell)
            if failed.exists():  # said by the process that tried
                raise CrossguardError(failed.read_text())
            report = self.known(cell)
            if report is None:
                self._open(cell)
                report = self.reports[cell.key] = self._ask(cell, crafts)
        except files.WriteError:
            raise
        except CrossguardError as error:
            watch.fails(cell, error)
            self.hopeless.add(cell.key)
            if not failed.exists():
                log.error("%s: %s", cell.label, error)
                self.failures.append((cell.label, str(error)))
                if self.group.world > 1:
                    files.write(failed, str(error))
        else:
            watch.answers(cell, report)

    def _open(self, cell: Cell) -> None:
        """Opens the models, and trains those that are to be trained; what cannot be read is tried once, however many
        cells ask for it."""
        from crossguard.models.base import asked_of

        for model in asked_of((cell.words["model"], cell.words["surrogate"])):
            if model in self.unreadable:
                raise self.unreadable[model]
            try:
                model.open()
            except files.WriteError:
                raise
            except CrossguardError as error:
                self.unreadable[model] = error
                raise

    def _ask(self, cell: Cell, crafts: Path | None) -> Report:
        from crossguard.evaluate import evaluate

        log, chosen, experiment = self.log, cell.words, self.experiment
        log.info("asking %s (%s)", cell.label, cell.key)
        with listening(self._hear(cell)):
            report = evaluate(
                chosen["task"], chosen["model"], chosen["attack"], chosen["budget"], chosen["surrogate"],
                limit=cell.limit, seed=experiment.seed, batch=cell.batch, progress=self._progress(cell),
                processes=False, crafts=crafts, overwrite=True, draws=experiment.draws, out=self.out / cell.file,
                partial=self.out / f".{cell.key}.part",
                after=[self.known(self.cells[key]) or key for key in cell.after],
            )  # fmt: skip
        report = replace(report, pictures=None)  # of many reports they would fill the memory
        log.info("%s: %s, %.1f s", cell.label, report.headline, report.seconds)
        for note in report.notes:
            log.warning("%s: %s", cell.label, note)
        return report

    def _progress(self, cell: Cell) -> Callable[[int, int], None]:
        """Tells the watch and the notes how many samples of a cell are done."""

        def progress(done: int, total: int) -> None:
            self.watch.progress(done, total)
            self._note(f"{cell.label}: {done} of {total} samples")
            self.so_far = f"{done} of {total} samples, "

        self.so_far = ""
        return progress

    def _hear(self, cell: Cell) -> Callable[[str], None]:
        """Tells the watch and the notes what an attack on a cell says."""

        def hear(text: str) -> None:
            self.watch.part(text)
            self._note(f"{cell.label}: {self.so_far}{text}")

        return hear

    def _note(self, doing: str) -> None:
        for note in self.notes:
            note.say(doing)

    def close(self) -> None:
        if self.group.first:
            shutil.rmtree(self.failed.parent, ignore_errors=True)


def dealt(cells: Sequence[Cell], shard: tuple[int, int], group: Processes = ALONE) -> list[Cell]:
    """The cells of shard (i, n), from 1 to n; each is in one shard, whatever is answered already.

    Cells that share what is crafted on a surrogate, or a model that is trained for them, are in the same one, and so
    are those that are asked after each other. Where `torchrun` started several processes on a shard, they share its
    part in the same way.
    """
    from crossguard.defenses.fit import Fit

    number, of = shard
    if not 1 <= number <= of:
        raise CrossguardError(f"there is no shard {number} of {of}; they are numbered from 1")
    parts: list[list[Cell]] = []
    homes: dict[str, int] = {}  # in which part is what cells share
    for cell in cells:
        shares = {
            cell.craft,
            cell.key,
            *cell.after,
            *(words.show(fit) for fit in within(tuple(cell.words.values()), Fit)),
        }
        met = sorted({homes[one] for one in shares if one in homes})
        home = met[0] if met else len(parts)
        if not met:
            parts.append([])
        for other in met[1:]:  # what was apart so far is one part, since this cell belongs to both
            parts[home] += parts[other]
            parts[other] = []
            homes |= {name: home for name, part in homes.items() if part == other}
        parts[home].append(cell)
        homes |= dict.fromkeys(shares, home)
    first, step = (number - 1) * group.world + group.rank, of * group.world
    return [cell for part in [part for part in parts if part][first::step] for cell in part]


def _before(cells: Iterable[Cell], chosen: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the cells of the same task, model and budget as those chosen; a clean one has no budget."""
    return tuple(
        cell.key
        for cell in cells
        if all(cell.words[kind] == chosen[kind] for kind in ("task", "model"))
        and (cell.words["attack"] is None or cell.words["budget"] == chosen["budget"])
    )


def _told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """The cells; those of other limits that people would call the same have the limit in their label."""
    limits: dict[str, set[int | None]] = {}
    for cell in cells:
        limits.setdefault(cell.label, set()).add(cell.limit)
    found: list[Cell] = []
    for cell in cells:
        if len(limits[cell.label]) > 1:
            own = f"limit={cell.limit}"
            cell = replace(cell, label=f"{cell.label}, {own}", labels={**cell.labels, "limit": {own}})
        found.append(cell)
    return found


def check_folder(out: Path) -> None:
    """Raises where answers would be written among the files of a model."""
    for name in ("crossguard.json", "training.safetensors", "config.json", "model.safetensors"):
        if (out / name).exists():
            raise CrossguardError(f"{out} holds a model ({name}); give the answers another folder")


def _fits(cell: Cell) -> list[str]:
    """The folders of the models that are trained for a cell."""
    from crossguard.defenses.fit import Fit

    return [str(fit.folder) for fit in within(tuple(cell.words.values()), Fit)]


def _watched(models: Mapping[str, VisionLanguageModel]) -> dict[str, str]:
    """The folders of the trainings that measure themselves, by the labels of the models that they make."""
    from crossguard.defenses.fit import Fit

    return {
        label: str(model.folder)
        for label, model in models.items()
        if isinstance(model, Fit) and model.recipe.validate is not None
    }


def _told(failures: Sequence[tuple[str, str]], cells: int) -> str:
    """What could not be answered and why, each reason once."""
    reasons: dict[str, list[str]] = {}
    for label, reason in failures:
        reasons.setdefault(reason, []).append(label)
    told = [
        f"{reason} ({labels[0]}{f' and {len(labels) - 1} more' if len(labels) > 1 else ''})"
        for reason, labels in reasons.items()
    ]
    return f"{len(failures)} of {cells} cells could not be answered: {'; '.join(told)}"


def _taken(path: Path, locks: ExitStack) -> bool:
    """Takes a lock until `locks` ends, unless another process has it; whether it did."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    locks.callback(lock.release)
    return True


def answered_in(out: str | Path, cells: Iterable[Cell]) -> list[Report]:
    """The answers to these questions that are in a folder."""
    log = logging.getLogger("crossguard.experiment")
    return [report for cell in cells if (report := _answer(Path(out), cell, log)) is not None]


def _answer(out: Path, cell: Cell, log: logging.Logger) -> Report | None:
    """The answer in the folder, whatever it was called when it was asked; None if there is none or its file is
    broken."""
    for path in sorted(files_of(out, cell.key), key=lambda path: (path.name != cell.file, path.name)):
        try:
            report = Report.load(path)
        except ReportError as error:
            log.warning("%s; it is asked again", error)
            continue
        if dict(report.question) == dict(cell.question):
            return report
        log.warning("%s answers another question; it is asked again", path)
    return None


def files_of(out: Path, key: str) -> list[Path]:
    """The files that have the hash of a question in their names."""
    return [path for path in sorted(out.glob(f"*{key[:HASH]}*.json")) if not path.name.startswith(".")]


def readable(label: str) -> str:
    """The name of a file after what people call a thing: letters, digits and a few signs, which every system takes."""
    name = re.sub(r"[^\w.=+-]+", "-", label.replace("/", "_").replace(", ", "-"), flags=re.ASCII)
    return re.sub(r"-{2,}", "-", name).strip("-._")[:_LONGEST].rstrip("-._") or "cell"


def _check_names(path: Path, content: Mapping[str, Any]) -> None:
    """Refuses a misspelt name in any word of the file before anything is loaded; other mistakes are found later."""
    let, over = content.get("let", {}), content.get("sweep", {})
    named = [name for table in (let, over) if isinstance(table, dict) for name in table]
    grids = [(kind, grid.get(kind, ())) for grid in _grids(path, content) for kind in _KINDS]
    for kind, value in (("let", let), *grids, ("claims", content.get("claims", ()))):
        for text in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                try:
                    signatures.check(text if kind == "let" else expanded(kind, text, named), named)
                except CrossguardError as error:
                    raise CrossguardError(f"{path}: {kind}: {error}") from error


def _add_words(path: Path, value: object, trust: bool) -> None:
    """The files of words that an experiment names, which must be trusted or have been named by hand as well."""
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise CrossguardError(f"{path}: words must be a list of Python files in quotes, not {shortly(value)}")
    for one in listed:
        place = path.parent / Path(one).expanduser()
        if not trust and place.resolve() not in own.given():
            raise CrossguardError(
                f"{path} would run the code of {shortly(str(place))}; if you trust it, say so with --trust, or name "
                f"the file yourself: --words {place}"
            )
        try:
            own.add(place)
        except CrossguardError as error:
            raise CrossguardError(f"{path}: words: {error}") from error


_AXIS = re.compile(rf"({'|'.join(_KINDS)})=(.*)", re.DOTALL)  # of a label that two axes have


def _labels(name: str, known: Iterable[str]) -> list[str]:
    """The labels that make the name of a cell, which stand between commas and may hold some."""
    known, pieces = set(known), name.split(",")
    most = 1 + max((label.count(",") for label in known), default=0)
    found: list[str] = []
    start = 0
    while start < len(pieces):
        for end in range(min(len(pieces), start + most), start, -1):
            label = ",".join(pieces[start:end]).strip()
            if (label[match.start(2) :] if (match := _AXIS.fullmatch(label)) else label) in known or label in known:
                break
        else:
            label = pieces[start].strip()
            near = words.nearest(label, sorted(known))
            raise CrossguardError(f"there is no label {shortly(label)}{near} (in {shortly(name)})")
        found.append(label)
        start = end
    return found


def _leads(wanted: Sequence[str], labels: Mapping[str, set[str]]) -> bool:
    """Whether these labels lead to a cell, each along an axis of its own."""
    if not wanted:
        return True
    first, *others = wanted
    match = _AXIS.fullmatch(first)
    axis, label = (match[1], match[2]) if match and first not in set().union(*labels.values()) else ("", first)
    return any(
        label in held and _leads(others, {kind: one for kind, one in labels.items() if kind != own})
        for own, held in labels.items()
        if axis in ("", own)
    )


def _settings(where: str, content: Mapping[str, Any]) -> dict[str, int]:
    """The whole numbers among what a table says."""
    return {
        name: at_least(f"{where}: {name}", content[name], least) for name, least in _SETTINGS.items() if name in content
    }


def _grids(path: Path, content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the file says of each grid: of the file's own, and of each table `[[more]]`, which has the rest from
    there."""
    listed = content.get("more", [])
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise CrossguardError(f"{path}: more must be tables [[more]] of axes, not {shortly(listed)}")
    known = (*_KINDS, *_OWN)
    for name in (name for one in listed for name in one):
        if name not in known:
            raise CrossguardError(
                f"{path}: more has an unknown key {shortly(name)}{words.nearest(name, known)} "
                f"(keys: {', '.join(known)})"
            )
    return [content, *({**content, **one} for one in listed)]


def _check_labels(path: Path, grids: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """Raises where a label stands for one word in one grid and for another in the next."""
    for kind in _KINDS:
        known: dict[str, Any] = {}
        for label, word in (pair for grid in grids for pair in grid[kind].items()):
            if known.setdefault(label, word) != word:
                raise CrossguardError(
                    f"{path}: {kind} {shortly(label)} is one word in one grid and another in the next; give each a "
                    "label of its own"
                )


def _published(path: Path, value: object) -> dict[str, tuple[float, str]]:
    """What others have measured, by the labels of a cell."""
    form = 'a table of "labels of a cell" = [percent, "source"]'
    if not isinstance(value, dict):
        raise CrossguardError(f"{path}: published must be {form}, not {shortly(value)}")
    found: dict[str, tuple[float, str]] = {}
    for name, told in value.items():
        match told:
            case [int() | float() as number, str() as source] if not isinstance(number, bool) and 0 <= number <= 100:
                found[name] = float(number), source
            case _:
                raise CrossguardError(f"{path}: published must be {form}; {shortly(name)} is {shortly(told)}")
    return found


def _claims(path: Path, value: object, known: Mapping[str, Any]) -> dict[str, Claim]:
    """The claims by their names."""
    from crossguard.claims import Claim

    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        form = "a table of name = word, such as \"Above('TeCoA', 'base')\""
        raise CrossguardError(f"{path}: claims must be {form}")
    found: dict[str, Claim] = {}
    for name, text in value.items():
        try:
            claim = words.build(text, known)
            if not isinstance(claim, Claim):
                raise CrossguardError(f"{words.quoted(claim)} is not a claim; give one such as Above('TeCoA', 'base')")
            found[name] = claim
        except CrossguardError as error:
            raise CrossguardError(f"{path}: claims: {name}: {error}") from error
    return found


def _sweep(path: Path, value: object) -> Sweep | None:
    """The number that runs through values, if there is one."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) != 1:
        raise CrossguardError(f"{path}: sweep must be a table of one name and its values, such as alpha = '0:1:0.125'")
    ((name, values),) = value.items()
    try:
        return Sweep.read(name, values)
    except CrossguardError as error:
        raise CrossguardError(f"{path}: {error}") from error


def swept(source: str, sweep: Sweep | None) -> Sweep | None:
    """The sweep; raises where no word of the grid has its name in it."""
    if sweep is not None and not any(sweep.points.values()):
        raise CrossguardError(f"{source}: nothing depends on {sweep.name}, which is to run through values")
    return sweep


def _let(path: Path, value: object, sweep: Sweep | None) -> Names:
    """The words that the file gives names to; each may use those before it."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CrossguardError(f"{path}: let must be a table of name = word")
    found: list[dict[str, Any]] = []
    depends: list[str] = []
    for number in (None,) if sweep is None else sweep.values:
        named: dict[str, Any] = {} if sweep is None else {sweep.name: number}
        for name, text in value.items():
            if not name.isidentifier() or name in words.names() or (sweep is not None and name == sweep.name):
                raise CrossguardError(f"{path}: let cannot name a word {shortly(name)}; take a name that is not taken")
            if sweep is not None and sweep.mentions(text, depends):
                depends.append(name)
            try:
                named[name] = words.build(text, named)
            except CrossguardError as error:
                raise CrossguardError(f"{path}: let {name}: {error}") from error
        found.append(named)
    return Names(found, depends)


def _axis(path: Path, kind: str, value: object, known: Names, sweep: Sweep | None) -> dict[str, Any]:
    """The words of one key by label."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        texts: list[tuple[str | None, object]] = [(None, text) for text in value]
    elif isinstance(value, dict):
        texts = list(value.items())
    else:
        raise CrossguardError(
            f"{path}: {kind} must be a list of words or a table of label = word, not {shortly(value)}"
        )
    if not texts:
        raise CrossguardError(f"{path}: {kind} is empty; give one word at least")
    axis: dict[str, Any] = {}
    for label, text in texts:
        if not isinstance(text, str):
            raise CrossguardError(
                f"{path}: {kind} holds {shortly(text)}; give a word in quotes such as 'PGD(steps=10)'"
            )
        try:
            found = laid_out(kind, label, text, known, sweep)
        except CrossguardError as error:
            raise CrossguardError(f"{path}: {kind}: {error}") from error
        for name, word in found.items():
            if axis.setdefault(name, word) != word:
                raise CrossguardError(
                    f"{path}: {kind}: two words are called {shortly(name)}; name one of them otherwise"
                )
    return axis


def _text(path: Path, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise CrossguardError(f"{path}: {name} must be a text in quotes, not {shortly(value)}")
    return value


@contextmanager
def _logging(path: Path) -> Iterator[logging.Logger]:
    """A logger that appends to a file while the run lasts."""
    log = logging.getLogger("crossguard.experiment")
    handler = files.LogFile(path)
    handler.setFormatter(LogFormatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield log
    except Exception as error:
        if not isinstance(error, CrossguardError):
            log.exception("the run stopped")
        raise
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate
        handler.close()
