"""What all tests share.

With CROSSGUARD_STRICT=1 (as in CI) a package that is missing fails its tests, which otherwise skip.

Networks live on the CPU, whose answers are the same to the bit each time, also in what a test starts; `test_gpu.py`
chooses the GPU.

jaxtyping checks the shapes of what goes in and out of every function of the package. A check takes far longer than most
calls, and the thousandth call of a loop says nothing that the first did not: in each test, the first calls of a
function are checked, and a sample of those that follow.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
from types import CodeType, FunctionType, ModuleType
from typing import Any

import jaxtyping
import pytest

FIRST, EVERY = 32, 32  # so many calls of a function are checked in each test, and of those that follow each so-manieth

os.environ["CROSSGUARD_DEVICE"] = "cpu"

_check = jaxtyping.jaxtyped
_tests = 0  # that have begun
_checks: dict[CodeType, Any] = {}
_running = threading.local()  # .now: the functions that wait for the check of what goes into them


def checked(function: FunctionType, typechecker: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Calls a function between the checks of what goes in and of what comes out. Functions of one definition have
    these checks in common, since to make them takes longer than most calls."""
    if function.__code__ not in _checks:
        running = _running

        def run(*args: Any, **options: Any) -> Any:
            return running.now.pop()(*args, **options)

        like = FunctionType(run.__code__, function.__globals__, closure=run.__closure__)
        _checks[function.__code__] = _check(functools.wraps(function)(like), typechecker=typechecker)
    waiting = _running.__dict__.setdefault("now", [])
    depth = len(waiting)
    waiting.append(function)
    try:
        return _checks[function.__code__](*args, **options)
    finally:
        del waiting[depth:]  # what was refused was not called


def sampled(function: Any = None, *, typechecker: Any = None) -> Any:
    """`jaxtyping.jaxtyped`, which checks a sample of the calls."""
    if function is None:
        return functools.partial(sampled, typechecker=typechecker)
    if not isinstance(function, FunctionType):
        return _check(function, typechecker=typechecker)
    test = calls = 0

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal test, calls
        if test != _tests:
            test, calls = _tests, 0
        calls += 1
        if calls <= FIRST or not calls % EVERY:
            return checked(function, typechecker, args, options)
        return function(*args, **options)

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
