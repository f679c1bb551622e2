"""Tables for papers: pivots, means, classes, bold, LaTeX, published values and claims."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossguard import Above, CrossguardError, Experiment, curves
from crossguard.compare import Average, apart, difference
from crossguard.pivot import AXES, Cell, Layout, Published, Table, mark
from crossguard.report import Rate, Report, Texts
from crossguard.table import Answers, render
from test_cli import asked, call, error, grid
from test_report import report, saved

__all__ = ["asked", "grid"]  # fixtures

SMALL, LARGE = {"budget": "Linf(eps=1/255)"}, {"budget": "Linf(eps=4/255)"}
PGD, FAB = {"attack": "PGD(steps=100)"}, {"attack": "FAB(steps=100)"}


def of(right: int, n: int = 20, first: int = 0, **question: str) -> Report:
    """A report of `n` samples, all right clean, of which `right` stand, from `first` on."""
    adversarial = [0 if (place - first) % n < right else 1 for place in range(n)]
    return report([0] * n, adversarial, **question)


def shares(cells: Sequence[Cell]) -> list[float | None]:
    return [None if cell.rate is None else round(100 * cell.rate.value, 3) for cell in cells]


def numbers(table: Table) -> dict[str, dict[str, float | None]]:
    return {label: dict(zip(table.columns, shares(cells), strict=True)) for label, cells in table.rows}


@pytest.fixture
def papers(tmp_path: Path) -> Answers:
    """Two models on two tasks under two attacks and two budgets; one cell is not answered."""
    found: list[Report] = []
    for task, model, attack, budget in itertools.product(("A()", "B()"), ("M()", "N()"), (PGD, FAB), (SMALL, LARGE)):
        right = 4 + 8 * (model == "N()") + 4 * (task == "B()") - 2 * (attack is FAB) - (budget is LARGE)
        if (task, model, attack, budget) != ("B()", "N()", FAB, LARGE):
            found.append(of(right, **attack, **budget, task=task, model=model, short={"task": task}))
    return saved(tmp_path, *found)


# Rows and columns


def test_any_part_of_a_question_makes_rows_and_columns(papers: Answers) -> None:
    (table,) = papers.tables(Layout(("model", "budget"), ("task", "attack")))
    assert table.columns == (
        "A(), clean", "A(), PGD(steps=100)", "A(), FAB(steps=100)",
        "B(), clean", "B(), PGD(steps=100)", "B(), FAB(steps=100)",
    )  # fmt: skip
    said = numbers(table)
    assert list(said) == [
        "M(), Linf(eps=1/255)",
        "M(), Linf(eps=4/255)",
        "N(), Linf(eps=1/255)",
        "N(), Linf(eps=4/255)",
    ]
    assert list(said["M(), Linf(eps=4/255)"].values()) == [100, 15, 5, 100, 35, 25]
    assert list(said["N(), Linf(eps=4/255)"].values()) == [100, 55, 45, 100, 75, None]
    assert "task" not in table.header and table.header["n"] == "20" and table.corner == "model, budget"


def test_what_is_in_neither_makes_tables_of_their_own(papers: Answers) -> None:
    tables = papers.tables(Layout(("model",), ("task",)))
    heads = [(table.header["attack"], table.header.get("budget")) for table in tables]
    assert sorted(heads, key=str) == sorted(
        [
            ("clean", None), *itertools.product(
                ("PGD(steps=100)", "FAB(steps=100)"), ("Linf(eps=1/255)", "Linf(eps=4/255)")
            ),
        ],
        key=str,
    )  # fmt: skip
    clean = next(table for table in tables if table.header["attack"] == "clean")
    assert numbers(clean) == {"M()": {"A()": 100, "B()": 100}, "N()": {"A()": 100, "B()": 100}}
    assert "knowledge" not in clean.header and "surrogate" not in clean.header


def test_no_number_is_lost_or_moved_however_it_is_laid_out(papers: Answers) -> None:
    axes = ("task", "model", "attack", "budget")
    wanted = sorted((one.robust.value, *(one.question[axis] for axis in axes)) for one in papers.reports)
    for count in (1, 2, 3):
        for rows in itertools.permutations(axes, count):
            for columns in itertools.permutations([axis for axis in (*axes, "seed") if axis not in rows], 2):
                found: list[tuple[Any, ...]] = []
                for table in papers.tables(Layout(rows, columns)):
                    for label, cells in table.rows:
                        for column, cell in zip(table.columns, cells, strict=True):
                            said = f"{label}, {column}, {', '.join(table.header.values())}"
                            if cell.rate is not None and "clean" not in said:
                                places = [
                                    next(
                                        word for word in {one.question[axis] for one in papers.reports} if word in said
                                    )
                                    for axis in axes
                                ]
                                found.append((cell.rate.value, *places))
                assert sorted(found) == wanted, (rows, columns)


def test_clean_numbers_stand_in_each_row_that_they_belong_to(tmp_path: Path) -> None:
    answers = saved(
        tmp_path,
        of(8, **PGD, **SMALL),
        of(4, **PGD, **LARGE),
        report([0] * 15 + [1] * 5),  # the model that was attacked, asked without
        report([0] * 10 + [1] * 10, model="N()"),  # never attacked
    )
    (table,) = answers.tables(Layout(("model", "budget"), ("attack",)))
    clean, attacked = "clean", "PGD(steps=100)"
    assert numbers(table) == {
        "M(), Linf(eps=1/255)": {clean: 75, attacked: 40},
        "M(), Linf(eps=4/255)": {clean: 75, attacked: 20},
        "N()": {clean: 50, attacked: None},
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rows", "modle"), "there are no rows of 'modle'; give one of task, model, "),
        (("--columns", "model"), "'model' cannot make rows and columns twice"),
        (("--digits", "-1"), "digits must be a whole number of at least 0, not -1"),
        (("--rows", "model", "--per-class"), "--per-class makes the rows, and so does --rows"),
        (("--transfer", "--mean"), "--transfer lays its tables out itself"),
        (("--per-class", "--mean"), "a mean over tasks has no classes"),
    ],
)
def test_mistakes_of_layouts(options: tuple[str, ...], said: str, papers: Answers, tmp_path: Path) -> None:
    assert said in error("table", str(tmp_path), *options)
    assert all(axis in AXES for axis in (*Layout().rows, *Layout().columns))


# Means


def test_the_mean_counts_each_task_alike_and_only_where_all_were_asked(papers: Answers) -> None:
    (table,) = papers.tables(Layout(("model", "attack", "budget"), ("task",), mean=True))
    assert table.columns == ("A()", "B()", "mean over tasks (2)")
    said = numbers(table)
    assert list(said["M(), PGD(steps=100), Linf(eps=1/255)"].values()) == [20, 40, 30]
    assert list(said["N(), FAB(steps=100), Linf(eps=4/255)"].values()) == [45, None, None]
    apart_by_task = papers.tables(Layout(mean=True))
    assert [one.header["task"] for one in apart_by_task] == ["A()", "B()", "mean over tasks (2)"]
    assert numbers(apart_by_task[-1])["M()"]["PGD(steps=100), Linf(eps=1/255)"] == 30
    assert "each task alike" in apart_by_task[-1].legend and "each task" not in apart_by_task[0].legend


def test_the_interval_of_a_mean_is_that_of_independent_tasks() -> None:
    one = Rate(30, 100)
    assert Average((one,)).interval == pytest.approx(one.interval)
    low, high = one.interval
    four = Average((one,) * 4)
    assert four.value == pytest.approx(0.3) and four.n == 400
    assert four.interval == pytest.approx((0.3 - (0.3 - low) / 2, 0.3 + (high - 0.3) / 2)), (
        "a mean of four: half as wide"
    )
    assert Average((Rate(0, 50), Rate(0, 50))).interval[1] > 0.04, "nothing seen is not nothing there"
    rng = np.random.default_rng(0)
    shares, sizes = np.array([0.05, 0.4, 0.9]), np.array([60, 100, 200])
    covered = 0
    for _ in range(2000):
        counts = rng.binomial(sizes, shares)
        low, high = Average(tuple(Rate(int(c), int(n)) for c, n in zip(counts, sizes, strict=True))).interval
        covered += low <= shares.mean() <= high
    assert 0.93 <= covered / 2000 <= 0.975


@pytest.mark.parametrize(
    ("one", "other", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 873-890, Table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ],
)
def test_differences_of_other_samples_are_the_published_ones(
    one: tuple[int, int], other: tuple[int, int], low: float, high: float
) -> None:
    assert apart(Rate(*one), Rate(*other))[1:] == pytest.approx((low, high), abs=5e-5)


# Classes


def test_a_row_for_each_class(tmp_path: Path) -> None:
    one = of(6, 8, **PGD, **SMALL)
    labels = [0, 0, 0, 1, 1, 1, 1, 1]
    outcomes = replace(one.outcomes, label=labels, clean=[0, 0, 1, 1, 1, 1, 1, 0], adversarial=[0, 1, 0, 1, 1, 0, 0, 1])
    named = replace(one, outcomes=outcomes, texts=Texts(("a cat", "50 % dog")))
    answers = saved(tmp_path, named)
    (table,) = answers.tables(Layout(("class",), ("attack", "budget")))
    attack = "PGD(steps=100), Linf(eps=1/255)"
    assert numbers(table) == {"a cat": {"clean": 66.667, attack: 33.333}, "50 % dog": {"clean": 80, attack: 40}}
    assert table.header["model"] == "M()" and "n" not in table.header and "beware" not in table.header
    assert table.cells[0][1] == "66.7 % [20.8, 93.9] (n=3)"
    assert call("table", str(tmp_path), "--per-class").stdout == render(
        answers, "markdown", Layout(("class",), ("attack", "budget"))
    )
    published = replace(answers, published={(named.key, ""): Published(30.0, "x")})
    assert not any(cell.published for cell in published.tables(Layout(("class",), ("attack",)))[0].numbers)
    assert published.tables()[0].rows[0][1][1].published, "of all classes, not of each"
    unnamed = saved(tmp_path / "unnamed", replace(named, texts=None))
    assert [label for label, _ in unnamed.tables(Layout(("class",), ("attack",)))[0].rows] == ["0", "1"]


# Bold


def best(answers: Answers) -> dict[str, list[str]]:
    """In each column the rows that are marked."""
    (table,) = answers.tables(Layout(bold=True))
    return {
        column: [label for label, cells in table.rows if cells[place].best]
        for place, column in enumerate(table.columns)
    }


def test_the_best_is_bold_only_where_a_paired_test_says_so(tmp_path: Path) -> None:
    asked = {**PGD, **SMALL}
    column = "PGD(steps=100), Linf(eps=1/255)"
    nested = saved(tmp_path / "a", of(30, 40, model="M()", **asked), of(20, 40, model="N()", **asked))
    assert best(nested) == {"clean": [], column: ["M()"]}, "ten stand in addition"
    shifted = saved(tmp_path / "b", of(30, 40, model="M()", **asked), of(20, 40, 20, model="N()", **asked))
    assert best(shifted)[column] == [], "the same counts, but 20 stand where 10 others fell: no paired difference"
    third = saved(
        tmp_path / "c",
        of(30, 40, model="M()", **asked),
        of(20, 40, model="N()", **asked),
        of(29, 40, model="O()", **asked),
    )
    assert best(third)[column] == [], "one of the others is as good"
    other = report([0] * 40, [0] * 20 + [1] * 20, ids=[f"t{i}" for i in range(40)], model="N()", **asked)
    assert best(saved(tmp_path / "d", of(30, 40, model="M()", **asked), other))[column] == [], "other samples"
    alone = saved(tmp_path / "e", of(30, 40, model="M()", **asked))
    assert best(alone)[column] == [], "nobody to be better than"


def test_more_comparisons_ask_for_more(tmp_path: Path) -> None:
    asked = {**PGD, **SMALL}
    low = difference(of(13, 40, **asked).outcomes, of(6, 40, **asked).outcomes).low
    assert low > 0.0 > difference(of(13, 40, **asked).outcomes, of(6, 40, **asked).outcomes, level=1 - 0.05 / 30).low
    few = saved(
        tmp_path / "few", *(of(13 if name == "M0()" else 6, 40, model=name, **asked) for name in ("M0()", "M1()"))
    )
    assert ["M0()"] in best(few).values()
    names = [f"M{number}()" for number in range(31)]
    many = saved(tmp_path / "many", *(of(13 if name == "M0()" else 6, 40, model=name, **asked) for name in names))
    assert ["M0()"] not in best(many).values()


def test_bold_is_marked_in_each_form(tmp_path: Path) -> None:
    asked = {**PGD, **SMALL}
    answers = saved(tmp_path, of(30, 40, model="M('*')", **asked), of(20, 40, model="N()", **asked))
    markdown = render(answers, "markdown", Layout(bold=True))
    assert "| M('\\*') | 100.0 % [91.2, 100.0] | **75.0 % [59.8, 85.8]** |" in markdown and "bold = above" in markdown
    assert "& \\textbf{75.0 [59.8, 85.8]} \\\\" in render(answers, "latex", Layout(bold=True))
    assert "**" not in render(answers, "markdown") and "textbf" not in render(answers, "latex")


# LaTeX


def columns_of(line: str) -> int:
    """How many columns a line of a tabular fills."""
    cells = re.split(r"(?<!\\)&", line.removesuffix(" \\\\"))
    spans = [re.match(r"\s*\\multicolumn\{(\d+)\}", cell) for cell in cells]
    return sum(int(span[1]) if span else 1 for span in spans)


def test_latex_is_a_table_with_booktabs_and_grouped_headings(papers: Answers, tmp_path: Path) -> None:
    latex = render(papers, "latex", Layout(("model",), ("attack", "budget"), digits=2, intervals=False))
    table = latex.split("\\begin{tabular}{lrrrrr}\n")[1].split("\\end{tabular}")[0].splitlines()
    assert table[0] == "\\toprule" and table[-1] == "\\bottomrule" and table.count("\\midrule") == 1
    assert table[1] == " & clean & \\multicolumn{2}{c}{PGD(steps=100)} & \\multicolumn{2}{c}{FAB(steps=100)} \\\\"
    assert table[2] == "\\cmidrule(lr){3-4} \\cmidrule(lr){5-6}"
    assert table[3] == "model &  & Linf(eps=1/255) & Linf(eps=4/255) & Linf(eps=1/255) & Linf(eps=4/255) \\\\"
    assert table[5] == "M() & 100.00 & 20.00 & 15.00 & 10.00 & 5.00 \\\\"
    assert {columns_of(line) for line in table if line.endswith("\\\\")} == {6}
    assert latex.count("\\begin{table}") == latex.count("\\end{table}") == latex.count("\\caption{") == 2


def test_nothing_in_latex_is_obeyed(tmp_path: Path) -> None:
    evil = "50%_of & \\input{x} $y$ #1 {~^}"
    answers = saved(tmp_path, of(5, **PGD, **SMALL, short={"model": evil, "task": evil, "attack": evil}))
    for layout in (Layout(), Layout(("attack",), ("model", "task"))):
        latex = render(answers, "latex", layout)
        assert (
            "50\\%\\_of \\& \\textbackslash{}input\\{x\\} \\$y\\$ \\#1 \\{\\textasciitilde{}\\textasciicircum{}\\}"
            in latex
        )
        for line in latex.splitlines()[1:]:
            bare = re.sub(r"\\[a-z]+|\\[\\&%$#_{}]", "", line)
            assert not set(bare) & set("%$#_~^\\"), line
            assert bare.count("{") == bare.count("}")
        body = latex.split("\\toprule\n")[1].split("\\bottomrule")[0].splitlines()
        assert len({columns_of(line) for line in body if line.endswith("\\\\")}) == 1


# CSV


def test_csv_has_the_words_behind_labels_and_seconds_of_loading_apart(grid: Path, asked: list[dict[str, Any]]) -> None:
    Experiment.load(grid).run("out")
    rows = list(csv.DictReader(io.StringIO(call("table", "out", "--format", "csv").stdout)))
    coarse = next(row for row in rows if row["model"] == "coarse" and row["attack"].startswith("PGD"))
    assert coarse["model word"] == "BitDepth(base=Tiny(), bits=3)" and coarse["budget word"] == "Linf(eps=8/255)"
    assert coarse["attack word"].startswith("PGD(steps=100, step=") and coarse["surrogate word"] == "None"
    assert float(coarse["loading"]) >= 0.0 and float(coarse["seconds"]) >= 0.0


# Worst cases


def test_a_worst_case_says_pooled_only_of_what_was_several(tmp_path: Path) -> None:
    one = saved(tmp_path / "a", of(8, **PGD, **SMALL), of(6, **FAB, **SMALL)).pooled()
    assert one.tables()[0].header["surrogate"] == "None" and one.tables()[0].header["seed"] == "0"
    two = saved(tmp_path / "b", of(8, **PGD, **SMALL), of(6, **PGD, **SMALL, seed="1", surrogate="S()")).pooled()
    assert two.tables()[0].header["surrogate"] == "pooled" == two.tables()[0].header["seed"]


# What others have measured, and claims

PAPER = """
[published]
"base, PGD(steps=100)" = [30, "Some Paper 2024, Table 2"]
"coarse, clean" = [97.5, "Other 2023"]

