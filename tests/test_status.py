"""What long work says of itself: parts of attacks, bars and logs, notes beside locks, `crossguard status`."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crossguard import (
    APGD,
    DLR,
    PGD,
    CrossguardError,
    EachTarget,
    Experiment,
    Linf,
    Square,
    Worst,
    bar,
    experiment,
    files,
    turns,
)
from crossguard.bar import Bar
from crossguard.status import status
from crossguard.telling import listening, part, tell
from test_cli import asked, call, error, evaluation, grid
from test_report import report
from toys import convnet, templates

__all__ = ["asked", "grid"]  # fixtures

# What attacks say


def heard(work: Callable[[], Any]) -> tuple[list[str], Any]:
    said: list[str] = []
    with listening(said.append):
        made = work()
    return said, made


def standing(images: torch.Tensor, labels: torch.Tensor) -> int:
    return int((convnet()(images).argmax(1) == labels).sum())


def test_an_ensemble_says_which_part_runs_and_how_many_images_stand():
    images, labels = templates(24)
    parts = (PGD(steps=1), APGD(steps=4), Square(queries=4))
    budget = Linf(0.03)
    said, made = heard(lambda: Worst(parts)(convnet(), images, labels, budget))
    ends = [line for line in said if "->" in line]
    names = ["PGD(steps=1) (1 of 3)", "APGD(steps=4) (2 of 3)", "Square(queries=4) (3 of 3)"]
    counts = [re.fullmatch(r"(.*), (\d+) -> (\d+) standing", line) for line in ends]
    assert [found and found[1] for found in counts] == names
    told = [(int(found[2]), int(found[3])) for found in counts if found]
    assert told[0][0] == standing(images, labels) and told[-1][1] == standing(made, labels) < told[0][0]
    assert [before for before, _ in told[1:]] == [after for _, after in told[:-1]], "who fell fell for good"
    assert told[0][1] == standing(Worst(parts[:1])(convnet(), images, labels, budget), labels)
    assert (
        f"{names[1]}, {told[0][1]} standing" in said and f"{names[1]}, step 1 of 4, {told[0][1]} images go on" in said
    )


def test_a_part_inside_a_part_says_where_it_belongs():
    images, labels = templates(8)
    attack = Worst((EachTarget(PGD(steps=2), 3), PGD(steps=2, loss=DLR())))
    said, _ = heard(lambda: attack(convnet(), images, labels, Linf(0.02)))
    outer = "EachTarget(attack=PGD(steps=2), targets=3) (1 of 2)"
    assert next(line for line in said if "class 2 of 3" in line).startswith(f"{outer}, class 2 of 3, ")
    assert any(re.fullmatch(rf"{re.escape(outer)}, \d+ -> \d+ standing", line) for line in said)


def test_nothing_is_asked_for_where_nobody_listens():
    class Costly:
        def __format__(self, _: str) -> str:
            pytest.fail("an accelerator was waited for")

    with part("{}", Costly()):
        tell("{}", Costly())
    with pytest.raises(CrossguardError), listening(lambda _: None):
        raise CrossguardError("x")
    tell("{}", Costly())


# Bars and logs


def test_a_line_a_minute_is_written_though_nothing_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bar, "EVERY", 0.04)
    with Bar() as shown:
        shown.step("evaluating")
        shown.progress(0, 60)
        shown.part("APGD() (1 of 4), 60 -> 22 standing")
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2, "one would be from `part`"
    assert re.fullmatch(r"evaluating: 0/60 samples after 0 seconds; APGD\(\) \(1 of 4\), 60 -> 22 standing", lines[-1])


def test_the_time_that_is_left_is_that_of_the_samples_here():
    shown = Bar()
    shown.step("evaluating")
    assert shown.left(10.0) is None
    shown.progress(40, 100)  # known from before
    assert shown.left(10.0) is None
    shown.progress(60, 100)
    assert shown.left(30.0) == 60.0, "20 took 30 seconds, and 40 are left"


def test_a_grid_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = [1000.0]
    monkeypatch.setattr(bar.time, "monotonic", lambda: clock[0])
    shown = Bar()
    shown.start(10, 4)
    clock[0] += 600.0
    shown.answers(experiment.Cell("a, b", {}, {}), report([0]))
    assert capsys.readouterr().err.splitlines() == [
        "10 cells, 4 answered already", "[5/10] a, b: clean 100.0 % [20.7, 100.0]; about 50 minutes left",
    ]  # fmt: skip
    shown.asks(experiment.Cell("c", {}, {}))
    shown.progress(3, 8)
    assert shown.interrupted() == (" after 5 of 10 cells and 3 of 8 samples of the next; run the same command to go on")


# Notes beside locks


def test_a_note_says_who_works_and_forgets_who_is_gone(tmp_path: Path):
    lock = tmp_path / "cell"
    with turns.noted(lock, "base: 0 of 8 samples"):
        one = turns.worker(lock)
        assert one is not None and one.name == f"process {os.getpid()}" and one.doing == "base: 0 of 8 samples"
        assert abs(one.since - time.time()) < 10 and turns.workers(tmp_path) == {"cell": one}
        note = json.loads((tmp_path / "cell.who").read_text())
        (tmp_path / "cell.who").write_text(json.dumps(note | {"where": "gpu7", "machine": "gpu7\x1b[31m"}))
        far = turns.worker(lock)
        assert (
            far is not None and far.name == rf"process {os.getpid()} on gpu7\x1b[31m" and "last heard of" in far.times
        )
        (tmp_path / "cell.who").write_text(json.dumps(note | {"process": 2**22 + 1}))  # beyond what Linux gives
        assert turns.worker(lock) is None, "it is gone"
        for broken in ("{", "[]", json.dumps(note | {"process": "x"}), json.dumps(note | {"process": 2**70})):
            (tmp_path / "cell.who").write_text(broken)
            assert turns.worker(lock) is None
    assert not list(tmp_path.iterdir()) and turns.worker(lock) is None


def test_a_note_is_not_written_at_each_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with turns.noted(tmp_path / "cell", "a") as note:
        note.say("b")
        assert (one := turns.worker(tmp_path / "cell")) and one.doing == "a"
        monkeypatch.setattr(turns, "EVERY", 0.0)
        note.say("c")
        assert (one := turns.worker(tmp_path / "cell")) and one.doing == "c"


# Status


@pytest.fixture
def held(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The third question stays at 5 of 10 samples until this is set."""
    monkeypatch.setattr(experiment, "POLL", 0.01)
    monkeypatch.setattr(turns, "EVERY", 0.0)
    answer, go = evaluation.evaluate, threading.Event()

    def waiting(*arguments: Any, progress: Callable[[int, int], None], **settings: Any) -> Any:
        if len(asked) == 2:
            progress(5, 10)
            tell("step {} of {}", 3, 100)
            assert go.wait(20)
        return answer(*arguments, progress=progress, **settings)

    monkeypatch.setattr(evaluation, "evaluate", waiting)
    yield go
    go.set()


