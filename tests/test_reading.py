"""What comes from files: JSON and TOML of a known form, whole numbers, names inside a folder, texts, and limits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pytest

from crossguard import CrossguardError, Experiment, limits, reading
from crossguard.limits import Limit, at_least, whole


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(CrossguardError) as caught:
        work()
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400
    return said


class Optional(TypedDict, total=False):
    names: list[str]


class Form(Optional):
    count: int
    share: float
    parts: dict[str, list[int]]


WELL = {"count": 3, "share": 1, "parts": {"a": [1, 2]}}


@pytest.mark.parametrize("value", [WELL, WELL | {"names": ["x"], "more": [[]]}, WELL | {"share": 0.5, "parts": {}}])
def test_json_of_the_wanted_form_is_read(value: dict[str, Any]) -> None:
    assert reading.parse_json(json.dumps(value), Form, "x", "") == value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": True}, "count is True, not a whole number"),
        ({"count": 2**70}, f"count is {2**70}, not a whole number"),
        ({"count": 1.5}, "count is 1.5, not a whole number"),
        ({"share": "x"}, "share is 'x', not a number"),
        ({"parts": []}, "parts is [], not an object"),
        ({"parts": {"a": [1, None]}}, "parts.a[1] is None, not a whole number"),
        ({"parts": {"a": "x" * 9000}}, f"parts.a is 'xxx{'x' * 56}...{'x' * 9}', not a list"),
        ({"names": [3]}, "names[0] is 3, not a text"),
    ],
)
def test_json_of_another_form_is_one_sentence(change: dict[str, Any], said: str) -> None:
    text = json.dumps(WELL | change)
    assert refused(lambda: reading.parse_json(text, Form, "'a.json'", "mend it")) == (
        f"'a.json' is broken: {said}; mend it"
    )


@pytest.mark.parametrize("kind", [list[int] | None, dict[str, int], str])
def test_forms_may_be_unions(kind: Any) -> None:
    fitting = {str: ["a"], dict[str, int]: [{"a": 1}]}.get(kind, [None, [1]])
    for value in ("a", {"a": 1}, None, [1], [None], {"a": None}, 1.5):
        assert (reading.misfit(value, kind) == "") == (value in fitting), value


def test_a_missing_part_is_named() -> None:
    assert "it has no 'count'" in refused(lambda: reading.parse_json("{}", Form, "x", ""))
    assert "[1] has no 'parts'" in refused(
        lambda: reading.parse_json(json.dumps([WELL, {"count": 1, "share": 1}]), list[Form], "x", "")
    )


BROKEN = {
    "cut": b'{"a": [1, 2',
    "no UTF-8": b'{"a": "\xff"}',
    "empty": b"",
    "deep": b"[" * 100_000,
    "too deep": b"[" * 101 + b"]" * 101,
    "digits": b"[" + b"9" * 5000 + b"]",
}


@pytest.mark.parametrize("content", list(BROKEN.values()), ids=list(BROKEN))
def test_broken_json_is_one_sentence_that_names_the_file(content: bytes, tmp_path: Path) -> None:
    (file := tmp_path / "a.json").write_bytes(content)
    assert str(file) in refused(lambda: reading.read_json(file, Any, "mend it"))


def test_the_depth_of_json_can_be_raised_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = "[" * 101 + "]" * 101
    said = refused(lambda: reading.parse_json(deep, Any, "x", ""))
    assert "101 levels of nesting" in said and "CROSSGUARD_MOST_DEPTH" in said
    monkeypatch.setenv("CROSSGUARD_MOST_DEPTH", "101")
    assert reading.parse_json(deep, Any, "x", "")
    assert reading.parse_json(deep[1:-1], Any, "x", "")


TOML = {
    "cut": "task = [",
    "deep": "task = " + "[" * 100_000,
    "deep tables": "task = " + "{a=" * 101 + "1" + "}" * 101,
    "a key of many parts": ".".join("a" * 50_000) + " = 1",
    "digits": "seed = " + "9" * 5000,
    "hexadecimal digits": "seed = 0x" + "f" * 5000,
    "beyond a tensor": f"seed = {2**63}",
    "no text": "task = '\udcff'",
}


@pytest.mark.parametrize("content", list(TOML.values()), ids=list(TOML))
def test_broken_toml_is_one_sentence_that_names_the_file(content: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.toml").write_bytes(content.encode("utf-8", "surrogateescape"))
    began = time.process_time()
    assert str(file) in refused(lambda: Experiment.load(file))
    assert time.process_time() - began < 2


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := tmp_path / "a.json").write_text('["' + "x" * 96 + '"]')
    monkeypatch.setenv("CROSSGUARD_MOST_FILE_BYTES", "99")
    said = refused(lambda: reading.read_json(file, Any, ""))
    assert "100 bytes" in said and "at most 99" in said and "CROSSGUARD_MOST_FILE_BYTES" in said
    monkeypatch.setenv("CROSSGUARD_MOST_FILE_BYTES", "100")
    assert reading.read_json(file, list[str], "") == ["x" * 96]
    monkeypatch.setenv("CROSSGUARD_MOST_EXPERIMENT_BYTES", "10")
    (grid := tmp_path / "a.toml").write_text("task = 'A()'")
    assert "12 bytes" in refused(lambda: Experiment.load(grid))


@pytest.mark.parametrize("most", ["many", "0", "-1", "²", "9" * 5000])
def test_a_limit_that_is_no_number_is_refused(most: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_MOST_DEPTH", most)
    assert "CROSSGUARD_MOST_DEPTH says" in refused(lambda: limits.DEPTH.most)


def test_every_limit_stands_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    listed = [value for value in vars(limits).values() if isinstance(value, Limit)]
    assert sorted(listed, key=str) == sorted(limits.ALL, key=str)
    for limit in limits.ALL:
        assert f"| `{limit.variable}` | {limit.usual:,} {limit.unit} |" in page, limit.variable


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", 0), ("-5", -5), ("007", 7), ("9" * 18, 10**18 - 1)]
    + [(text, None) for text in ("", "-", "--5", "+1", "1_0", "²", "٣", " 1", "1\n", "1.0", "9" * 19, "9" * 5000)],
)
def test_whole_numbers_in_text(text: str, number: int | None) -> None:
    assert whole(text) == number


@pytest.mark.parametrize(
    "value", [0, -1, 2.5, 2.0, True, None, "3", 2**63, 10**6000], ids=lambda value: type(value).__name__
)
def test_what_is_no_count_is_one_sentence(value: object) -> None:
    assert "limit must be a whole number of at least 1" in refused(lambda: at_least("limit", value, 1))


def test_counts_may_be_of_other_kinds() -> None:
    import numpy as np
    import torch

    assert at_least("limit", np.int32(3), 1) == at_least("limit", torch.tensor(3), 1) == at_least("limit", 3, 3) == 3


def test_a_name_leads_nowhere_but_into_its_folder(tmp_path: Path) -> None:
    (own := tmp_path / "own").mkdir()
    (tmp_path / "private.png").write_bytes(b"")
    (own / "out").symlink_to(tmp_path)
    (own / "in").symlink_to(own)
    for name in ("../private.png", "a/../../private.png", str(tmp_path / "private.png"), "a\0.png", "..", "a\\..\\b"):
        assert "is no path inside" in refused(lambda name=name: reading.inside(own, name, "the index"))
        assert "is no path inside" in refused(lambda name=name: reading.inside(own, name, "the index", links=True))
    assert "leads out of" in refused(lambda: reading.inside(own, "out/private.png", "the index"))
    assert reading.inside(own, "out/private.png", "the index", links=True).exists()
    for name in ("a.png", "b/c.png", "in/a.png", "..a", "a..b/c"):
        assert reading.inside(own, name, "the index") == own / name
    assert reading.inside(Path(os.path.relpath(own)), "a.png", "the index") == Path(os.path.relpath(own)) / "a.png"


def test_text_that_is_no_text_is_refused_with_what_holds_it() -> None:
    assert reading.check_text("naïve 😀\0", "x") == "naïve 😀\0"
    assert refused(lambda: reading.check_text("a \ud800 red", "the caption")).startswith(
        "the caption holds a character"
    )
    said = refused(lambda: reading.check_text("a" * 100_001, "the caption"))
    assert said.startswith("the caption has 100,001 characters") and "CROSSGUARD_MOST_CHARACTERS" in said
