"""Files as they are read: texts in UTF-8, JSON and TOML of a known form, the files below a folder, and what tells that
they have changed.

Files come from anywhere. Whatever is wrong with one ends in a sentence that names it, and none fills the memory: see
`limits`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar, overload

from crossguard.errors import CrossguardError
from crossguard.files import hashed, reason
from crossguard.limits import DEPTH, EXPERIMENT, FILE, LARGEST, TEXT, Limit, shortly
from crossguard.printing import one_line

T = TypeVar("T")

BYTES_HASHED, MOST_HASHED = 64_000_000, 2_000  # so many bytes in so many files are hashed in a second

LEFT_BEHIND = frozenset({"__MACOSX"})  # folders that archives hold without anybody having put them there


class Missing(CrossguardError):
    """A file that is not there."""


class Found(NamedTuple):
    """A file below a folder: its path there (with `/`), its size in bytes and its date in nanoseconds."""

    path: str
    size: int
    modified: int


def content(file: Path, give: str, limit: Limit = FILE) -> bytes:
    """What a file holds, if that is not more than `limit` bytes.

    Args:
        give: What would do instead, for the error: "give a text file with one class name a line".

    Raises:
        Missing: There is no such file.
        CrossguardError: The file cannot be read or is too large.
    """
    what = repr(str(file))
    try:
        with file.open("rb") as opened:
            limit.check(os.fstat(opened.fileno()).st_size, what)
            data = opened.read(limit.most + 1)  # it may have grown, or be no file that has a size
    except (OSError, ValueError) as error:  # a name with a null byte in it is a ValueError
        if isinstance(error, CrossguardError):
            raise
        told = reason(error) if isinstance(error, OSError) else str(error)
        kind = Missing if isinstance(error, FileNotFoundError) else CrossguardError
        raise kind(f"{what} cannot be read ({told}); {give}") from error
    limit.check(len(data), what)
    return data


def text(file: Path, give: str) -> str:
    """The content of a text file in UTF-8, without the byte order mark that some editors put first; see `content`.

    Raises:
        CrossguardError: The file cannot be read or is in another encoding.
    """
    return decoded(content(file, give), repr(str(file)), give)


def decoded(data: bytes, what: str, give: str) -> str:
    """The text that bytes hold in UTF-8, with or without a byte order mark; see `text`.

    Args:
        what: Where the bytes come from, for the error.
    """
    try:
        found = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CrossguardError(f"{what} cannot be read (it is not UTF-8 text); {give}") from error
    if "\0" in found:  # as UTF-16 without a byte order mark has it
        raise CrossguardError(f"{what} cannot be read (it is not UTF-8 text but holds null bytes); {give}")
    return found


def lines(told: str) -> list[str]:
    r"""The lines of a text, each stripped. Lines end with `\n` or `\r\n` and nowhere else: a caption may hold the other
    signs that Python takes for line ends, such as U+2028. Empty lines count unless they come last."""
    listed = [line.strip() for line in told.split("\n")]
    while listed and not listed[-1]:
        listed.pop()
    return listed


def check_text(told: str, what: str) -> str:
    """The same text; raises where no tokenizer could read it, or where it is longer than any caption.

    Args:
        what: Holds this text, for the error: "a caption of the image 'x.png' of 'captions.json'".
    """
    TEXT.check(len(told), what)
    if not is_text(told):
        raise CrossguardError(
            f"{what} holds a character that is no valid text (a lone surrogate): {shortly(told)}; write it in UTF-8"
        )
    return told


def is_text(told: str) -> bool:
    """Whether a string is text: JSON and the names of files may hold halves of characters, which no encoding has."""
    try:
        told.encode()
    except UnicodeEncodeError:
        return False
    return True


@overload
def read_json(file: Path, kind: type[T], give: str, limit: Limit = FILE) -> T: ...
@overload
def read_json(file: Path, kind: Any, give: str, limit: Limit = FILE) -> Any: ...
def read_json(file: Path, kind: Any, give: str, limit: Limit = FILE) -> Any:
    """The content of a JSON file; see `parse_json`."""
    return parse_json(content(file, give, limit), kind, repr(str(file)), give)


@overload
def parse_json(data: bytes | str, kind: type[T], what: str, give: str) -> T: ...
@overload
def parse_json(data: bytes | str, kind: Any, what: str, give: str) -> Any: ...
def parse_json(data: bytes | str, kind: Any, what: str, give: str) -> Any:
    """What JSON holds, if it has the form that is wanted.

    Args:
        kind: The form: `Any`, numbers, `str`, `None`, lists, dictionaries with strings as keys and `TypedDict`s of
            such, and unions of them. `float` takes whole numbers as well. What may be missing stands in a base class
            with `total=False`: `NotRequired` cannot be seen where annotations are texts.
        what: Where the JSON comes from, for the error.
        give: What to do where it is broken, for the error.

    Raises:
        CrossguardError: It is no JSON, is nested too deeply, or has another form.
    """
    try:
        told = json.loads(data)
    except RecursionError:
        raise CrossguardError(f"{what} is broken: it is nested too deeply; {give}") from None
    except ValueError as error:  # also of bytes in no encoding, and of numbers of thousands of digits
        raise CrossguardError(f"{what} is broken: it is not whole JSON ({_told(error)}); {give}") from None
    for _ in _levels(told, what):
        pass
    wrong = misfit(told, kind)
    if wrong:
        raise CrossguardError(f"{what} is broken: {wrong}; {give}")
    return told


def read_toml(file: Path, give: str) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        CrossguardError: It is no TOML, is nested too deeply, or holds a whole number that no tensor could.
    """
    what = repr(str(file))
    told = decoded(content(file, give, EXPERIMENT), what, give)
    # tomllib takes the square of the time for a key of many parts.
    dotted = max((match[0].count(".") for match in _DOTTED.finditer(told)), default=0)
    DEPTH.check(dotted, f"a key of {what}")
    try:
        found = tomllib.loads(told)
    except RecursionError:
        raise CrossguardError(f"{what} is not valid TOML: it is nested too deeply; {give}") from None
    except ValueError as error:  # also of numbers of thousands of digits
        number = re.search(r"at line (\d+)", str(error))
        line = told.splitlines()[int(number[1]) - 1 :][:1] if number else []
        inner = re.search(r"""=\s*\[?\s*".*\(".*"\)""", line[0]) if line else None
        give = "inside of a text in double quotes write single ones, as in \"Images('pics')\"" if inner else give
        raise CrossguardError(f"{what} is not valid TOML: {_told(error)}; {give}") from None
    for level in _levels(found, what):
        if any(isinstance(value, int) and abs(value) > LARGEST for value in level):
            raise CrossguardError(f"{what} holds a whole number that is too large; at most {LARGEST} can be used")
    return found


