"""The text form of all that can be named: `build` reads a word such as `PGD(steps=100)`, `show` writes it.

A word is a frozen dataclass of the vocabulary (the exports of `crossguard`). What it holds is words, numbers,
strings, True, False, None and tuples of these, so the text says everything and equal words have equal texts.
Text is parsed, never executed.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import inspect
import math
import operator
import os
import re
import types
import typing
import warnings
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeVar

from crossguard import own, short
from crossguard.errors import CrossguardError
from crossguard.limits import LARGEST, shortened, shortly

T = TypeVar("T")

LONGEST = 10_000  # characters of a word: more is a mistake, and parsing it would take long
DEEPEST = 40  # brackets and operators inside each other
MOST_PARTS = LONGEST // 2  # numbers, strings and words inside a word: no text of that length holds more
LONGEST_SHOWN = 10_000_000  # characters: a word that holds the names of 21,000 classes has some hundred thousand


class WordError(CrossguardError):
    """A text that is not a word, or an object that has no text."""


class Field(NamedTuple):
    """A field of a word: its name, its type and its default (`REQUIRED`, if there is none)."""

    name: str
    type: Any
    default: Any
    positional: bool


REQUIRED = dataclasses.MISSING


def build(text: str, known: Mapping[str, Any] | None = None) -> Any:
    """The object that a text names: `build("PGD(steps=100)")`. A name alone is called: `PGD` means `PGD()`.

    Allowed are names of the vocabulary, numbers, strings, True, False, None, `+ - * /` of numbers, tuples
    (lists become tuples) and nested calls with positional and keyword arguments. Anything else raises
    `WordError`, and nothing is ever executed.

    Args:
        known: objects by a name of their own, which the text may use in addition (the `let` of an experiment file).
    """
    return _Reader(text, known or {}).read(parse(text), 0)


KINDS = {
    "task": "Task",
    "model": "VisionLanguageModel",
    "attack": "Attack",
    "budget": "Budget",
    "surrogate": "VisionLanguageModel",
    "data": "Dataset",
    "recipe": "Recipe",
}
OPTIONAL = ("attack", "budget", "surrogate")  # may be None: a clean evaluation, no budget, a white box


def read(kind: str, text: str, known: Mapping[str, Any] | None = None) -> Any:
    """The object that a text names, which must be a task, model, attack, budget, surrogate, data or recipe, as `kind`
    says. A path or a hub id is the model or the data that it leads to, and data are the task that fits them.

    Raises:
        CrossguardError: the text is not a word, or names something of another kind.
    """
    return _of_kind(kind, build(expanded(kind, text, known or ()), known))


def given(kind: str, value: Any) -> Any:
    """What somebody gave in Python as a task, model and so on (see `read`): a word, the text of one, a path or a class
    without its brackets. Lists in it become tuples, and paths become texts, as words hold them.

    Raises:
        CrossguardError: it is nothing of this kind, or a part of it does not fit.
    """
    if isinstance(value, str | os.PathLike):
        return read(kind, os.fspath(value))
    if isinstance(value, type) and is_word(value):
        value = _make(value, fields(value), {})
    return _of_kind(kind, _whole(value))


def _of_kind(kind: str, value: Any) -> Any:
    """The same value, or the task of data; raises where it is of another kind."""
    crossguard = importlib.import_module("crossguard")
    if kind == "task" and isinstance(value, crossguard.Dataset):
        return crossguard.ZeroShot(value) if value.names else crossguard.Retrieval(value)
    if value is None and kind in OPTIONAL:
        return None
    if not isinstance(value, getattr(crossguard, KINDS[kind])):
        article = "an" if kind[0] in "aeiou" else "a"
        hint = "see the list of 'crossguard words'"
        if KINDS[kind] == "VisionLanguageModel" and callable(getattr(value, "forward", None)):
            hint = "give Live(model, processor, tokenizer), or the folder that it was saved to (save_pretrained)"
        raise CrossguardError(f"{quoted(value)} is not {article} {kind}; {hint}")
    return value


def expanded(kind: str, text: str, known: Iterable[str] = ()) -> str:
    """The word that a short form stands for, such as a path; the text itself, where it is a word already or nothing
    that is there."""
    named = re.match(r"\s*([^\W\d]\w*)\s*(\(|$)", text)
    if named and (named[2] or named[1] == "None" or named[1] in known or is_name(named[1])):
        return text
    found = _at_path(KINDS[kind], text)
    paths = KINDS[kind] in ("VisionLanguageModel", "Dataset", "Task")
    if not found and paths and re.fullmatch(r"[^()'\"]*[/\\.~][^()'\"]*", text.strip()):
        raise WordError(f"there is no file or folder {shortly(text)}{short.near(text)}")
    return found or text


def _at_path(wanted: str, text: str) -> str:
    """The word of a model or of data that a text leads to; empty where it leads nowhere, or another word is wanted."""
    if wanted == "VisionLanguageModel":
        return short.model(text)
    return short.data(text) if wanted in ("Dataset", "Task") else ""


def _whole(word: Any) -> Any:
    """The word with tuples for lists and texts for paths, itself where it has none; what is no word stays as it is."""
    if isinstance(word, tuple | list):
        return tuple(_whole(item) for item in word)
    kind = type(word)
    if not is_word(kind):
        return word
    held = {field: getattr(word, field.name) for field in fields(kind)}
    parts = {field.name: fitted(kind, field, _whole(part)) for field, part in held.items()}
    changes = {field.name: parts[field.name] for field, part in held.items() if not _same(parts[field.name], part)}
    return dataclasses.replace(word, **changes) if changes else word


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and one == other)


def _extent(word: object, most: int) -> tuple[int, int]:
    """How many numbers, strings and words a word is made of, counted no further than to `most`, and how deep it is."""
    parts: Iterable[object] = ()
    if isinstance(word, tuple):
        parts = word
    elif dataclasses.is_dataclass(word):
        parts = (getattr(word, field.name) for field in dataclasses.fields(word))
    count, depth = int(not isinstance(word, tuple)), 0
    for part in parts:
        if count > most:
            break
        inside, deeper = _extent(part, most - count)
        count, depth = count + inside, max(depth, deeper + 1)
    return count, depth


def show(word: object, *, short: bool = False) -> str:
    """The text of a word: every field spelled out (for reports and hashes), or `short`, with the fields that
    are not at their default (for people), and a number that is all that the word holds: `Words(1)`.
    `build(show(word)) == word`.

    A float is written as `k/255` where that is exact and shorter than its decimals, for k in halves, and `short` also
    in eighths.
    """
    text = _show(word, short, 0)
    if len(text) > LONGEST_SHOWN:
        raise WordError(f"a word of {len(text):,} characters cannot be used; {LONGEST_SHOWN:,} are the most")
    return text


def fields(kind: type) -> tuple[Field, ...]:
    """The fields of a kind of word, in the order of its arguments."""
    hints = _hints(kind)
    listed = []
    for field in dataclasses.fields(kind):
        if field.init:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            listed.append(Field(field.name, hints[field.name], default, not field.kw_only))
    return tuple(listed)


def within(word: object, kind: type[T]) -> Iterator[T]:
    """What of this kind a word is made of, itself before its parts."""
    if isinstance(word, kind):
        yield word
    parts: Iterable[object] = word if isinstance(word, tuple) else ()
    if dataclasses.is_dataclass(word) and not isinstance(word, type):
        parts = [getattr(word, field.name) for field in dataclasses.fields(word)]
    for part in parts:
        yield from within(part, kind)


def mapped(word: Any, change: Callable[[Any], Any]) -> Any:
    """The word after `change` has been asked about each word inside it, the parts before the whole.

    Args:
        change: returns what takes the place of a word; the word itself, if it stays.
    """
    if isinstance(word, tuple):
        items = tuple(mapped(item, change) for item in word)
        return items if any(new is not old for new, old in zip(items, word, strict=True)) else word
    if not dataclasses.is_dataclass(word) or isinstance(word, type):
        return word
    held = {field.name: getattr(word, field.name) for field in dataclasses.fields(word) if field.init}
    parts = {name: mapped(part, change) for name, part in held.items()}
    changes = {name: part for name, part in parts.items() if part is not held[name]}
    return change(dataclasses.replace(word, **changes) if changes else word)


class Word:
    """What all kinds of words inherit from: a list or a path that somebody gives a field in Python becomes the tuple or
    the text that it holds, and a value that its own checks cannot even compare is named with its field."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own_check = vars(cls).get("__post_init__")
        if own_check is None and hasattr(cls, "__post_init__"):
            return

        def __post_init__(self: Any) -> None:
            _settle(self)
            try:
                if own_check is not None:
                    own_check(self)
            except (TypeError, AttributeError):
                _check_fields(self)
                raise

        setattr(cls, "__post_init__", __post_init__)  # noqa: B010  (no type says that it is there)


