"""A number that runs through values in the words of a grid, and the pictures of an experiment."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from crossguard import PGD, BitDepth, Linf, Scenes, Tiny, ZeroShot, cli, curves, evaluate
from crossguard.errors import CrossguardError
from crossguard.experiment import Experiment
from crossguard.report import Rate, Report
from crossguard.sweep import Sweep


@pytest.mark.parametrize(
    ("told", "values"),
    [
        ("0:1:0.125", (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)),
        ("0:0.3:0.1", (0.0, 0.1, 0.2, 0.3)),  # and not 0.30000000000000004
        ("0:1:0.4", (0.0, 0.4, 0.8)),
        ("1:7:3", (1, 4, 7)),
        ("4/255, 8/255", (4 / 255, 8 / 255)),
        ([0, 0.5, "1/1"], (0, 0.5, 1.0)),
        ("1,1,2", (1, 2)),
    ],
)
def test_values_are_what_people_mean(told: object, values: Sequence[float]) -> None:
    found = Sweep.read("alpha", told).values
    assert found == values
    assert [type(one) for one in found] == [type(one) for one in values]


@given(st.integers(-50, 50), st.integers(1, 60), st.integers(1, 40))
def test_a_range_holds_both_ends(first: int, count: int, parts: int) -> None:
    """In steps of a fraction, whatever it is rounded to."""
    last = first + count / parts
    found = Sweep.read("x", f"{first}:{last!r}:{1 / parts!r}").values
    assert len(found) == count + 1
    assert math.isclose(found[-1], last, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("name", "told", "says"),
    [
        ("PGD", "0:1:0.5", "cannot be over 'PGD'; take a name that no word has"),
        ("a b", "0:1:0.5", "cannot be over 'a b'"),
        ("x", "0:1", "written first:last:step"),
        ("x", "1:0:0.1", "goes up from first to last"),
        ("x", "0:1:0", "by a positive step"),
        ("x", "0:1:1e-6", "1000001 values"),
        ("x", "0.5", "needs two values or more"),
        ("x", "1,PGD()", "'PGD\\(\\)' is none"),
        ("x", "1,True", "'True' is none"),
        ("x", "0,,1", "'' is none"),
        ("x", 3, "or a list of numbers, not 3"),
    ],
)
def test_values_that_are_none_are_refused(name: str, told: object, says: str) -> None:
    with pytest.raises(CrossguardError, match=says):
        Sweep.read(name, told)


def loaded(folder: Path, text: str) -> Experiment:
    (folder / "grid.toml").write_text(text)
    return Experiment.load(folder / "grid.toml")


GRID = """
limit = 6
task = "ZeroShot(Scenes('object'))"
budget = "Linf(eps/255)"
[sweep]
eps = "0:8:4"
[model]
"small" = "Tiny()"
"bits" = "BitDepth(Tiny(), 3)"
[attack]
"clean" = "None"
"FGSM" = "PGD(steps=1, step=1.0, random_start=False)"
"""


def test_a_word_with_the_name_is_one_for_each_value(tmp_path: Path) -> None:
    grid = loaded(tmp_path, GRID)
    assert grid.grid["budget"] == {
        "Linf(0.0)": Linf(0.0), "Linf(4/255)": Linf(4 / 255), "Linf(8/255)": Linf(8 / 255),
    }  # fmt: skip
    assert grid.grid["model"] == {"small": Tiny(), "bits": BitDepth(Tiny(), 3)}
    cells = grid.cells()
    assert len(cells) == 2 * (1 + 3)  # who is not attacked has no budget
    assert [point for cell in cells for point in cell.points if cell.words["model"] == Tiny()] == [
        ("small", "FGSM", 0), ("small", "FGSM", 4), ("small", "FGSM", 8),
    ]  # fmt: skip


def test_what_is_named_by_let_runs_too_and_two_words_have_the_same_value(tmp_path: Path) -> None:
    grid = loaded(
        tmp_path,
        """
        task = "ZeroShot(Scenes('object'))"
        model = {coarse = "coarser", other = "Tiny()"}
        attack = {many = "PGD(steps=n)"}
        budget = "Linf(4/255)"
        [sweep]
        n = [2, 3]
        [let]
        coarse = "BitDepth(Tiny(), bits=n)"
        coarser = "BitDepth(coarse, 5)"
        """,
    )
    two, three = (BitDepth(BitDepth(Tiny(), bits), 5) for bits in (2, 3))
    assert grid.grid["model"] == {"coarse, n=2": two, "coarse, n=3": three, "other": Tiny()}
    assert grid.grid["attack"] == {"many, n=2": PGD(steps=2), "many, n=3": PGD(steps=3)}
    assert [(cell.words["attack"].steps, *cell.points) for cell in grid.cells()] == [
        (2, ("coarse", "many", 2)), (3, ("coarse", "many", 3)), (2, ("other", "many", 2)), (3, ("other", "many", 3)),
    ]  # fmt: skip


def test_two_words_of_one_name_are_refused(tmp_path: Path) -> None:
    grid = """
        task = "ZeroShot(Scenes('object'))"
        model = {"coarse, n=3" = "Tiny()", coarse = "BitDepth(Tiny(), bits=n)"}
        [sweep]
        n = [2, 3]
        """
    with pytest.raises(CrossguardError, match="model: two words are called 'coarse, n=3'"):
        loaded(tmp_path, grid)
    assert len(loaded(tmp_path, grid.replace('"coarse, n=3"', "other")).grid["model"]) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("eps/255", "4/255"), "nothing depends on eps"),
        (('eps = "0:8:4"', 'eps = "0:8:4"\nn = "1,2"'), "sweep must be a table of one name and its values"),
        (('eps = "0:8:4"', 'eps = "8"'), "needs two values or more"),
        (("eps/255", "ups/255"), "unknown name 'ups'"),
        (("[sweep]", "[let]\neps = '3'\n[sweep]"), "let cannot name a word 'eps'"),
    ],
)
def test_a_sweep_that_is_none_is_refused(change: tuple[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(CrossguardError, match=says):
        loaded(tmp_path, GRID.replace(*change))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    loaded(folder, GRID)
    assert run("run", folder / "grid.toml", "--out", folder / "out").exit_code == 0
    return folder / "out"


def test_points_are_the_numbers_of_the_reports(answered: Path) -> None:
    index = json.loads((answered / "experiment.json").read_text())
    reports = [Report.load(path) for path in answered.glob("*.json") if path.name != "experiment.json"]
    panels = curves.gathered(reports, index["sweep"]["points"])
    assert list(panels) == ["FGSM"] and list(panels["FGSM"]) == ["small", "bits"]
    attack = PGD(steps=1, step=1.0, random_start=False)
    for point in panels["FGSM"]["small"]:
        assert point.value is not None
        alone = evaluate(ZeroShot(Scenes("object")), Tiny(), attack, Linf(point.value / 255), limit=6)
        assert (point.clean, point.robust) == alone.parts[0][1:]
    assert [point.value for point in panels["FGSM"]["small"]] == [0, 4, 8]
    robust = [point.robust.value for point in panels["FGSM"]["small"]]
    assert robust[0] == panels["FGSM"]["small"][0].clean.value > robust[2]


def test_a_run_draws_its_sweep(answered: Path) -> None:
    with Image.open(answered / "sweep.png") as picture:
        wide, high = picture.size
    assert wide > 300 and 200 < high < 450  # clean accuracy stands still: no trade is drawn
    assert not (answered / "training.png").exists()


def test_values_near_each_other_are_told_apart(tmp_path: Path) -> None:
    text = GRID.replace('"0:8:4"', "[0.1234561, 0.1234562]")
    text = text.replace('budget = "Linf(eps/255)"', "") + '[budget]\n"near" = "Linf(eps/255)"\n'
    assert loaded(tmp_path, text).grid["budget"] == {
        "near, eps=0.1234561": Linf(0.1234561 / 255), "near, eps=0.1234562": Linf(0.1234562 / 255),
    }  # fmt: skip
    assert [Sweep("x", (4 / 255, 8 / 255)).spelled(one) for one in (4 / 255, 8 / 255)] == ["0.0156863", "0.0313725"]
    large = (10**20, 10**20 + 1)
    assert [Sweep("x", large).spelled(one) for one in large] == [str(one) for one in large]


def rate(successes: int) -> Rate:
    return Rate(successes, 10)


def test_where_clean_accuracy_moves_robust_is_drawn_over_it() -> None:
    still = {"image": {"a": [curves.Point(x, rate(9), rate(9 - x)) for x in (0, 1)]}}
    moving = {"image": {"a": [curves.Point(x, rate(9 - x), rate(x)) for x in (0, 1)]}}
    fixed = {"image": {"a": still["image"]["a"], "b": [curves.Point(None, rate(9), rate(5))]}}
    sizes = []
    for panels in (still, moving, fixed):
        with Image.open(io.BytesIO(curves.sweep_picture("alpha", panels))) as picture:
            sizes.append(picture.size[1])
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    assert sizes[1] > 1.5 * sizes[0] == 1.5 * sizes[2]


def test_the_command_line_asks_for_each_value(tmp_path: Path) -> None:
    asked = ["sweep", "--task", "ZeroShot(Scenes('object'))", "--limit", 4, "--attack", "PGD(steps=1)"]
    bits = ["--model", "bits=BitDepth(Tiny(), bits=b)", "--eps", "4/255", "--over", "b=1,8"]
    told = run(*asked, *bits, "--out", tmp_path / "bits")
    assert told.exit_code == 0, told.output
    assert "| bits, b=1 |" in told.output and "| bits, b=8 |" in told.output
    assert (tmp_path / "bits" / "sweep.png").exists()
    told = run(*asked, "--model", "Tiny()", "--eps", "e/255", "--over", "e=0:4:4", "--out", tmp_path / "eps")
    assert told.exit_code == 0, told.output
    assert "| model | clean | PGD(steps=1), Linf(0.0) | PGD(steps=1), Linf(4/255) |" in told.output


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--over", "alpha"], "--over must be a name and its values, such as alpha=0:1:0.125, not 'alpha'"),
        (["--over", "alpha=0"], "--over: a sweep over alpha needs two values"),
        (["--over", "alpha=0:1:0.5"], "nothing depends on alpha; put it into a word"),
        (["--over", "alpha=0:1:0.5", "--model", "Interpolate(Tiny(), Tiny(), alpha)"], "did you mean"),
        (["--over", "alpha=0:2:1", "--model", "Interpolated(Tiny(), Tiny(), alpha)"], "--model: Interpolated"),
        (["--over", "alpha=0:1:0.5", "--eps", "beta/255"], "must be a number such as 4/255"),
    ],
)
def test_what_the_command_line_cannot_sweep_is_said(given: list[str], says: str, tmp_path: Path) -> None:
    asked = ["--task", "ZeroShot(Scenes('object'))", "--attack", "PGD()", "--out", str(tmp_path), *given]
    for option, usual in (("--eps", "4/255"), ("--model", "Tiny()")):
        asked += [] if option in given else [option, usual]
    told = run("sweep", *asked)
    assert told.exit_code == 2
    assert says in " ".join(told.output.split())


def test_a_run_draws_what_its_trainings_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_FITS", str(tmp_path / "fits"))
    seen = "Validation(Subset(Scenes('object', 'val'), 4), image_attack=PGD(steps=1))"
    fit = f"Fit(TeCoA(steps=2, warmup=0, batch=4, validate={seen}), Tiny(), Subset(Scenes('object', 'train'), 4))"
    grid = f"task = \"ZeroShot(Scenes('object'))\"\nlimit = 2\n[model]\n'TeCoA' = \"{fit}\"\n'base' = 'Tiny()'\n"
    (tmp_path / "grid.toml").write_text(grid)
    told = run("run", tmp_path / "grid.toml", "--out", tmp_path / "out")
    assert told.exit_code == 0, told.output
    index = json.loads((tmp_path / "out" / "experiment.json").read_text())
    assert list(index["trained"]) == ["TeCoA"]
    record = json.loads((Path(index["trained"]["TeCoA"]) / "crossguard.json").read_text())
    assert [one["step"] for one in record["validation"]] == [1, 2]
    with Image.open(tmp_path / "out" / "training.png") as picture:
        assert picture.size[0] > picture.size[1]  # two panels: clean and robust
    assert not (tmp_path / "out" / "sweep.png").exists()