_DOTTED = re.compile(r"""[\w"'-]+(?:[ \t]*\.[ \t]*[\w"'-]+)+""")


def _told(error: Exception) -> str:
    return "a number in it is too large" if "digits" in str(error) else one_line(str(error))


def _levels(value: object, what: str) -> Iterator[list[object]]:
    """All that a value holds, level by level; raises where there are too many levels. Does not call itself: whatever
    does so later, as `repr`, may rely on this."""
    level, depth = [value], 0
    while level:
        yield level
        level = [
            held
            for one in level
            if isinstance(one, list | dict)
            for held in (one.values() if isinstance(one, dict) else one)
        ]
        depth += 1
        DEPTH.check(depth, what)


def misfit(value: Any, kind: Any, where: str = "") -> str:
    """How a value out of JSON differs from the form that is wanted; empty where it does not. See `parse_json`."""
    if kind is Any:
        return ""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        told = [misfit(value, one, where) for one in typing.get_args(kind)]
        return "" if "" in told else told[0]
    name = where or "its content"
    if typing.is_typeddict(kind):
        if not isinstance(value, dict):
            return f"{name} is {shortly(value)}, not an object"
        lacking = sorted(kind.__required_keys__ - value.keys())
        if lacking:
            return f"{where + ' has no ' if where else 'it has no '}{lacking[0]!r}"
        parts = ((key, form) for key, form in typing.get_type_hints(kind).items() if key in value)
        return next((wrong for key, form in parts if (wrong := misfit(value[key], form, _inside(where, key)))), "")
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is dict and isinstance(value, dict):
        form = inside[1] if inside else Any
        each = () if form is Any else value.items()
        return next((wrong for key, one in each if (wrong := misfit(one, form, _inside(where, key)))), "")
    if origin is list and isinstance(value, list):
        form = inside[0] if inside else Any
        if form is Any or (form in (int, str) and all(type(one) is form for one in value)):
            return ""
        listed = enumerate(value)
        return next((wrong for place, one in listed if (wrong := misfit(one, form, f"{where}[{place}]"))), "")
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif kind is int:
        fits = type(value) is int and abs(value) <= LARGEST
    elif kind is None or kind is type(None):
        fits = value is None
    else:
        fits = isinstance(value, origin)
    return "" if fits else f"{name} is {shortly(value)}, not {_NAMES.get(origin, str(kind))}"