def _settle(word: Any) -> None:
    """Lists and paths in the fields become tuples and texts, where these are wanted."""
    for name, value in list(vars(word).items()):
        if isinstance(value, list | os.PathLike) and is_word(type(word)):
            field = next((field for field in fields(type(word)) if field.name == name), None)
            if field is not None:
                with suppress(WordError):  # whoever uses it says what does not fit
                    object.__setattr__(word, name, fitted(type(word), field, value))


def _check_fields(word: Any) -> None:
    """Raises where a field holds what does not fit."""
    if is_word(type(word)):
        for field in fields(type(word)):
            fitted(type(word), field, getattr(word, field.name))


class Reads:
    """A word that reads files: a checkpoint, a data set, a list of synonyms."""

    @property
    def fingerprint(self) -> str:
        """Says what the files hold now: another text when they have changed, an empty one where there are none."""
        return ""


def contents(word: object) -> str:
    """What the files behind a word hold, in one short text: a word of the same text whose files have changed has
    another, as has a word of one's own whose code has changed. Looks at every word inside (the base of a wrapper, the
    language model of an attack, the data of a `Fit`).
    """
    found: list[tuple[Reads, str]] = []
    _contents(word, found)
    # In the order of their places: two lists of synonyms that have changed places are other files behind each word.
    told = [f"{type(part).__name__}:{fingerprint}" for part, fingerprint in found]
    return " ".join([*told, *sorted({f"{type(part).__name__}.code:{own.code(type(part))}" for part in _foreign(word)})])


