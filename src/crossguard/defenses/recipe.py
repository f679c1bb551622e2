"""Training-time defenses: (model, data) -> model.

What a recipe can be told is in `plan`, what a step trains on in `feed`, what a step does in `step`, and what happens
around the steps in `run`.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from pathlib import Path

from crossguard.data import Dataset
from crossguard.defenses.plan import Plan
from crossguard.defenses.run import train
from crossguard.device import check_gradients
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, VisionLanguageModel
from crossguard.processes import ALONE, joined
from crossguard.words import given, show


@dataclass(frozen=True, kw_only=True)
class Recipe(Plan, ABC):
    """(model, data) -> model. Its loss is in `terms`, its inner adversary in `adversary`, all else in `Plan`."""

    def fit(
        self,
        model: VisionLanguageModel | str | Path,
        data: Dataset | str | Path,
        out: str | Path,
        processes: bool = True,
    ) -> Checkpoint:
        """Trains a copy of `model` on `data` and writes a checkpoint that `transformers` loads into the folder `out`.

        A run that was interrupted goes on where it last saved, and a finished one is recognized and returned as it is.
        Where the folder holds a run of the same words, but the files behind them (the base's weights, the images) have
        changed since, that run is kept beside it as `out.old-HASH`, and training starts anew.

        Model and data may be given as text, as on the command line: `fit("path/to/clip", "path/to/images", "runs/x")`.

        Args:
            processes: under `torchrun`, share each batch among the processes; otherwise this one trains alone.

        Raises:
            CrossguardError: the folder holds something else, or the data cannot be trained on; it says why.
        """
        check_gradients()
        model, data = given("model", model), given("data", data)
        assert isinstance(data, Dataset)
        if not isinstance(model, Checkpoint):
            raise CrossguardError(
                f"{show(model, short=True)} has no network of its own to train; train its base and wrap the result"
            )
        return train(self, model, data, Path(out), joined() if processes else ALONE)
