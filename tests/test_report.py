"""Reports, their files and their tables."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossguard import files
from crossguard.errors import CrossguardError
from crossguard.pivot import Cell
from crossguard.report import Outcomes, Rate, Report, ReportError, Texts, interval, key, versions
from crossguard.table import Answers, render


def report(
    clean: list[int] | None = None,
    adversarial: list[int] | None = None,
    notes: tuple[str, ...] = (),
    short: dict[str, str] | None = None,
    ids: list[str] | None = None,
    **question: str,  # the parts of the question, by name
) -> Report:
    clean = [0, 1, 0, 0] if clean is None else clean
    adversarial = clean if adversarial is None else adversarial
    n = len(clean)
    asked = {
        "task": "T(data=D())",
        "model": "M()",
        "attack": "None",
        "budget": "None",
        "surrogate": "None",
        "knowledge": "no attack" if question.get("attack", "None") == "None" else "white box",
        "limit": "None",
        "seed": "0",
    } | question
    outcomes = Outcomes(
        id=[f"s{i}" for i in range(n)] if ids is None else ids,
        label=[0] * n,
        clean=clean,
        adversarial=adversarial,
        clean_margin=np.linspace(-1, 1, n),
        adversarial_margin=[math.nan, *[-math.inf] * (n - 1)],
        size=np.full(n, 8 / 255, np.float32),
        gradients=[100] * n,
        forwards=[3] * n,
    )
    return Report(asked, outcomes, notes, versions(), 1.5, short=short or {"task": "T"})


# Rates


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_intervals_are_the_published_ones(successes: int, n: int, low: float, high: float):
    assert interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000), st.data())
def test_intervals_hold_the_rate_and_mirror(n: int, data: st.DataObject):
    successes = data.draw(st.integers(0, n))
    low, high = interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and low < high
    assert interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
    # the ends solve |rate - p| = z sqrt(p (1 - p) / n), which is what the interval means
    for end in (low, high):
        z = 1.959963984540054 * math.sqrt(end * (1 - end) / n)
        assert abs(successes / n - end) == pytest.approx(z, abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(successes: int, n: int):
    with pytest.raises(CrossguardError, match="not possible"):
        interval(successes, n)


def test_robust_means_right_both_clean_and_under_attack():
    one = report(clean=[0, 0, 1, 1], adversarial=[0, 1, 0, 1], **PGD)
    assert one.clean_accuracy == 0.5
    assert one.robust_accuracy == 0.25
    assert one.adversarial.value == 0.5  # the third was wrong and is right by luck
    assert str(one.robust) == "25.0 % [4.6, 69.9]"
    assert one.intervals["robust"] == interval(1, 4)
    assert one.n == 4


def test_the_key_depends_on_the_question_and_on_nothing_else():
    question = dict(report().question)
    assert key(question) == key(dict(reversed(question.items())))
    assert key(question) != key(question | {"seed": "1"})
    assert report().key == key(question)


def test_outcomes_are_checked():
    good: dict[str, Any] = {name: [0] for name in ("label", "clean", "adversarial", "gradients", "forwards")}
    margins: dict[str, Any] = {name: [0.0] for name in ("clean_margin", "adversarial_margin", "size")}
    assert len(Outcomes(id=["a"], **good, **margins)) == 1
    with pytest.raises(CrossguardError, match="at least one sample"):
        Outcomes(id=[], **good, **margins)
    with pytest.raises(CrossguardError, match=r"2 ids, and label has the shape \(1,\)"):
        Outcomes(id=["a", "b"], **good, **margins)
    with pytest.raises(CrossguardError, match="whole numbers in clean"):
        Outcomes(id=["a"], **(good | {"clean": np.array([0.5])}), **margins)


def test_a_report_shows_itself_safely():
    one = report(model="M('<b>')", notes=("<script>",), **PGD)
    page = one._repr_html_()
    assert "<b>" not in page and "<script>" not in page
    assert "<th>model</th><td>M(&#39;&lt;b&gt;&#39;)</td>" in page and "<li>&lt;script&gt;</li>" in page
    assert "robust accuracy: 75.0 % [30.1, 95.4]" in repr(one)


def test_print_and_repr_say_what_the_numbers_need():
    one = report([0, 0, 0, 1], [1, 1, 0, 1], notes=("a first doubt", "a second one"), **PGD)
    assert str(one).splitlines()[-2:] == ["- a first doubt", "- a second one"]
    assert "robust accuracy  25.0 % [4.6, 69.9]" in str(one).splitlines()
    assert all(note in repr(one) for note in one.notes) and "\n" not in repr(one)
    said = repr(one.outcomes)
    assert said.startswith("<Outcomes of 4 samples: 3 right clean, 1 right as asked; columns id, label, clean, ")
    assert list(one.outcomes.columns) == ["id", "label", "clean", "adversarial", "clean_margin", "adversarial_margin",
                                          "size", "gradients", "forwards"]  # fmt: skip
    assert float(one.robust) == 0.25


def test_where_nobody_attacked_nothing_is_robust(tmp_path: Path):
    one = report([0, 0, 0, 1])
    for text in (str(one), repr(one), one._repr_html_(), one.headline):
        assert "robust" not in text and "under attack" not in text
    assert list(one.rates) == ["clean"] and one.headline == "clean 75.0 % [30.1, 95.4]"
    one.save(tmp_path / "one.json")
    assert set(json.loads((tmp_path / "one.json").read_text())["summary"]) == {"n", "clean"}
    answers = Answers.load(tmp_path)
    assert not any("robust" in render(answers, form) for form in ("markdown", "latex", "csv"))
    assert report(adversarial=[0, 1, 1, 1], **PGD).headline == "clean 75.0 % [30.1, 95.4], robust 25.0 % [4.6, 69.9]"


def test_another_question_is_not_written_over(tmp_path: Path):
    path = tmp_path / "one.json"
    report(**PGD).save(path)
    before = path.read_bytes()
    with pytest.raises(
        CrossguardError, match=r"one\.json holds the report of another question \(seed: 0 there, 1 here\)"
    ):
        report(**PGD, seed="1").save(path)
    assert path.read_bytes() == before
    report(notes=("asked again",), **PGD).save(path)
    assert Report.load(path).notes == ("asked again",)
    report(**PGD, seed="1").save(path, overwrite=True)
    assert Report.load(path).question["seed"] == "1"


# Files


def test_a_report_survives_its_file(tmp_path: Path):
    one = report(adversarial=[0, 0, 0, 1], notes=("a doubt \ud800",), attack="A()", short={"task": "T"})
    one.save(tmp_path / "deep" / "one.json")
    again = Report.load(tmp_path / "deep" / "one.json")
    for name in ("question", "notes", "versions", "seconds", "created", "short"):
        assert getattr(again, name) == getattr(one, name), name
    assert again.outcomes.id == one.outcomes.id
    for name in ("label", "clean", "adversarial", "clean_margin", "size", "gradients", "forwards"):
        np.testing.assert_array_equal(getattr(again.outcomes, name), getattr(one.outcomes, name))
    assert np.isnan(again.outcomes.adversarial_margin).all()  # JSON knows neither NaN nor infinity
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["one.json"]
    json.loads((tmp_path / "deep" / "one.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_versions_name_what_a_number_depends_on():
    assert set(versions()) == {"crossguard", "torch", "transformers", "python", "platform", "device"}


def break_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def changed(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_off, "broken"),
        (lambda path: path.write_bytes(b""), "broken"),
        (lambda path: path.write_bytes(b"\xff\xfe\0"), "broken"),
        (lambda path: path.write_text("[" * 100_000), "broken"),
        (lambda path: path.write_text("[]"), "not a report"),
        (lambda path: path.write_text('{"a": 1}'), "not a report"),
        (changed(schema=99), "schema 99"),
        (changed(question=[]), "broken"),
        (changed(question={"task": 1}), "broken"),
        (changed(seconds="x"), "broken"),
        (changed(notes=None), "broken"),
        (changed(outcomes={"id": ["a"]}), "'label' is missing"),
        (changed(outcomes=None), "broken"),
        (lambda path: path.unlink(), "there is no report"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, damage: Callable[[Path], object], said: str):
    path = tmp_path / "one.json"
    report().save(path)
    damage(path)
    with pytest.raises(ReportError, match=said) as caught:
        Report.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["label", "clean", "gradients", "size"])
def test_a_column_of_the_wrong_kind_is_a_broken_file(tmp_path: Path, column: str):
    path = tmp_path / "one.json"
    report().save(path)
    content = json.loads(path.read_text())
    for wrong in ("abcd", ["a"] * 4, [1.5, None], 3):
        content["outcomes"][column] = wrong
        path.write_text(json.dumps(content))
        with pytest.raises(ReportError, match="broken"):
            Report.load(path)


@pytest.mark.parametrize("stage", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "one.json"
    report().save(path)
    before, new = path.read_bytes(), report(notes=("new",))

    opened = Path.open

    def full(*given: Any, **options: Any) -> Any:
        if stage == "open" and "rb" in given:  # the old report is read
            return opened(*given, **options)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = {"fsync": (os, "fsync"), "replace": (Path, "replace"), "open": (Path, "open")}[stage]
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(CrossguardError, match=r"one\.json cannot be written: no space left on device"):
            new.save(path)
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["one.json"]


def test_an_interrupt_while_writing_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report().save(tmp_path / "one.json")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CrossguardError, match="cannot be written"):
        report().save(tmp_path / "file" / "one.json")
    with pytest.raises(CrossguardError, match="cannot be written to"):
        files.check_writable(tmp_path / "file")
    files.check_writable(tmp_path / "new" / "folder")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    files.make_writable(tmp_path / "new" / "folder")
    files.check_writable(tmp_path / "new" / "folder")
    assert not list((tmp_path / "new" / "folder").iterdir())


# Tables

PGD = {"attack": "PGD(steps=100)", "budget": "Linf(eps=8/255)"}
TEXT = {"attack": "Substitute()", "budget": "Words(count=1)"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models, each asked clean and under two attacks; one cell is missing and one file is broken."""
    asked = [
        report(clean=[0, 0, 0, 1]),
        report([0, 0, 0, 1], [1, 1, 1, 1], ("Beware of A_1 & <b>.",), {"attack": "PGD-100"}, **PGD),
        report([0, 0, 0, 1], [0, 1, 0, 1], ("Beware of A_1 & <b>.",), **TEXT),
        report(clean=[0, 0, 1, 1], model="N('[red]x|y')"),
        report([0, 0, 1, 1], [0, 0, 1, 1], model="N('[red]x|y')", **PGD),
    ]
    for one in asked:
        one.save(tmp_path / f"{one.key}.json")
    labels = {"model": {"the base": "M()"}, "attack": {"image": "PGD(steps=100)"}}
    index = {"labels": labels, "cells": [*(one.key for one in asked), "0" * 20]}
    (tmp_path / "experiment.json").write_text(json.dumps(index))
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


