"""What teachers say of clean images, kept over the epochs of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from crossguard.defenses.feed import Batch, Feed
from crossguard.defenses.terms import Need
from crossguard.seeds import drawing
from crossguard.shapes import Images

ROOM = 2**30  # bytes of main memory for all that is kept in a training

Asked = Callable[[Images], Mapping[Need, Tensor]]


class Recall:
    """Asks a teacher about the clean images of a feed, about each image once where that changes no number: where images
    are not augmented, come again in a later epoch, and there is room for what is said of all of them.

    It is tried on the first batch that no answer depends on the place of its image in the batch, nor on the images
    beside it, to the last bit: a teacher of which that is not so, or that draws noise, is asked anew in each step. It
    is always asked about as many images as a step has, since batches of other sizes are rounded differently.

    Args:
        feed: where the images come from.
        room: the bytes that may be kept.
    """

    def __init__(self, feed: Feed, room: int = ROOM) -> None:
        self.feed, self.room = feed, room
        self._known = torch.zeros(len(feed.data), dtype=torch.bool)
        self._said: dict[Need, Tensor] = {}
        self._kept = feed.comes_again

    def __call__(self, batch: Batch, ask: Asked) -> Mapping[Need, Tensor]:
        """What the teacher says of this batch.

        Args:
            ask: asks it about other images of the same feed.
        """
        if not self._kept:
            return self._asked(batch, batch.images, ask)[0]
        rows = torch.tensor(batch.indices)
        known = self._known[rows]
        if not bool(known.any()):
            return self._first(batch, rows, ask)
        if not bool(known.all()):
            self._rest(batch, rows[~known], ask)
        if bool(self._known[rows].all()):
            device = batch.images.device
            return {need: said[rows].to(device) for need, said in self._said.items()}
        return self._first(batch, rows, ask)

    @property
    def size(self) -> int:
        """The bytes that are kept."""
        return sum(said.nbytes for said in self._said.values())

    def _first(self, batch: Batch, rows: Tensor, ask: Asked) -> Mapping[Need, Tensor]:
        """Asks about the whole batch and keeps it."""
        found, drew = self._asked(batch, batch.images, ask)
        if not self._said:
            turned = batch.images.flip(0)
            turned[1::2] = 1.0 - turned[1::2]  # so that the others have another place and other images beside them
            again, _ = self._asked(batch, turned, ask)
            alike = all(torch.equal(one.flip(0)[::2], again[need][::2]) for need, one in found.items())
            bytes_ = sum(one[:1].nbytes for one in found.values()) * len(self._known)
            if drew or not alike or bytes_ > self.room:
                self._kept = False
                return found
            self._said = {
                need: torch.empty(len(self._known), *one.shape[1:], dtype=one.dtype) for need, one in found.items()
            }
        self._keep(rows, found)
        return found

    def _rest(self, batch: Batch, missing: Tensor, ask: Asked) -> None:
        """Asks about all images that are not known yet, if they fill no more than a batch: those that did not fill
        one at the end of the first epoch."""
        samples = torch.tensor(self.feed.samples(0))
        rest = samples[~self._known[samples]]
        if len(rest) > len(batch.indices) or not bool(torch.isin(missing, rest).all()):
            return
        fillers = batch.images[: len(batch.indices) - len(rest)]
        found, _ = self._asked(batch, torch.cat([self.feed.pictures(rest.tolist()), fillers]), ask)
        self._keep(rest, {need: one[: len(rest)] for need, one in found.items()})

    def _asked(self, batch: Batch, images: Images, ask: Asked) -> tuple[Mapping[Need, Tensor], bool]:
        """What is said, and whether noise was drawn for it."""
        with drawing(batch.seeds) as lent:
            return ask(images), lent.used

    def _keep(self, rows: Tensor, found: Mapping[Need, Tensor]) -> None:
        for need, one in found.items():
            self._said[need][rows] = one.to("cpu")
        self._known[rows] = True
