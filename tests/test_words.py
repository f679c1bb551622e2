"""Words: text -> object -> text, safely."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import types
import typing
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crossguard
from crossguard import PGD, EachTarget, Square, Worst, words
from crossguard.budgets import Both, Linf, Words, WordShare
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.words import REQUIRED, WordError, build, fields, find, is_word, names, show

QUICK = settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))


@cache
def vocabulary() -> list[type]:
    return [value for name in names() if is_word(value := getattr(crossguard, name))]


# Round trips


def values(annotation: Any, depth: int) -> st.SearchStrategy[Any]:
    """Values of a field, from its type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(argument, depth) for argument in arguments])
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return st.lists(values(arguments[0], depth), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(argument, depth) for argument in arguments))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        type(None): st.none(),
        bool: st.booleans(),
        int: st.integers(-3, 1000),
        float: st.one_of(
            st.integers(0, 510).map(lambda k: k / 2 / 255), st.floats(allow_nan=False, allow_infinity=False)
        ),
        str: st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
        tuple: st.just(()),
    }
    if annotation in plain:
        return plain[annotation]
    fitting = [kind for kind in vocabulary() if issubclass(kind, annotation)]
    if depth > 2:
        flat = [kind for kind in fitting if all(field.default is not REQUIRED for field in fields(kind))]
        fitting = flat or fitting
    return st.sampled_from(fitting).flatmap(lambda kind: instances(kind, depth + 1))


@cache
def instances(kind: type, depth: int = 0) -> st.SearchStrategy[Any]:
    """Words of a kind; a combination that the word itself refuses is left out."""

    @st.composite
    def one(draw: st.DrawFn) -> Any:
        given = {}
        for field in fields(kind):
            if field.default is REQUIRED or draw(st.booleans()):
                given[field.name] = draw(values(field.type, depth))
        try:
            return kind(**given)
        except CrossguardError:
            return None

    return one().filter(lambda word: word is not None)


_EXTREMES = {float: (math.inf, -math.inf, math.nan, 1e300, -1.0, 0.0), int: (-1, 0, 2**70, 10**400)}


@pytest.mark.parametrize("kind", [kind for kind in vocabulary() if not inspect.isabstract(kind)])
def test_a_number_that_a_word_cannot_hold_is_refused_in_a_sentence(kind: type):
    needed = {field.name: crossguard.Tiny() for field in fields(kind) if field.type is VisionLanguageModel}
    if any(field.default is REQUIRED and field.name not in needed for field in fields(kind)):
        return  # a word that needs more than a model
    for field in fields(kind):
        for number in _EXTREMES.get(field.type, ()):
            with contextlib.suppress(CrossguardError):
                kind(**{**needed, field.name: number})


@QUICK
@given(st.data())
def test_every_word_survives_its_text(data: st.DataObject):
    kind = data.draw(st.sampled_from(vocabulary()))
    strategy = instances(kind)
    word = data.draw(strategy)
    for short in (False, True):
        again = build(show(word, short=short))
        assert again == word
        assert hash(again) == hash(word)
        assert show(again) == show(word)


def test_every_word_is_exported_under_its_name_with_fields_that_can_be_written():
    for kind in vocabulary():
        assert find(kind.__name__) is kind
        for field in fields(kind):
            if field.default is not REQUIRED:
                assert build(show(field.default)) == field.default, f"{kind.__name__}.{field.name}"


@given(st.one_of(st.integers(0, 65280).map(lambda k: k / 8 / 255), st.floats(allow_nan=False, allow_infinity=False)))
def test_floats_survive_exactly(value: float):
    for again in (build(show(value)), build(show(value, short=True))):
        assert again == value and isinstance(again, float)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4 / 255, "4/255"),
        (0.5 / 255, "0.5/255"),
        (-4 / 255, "-4/255"),
        (0.2, "0.2"),  # also 51/255, which is longer
        (0.5, "0.5"),
        (-0.0, "0.0"),
        (1e-6, "1e-06"),
        (math.nextafter(0.5 / 255, 1), "0.0019607843137254906"),
        (0.0157, "0.0157"),
    ],
)
def test_floats_are_written_as_pixel_levels_where_that_is_exact(value: float, text: str):
    assert show(value) == show(value, short=True) == text


