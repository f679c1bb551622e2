"""The processes that `torchrun` started: which one this is, what all of them know, how the failure of one ends all."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from crossguard.errors import CrossguardError

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Processes:
    """A group of processes that do one piece of work together: this one is number `rank` of `world`.

    All of them must call `gather`, `tell` and `together` in the same order, as with every collective operation.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks, writes and reads for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The part of the items that is this process's: every `world`-th of them."""
        return list(items[self.rank :: self.world])

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order; every process gets the list."""
        if self.world == 1:
            return [value]
        parts = self._exchange(value)
        for rank, part in enumerate(parts):
            if isinstance(part, _Failure):
                raise _met(self._other(rank, part.sentence))
        return parts

    def tell(self, value: T) -> T:
        """The value of the first process, on every process."""
        # One kind of meeting for all, so that who has failed can say so at whichever comes next.
        return self.gather(value if self.first else None)[0]  # pyright: ignore[reportReturnType]

    def each(self, items: Sequence[T], work: Callable[[T], U]) -> list[U]:
        """The results of the work on each item, in their order: done once, by one of the processes, and told to all."""
        with self.together():
            mine = [work(item) for item in self.share(items)]
        parts = self.gather(mine)
        return [parts[place % self.world][place // self.world] for place in range(len(items))]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, each process works on its own; at the end they meet. What went wrong on one is raised on all, so that
        none waits for one that is gone.

        Nothing inside may wait for the others.

        Raises:
            CrossguardError: another process failed; it says which and why.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        sentences = self.gather(None if failure is None else _sentence(failure))
        if failure is not None:
            raise _met(failure)
        for rank, sentence in enumerate(sentences):
            if sentence is not None:
                raise _met(self._other(rank, sentence))

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Inside, the processes work on their own and meet in between. Who fails between two meetings says so at the
        next one, where all others raise then, instead of waiting for one that is gone.

        Raises:
            CrossguardError: another process failed; it says which and why.
        """
        try:
            yield
        except Exception as error:
            if self.world > 1 and "met" not in vars(error):
                with suppress(RuntimeError):  # nobody is left to hear it
                    self._exchange(_Failure(_sentence(error)))
            raise

    def _exchange(self, value: object) -> list[Any]:
        import torch

        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, value)
        return parts

    def _other(self, rank: int, sentence: str) -> CrossguardError:
        return CrossguardError(f"process {rank} of {self.world} failed: {sentence}")


class _Failure(NamedTuple):
    """What a process says in place of what it should: it has failed between two meetings."""

    sentence: str


E = TypeVar("E", bound=BaseException)


def _met(error: E) -> E:
    """The error, of which all processes know."""
    vars(error)["met"] = True
    return error


def _sentence(error: BaseException) -> str:
    return f"{error}" or type(error).__name__


ALONE = Processes()


def several() -> bool:
    """Whether `torchrun` started this process as one of several. Loads nothing."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "MASTER_ADDR" in os.environ and "RANK" in os.environ


def leads() -> bool:
    """Whether this process is the one that prints and writes for all. Loads nothing."""
    return not several() or os.environ["RANK"] == "0"


def joined() -> Processes:
    """The processes that `torchrun` started, joined into a group if they are not yet; `ALONE` where it started none."""
    if not several():
        return ALONE
    import torch
    from accelerate import PartialState

    from crossguard.device import chosen, shared

    if not torch.distributed.is_initialized():
        atexit.register(_left)
    # They meet at the end of long work, and whose part takes longer comes later.
    # NCCL, which GPUs speak, refuses two processes of one GPU; Gloo carries tensors of a GPU too.
    PartialState(cpu=chosen().device.type == "cpu" or shared(), timeout=timedelta(days=7))
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


def _left() -> None:
    """Leaves the group before the interpreter goes.

    Gloo's threads free the tensors of the last message a moment after it has arrived and need the interpreter for
    that; one that finds it gone aborts the program. So they are let run once more.
    """
    import torch

    time.sleep(0.1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def speaks(patience: float = 5.0) -> bool:
    """Whether it is this process that says why the work ends: one of them does. It is the first one, or another that
    failed while the first goes on.

    Args:
        patience: seconds in which the others wait for the first one.
    """
    if not several():
        return True
    import torch.distributed as dist

    try:  # the store that `torchrun` keeps outlives a process that failed
        store: dist.Store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=10)
        )
        store = dist.PrefixStore(f"crossguard/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        until = time.monotonic() + (0.0 if leads() else patience)
        while time.monotonic() < until and not store.check(["said"]):
            time.sleep(0.05)
        alone = store.add("speakers", 1) == 1
        store.set("said", "")
    except (RuntimeError, KeyError, ValueError, OSError):  # nobody to ask: said twice is better than never
        return True
    return alone
