"""Sequences of a million strings that take the memory of their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar, overload

import numpy as np

T = TypeVar("T")


class Lazy(Sequence[T], Generic[T]):
    """Items that are made each time that they are asked for."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        places = range(self._count)[index]
        return tuple(map(self._make, places)) if isinstance(places, range) else self._make(places)


class Packed(Lazy[bytes]):
    """Strings of bytes in one block: `held` are all of them, `ends` says where each ends."""

    def __init__(self, held: np.ndarray, ends: np.ndarray) -> None:
        super().__init__(len(ends), self._at)
        self.held, self.ends = held, ends

    @staticmethod
    def of(items: Iterable[bytes]) -> Packed:
        """These items, packed."""
        block, ends = bytearray(), []
        for item in items:
            block += item
            ends.append(len(block))
        return Packed(np.frombuffer(bytes(block), np.uint8), np.array(ends, np.int64))

    @staticmethod
    def joined(parts: Sequence[Packed]) -> Packed:
        """The items of several, one after the other."""
        starts = np.cumsum([0, *(len(part.held) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return Packed(np.concatenate([part.held for part in parts]), np.concatenate(ends))

    def _at(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.held[start : self.ends[index]].tobytes()