def _foreign(word: object) -> Iterator[object]:
    """The words inside whose code is not of this package."""
    return (part for part in within(word, object) if dataclasses.is_dataclass(part) and own.code(type(part)))


def _contents(word: object, found: list[tuple[Reads, str]]) -> set[str]:
    """Adds to `found` what each word inside reads, and returns the fingerprints of all of them."""
    parts: Iterable[object] = word if isinstance(word, tuple) else ()
    if dataclasses.is_dataclass(word) and not isinstance(word, type):
        parts = [getattr(word, field.name) for field in dataclasses.fields(word)]
    told = set[str]().union(*(_contents(part, found) for part in parts))
    if isinstance(word, Reads):
        held = word.fingerprint
        if not set(held.split()) <= told:  # what a word over data says is what the data say: the innermost speaks
            told.add(held)
            if (word, held) not in found:
                found.append((word, held))
    return told


def is_word(kind: object) -> bool:
    """Whether this is a class of words: a concrete frozen dataclass all of whose fields have a text."""
    if not _is_plain(kind):
        return False
    assert isinstance(kind, type)
    return all(_writable(field.type) for field in fields(kind))


def names() -> tuple[str, ...]:
    """The names of the vocabulary, of words of one's own and of installed plugins, whether words or not. Loads
    nothing."""
    crossguard = importlib.import_module("crossguard")
    return tuple(dict.fromkeys([*crossguard.VOCABULARY, *own.names(), *crossguard.plugins()]))


def is_name(name: str) -> bool:
    """Whether the vocabulary, a word of one's own or an installed plugin has this name."""
    crossguard = importlib.import_module("crossguard")
    return name in crossguard.VOCABULARY or name in own.names() or name in crossguard.plugins()


def find(name: str) -> type:
    """The class of words with this name; loads the module that it lives in."""
    crossguard = importlib.import_module("crossguard")
    if not is_name(name):
        raise unknown(name)
    try:
        found = _exported(name)
    except CrossguardError as error:  # a file of one's own that cannot be run
        raise WordError(str(error)) from error
    except ImportError as error:
        raise WordError(f"{name} cannot be loaded: {_line(error)}") from error
    except AttributeError as error:
        raise WordError(f"{name} cannot be found in the package that should have it: {_line(error)}") from error
    if not is_word(found):
        raise no_word(name) if name in crossguard.VOCABULARY else WordError(f"{name} is no word: {_lacking(found)}")
    return found


def _exported(name: str) -> Any:
    """What a name of the vocabulary, of one's own or of a plugin stands for."""
    crossguard = importlib.import_module("crossguard")
    return own.load(name) if name not in crossguard.VOCABULARY and name in own.names() else getattr(crossguard, name)


