"""What is printed: nothing that a terminal, a log, a page or a spreadsheet obeys, and errors that fit on a screen."""

from __future__ import annotations

import csv
import importlib
import io
import logging
import unicodedata
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import crossguard
from crossguard import printing
from crossguard.bar import Bar
from crossguard.errors import CrossguardError
from crossguard.experiment import Cell
from crossguard.printing import LONGEST, LogFormatter, brief, plain, plain_lines
from crossguard.report import Report
from crossguard.table import Answers, pretty, render
from test_cli import call, error
from test_report import PGD, report

evaluation = importlib.import_module("crossguard.evaluate")

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b2J\r\b\u202egnp\u2066.\u200f\u2028"


def obeyed(text: str) -> list[str]:
    """The signs of a text that a terminal or a browser would obey."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    overrides = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff"
    return [sign for sign in text if sign != "\n" and (unicodedata.category(sign) in kinds or sign in overrides)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31m\n\ud800b", "a\\x1b[31m\\n\\ud800b"),
        ("\x9b2J \u202eevil\u2066 \x7f \ufeff", "\\x9b2J \\u202eevil\\u2066 \\x7f \\ufeff"),
        (
            "日本\u3000語, ملف\u200c, 👨\u200d👩\u200d👧, été\xa0!",
            "日本\u3000語, ملف\u200c, 👨\u200d👩\u200d👧, été\xa0!",
        ),
    ],
)
def test_what_a_terminal_obeys_is_spelled_out_and_nothing_else(text: str, shown: str) -> None:
    assert plain(text) == shown == plain(shown)


@given(st.text())
def test_no_text_reaches_a_terminal_but_as_text(text: str) -> None:
    assert not obeyed(plain(text)) and "\n" not in plain(text)
    assert plain_lines(text).count("\n") == text.count("\n")
    assert len(brief(text)) <= LONGEST and not obeyed(brief(text))


def test_a_long_sentence_keeps_its_beginning_and_its_end() -> None:
    short = "x" * LONGEST
    assert brief(short) == short
    said = brief(f"unknown name {'y' * 9000};\n did you mean 'PGD'?")
    assert len(said) == LONGEST and said.startswith("unknown name yyy") and said.endswith("yyy; did you mean 'PGD'?")
    assert " [... 9,034 signs, all of them with --debug ...] " in said


def test_logs_have_a_line_for_each_message() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LogFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("of this test")
    log.addHandler(handler)
    log.info("label %s", f"{EVIL}\nINFO forged")
    try:
        raise ValueError(f"{EVIL}\nsecond line")
    except ValueError:
        log.exception("it failed")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("INFO label \\x1b]0;owned") and lines[0].endswith("\\nINFO forged")
    assert lines[1:3] == ["ERROR it failed", "Traceback (most recent call last):"] and lines[-1] == "second line"
    assert not obeyed(stream.getvalue())


# Reports


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A report from somewhere, in all of whose texts is something to obey."""
    short = {"model": f"=cmd|' /C calc'!A0 {EVIL}"}
    one = report(notes=(f"note {EVIL}",), short=short, task=EVIL, knowledge=EVIL, seed=EVIL, **PGD)
    one.save(tmp_path / "one.json")
    return tmp_path


def test_a_report_prints_itself_harmlessly(hostile: Path) -> None:
    one = Report.load(hostile / "one.json")
    for text in (str(one), repr(one), one._repr_html_()):
        assert "\\x1b]0;owned\\x07" in text and not obeyed(text)


@pytest.mark.parametrize("form", ["markdown", "csv", "latex", "json"])
def test_a_table_prints_itself_harmlessly(form: str, hostile: Path) -> None:
    text = call("table", str(hostile), "--format", form).stdout
    assert "owned" in text and not obeyed(text)


def test_a_table_on_a_terminal_is_harmless(hostile: Path) -> None:
    console = Console(file=io.StringIO(), width=400, force_terminal=False)
    console.print(pretty(Answers.load(hostile)))
    assert isinstance(console.file, io.StringIO)
    assert "owned" in console.file.getvalue() and not obeyed(console.file.getvalue())


