"""Killed at any moment and started again, all ends as if nobody had killed it: equal to the bit, nothing left over.

The quick tests end the work before an operation on files, in this process (see `killing`): the first, the last two, and
one of each kind that moves or removes something. The long ones end it before each, and kill children by SIGKILL,
at random moments and before operations. CROSSGUARD_KILLS says how many of each (25), and CROSSGUARD_KILL_SEED which.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import killing
from crossguard import PGD, AdvPT, BitDepth, Context, Domains, Kept, Linf, Scenes, Tiny, ZeroShot, evaluate
from crossguard.data import Dataset
from crossguard.defenses.adaptation import DANN
from crossguard.defenses.finetuning import FTStandard, MMCoA
from crossguard.defenses.optimizers import Adam
from crossguard.defenses.recipe import Recipe
from crossguard.experiment import Experiment
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace
from fixtures import Blots
from killing import COMMANDS, OPERATIONS, Killed, found

ROUNDS = int(os.environ.get("CROSSGUARD_KILLS", "25"))
SEED = int(os.environ.get("CROSSGUARD_KILL_SEED", "0"))

TASK, ATTACK, BUDGET = ZeroShot(Scenes("shape")), PGD(steps=1), Linf(4 / 255)
STRONG = PGD(steps=1, best=False, stop=False)
STEPS: dict[str, Any] = {"steps": 3, "batch": 8, "save_every": 0, "optimizer": Adam(lr=1e-3)}


def trained(recipe: Recipe, base: Fresh, data: Dataset | None = None) -> Callable[[Path], object]:
    return lambda out: recipe.fit(base, data or Blots(), out)


def asked(out: Path) -> None:
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=8, batch=4, out=out / "report.json")


def attacked(out: Path) -> None:
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=8, batch=4, keep=out, out=out / "report.json")


def pictured(out: Path) -> None:
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=4, batch=2, keep=out, keep_as="png")


def shared(out: Path) -> None:
    axes: dict[str, Any] = {
        "task": {"t": TASK}, "model": {"plain": Tiny(), "coarse": BitDepth(Tiny())}, "attack": {"a": ATTACK},
        "budget": {"b": BUDGET}, "surrogate": {"s": Tiny()},
    }  # fmt: skip
    Experiment(axes, limit=4, batch=2).run(out)


def replaced(out: Path) -> None:
    """What was kept for another question goes."""
    if not (out / ".began").exists():
        evaluate(TASK, Tiny(), ATTACK, BUDGET, seed=1, limit=6, batch=3, keep=out, out=out / "report.json")
        (out / ".began").touch()
    evaluate(TASK, Tiny(), ATTACK, BUDGET, limit=8, batch=4, keep=out, out=out / "report.json", overwrite=True)


def kinds(base: Fresh) -> dict[str, Callable[[Path], object]]:
    return {
        "FTStandard": trained(FTStandard(**STEPS), base),
        "MMCoA": trained(MMCoA(**STEPS, image_attack=STRONG), base),
        "AdvPT": trained(AdvPT(**STEPS, image_attack=STRONG, trains=Context(tokens=2)), base),
        "DANN": trained(DANN(**STEPS, hidden=8, image_attack=STRONG), base, Domains(Blots(), Blots(count=16, size=24))),
        "eval": asked,
        "attack": attacked,
        "pictures": pictured,
        "run": shared,
        "replace": replaced,
    }


def fingerprint(folder: Path) -> str:
    """What later questions call the folder."""
    if (folder / "model.safetensors").exists():
        return HuggingFace(str(folder)).fingerprint
    return Kept(str(folder)).fingerprint if (folder / "kept.json").exists() else ""


def killed_before_operations(
    work: Callable[[Path], object], place: Path, some: Callable[[list[str]], list[int]]
) -> int:
    """Ends the work after so many operations, each in a folder of its own, and does it again; the number of rounds."""
    whole = place / "whole"
    with OPERATIONS.below(whole) as seen:
        work(whole)
    told, name = found(whole), fingerprint(whole)
    assert told and not [one for one in told if one.startswith(".") and one != ".began"]
    rounds = some(seen)
    for last in rounds:
        out = place / f"after-{last}"
        with pytest.raises(Killed), OPERATIONS.below(out, last):
            work(out)
        work(out)
        what = f"ended before {seen[last]!r} (operation {last + 1} of {len(seen)})"
        again = found(out)
        assert again.keys() == told.keys(), f"{what}: not the same files"
        different = [file for file in told if told[file] != again[file]]
        assert not different, f"{what}: {different} differ"
        assert fingerprint(out) == name, f"{what}: another fingerprint"
        shutil.rmtree(out)
    return len(rounds)


def few(seen: list[str]) -> list[int]:
    """The first operation, the last two, and the last of each kind that moves or removes something."""
    kinds = {re.sub(r"[0-9a-f]{8,}|[0-9]+", "#", one): number for number, one in enumerate(seen)}
    moving = [number for kind, number in kinds.items() if kind.startswith(("os.rename", "os.remove"))]
    return sorted({0, len(seen) - 2, len(seen) - 1, *moving})


KINDS = ["FTStandard", "MMCoA", "AdvPT", "DANN", "eval", "attack", "pictures", "run", "replace"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("MMCoA", "AdvPT", "DANN")])
def test_work_that_ends_before_an_operation_is_done_as_a_whole_the_next_time(
    base: Fresh, tmp_path: Path, kind: str
) -> None:
    assert killed_before_operations(kinds(base)[kind], tmp_path, few) >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_work_may_end_before_any_operation(base: Fresh, tmp_path: Path, kind: str) -> None:
    count = killed_before_operations(kinds(base)[kind], tmp_path, lambda seen: list(range(len(seen))))
    print(f"{kind}: ended before each of {count} operations")


# --- Children that are killed ---


@cache
def context() -> Any:
    """Children are forked from a process that has loaded everything and done nothing yet."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["killing"])
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSGUARD_WARM", str(os.getpid()))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))  # the server does not look elsewhere
        forkserver.ensure_running()
    return server


