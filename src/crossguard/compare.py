"""Whether one number is above another by more than chance: paired, where they are of the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from crossguard.report import DIRECTIONS, Outcomes, Ranks, Rate

LEVEL = 0.95


class Difference(NamedTuple):
    """A difference of two shares, and its interval."""

    middle: float
    low: float
    high: float


def paired(more: int, less: int, n: int, level: float = LEVEL) -> Difference:
    """The difference of two shares of the same n, and its interval (Bonett and Price 2012).

    Args:
        more: how many count for the first alone.
        less: how many for the second alone.
    """
    one, other = (more + 1) / (n + 2), (less + 1) / (n + 2)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    middle, wide = one - other, z * math.sqrt((one + other - (one - other) ** 2) / (n + 2))
    return Difference((more - less) / n, max(middle - wide, -1.0), min(middle + wide, 1.0))


def difference(
    ours: Outcomes | Ranks,
    theirs: Outcomes | Ranks,
    part: int = 0,
    whens: tuple[str, str] = ("robust", "robust"),
    level: float = LEVEL,
) -> Difference:
    """The share of samples that are right in the first minus that in the second, which are of the same samples, and its
    interval: paired, or of the queries of a retrieval in one direction by bootstrap over images.

    Args:
        part: which of the headlines (`parts`).
        whens: of each, 'robust', right both clean and under attack, or 'clean'.
    """
    if not (isinstance(ours, Ranks) and isinstance(theirs, Ranks)):
        one, other = (
            said.correct & said.standing if when == "robust" else said.correct
            for said, when in zip((ours, theirs), whens, strict=True)
        )
        return paired(int((one & ~other).sum()), int((other & ~one).sum()), len(one), level)
    one, other = (said.resampled(1, DIRECTIONS[part], when) for said, when in zip((ours, theirs), whens, strict=True))
    middle = float(one[0] - other[0])
    ends = (1 - level) / 2, (1 + level) / 2
    low, high = (float(end) for end in np.quantile((one - other)[1:], ends))
    if low == high:  # all images say the same, and a bootstrap has no width
        count = len(set(np.asarray(ours.image)[np.asarray(ours.text) == part].tolist()))
        return paired(round(count * max(middle, 0.0)), round(count * max(-middle, 0.0)), count, level)
    return Difference(middle, low, high)


@dataclass(frozen=True)
class Average:
    """The mean of rates of the same thing in several tasks, each of which counts alike.

    Its interval follows from those of the rates, by the method of variance estimates recovery (Zou and Donner 2008):
    the tasks have other samples, so the squares of the distances to their ends add up. Unlike that of a normal
    approximation it has a width where all rates are 0 or 1.
    """

    rates: tuple[Rate, ...]

    @property
    def n(self) -> int:
        return sum(rate.n for rate in self.rates)

    @property
    def value(self) -> float:
        return sum(rate.value for rate in self.rates) / len(self.rates)

    @property
    def interval(self) -> tuple[float, float]:
        below, above = zip(
            *((rate.value - rate.interval[0], rate.interval[1] - rate.value) for rate in self.rates), strict=True
        )
        return self.value - math.hypot(*below) / len(self.rates), self.value + math.hypot(*above) / len(self.rates)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def apart(one: Rate | Average, other: Rate | Average) -> Difference:
    """The difference of two rates of different samples, and its interval of 95 %: from the intervals of both, as
    Newcombe 1998 does for Wilson's (method 10)."""
    (low, high), (least, most) = one.interval, other.interval
    middle = one.value - other.value
    return Difference(
        middle,
        middle - math.hypot(one.value - low, most - other.value),
        middle + math.hypot(high - one.value, other.value - least),
    )


def mean(differences: Sequence[Difference]) -> Difference:
    """The mean of differences in several tasks, whose samples are others; its interval as that of an `Average`."""
    count = len(differences)
    middle = sum(one.middle for one in differences) / count
    return Difference(
        middle,
        middle - math.hypot(*(one.middle - one.low for one in differences)) / count,
        middle + math.hypot(*(one.high - one.middle for one in differences)) / count,
    )