def register(kind: type[T]) -> type[T]:
    """Makes a class of one's own a word, so that `build` reads it and experiments may name it; as a decorator above
    `@dataclass(frozen=True)`, or called with the class. A class that is made anew, as in a notebook, takes the place of
    the former. For files there is `--words mine.py`, which needs no call.

    Raises:
        WordError: the class is no frozen dataclass of what has a text, or has the name of another word.
    """
    if not is_word(kind):
        name = kind.__name__ if isinstance(kind, type) else shortly(kind)
        raise WordError(f"{name} is no word: {_lacking(kind)}")
    own.put(kind)
    return kind


def _lacking(kind: object) -> str:
    """What keeps this from being a word, and what would do."""
    if not isinstance(kind, type):
        return f"it is {shortly(kind)}, and a word is a frozen dataclass"
    if "__dataclass_fields__" not in vars(kind) or not getattr(kind, "__dataclass_params__").frozen:  # noqa: B009
        return "put @dataclass(frozen=True) above the class"
    if inspect.isabstract(kind):
        return f"it does not say {', '.join(sorted(kind.__abstractmethods__))}, which its base class leaves to it"
    wrong = next(field for field in fields(kind) if not _writable(field.type))
    return (
        f"its field {wrong.name} is of the type {type_text(wrong.type)}, which has no text; take numbers, strings, "
        "True, False, None, tuples of these and other words"
    )