def test_tables_have_a_row_per_model_and_a_column_per_attack(folder: Path):
    (table,) = Answers.load(folder).tables()
    assert table.columns == ("clean", "image, Linf(eps=8/255)", "Substitute(), Words(count=1)")
    assert table.cells == [
        ["the base", "75.0 % [30.1, 95.4]", "0.0 % [0.0, 49.0]", "50.0 % [15.0, 85.0]"],
        ["N('[red]x|y')", "50.0 % [15.0, 85.0]", "50.0 % [15.0, 85.0]", "-"],
    ]
    for said in ("task: T", "n: 4", "seed: 0", "surrogate: None", "knowledge: white box"):
        assert said in table.caption


def test_notes_are_listed_once_with_doubts_about_the_folder(folder: Path):
    notes = Answers.load(folder).notes()
    assert notes[0] == "Beware of A_1 & <b>. [2 of 5 reports]"
    assert any("broken.json' is broken" in note for note in notes)
    assert any("1 of 6 cells are not answered yet" in note for note in notes)
    assert len(notes) == 3


def test_every_format_renders(folder: Path):
    answers = Answers.load(folder)
    markdown = render(answers, "markdown")
    assert "| the base | 75.0 % [30.1, 95.4] | 0.0 % [0.0, 49.0] |" in markdown
    assert "x\\|y" in markdown and "\\<b>" in markdown
    latex = render(answers, "latex")
    assert "\\begin{tabular}{lrrr}" in latex and "the base & 75.0 [30.1, 95.4] & 0.0" in latex
    assert "A\\_1 \\& \\textless{}b\\textgreater{}" in latex
    rows = list(csv.DictReader(io.StringIO(render(answers, "csv"))))
    assert [row["robust"] for row in rows] == ["", "0.0", "0.5", "", "0.5"], "nobody attacked"
    assert rows[1]["attack"] == "image" and rows[1]["n"] == "4" and rows[1]["robust_high"] == "0.489891"
    content = json.loads(render(answers, "json"))
    assert content["reports"][1]["question"]["attack"] == "PGD(steps=100)" and len(content["doubts"]) == 2
    with pytest.raises(CrossguardError, match="unknown format 'pdf'"):
        render(answers, "pdf")


