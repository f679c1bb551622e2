"""The signatures of words, read from their source: names, fields, defaults and docstrings without loading torch.

The command line lists the vocabulary with them, and refuses a misspelt word before anything heavy is loaded. What the
source does not say plainly is asked of the class itself.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import operator
import os
import re
import string
from abc import ABC
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import NamedTuple, TypedDict

import crossguard
from crossguard import files, own, words
from crossguard.errors import CrossguardError
from crossguard.reading import below, fingerprint, read_json

_ROOT = Path(__file__).parent
_PLAIN = ("int", "float", "str", "bool", "tuple", "object", "Any")
_NUMBERS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


class Parameter(NamedTuple):
    """A field of a word as it is printed."""

    name: str
    type: str
    default: str | None  # None: it has to be given
    positional: bool


class Signature(NamedTuple):
    """What there is to read about a word.

    Args:
        kind: what sort of thing it is, in plain words: the most general class of this package above it.
        inherited: the classes that brought fields along, each with what it says of them.
    """

    name: str
    kind: str
    doc: str
    parameters: tuple[Parameter, ...]
    inherited: tuple[tuple[str, str], ...]

    @property
    def takes(self) -> dict[str, bool]:
        """The fields, and whether they may be given without their name."""
        return {one.name: one.positional for one in self.parameters}

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        paragraph = " ".join(self.doc.split("\n\n")[0].split())
        return re.split(r"(?<! al)\.\s+(?=[A-Z`(])", paragraph)[0].rstrip(".")


def find(name: str) -> Signature:
    """The signature of the word with this name.

    Raises:
        WordError: the name is unknown, or that of something else.
    """
    if name in crossguard.VOCABULARY:
        try:
            found = _class(*_exports()[name])
            if found is None or not found.word:
                raise words.no_word(name)
            return found.signature
        except _UnclearError:
            pass
    elif file := own.file_of(name):
        try:
            found = _class(file.home, name)
            if found is not None and found.word and found.plain:
                return found.signature
        except _UnclearError:
            pass
    return of(words.find(name))


def names() -> list[str]:
    """The names of all words, in the order of the stub, then those of one's own and of installed plugins."""
    return [*(name for name in _exports() if _may_be_word(name)), *others()]


def others() -> list[str]:
    """The names of the words of one's own and of installed plugins."""
    return [name for name in words.names() if name not in crossguard.VOCABULARY and not _is_base(name)]


def listed() -> list[list[str]]:
    """Name, kind and summary of each word of the package. To read them all from the source takes the better part of a
    second, so they are kept in the folder CROSSGUARD_CACHE (by default in the user's cache folder) until a file of the
    package changes."""
    around = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    kept = Path(os.environ.get("CROSSGUARD_CACHE") or f"{around}/crossguard").expanduser() / "words.json"
    about = fingerprint(
        (str(_ROOT), *((file.path, file.size, file.modified) for file in below(_ROOT, (".py", ".pyi"))))
    )
    with suppress(CrossguardError):
        found = read_json(kept, _Listed, "delete it")
        if found["about"] == about and all(len(row) == 3 for row in found["words"]):
            return found["words"]
    made = [[name, find(name).kind, find(name).summary] for name in _exports() if _may_be_word(name)]
    with suppress(CrossguardError, OSError):
        files.write(kept, json.dumps({"about": about, "words": made}))
    return made


class _Listed(TypedDict):
    about: str
    words: list[list[str]]


def _is_base(name: str) -> bool:
    """Whether a class of a file of one's own is there to be inherited from, and no word."""
    file = own.file_of(name)
    try:
        found = _class(file.home, name) if file is not None else None
    except _UnclearError:
        return False
    return found is not None and found.abstract


def of(kind: type) -> Signature:
    """The signature of a class of words that is loaded."""
    parameters = []
    for field in words.fields(kind):
        needed = field.default is words.REQUIRED
        default = None if needed else words.show(words.fitted(kind, field, field.default), short=True)
        parameters.append(Parameter(field.name, words.type_text(field.type), default, field.positional))
    above = [base for base in kind.__mro__[1:] if dataclasses.is_dataclass(base)]
    docs = [(base.__name__, base.__dict__.get("__doc__")) for base in above]
    roots = [base.__name__ for base in kind.__mro__ if ABC in base.__bases__]
    doc = kind.__doc__ or ""
    told = "" if doc.startswith(f"{kind.__name__}(") else doc  # what dataclasses write where there is none
    return _made(kind.__name__, roots, told, parameters, docs)