def type_text(annotation: Any) -> str:
    """A type as it is written in code: `float | None`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    if _is_union(annotation):
        return " | ".join(type_text(argument) for argument in arguments)
    if origin is typing.Literal:
        return " | ".join(repr(argument) for argument in arguments)
    if origin is typing.Annotated:
        return type_text(arguments[0])
    if origin is not None:
        return f"{type_text(origin)}[{', '.join(type_text(argument) for argument in arguments)}]"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


# Reading


def parse(text: str) -> ast.expr:
    """The syntax tree of a text that may be a word; raises `WordError` where it is none at first sight."""
    if not isinstance(text, str):
        raise WordError(f"a word is a text such as 'PGD(steps=10)', and {shortly(text)} was given")
    if not text.strip():
        raise WordError("the word is empty; give one such as 'PGD(steps=10)'")
    if len(text) > LONGEST:
        raise WordError(f"the word {shortly(text)} has {len(text)} characters, and {LONGEST} are the most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        reason = error.msg if "digits" not in error.msg else "a number in it is too large"
        if "codec can't decode" in error.msg:
            reason = r"a backslash in a string begins a special character; write r'C:\data' or 'C:/data'"
        raise WordError(f"{shortly(text)} is not a word: {short.quoted(text) or reason}") from None
    except UnicodeError:
        raise WordError(f"{shortly(text)} is not a word: it holds characters that are not valid text") from None
    except ValueError as error:
        raise WordError(f"{shortly(text)} is not a word: {_line(error)}") from None
    except (RecursionError, MemoryError):
        raise WordError(f"{shortly(text)} is not a word: it is nested too deeply") from None


class _Reader:
    """Turns a parsed text into objects; holds the text for its error messages."""

    def __init__(self, text: str, known: Mapping[str, Any]) -> None:
        self.text = text
        self.known = known
        self.parts = 0  # of named words, each as often as its name is used

    def read(self, node: ast.expr, depth: int) -> Any:
        if depth > DEEPEST:
            raise self.too_deep()
        match node:
            case ast.Constant(value=value):
                return self.literal(value)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return tuple(self.read(item, depth + 1) for item in items)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                number = self.number(operand, depth)
                return self.literal(-number if isinstance(sign, ast.USub) else number)
            case ast.BinOp() if near := short.quoted(self.source(node)):
                raise WordError(f"{shortly(self.source(node))} is not a word: {near}")
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self.calculate(type(op), self.number(left, depth), self.number(right, depth))
            case ast.Name(id=name) if name in self.known:
                return self.named(self.known[name], depth)
            case ast.Name(id=name):
                return self.call(name, [], [], depth)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                return self.call(name, args, keywords, depth)
        if near := short.quoted(self.source(node)):
            raise WordError(f"{shortly(self.source(node))} is not a word: {near}")
        raise WordError(
            f"{shortly(self.source(node))} cannot be used in a word; a word is made of names, numbers, "
            f"strings in quotes, tuples, '+ - * /' of numbers and calls such as 'PGD(steps=10)'"
        )

    def too_deep(self) -> WordError:
        return WordError(f"{shortly(self.text)} is not a word: it is nested too deeply")

    def named(self, word: Any, depth: int) -> Any:
        """A word that has a name. What each use of it stands for counts: a few names, each for two of the one before,
        would be a word that no memory holds once it is written."""
        parts, deeper = _extent(word, MOST_PARTS - self.parts)
        self.parts += parts
        if self.parts > MOST_PARTS:
            raise WordError(
                f"{shortly(self.text)} stands for a word of more than {MOST_PARTS} parts once its names are put in; "
                "that is too large"
            )
        if depth + deeper > DEEPEST:
            raise self.too_deep()
        return word

    def literal(self, value: object) -> Any:
        if isinstance(value, str):
            return _check_string(value)
        if isinstance(value, bool | int | float | None):
            return _check_number(value)
        raise WordError(f"{shortly(value)} cannot be used in a word; give a number, a string, True, False or None")

    def number(self, node: ast.expr, depth: int) -> int | float:
        value = self.read(node, depth + 1)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WordError(f"'+ - * /' work on numbers only, and {shortly(self.source(node))} is none")
        return value

    def calculate(self, kind: type, left: int | float, right: int | float) -> Any:
        try:
            return self.literal(_OPERATORS[kind](left, right))
        except ZeroDivisionError:
            raise WordError(f"{shortly(self.text)} is not a word: it divides by zero") from None
        except OverflowError:
            raise WordError(f"{shortly(self.text)} is not a word: a number in it is too large") from None

    def call(self, name: str, args: list[ast.expr], keywords: list[ast.keyword], depth: int) -> Any:
        if not is_name(name):
            raise unknown(name, self.known)
        kind = find(name)
        takes = fields(kind)
        nodes = arguments(name, {field.name: field.positional for field in takes}, args, keywords)
        return _make(kind, takes, {field: self.read(node, depth + 1) for field, node in nodes.items()})

    def source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.text.strip(), node) or self.text


def arguments(
    name: str, takes: Mapping[str, bool], args: Sequence[ast.expr], keywords: Sequence[ast.keyword]
) -> dict[str, ast.expr]:
    """What a call gives to each field; raises `WordError` where it does not fit.

    Args:
        takes: the fields of the word, and whether they may be given without their name.
    """
    given: dict[str, ast.expr] = {}
    positional = [field for field, bare in takes.items() if bare]
    if len(args) > len(positional):
        most = f"at most {len(positional)} ({', '.join(positional)})" if positional else "none"
        raise WordError(f"{name} was given {len(args)} value{'s' * (len(args) > 1)} without a name and takes {most}")
    given |= zip(positional, args, strict=False)
    for keyword in keywords:
        if keyword.arg is None:
            raise WordError(f"'**' cannot be used in a word; write the fields of {name} out")
        if keyword.arg not in takes:
            raise WordError(_no_field(name, keyword.arg, list(takes)))
        if keyword.arg in given:
            raise WordError(f"{name} was given {keyword.arg!r} twice")
        given[keyword.arg] = keyword.value
    return given


def unknown(name: str, known: Iterable[str] = ()) -> WordError:
    """What is wrong with a name that is none of the vocabulary, nor of what else is known."""
    hint = short.quoted(name) or own.near_miss(name)
    if not hint:
        hint = nearest(name, (*names(), *known)).removeprefix("; ")
        there = short.near(name).removeprefix("; ")
        hint = f"{there}, or {hint}" if hint and there else hint or there or f"a string needs quotes: {shortly(name)}"
    return WordError(f"unknown name {shortly(name)}; {hint}")


def no_word(name: str) -> WordError:
    """What is wrong with a name of the vocabulary that is no word, but a function or an abstract class."""
    return WordError(f"{name!r} cannot be used in a word; 'crossguard words' lists the names that can")


_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _make(kind: type, takes: tuple[Field, ...], given: dict[str, Any]) -> Any:
    missing = [field.name for field in takes if field.default is REQUIRED and field.name not in given]
    if missing:
        raise needs(kind.__name__, missing, {field.name: field.default is REQUIRED for field in takes})
    fitting = {field.name: fitted(kind, field, given[field.name]) for field in takes if field.name in given}
    try:
        return kind(**fitting)
    except CrossguardError:
        raise
    except Exception as error:
        raise WordError(f"{kind.__name__} cannot be made: {type(error).__name__}: {_line(error)}") from error


def fitted(kind: type, field: Field, value: Any) -> Any:
    """The value as the field of a word wants it: a whole number is a float where one is wanted.

    Raises:
        WordError: it does not fit.
    """
    try:
        return _fit(value, field.type, True)
    except _Misfit:
        pass
    if isinstance(value, str) and (full := _led_to(field.type, value)):
        return fitted(kind, field, build(full))
    raise WordError(f"{kind.__name__}: {field.name} must be {_expected(field.type)}, and {quoted(value)} was given")


def _led_to(annotation: Any, text: str) -> str:
    """The word of the model or data that a text leads to, where this type wants one; else empty."""
    if _is_union(annotation):
        return next((full for arm in typing.get_args(annotation) if (full := _led_to(arm, text))), "")
    names = [one.__name__ for one in annotation.__mro__] if isinstance(annotation, type) else []
    wanted = next((name for name in names if name in ("VisionLanguageModel", "Dataset")), "")
    return _at_path(wanted, text)


def quoted(value: object) -> str:
    """What was given, in one short line for an error message."""
    if isinstance(value, type):
        called = " without its brackets" if is_word(value) else ""
        return f"the class {value.__name__}{called}"
    try:
        return shortly(value) if isinstance(value, str) else shortened(_show(value, True, 0))
    except WordError:
        return " ".join(shortly(value).split())


# Types


class _Misfit(Exception):
    """A value does not fit its annotation."""


def _fit(value: Any, annotation: Any, convert: bool) -> Any:
    """The value as the annotation wants it; with `convert`, a whole number does where a float is wanted."""
    if _is_union(annotation):
        arms = typing.get_args(annotation)
        for exact in (False, True) if convert else (False,):
            for arm in arms:
                try:
                    return _fit(value, arm, exact)
                except _Misfit:
                    continue
        raise _Misfit
    if annotation is None or annotation is type(None):
        return _when(value is None, value)
    if annotation is float:
        if convert and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        return _when(isinstance(value, float), value)
    if annotation is int:
        return _when(isinstance(value, int) and not isinstance(value, bool), value)
    if annotation is str and convert and isinstance(value, os.PathLike):
        return _fit(os.fspath(value), str, False)
    if annotation in (bool, str):
        return _when(isinstance(value, annotation), value)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return _when(any(value == one and type(value) is type(one) for one in arguments), value)
    if origin is typing.Annotated:
        return _fit(value, arguments[0], convert)
    if origin is tuple and isinstance(value, tuple | (list if convert else tuple)):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_fit(item, arguments[0], convert) for item in value)
        items = () if arguments == ((),) else arguments
        if len(items) != len(value):
            raise _Misfit
        return tuple(_fit(item, one, convert) for item, one in zip(value, items, strict=True))
    if annotation is Any:
        return value
    if origin is None and isinstance(annotation, type):
        return _when(isinstance(value, annotation), value)
    from beartype.door import is_bearable

    return _when(is_bearable(value, annotation), value)


def _when(fits: bool, value: Any) -> Any:
    if not fits:
        raise _Misfit
    return value


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_plain(kind: object) -> bool:
    """Whether this is a concrete frozen dataclass."""
    return (
        isinstance(kind, type)
        and dataclasses.is_dataclass(kind)
        and getattr(kind, "__dataclass_params__").frozen  # noqa: B009  (no type says that it is there)
        and not inspect.isabstract(kind)
    )


def _writable(annotation: Any) -> bool:
    """Whether values of this type can be written as text: no mappings, tensors or networks."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if _is_union(annotation) or origin is tuple:
        return all(argument is Ellipsis or argument == () or _writable(argument) for argument in arguments)
    if origin is typing.Annotated:
        return _writable(arguments[0])
    if origin is typing.Literal or annotation in (
        None,
        type(None),
        int,
        float,
        str,
        bool,
        tuple,
        object,
        Any,
    ):
        return True
    if not isinstance(annotation, type) or origin is not None:
        return False
    return ABC in annotation.__mro__ or is_word(annotation)


@cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a class as types; names imported for type checkers only come from the vocabulary."""
    known: dict[str, Any] = {}
    while True:
        try:
            return typing.get_type_hints(kind, localns=known or None, include_extras=True)
        except NameError as error:
            if error.name is None or error.name in known or error.name not in names():
                raise WordError(f"{kind.__name__} cannot be used in a word: {_line(error)}") from error
            known[error.name] = _exported(error.name)


def _expected(annotation: Any) -> str:
    """What would do, in words."""
    arguments = typing.get_args(annotation)
    if _is_union(annotation):
        return " or ".join(_expected(argument) for argument in arguments)
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if typing.get_origin(annotation) is tuple or annotation is tuple:
        inside = [type_text(argument) for argument in arguments if argument is not Ellipsis]
        return f"a tuple of {', '.join(inside)}" if inside else "a tuple"
    spelled = {int: "a whole number", float: "a number", str: "a string in quotes", bool: "True or False"}
    if annotation in spelled:
        return spelled[annotation]
    name = type_text(annotation)
    if not isinstance(annotation, type) or annotation is type(None):
        return name
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


# Writing


def _show(value: object, short: bool, depth: int) -> str:
    if depth > DEEPEST:
        raise WordError("an object cannot be written as a word: it is nested too deeply")
    if isinstance(value, str):
        return repr(_check_string(value))
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, int):
        return repr(_check_number(int(value)))
    if isinstance(value, float):
        return show_float(float(value), 8 if short else 2)
    if isinstance(value, tuple):
        inside = [_show(item, short, depth + 1) for item in value]
        return f"({inside[0]},)" if len(inside) == 1 else f"({', '.join(inside)})"
    kind = type(value)
    if not is_word(kind):
        raise WordError(
            f"{kind.__name__} cannot be written as a word; a word is a frozen dataclass of numbers, strings, "
            f"tuples and words"
        )
    _check_own_name(kind)
    parts, takes = [], fields(kind)
    for field in takes:
        held = fitted(kind, field, getattr(value, field.name))
        size = len(takes) == 1 and field.type in (int, float)
        if short and not size and field.default is not REQUIRED and held == field.default:
            continue
        text = _show(held, short, depth + 1)
        bare = short and (size or field.default is REQUIRED) and field.positional
        parts.append(text if bare else f"{field.name}={text}")
    return f"{kind.__name__}({', '.join(parts)})"


def show_float(value: float, parts: int = 2) -> str:
    """A float as a word spells it.

    Args:
        parts: of a level of 255 that may be counted. In full texts, which reports are known by, halves.
    """
    plain = repr(_check_number(value + 0.0))  # -0.0 equals 0.0 and must have the same text
    if abs(value) <= 255:
        levels = round(value * 255 * parts) / parts
        if levels / 255 == value:
            return min(f"{levels:.9g}/255", plain, key=len)
    return plain


def _check_own_name(kind: type) -> None:
    """Two classes must not share a text: a class that is not the vocabulary's may not have a name of it."""
    crossguard = importlib.import_module("crossguard")
    if kind.__name__ in crossguard.VOCABULARY and getattr(crossguard, kind.__name__) is not kind:
        raise WordError(f"{kind.__module__}.{kind.__name__} has the name of another word; give the class its own name")