_NAMES: dict[Any, str] = {
    dict: "an object", list: "a list", int: "a whole number", float: "a number", str: "a text", bool: "true or false",
    type(None): "null",
}  # fmt: skip


def _inside(where: str, key: str) -> str:
    return f"{where}.{shortly(key)[1:-1]}" if where else shortly(key)[1:-1]


def inside(folder: Path, name: str, what: str, links: bool = False) -> Path:
    """The path of what a file of somebody's calls `name` and has in `folder`.

    Args:
        what: Has this name in it, for the error: "the index 'kept.json'".
        links: Whether a link may lead out of the folder, as in a folder of the user's own that links to a store of
            images.

    Raises:
        CrossguardError: It would be elsewhere.
    """
    if "\0" in name or ".." in re.split(r"[/\\]", name) or PurePath(name).anchor:
        raise CrossguardError(
            f"{what} names {shortly(name)}, which is no path inside {str(folder)!r}; only what lies in this folder is "
            "read"
        )
    place = folder / name
    if not links:
        try:
            leads = os.path.realpath(place)
            out = not Path(leads).is_relative_to(os.path.realpath(folder))
        except (OSError, ValueError):
            out = False  # whoever opens it says what is wrong with it
        if out:
            raise CrossguardError(
                f"{what} names {shortly(name)}, a link that leads out of {str(folder)!r}; only what lies in this "
                "folder is read"
            )
    return place


def folders(root: Path) -> list[str]:
    """The names of the folders in a folder, sorted; hidden ones left out."""
    return [entry.name for entry in _entries(root) if entry.is_dir()]


def below(root: Path, endings: Sequence[str]) -> list[Found]:
    """The files with one of these (lower-case) endings in a folder and in the folders inside it, in the order of their
    names, folder by folder.

    Links are followed, round trips excepted. What is hidden is not looked at, at any depth.
    """
    own = root.stat()
    return list(_below(root, "", frozenset({(own.st_dev, own.st_ino)}), tuple(endings)))


def _below(folder: Path, inside: str, above: frozenset[tuple[int, int]], endings: tuple[str, ...]) -> Iterator[Found]:
    for entry in _entries(folder):
        if entry.is_dir():
            noted = entry.stat()
            itself = (noted.st_dev, noted.st_ino)
            if itself not in above:  # else a link back to a folder that it lies in
                yield from _below(folder / entry.name, f"{inside}{entry.name}/", above | {itself}, endings)
        elif entry.name.lower().endswith(endings) and entry.is_file():
            noted = entry.stat()
            yield Found(inside + entry.name, noted.st_size, noted.st_mtime_ns)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in LEFT_BEHIND]
    except OSError as error:
        raise CrossguardError(f"the folder {str(folder)!r} cannot be read ({reason(error)})") from error
    for entry in seen:
        if not is_text(entry.name) and entry.is_dir():  # a file of any name will do; a folder's may be that of a class
            raise CrossguardError(
                f"the name {os.fsencode(entry.name)!r} in the folder {str(folder)!r} is not UTF-8; rename it"
            )
    return sorted(seen, key=lambda entry: entry.name)


def identities(root: Path, files: Sequence[Found]) -> tuple[str, ...]:
    """What tells each of these files from what it was before: the hash of its content, where hashing all of them is a
    matter of a second, and otherwise its size and date. A large file that is replaced by another of the same size and
    date passes for the old one."""
    if len(files) > MOST_HASHED or sum(file.size for file in files) > BYTES_HASHED:
        return tuple(f"{file.size} {file.modified}" for file in files)
    return tuple(hashed(root / file.path) for file in files)


def fingerprint(rows: Iterable[object]) -> str:
    """A short text that says what was read, from what tells that it has changed: names, sizes, dates, contents."""
    told = hashlib.sha256()
    for row in rows:
        told.update(row if isinstance(row, bytes) else repr(row).encode())
        told.update(b"\n")
    return told.hexdigest()[:16]
