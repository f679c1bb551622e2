"""What happens around the steps of a training: its folder, its doubts, saving and resuming, the log, the result.

All randomness is a function of (seed, step, sample), nothing is drawn from a global generator, so a run that is killed
and started again ends in the same weights, and so does the same run on several processes, up to the order of sums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks.candidates import doubts
from crossguard.checkpoints import check_finite
from crossguard.data import Dataset
from crossguard.defenses.card import Trained, card
from crossguard.defenses.feed import Feed
from crossguard.defenses.plan import Plan
from crossguard.defenses.step import Learner
from crossguard.defenses.terms import IMAGE, STUDENT, TEXT
from crossguard.defenses.validation import ROBUST, draw
from crossguard.device import chosen, exact
from crossguard.errors import CrossguardError
from crossguard.files import LOCK, LogFile, WriteError, hashed, reason, save_tensors, tidy, write
from crossguard.limits import whole
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel, asked_of
from crossguard.models.prompted import ClassFramedEncoder, ContextEncoder, prompts
from crossguard.models.wrapper import Wrapper
from crossguard.opening import opening
from crossguard.printing import LogFormatter, lasting, say
from crossguard.processes import Processes
from crossguard.reading import parse_json, read_json
from crossguard.seeds import drawing, keys
from crossguard.telling import heard, tell
from crossguard.turns import Note, owned
from crossguard.words import contents, show

_STATE, _RECORD, _PICTURE = "training.safetensors", "crossguard.json", "validation.png"
_ALIKE = 64  # captions that are compared with each other before the first step
EVERY = 60.0  # seconds between lines about progress where there is no terminal
_FLUSHED = 20.0  # seconds after which TensorBoard's file is brought up to date
_SHARE_OF_SAVING = 20  # a save may take one part in so many of the time


def train(recipe: Plan, model: Checkpoint, data: Dataset, folder: Path, group: Processes) -> Checkpoint:
    """The checkpoint of this training in the folder: found finished, gone on with, or trained from the start."""
    # A `Fit` may be asked for in the middle of an evaluation, where gradients are off.
    with ExitStack() as held, torch.enable_grad(), exact():
        question, finished, mine = {}, False, None
        with group.together():
            if group.first:  # the others wait here, for it holds the lock
                mine = held.enter_context(_owned(folder))
                question = asked(recipe, model, data)
                finished = _finished(folder, question)
        question, finished = group.tell((question, finished))
        if not finished:
            with group.together():
                held.enter_context(opening())  # the teachers, which are words
                run = Run(recipe, model, data, folder, question, group)
            run.train(mine)
    return recipe.trains.word(model, folder)


def asked(recipe: Plan, model: Checkpoint, data: Dataset) -> dict[str, str]:
    """What decides the result: the words, and what the files behind them hold."""
    held = contents((recipe, model, data))
    return {"recipe": show(recipe), "model": show(model), "data": show(data)} | ({"contents": held} if held else {})


class Run:
    """One training run; everything that changes while it trains is here."""

    def __init__(
        self,
        recipe: Plan,
        model: Checkpoint,
        data: Dataset,
        folder: Path,
        question: dict[str, str],
        group: Processes,
    ) -> None:
        self.recipe, self.model, self.data, self.folder = recipe, model, data, folder
        self.question, self.group = question, group
        self.feeds = _feeds(recipe, data, group, chosen().device)
        self.learner = Learner(recipe, model, self.feeds, group)
        self.notes = self._doubts() if group.first else []
        self.seconds, self.loss = 0.0, 0.0
        self.history: list[dict[str, float]] = []  # what was measured at the end of each epoch
        self.place = _identity(folder)

    @property
    def feed(self) -> Feed:
        """What the recipe is fitted on."""
        return self.feeds[""]

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.learner.total

    def train(self, mine: Note | None = None) -> None:
        """Takes the steps that are left.

        Args:
            mine: the note of this process, which says to others how far it is.
        """
        group, main = self.group, self.group.first
        with group.together():
            start = self._restore()
            log = _logger(self.folder) if main else logging.getLogger("crossguard.silent")
        log.info(
            "%d steps, %s: %s",
            self.total,
            f"continuing at step {start}" if start else "from the start",
            self.question,
        )
        for note in self.notes:
            self._note(log, note)
        with (
            ExitStack() as feeds,
            _held_back() as signals,
            _progress(main, self.total, start, mine) as shown,
            _board(self.folder, main, start) as board,
        ):
            for feed in self.feeds.values():
                feeds.enter_context(closing(feed))
            taken = self._steps(start, signals, log, shown, board)
            if taken == self.total:
                with group.together():
                    if main:
                        self._finish(log, start)
        if taken < self.total:
            if main:
                self._note(log, f"stopped after step {taken} of {self.total}; the same training goes on from there")
            _let_go(signals)
            raise KeyboardInterrupt
        _let_go(signals)

    def _steps(self, start: int, signals: list[int], log: logging.Logger, shown: Any, board: Any) -> int:
        """Takes the steps from `start` on, and saves in between; the number of those taken in all. Where a signal has
        arrived at one process, all save and stop."""
        group, main = self.group, self.group.first
        began = saved = time.monotonic()
        before, cost = self.seconds, 0.0
        for step in range(start, self.total):
            now = time.monotonic()
            self.seconds = before + now - began
            due = now - saved >= max(self.recipe.save_every, _SHARE_OF_SAVING * cost)
            gone = main and _identity(self.folder) != self.place
            wishes = group.gather((bool(signals), due, gone))
            if wishes[0][2]:  # saving would make another folder
                raise WriteError(f"{self.folder} was removed while its training ran")
            stopped = any(wish for wish, *_ in wishes)
            if step > start and (stopped or wishes[0][1]):  # the first one's watch counts
                with group.together():
                    if main:
                        self.save(step)
                saved = time.monotonic()
                cost = saved - now
            if stopped:
                return step
            values = self.learner.take(step)
            self.loss = values["loss"]
            measured = self._validated(step)
            if not main:
                continue
            for name, value in values.items():
                board.add_scalar(name, value, step + 1)
            shown(step + 1, values)
            if (step + 1) % 20 == 0 or step + 1 == self.total:
                text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                log.info("step %d/%d: %s", step + 1, self.total, text)
            if measured:
                for name, value in measured.items():
                    board.add_scalar(f"validation {name}", value, step + 1)
                text = ", ".join(f"{name} {value:.2%}" for name, value in measured.items())
                log.info("validation after step %d/%d: %s", step + 1, self.total, text)
                draw(self.history, self.folder / _PICTURE)
        self.seconds = before + time.monotonic() - began
        return self.total

    def _validated(self, step: int) -> dict[str, float]:
        """The accuracies behind this step, where an epoch ends with it and they are asked for."""
        recipe, learner = self.recipe, self.learner
        if recipe.validate is None or not learner.ends_epoch(step):
            return {}
        number = learner.place(step)[0]
        last = number + 1 == len(learner.stages)
        with learner.handing() as network:
            measured = recipe.validate.measure(network, self.feed.device, recipe.seed, self.group)
            before = [one[ROBUST] for one in self.history if last and one["step"] > learner.first(number)]
            if recipe.best and last and measured[ROBUST] > max(before, default=-1.0):
                learner.keep()
        self.history.append({"step": step + 1.0, **measured})
        if step + 1 == self.total and learner.best is not None:
            learner.put(learner.best)
        return measured

    def _note(self, log: logging.Logger, note: str) -> None:
        log.warning("%s", note)
        say(note)

    def _doubts(self) -> list[str]:
        """What is to be feared of the result, each a sentence with its remedy.

        Raises:
            CrossguardError: nothing can be learned.
        """
        network = self.learner.network
        if self.recipe.validate is not None:
            self.recipe.validate.check()
        strings, classes = self.feed.strings(), self.feed.prompts
        kind, some = ("captions", strings[:_ALIKE]) if classes is None else ("class prompts", self.feed.classes)
        if not _reads(network, some):
            raise CrossguardError(
                f"{show(self.model, short=True)} has one embedding for all {kind}, such as {some[0]!r} and "
                f"{some[-1]!r}: it does not read them; give a base whose tokenizer knows their words"
            )
        notes = []
        for number, stage in enumerate(self.learner.stages):
            length = self.learner.length(number)
            if stage.warmup >= length:
                of = f"stage {number + 1} of " if len(self.learner.stages) > 1 else ""
                reached = stage.optimizer.lr * length / stage.warmup
                notes.append(
                    f"the warm-up of {stage.warmup} steps is no shorter than {of}the training of {length}: the "
                    f"learning rate rises to {reached:g} of {stage.optimizer.lr:g} at the last step and never stays or "
                    f"falls; give a shorter one, such as warmup={max(1, length // 10)}, or more steps"
                )
        if cut := network.cut(strings):
            notes.append(
                f"{cut} of {len(strings)} {kind} ({cut / len(strings):.0%}) are longer than "
                f"{show(self.model, short=True)} reads, and their ends are not seen; give shorter ones, or a base "
                "whose tokenizer knows their words, such as Fresh(tokenizer=...)"
            )
        notes += [*self.recipe.trains.doubts(network), *self._unseen()]
        for name, teacher in self.learner.teachers.items():
            if isinstance(teacher, VisionLanguageModel):
                self._check_teacher(name, teacher, some)
            if isinstance(teacher, Wrapper):
                notes += self._unheard(name, teacher)
        if not self.learner.counts():
            raise CrossguardError(
                f"{type(self.recipe).__name__} would learn nothing: by its threshold, none of the images of "
                f"{show(self.feed.data, short=True)} counts, since the teacher is not sure enough of any; lower the "
                "threshold, or begin with a model that knows these images better"
            )
        if self.learner.idle(0):
            notes.append(
                "the text attack changes none of the texts of step 1, so they may train as if nobody attacked them; "
                "see 'texts changed' in the log"
            )
        attacks = {one.attack: None for stage in self.learner.stages for one in stage.adversaries}
        return [*notes, *(doubt for attack in attacks for doubt in doubts(attack, strings))]

    def _unseen(self) -> list[str]:
        """Of the towers whose weights are to be trained, those that no loss sees anything of. What prompts have learned
        is left out: it may reach the other tower."""
        towers = {need.tower for stage in self.learner.stages for need in stage.needs if need.who == STUDENT}
        seen, notes = {TEXT if tower == TEXT else IMAGE for tower in towers}, list[str]()
        for tower, named in self.learner.network.towers().items():
            lost = sum(one.numel() for name, one in named.items() if one.requires_grad and name[:6] != "prompt")
            if tower in (IMAGE, TEXT) and tower not in seen and lost:
                notes.append(
                    f"no loss of {type(self.recipe).__name__} sees {tower}s as the trained model embeds them, so its "
                    f"{tower} tower stays as it is, though trains={show(self.recipe.trains, short=True)} names "
                    f"{lost:,} numbers of it; train the other tower alone, or with a recipe that sees both"
                )
        return notes

    def _check_teacher(self, name: str, teacher: VisionLanguageModel, some: Sequence[str]) -> None:
        """Raises where a teacher cannot be asked about these classes."""
        whose = f"the teacher {name!r}"
        for word in asked_of(teacher):
            for part in prompts(word.network):
                if isinstance(part, ContextEncoder | ClassFramedEncoder) and self.feed.prompts is not None:
                    check_class_lists(self.feed.prompts.names, part.place.names, whose)
        if not _reads(teacher, some):
            raise CrossguardError(
                f"{whose}, {show(teacher, short=True)}, has one embedding for all of these texts, such as {some[0]!r} "
                f"and {some[-1]!r}: it does not read them; give another teacher"
            )

    def _unheard(self, name: str, teacher: Wrapper) -> list[str]:
        """Of a defended teacher, that its answers are not those of its embeddings, which are all that is asked for.

        Raises:
            CrossguardError: It gives no embedding without classes.
        """
        whose, feed = f"the teacher {name!r}, {show(teacher, short=True)},", self.feed
        first = feed.samples(0)[:1]
        images, noise = feed.pictures(first), keys((feed.data.id(index) for index in first), self.recipe.seed)
        with torch.no_grad():
            try:
                with drawing(noise):
                    teacher.encode_image(images)
            except CrossguardError as error:
                raise CrossguardError(f"{whose} is asked for embeddings without classes: {error}") from error
            asked = [need for stage in self.learner.stages for need in stage.everything if need.who == name]
            if feed.prompts is None or all(need.tower != TEXT for need in asked):
                return []
            answer = teacher.answer(feed.prompts)
            assert answer.texts is not None
            with drawing(noise):
                said = answer.hard(images)
                told = teacher.logits(said.embeddings, answer.texts)
                if torch.allclose(said.logits, told, rtol=1e-3, atol=1e-2):
                    return []
        return [
            f"{whose} answers by more than its embeddings, as by a vote or changed logits, and a training asks for the "
            "embeddings alone, so it teaches something else than it answers; give a defense that changes pixels or "
            "embeddings, or the model inside of it"
        ]

    # State on disk

    def save(self, step: int) -> None:
        """Writes what the run needs to go on after that many steps."""
        tensors = self.learner.state()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        shared = set[int]()
        for name, tensor in tensors.items():  # safetensors writes no memory twice
            if tensor.data_ptr() in shared:
                tensors[name] = tensor.clone()
            shared.add(tensor.data_ptr())
        meta = {
            "step": str(step),
            "seconds": str(self.seconds),
            "loss": repr(self.loss),
            "question": json.dumps(self.question, sort_keys=True),
            "notes": json.dumps(self.notes),
            "validation": json.dumps(self.history),
        }
        save_tensors(self.folder / _STATE, tensors, meta)

    def _made(self) -> Trained:
        last = self.learner.first(len(self.learner.stages) - 1)
        return Trained(
            self.recipe, self.model, self.data, self.folder, self.question.get("contents", ""), self.total,
            last, self.feed.size, self.seconds, self.notes, self.history,
        )  # fmt: skip

    def _restore(self) -> int:
        """Goes back to where the folder's run last saved; the number of steps that were taken."""
        path = self.folder / _STATE
        if not path.exists():
            return 0
        meta, tensors = _read_state(path, self.feed.device)
        try:
            question = parse_json(meta["question"], dict[str, str], "its question", "")
            noted = parse_json(meta.get("notes", "[]"), list[str], "its notes", "")
            history = parse_json(meta.get("validation", "[]"), list[dict[str, float]], "its validation", "")
            step, seconds, loss = whole(meta["step"]), float(meta["seconds"]), float(meta.get("loss", "0.0"))
            if step is None or not 0 <= step <= self.total:
                raise ValueError(f"it was saved after step {meta['step'][:20]!r} of {self.total}")
        except (KeyError, ValueError) as error:
            raise _damaged(path, error) from error
        if question != self.question:
            raise CrossguardError(_other_run(self.folder))
        try:
            self.learner.restore(step, tensors)
        except (RuntimeError, ValueError, KeyError) as error:
            raise _damaged(path, error) from error
        self.seconds, self.loss, self.history = seconds, loss, history
        self.notes = list(dict.fromkeys([*self.notes, *noted]))
        return step

    def _finish(self, log: logging.Logger, start: int) -> None:
        """Writes the result. The state after the last step is saved before, so that whatever happens meanwhile, no step
        need be taken again."""
        network, full = self.learner.network, None
        check_finite(network, "the trained model")
        if start < self.total:
            try:
                self.save(self.total)
            except WriteError as error:  # the model is a third of the state, and there may be room for it
                full = error
        try:
            self.recipe.trains.save(network, self.folder)
        except WriteError as error:
            raise full or error from error
        write(self.folder / "README.md", card(self._made()))
        record = {
            **self.question,
            "steps": self.total,
            "seconds": round(self.seconds, 1),
            "loss": self.loss,
            "processes": self.group.world,
            "notes": self.notes,
            "validation": self.history,
            "versions": _versions(),
            "weights": {
                file.name: {"bytes": file.stat().st_size, "sha256": hashed(file)} for file in written(self.folder)
            },
        }
        # Written last: this file says that everything else is there.
        write(self.folder / _RECORD, json.dumps(record, indent=1))
        _clean(self.folder)
        log.info("finished after %.1f seconds", self.seconds)


