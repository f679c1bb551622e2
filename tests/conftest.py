"""What all tests share.

With CROSSGUARD_STRICT=1 (as in CI) a package that is missing fails its tests, which otherwise skip.

jaxtyping checks the shapes of what goes in and out of every function of the package. A check takes far longer than most
calls, and the thousandth call of a loop says nothing that the first did not: in each test, the first calls of a
function are looked at, and a sample of those that follow. What a check finds follows from the types, the shapes and the
element types of what goes in and comes out, so a call that is looked at is checked where no call of that function that
was in order had the same.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import os
import threading
import typing
from collections.abc import Callable, Hashable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import jaxtyping
import pytest

FIRST, EVERY = 32, 32  # so many calls of a function are looked at in each test, and of the others each so-manieth
SEVERAL = 8  # so many elements of a list are looked at; beartype looks at one, by chance

_check = jaxtyping.jaxtyped
_tests = 0  # that have begun


def look(value: Any) -> Hashable:
    """All that a check of a value depends on, unless its annotation names values."""
    kind = type(value)
    how = _looks.get(kind, kind)
    if how is kind:
        how = _looks[kind] = way_to_look(kind)
    return kind if how is None else (kind, *how(value))


def way_to_look(kind: type) -> Callable[[Any], Iterable[Hashable]] | None:
    """What counts of values of a type, beside the type; None, if nothing does."""
    import numpy as np  # not before a test calls something: the process that only hands out tests comes without them
    import torch

    if issubclass(kind, torch.Tensor | np.ndarray):
        return lambda tensor: (tensor.dtype, tensor.shape)
    if issubclass(kind, tuple | list | set | frozenset):
        return lambda several: (alike(several), len(several))
    if issubclass(kind, dict):
        return lambda held: (alike(held), alike(held.values()))
    if issubclass(kind, type):
        return lambda value: (value,)
    return None


def alike(several: Iterable[Any]) -> Hashable:
    """What all elements look like. beartype checks one of them, by chance: where they differ, each time is another."""
    looks = {look(one) for one in itertools.islice(several, SEVERAL)}
    return looks.pop() if len(looks) == 1 else object() if looks else None


_looks: dict[type, Any] = {}  # the ways that were found


class Calls:
    """What is known of the calls of a function, or of all functions that one definition makes.

    Attributes:
        seen: what those that were in order looked like: what went in, and this with what came out.
        exact: the annotations name values, or cannot be read here, so that every call has to be checked.
    """

    def __init__(self, function: FunctionType, typechecker: Any) -> None:
        self.code = function.__code__  # held, so that nothing else has its address
        self.seen = set[Hashable]()
        try:
            self.exact = "Literal" in str(typing.get_type_hints(function))
        except Exception:
            self.exact = True
        self.running = running = threading.local()

        def run(*args: Any, **options: Any) -> Any:
            return running.now.pop()(*args, **options)

        like = FunctionType(run.__code__, function.__globals__, closure=run.__closure__)
        self.checked = _check(functools.wraps(function)(like), typechecker=typechecker)

    def check(self, function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Calls a function as one of this definition, between the checks."""
        waiting = self.running.__dict__.setdefault("now", [])
        depth = len(waiting)
        waiting.append(function)
        try:
            return self.checked(*args, **options)
        finally:
            del waiting[depth:]


_calls: dict[int, Calls] = {}


def sampled(function: Any = None, *, typechecker: Any = None, all_calls: bool = False) -> Any:
    """`jaxtyping.jaxtyped`, which looks at a sample of the calls, and at each object of a dataclass that is made."""
    if function is None:
        return functools.partial(sampled, typechecker=typechecker)
    if isinstance(function, type):
        made = vars(function).get("__init__")
        if dataclasses.is_dataclass(function) and isinstance(made, FunctionType) and not hasattr(made, "__wrapped__"):
            setattr(function, "__init__", sampled(made, typechecker=typechecker, all_calls=True))  # noqa: B010
        return function
    if not isinstance(function, FunctionType):
        return _check(function, typechecker=typechecker)
    test = count = 0
    code = id(function.__code__)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal test, count
        if not all_calls:
            if test != _tests:
                test, count = _tests, 0
            count += 1
            if count > FIRST and count % EVERY:
                return function(*args, **options)
        if (known := _calls.get(code)) is None:
            known = _calls[code] = Calls(function, typechecker)
        if known.exact:
            return known.check(function, args, options)
        given = *map(look, args), *((name, look(value)) for name, value in options.items())
        if given in known.seen:
            result = function(*args, **options)
            if (given, came := look(result)) not in known.seen:
                known.check(lambda *_, **__: result, args, options)
        else:
            result = known.check(function, args, options)
            came = look(result)
            known.seen.add(given)
        known.seen.add((given, came))
        return result

    return call


jaxtyping.jaxtyped = sampled  # the import hook decorates with what stands here


def pytest_runtest_setup() -> None:
    global _tests
    _tests += 1


def needed(name: str, *_: object, **__: object) -> ModuleType:
    """`pytest.importorskip` where nothing may be missing."""
    return importlib.import_module(name)


if os.environ.get("CROSSGUARD_STRICT", "0") not in ("", "0"):
    pytest.importorskip = needed  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny dual encoder of random weights, for trainings (a `Fresh`)."""
    from fixtures import save_tokenizer, small  # not before the checks of shapes are in place

    folder = tmp_path_factory.mktemp("base") / "tokenizer"
    save_tokenizer(folder)
    return small(folder)
