"""Ask a model a question and get a report: `evaluate(task, model, attack, budget, surrogate)`."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from crossguard.attacks.base import GRAY, WHITE, Attack
from crossguard.attacks.crafted import Crafted
from crossguard.attacks.knowledge import Blind
from crossguard.budgets import Budget, Linf, PixelBudget, sized
from crossguard.data import Dataset
from crossguard.datasets.keeping import OUTCOMES, Rows, keeping
from crossguard.datasets.kept import FORMATS, Kept
from crossguard.device import check_gradients, describe, precision
from crossguard.diagnose import averages, diagnose
from crossguard.errors import CrossguardError
from crossguard.files import WriteError, append, check_writable, reason, write
from crossguard.limits import at_least
from crossguard.look import SHOWN, Held
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import is_random, layers
from crossguard.opening import evaluating
from crossguard.printing import progress_bar
from crossguard.processes import ALONE, Processes, joined, leads
from crossguard.reading import misfit
from crossguard.report import WORDS, Outcomes, Ranks, Rate, Report, Texts, check_place, differs, key, versions
from crossguard.seeds import fold, keys
from crossguard.tasks.base import Task, Trial
from crossguard.words import contents, given, mapped, quoted, show, within

_DRAWS = 100  # sets the noise of the draws that judge apart from each other and from that of the attack
_FORMAT = 5  # of the lines in a file of outcomes so far; those of another are not read


def question(
    task: Task,
    model: VisionLanguageModel,
    attack: Attack | None,
    budget: Budget | None,
    surrogate: VisionLanguageModel | None = None,
    limit: int | None = None,
    seed: int = 0,
    draws: int = 1,
    after: Sequence[str] = (),
) -> dict[str, str]:
    """The question word for word: what changes the answer, and nothing else. Budgets are cut down to what the attack
    spends. What the files behind the words hold (weights, data, lists) is part of it, where they are local.

    Args:
        after: the keys of the questions after which this one is asked, about what still stands.
    """
    for value, kind, name in ((task, Task, "task"), (model, VisionLanguageModel, "model")):
        if not isinstance(value, kind):
            raise CrossguardError(f"{quoted(value)} is no {name}")
    if attack is not None and not isinstance(attack, Attack):
        raise CrossguardError(f"{quoted(attack)} is no attack")
    if surrogate is not None and not isinstance(surrogate, VisionLanguageModel):
        raise CrossguardError(f"{quoted(surrogate)} is no model to craft on")
    if limit is not None:
        limit = at_least("a limit of samples", limit, 1)
    seed = at_least("seed", seed, 0)
    if attack is None:
        for given, name in ((budget, "budget"), (surrogate, "surrogate")):
            if given is not None:
                raise CrossguardError(
                    f"a {name} needs an attack, and {show(given, short=True)} was given without one; name an attack, "
                    "such as 'PGD()'"
                )
    else:
        if not isinstance(budget, Budget):
            raise CrossguardError(
                f"{show(attack, short=True)} needs a budget, such as 'Linf(8/255)'; {budget!r} is none"
            )
        pixels, words = attack.spends(budget)
        budget = budget if pixels is not None and words is not None else pixels or words
    held = {
        "weights": model, "surrogate weights": surrogate, "attack files": attack, "budget files": budget, "data": task,
    }  # fmt: skip
    # What is there in few questions only, so that the others keep their names.
    told = {name: contents(word) for name, word in held.items()} | {"precision": precision()}
    if at_least("draws", draws, 1) > 1 and attack is not None and is_random(model):
        told["draws"] = str(draws)
    told["after"] = " ".join(after)
    return {
        "task": show(task),
        "model": show(model),
        "attack": show(attack),
        "budget": show(budget),
        "surrogate": show(surrogate),
        "knowledge": _knowledge(model, attack, surrogate),
        "limit": str(limit),
        "seed": str(seed),
    } | {name: value for name, value in told.items() if value}


def craft_key(asked: Mapping[str, str]) -> str:
    """What a question leaves when it does not matter who is asked: questions of equal keys share what was crafted on
    the surrogate."""
    return key({name: part for name, part in asked.items() if name not in ("model", "weights", "knowledge")})


@evaluating()
def evaluate(
    task: Task | Dataset | str | Path,
    model: VisionLanguageModel | str | Path,
    attack: Attack | type[Attack] | str | None = None,
    budget: Budget | str | None = None,
    surrogate: VisionLanguageModel | str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 128,
    progress: Callable[[int, int], None] | bool | None = None,
    partial: str | Path | None = None,
    keep: str | Path | None = None,
    keep_as: str = "safetensors",
    processes: bool = True,
    doubt: int = 0,
    crafts: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    draws: int = 1,
    after: Sequence[Report | str] = (),
) -> Report:
    """The report of one model on one task under one attack.

    Under `torchrun` the samples are shared among the processes, each once, and every process gets the same report.

    Words may be given as text, as on the command line: `evaluate("data/pics", "path/to/clip", "PGD()", "Linf(4/255)")`.

    Args:
        task: data stand for `ZeroShot(data)`, or for `Retrieval(data)` where they have captions only.
        attack: None asks the clean question alone.
        surrogate: craft on this model instead, which alone says what the adversary knows: nothing given is a white
            box, the undefended base of a wrapper a gray box, any other model a transfer attack.
        limit: that many samples, evenly divided among the classes and the same ones whatever the order of the data
            (`Dataset.chosen`).
        seed: of all noise; each sample draws its own, so `batch` changes nothing but speed and memory.
        progress: is told (samples done, samples in all) at the start and after each batch. Without one, a bar shows it
            on a terminal and in a notebook; False shows nothing.
        partial: a file for the outcomes so far; an evaluation that was killed goes on after its last whole batch and
            ends in the same report. In `keep`, else beside `out`, if not given; removed at the end, when the report is
            saved.
        keep: a folder for the images and texts under attack, which `Kept(folder)` reads; the report then also says
            what is left of the attack when pixels are rounded to 8 bits.
        keep_as: 'safetensors' (exact) or 'png' (rounded to 8 bits).
        processes: False keeps an evaluation to itself under `torchrun`.
        doubt: run the checks of `diagnose` on that many samples; what they find stands in the notes of the report.
        crafts: a folder for what is crafted on the surrogate; other models that are asked the same question with the
            same folder and `batch` are judged by what lies there, which changes no answer.
        out: a file for the report.
        overwrite: let the report and what is kept replace those of another question, which is refused otherwise.
        draws: by how many draws of a random model each image under attack is judged. The outcomes are those of the
            first; `Report.drawn` are what most of them say, as attacks themselves judge (`ImageVictim.judge`).
        after: reports of the same model on the same samples and in the same budget. Only samples that are right clean
            and stand in all of them, by most draws where there are several, are asked about; the others are reported
            as they fell there. So what the report leaves is what all of them and this attack leave, and costs less to
            find: the ensemble of AutoAttack, over reports. The key of a report stands for one that could not be made.
            Not of a retrieval, where each answer hangs on all samples.
    """
    words = dict(zip(WORDS, (task, model, attack, budget, surrogate), strict=True))
    chosen = {kind: given(kind, word) for kind, word in words.items()}
    with progress_bar("evaluating") if progress in (None, True) and leads() else nullcontext(progress) as told:
        return _evaluate(
            **chosen, limit=limit, seed=seed, batch=batch, progress=told if callable(told) else None, partial=partial,
            keep=keep, keep_as=keep_as, processes=processes, doubt=doubt, crafts=crafts, out=out, overwrite=overwrite,
            draws=draws, after=after,
        )  # fmt: skip


def _evaluate(
    task: Task,
    model: VisionLanguageModel,
    attack: Attack | None,
    budget: Budget | None,
    surrogate: VisionLanguageModel | None,
    *,
    limit: int | None,
    seed: int,
    batch: int,
    progress: Callable[[int, int], None] | None,
    partial: str | Path | None,
    keep: str | Path | None,
    keep_as: str,
    processes: bool,
    doubt: int,
    crafts: str | Path | None,
    out: str | Path | None,
    overwrite: bool,
    draws: int,
    after: Sequence[Report | str],
) -> Report:
    """As `evaluate`, of words."""
    check_gradients()
    names = [one if isinstance(one, str) else one.key for one in after]
    asked = question(task, model, attack, budget, surrogate, limit, seed, draws, names)
    draws = int(asked.get("draws", 1))
    if len(task) == 0:
        raise CrossguardError(f"{show(task, short=True)} has no samples")
    if keep is not None:
        if keep_as not in FORMATS:
            raise CrossguardError(f"images cannot be kept as {keep_as!r}; give one of {', '.join(FORMATS)}")
        if any(Path(kept.path).resolve() == Path(keep).resolve() for kept in within(task, Kept)):
            raise CrossguardError(f"{keep} holds the images that are asked about; keep the new ones in another folder")
        if after:
            raise CrossguardError(
                "what is asked after other reports is of some samples only; keep images without after"
            )
    doubt, batch = at_least("doubt", doubt, 0), at_least("batch", batch, 1)
    group = joined() if processes else ALONE
    file, folder = (None if path is None else Path(path) for path in (out, keep))
    kept_in = nullcontext() if folder is None else keeping(folder, asked, keep_as, overwrite, group)
    with group.meeting(), kept_in as kept:
        with group.together():
            if file is not None:
                check_place(file, asked, overwrite)
                check_writable(file.parent)
            chosen = indices = task.chosen(limit)
            ids = _ids(task, indices)
        before = _before([one for one in after if isinstance(one, Report)], asked, ids)
        if before is not None:
            left = [place for place, stands in enumerate(before.correct & before.standing) if stands]
            indices, ids = [indices[place] for place in left], [ids[place] for place in left]
        if partial is None and folder is not None:
            partial = folder / OUTCOMES
        elif partial is None and file is not None:
            partial = file.with_name(f".{file.name}.part")

        def usable(rows: Rows) -> Rows:
            rows = {name: rows[name] for name in ids if name in rows}
            return rows if kept is None else kept.held(rows)

        head = {"question": asked, "kept": kept and keep_as, "format": _FORMAT}
        record = _Record.open(None if partial is None else Path(partial), head, group, usable)
        if kept is not None:
            kept.take(record.rows)
        loading = time.monotonic()
        for word in (model, surrogate):
            if word is not None:
                _ = word.device  # opens the network, so that the time of that is not the time of the questions
        loading = time.monotonic() - loading
        began = time.monotonic() - record.seconds
        mine = group.share([index for index, name in zip(indices, ids, strict=True) if name not in record.rows])
        carried = attack
        if attack is not None and surrogate is not None and crafts is not None:
            carried = Crafted(attack, Path(crafts) / craft_key(asked))
        if progress is not None:
            progress(len(record.rows), len(indices))  # before the texts are attacked, which may take long
        trial = task.prepare(model, carried, budget, surrogate, chosen, seed, group)
        done = len(record.rows)
        held: list[tuple[int, str, Tensor]] = []  # the first samples, to be looked at
        begun = group.world > 1  # then all must know when
        if kept is not None and begun:
            with group.together():
                if group.first:
                    kept.begin()
        with group.together():
            for samples in task.batches(batch, mine):
                here, mine = mine[: len(samples)], mine[len(samples) :]
                seeds = keys(samples.ids, seed)
                answers = trial.answer(samples, seeds)
                columns: dict[str, list[Any]] = {"id": list(samples.ids), **answers.columns}
                columns["shape"] = [list(samples.images.shape[-2:])] * len(samples)
                places: list[dict[str, Any]] = [{}] * len(samples)
                if draws > 1:
                    drawn = [
                        _rows(trial.again(samples, answers, answers.images, fold(seeds, number + _DRAWS)))
                        for number in range(1, draws)
                    ]
                    columns["drawn"] = [list(each) for each in zip(*drawn, strict=True)]
                if kept is not None:
                    if not begun:
                        kept.begin()  # not before there is something to take its place
                        begun = True
                    places = kept.add(here, answers.images)
                    rounded = (answers.images * 255.0).round() / 255.0
                    right, standing = answers.right
                    columns |= {"right": right, "stands": standing}
                    if trial.pixels is not None:
                        columns["rounded"] = _rows(trial.again(samples, answers, rounded, seeds))
                        columns["rounded_size"] = trial.pixels.size(rounded.cpu() - samples.images).tolist()
                if attack is not None:
                    few = zip(here, columns["id"], answers.images, strict=True)
                    held += [(index, name, image.cpu()) for index, name, image in few][: SHOWN - len(held)]
                rows = [row | place for row, place in zip(_rows(columns), places, strict=True)]
                record.add(rows, time.monotonic() - began)
                done += len(samples) * group.world
                if progress is not None:
                    progress(min(done, len(indices)), len(indices))
        known = {name: row for rows in group.gather(record.rows) for name, row in rows.items()}
        found = [known[name] for name in ids]
        sizes = {tuple(row["shape"]) for row in found}

        def concluded() -> Report:
            outcomes = _scored(trial, found, before)
            # Of what has fallen before nothing is known here, so a remark on all samples stands in the other reports.
            remarks = trial.remarks(found) if before is None else []
            notes = [*trial.notes, *remarks, *_skipped(task), *_several(sizes)]
            notes += _of_the_question(model, attack, trial)
            if kept is not None:
                if trial.pixels is not None:
                    notes += _rounding(found, outcomes, trial, trial.pixels)
                placed = [row | {"index": index} for row, index in zip(found, indices, strict=True)]
                kept.finish(placed, trial.prompts)
            drawn = None
            if draws > 1:
                several = [[row | row["drawn"][number] for row in found] for number in range(draws - 1)]
                drawn = outcomes.usual([_scored(trial, rows, before) for rows in several])
            report = Report(
                asked, outcomes, tuple(notes), versions(describe()), time.monotonic() - began, loading=loading,
                texts=_texts(trial, attack, budget), drawn=drawn, gates=_gates(found),
                asked=None if before is None else tuple(ids),
            )  # fmt: skip
            if not found:
                gates = next((one.gates for one in after if isinstance(one, Report)), {})
                report = replace(report, gates={name: (Rate(0, 0), Rate(0, 0)) for name in gates})
            if held:
                rows = [known[name] | {"index": index} for index, name, _ in held]
                report = replace(report, pictures=Held(rows, [image for _, _, image in held], trial.prompts))
            if doubt and attack is not None:
                doubts = diagnose(report, task, model, attack, budget, surrogate, doubt, seed)
                report = replace(report, notes=(*notes, *doubts))
            if file is not None:
                report.save(file, overwrite)
            record.close()
            return report

        (report,) = group.each([concluded], lambda work: work())
        return report


def _before(after: Sequence[Report], asked: Mapping[str, str], ids: Sequence[str]) -> Outcomes | None:
    """What is left of each sample after these reports; None after none. Raises where they are not of the same."""
    for report in after:
        if isinstance(report.outcomes, Ranks):
            raise CrossguardError("in a retrieval each answer hangs on all samples, so none can be left out")
        parts = ["task", "data", "model", "weights", "limit", *(["budget"] if report.attacked else [])]
        other = next((part for part in parts if report.question.get(part) != asked.get(part)), None)
        if other is not None:
            there, here = ({other: one.get(other, "None")} for one in (report.question, asked))
            raise CrossguardError(f"a report to go on after is of another question ({differs(there, here)})")
        if list(report.outcomes.id) != list(ids):
            raise CrossguardError("a report to go on after is of other samples; ask that question again")
    if not after:
        return None
    left = after[0].judged.worst([report.judged for report in after])
    assert isinstance(left, Outcomes)
    nothing = np.zeros(len(left), dtype=np.int64)
    return replace(left, gradients=nothing, forwards=nothing)


def _scored(trial: Trial, rows: Sequence[Mapping[str, Any]], before: Outcomes | None) -> Outcomes | Ranks:
    """The outcomes of what was asked about; of the rest, what became of them before."""
    if before is None:
        return trial.score(rows)
    found = trial.score(rows) if rows else before
    assert isinstance(found, Outcomes)
    return before.told(found)


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The entries of columns, one for each sample."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _gates(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Rate, Rate]]:
    """On how many images each gate of a defense acted, clean and under attack, where the task says so."""
    names = rows[0].get("gates", ()) if rows else ()
    acted = {name: [sum(row["gates"][name][when] for row in rows) for when in (0, 1)] for name in names}
    return {name: (Rate(clean, len(rows)), Rate(attacked, len(rows))) for name, (clean, attacked) in acted.items()}


def _texts(trial: Trial, attack: Attack | None, budget: Budget | None) -> Texts | None:
    """The names of the classes and, where an attack was on them, the prompts before and after."""
    if trial.prompts is None:
        return None
    before, after = trial.prompts
    rewritten = attack is not None and budget is not None and attack.spends(budget)[1] is not None
    return Texts(before.names, before.texts, after.texts) if rewritten else Texts(before.names)


def _of_the_question(model: VisionLanguageModel, attack: Attack | None, trial: Trial) -> list[str]:
    """Doubts that follow from what was asked, whatever the answers are."""
    found: list[str] = []
    if is_random(model):
        found.append(
            "the model draws noise, and each answer is one draw of it: other seeds answer otherwise "
            "('crossguard table --worst' takes what is left over several)"
        )
        if attack is not None and not averages(attack):
            found.append(
                "the model draws noise, and the attack does not average over it, so the number is too kind: attack "
                "with EOT(...) or AutoAttack('rand')"
            )
    if isinstance(trial.pixels, Linf) and trial.pixels.eps >= 0.5:
        found.append(
            f"the budget {show(trial.pixels)} lets any image become a plain gray one: eps is in pixels of [0, 1], so "
            "that one level of 8 bits is 1/255"
        )
    return found


def _ids(task: Task, indices: Sequence[int]) -> list[str]:
    """The names of the samples that are asked about; raises where two of them have the same."""
    ids = [task.id(index) for index in indices]
    if len(set(ids)) < len(ids):
        (twice, _), *_ = Counter(ids).most_common(1)
        raise CrossguardError(
            f"two samples of the data have the same id ({twice!r}), so they cannot be told apart in a report"
        )
    return ids


@dataclass
class _Record:
    """What is known of the samples so far, by their ids: in memory, and where a file is given in one line of it per
    batch, with a checksum. A line that was cut off by a kill, or that is not what was written, doesn't count."""

    rows: dict[str, dict[str, Any]]
    seconds: float = 0.0
    path: Path | None = None
    head: Mapping[str, Any] = field(default_factory=dict)  # the first line: what is asked

    @staticmethod
    def open(path: Path | None, head: dict[str, Any], group: Processes, usable: Callable[[Rows], Rows]) -> _Record:
        """Each process appends to a file of its own; the first one reads those of all and tells the others.

        Args:
            usable: which of the rows that were found are of use.
        """
        record = _Record({}, path=None if path is None else path.with_name(f"{path.name}.{group.rank}"), head=head)
        if path is None or record.path is None:
            return record
        with group.together():
            if group.first:
                for other in _files(path):
                    lines = _lines(other)
                    for line in lines[1:] if lines[:1] == [head] else []:
                        if misfit(line, _Line):
                            continue
                        record.rows |= {row["id"]: row for row in line["rows"]}
                        record.seconds = max(record.seconds, line["seconds"])
                record.rows = usable(record.rows)
        record.rows, record.seconds = group.tell((dict(record.rows), record.seconds))
        with group.together():
            check_writable(path.parent)
            if group.first and record.rows:
                line = {"rows": list(record.rows.values()), "seconds": record.seconds}
                write(record.path, _line(head) + _line(line))
            else:
                _remove(record.path)  # what lies there is of another question, or broken
        return record

    def add(self, rows: list[dict[str, Any]], seconds: float) -> None:
        self.rows |= {row["id"]: row for row in rows}
        self.seconds = seconds
        if self.path is None:
            return
        begun = self.path.is_file()
        append(self.path, ("" if begun else _line(self.head)) + _line({"rows": rows, "seconds": seconds}))

    def close(self) -> None:
        if self.path is not None:
            for path in _files(self.path.with_suffix("")):
                _remove(path)


