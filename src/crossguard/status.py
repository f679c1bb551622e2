"""What goes on in a folder: which work runs there and how far it is, what waits for whom, and what is left to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from crossguard.errors import CrossguardError
from crossguard.experiment import HASH, INDEX, LOCKS
from crossguard.files import LOCK
from crossguard.printing import lasting
from crossguard.reading import read_json
from crossguard.turns import Worker, workers

_LISTED = 10  # questions that are left; more are counted


def status(folder: str | Path) -> list[str]:
    """What goes on in a folder of answers, of a training or of kept images, or in each folder inside of it, in lines
    for people.

    Raises:
        CrossguardError: nothing of ours is there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CrossguardError(f"there is no folder {folder}; give one that 'crossguard run' or 'train' wrote to")
    found = _told(folder)
    if found is None:
        try:
            inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            raise CrossguardError(f"the folder {folder} cannot be read ({error.strerror})") from None
        found = [line for path in inside for line in _told(path) or ()]
    if not found:
        raise CrossguardError(
            f"nothing in {folder} is a run, a training or an attack that was kept; give the folder that --out or "
            "--keep named"
        )
    return found


def _told(folder: Path) -> list[str] | None:
    """The lines about a folder; None, where nothing of ours is in it."""
    if (folder / INDEX).is_file():
        return list(_grid(folder))
    if any((folder / name).is_file() for name in ("crossguard.json", "training.safetensors")):
        return list(_training(folder))
    from crossguard.datasets.keeping import JOURNAL
    from crossguard.datasets.kept import INDEX as KEPT

    kept, begun = ((folder / name).is_file() for name in (KEPT, JOURNAL))
    if kept or begun:
        found = f"{folder}: images under attack, {'not all kept yet' if begun else 'all kept'}"
        return [found, *_running(workers(folder, LOCK))]
    if workers(folder, LOCK):  # it has just begun
        return [f"{folder}: begun", *_running(workers(folder, LOCK))]
    return None


class _Asked(TypedDict):
    label: str
    fits: list[str]


class _Named(TypedDict, total=False):
    asked: dict[str, _Asked]


class _Grid(_Named):
    source: str
    cells: list[str]


def _grid(folder: Path) -> Iterator[str]:
    """A folder of answers."""
    index: Any = read_json(folder / INDEX, _Grid, "run the experiment again")
    cells, asked = index["cells"], index.get("asked", {})
    there = {path.stem.rpartition(".")[2][:HASH] for path in folder.glob("[!.]*.json")}
    missing = [key for key in cells if key[:HASH] not in there]
    running = {name: one for name, one in workers(folder / LOCKS).items() if name in missing}
    yield (
        f"{folder}: {len(cells) - len(missing)} of {len(cells)} cells of {index['source']} are answered"
        + (f", {len(running)} in work" if running else "")
    )
    yield from _running(running)
    fits = dict.fromkeys(fit for key in missing if key in asked for fit in asked[key]["fits"])
    untrained = [Path(fit) for fit in fits if not (Path(fit) / "crossguard.json").is_file()]
    for fit in untrained:
        for line in _training(fit):
            yield f"  {line}"
    for one in workers(folder / LOCKS, "cells.").values():
        yield f"  waiting: {one.name} {one.doing}, {one.times}"
    failed = _failed(folder / "log.txt")
    left = [key for key in missing if key not in running]
    for key in [one for one in left if one in asked and asked[one]["label"] in failed][:_LISTED]:
        label = asked[key]["label"]
        yield f"  failed: {label}: {failed[label]}"
        left.remove(key)
    for key in left[:_LISTED]:
        needs = [Path(fit).name for fit in asked.get(key, {"fits": []})["fits"] if Path(fit) in untrained]
        waits = f", when {' and '.join(needs)} is trained" if needs else ""
        yield f"  left: {asked[key]['label'] if key in asked else key}{waits}"
    if len(left) > _LISTED:
        yield f"  left: {len(left) - _LISTED} more"


def _failed(log: Path) -> dict[str, str]:
    """Why cells could not be answered, by their labels, as the log of the run that began last has it."""
    found: dict[str, str] = {}
    try:
        lines = log.read_text("utf-8", "replace").splitlines()
    except OSError:
        return found
    for line in lines:
        if re.search(r" INFO .*: \d+ cells, \d+ answered$", line):
            found = {}
        elif told := re.match(r"\S+ \S+ \d+ ERROR (.*?): (.*)", line):
            found[told[1]] = told[2]
    return found


def _running(found: Mapping[str, Worker]) -> Iterator[str]:
    for name, one in found.items():
        what = "waiting" if name.startswith(f"{LOCK}.") else "running"
        yield f"  {what}: {one.doing} ({one.name}, {one.times})"


class _Loss(TypedDict, total=False):
    loss: float


class _Record(_Loss):
    steps: int
    seconds: float


def _training(folder: Path) -> Iterator[str]:
    """The folder of a training."""
    if (folder / "crossguard.json").is_file():
        try:
            record: Any = read_json(folder / "crossguard.json", _Record, "train again")
        except CrossguardError as error:
            yield f"{folder}: a training that cannot be read: {error}"
            return
        loss = f", loss {record['loss']:.4g}" if "loss" in record else ""
        yield f"{folder}: a training, finished: {record['steps']} steps in {lasting(record['seconds'])}{loss}"
        return
    found = workers(folder, LOCK)
    step = _saved(folder / "training.safetensors")
    saved = f"saved after step {step}" if step else "nothing is saved yet"
    if not found:
        yield f"{folder}: a training, " + (f"stopped; {saved}" if step else "not begun")
    else:
        yield f"{folder}: a training, {saved}"
        yield from _running(found)


def _saved(path: Path) -> str:
    """After which step a training was saved; empty where it was not, or the file is damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return str(file.metadata()["step"])[:20]
    except Exception:  # it is not there, or damaged in one of the many ways of safetensors
        return ""
