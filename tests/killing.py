"""Processes that end in the middle of writing, and what they leave: shared by the quick and the long tests of kills.

Every operation that changes which files there are (making, opening for writing, renaming, removing) is announced to
Python's audit hooks, with its path. A hook counts those below one folder, and ends the process before one of them: by
SIGKILL in a child, or in the test itself by an exception that nothing catches, after which no further operation
happens, whatever the code would still tidy up.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree"}


class Killed(BaseException):
    """The process is gone. No `except Exception` hears of it."""


def _raise() -> None:
    raise Killed


class Operations:
    """The operations on files below a folder; see the beginning of this file."""

    def __init__(self) -> None:
        self.root, self.seen, self.last = "", list[str](), sys.maxsize
        self.end: Callable[[], None] = _raise
        self._installed = False

    @contextmanager
    def below(self, root: Path, last: int | None = None, end: Callable[[], None] | None = None) -> Iterator[list[str]]:
        """Counts inside, and lets no more than `last` operations happen.

        Args:
            end: what is called instead of each further operation; raises `Killed`, if not given.
        """
        if not self._installed:
            self._installed = True
            sys.addaudithook(self._hear)  # never to be taken away again
        self.seen, self.last, self.end = [], sys.maxsize if last is None else last, end or _raise
        self.root = f"{root.resolve()}{os.sep}"
        try:
            yield self.seen
        finally:
            self.root = ""

    def _hear(self, event: str, given: tuple[Any, ...]) -> None:
        if not self.root or event not in EVENTS:
            return
        path = given[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        if event == "open" and not (isinstance(given[2], int) and given[2] & WRITES):
            return
        at = given[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
        here = Path(f"/proc/self/fd/{at}").readlink() if at >= 0 else Path.cwd()
        name = str(here / os.fsdecode(path))
        if not f"{name}{os.sep}".startswith(self.root):
            return
        if len(self.seen) >= self.last:
            self.end()
        self.seen.append(f"{event} {name[len(self.root) :]}")


OPERATIONS = Operations()


def found(folder: Path) -> dict[str, Any]:
    """What a folder holds in the end, without what two runs may say in two ways: dates, durations, logs, locks."""
    told: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == "log.txt" or name.startswith((".lock", "tensorboard/")):
            continue
        data = path.read_bytes()
        if path.suffix == ".json" and not path.name.startswith("tokenizer"):
            content = json.loads(data)
            for key in ("seconds", "created", "loading"):
                content.pop(key, None)
            told[name] = content
        elif path.name == "README.md":
            card = data.decode()
            for place in (str(folder), f"'{folder.name}'", f'"{folder.name}"'):  # a card has no path of the machine
                card = card.replace(place, "FOLDER")
            told[name] = [line for line in card.splitlines() if not line.startswith("| seconds")]
        else:
            told[name] = hashlib.sha256(data).hexdigest()
    return told


# --- In a child of a warm process ---

PGD = "PGD(steps=2, step=1.0, best=False, stop=False)"
TRAIN = ["train", "--model", "Tiny()", "--data", "Scenes('shape', 'train', count=32)", "--out", "out"]
ASK = [
    "--task",
    "ZeroShot(Scenes('shape'))",
    "--model",
    "Tiny()",
    "--attack",
    "PGD(steps=2)",
    "--budget",
    "Linf(4/255)",
]
GRID = """
task = "ZeroShot(Scenes('shape'))"
model = ["Tiny()", "BitDepth(Tiny())"]
attack = ["PGD(steps=2)", "PGD(steps=1, step=1.0)"]
budget = "Linf(4/255)"
surrogate = "Tiny()"
limit = 12
batch = 4
"""
COMMANDS = {
    "FTStandard": [*TRAIN, "--recipe", "FTStandard(steps=6, batch=8, save_every=0, optimizer=Adam(lr=1e-4))"],
    "MMCoA": [
        *TRAIN,
        "--recipe",
        f"MMCoA(steps=4, batch=8, save_every=0, optimizer=Adam(lr=1e-4), image_attack={PGD})",
    ],
    "AdvPT": [
        *TRAIN,
        "--recipe",
        f"AdvPT(steps=5, batch=8, save_every=0, optimizer=Adam(lr=1e-2), trains=Context(tokens=2), image_attack={PGD})",
    ],
    "DANN": [
        *TRAIN[:3],
        "--data",
        "Domains(Scenes('shape', 'train', count=32), Scenes('shape', 'train', style='night', count=24))",
        *TRAIN[5:],
        "--recipe",
        f"DANN(steps=5, batch=8, save_every=0, optimizer=Adam(lr=1e-4), hidden=16, image_attack={PGD})",
    ],
    "eval": ["eval", *ASK, "--limit", "24", "--batch", "4", "--out", "out/report.json"],
    "keep": ["eval", *ASK, "--limit", "12", "--batch", "4", "--keep", "out", "--keep-as", "png"],
    "run": ["run", "grid.toml", "--out", "out"],
    "attack": ["attack", *ASK, "--limit", "16", "--batch", "4", "--keep", "out", "--show", "0"],
}


def warm() -> None:
    """Loads what commands load, once for all children."""
    import importlib

    import torch

    import crossguard

    torch.set_num_threads(1)
    for name in dir(crossguard):
        getattr(crossguard, name)
    crossguard.Tiny().encode_text(["a"])
    for name in ("crossguard.cli", "accelerate", "tensorboard.summary.writer.record_writer", "torch._dynamo"):
        importlib.import_module(name)


def command(kind: str, place: str, last: int | None = None) -> None:
    """Runs a command in a folder of its own, and ends with its exit code: by SIGKILL, if it would do more than `last`
    operations on files. The operations are listed beside the folder, as long as nothing ends them."""
    os.chdir(place)
    sink = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    Path("grid.toml").write_text(GRID)
    from crossguard.cli import main

    with OPERATIONS.below(Path("out"), last, lambda: os.kill(os.getpid(), signal.SIGKILL)) as seen:
        try:
            main(COMMANDS[kind])
        except SystemExit as end:
            if last is None:
                Path("operations.json").write_text(json.dumps(seen))
            raise SystemExit(end.code) from None


if __name__ == "killing":
    warm_in = os.environ.get("CROSSGUARD_WARM")
    if warm_in == str(os.getppid()):  # this is the server that is about to fork the children
        warm()
