"""The shipped model: small enough for a laptop, real enough to attack and defend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crossguard.checkpoints import content
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.huggingface import HuggingFace

WEIGHTS = Path(__file__).parent.parent / "assets" / "tiny"


@dataclass(frozen=True)
class Tiny(Checkpoint):
    """A dual encoder trained on the captions of `Scenes`, shipped with the package; see its model card beside the
    weights."""

    def load(self) -> DualEncoder:
        if not WEIGHTS.is_dir():
            raise CrossguardError(f"the shipped weights are missing from {WEIGHTS}; reinstall the package")
        return HuggingFace(str(WEIGHTS)).load()

    def content(self) -> str:
        return content(str(WEIGHTS))
