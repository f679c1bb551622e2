"""Noise that belongs to a sample, not to a batch: every sample has a 64-bit key, and all its randomness follows from
it.

Drawing from a global generator ties a sample's noise to the batch it happens to sit in. Here noise is a pure function
of (key, position), computed by a counter-based hash, so batch size, order, device and number of processes cannot
change it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossguard.errors import CrossguardError
from crossguard.shapes import Seeds


def derive(*parts: object) -> int:
    """A 63-bit seed from anything with a stable `str`: the same parts give the same seed on every machine."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keys(ids: Iterable[str], *parts: object) -> Seeds:
    """One key per sample id, mixed with `parts` (run seed, attack, ...)."""
    return torch.tensor([derive(sample, *parts) for sample in ids], dtype=torch.int64)


def by_position(count: int) -> Seeds:
    """The keys of samples that have no names: their place in the batch."""
    return torch.arange(count, dtype=torch.int64)


def fold(seeds: Seeds, number: int | Tensor) -> Seeds:
    """New keys for the `number`-th use (restart, EOT sample) of the same samples; a tensor numbers each sample's."""
    return _mix(seeds * -7046029254386353131 + number)


@dataclass
class Lent:
    """Keys that a model may draw from in one answer, and how often each name has drawn."""

    seeds: Seeds
    used: bool = False
    draws: Counter[str] = field(default_factory=Counter)

    def next(self, name: str) -> Seeds:
        """The keys of the next draw under this name."""
        self.draws[name] += 1
        return fold(fold(self.seeds, derive(name)), self.draws[name])


_drawing: ContextVar[Lent | None] = ContextVar("crossguard_drawing", default=None)


@contextmanager
def drawing(seeds: Seeds) -> Iterator[Lent]:
    """Inside, a random model draws its noise from these keys, one for each sample of the batch it is asked about."""
    lent, outer = Lent(seeds), _drawing.get()
    token = _drawing.set(lent)
    try:
        yield lent
    finally:
        _drawing.reset(token)
        if outer is not None and lent.used:  # an attack inside a defense lends to what lies below it
            outer.used = True


def replay() -> Callable[[], AbstractContextManager[None]]:
    """A context, to be entered as often as one likes, in which all noise is that which was drawn since this was called:
    for what belongs to one answer but is asked apart, such as what a defense did and what each of its gates says."""
    lent = _drawing.get()
    before = Counter[str]() if lent is None else lent.draws.copy()

    @contextmanager
    def again() -> Iterator[None]:
        if lent is None:
            yield
            return
        after, lent.draws = lent.draws, before.copy()
        try:
            yield
        finally:
            lent.draws = after

    return again


@contextmanager
def some_draw(count: int) -> Iterator[None]:
    """Inside, noise comes from keys, so that there can be a `replay`: from those that are lent or, where none are,
    from fresh ones."""
    if _drawing.get() is not None:
        yield
        return
    with drawing(drawn(count)):
        yield


@contextmanager
def among(which: Tensor, name: str) -> Iterator[None]:
    """Inside, a random model is asked about some images of a batch alone. What noise an image gets there does not
    depend on which others are asked about, or whether any is: enter it also where none is.

    Args:
        which: marks the images, among those of the batch or several views of each in the order (sample, view).
        name: who asks. Who asks again under the same name gets other noise.
    """
    lent = _drawing.get()
    if lent is None:
        yield
        return
    seeds = _views(lent.next(name), len(which))
    with drawing(seeds[which.to(seeds.device)]):
        yield


def drawn(count: int, name: str = "") -> Seeds:
    """The keys a random model draws from for a batch of `count` images; fresh ones of torch's generator outside
    `drawing`.

    A batch that is a multiple of the samples (several views of each) has a key for each image, in the order
    (sample, view).

    Args:
        name: who draws, and what for. What others draw in between changes nothing; who draws again under the same name
            gets other noise, as a vote over several answers of a random base needs.
    """
    lent = _drawing.get()
    if lent is None:
        return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64)
    lent.used = True
    return _views(lent.next(name), count)


def inherited(count: int, name: str, draws: bool = True) -> Seeds:
    """The keys of an attack that was given none: inside a defense they follow from those that the defense was lent, so
    that its noise belongs to the samples; elsewhere from the place in the batch.

    Args:
        name: of the attack.
        draws: whether it makes use of them.
    """
    lent = _drawing.get()
    if lent is None:
        return by_position(count)
    lent.used |= draws
    return _views(lent.next(name), count)


def _views(seeds: Tensor, count: int) -> Tensor:
    """A key for each of `count` images, which are the samples or as many views of each."""
    if len(seeds) == count:
        return seeds
    if not len(seeds) or count % len(seeds):
        raise CrossguardError(
            f"a random model was asked about {count} images where {len(seeds)} samples lend their noise; a wrapper may "
            "ask about all of them, or about the same number of views of each, in the order (sample, view)"
        )
    views = count // len(seeds)
    return fold(seeds.repeat_interleave(views), torch.arange(count, device=seeds.device) % views + 1)


def uniform(seeds: Seeds, shape: torch.Size | tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Uniform float32 noise in [0, 1) of shape (n, *shape), a pure function of each sample's key."""
    seeds = seeds.to(device)
    count = math.prod(shape)
    counter = torch.arange(count, dtype=torch.int64, device=seeds.device)
    bits = _mix(_mix(seeds)[:, None] + counter[None, :] * -7046029254386353131)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32).div_(2.0**24).view(len(seeds), *shape)


def normal(seeds: Seeds, shape: torch.Size | tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Standard normal float32 noise of shape (n, *shape), by Box-Muller from two uniform draws."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(fold(seeds, 1), shape, device)))
    return radius * torch.cos(2.0 * math.pi * uniform(fold(seeds, 2), shape, device))


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) in wrapping 64-bit arithmetic."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
