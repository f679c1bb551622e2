"""Words of one's own: classes in Python files that somebody names by hand, and classes that are registered in Python.

A file is read when it is named and run when one of its words is first used, so that listing words and refusing a
misspelt one loads nothing. What a file and the files beside it that it imports hold is part of every question that one
of its words is in.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.abc
import importlib.util
import os
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path

from crossguard.errors import CrossguardError
from crossguard.files import reason
from crossguard.limits import FILE
from crossguard.printing import one_line

VARIABLE = "CROSSGUARD_WORDS"  # files of words, separated as in PATH
GIVE = "give a Python file with classes that are words"

_lock = threading.RLock()


@dataclass
class OwnFile:
    """A Python file whose classes are words.

    Args:
        content: what it held when it was named; this is what runs.
        tree: the same, parsed.
    """

    path: Path
    content: str
    tree: ast.Module
    module: types.ModuleType | None = None
    failure: str = ""

    @property
    def home(self) -> str:
        """The name of its module: another one when the file holds something else."""
        return f"{self.path.stem}_{_hash([str(self.path).encode(), self.content.encode()])[:8]}"

    @property
    def names(self) -> list[str]:
        """Its dataclasses, but for those whose names begin with an underscore."""
        return [node.name for node in self._classes if any(map(_makes_dataclass, node.decorator_list))]

    @property
    def others(self) -> list[str]:
        """Its other classes: no words, but somebody may take them for such."""
        return [node.name for node in self._classes if node.name not in self.names]

    @property
    def _classes(self) -> list[ast.ClassDef]:
        return [node for node in self.tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]

    def run(self) -> types.ModuleType:
        """Its module, run once; whatever goes wrong inside is one sentence with the line."""
        with _lock:
            if self.module is None and not self.failure:
                self._run()
        if self.module is None:
            raise CrossguardError(self.failure)
        return self.module

    def _run(self) -> None:
        spec = importlib.util.spec_from_loader(self.home, _Loader(self), origin=str(self.path))
        assert spec is not None and spec.loader is not None
        spec.has_location = True
        module = importlib.util.module_from_spec(spec)
        folder = str(self.path.parent)
        if folder not in sys.path:  # last, so that no file of somebody's takes the place of an installed package
            sys.path.append(folder)
        sys.modules[self.home] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[self.home]
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(self.path)]
            where = f", line {lines[-1]}," if lines else ""
            told = one_line(str(error)) if isinstance(error, CrossguardError) else f"{type(error).__name__}: {error}"
            self.failure = f"{str(self.path)!r}{where} cannot be run: {one_line(told)}"
            raise CrossguardError(self.failure) from error
        self.module = module


class _Loader(importlib.abc.ExecutionLoader):
    """Runs what a file held when it was named, whatever lies there by now, and leaves no byte code beside it."""

    def __init__(self, file: OwnFile) -> None:
        self.file = file

    def get_source(self, fullname: str) -> str:
        return self.file.content

    def get_filename(self, fullname: str) -> str:
        return str(self.file.path)


@dataclass
class _Known:
    """What this process has been told of."""

    files: dict[Path, OwnFile] = field(default_factory=dict)
    classes: dict[str, type] = field(default_factory=dict)
    told: str = ""  # what the environment variable said when it was last read


_known = _Known()


def add(path: str | Path) -> OwnFile:
    """Makes the classes of a Python file words. It is read, and not run before one of them is used.

    Raises:
        CrossguardError: it cannot be read, is not Python, or has a class with the name of another word.
    """
    place = Path(path).expanduser()
    shown = repr(str(path))
    try:
        FILE.check(place.stat().st_size, shown)
        content = place.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise CrossguardError(f"{shown} cannot be read ({reason(error)}); {GIVE}") from error
    except UnicodeDecodeError:
        raise CrossguardError(f"{shown} cannot be read (it is not UTF-8 text); {GIVE}") from None
    place = place.resolve()
    with _lock:
        known = _known.files.get(place)
        if known is not None and known.content == content:
            return known
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            where = f", line {error.lineno}," if isinstance(error, SyntaxError) and error.lineno else ""
            told = error.msg if isinstance(error, SyntaxError) else str(error)
            raise CrossguardError(f"{shown}{where} is not Python: {one_line(told)}; {GIVE}") from None
        file = OwnFile(place, content, tree)
        if not file.names:
            hint = f"; put @dataclass(frozen=True) above {file.others[0]}" if file.others else ""
            raise CrossguardError(f"{shown} has no words: a word is a frozen dataclass{hint}")
        for name in file.names:
            _check_free(name, f"{shown} has a class {name}", place)
        _known.files[place] = file
    return file


def put(kind: type) -> None:
    """Makes a class a word; one that was made anew, as in a notebook, takes the place of the former."""
    name = kind.__name__
    old = _known.classes.get(name)
    if old is None or (old.__module__, old.__qualname__) != (kind.__module__, kind.__qualname__):
        _check_free(name, f"the class {kind.__module__}.{kind.__qualname__} is called {name}", None)
    _known.classes[name] = kind


def _check_free(name: str, what: str, path: Path | None) -> None:
    crossguard = importlib.import_module("crossguard")
    taken = name in crossguard.VOCABULARY or name in crossguard.plugins() or name in _known.classes
    taken = taken or any(name in file.names for place, file in _known.files.items() if place != path)
    if taken:
        raise CrossguardError(f"{what}, which is the name of another word; give the class a name of its own")


def names() -> list[str]:
    """The names of all words of one's own."""
    _read_variable()
    return [*(name for file in _known.files.values() for name in file.names), *_known.classes]


