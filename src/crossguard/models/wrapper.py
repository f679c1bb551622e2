"""A model around a model: the seam of test-time and training-free defenses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.shapes import Embeddings, Images, Logits, TextEmbeddings


class Wrapper(VisionLanguageModel):
    """A defended model is a model: whatever a wrapper does not change is its base's."""

    base: VisionLanguageModel

    def encode_image(self, images: Images) -> Embeddings:
        return self.base.encode_image(images)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return self.base.encode_text(texts)

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        return self.base.logits(images, texts)

    @property
    def device(self) -> torch.device:
        return self.base.device


class Purifier(Wrapper):
    """A wrapper that cleans the pixels first. Attacks see through it by BPDA (Athalye et al. 2018): the forward uses
    the purified image, the backward treats purifying as the identity. So a purifier is attacked adaptively unless a
    surrogate says otherwise."""

    differentiable = False

    @abstractmethod
    def purify(self, images: Images) -> Images:
        """Cleaner images, same shape, in [0, 1]."""

    def encode_image(self, images: Images) -> Embeddings:
        return self.base.encode_image(images + (self.purify(images) - images).detach())


@dataclass(frozen=True)
class BitDepth(Purifier):
    """Rounds every pixel to `bits` bits (feature squeezing, Xu et al. 2018): the simplest purifier, and a
    gradient-masking one."""

    base: VisionLanguageModel
    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CrossguardError(f"BitDepth(bits={self.bits}) is not possible; give 1 to 8 bits")

    def purify(self, images: Images) -> Images:
        levels = 2**self.bits - 1
        return torch.round(images * levels) / levels
