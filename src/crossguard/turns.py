"""Who works on what in a folder that several processes share, and how far they are: a note beside each lock.

Locks decide who works. Notes are for people alone: for the process that waits, and for `crossguard status`. Whatever
cannot be written or read of them is left out.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from crossguard import files
from crossguard.errors import CrossguardError
from crossguard.printing import clock, one_line, say
from crossguard.reading import read_json

SUFFIX = ".who"
EVERY = 5.0  # seconds between two versions of a note, at least


class _Note(TypedDict):
    machine: str
    where: str
    process: int
    doing: str
    since: float


@dataclass(frozen=True)
class Worker:
    """A process that works on something, as its note says.

    Args:
        machine: its name.
        where: tells whether numbers of processes there are those of here.
        process: its number.
        doing: what it does, and how far it is: "base, PGD-10: 120 of 400 samples".
        since: when it began, in seconds as of `time.time()`.
        heard: when it last said something.
    """

    machine: str
    where: str
    process: int
    doing: str
    since: float
    heard: float

    @property
    def name(self) -> str:
        """The process, for people on this machine."""
        elsewhere = "" if self.where == files.here() else f" on {self.machine}"
        return f"process {self.process}{elsewhere}"

    @property
    def times(self) -> str:
        """Since when it works and, on another machine, when it was last heard of."""
        heard = "" if self.where == files.here() else f", last heard of at {clock(self.heard)}"
        return f"since {clock(self.since)}{heard}"

    @property
    def gone(self) -> bool:
        """Whether it is known to have ended without taking its note away."""
        return files.gone(self.where, self.process)


class Note:
    """The note of this process.

    Args:
        path: of the lock that it belongs to.
        doing: what the process is about to do.
    """

    def __init__(self, path: Path, doing: str) -> None:
        self.path = path.with_name(path.name + SUFFIX)
        self.since, self._written = time.time(), 0.0
        self.say(doing)

    def say(self, doing: str) -> None:
        """Changes what is done; within seconds of the last change nothing is written."""
        now = time.monotonic()
        if self._written and now - self._written < EVERY:
            return
        self._written = now
        note: _Note = {
            "machine": platform.node(), "where": files.here(), "process": os.getpid(), "doing": doing,
            "since": self.since,
        }  # fmt: skip
        with suppress(OSError):
            self.path.write_text(json.dumps(note))

    def close(self) -> None:
        with suppress(OSError):
            self.path.unlink()


@contextmanager
def noted(path: Path, doing: str) -> Iterator[Note]:
    """Lends the note of who holds a lock, which goes away when the work ends."""
    note = Note(path, doing)
    try:
        yield note
    finally:
        note.close()


@contextmanager
def waiting(path: Path, doing: str) -> Iterator[Note]:
    """The same for one of the processes that wait for a lock, of which there may be many."""
    with noted(path.with_name(f"{path.name}.{files.here()}-{os.getpid()}"), doing) as note:
        yield note


@contextmanager
def owned(folder: Path, doing: str) -> Iterator[Note]:
    """Inside, no other process that asks for this folder works there; one that finds it taken says for whom it waits.
    Lends the note in which this one says how far it is.

    Args:
        doing: what for, as in "trains".

    Raises:
        WriteError: the folder cannot be written to, or its file system has no locks.
    """
    from filelock import FileLock, Timeout

    files.make_writable(folder)
    path = folder / files.LOCK
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            other = worker(path)
            said = "another process" if other is None else other.name
            more = "" if other is None else f" {other.times}{'' if other.doing == doing else f': {other.doing}'}"
            say(f"waiting for {said} that {doing} in {folder}{more}")
            with waiting(path, f"waits for {said}"):
                lock.acquire()
    except (OSError, NotImplementedError) as error:
        why = files.reason(error) if isinstance(error, OSError) else "its file system has no locks"
        raise files.WriteError(f"{path} cannot be locked: {why}") from error
    try:
        with noted(path, doing) as note:
            yield note
    finally:
        lock.release()


def worker(path: Path) -> Worker | None:
    """Who holds a lock, as its note says; None where nobody has left one, or who did is gone."""
    return _read(path.with_name(path.name + SUFFIX))


def workers(folder: Path, start: str = "") -> dict[str, Worker]:
    """All who have a note in a folder and are there, by the name of what they hold or wait for.

    Args:
        start: how the names of the notes begin.
    """
    try:
        paths = sorted(folder.glob(f"{start}*{SUFFIX}"))
    except OSError:
        return {}
    found = {path.name.removesuffix(SUFFIX): _read(path) for path in paths}
    return {name: one for name, one in found.items() if one is not None}


def _read(path: Path) -> Worker | None:
    try:
        heard = path.stat().st_mtime
        content: Any = read_json(path, _Note, "")
    except (CrossguardError, OSError):
        return None
    one = Worker(
        one_line(content["machine"])[:80], content["where"], content["process"], one_line(content["doing"])[:200],
        content["since"], heard,
    )  # fmt: skip
    return None if one.gone else one
