"""The shipped models: small enough for a laptop, real enough to attack and defend, and of different architectures, so
that each can be asked about what was crafted on another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from crossguard.checkpoints import content
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.huggingface import HuggingFace

_ASSETS = Path(__file__).parent.parent / "assets"
WEIGHTS = _ASSETS / "tiny"


class Shipped(Checkpoint, ABC):
    """A dual encoder trained on the captions of `Scenes`, shipped with the package; see its model card beside the
    weights."""

    @staticmethod
    @abstractmethod
    def folder() -> Path:
        """Where its weights are."""

    def load(self) -> DualEncoder:
        if not self.folder().is_dir():
            raise CrossguardError(f"the shipped weights are missing from {self.folder()}; reinstall the package")
        return HuggingFace(str(self.folder())).load()

    def content(self) -> str:
        return content(str(self.folder()))


@dataclass(frozen=True)
class Tiny(Shipped):
    """A dual encoder trained on the captions of `Scenes`, shipped with the package: a ConvNeXt looks at the images. See
    its model card beside the weights."""

    @staticmethod
    def folder() -> Path:
        return WEIGHTS


@dataclass(frozen=True)
class TinyViT(Shipped):
    """The sibling of `Tiny` with a vision transformer for an image tower; see its model card beside the weights."""

    @staticmethod
    def folder() -> Path:
        return _ASSETS / "tiny_vit"


@dataclass(frozen=True)
class TinyCNN(Shipped):
    """The sibling of `Tiny` with an EfficientNet for an image tower, convolutions and batch norm; see its model card
    beside the weights."""

    @staticmethod
    def folder() -> Path:
        return _ASSETS / "tiny_cnn"