def test_for_people_a_quarter_of_a_level_is_one_too():
    assert show(Linf(0.25 / 255)) == "Linf(eps=0.000980392156862745)"
    assert show(Linf(0.25 / 255), short=True) == "Linf(0.25/255)" and show(0.125, short=True) == "0.125"


def test_show_spells_every_field_out_and_short_leaves_defaults_out():
    both = Both(Linf(8 / 255), Words())
    assert show(both) == "Both(pixels=Linf(eps=8/255), words=Words(count=1))"
    assert show(both, short=True) == "Both(Linf(8/255), Words(1))"
    assert show(WordShare(), short=True) == "WordShare(0.4)"  # a number that is all there is
    assert show((1, "it's", None, True)) == '(1, "it\'s", None, True)'
    assert show((1,)) == "(1,)" and show(()) == "()"


def test_a_name_alone_is_called_and_a_list_is_a_tuple():
    assert build("Words") == build(" Words() ") == Words(1)
    assert build("[1, [2.5, 'a']]") == (1, (2.5, "a"))
    assert build("Both(words=Words(2), pixels=Linf(2*4/255))") == Both(Linf(8 / 255), Words(2))
    assert build("-1 + 2 * 3") == 5


def test_a_whole_number_becomes_a_float_where_a_float_is_wanted():
    eps = build("L2(1)").eps
    assert isinstance(eps, float)

    @dataclasses.dataclass(frozen=True)
    class Mine:
        size: float

    assert show(Mine(1)) == show(Mine(1.0)) == "Mine(size=1.0)"


# Errors

WRONG = [
    ("PGDD", "unknown name 'PGDD'; did you mean 'PGD'?"),
    ("linf(1)", "did you mean 'Linf'?"),
    ("Scenes(object)", "a string needs quotes: 'object'"),
    ("Linf(epss=1)", "no field 'epss'; did you mean 'eps'? (fields: eps)"),
    ("CrossEntropy(zzz=1)", "has no field 'zzz'; it has none at all"),
    ("Linf()", "Linf needs eps: Linf(eps)"),
    ("HPTGPD(epochs=2)", "HPTGPD needs proxy: HPTGPD(proxy, ...)"),
    ("Linf('a')", "eps must be a number, and 'a' was given"),
    ("Words(1.5)", "count must be a whole number, and 1.5 was given"),
    ("Words(True)", "count must be a whole number, and True was given"),
    ("Both(1, Words())", "pixels must be a PixelBudget, and 1 was given"),
    ("PGD(step_size=1)", "no field 'step_size'; did you mean 'step'?"),
    ("PGD(num_steps=1)", "did you mean 'steps'?"),
    ("Images('C:\\Users\\me')", r"write r'C:\data' or 'C:/data'"),
    ("Words(1, 2)", "was given 2 values without a name and takes at most 1 (count)"),
    ("Linf(1, eps=1)", "was given 'eps' twice"),
    ("Linf(eps=1, eps=1)", "'eps'"),
    ("Linf(-1)", "eps is in pixels"),
    ("Linf(*(1,))", "cannot be used in a word"),
    ("Linf(**{})", "'**' cannot be used"),
    ("", "empty"),
    ("  \n", "empty"),
    ("Linf(", "never closed"),
    ("Linf(1", "never closed"),
    ("1/0", "divides by zero"),
    ("1e308*10", "finite"),
    ("1e999", "finite"),
    ("9" * 30, "too large"),
    ("9" * 5000, "too large"),
    ("1." + "9" * 9000, None),
    ("9" * 4000 + "/7", "too large"),
    ("'a' * 9", "numbers only"),
    ("(1, 2) + (3,)", "numbers only"),
    ("True + 1", "numbers only"),
    ("Linf(1) * 2", "numbers only"),
    ("2 ** 9", "cannot be used"),
    ("10 ** 10 ** 10", "cannot be used"),
    ("1 < 2", "cannot be used"),
    ("~1", "cannot be used"),
    ("not 1", "cannot be used"),
    ("1j", "cannot be used"),
    ("b'x'", "cannot be used"),
    ("...", "cannot be used"),
    ("f'{1}'", "cannot be used"),
    ("{1: 2}", "cannot be used"),
    ("{1}", "cannot be used"),
    ("(lambda: 1)()", "cannot be used"),
    ("Words()()", "cannot be used"),
    ("Words().count", "cannot be used"),
    ("Words.__class__", "cannot be used"),
    ("().__class__.__bases__", "cannot be used"),
    ("[x for x in (1,)]", "cannot be used"),
    ("(x := 1)", "cannot be used"),
    ("(yield)", None),
    ("await x", None),
    ("x = 1", None),
    ("import os", None),
    ("1; 2", None),
    ("__import__('os')", "unknown name '__import__'"),
    ("eval('1')", "unknown name 'eval'"),
    ("open('/etc/passwd')", "unknown name 'open'"),
    ("build('1')", "'build' cannot be used in a word"),
    ("Loss()", "'Loss' cannot be used in a word"),
    ("Untargeted((1, 2))", "'Untargeted' cannot be used in a word"),
    ("Prompts(('a', 'b'), (('a',), ('b',)))", "'Prompts' cannot be used in a word"),
    ("a\0b", "null"),
    ("'\\0'", "null"),
    ("\ud800", "not valid text"),
    ("'\\ud800'", "not valid text"),
    ("(" * 300, None),
    ("(" * 60 + "," + ")" * 60, None),
    ("Linf(" * 60 + ")" * 60, "too deeply"),
    ("[" * 60 + "]" * 60, "too deeply"),
    ("Both(" * 60, None),
    ("-" * 9000 + "1", "too deeply"),
    ("1+" * 4000 + "1", "too deeply"),
    ("x" * 20000, "10000 are the most"),
]