def test_a_terminal_gets_a_table_without_markup(folder: Path):
    from rich.console import Console

    from crossguard.table import pretty

    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    console.print(pretty(Answers.load(folder)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "N('[red]x|y')" in text and "75.0 % [30.1, 95.4]" in text


def test_numbers_that_may_not_be_compared_are_apart(tmp_path: Path):
    asked = [
        report(**PGD),
        report(**PGD, seed="1"),
        report(**PGD, surrogate="S()", knowledge="transfer"),
        report(**PGD, surrogate="S()", model="S()"),
        report(**PGD, task="U()"),
        report(task="V()"),
        report(clean=[0], model="C()"),
    ]
    for number, one in enumerate(asked):
        one.save(tmp_path / f"{number}.json")
    tables = Answers.load(tmp_path).tables()
    assert len(tables) == 5
    transfer = next(table for table in tables if table.header["surrogate"] == "S()")
    assert [label for label, _ in transfer.rows] == ["M() (transfer)", "S() (white box)", "C()"]
    assert "beware" in transfer.header
    assert transfer.cells[0][1].endswith("(n=4)") and transfer.cells[2][1].endswith("(n=1)")
    alone = tables[-1]
    assert alone.columns == ("clean",) and "surrogate" not in alone.header


def saved(folder: Path, *asked: Report) -> Answers:
    for number, one in enumerate(asked):
        one.save(folder / f"{number}.json")
    return Answers.load(folder)


def test_numbers_on_other_data_or_with_other_lists_are_apart(tmp_path: Path):
    asked = [
        report(
            [0, 0, 0, 0], [0, 0, 0, 1], **TEXT, **{"attack files": "Synonyms:0123456789ab", "data": "Images:aaaaaaaaa"}
        ),
        report(
            [0, 0, 0, 0], [0, 0, 1, 1], **TEXT, **{"attack files": "Synonyms:fedcba987654", "data": "Images:aaaaaaaaa"}
        ),
        report(
            [0, 0, 0, 0], [0, 1, 1, 1], **TEXT, **{"attack files": "Synonyms:fedcba987654", "data": "Images:bbbbbbbbb"}
        ),
    ]
    answers = saved(tmp_path, *asked)
    first, second = answers.tables()
    heads = [f"Substitute() ({held}), Words(count=1)" for held in ("01234567", "fedcba98")]
    assert first.columns == ("clean", *heads) and second.columns == ("clean", heads[1])
    assert (first.header["task"], second.header["task"]) == ("T (aaaaaaaa)", "T (bbbbbbbb)")
    assert [report.robust.successes for report in answers.pooled().reports] == [2, 1]


def test_the_pooled_clean_answer_is_that_of_one_draw_and_no_pool_is_above_its_parts(tmp_path: Path):
    draws = [
        report([0, 0, 0, 1], [0, 1, 0, 0], **PGD),
        report([0, 0, 1, 0], [0, 0, 0, 0], **PGD, seed="1"),
        report([0, 1, 0, 0], [0, 0, 0, 0], **PGD, seed="2"),
    ]
    (one,) = saved(tmp_path, *draws).pooled().reports
    assert list(one.outcomes.clean) == [0, 0, 0, 1], "clean does not fall with the number of seeds"
    assert one.robust.successes == 1 and list(one.outcomes.adversarial)[:3] == [0, 1, 1]
    assert all(one.robust.successes <= part.robust.successes for part in draws)
    assert list(one.outcomes.size)[2] == 0, "there the clean image was enough"


def test_rewritten_prompts_stand_in_the_file_and_beside_the_interval(tmp_path: Path):
    texts = Texts(("cat", "dog"), (("a cat",), ("a dog",)), (("a cab",), ("a dog",)))
    one = replace(report([0, 0, 0, 1], [1, 1, 0, 1], **TEXT), texts=texts, loading=2.0)
    assert ("robust accuracy", "25.0 % [4.6, 69.9], rests on 2 prompts") in one.lines()
    assert ("seconds", "1.5, after 2.0 of loading") in one.lines()
    one.save(tmp_path / "one.json")
    again = Report.load(tmp_path / "one.json")
    assert again.texts == texts and again.lines() == one.lines()


def counted(cells: Sequence[Cell]) -> list[int | None]:
    """How many samples each cell counts."""
    return [cell.rate.successes if isinstance(cell.rate, Rate) else None for cell in cells]


OLD, NEW = {"weights": "0123456789ab"}, {"weights": "fedcba987654"}


def test_a_row_is_one_set_of_weights(tmp_path: Path):
    answers = saved(
        tmp_path,
        report([0, 0, 0, 0], [0, 0, 0, 1], ("A doubt.",), **PGD, **OLD),
        report([0, 0, 1, 1], [0, 1, 1, 1], **TEXT, **NEW),
        report([0, 0, 1, 1], **NEW),
        report([0, 0, 0, 0], **OLD),
        report([0, 1, 1, 1], model="N()", **PGD, weights="aaaaaaaaaaaa"),
        report([1, 1, 1, 1], **{"weights": "bbbbbbbbbbbb"}),
    )
    (table,) = answers.tables()
    counts = [(label, counted(cells)) for label, cells in table.rows]
    assert counts == [
        ("M() (01234567)", [4, 3, None]),
        ("M() (fedcba98)", [2, None, 1]),
        ("N()", [1, 1, None]),
        ("M() (bbbbbbbb)", [0, None, None]),
    ]
    assert answers.notes()[0].startswith("A doubt. [M() (01234567), ")
    assert answers.records()[1]["model"] == "M() (fedcba98)" and answers.records()[4]["model"] == "N()"
    labelled = Answers(answers.reports, {"model": {"N()": "first", "M()": "base"}})
    names = [label for label, _ in labelled.tables()[0].rows]
    assert names == ["first", "base (01234567)", "base (fedcba98)", "base (bbbbbbbb)"]


def test_surrogates_of_other_weights_are_apart(tmp_path: Path):
    transfer = {**PGD, "surrogate": "S()", "knowledge": "transfer"}
    answers = saved(
        tmp_path,
        report([0, 0, 0, 1], **transfer, **{"surrogate weights": "0123456789ab"}),
        report([0, 0, 1, 1], **transfer, **{"surrogate weights": "fedcba987654"}),
        report([0, 0, 1, 1], **{**transfer, "surrogate": "R()"}, **{"surrogate weights": "fedcba987654"}),
    )
    tables = answers.tables()
    assert [table.header["surrogate"] for table in tables] == ["S() (01234567)", "S() (fedcba98)", "R()"]
    assert [[label for label, _ in table.rows] for table in tables] == [["M()"]] * 3
    (one,) = answers.pooled().reports
    assert one.robust.successes == 2 and "surrogate weights" not in one.question


def test_the_worst_case_is_of_the_same_weights_and_images_whatever_the_limit(tmp_path: Path):
    other = ["a", "b", "c", "d"]
    pooled = saved(
        tmp_path,
        report([0, 0, 0, 0], [0, 0, 0, 1], **PGD, **OLD),
        report([0, 0, 0, 0], [1, 0, 0, 0], **PGD, **OLD, limit="4"),
        report([0, 0, 0, 0], [1, 1, 1, 0], **PGD, **NEW),
        report([0, 0, 0, 0], [1, 1, 1, 1], ids=other, **PGD, **OLD),
        report([0, 0, 0, 0], [0, 1, 1, 1], ids=other, **PGD, **OLD, limit="4"),
        report([0, 0, 0, 1], model="N()", **PGD, limit="4"),
        report([0, 0, 1, 1], model="C()", limit="4"),
        report([0, 1, 1, 1], ids=other, **OLD),
    ).pooled()
    first, second = pooled.tables()
    told = [" (white box, 2 reports)", *[" (white box, 1 report)"] * 2, ""]
    names = ["M() (01234567)", "M() (fedcba98)", "N()", "C()"]
    assert [label for label, _ in first.rows] == [name + known for name, known in zip(names, told, strict=True)]
    assert [counted(row[1]) for row in first.rows] == [[4, 2], [4, 1], [3, 3], [2, None]]
    assert first.columns == ("clean", "worst case, Linf(eps=8/255)"), "one, however many reports there are"
    ((label, cells),) = second.rows
    assert label == "M() (01234567)" and counted(cells) == [1, 0]
    assert first.header["limit"] == "None" and second.header["limit"] == "None, set 2"
    (doubt,) = pooled.doubts
    assert "2 sets of images" in doubt and "[M() (01234567), Linf(eps=8/255)]" in doubt
    limits = [record["limit"] for record in pooled.records()]
    assert limits == ["None", "None, set 2", "None", "None, set 2", "None", "None"]


def test_a_folder_without_reports_is_a_sentence(tmp_path: Path):
    with pytest.raises(CrossguardError, match="there is no folder"):
        Answers.load(tmp_path / "absent")
    with pytest.raises(CrossguardError, match="there is no report in"):
        Answers.load(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(CrossguardError, match=r"no report in .* that can be read \(left out"):
        Answers.load(tmp_path)