class _Line(TypedDict):
    """What a line holds behind the first one."""

    rows: list[_Row]
    seconds: float


class _Row(TypedDict):
    id: str


def _files(path: Path) -> list[Path]:
    own = re.compile(re.escape(path.name) + r"\.\d+")
    return sorted(other for other in path.parent.iterdir() if own.fullmatch(other.name)) if path.parent.is_dir() else []


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{path} cannot be removed: {reason(error)}") from error


def _line(content: Mapping[str, Any]) -> str:
    """A line of a file of outcomes: its content behind a checksum."""
    text = json.dumps(content)
    return f"{_checksum(text.encode())} {text}\n"


def _lines(path: Path) -> list[Any]:
    """The lines of a file that are as they were written; others are left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return []
    parts = [line.partition(b" ") for line in lines]
    return [json.loads(text) for told, _, text in parts if told.decode("latin-1") == _checksum(text)]


def _checksum(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]


def _rounding(rows: list[dict[str, Any]], outcomes: Outcomes | Ranks, trial: Trial, pixels: PixelBudget) -> list[str]:
    """What becomes of the attack when its images are stored with 8 bits."""
    rounded = trial.score([row | row["rounded"] for row in rows])
    pairs = [(name, old, new) for (name, _, old), (_, _, new) in zip(outcomes.parts, rounded.parts, strict=True)]
    found: list[str] = []
    if any(old != new for _, old, new in pairs):
        parts = [
            f"{100 * new.value:.1f} % instead of {100 * old.value:.1f} %{' ' * bool(n)}{n}" for n, old, new in pairs
        ]
        found.append(f"rounded to 8 bits, the images under attack leave {' and '.join(parts)} robust")
    largest = max(row["rounded_size"] for row in rows)
    if largest > pixels.eps * (1 + 1e-4) + 1e-6:
        found.append(
            f"rounded to 8 bits, the largest perturbation has size {sized(pixels, largest)} in a budget of "
            f"{sized(pixels, pixels.eps)}; choose eps as a whole number of 1/255 to stay inside"
        )
    return found


def _knowledge(model: VisionLanguageModel, attack: Attack | None, surrogate: VisionLanguageModel | None) -> str:
    """What the adversary knows, and how gradients get through what has none."""
    if attack is None:
        return "no attack"
    inside = layers(model)
    if surrogate not in (None, model):
        return GRAY if surrogate in inside else "transfer"
    told: Attack = attack
    if len(inside) == 1:  # there is nothing that the adversary could not know of
        told = mapped(attack, lambda part: part.attack if isinstance(part, Blind) else part)
    around = told.knows == WHITE and any(layer.masks for layer in inside)
    return f"{WHITE}, BPDA" if around else told.knows


def _skipped(task: Task) -> list[str]:
    skipped = task.data.skipped
    return [f"{skipped} broken file(s) were left out of the data"] if skipped else []


def _several(sizes: Collection[tuple[int, ...]]) -> list[str]:
    """The note about images of several sizes: published numbers are of images that were all resized first."""
    if len(sizes) < 2:
        return []
    return [
        f"the images have {len(sizes)} sizes: the budget acts on the pixels of each, and batches end where the size "
        "changes; give the data a size, as in size=224, for images that are resized first"
    ]