def check(text: str, known: Collection[str] = ()) -> None:
    """Raises what `words.build` raises for a name or a field that does not exist, and loads nothing to see it."""
    _check(words.parse(text), known, 0)


def _check(node: ast.AST, known: Collection[str], depth: int) -> None:
    if depth > words.DEEPEST:
        return  # `build` says so
    name = node.id if isinstance(node, ast.Name) else None
    args: list[ast.expr] = []
    keywords: list[ast.keyword] = []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name, args, keywords = node.func.id, node.args, node.keywords
    if name is None:
        for child in ast.iter_child_nodes(node):
            _check(child, known, depth + 1)
    elif name not in known or args or keywords:
        if not words.is_name(name):
            raise words.unknown(name, known)
        signature = find(name)
        given = words.arguments(name, signature.takes, args, keywords)
        for child in given.values():
            _check(child, known, depth + 1)
        missing = [one.name for one in signature.parameters if one.default is None and one.name not in given]
        if missing:
            raise words.needs(name, missing, {one.name: one.default is None for one in signature.parameters})


_BRANCHED = ("VisionLanguageModel", "Trainable", "Recipe")  # what stands between these and a word is no kind of its own


def _made(
    name: str,
    roots: list[str],
    doc: str | None,
    parameters: list[Parameter],
    bases: list[tuple[str, str | None]],
) -> Signature:
    kind = next((root for root in roots if root in _BRANCHED), roots[0] if roots else "other")
    kind = "model" if kind == "VisionLanguageModel" else kind
    inherited = [(base, cleandoc(text or "").partition("\nArgs:\n")[2]) for base, text in bases]
    return Signature(
        name,
        re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower(),
        cleandoc(doc or ""),
        tuple(parameters),
        tuple((base, text) for base, text in inherited if text),
    )


# The source


class _UnclearError(Exception):
    """The source does not say it in a way that is read here."""


@cache
def _exports() -> dict[str, tuple[str, str]]:
    """Where each public name lives: module and name, in the order of the stub."""
    return _Module(_parsed("__init__.pyi")).imports


def _may_be_word(name: str) -> bool:
    found = _class(*_exports()[name])
    return found is not None and found.word


