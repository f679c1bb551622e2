"""A grid of words in a TOML file.

Each answer is a file named by the hash of its question, so that what was answered is not asked again: to
resume is to run again, and two processes on one folder share the grid.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crossguard import files, signatures, words
from crossguard.errors import CrossguardError
from crossguard.report import Report, ReportError, key

INDEX = "experiment.json"  # beside the answers: which label stands for which word
POLL = 1.0  # seconds between looks at a cell that another process is working on

_KINDS = {
    "task": "Task",
    "model": "VisionLanguageModel",
    "attack": "Attack",
    "budget": "Budget",
    "surrogate": "VisionLanguageModel",
}
_OPTIONAL = ("attack", "budget", "surrogate")  # may be None: a clean evaluation, no budget, a white box
_SETTINGS = {"seed": 0, "limit": 1, "batch": 1}  # whole numbers and the least that they may be


def read(kind: str, text: str, known: Mapping[str, Any] | None = None) -> Any:
    """The object that a text names, which must be a task, model, attack, budget or surrogate, as `kind` says.

    Raises:
        CrossguardError: the text is not a word, or names something of another kind.
    """
    import crossguard

    value = words.build(text, known)
    if value is None and kind in _OPTIONAL:
        return None
    wanted = getattr(crossguard, _KINDS.get(kind, kind))
    if not isinstance(value, wanted):
        article = "an" if kind[0] in "aeiou" else "a"
        raise CrossguardError(
            f"{words.show(value, short=True)} is not {article} {kind.lower()}; see the list of 'crossguard words'"
        )
    return value


@dataclass(frozen=True)
class Cell:
    """One question of the grid, with the objects that answer it."""

    label: str
    question: Mapping[str, str]
    words: Mapping[str, Any]

    @property
    def key(self) -> str:
        return key(self.question)

    @cached_property
    def craft(self) -> str:
        """The same for cells that share what is crafted on a surrogate; else like no other."""
        from crossguard.evaluate import craft_key

        alone = self.words["attack"] is None or self.words["surrogate"] is None
        return self.key if alone else craft_key(self.question)


class Watch:
    """What is told how a run gets on; this one listens to nothing."""

    def start(self, cells: int, answered: int) -> None:
        """The run starts: so many cells, some of them answered already."""

    def asks(self, cell: Cell) -> None:
        """A cell is being worked on."""

    def progress(self, done: int, total: int) -> None:
        """So many samples of the cell are done."""

    def answers(self, cell: Cell, report: Report) -> None:
        """A cell is answered, here or by another process."""

    def fails(self, cell: Cell, error: CrossguardError) -> None:
        """A cell cannot be answered; the others go on."""

    def waits(self, cells: int) -> None:
        """Only cells that other processes work on are left."""


@dataclass(frozen=True)
class Experiment:
    """The product of tasks, models, attacks, budgets and surrogates, asked one by one.

    Args:
        grid: for each part of a question its words by label.
        seed: of all noise.
        limit: how many samples of each task; all, if None.
        batch: samples at once; results do not depend on it.
        source: where the grid comes from, for messages.
    """

    grid: Mapping[str, Mapping[str, Any]]
    seed: int = 0
    limit: int | None = None
    batch: int = 128
    source: str = "the experiment"

    @staticmethod
    def load(path: str | Path) -> Experiment:
        """Reads a TOML file: task, model, attack, budget and surrogate, each a word, a list of words or a
        table of label = word; and seed, limit, batch. Task and model must be there. A table `let` may give
        names to words, which the words after it may use."""
        path = Path(path)
        try:
            content = tomllib.loads(path.read_bytes().decode())
        except FileNotFoundError:
            raise CrossguardError(f"there is no experiment file {path}") from None
        except OSError as error:
            raise CrossguardError(f"{path} cannot be read: {files.reason(error)}") from None
        except UnicodeDecodeError:
            raise CrossguardError(f"{path} is not a text file in UTF-8") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise CrossguardError(f"{path} is not valid TOML: {error}") from None
        known = ("let", *_KINDS, *_SETTINGS)
        for name in content:
            if name not in known:
                near = words.nearest(name, known)
                raise CrossguardError(f"{path}: unknown key {name!r}{near} (keys: {', '.join(known)})")
        for name in ("task", "model"):
            if name not in content:
                raise CrossguardError(f"{path}: the key {name!r} is missing; give it a list of words")
        _check_names(path, content)
        settings = {
            name: _number(path, name, content[name], least) for name, least in _SETTINGS.items() if name in content
        }
        named = _let(path, content.get("let", {}))
        return Experiment(
            grid={kind: _axis(path, kind, content.get(kind, "None"), named) for kind in _KINDS},
            seed=settings.get("seed", 0),
            limit=settings.get("limit"),
            batch=settings.get("batch", 128),
            source=str(path),
        )

    def cells(self) -> list[Cell]:
        """Every question once: cells that differ only in what does not matter to them are one (a clean
        evaluation has no budget)."""
        from crossguard.evaluate import question

        found: dict[str, Cell] = {}
        attacks = any(attack is not None for attack in self.grid["attack"].values())
        for labels in itertools.product(*(self.grid[kind] for kind in _KINDS)):
            chosen = {kind: self.grid[kind][label] for kind, label in zip(_KINDS, labels, strict=True)}
            label = ", ".join(label for label in labels if label != "None")
            varying = [one for kind, one in zip(_KINDS, labels, strict=True) if len(self.grid[kind]) > 1]
            try:
                if chosen["attack"] is None and attacks:  # the clean cell of attacks with budgets and surrogates
                    chosen |= {"budget": None, "surrogate": None}
                asked = question(
                    chosen["task"], chosen["model"], chosen["attack"], chosen["budget"], chosen["surrogate"],
                    self.limit, self.seed,
                )  # fmt: skip
            except CrossguardError as error:
                raise CrossguardError(f"{self.source}: in the cell ({label}): {error}") from error
            cell = Cell(", ".join(varying) or label, asked, chosen)
            found.setdefault(cell.key, cell)
        return list(found.values())

    def run(self, out: str | Path, watch: Watch | None = None) -> list[Report]:
        """Answers every question that has no answer in the folder yet; returns all, in the grid's order.

        A cell that cannot be answered does not stop the others; what went wrong is raised at the end.
        """
        out, watch = Path(out), watch or Watch()
        cells = self.cells()
        files.check_writable(out / ".locks")
        files.write(out / INDEX, json.dumps(self._index(cells), indent=2) + "\n")
        reports: dict[str, Report] = {}
        failures: list[tuple[Cell, CrossguardError]] = []
        with _logging(out / "log.txt") as log:
            waiting = []
            for cell in cells:
                answer = _answer(out, cell, log)
                if answer is None:
                    waiting.append(cell)
                else:
                    reports[cell.key] = answer
            log.info("%s: %d cells, %d answered", self.source, len(cells), len(reports))
            watch.start(len(cells), len(reports))
            # Cells that share what is crafted on a surrogate come one after the other; behind the last it is dropped.
            sharing = Counter(cell.craft for cell in waiting)
            order = {craft: place for place, craft in enumerate(sharing)}
            waiting.sort(key=lambda cell: order[cell.craft])
            for stale in (out / ".crafts").glob("*"):  # of a run that was killed behind its last answer
                if stale.name not in sharing:
                    shutil.rmtree(stale, ignore_errors=True)
            while waiting:
                busy: list[Cell] = []
                for cell in waiting:
                    lock = FileLock(out / ".locks" / cell.key)
                    crafting = any(cell.craft == other.craft for other in busy)  # another process
                    if crafting or not _acquired(lock):
                        busy.append(cell)
                        continue
                    crafts = out / ".crafts" / cell.craft
                    try:
                        watch.asks(cell)
                        shared = crafts.parent if sharing[cell.craft] > 1 or crafts.exists() else None
                        report = _answer(out, cell, log) or self._ask(out, cell, log, watch.progress, shared)
                    except files.WriteError:
                        raise
                    except CrossguardError as error:
                        log.error("%s: %s", cell.label, error)
                        watch.fails(cell, error)
                        failures.append((cell, error))
                    else:
                        reports[cell.key] = report
                        watch.answers(cell, report)
                    finally:
                        lock.release()
                    sharing[cell.craft] -= 1
                    if not sharing[cell.craft]:
                        shutil.rmtree(crafts, ignore_errors=True)
                if len(busy) == len(waiting):
                    watch.waits(len(busy))
                    time.sleep(POLL)
                waiting = busy
        if failures:
            cell, error = failures[0]
            count = f"{len(failures)} of {len(cells)} cells" if len(failures) > 1 else f"the cell ({cell.label})"
            first = f" (first: {cell.label})" if len(failures) > 1 else ""
            raise CrossguardError(f"{self.source}: {count} could not be answered{first}: {error}")
        return [reports[cell.key] for cell in cells]

    def _ask(
        self, out: Path, cell: Cell, log: logging.Logger, progress: Callable[[int, int], None], crafts: Path | None
    ) -> Report:
        from crossguard.evaluate import evaluate

        log.info("asking %s (%s)", cell.label, cell.key)
        chosen = cell.words
        report = evaluate(
            chosen["task"], chosen["model"], chosen["attack"], chosen["budget"], chosen["surrogate"],
            limit=self.limit, seed=self.seed, batch=self.batch, progress=progress,
            processes=False, crafts=crafts, out=out / f"{cell.key}.json", overwrite=True,
        )  # fmt: skip
        log.info("%s: %s, %.1f s", cell.label, report.headline, report.seconds)
        for note in report.notes:
            log.warning("%s: %s", cell.label, note)
        return report

    def _index(self, cells: list[Cell]) -> dict[str, Any]:
        """What the table needs to print labels: label -> word, as reports spell it."""
        axes = {kind: {label: words.show(word) for label, word in axis.items()} for kind, axis in self.grid.items()}
        return {"source": self.source, "labels": axes, "cells": [cell.key for cell in cells]}


def _acquired(lock: FileLock) -> bool:
    """Takes the lock, unless another process has it; whether it did."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _answer(out: Path, cell: Cell, log: logging.Logger) -> Report | None:
    """The answer in the folder; None if there is none or its file is broken."""
    path = out / f"{cell.key}.json"
    if not path.exists():
        return None
    try:
        report = Report.load(path)
    except ReportError as error:
        log.warning("%s; it is asked again", error)
        return None
    if dict(report.question) != dict(cell.question):
        log.warning("%s answers another question; it is asked again", path)
        return None
    return report