def _feeds(recipe: Plan, data: Dataset, group: Processes, device: torch.device) -> dict[str, Feed]:
    """What the batches come from. Only the first one has texts and labels; all are about the same classes.

    Raises:
        CrossguardError: their classes are others.
    """
    stages, found = recipe.stages(), dict(recipe.feeds(data))
    overs = {need.over for stage in stages for need in stage.everything if need.tower == TEXT}
    labelled = any(stage.labelled for stage in stages)
    for name, other in found.items():
        check_class_lists(found[""].names, other.names, f"the data {name!r}")
    main = Feed(recipe, found.pop(""), group, device, overs, labelled)
    return {"": main} | {name: Feed(recipe, other, group, device, name=name) for name, other in found.items()}


def check_class_lists(mine: Sequence[str], theirs: Sequence[str], whose: str) -> None:
    """Raises where two that must tell the same classes apart have others; who has none can be asked about any."""
    if not mine or not theirs or tuple(mine) == tuple(theirs):
        return
    if len(mine) != len(theirs):
        raise CrossguardError(
            f"the training is about {len(mine)} classes, and {whose} about {len(theirs)}; give the same classes in the "
            "same order"
        )
    place = next(place for place, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other)
    raise CrossguardError(
        f"class {place} of the training is {mine[place]!r}, and that of {whose} is {theirs[place]!r}; give the same "
        "classes in the same order"
    )


