"""What of a model is trained: the parts that a recipe can attach to a network, and how what was learned is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.huggingface import HuggingFace

TOWERS = ("image", "text", "head")


@dataclass(frozen=True)
class Trainable(ABC):
    """What of a model is trained, as a word: `recipe(trains=...)`. Any recipe trains any part.

    A training calls `attach` once on a fresh copy of the base, descends on the parameters that want a gradient then,
    calls `save` when it is finished, and returns `word`.
    """

    @abstractmethod
    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> DualEncoder:
        """The network that answers with the part in place; the parameters of the part, and no others, want a gradient.

        The result encodes images and texts, names its `towers` and has `scale` and `bias` like any other network. What
        it begins with follows from `seed` alone, so that a training can be repeated, and taken up by another process.
        The parameters that want a gradient are all that is saved while the training runs.

        Args:
            network: a copy of the base of one's own, frozen and in evaluation mode; it may be changed in place. The
                teacher 'start' is another copy, and never sees the part.
            prompts: the classes that are trained on; None where a recipe uses no class prompts.

        Raises:
            CrossguardError: the part does not fit this network or these classes; it says what would do.
        """

    def doubts(self, network: DualEncoder) -> list[str]:
        """What is to be feared of training it, each a sentence with its remedy; said before the first step.

        Args:
            network: what `attach` returned.
        """
        del network
        return []

    @abstractmethod
    def save(self, network: DualEncoder, folder: Path) -> None:
        """Writes what was learned into the folder, as safetensors.

        Args:
            network: what `attach` returned, after the training.
        """

    @abstractmethod
    def word(self, base: Checkpoint, folder: Path) -> Checkpoint:
        """The model that reads what `save` wrote into the folder. It must answer as the trained network did.

        Args:
            base: the model that was trained.
        """


@dataclass(frozen=True)
class Towers(Trainable):
    """The weights of the network itself; what comes out is a checkpoint of its own, in the format of the base:
    `transformers` or open_clip loads it.

    Args:
        towers: what is trained, of 'image', 'text' and 'head' (the logit scale and bias).
        last: train only the last so many layers of each tower (a layer is a module that owns parameters); all, if None.
    """

    towers: tuple[str, ...] = TOWERS
    last: int | None = None

    def __post_init__(self) -> None:
        if not self.towers or set(self.towers) - set(TOWERS):
            raise CrossguardError(f"Towers(towers={self.towers}) is not possible; give some of {TOWERS}")
        if self.last is not None and self.last < 1:
            raise CrossguardError(f"Towers(last={self.last}) is not possible; give 1 or more")

    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> DualEncoder:
        del prompts, seed
        for tower, named in network.towers().items():
            if tower not in self.towers:
                continue
            layers = list(dict.fromkeys(name.rpartition(".")[0] for name in named))
            kept = set(layers if self.last is None or tower == "head" else layers[-self.last :])
            for name, parameter in named.items():
                parameter.requires_grad_(name.rpartition(".")[0] in kept)
        return network

    def save(self, network: DualEncoder, folder: Path) -> None:
        network.save(folder)

    def word(self, base: Checkpoint, folder: Path) -> Checkpoint:
        return base.saved(folder) or HuggingFace(str(folder))