def _check_names(path: Path, content: Mapping[str, Any]) -> None:
    """Refuses a misspelt name in any word of the file before anything is loaded; other mistakes are found later."""
    let = content.get("let", {})
    named = list(let) if isinstance(let, dict) else []
    for kind in ("let", *_KINDS):
        value = content.get(kind, ())
        for text in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                try:
                    signatures.check(text, named)
                except CrossguardError as error:
                    raise CrossguardError(f"{path}: {kind}: {error}") from error


def _let(path: Path, value: object) -> dict[str, Any]:
    """The words that the file gives names to; each may use those before it."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CrossguardError(f"{path}: let must be a table of name = word")
    named: dict[str, Any] = {}
    for name, text in value.items():
        if not name.isidentifier() or name in words.names():
            raise CrossguardError(f"{path}: let cannot name a word {name!r}; take a name that is not taken")
        try:
            named[name] = words.build(text, named)
        except CrossguardError as error:
            raise CrossguardError(f"{path}: let {name}: {error}") from error
    return named


def _axis(path: Path, kind: str, value: object, known: Mapping[str, Any]) -> dict[str, Any]:
    """The words of one key by label."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        texts: list[tuple[str | None, object]] = [(None, text) for text in value]
    elif isinstance(value, dict):
        texts = list(value.items())
    else:
        raise CrossguardError(f"{path}: {kind} must be a list of words or a table of label = word, not {value!r}")
    if not texts:
        raise CrossguardError(f"{path}: {kind} is empty; give one word at least")
    axis: dict[str, Any] = {}
    for label, text in texts:
        if not isinstance(text, str):
            raise CrossguardError(f"{path}: {kind} holds {text!r}; give a word in quotes such as 'PGD(steps=10)'")
        try:
            word = read(kind, text, known)
        except CrossguardError as error:
            raise CrossguardError(f"{path}: {kind}: {error}") from error
        axis.setdefault(words.show(word, short=True) if label is None else label, word)
    return axis


def _number(path: Path, name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= words.LARGEST:
        most = f" and at most {words.LARGEST}" if isinstance(value, int) and value > words.LARGEST else ""
        raise CrossguardError(f"{path}: {name} must be a whole number of at least {least}{most}, not {value!r}")
    return value


@contextmanager
def _logging(path: Path) -> Iterator[logging.Logger]:
    """A logger that appends to a file while the run lasts."""
    log = logging.getLogger("crossguard.experiment")
    try:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CrossguardError(f"{path} cannot be written: {files.reason(error)}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
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