def start(kind: str, place: Path, last: int | None = None) -> BaseProcess:
    place.mkdir(parents=True, exist_ok=True)
    process = context().Process(target=killing.command, args=(kind, str(place), last))
    process.start()
    return process


def finish(process: BaseProcess) -> int | None:
    process.join(240)
    code = process.exitcode
    process.kill()
    return code


def killed_children(kind: str, place: Path, count: int) -> dict[str, int]:
    """Kills a command at random moments, and before operations on files, and starts it again; how often of each."""
    dice, done = random.Random(f"{SEED} {kind}"), {"at random": 0, "before an operation": 0}
    whole = place / "whole"
    finish(start(kind, place / "warming"))
    began = time.monotonic()
    assert finish(start(kind, whole)) == 0, (whole / "said.txt").read_text()
    seconds = time.monotonic() - began
    told, name = found(whole / "out"), fingerprint(whole / "out")
    operations = json.loads((whole / "operations.json").read_text())
    chosen = sorted(dice.sample(range(len(operations)), min(count, len(operations))))
    while done["at random"] < count or chosen:
        out = place / "killed"
        shutil.rmtree(out, ignore_errors=True)
        if done["at random"] < count:
            moment = dice.uniform(0, seconds)
            process, what = start(kind, out), f"killed after {moment:.2f} of {seconds:.2f} seconds"
            process.join(moment)
            process.kill()
            if finish(process) == 0:
                continue  # it was over before
            done["at random"] += 1
        else:
            last = chosen.pop()
            what = f"killed before {operations[last]!r}"
            assert finish(start(kind, out, last)) == -9, what
            done["before an operation"] += 1
        assert finish(start(kind, out)) == 0, f"{what}: {(out / 'said.txt').read_text()}"
        again = found(out / "out")
        assert again.keys() == told.keys(), f"{what}: not the same files"
        different = [file for file in told if told[file] != again[file]]
        assert not different, f"{what}: {different} differ"
        assert fingerprint(out / "out") == name, f"{what}: another fingerprint"
    return done | {"operations": len(operations)}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", list(COMMANDS))
def test_commands_that_are_killed_end_as_if_nobody_had(tmp_path: Path, kind: str) -> None:
    print(f"{kind}: {killed_children(kind, tmp_path, ROUNDS)}")