class _Module:
    """The classes, the constants and the imports of one source file of the package."""

    def __init__(self, tree: ast.Module) -> None:
        self.classes: dict[str, ast.ClassDef] = {}
        self.constants: dict[str, ast.expr] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        body = list(tree.body)
        for node in body:
            match node:
                case ast.ClassDef(name=name):
                    self.classes[name] = node
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.constants[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self.constants[name] = value
                case ast.Assign(targets=[ast.Tuple(elts=named)], value=ast.Tuple(elts=values)):
                    pairs = zip(named, values, strict=False)
                    self.constants |= {one.id: value for one, value in pairs if isinstance(one, ast.Name)}
                case ast.ImportFrom(module="string", names=names):
                    self.constants |= {alias.name: ast.Constant(getattr(string, alias.name)) for alias in names}
                case ast.ImportFrom(module=str(module), names=names, level=level):
                    home = module if level else module.removeprefix("crossguard.")
                    if module == "crossguard" and not level:  # a file of one's own, which takes what is public
                        names = [alias for alias in names if alias.name in _exports()]
                        self.imports |= {alias.asname or alias.name: _exports()[alias.name] for alias in names}
                    elif level or home != module:
                        self.imports |= {alias.asname or alias.name: (home, alias.name) for alias in names}
                case ast.If(body=inside):  # what type checkers alone import
                    body.extend(inside)
                case _:
                    pass


def _parsed(file: str) -> ast.Module:
    try:
        return ast.parse((_ROOT / file).read_bytes())
    except FileNotFoundError:  # what a file of one's own imports from elsewhere
        raise _UnclearError from None


@cache
def _module(name: str) -> _Module:
    """A module of the package, or a file of one's own by the name of its module."""
    tree = own.source(name)
    return _Module(_parsed(f"{name.replace('.', '/')}.py") if tree is None else tree)


@cache
def _class(module: str, name: str) -> _Class | None:
    """The class of this name as a module sees it; None, if it is something else."""
    there = _module(module)
    if name in there.classes:
        return _Class(module, there.classes[name])
    return _class(*there.imports[name]) if name in there.imports else None


class _Class:
    """A class as its source describes it."""

    def __init__(self, module: str, node: ast.ClassDef) -> None:
        self.module = module
        self.node = node
        self.doc = ast.get_docstring(node)
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        self.bases = [base.id for base in bases if isinstance(base, ast.Name)]
        above = [_class(module, base) for base in self.bases]
        # Whether all that it inherits from can be looked at; a file of one's own may take classes from anywhere.
        self.plain = len(self.bases) == len(bases) and all(
            base in ("ABC", "object", "Protocol") or (found is not None and found.plain)
            for base, found in zip(self.bases, above, strict=True)
        )
        self.line = [self]  # itself, then what is above it
        for base in above:
            self.line += [one for one in (base.line if base else []) if one not in self.line]

        made = [one for one in node.decorator_list if isinstance(one, ast.Call) and _is(one.func, "dataclass")]
        options = {option.arg: _literal(option.value) for call in made for option in call.keywords}
        self.frozen = options.get("frozen") is True  # a frozen dataclass
        self.positional = options.get("kw_only") is not True

    @property
    def abstract(self) -> bool:
        """Whether something is left for a subclass to define."""
        left: set[str] = set()
        for one in reversed(self.line):
            for node in one.node.body:
                if isinstance(node, ast.FunctionDef):
                    left.discard(node.name)
                    if any(_is(decorator, "abstractmethod") for decorator in node.decorator_list):
                        left.add(node.name)
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                    left.discard(node.target.id)
                elif isinstance(node, ast.Assign):
                    left -= {target.id for target in node.targets if isinstance(target, ast.Name)}
        return bool(left)

    @property
    def word(self) -> bool:
        return self.frozen and not self.abstract and all(_writable(one.module, note) for one, note, _ in self.fields)

    @property
    def fields(self) -> list[tuple[_Class, ast.expr, ast.AnnAssign]]:
        """The fields with their types, each from the class that says it last, in the order of the arguments."""
        found: dict[str, tuple[_Class, ast.expr, ast.AnnAssign]] = {}
        for one in reversed(self.line):
            for node in one.node.body if one.frozen else []:
                match node:
                    case ast.AnnAssign(target=ast.Name(id=name), annotation=note) if not _is(note, "ClassVar"):
                        found[name] = (one, note, node)
                    case _:
                        pass
        return list(found.values())

    @property
    def signature(self) -> Signature:
        roots = [one.node.name for one in self.line if "ABC" in one.bases]
        docs = [(one.node.name, one.doc) for one in self.line[1:] if one.frozen]
        return _made(self.node.name, roots, self.doc, self.parameters, docs)

    @property
    def parameters(self) -> list[Parameter]:
        listed = []
        for one, note, node in self.fields:
            assert isinstance(node.target, ast.Name)
            kind, default = _type(one.module, note), None
            match node.value:
                case None:
                    pass
                case ast.Call(func=ast.Name(id="field"), args=[], keywords=[ast.keyword(arg="default", value=value)]):
                    default = _text(one.module, value, note)
                case ast.Call(func=ast.Name(id="field"), args=[], keywords=[ast.keyword(arg=arg, value=value)]):
                    if arg != "default_factory":
                        raise _UnclearError
                    made = value.body if isinstance(value, ast.Lambda) else ast.Call(func=value, args=[], keywords=[])
                    default = _text(one.module, made, note)
                case value:
                    default = _text(one.module, value, note)
            listed.append(Parameter(node.target.id, kind, default, one.positional))
        return listed


def _is(node: ast.expr, name: str) -> bool:
    """Whether this is the name, called or indexed or neither."""
    if isinstance(node, ast.Call | ast.Subscript):
        return _is(node.func if isinstance(node, ast.Call) else node.value, name)
    return (isinstance(node, ast.Name) and node.id == name) or (isinstance(node, ast.Attribute) and node.attr == name)


def _literal(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _constant(module: str, name: str) -> tuple[str, ast.expr] | None:
    """The module and the value behind a name; None, if it is no constant of the package."""
    there = _module(module)
    if name in there.constants:
        return module, there.constants[name]
    return _constant(*there.imports[name]) if name in there.imports else None


def _parts(node: ast.expr) -> list[ast.expr]:
    """What stands in the brackets of a type."""
    assert isinstance(node, ast.Subscript)
    return node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]


def _writable(module: str, note: ast.expr) -> bool:
    """Whether values of this type can be written as text, as `words.is_word` wants."""
    match note:
        case ast.Constant():
            return True
        case ast.BinOp(left=left, right=right):
            return _writable(module, left) and _writable(module, right)
        case ast.Subscript(value=ast.Name(id="Literal")):
            return True
        case ast.Subscript(value=ast.Name(id="Annotated")):
            return _writable(module, _parts(note)[0])
        case ast.Subscript(value=ast.Name(id="tuple")):
            return all(_writable(module, part) for part in _parts(note))
        case ast.Name(id=name) if name in _PLAIN:
            return True
        case ast.Name(id=name):
            if found := _class(module, name):
                return any("ABC" in one.bases for one in found.line) or found.word
            alias = _constant(module, name)
            return alias is not None and _writable(*alias)
    return False


def _type(module: str, note: ast.expr) -> str:
    """A type as `words.type_text` writes it."""
    match note:
        case ast.Constant(value=value):
            return "..." if value is ... else str(value)
        case ast.BinOp(left=left, right=right):
            return f"{_type(module, left)} | {_type(module, right)}"
        case ast.Subscript(value=ast.Name(id="Literal")):
            return " | ".join(repr(_literal(part)) for part in _parts(note))
        case ast.Subscript(value=ast.Name(id="Annotated")):
            return _type(module, _parts(note)[0])
        case ast.Subscript(value=ast.Name(id="tuple")):
            return f"tuple[{', '.join(_type(module, part) for part in _parts(note))}]"
        case ast.Name(id=name) if name in _PLAIN or _class(module, name):
            return name
        case ast.Name(id=name) if alias := _constant(module, name):
            return _type(*alias)
    raise _UnclearError


def _text(module: str, node: ast.expr, note: ast.expr) -> str:
    """A default as `words.show` writes it in short; a whole number where a float is wanted becomes one."""
    match node:
        case ast.Tuple(elts=items):
            inside = [_text(module, item, note) for item in items]
            return f"({inside[0]},)" if len(inside) == 1 else f"({', '.join(inside)})"
        case ast.Constant(value=str() | bool() | None as value):
            return repr(value)
        case ast.Attribute(value=ast.Name(id="string"), attr=attr):
            return repr(getattr(string, attr))
        case ast.BinOp(left=left, op=ast.Add(), right=right) if _is(note, "str"):
            return repr("".join(ast.literal_eval(_text(module, side, note)) for side in (left, right)))
        case ast.Name(id=name) if found := _constant(module, name):
            return _text(*found, note)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if found := _class(module, name):
            return _call(module, found, args, keywords)
    number = _number(module, node)
    kinds = {one.id for one in ast.walk(note) if isinstance(one, ast.Name)}
    return words.show(float(number) if "float" in kinds and "int" not in kinds else number)


def _call(module: str, found: _Class, args: list[ast.expr], keywords: list[ast.keyword]) -> str:
    takes = found.signature.parameters
    notes = {parameter.name: note for parameter, (_, note, _) in zip(takes, found.fields, strict=True)}
    given = words.arguments(found.node.name, found.signature.takes, args, keywords)
    parts = []
    for parameter in takes:
        size = len(takes) == 1 and parameter.type in ("int", "float")
        text = parameter.default
        if parameter.name in given:
            text = _text(module, given[parameter.name], notes[parameter.name])
        if text is None:
            raise _UnclearError
        if size or text != parameter.default:
            bare = size or parameter.default is None
            parts.append(text if bare else f"{parameter.name}={text}")
    return f"{found.node.name}({', '.join(parts)})"


def _number(module: str, node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(module, operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _NUMBERS:
            return _NUMBERS[type(op)](_number(module, left), _number(module, right))
        case ast.Name(id=name) if found := _constant(module, name):
            return _number(*found)
    raise _UnclearError
