"""What is crafted on a surrogate is crafted once, however many models are asked about it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from crossguard import (
    PGD,
    SGA,
    BitDepth,
    Both,
    GaussianNoise,
    Linf,
    Retrieval,
    Scenes,
    SepAttack,
    Substitute,
    TextBugger,
    Tiny,
    Words,
    ZeroShot,
    evaluate,
)
from crossguard.attacks import crafted
from crossguard.attacks.base import Attack
from crossguard.budgets import Budget
from crossguard.evaluate import craft_key, question
from crossguard.experiment import Cell, Experiment, Watch
from crossguard.files import WriteError
from crossguard.models.base import VisionLanguageModel
from crossguard.report import Report
from crossguard.tasks.base import Task

MODELS = {"plain": Tiny(), "five": BitDepth(Tiny(), bits=5), "three": BitDepth(Tiny(), bits=3)}
CASES: list[tuple[Task, Attack, Budget]] = [
    (ZeroShot(Scenes("object")), PGD(steps=2), Linf(4 / 255)),
    (ZeroShot(Scenes("object")), SepAttack(PGD(steps=2)), Both(Linf(4 / 255), Words(1))),
    (Retrieval(Scenes("object")), SGA(PGD(steps=2)), Both(Linf(4 / 255), Words(1))),
    (Retrieval(Scenes("object"), gallery="clean"), PGD(steps=2), Linf(4 / 255)),
]


def grid(task: Task, attack: Attack, budget: Budget, models: dict[str, VisionLanguageModel]) -> Experiment:
    axes = {"task": {"t": task}, "model": models, "attack": {"a": attack}, "budget": {"b": budget}, "surrogate": models}
    return Experiment(axes, seed=3, limit=6, batch=4)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that PGD was given."""
    found: list[int] = []
    search = PGD.search

    def counting(self: PGD, victim: Any, clean: Any, *rest: Any) -> Any:
        found.append(len(clean))
        return search(self, victim, clean, *rest)

    monkeypatch.setattr(PGD, "search", counting)
    return found


def columns(report: Report) -> dict[str, list[Any]]:
    return {name: list(map(str, column)) for name, column in vars(report.outcomes).items() if name[0] != "_"}


@pytest.mark.parametrize(("task", "attack", "budget"), CASES)
def test_every_pair_gets_the_answer_that_it_gets_alone(
    tmp_path: Path, task: Task, attack: Attack, budget: Budget
) -> None:
    models = {name: MODELS[name] for name in ("plain", "three")}
    found = grid(task, attack, budget, models).run(tmp_path)
    for report, (model, surrogate) in zip(found, itertools.product(models.values(), repeat=2), strict=True):
        alone = evaluate(task, model, attack, budget, surrogate, limit=6, seed=3, batch=4)
        assert dict(report.question) == dict(alone.question)
        assert columns(report) == columns(alone)
        assert report.notes == alone.notes
    assert sum(report.outcomes.gradients.sum() for report in found) > 0


@pytest.mark.parametrize(("task", "attack", "budget"), CASES[:2])
def test_each_surrogate_is_attacked_once(
    tmp_path: Path, searches: list[int], task: Task, attack: Attack, budget: Budget
) -> None:
    grid(task, attack, budget, MODELS).run(tmp_path)
    assert searches == 3 * [4, 2]
    assert not any((tmp_path / ".crafts").iterdir())


@pytest.mark.parametrize("task", [CASES[0][0], CASES[2][0]], ids=["prompts", "captions"])
def test_images_that_stay_are_not_judged_anew(tmp_path: Path, task: Task) -> None:
    """A random model would draw other noise, and nothing of an image need be kept where only texts change."""
    noisy, attack = GaussianNoise(Tiny(), std=0.1), TextBugger()

    def ask(crafts: Path | None) -> Report:
        return evaluate(task, noisy, attack, Words(1), Tiny(), limit=6, seed=3, batch=4, crafts=crafts)

    alone = ask(None)
    for _ in range(2):
        assert columns(ask(tmp_path)) == columns(alone)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) < 32 * 32 * 3 * 4


