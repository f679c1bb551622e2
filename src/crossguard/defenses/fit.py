"""A trained model as a word: it trains when it is first asked for and is found again by its hash."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from crossguard.data import Dataset
from crossguard.defenses.recipe import Recipe
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel, checkpoint
from crossguard.words import contents, show


@dataclass(frozen=True)
class Fit(Checkpoint):
    """The model that `recipe` makes of `model` on `data`. Trained on first use into a folder of its own under
    `runs/fits` (or under the environment variable CROSSGUARD_FITS), named by the hash of the three words and of what
    the files behind them hold: when the base is trained again or an image changes, this is another model."""

    recipe: Recipe
    model: VisionLanguageModel
    data: Dataset

    def content(self) -> str:
        """The hash of the words and of what the files behind them hold: the same before the training and after it."""
        held = contents((self.recipe, self.model, self.data))
        return hashlib.sha256("\n".join([show(self), *filter(None, [held])]).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        return Path(os.environ.get("CROSSGUARD_FITS", "runs/fits")) / f"{type(self.recipe).__name__}-{self.fingerprint}"

    @property
    def trained(self) -> bool:
        """Whether the training is finished, so that the model can be read at once."""
        return (self.folder / "crossguard.json").exists()

    def saved(self, folder: Path) -> Checkpoint | None:
        return self.recipe.trains.word(checkpoint(self.model, "Fit"), self.folder).saved(folder)

    def load(self) -> DualEncoder:
        """Under `torchrun` each process trains on its own, and waits where another one trains the same."""
        return self.recipe.fit(self.model, self.data, self.folder, processes=False).load()
