"""Work that threads do ahead of its use, in the order in which it is used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from crossguard.errors import CrossguardError
from crossguard.limits import shortly, whole

T = TypeVar("T")
R = TypeVar("R")

WORKERS = "CROSSGUARD_WORKERS"  # the environment variable that says how many threads decode images
MOST = 4  # threads, where nothing else was said: more wait for each other
PIECE = 8  # items that a thread takes at a time: handing over one costs as much as decoding a small image


def workers() -> int:
    """How many threads decode: what CROSSGUARD_WORKERS says, else as many as there are processors, at most 4."""
    told = os.environ.get(WORKERS, "")
    if told:
        count = whole(told)
        if count is None or count < 0:
            raise CrossguardError(f"{WORKERS} says {shortly(told)}; give a number of threads, or 0 for none")
        return count
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST, usable)


def ahead(
    work: Callable[[T], R], items: Iterable[T], waiting: int, count: int | None = None
) -> Generator[R, None, None]:
    """What `work` makes of each item, in their order, while `count` threads are already at work on the next ones.

    What goes wrong with an item is raised where its turn is. Who stops early waits for nothing.

    Args:
        waiting: how many items may be at work or done before they are asked for.
        count: threads; None asks `workers()`, and 0 works without threads.
    """
    count = workers() if count is None else count
    if count < 0:
        raise CrossguardError(f"{count} threads are not possible; give 1 or more, or 0 for none")
    if count == 0:
        yield from map(work, items)
        return
    piece = max(1, min(PIECE, waiting // (2 * count)))
    source = iter(items)
    pieces = iter(lambda: list(islice(source, piece)), [])
    pool = ThreadPoolExecutor(count, thread_name_prefix="crossguard")
    begun: deque[Future[tuple[list[R], Exception | None]]] = deque()
    try:
        for one in pieces:
            begun.append(pool.submit(_made, work, one))
            if len(begun) * piece >= waiting:
                yield from _given(begun.popleft())
        while begun:
            yield from _given(begun.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _made(work: Callable[[T], R], items: list[T]) -> tuple[list[R], Exception | None]:
    """What `work` makes of each item, up to the one with which it goes wrong, and what went wrong."""
    made: list[R] = []
    try:
        for item in items:
            made.append(work(item))
    except Exception as error:
        return made, error
    return made, None


def _given(piece: Future[tuple[list[R], Exception | None]]) -> Iterator[R]:
    made, error = piece.result()
    yield from made
    if error is not None:
        raise error
