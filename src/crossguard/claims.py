"""What an experiment claims, as words in its file, and whether its answers bear it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from crossguard.compare import Difference, apart
from crossguard.errors import CrossguardError
from crossguard.pivot import Entry

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"


class Judged(NamedTuple):
    """What became of a claim."""

    name: str
    verdict: str
    said: str

    def __str__(self) -> str:
        return f"{self.verdict}: {self.name}: {self.said}"


class Claim(ABC):
    """A sentence about numbers of an experiment that its answers can bear out or not."""

    @property
    @abstractmethod
    def cells(self) -> tuple[str, ...]:
        """The cells that it is about, each by its labels: 'TeCoA, PGD-10, 4/255'."""

    @abstractmethod
    def judge(self, numbers: Sequence[Entry]) -> tuple[str, str]:
        """What the numbers of these cells say: a verdict ('holds', 'fails' or 'undecided'), and why."""


@dataclass(frozen=True)
class Above(Claim):
    """The number of one cell is above that of another, or above a number that is given.

    It holds where the interval of the difference (95 %) lies above `by`, fails where it lies below, and is undecided
    otherwise. A cell is named by its labels, as a run prints them; labels that all cells share may be left out, and
    those that two axes have in common are written 'surrogate=TeCoA'. Of a retrieval one of the labels is the direction,
    'image to text R@1'.

    Args:
        left: a cell.
        right: another one, or a number in percent.
        by: how far above, in points.
        paired: compare sample by sample, which needs the same samples; otherwise as if the samples were others.
    """

    left: str
    right: str | float
    by: float = 0.0
    paired: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.right, str) and not 0.0 <= self.right <= 100.0:
            raise CrossguardError(f"Above(right={self.right}) is no share; give a cell, or a number in percent")

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.left, self.right) if isinstance(self.right, str) else (self.left,)

    def judge(self, numbers: Sequence[Entry]) -> tuple[str, str]:
        left, *others = numbers
        found, how = self._difference(left, others[0] if others else None)
        if found is None:
            return UNDECIDED, "the two are not of the same samples; give paired=False, or the same limit"
        middle, low, high = (100 * end for end in found)
        verdict = HOLDS if low > self.by else FAILS if high < self.by else UNDECIDED
        right = f"'{self.right}' {others[0].rate}" if others else f"{self.right:g} %"
        more = f", and more than {self.by:g} is claimed" if self.by else ""
        return (
            verdict,
            f"'{self.left}' {left.rate} minus {right} is {middle:+.1f} points [{low:+.1f}, {high:+.1f}] ({how}){more}",
        )

    def _difference(self, left: Entry, right: Entry | None) -> tuple[Difference | None, str]:
        if right is None:
            assert not isinstance(self.right, str)
            low, high = left.rate.interval
            than = self.right / 100
            return Difference(left.rate.value - than, low - than, high - than), "95 %"
        if self.paired:
            return left.minus(right), "paired, 95 %"
        return apart(left.rate, right.rate), "not paired, 95 %"