def file_of(name: str) -> OwnFile | None:
    """The file that has the class of this name."""
    return next((file for file in _known.files.values() if name in file.names), None)


def near_miss(name: str) -> str:
    """Why a class of one's own is no word, where there is one of this name; else nothing."""
    for file in _known.files.values():
        if name in file.others:
            return f"{file.path.name} has a class {name}; a word needs @dataclass(frozen=True) above it"
    return ""


def load(name: str) -> object:
    """What a file or a registered class has under this name.

    Raises:
        CrossguardError: the file cannot be run.
    """
    file = file_of(name)
    return _known.classes[name] if file is None else getattr(file.run(), name, None)


def given() -> frozenset[Path]:
    """The files that were named by hand so far."""
    _read_variable()
    return frozenset(_known.files)


def forget() -> None:
    """Forgets all words of one's own."""
    for file in _known.files.values():
        if file.module is not None:
            sys.modules.pop(file.home, None)
    _known.files, _known.classes, _known.told = {}, {}, ""


def source(home: str) -> ast.Module | None:
    """The source of a file by the name of its module."""
    return next((file.tree for file in _known.files.values() if file.home == home), None)


def _read_variable() -> None:
    told = os.environ.get(VARIABLE, "")
    if told == _known.told:
        return
    for path in filter(None, told.split(os.pathsep)):
        try:
            add(path)
        except CrossguardError as error:
            raise CrossguardError(f"{VARIABLE}: {error}") from None
    _known.told = told


def _makes_dataclass(decorator: ast.expr) -> bool:
    made = decorator.func if isinstance(decorator, ast.Call) else decorator
    return (made.attr if isinstance(made, ast.Attribute) else getattr(made, "id", "")) == "dataclass"


# What is part of a question


@cache
def code(kind: type) -> str:
    """Says which code a class of somebody's own runs, by a hash; nothing for those of the package.

    That is the file that the class stands in and the files beside it that it imports; in a notebook, which is no file,
    the code of its methods.
    """
    own = [one for one in kind.__mro__ if not _is_ours(one) and (is_dataclass(one) or any(map(_is_ours, one.__mro__)))]
    told: dict[Path, bytes] = {}
    parts: list[bytes] = []
    for one in own:
        file = next((file for file in _known.files.values() if file.home == one.__module__), None)
        path = getattr(sys.modules.get(one.__module__), "__file__", None)
        if file is not None:
            _collect(file.path, file.content.encode(), told)
        elif path is not None and Path(path).suffix == ".py":
            _collect(Path(path).resolve(), None, told)
        else:
            parts += _compiled(one)
    return _hash([*parts, *(told[path] for path in sorted(told))]) if own else ""


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "crossguard"


def _collect(path: Path, content: bytes | None, told: dict[Path, bytes]) -> None:
    """A file and those beside it that it imports, each once."""
    if path in told:
        return
    if content is None:
        try:
            content = path.read_bytes()
        except OSError:
            return
    told[path] = content
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        for name in _imported(ast.parse(content)):
            beside = path.parent / f"{name}.py"
            inside = path.parent / name
            if beside.is_file():
                _collect(beside, None, told)
            elif (inside / "__init__.py").is_file():
                for part in sorted(inside.rglob("*.py")):
                    _collect(part, None, told)


def _imported(tree: ast.Module) -> Iterator[str]:
    """The first parts of the names of modules that a source imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level < 2:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


def _compiled(kind: type) -> Iterator[bytes]:
    """The code of the methods of a class and of the functions of its module that these name, without the lines that it
    stands in; and its plain values."""
    met: set[types.FunctionType] = set()
    for name, value in sorted(vars(kind).items()):
        found = [getattr(value, side, None) for side in ("fget", "func", "__func__")]
        made = [part for part in (value, *found) if isinstance(part, types.FunctionType)]
        for part in made:
            yield name.encode()
            yield from _function(part, met)
        if isinstance(value, _PLAIN) and not name.startswith("__"):
            yield f"{name} {value!r}".encode()


_PLAIN = (int, float, str, bytes, tuple)


def _function(function: types.FunctionType, met: set[types.FunctionType]) -> Iterator[bytes]:
    if function in met:
        return
    met.add(function)
    used: list[str] = []
    yield from _instructions(function.__code__, used)
    yield repr(function.__defaults__).encode()
    for name in used:
        value = function.__globals__.get(name)
        if isinstance(value, types.FunctionType) and value.__module__ == function.__module__:
            yield from _function(value, met)
        elif isinstance(value, _PLAIN):
            yield f"{name} {value!r}".encode()


def _instructions(made: types.CodeType, used: list[str]) -> Iterator[bytes]:
    used += made.co_names
    yield made.co_code
    yield repr(made.co_names).encode()
    for constant in made.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant, used)
        else:
            yield repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()


def _hash(parts: list[bytes]) -> str:
    told = hashlib.sha256()
    for part in parts:
        told.update(hashlib.sha256(part).digest())
    return told.hexdigest()[:16]