def _reads(model: DualEncoder | VisionLanguageModel, texts: Sequence[str]) -> bool:
    """Whether a model tells any of these texts apart, where they are not all the same."""
    if len(set(texts)) < 2:
        return True
    with torch.no_grad():
        embeddings = F.normalize(model.encode_text(texts).float(), dim=1)
    return not float((embeddings - embeddings[0]).abs().max()) < 1e-6


def _finished(folder: Path, question: dict[str, str]) -> bool:
    """Whether the folder holds this training, finished. A run of the same words on other files is put aside.

    Raises:
        CrossguardError: it holds something else.
    """
    before, finished = _run_in(folder)
    if before is None:
        if (folder / "experiment.json").exists():
            raise CrossguardError(f"{folder} holds the answers of an experiment; train into another folder")
        if any(folder.glob("*.safetensors")) and not (folder / "log.txt").exists():
            raise CrossguardError(
                f"{folder} holds a model that was not trained there; give another folder, so that it is not lost"
            )
        return False
    if any(before.get(name) != question[name] for name in ("recipe", "model", "data")):
        raise CrossguardError(_other_run(folder))
    old, new = before.get("contents", ""), question.get("contents", "")
    if old == new:
        return finished and _is_whole(folder)
    # Where the same files lie behind other words, all of them have changed.
    changed = set(old.split()) ^ set(new.split()) or {*old.split()}
    names = sorted({part.partition(":")[0] for part in changed})
    aside = _put_aside(folder, before)
    say(
        f"what {' and '.join(names)} reads has changed since the training in {folder}; that one is now in {aside}, and "
        "training starts anew"
    )
    return False


