"""What long work says of itself while it runs, to whoever listens: which part of it is at hand, and what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_hears: ContextVar[Callable[[str], None] | None] = ContextVar("crossguard_hears", default=None)
_parts: ContextVar[tuple[str, ...]] = ContextVar("crossguard_parts", default=())


@contextmanager
def listening(hear: Callable[[str], None]) -> Iterator[None]:
    """Inside, what work says of itself is told to this function, a phrase at a time: "APGD() (1 of 4), 60 standing"."""
    token, above = _hears.set(hear), _parts.set(())
    try:
        yield
    finally:
        _hears.reset(token)
        _parts.reset(above)


def heard() -> bool:
    """Whether somebody listens."""
    return _hears.get() is not None


@contextmanager
def part(form: str, *values: object) -> Iterator[None]:
    """Inside, whatever is told begins with the name of this part, made as by `tell`."""
    if _hears.get() is None:
        yield
        return
    token = _parts.set((*_parts.get(), form.format(*values)))
    try:
        yield
    finally:
        _parts.reset(token)


def tell(form: str, *values: object) -> None:
    """Says how far the work is: `tell("step {} of {}", step, steps)`.

    Args:
        values: are read only where somebody listens: to read a count that an accelerator holds is to wait for it.
    """
    hear = _hears.get()
    if hear is not None:
        hear(", ".join((*_parts.get(), form.format(*values))))
