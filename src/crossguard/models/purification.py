"""Defenses that clean the pixels first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from crossguard.answer import Answer
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.kinds import Purifier
from crossguard.shapes import Images


@dataclass(frozen=True)
class BitDepth(Purifier):
    """Rounds every pixel to `bits` bits (feature squeezing, Xu et al. 2018): the simplest purifier, and a
    gradient-masking one."""

    base: VisionLanguageModel
    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.bits <= 8:
            raise CrossguardError(f"BitDepth(bits={self.bits}) is not possible; give 1 to 8 bits")

    def purify(self, images: Images, inner: Answer) -> Images:
        del inner
        levels = 2**self.bits - 1
        return torch.round(images * levels) / levels

    def smoothed(self, images: Images, inner: Answer) -> Images:
        """The staircase with steps of finite slope: between two levels a sigmoid that passes through both."""
        del inner
        levels, steepness = 2**self.bits - 1, 8.0
        below = torch.floor(images * levels).detach()
        rise = torch.sigmoid(steepness * (images * levels - below - 0.5))
        low, high = 1.0 / (1.0 + math.exp(steepness / 2)), 1.0 / (1.0 + math.exp(-steepness / 2))
        return (below + (rise - low) / (high - low)) / levels