def test_a_disk_without_room_for_what_was_crafted_stops_nothing(
    tmp_path: Path, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise WriteError("no space left on device")

    monkeypatch.setattr(crafted, "save_tensors", full)
    assert len(grid(*CASES[0], MODELS).run(tmp_path)) == 9
    assert searches == 9 * [4, 2]


def test_who_finds_another_process_crafting_waits_for_it(tmp_path: Path) -> None:
    experiment = grid(*CASES[0], MODELS)
    busy = experiment.cells()[0]
    (tmp_path / ".locks").mkdir()
    lock = FileLock(tmp_path / ".locks" / busy.key, thread_local=False)
    lock.acquire()
    asked: list[str] = []

    class Releasing(Watch):
        def asks(self, cell: Cell) -> None:
            assert cell.craft != busy.craft or not lock.is_locked
            asked.append(cell.craft)

        def waits(self, cells: int, others: Mapping[str, str]) -> None:
            assert cells == 3 and len(asked) == 6 and others == {}
            lock.release()

    assert len(experiment.run(tmp_path, Releasing())) == 9
    assert asked.count(busy.craft) == 3


def test_what_a_killed_run_left_is_dropped(tmp_path: Path) -> None:
    (tmp_path / ".crafts" / "old").mkdir(parents=True)
    (tmp_path / ".crafts" / "old" / "images-0.safetensors").write_bytes(b"")
    grid(*CASES[0], {"plain": Tiny()}).run(tmp_path)
    assert not any((tmp_path / ".crafts").iterdir())


def test_one_model_alone_keeps_nothing(tmp_path: Path, searches: list[int]) -> None:
    class Looking(Watch):
        def progress(self, done: int, total: int) -> None:
            assert not (tmp_path / ".crafts").exists()

    grid(*CASES[0], {"plain": Tiny()}).run(tmp_path, Looking())
    assert searches == [4, 2]


def test_a_run_that_was_killed_goes_on_with_what_it_crafted(tmp_path: Path, searches: list[int]) -> None:
    class Killed(Exception):
        pass

    class Killing(Watch):
        cells = 0

        def asks(self, cell: object) -> None:
            self.cells += 1

        def progress(self, done: int, total: int) -> None:
            if self.cells == 2 and done > 4:
                raise Killed

    with pytest.raises(Killed):
        grid(*CASES[0], MODELS).run(tmp_path, Killing())
    assert searches == [4, 2]
    again = grid(*CASES[0], MODELS).run(tmp_path)
    assert searches == 3 * [4, 2]
    whole = grid(*CASES[0], MODELS).run(tmp_path / "whole")
    assert [columns(one) for one in again] == [columns(one) for one in whole]


def damaged(file: Path, damage: str) -> None:
    tensors, texts = load_file(file), "[]"
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "no safetensors":
        file.write_bytes(b"no safetensors at all")
    elif damage == "another pixel":
        tensors["images"][0, 0, 0, 0] += 0.5
        save_file(tensors, file, {"texts": texts, "digest": crafted._digest(load_file(file), texts)})
    else:  # well formed, but not what is made
        if damage in tensors:
            tensors.pop(damage)
        elif damage == "shape":
            tensors["images"] = tensors["images"][:1]
        elif damage == "type":
            tensors["images"] = tensors["images"].double()
        elif damage == "more":
            tensors["others"] = tensors["images"].clone()
        elif damage == "texts":
            texts = '["a"]'
        else:
            assert damage == "deep"
            texts = "[" * 100_000
        save_file(tensors, file, {"texts": texts, "digest": crafted._digest(tensors, texts)})


DAMAGES = [
    "empty",
    "no safetensors",
    "another pixel",
    "images",
    "forwards",
    "gradients",
    "shape",
    "type",
    "more",
    "texts",
    "deep",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_broken_is_crafted_anew(tmp_path: Path, searches: list[int], damage: str) -> None:
    task, attack, budget = CASES[0]

    def ask(model: VisionLanguageModel) -> Report:
        return evaluate(task, model, attack, budget, Tiny(), limit=6, seed=3, batch=4, crafts=tmp_path)

    ask(MODELS["five"])
    (folder,) = tmp_path.iterdir()
    for file in folder.glob("images-*"):
        damaged(file, damage)
    found = ask(MODELS["three"])
    assert searches == 2 * [4, 2]
    alone = evaluate(task, MODELS["three"], attack, budget, Tiny(), limit=6, seed=3, batch=4)
    assert columns(found) == columns(alone)


def test_only_who_is_asked_may_differ_between_those_that_share() -> None:
    task, attack, budget = CASES[1]

    def asked(model: VisionLanguageModel = MODELS["five"], **other: Any) -> str:
        given: dict[str, Any] = {"task": task, "attack": attack, "budget": budget, "surrogate": Tiny()} | other
        return craft_key(question(model=model, **given))

    others: Sequence[dict[str, Any]] = (
        {"task": CASES[2][0]},
        {"attack": SepAttack(PGD(steps=3))},
        {"attack": SepAttack(PGD(steps=2), Substitute(top=3))},
        {"budget": Both(Linf(4 / 255), Words(2))},
        {"surrogate": BitDepth(Tiny(), bits=2)},
        {"limit": 5},
        {"seed": 1},
    )
    assert asked() == asked(MODELS["three"]) == asked(Tiny())
    assert len({asked(), *(asked(**other) for other in others)}) == 1 + len(others)