# Checks and sentences


def _check_string(value: str) -> str:
    if "\0" in value:
        raise WordError(f"the string {shortly(value)} holds a null byte")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise WordError(f"the string {shortly(value)} holds characters that are not valid text (surrogates)") from None
    return value


def _check_number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise WordError(f"{value} cannot be used in a word; give a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise WordError("a whole number in the word is too large; 2**63 - 1 is the most")
    return value


def needs(name: str, missing: Sequence[str], takes: Mapping[str, bool]) -> WordError:
    """What is wrong with a word that lacks some of its fields.

    Args:
        takes: the fields of the word, and whether it cannot do without them.
    """
    must = [field for field, required in takes.items() if required]
    return WordError(
        f"{name} needs {', '.join(missing)}: {name}({', '.join(must)}{', ...' * (len(must) < len(takes))})"
    )


def _no_field(name: str, wrong: str, listed: Sequence[str]) -> str:
    if not listed:
        return f"{name} has no field {shortly(wrong)}; it has none at all"
    return f"{name} has no field {shortly(wrong)}{nearest(wrong, listed)} (fields: {', '.join(listed)})"


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'PGD'?`, or nothing."""
    by_lower = {one.lower(): one for one in known}
    near = [part for part in name.lower().split("_") if part in by_lower]  # step_size: step
    near = near or difflib.get_close_matches(name.lower()[:100], by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