def outcome(text: str) -> str:
    """What an error says; nothing, if there is none."""
    try:
        build(text)
    except CrossguardError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[repr(text)[:40] for text, _ in WRONG])
def test_wrong_texts_end_in_one_short_sentence(text: str, said: str | None):
    message = outcome(text)
    assert "\n" not in message and len(message) < 500
    assert said is None or said in message
    assert message or text.startswith("1.")  # a number with many digits is a number


def test_a_path_without_quotes_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "clip-2").mkdir(parents=True)
    for text in ("runs", "runs/clip-2", "HuggingFace(runs/clip-2)", "Images(runs)", "./runs", f"{tmp_path}/runs"):
        path = text.partition("(")[2].rstrip(")") or text
        assert f"'{path}' is a folder: quote it, as in HuggingFace('{path}')" in outcome(text)
    assert "did you mean 'Ranks'" in outcome("rans")


def test_what_does_not_fit_is_shown_whatever_it_is():
    @dataclasses.dataclass(frozen=True)
    class Foreign:
        path: str
        templates: tuple[str, ...] = ()
        budget: Words = Words()

    for word, said in (
        (Foreign("a", ["a {}", 3]), r"Foreign: templates must be a tuple of str, and \['a {}', 3\] was given"),  # pyright: ignore[reportArgumentType]
        (Foreign(b"a/b"), r"Foreign: path must be a string in quotes, and b'a/b' was given"),  # pyright: ignore[reportArgumentType]
        (Foreign("a", budget=Words), "budget must be a Words, and the class Words without its brackets was given"),  # pyright: ignore[reportArgumentType]
        (Foreign("a", budget=object()), "budget must be a Words, and <object object at"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(WordError, match=said):
            show(word)


def test_what_cannot_be_written_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Listed:
        items: list[int]

    @dataclasses.dataclass(frozen=True)
    class Linf:
        eps: float = 1.0

    @dataclasses.dataclass(frozen=True)
    class CrossEntropyOf:
        scale: float

    for value, said in (
        (math.inf, "finite"),
        (math.nan, "finite"),
        (2**70, "too large"),
        ("\ud800", "not valid text"),
        ([1], "list cannot be written"),
        (object(), "object cannot be written"),
        (Listed([1]), "Listed cannot be written"),
        (Linf(), "has the name of another word"),
        (CrossEntropyOf("far"), "scale must be a number"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(WordError, match=said):
            show(value)


def test_a_word_of_a_script_can_be_shown():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        steps: int = 3

    assert show(Mine(4)) == "Mine(steps=4)"


def test_an_error_that_is_not_ours_becomes_one(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: object) -> None:
        raise TypeError("first line\nsecond line")

    monkeypatch.setattr(Words, "__post_init__", refuse)
    with pytest.raises(WordError, match="Words cannot be made: TypeError: first line second line"):
        build("Words(1)")


def test_a_word_whose_module_does_not_load_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    point = EntryPoint("Absent", "crossguard.absent:Absent", "crossguard")
    monkeypatch.setattr(crossguard, "plugins", lambda: {"Absent": point})
    with pytest.raises(WordError, match="Absent cannot be loaded"):
        build("Absent")


def test_installed_packages_add_words(monkeypatch: pytest.MonkeyPatch):
    @dataclasses.dataclass(frozen=True)
    class Foreign:
        size: int = 1

    class Point:
        def load(self) -> type:
            return Foreign

    monkeypatch.setattr(crossguard, "plugins", lambda: {"Foreign": Point()})
    assert "Foreign" in names()
    assert build("Foreign(2)") == Foreign(2)
    vars(crossguard).pop("Foreign")
    with pytest.raises(WordError, match="did you mean 'Foreign'"):
        build("Foreing")


# Fuzz

SEEDS = [
    "Both(Linf(8/255), Words(2))",
    "L2(eps=0.5)",
    "(1, 'a', None)",
    "Words",
    "Both(pixels=L2(1e-3), words=Characters())",
]
SIGNS = st.sampled_from(
    [*"()[]{},.=*+-/'\"\\:;@#\0\n\t ", "Linf", "Words", "__", "lambda", "1e9", "\ud800", "0x", "é", "if"]
)


@st.composite
def mutations(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(SEEDS))
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 3)))
        text = text[:start] + draw(SIGNS) + text[end:]
    return text


PLAIN = (int, float, str, bool, tuple, type(None))


def only_words(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(only_words(item) for item in value)
    return isinstance(value, PLAIN) or type(value) in vocabulary()


@QUICK
@given(st.one_of(mutations(), st.text(max_size=60), st.text("()[],'1+-*/ PGDLinf.=", max_size=40)))
def test_no_text_does_anything_but_build_a_word_or_end_in_a_sentence(text: str):
    message = outcome(text)
    assert "\n" not in message
    if not message:
        value = build(text)
        assert only_words(value)
        assert build(show(value)) == value


@QUICK
@given(st.one_of(mutations(), st.text(max_size=60)))
def test_no_text_calls_anything_outside_the_vocabulary(text: str):
    made: list[type] = []
    original = words._make

    def watch(kind: type, takes: Any, given: Any) -> Any:
        made.append(kind)
        return original(kind, takes, given)

    words._make = watch
    try:
        outcome(text)
    finally:
        words._make = original
    assert all(kind in vocabulary() for kind in made)


def test_mapped_changes_words_wherever_they_are() -> None:
    inner = PGD(steps=3)
    word = Worst((inner, EachTarget(PGD(steps=4)), Square()))

    def longer(part: Any) -> Any:
        return dataclasses.replace(part, steps=10 * part.steps) if isinstance(part, PGD) else part

    assert words.mapped(word, longer) == Worst((PGD(steps=30), EachTarget(PGD(steps=40)), Square()))
    assert words.mapped(word, lambda part: part) is word
    seen: list[str] = []
    words.mapped(Worst((inner, Square())), lambda part: seen.append(type(part).__name__) or part)
    assert seen.index("PGD") < seen.index("Square") < seen.index("Worst")
    assert words.mapped((inner, 3, None), lambda part: Square()) == (Square(), 3, None)