@pytest.mark.parametrize(
    ("label", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+A1", "'+A1"),
        ("-A1", "'-A1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        (" =1+1", "' =1+1"),
        ("＝1+1", "'＝1+1"),
        ("\t=1+1", "\\t=1+1"),
        ("\r=1+1", "\\r=1+1"),
        ("-inf", "'-inf"),
        ("-1", "-1"),
        ("+2.5e-3", "+2.5e-3"),
        ("1=1", "1=1"),
        ("PGD(steps=1)", "PGD(steps=1)"),
    ],
)
def test_a_spreadsheet_computes_no_label(label: str, cell: str, tmp_path: Path) -> None:
    report(short={"model": label}, **PGD).save(tmp_path / "one.json")
    (row,) = csv.DictReader(io.StringIO(render(Answers.load(tmp_path), "csv")))
    assert row["model"] == cell and row["robust"] == "0.75" and row["seed"] == "0"


@pytest.mark.parametrize(
    ("form", "label", "shown"),
    [
        ("latex", r"\input{x}~^#$%&_<|>", r"\textbackslash{}input\{x\}\textasciitilde{}\textasciicircum{}\#\$\%\&\_"),
        ("latex", "a<|>", r"a\textless{}\textbar{}\textgreater{}"),
        ("latex", "[1cm] \n\n x", "{}[1cm] x"),
        ("latex", "*", "{}*"),
        ("markdown", "[a](javascript:b) ![c][d] <e> `f` |g|", r"[a\](javascript:b) ![c\][d] \<e> \`f\` \|g\|"),
        ("markdown", "a\\\n\n# b", r"a\\ # b"),
    ],
)
def test_a_label_is_text_in_markdown_and_latex(form: str, label: str, shown: str, tmp_path: Path) -> None:
    report(short={"model": label}, **PGD).save(tmp_path / "one.json")
    rows = [line for line in render(Answers.load(tmp_path), form).splitlines() if "75.0" in line]
    assert len(rows) == 1 and rows[0].removeprefix("| ").startswith(shown)


def test_what_is_no_report_is_named_once(tmp_path: Path) -> None:
    report().save(tmp_path / "one.json")
    for name in ("config", "kept", "vocab"):
        (tmp_path / f"{name}.json").write_text('{"schema": 1}')
    (left,) = Answers.load(tmp_path).doubts
    assert left == f"left out: config.json, kept.json, vocab.json in {tmp_path} are not reports."
    (tmp_path / "x.json").write_text("[]")
    assert Answers.load(tmp_path).doubts[0].endswith(f"vocab.json and 1 more in {tmp_path} are not reports.")
    for name in ("config", "kept", "vocab"):
        (tmp_path / f"{name}.json").unlink()
    assert Answers.load(tmp_path).doubts == (f"left out: x.json in {tmp_path} is not a report.",)


# Commands


EVAL = ("eval", "--task", "ZeroShot(Scenes('object'))", "--model", "Tiny")


@pytest.mark.parametrize(
    "raised",
    [
        CrossguardError(f"a label {EVIL}\n of two lines {'x' * 9000}; rename it"),
        RuntimeError(f"{EVIL} {'x' * 9000}\nmore"),
        PermissionError(13, "Permission denied", f"{EVIL}{'x' * 9000}".encode()),
    ],
)
def test_an_error_is_one_short_harmless_line_and_whole_where_that_is_asked_for(
    raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setenv("CROSSGUARD_DEBUG", "0")
    monkeypatch.setattr(evaluation, "evaluate", fail)
    said = call(*EVAL).stderr
    assert said.count("\n") == 1 and len(said) <= 301 and "\\x1b]0;owned" in said and not obeyed(said)
    whole = call("--debug", *EVAL).stderr
    assert "x" * 9000 in whole and "Traceback" in whole and not obeyed(whole)
    assert whole.splitlines()[-1].startswith("crossguard: error: ")


@pytest.mark.parametrize("word", ["x" * 9000, f"PGD({'x' * 9000}=1)", "x" * 100 + "=1"])
def test_a_name_that_nobody_knows_is_said_short(word: str) -> None:
    said = error(*EVAL, "--attack", word)
    assert len(said) <= 250 and "x" * 61 not in said and "[..." not in said


@pytest.mark.parametrize(
    "arguments", [(f"--{EVIL}",), (EVIL,), ("eval", f"--{EVIL}"), ("table", "a", EVIL + "x" * 9000)]
)
def test_a_wrong_option_is_one_short_harmless_line(arguments: tuple[str, ...]) -> None:
    said = error(*arguments)
    assert "owned" in said and not obeyed(said) and len(said) <= 300 and "--help'" in said


def test_a_damaged_table_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(range(1, 100)) + b"PAR1")
    assert "a.parquet" in error("eval", "--task", f"ZeroShot(Parquet('{tmp_path / 'a.parquet'}'))", "--model", "Tiny()")


def test_progress_lines_are_harmless(capfd: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    with bar:
        bar.start(2, 0)
        cell = Cell(f"label {EVIL}\nforged", {}, {})
        bar.asks(cell)
        bar.answers(cell, report(**PGD))
        bar.fails(cell, CrossguardError(f"{EVIL} {'x' * 9000}"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and not obeyed("\n".join(lines))
    assert lines[1].startswith("[1/2] label \\x1b]0;owned") and len(lines[2]) < 500


def test_entry_points_are_read_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Any] = []
    monkeypatch.setattr(metadata, "entry_points", lambda **given: reads.append(given) or ())
    crossguard.plugins.cache_clear()
    try:
        for _ in range(3):
            assert crossguard.words.is_name("PGD") and not crossguard.words.is_name("Nobody")
    finally:
        crossguard.plugins.cache_clear()
    assert reads == [{"group": "crossguard"}]


# Durations


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 seconds"), (1.2, "1 second"), (119.0, "119 seconds"), (120.0, "2 minutes"), (3599.0, "60 minutes"),
        (5400.0, "1.5 hours"), (90000.0, "1.0 days"),
    ],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert printing.lasting(seconds) == said


def test_times_are_those_of_the_clock_here() -> None:
    today = datetime.now().astimezone().replace(hour=9, minute=5)
    assert printing.clock(today.timestamp()) == "09:05"
    assert printing.clock((today - timedelta(days=400)).timestamp()).endswith(" 09:05")
    assert len(printing.clock(1e300)) == len("2096-10-02 07:06"), "a forged note is no time"