def _run_in(folder: Path) -> tuple[dict[str, str] | None, bool]:
    """The question of the run that the folder holds, and whether it is finished."""
    if (folder / _RECORD).exists():
        record = _record(folder)
        contents = {"contents": record["contents"]} if "contents" in record else {}
        return {"recipe": record["recipe"], "model": record["model"], "data": record["data"]} | contents, True
    path = folder / _STATE
    if not path.exists():
        return None, False
    try:
        return parse_json(_read_meta(path)["question"], dict[str, str], "its question", ""), False
    except (KeyError, CrossguardError) as error:
        raise _damaged(path, error) from error


class _Weights(TypedDict):
    bytes: int
    sha256: str


class _Since(TypedDict, total=False):
    contents: str
    weights: dict[str, _Weights]


class _Record(_Since):
    """What is read of the record of a finished run."""

    recipe: str
    model: str
    data: str


def _record(folder: Path) -> _Record:
    return read_json(folder / _RECORD, _Record, "delete the folder to train again")


def written(folder: Path) -> list[Path]:
    """The files of what a training has learned: of a checkpoint, or of a part."""
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name != _STATE]


def _is_whole(folder: Path) -> bool:
    """Whether the weights of a finished training are those that it wrote; what it needed to get there is removed then.
    Where the weights are others, but the state of the training is there still, they are made again from it.

    Raises:
        CrossguardError: the weights are others, and the training is gone.
    """
    path = folder / _RECORD
    told = {name: (one["bytes"], one["sha256"]) for name, one in _record(folder).get("weights", {}).items()}
    found = {file.name: file for file in written(folder)}
    wrong: list[str] = []
    for name in sorted(told.keys() | found.keys()):
        file = found.get(name)
        size = 0 if file is None else file.stat().st_size
        if file is None:
            wrong.append(f"{name} is missing")
        elif size == 0:
            wrong.append(f"{name} is empty")
        elif name in told and told[name] != (size, hashed(file)):
            wrong.append(f"{name} is another file")
    if found and not wrong:
        _clean(folder)
        return True
    wrong = wrong or ["there are none"]
    if not (folder / _STATE).exists():
        raise CrossguardError(
            f"the weights in {folder} are not those that its training wrote ({wrong[0]}); put them back, or delete the "
            "folder to train again"
        )
    say(f"the weights in {folder} are not those that its training wrote ({wrong[0]}); they are made again")
    try:
        path.unlink()
    except OSError as error:
        raise WriteError(f"{path} cannot be replaced: {reason(error)}") from error
    return False


