"""Several models that answer as one: a baseline, a teacher, and what to craft on against all of them at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import Wrapper
from crossguard.shapes import Embeddings, Images, Logits, TextEmbeddings
from crossguard.words import show

MEANS = ("logits", "probabilities")


@dataclass(frozen=True)
class Committee(VisionLanguageModel):
    """Several models of any architectures that answer together. As a surrogate it is what an adversary crafts on who
    wants all of them to fail at once, or an image that fools models that nobody has seen.

    With `mean='logits'` their logits are averaged, as Dong et al. 2018 do for transfer: each model is climbed as hard
    as its logits are large, however wrong it is already. With `mean='probabilities'` their probabilities are, as in Liu
    et al. 2017 (equation 6, equal weights), so that one that is fooled already counts no more and the search turns to
    the others. An embedding is that of all members side by side, each of length one, so that its cosines are the mean
    of theirs.

    Args:
        members: two or more models; a defense stands around the committee, not in it.
        mean: 'logits' or 'probabilities'.
    """

    members: tuple[VisionLanguageModel, ...]
    mean: str = "logits"

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise CrossguardError(
                f"Committee of {len(self.members)} models is none; give two or more, as Committee((Tiny(), TinyViT()))"
            )
        for member in self.members:
            if isinstance(member, Wrapper):
                raise CrossguardError(
                    f"{show(member, short=True)} is a defended model, and what it does to images would be lost in a "
                    "committee; put the defense around the Committee"
                )
        if self.mean not in MEANS:
            raise CrossguardError(f"Committee(mean={self.mean!r}) is not known; give 'logits' or 'probabilities'")

    def encode_image(self, images: Images) -> Embeddings:
        return _beside([member.encode_image(images) for member in self.members])

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return _beside([member.encode_text(texts) for member in self.members])

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        parts = zip(self.members, images.split(self._widths, 1), texts.split(self._widths, 1), strict=True)
        found = torch.stack([member.logits(image, text) for member, image, text in parts])
        if self.mean == "logits":
            return found.mean(0)
        return found.log_softmax(2).logsumexp(0) - math.log(len(self.members))

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    @property
    def forwards(self) -> int:
        return sum(member.forwards for member in self.members)

    def cut(self, texts: Sequence[str]) -> int:
        return max(member.cut(texts) for member in self.members)

    @cached_property
    def _widths(self) -> list[int]:
        """How many numbers of an embedding are those of each member."""
        with torch.no_grad():
            return [member.encode_text(("a",)).shape[1] for member in self.members]


def _beside(parts: Sequence[Tensor]) -> Tensor:
    """The embeddings of all members, one beside the other."""
    device = parts[0].device
    return torch.cat([F.normalize(part.float(), dim=1).to(device) for part in parts], 1)
