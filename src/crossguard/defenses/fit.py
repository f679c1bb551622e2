"""A trained model as a word: it trains when it is first asked for and is found again by its hash."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from crossguard.data import Dataset
from crossguard.defenses.recipe import Recipe
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel
from crossguard.words import show


@dataclass(frozen=True)
class Fit(Checkpoint):
    """The model that `recipe` makes of `model` on `data`. Trained on first use into a folder of its own under
    `runs/fits` (or under the environment variable CROSSGUARD_FITS), named by the hash of the three words."""

    recipe: Recipe
    model: VisionLanguageModel
    data: Dataset

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(show(self).encode()).hexdigest()[:12]
        return Path(os.environ.get("CROSSGUARD_FITS", "runs/fits")) / f"{type(self.recipe).__name__}-{digest}"

    def load(self) -> DualEncoder:
        return self.recipe.fit(self.model, self.data, self.folder).load()