[claims]
"rounding does nothing" = "Above('coarse, PGD(steps=100)', 'base, PGD(steps=100)', by=20)"
"clean is easier" = "Above('base, clean', 'base, Substitute()', by=-60)"
"half is left" = "Above('base, Substitute()', 95)"
"""


def test_published_numbers_stand_beside_ours(grid: Path, asked: list[dict[str, Any]]) -> None:
    grid.write_text(grid.read_text() + PAPER)
    shown = call("run", "grid.toml", "--out", "out").stdout
    assert "| 50.0 % [9.5, 90.5]; published 30.0 % (a), +20.0 |" in shown
    assert "| 100.0 % [34.2, 100.0]; published 97.5 % (b), +2.5 |" in shown
    assert "published: (a) Some Paper 2024, Table 2, (b) Other 2023." in shown
    rows = list(csv.DictReader(io.StringIO(call("table", "out", "--format", "csv").stdout)))
    told = {
        (row["model"], row["attack"]): (row["published"], row["published source"]) for row in rows if row["published"]
    }
    assert told == {
        ("base", "PGD(steps=100)"): ("30.0", "Some Paper 2024, Table 2"), ("coarse", "None"): ("97.5", "Other 2023"),
    }  # fmt: skip
    assert [mark(number) for number in (0, 25, 26, 27)] == ["a", "z", "aa", "ab"]


def test_a_file_may_hold_more_grids(grid: Path) -> None:
    before = Experiment.load(grid)
    text = grid.read_text()
    grid.write_text(f"{text}\n[[more]]\nattack = {{ 'PGD-7' = 'PGD(steps=7)' }}\nmodel = {{ base = \"Tiny()\" }}\n")
    wanted = Experiment.load(grid)
    assert wanted.grid == before.grid and [set(one.axes["model"]) for one in wanted.more] == [{"base"}]
    assert all(wanted.more[0].axes[kind] == before.grid[kind] for kind in ("budget", "task"))
    known = {cell.key: (cell.limit, cell.batch) for cell in before.cells()}
    added = [cell for cell in wanted.cells() if cell.key not in known]
    assert [cell.label for cell in added] == ["base, PGD-7"] and added[0].words["attack"].steps == 7
    assert {(added[0].limit, added[0].batch)} == set(known.values()) == {(before.limit, before.batch)}
    grid.write_text(f"{text}\n[[more]]\nattack = {{ 'PGD-7' = 'PGD(steps=7)' }}\nlimit = 3\nbatch = 2\n")
    fewer = {cell.key: cell for cell in Experiment.load(grid).cells() if cell.limit != before.limit}
    assert not set(fewer) & set(known) and {(cell.limit, cell.batch) for cell in fewer.values()} == {(3, 2)}
    assert {cell.question["limit"] for cell in fewer.values()} == {"3"}
    grid.write_text(f"{text}\n[[more]]\nlimit = 3\n")
    twice = Experiment.load(grid)
    labels = [cell.label for cell in twice.cells()]
    assert len(set(labels)) == len(labels) == 2 * len(known), "people can tell them apart"
    several = [cell.label for cell in before.cells()]
    assert set(labels) == {f"{label}, limit={limit}" for label in several for limit in (before.limit, 3)}
    cells = twice.cells()
    assert [twice._named("claims", label, cells) for label in labels] == [(cell.key, "") for cell in cells]
    with pytest.raises(CrossguardError, match=r"names 2 cells \(.*limit=.*; .*limit=3, \.\.\.\); say which"):
        twice._named("claims", several[0], cells)
    for more, message in (
        ("[[more]]\nmodel = { base = 'TinyViT()' }", "model 'base' is one word in one grid and another in the next"),
        ("[[more]]\nmodle = 'Tiny()'", "more has an unknown key 'modle'; did you mean 'model'?"),
        ("[[more]]\nlimit = 0", "more: limit must be a whole number of at least 1, not 0"),
        ("[[more]]\nseed = 3", "more has an unknown key 'seed'"),
        ("more = 3", "more must be tables [[more]] of axes, not 3"),
        ("[[more]]\nattack = 'PDG()'", "unknown name 'PDG'"),
    ):
        grid.write_text(f"{more}\n{text}" if "=" in more.partition("\n")[0] else f"{text}\n{more}\n")
        with pytest.raises(CrossguardError, match=re.escape(message)):
            Experiment.load(grid)


def test_claims_are_judged_below_the_table(grid: Path, asked: list[dict[str, Any]]) -> None:
    grid.write_text(grid.read_text() + PAPER)
    lines = call("run", "grid.toml", "--out", "out").stdout.splitlines()
    judged = [line.removeprefix("- ") for line in lines if re.match(r"- (holds|fails|undecided): ", line)]
    assert [line.split(": ")[:2] for line in judged] == [
        ["undecided", "rounding does nothing"], ["holds", "clean is easier"], ["fails", "half is left"],
    ]  # fmt: skip
    assert "half is left: 'base, Substitute()' 50.0 % [9.5, 90.5] minus 95 % is -45.0 points" in judged[2]
    content = json.loads(call("table", "out", "--format", "json").stdout)
    assert [one["verdict"] for one in content["claims"]] == ["undecided", "holds", "fails"]
    assert "claims" not in json.loads(call("table", "out", "--worst", "--format", "json").stdout)


@pytest.mark.parametrize(
    ("left", "right", "by", "verdict"),
    [(30, 20, 0.0, "holds"), (30, 20, 20.0, "undecided"), (20, 30, 0.0, "fails"), (25, 24, 0.0, "undecided")],
)
def test_a_claim_holds_or_fails_by_the_interval(left: int, right: int, by: float, verdict: str, tmp_path: Path) -> None:
    answers = saved(tmp_path, of(left, 40, model="M()", **PGD, **SMALL), of(right, 40, model="N()", **PGD, **SMALL))
    one, other = answers.reports
    cells = [[one.key, ""], [other.key, ""]]
    claimed = replace(answers, claims=({"name": "x", "word": f"Above('m', 'n', by={by})", "cells": cells},))
    (judged,) = claimed.judged
    middle, low, high = (100 * end for end in difference(one.outcomes, other.outcomes))
    assert judged.verdict == verdict == ("holds" if low > by else "fails" if high < by else "undecided")
    assert f"{middle:+.1f} points [{low:+.1f}, {high:+.1f}] (paired, 95 %)" in judged.said


def test_a_claim_about_what_is_not_there_is_undecided(tmp_path: Path) -> None:
    one = of(30, 40, model="M()", **PGD, **SMALL)
    other = report([0] * 40, [1] * 40, ids=[f"t{i}" for i in range(40)], model="N()", **PGD, **SMALL)
    answers = saved(tmp_path, one, other)

    def judged(word: str, *keys: str) -> str:
        claims = ({"name": "x", "word": word, "cells": [[key, ""] for key in keys]},)
        (said,) = replace(answers, claims=claims).judged
        return str(said)

    assert judged("Above('m', 'n')", one.key, "0" * 20) == "undecided: x: 'n' is not answered yet"
    assert "not of the same samples; give paired=False" in judged("Above('m', 'n')", one.key, other.key)
    assert judged("Above('m', 'n', paired=False)", one.key, other.key).startswith("holds: x: 'm' 75.0 % ")
    assert "undecided: x: " in judged("Tiny()", one.key) and "undecided: x: " in judged("Above(", one.key)
    assert "is no claim about its cells" in judged("Above('m', 'n')", one.key)


def test_clean_and_attacked_numbers_of_one_model_are_compared_sample_by_sample(tmp_path: Path) -> None:
    clean, attacked = report([0] * 40), of(30, 40, **PGD, **SMALL)
    answers = saved(tmp_path, clean, attacked)
    cells = [[clean.key, ""], [attacked.key, ""]]
    (said,) = replace(answers, claims=({"name": "x", "word": "Above('c', 'a')", "cells": cells},)).judged
    wide = 1.959964 * math.sqrt((11 + 1) / 42 - (10 / 42) ** 2) / math.sqrt(42)
    assert f"[{100 * (10 / 42 - wide):+.1f}, {100 * (10 / 42 + wide):+.1f}] (paired" in said.said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            '[published]\n"bsae, clean" = [1, "x"]',
            "grid.toml: published: there is no label 'bsae'; did you mean 'base'?",
        ),
        ('[published]\n"clean" = [1, "x"]', "'clean' names 2 cells (base, clean; coarse, clean, ...); say which"),
        ('[published]\n"base, coarse" = [1, "x"]', "'base, coarse' names no cell of this grid"),
        ('[published]\n"base, clean" = 3', 'published must be a table of "labels of a cell" = [percent, "source"]'),
        ('[published]\n"base, clean" = [130, "x"]', "'base, clean' is [130, 'x']"),
        ("published = 3", "published must be a table"),
        ("claims = 3", "claims must be a table of name = word"),
        ('[claims]\nx = "Abvoe(1)"', "grid.toml: claims: unknown name 'Abvoe'; did you mean 'Above'?"),
        ('[claims]\nx = "Tiny()"', "grid.toml: claims: x: Tiny() is not a claim"),
        ("[claims]\nx = \"Above('base', 3)\"", "grid.toml: claims: x: 'base' names 3 cells"),
        ("[claims]\nx = \"Above('base, clean', 300)\"", "Above(right=300.0) is no share"),
    ],
)
def test_mistakes_in_claims_and_published_numbers(
    more: str, said: str, grid: Path, asked: list[dict[str, Any]]
) -> None:
    head, *rest = more.split("\n", 1)
    text = grid.read_text()
    grid.write_text(f"{text}\n{more}\n" if rest else f"{head}\n{text}")
    assert said in error("run", "grid.toml", "--out", "out")
    assert not asked


def test_labels_may_hold_commas_and_be_those_of_two_axes(grid: Path, asked: list[dict[str, Any]]) -> None:
    grid.write_text(
        """
        task = "ZeroShot(Scenes('object'))"
        budget = "Linf(8/255)"
        model = {"a, b" = "Tiny()", coarse = "BitDepth(Tiny(), bits=3)"}
        surrogate = {coarse = "BitDepth(Tiny(), bits=3)", none = "None"}
        attack = {"PGD, 5" = "PGD(steps=5)"}
        [published]
        "a, b, coarse" = [1, "one"]
        "coarse, surrogate=none" = [2, "two"]
        "model=coarse, surrogate=coarse, PGD, 5" = [3, "three"]
        """
    )
    wanted = Experiment.load(grid)
    index = wanted._index(wanted.cells())
    cells = {cell.key: cell for cell in wanted.cells()}
    told = {one["source"]: cells[one["cell"]].label for one in index["published"]}
    assert told == {"one": "a, b, coarse", "two": "coarse, none", "three": "coarse, coarse"}


def test_a_claim_is_a_word() -> None:
    assert Above("a", "b").cells == ("a", "b") and Above("a", 30.0).cells == ("a",)
    assert "Above (claim)" in call("words", "Above").stdout
    with pytest.raises(CrossguardError, match="no share"):
        Above("a", float("nan"))


def test_a_table_says_on_how_many_prompts_a_number_rests(tmp_path: Path) -> None:
    asked = {"attack": "Substitute()", "budget": "Words(count=1)"}
    texts = Texts(("cat", "dog"), (("a cat",), ("a dog",)), (("a cab",), ("a dog",)))
    answers = saved(tmp_path, replace(of(5, **asked), texts=texts), of(5, **PGD, **SMALL))
    assert [note for note in answers.notes() if "prompts" in note] == [
        "rests on 2 rewritten prompts, however many images were asked about, so its interval says little "
        "[M(), Substitute(), Words(count=1)]"
    ]


def test_what_the_adversary_knows_stands_where_it_holds(tmp_path: Path) -> None:
    white, gray = {"knowledge": "white box"}, {"knowledge": "gray box"}
    both = [of(8, **PGD, **SMALL, **white), of(9, **FAB, **SMALL, **gray)]
    rows = saved(tmp_path / "a", *both).tables(Layout(("attack",), ("model",)))[0]
    assert [label for label, _ in rows.rows] == ["clean", "PGD(steps=100) (white box)", "FAB(steps=100) (gray box)"]
    assert rows.header["knowledge"] == "differs, see the rows"
    columns = saved(tmp_path / "b", *both).tables(Layout(("model",), ("budget", "attack")))[0]
    budget = "Linf(eps=1/255)"
    assert columns.columns == (
        "clean", f"{budget}, PGD(steps=100) (white box)", f"{budget}, FAB(steps=100) (gray box)"
    )  # fmt: skip
    assert columns.header["knowledge"] == "differs, see the columns"
    mixed = saved(
        tmp_path / "c", *both, of(3, **PGD, **SMALL, **gray, model="N()"), of(3, **FAB, **SMALL, **white, model="N()")
    )
    assert mixed.tables()[0].header["knowledge"] == "differs: white box / gray box"
    assert [label for label, _ in mixed.tables()[0].rows] == ["M()", "N()"]


# Pictures


def test_a_picture_has_a_dot_for_each_number_of_each_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(
        tmp_path,
        of(12, model="A()", **PGD, **SMALL),
        of(5, model="A()", **FAB, **SMALL),
        of(9, model="$B$()", **PGD, **SMALL),
        of(3, model="A()", task="Other()", **PGD, **SMALL),
    )
    figures: list[Any] = []
    monkeypatch.setattr(curves, "png", lambda figure: figures.append(figure) or b"")
    curves.table_picture(Answers.load(tmp_path).tables())
    drawn = list[list[tuple[str, float]]]()
    for axes in figures[0].axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        dots = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
        drawn.append(sorted((names[round(y)], x) for x, y in dots))
        assert all(len(line.get_xydata()) == 2 for line in axes.lines if line.get_marker() != "o"), "intervals"
    assert sorted(drawn, key=len) == [
        [("A()", 15.0), ("A()", 100.0)],
        [("$B$()", 45.0), ("$B$()", 100.0), ("A()", 25.0), ("A()", 60.0), ("A()", 100.0)],
    ]
    assert len(figures[0].legends[0].get_texts()) == 3
    with pytest.raises(CrossguardError, match="2500 rows in 500 tables are too many"):
        curves.table_picture([Table({}, (("PGD",),), (("A()", (Cell(Rate(1, 2)),)),) * 5)] * 500)


def test_a_table_is_drawn_beside_what_is_printed(grid: Path, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    call("run", "grid.toml", "--out", "runs/out")
    plain = call("table", "runs/out").stdout
    assert call("table", "runs/out", "--picture", str(tmp_path / "made.png")).stdout == plain
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")
    assert "give a name that ends in .png" in error("table", "runs/out", "--picture", str(tmp_path / "made.svg"))
    assert not (tmp_path / "made.svg").exists()