def _clean(folder: Path) -> None:
    """Removes what a finished training needs no more."""
    try:
        (folder / _STATE).unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{folder / _STATE} cannot be removed: {reason(error)}") from error
    tidy(folder)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of its name; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _put_aside(folder: Path, question: dict[str, str]) -> Path:
    """Moves what is in the folder, but for its lock, into a new one beside it."""
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:8]
    whole = folder.resolve()
    aside = whole.with_name(f"{whole.name}.old-{digest}")
    number = 1
    while aside.exists():
        number += 1
        aside = whole.with_name(f"{whole.name}.old-{digest}-{number}")
    try:
        aside.mkdir()
        for path in sorted(whole.iterdir()):
            if not path.name.startswith(LOCK):
                path.rename(aside / path.name)
    except OSError as error:
        raise WriteError(f"{folder} holds a run on other files, and cannot be moved aside: {reason(error)}") from error
    return folder.with_name(aside.name) if folder.name else aside


def _read_meta(path: Path) -> dict[str, str]:
    return _read_state(path, None)[0]


def _read_state(path: Path, device: torch.device | None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The notes and, for a device, the tensors of a safetensors file."""
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device or "cpu")) as file:
            names = [] if device is None else file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except Exception as error:  # safetensors has one error for every kind of damage
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CrossguardError:
    return CrossguardError(f"{path} is damaged ({error}); delete it to start the training again")


def _other_run(folder: Path) -> str:
    return f"{folder} holds a run of another recipe, model or data; give another folder or delete this one"


@contextmanager
def _owned(folder: Path) -> Iterator[Note]:
    """One training run a folder at a time; a second one waits."""
    before = {path.name for path in folder.iterdir()} if folder.is_dir() else None
    with owned(folder, "trains") as note:
        try:
            yield note
        except CrossguardError:
            with suppress(OSError):
                new = [path for path in folder.iterdir() if path.name not in (before or ())]
                if all(path.name == "log.txt" or path.name.startswith(LOCK) for path in new):  # no step was taken
                    for path in new:
                        path.unlink()
                    if before is None:
                        folder.rmdir()
            raise


@contextmanager
def _held_back() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM wait in this list until the step at hand is over; a second one takes its usual way at once."""
    arrived: list[int] = []
    usual: dict[int, Any] = {}

    def arrive(number: int, frame: object) -> None:
        del frame
        arrived.append(number)
        restore()

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():  # no other may
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                usual[number] = signal.signal(number, arrive)
    try:
        yield arrived
    finally:
        restore()


def _let_go(signals: list[int]) -> None:
    """What was held back takes its usual way now."""
    for number in signals[:1]:
        signal.raise_signal(number)


def _logger(folder: Path) -> logging.Logger:
    log = logging.getLogger(f"crossguard.training.{folder.resolve()}")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    handler = LogFile(folder / "log.txt")
    handler.setFormatter(LogFormatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    return log


@contextmanager
def _board(folder: Path, main: bool, start: int) -> Iterator[Any]:
    """A TensorBoard writer, where this process is the one that writes."""
    if not main:
        yield None
        return
    with closing(_Board(folder / "tensorboard", start)) as board:
        yield board


class _Board:
    """A file of scalars for TensorBoard. The writer that comes with it has a thread of its own, which prints a
    traceback where its folder is gone or the disk is full; here, what cannot be written is left out. The file is made
    when there is something to write, so that a training that is refused in its first step leaves none.

    Args:
        start: how many steps were taken before; what another run wrote of later ones is shown no more.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        events: Any = event_pb2  # their classes are made when they are imported, which no type checker sees
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._folder, self._opens = folder, True
        self._file = self._records = None
        self._records_of: Any = RecordWriter
        self._flushed = time.time()
        self._first: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}]
        if start:
            self._first.append({"step": start + 1, "session_log": events.SessionLog(status=events.SessionLog.START)})

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self._opens:
            self._open()
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _open(self) -> None:
        self._opens = False
        try:
            self._folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
            self._file = (self._folder / name).open("wb")
        except OSError:
            return
        self._records = self._records_of(self._file)
        for content in self._first:
            self._write(**content)

    def _write(self, **content: Any) -> None:
        if self._file is None or self._records is None:
            return
        try:
            self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
            if time.time() - self._flushed > _FLUSHED:
                self._file.flush()
                self._flushed = time.time()
        except OSError:
            self.close()
            self._file = None


@contextmanager
def _progress(main: bool, total: int, start: int, mine: Note | None) -> Iterator[Any]:
    """A progress bar on the terminal with loss, accuracy and time left. Where there is no terminal, whoever listens is
    told, or a line a minute is written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not (main and console.is_terminal),
        transient=True,
    ) as bar:
        task = bar.add_task("training", total=total, completed=start, values="")
        began = spoke = time.monotonic()

        def shown(step: int, values: dict[str, float]) -> None:
            text = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if name != "learning rate")
            bar.update(task, completed=step, values=text)
            nonlocal spoke
            if mine is not None:
                mine.say(f"step {step} of {total}, {text}")
            tell("step {} of {} of the training, {}", step, total, text)
            now = time.monotonic()
            if main and not console.is_terminal and not heard() and now - spoke >= EVERY:
                spoke = now
                left = lasting((now - began) / (step - start) * (total - step))
                say(f"training: step {step} of {total} after {lasting(now - began)}, about {left} left; {text}")

        yield shown


def _versions() -> dict[str, str]:
    import transformers

    from crossguard import __version__

    return {
        "crossguard": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