def until(told: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not told():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_status_of_a_grid_says_what_runs_who_waits_and_what_is_left(grid: Path, held: threading.Event):
    wanted, out = Experiment.load(grid), grid.parent / "out"
    run = threading.Thread(target=lambda: wanted.run(out))
    run.start()
    until(lambda: any("step 3" in one.doing for one in turns.workers(out / ".locks").values()))
    first, *lines = status(out)
    me = f"process {os.getpid()}"
    assert first == f"{out}: 2 of 6 cells of {grid} are answered, 1 in work"
    assert re.fullmatch(
        rf"  running: base, Substitute\(\): 5 of 10 samples, step 3 of 100 \({me}, since \d\d:\d\d\)", lines[0]
    )
    assert lines[1:] == [f"  left: coarse, {one}" for one in ("clean", "PGD(steps=100)", "Substitute()")]
    assert status(out.parent)[0] == first, "a folder of folders"
    held.set()
    run.join(20)
    assert status(out) == [f"{out}: 6 of 6 cells of {grid} are answered"]
    assert call("status", str(out)).stdout == f"{out}: 6 of 6 cells of {grid} are answered\n"


def test_a_process_that_waits_says_for_whom(grid: Path, held: threading.Event, capsys: pytest.CaptureFixture[str]):
    grid.write_text(grid.read_text().replace(', coarse = "BitDepth(Tiny(), bits=3)"', ""))
    wanted, out = Experiment.load(grid), grid.parent / "out"
    run = threading.Thread(target=lambda: wanted.run(out))
    run.start()
    until(lambda: any("step 3" in one.doing for one in turns.workers(out / ".locks").values()))
    shown = Bar()
    other = threading.Thread(target=lambda: wanted.run(out, shown))
    other.start()
    until(lambda: bool(turns.workers(out / ".locks", "cells.")))
    me = f"process {os.getpid()}"
    line = next(line for line in status(out) if "waiting" in line)
    assert line.startswith(f"  waiting: {me} waits for {me} (Substitute(): 5 of 10 samples, step 3 of 100), since ")
    held.set()
    run.join(20)
    other.join(20)
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert said == [f"waiting for {me} (1 cell): Substitute(): 5 of 10 samples, step 3 of 100"], "said once"


def test_the_status_of_trainings_and_of_what_waits_for_them(grid: Path, monkeypatch: pytest.MonkeyPatch):
    fits = grid.parent / "fits"
    monkeypatch.setenv("CROSSGUARD_FITS", str(fits))
    grid.write_text('task = "ZeroShot(Scenes())"\nmodel = ["Tiny()", "Fit(TeCoA(), Tiny(), Scenes())"]\n')
    wanted, out = Experiment.load(grid), grid.parent / "out"
    cells = wanted.cells()
    out.mkdir()
    (out / "experiment.json").write_text(json.dumps(wanted._index(cells)))
    (folder,) = experiment._fits(cells[1])
    name = Path(folder).name
    lines = [
        f"{out}: 0 of 2 cells of {grid} are answered", f"  {folder}: a training, not begun", "  left: Tiny()",
        f"  left: Fit(TeCoA(), Tiny(), Scenes()), when {name} is trained",
    ]  # fmt: skip
    assert status(out) == lines
    files.save_tensors(Path(folder) / "training.safetensors", {"a": torch.zeros(1)}, {"step": "40"})
    assert status(out)[1] == f"  {folder}: a training, stopped; saved after step 40"
    assert status(fits) == [f"{folder}: a training, stopped; saved after step 40"]
    with turns.owned(Path(folder), "trains"):
        running = status(fits)
    assert running[0] == f"{folder}: a training, saved after step 40" and running[1].startswith("  running: trains (")
    (Path(folder) / "crossguard.json").write_text('{"steps": 90, "seconds": 600.0, "loss": 1.25}')
    assert status(fits) == [f"{folder}: a training, finished: 90 steps in 10 minutes, loss 1.25"]
    assert status(out)[1:] == ["  left: Tiny()", "  left: Fit(TeCoA(), Tiny(), Scenes())"]


def test_what_is_no_work_of_ours_has_no_status(tmp_path: Path):
    assert "there is no folder" in error("status", str(tmp_path / "none"))
    assert f"nothing in {tmp_path} is a run" in error("status", str(tmp_path))


def test_answers_are_found_whatever_they_are_called(grid: Path, asked: list[dict[str, Any]]):
    wanted, out = Experiment.load(grid), grid.parent / "out"
    wanted.run(out)
    assert len(asked) == 6
    names = sorted(path.name for path in out.glob("*.json"))
    assert [name.rpartition(".")[0].rpartition(".")[0] for name in names if name != "experiment.json"] == [
        "base-PGD-steps=100", "base-Substitute", "base-clean", "coarse-PGD-steps=100", "coarse-Substitute",
        "coarse-clean",
    ]  # fmt: skip
    grid.write_text(grid.read_text().replace("coarse =", '"3 bits/2" ='))
    again = Experiment.load(grid)
    assert {cell.file[:8] for cell in again.cells()} == {"base-cle", "base-PGD", "base-Sub", "3-bits_2"}
    assert len(again.run(out)) == 6 and len(asked) == 6, "the hash is the truth"


def test_the_status_of_a_grid_says_why_a_cell_failed(tmp_path: Path):
    path, out = tmp_path / "grid.toml", tmp_path / "out"
    path.write_text("task = \"ZeroShot(Scenes('object'))\"\nmodel = {lost = \"HuggingFace('./lost')\"}\nlimit = 2\n")
    with pytest.raises(CrossguardError) as raised:
        Experiment.load(path).run(out)
    (line,) = status(out)[1:]
    assert line.startswith("  failed: ") and line.partition("lost: ")[2] and "./lost" in line
    assert line.rpartition(": ")[2][:40] in str(raised.value)
