"""Several processes that `torchrun` starts: who speaks when they fail, and grids that they share."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from crossguard import AdamW, Fit, FTStandard, Scenes, TeCoA, Tiny, ZeroShot, evaluate
from crossguard.errors import CrossguardError
from crossguard.processes import Processes, joined, leads, several, speaks
from crossguard.report import Report


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """What `torchrun` keeps beside its processes, and the environment that it gives the second of them."""
    made = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": made.port, "WORLD_SIZE": 3, "RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    return made


def test_one_process_speaks_for_all(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert several() and leads() and speaks()
    monkeypatch.setenv("RANK", "1")
    assert not leads() and not speaks()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # started again, they may fail again
    monkeypatch.setenv("RANK", "2")
    assert speaks(patience=0.1), "the first one has not failed"
    monkeypatch.setenv("RANK", "0")
    assert not speaks(), "it has been said"


def test_who_cannot_ask_the_others_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speaks() and leads() and joined().world == 1
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert speaks(), "no port"


def beside(work: Callable[[Processes], object], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What two processes end in that meet in one memory: a value, or an error."""
    barrier, said, mine = threading.Barrier(2), [None, None], threading.local()

    def meet(parts: list[object], value: object) -> None:
        said[mine.rank] = value
        barrier.wait(5)
        parts[:] = said
        barrier.wait(5)

    def run(rank: int) -> object:
        mine.rank = rank
        try:
            return work(Processes(rank, 2))
        except Exception as error:
            return error

    monkeypatch.setattr(dist, "all_gather_object", meet)
    with ThreadPoolExecutor(2) as both:
        return list(both.map(run, range(2)))


def test_what_processes_tell_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: Processes) -> object:
        with group.meeting():
            return group.gather(group.rank), group.tell(f"from {group.rank}"), group.each(range(5), lambda n: n * n)

    assert beside(work, monkeypatch) == [([0, 1], "from 0", [0, 1, 4, 9, 16])] * 2


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("meet", ["gather", "tell", "each", "together"])
def test_who_fails_between_two_meetings_says_so_at_the_next(
    rank: int, meet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(group: Processes) -> object:
        with group.meeting():
            group.gather(1)
            if group.rank == rank:
                raise OSError("the disk is gone")
            if meet == "together":
                with group.together():
                    return None
            return group.each([1, 2], str) if meet == "each" else getattr(group, meet)(1)

    ends = beside(work, monkeypatch)
    assert isinstance(ends[rank], OSError)
    assert isinstance(ends[1 - rank], CrossguardError)
    assert str(ends[1 - rank]) == f"process {rank} of 2 failed: the disk is gone"


def test_a_failure_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: Processes) -> object:
        with group.meeting(), group.together():
            if group.rank:
                raise CrossguardError("no such file")

    first, second = beside(work, monkeypatch)
    assert [str(first), str(second)] == ["process 1 of 2 failed: no such file", "no such file"]


GRID = """
task    = "ZeroShot(Scenes('color', count=40))"
budget  = "Linf(4/255)"
attack  = ["None", "PGD(steps=2)"]
[let]
DATA    = "Scenes('object', 'train', count=64)"
[model]
base    = "Tiny()"
one     = "Fit(FTStandard(steps=2, batch=8, optimizer=AdamW(lr=0.01)), Tiny(), DATA)"
other   = "Fit(TeCoA(steps=2, batch=8, optimizer=AdamW(lr=0.01), warmup=0), Tiny(), DATA)"
"""


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "crossguard"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280, cwd=folder, check=False)


@pytest.mark.slow
def test_processes_share_a_grid_with_models_that_are_to_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grid.toml").write_text(GRID.replace("other ", "lost = \"HuggingFace('nowhere/none')\"\nother "))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = torchrun(tmp_path, "run", "grid.toml")
    assert done.returncode != 0
    assert done.stdout.count("| base |") == 1 and "2 of 8 cells are not answered yet" in done.stdout
    assert done.stderr.count("crossguard: error: ") == 1
    assert "2 of 8 cells could not be answered: 'nowhere/none' is neither a folder here" in done.stderr
    reports = [Report.load(path) for path in (tmp_path / "runs/grid").glob("*.json") if path.name != "experiment.json"]
    assert len(reports) == 6
    monkeypatch.setenv("CROSSGUARD_FITS", str(tmp_path / "alone"))
    task, data = ZeroShot(Scenes("color", count=40)), Scenes("object", "train", count=64)
    rate = AdamW(lr=0.01)
    recipes = FTStandard(steps=2, batch=8, optimizer=rate), TeCoA(steps=2, batch=8, optimizer=rate, warmup=0)
    models = [Tiny(), *(Fit(recipe, Tiny(), data) for recipe in recipes)]
    alone = [evaluate(task, model) for model in models]
    shared = [
        next(one for one in reports if not one.attacked and one.question["model"] == other.question["model"])
        for other in alone
    ]
    assert [one.outcomes.clean.tolist() for one in shared] == [one.outcomes.clean.tolist() for one in alone]
    assert [one.outcomes.clean_margin.tolist() for one in shared] == [
        pytest.approx(one.outcomes.clean_margin.tolist(), abs=1e-3) for one in alone
    ]
    assert len({tuple(one.outcomes.clean_margin.tolist()) for one in alone}) == 3, "the models are others"


@pytest.mark.slow
def test_what_is_wrong_for_all_is_said_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "eval", "--task", "ZeroShot(Scenes())", "--model", "Tinny()")
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("unknown name 'Tinny'; did you mean 'Tiny'?") == 1
