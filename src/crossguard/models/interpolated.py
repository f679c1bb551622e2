"""A model between two models of the same architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel, checkpoint
from crossguard.models.huggingface import TransformersEncoder
from crossguard.models.openclip import OpenCLIPEncoder
from crossguard.models.prompted import PromptedEncoder
from crossguard.words import show

_PROBES = ("a photo of a cat", "Naïve, two dogs!", "")


@dataclass(frozen=True)
class Interpolated(Checkpoint):
    """The weights of two models, mixed: (1 - alpha) a + alpha b, of both towers and the head alike (WiSE-FT, Wortsman
    et al. 2022; MMCoA, Fig. 8, where `a` is CLIP and `b` was trained to be robust).

    `alpha=0` is `a` and `alpha=1` is `b`, to the bit. Of the logit scale the parameter is mixed, which is its
    logarithm. The released code of TeCoA and MMCoA mixes the image tower alone, and reads 0 as "do not mix", which is
    the robust model.
    """

    a: VisionLanguageModel
    b: VisionLanguageModel
    alpha: float = 0.5

    def __post_init__(self) -> None:
        for end in (self.a, self.b):
            checkpoint(end, "Interpolated")
        if not 0.0 <= self.alpha <= 1.0:
            raise CrossguardError(f"Interpolated(alpha={self.alpha}) is not between the models; give 0 (a) to 1 (b)")

    def saved(self, folder: Path) -> Checkpoint | None:
        return checkpoint(self.a, "Interpolated").saved(folder)

    def load(self) -> DualEncoder:
        network, other = (checkpoint(one, "Interpolated").load() for one in (self.a, self.b))
        own, theirs = network.state_dict(), other.state_dict()
        odd = sorted(own.keys() ^ theirs.keys()) or [name for name in own if own[name].shape != theirs[name].shape]
        if odd or type(network) is not type(other):
            raise CrossguardError(
                f"{show(self.a, short=True)} and {show(self.b, short=True)} have other architectures"
                f"{f' (they differ in {odd[0]!r})' if odd else ''}, so nothing lies between them; give a model and one "
                "that was trained from it"
            )
        if not _read_alike(network, other):
            raise CrossguardError(
                f"{show(self.a, short=True)} and {show(self.b, short=True)} read texts or images differently (their "
                "tokenizers or image processors differ), so nothing lies between them"
            )
        if self.alpha == 1.0:
            return other
        mixed = {
            name: (1.0 - self.alpha) * tensor + self.alpha * theirs[name] if tensor.is_floating_point() else tensor
            for name, tensor in own.items()
        }
        network.load_state_dict(mixed)
        return network


def _read_alike(one: DualEncoder, other: DualEncoder) -> bool:
    """Whether both towers are given the same numbers of the same texts and images."""
    if isinstance(one, PromptedEncoder) and isinstance(other, PromptedEncoder):
        return one.settings == other.settings and _read_alike(one.inner, other.inner)
    if not isinstance(one, TransformersEncoder | OpenCLIPEncoder):
        return True
    if not isinstance(other, TransformersEncoder | OpenCLIPEncoder):
        return True
    same = all(torch.equal(*pair) for pair in zip(one.tokens(_PROBES), other.tokens(_PROBES), strict=True))
    return same and one.preprocess == other.preprocess
