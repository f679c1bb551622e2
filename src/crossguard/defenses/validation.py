"""What a training sees of its own robustness: accuracy on held-out data at the end of each epoch, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks.base import ImageAttack, ImageVictim, TextAttack
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Budget, Linf
from crossguard.data import Dataset, Labelled, Prompts
from crossguard.errors import CrossguardError
from crossguard.figures import png
from crossguard.files import write
from crossguard.goals import Untargeted
from crossguard.models.base import DualEncoder, frozen
from crossguard.processes import Processes
from crossguard.seeds import keys
from crossguard.shapes import Images, Mask, TextEmbeddings
from crossguard.words import show

CLEAN, ROBUST, TEXT = "clean accuracy", "robust accuracy", "text accuracy"


@dataclass(frozen=True)
class Validation:
    """How accuracy is measured while a model trains: on images of classes that it is not trained on, clean, against an
    attack on images and, if one is given, on class prompts. Good enough to compare epochs; the number to report is that
    of `crossguard eval`.

    Args:
        data: held-out images with labels.
        image_attack: what robust accuracy is measured against.
        budget: how far it may go; with a text attack, of both, such as `Both(Linf(1/255), Words(1))`.
        text_attack: rewrites all class prompts; then text accuracy is that of clean images with these. None, if None.
        limit: so many images, the same ones in every epoch.
        batch: images that are attacked together.
    """

    data: Dataset
    image_attack: ImageAttack = PGD()
    budget: Budget = Linf(1 / 255)
    text_attack: TextAttack | None = None
    limit: int | None = 500
    batch: int = 128

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise CrossguardError(f"Validation(limit={self.limit}) measures nothing; give 1 or more images, or None")
        if self.batch < 1:
            raise CrossguardError(f"Validation(batch={self.batch}) is not possible; give 1 or more")
        self.image_attack.spends(self.budget)
        if self.text_attack is not None:
            self.text_attack.spends(self.budget)

    def check(self) -> None:
        """Raises, before the first step, where nothing could be measured at the end of an epoch."""
        labels = self.data.labels()[self.data.chosen(self.limit)]
        classes = len(self.data.prompts().names)
        wrong = (labels < 0) | (labels >= classes)
        if bool(wrong.any()):
            raise CrossguardError(
                f"{int(wrong.sum())} of the {len(labels)} samples of {show(self.data, short=True)}, on which accuracy "
                f"is to be measured, have a label that is none of its {classes} classes (such as "
                f"{int(labels[wrong][0])}); leave them out"
            )

    def measure(self, network: DualEncoder, device: torch.device, seed: int, group: Processes) -> dict[str, float]:
        """The accuracies of a network, each from 0 to 1; each batch is asked about by one of the processes.

        Args:
            seed: of the attack's noise, which is the same in every epoch.
        """
        indices, prompts = self.data.chosen(self.limit), self.data.prompts()
        parts = [indices[start : start + self.batch] for start in range(0, len(indices), self.batch)]
        with frozen(network):
            with group.together():
                texts, rewritten = self._texts(network, prompts)

            def right(part: Sequence[int]) -> dict[str, list[bool]]:
                found: dict[str, list[bool]] = {}
                for batch in self._batches(part):
                    for name, mask in self._right(network, device, batch, texts, rewritten, seed).items():
                        found.setdefault(name, []).extend(mask.tolist())
                return found

            told = group.each(parts, right)
        return {name: sum(sum(one[name]) for one in told) / len(indices) for name in told[0]}

    def _batches(self, part: Sequence[int]) -> Iterator[Labelled]:
        with closing(self.data.batches(self.batch, part)) as batches:  # type: ignore[type-var]
            yield from batches

    def _texts(self, network: DualEncoder, prompts: Prompts) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """The embedding of each class, from the prompts as they are and, with a text attack, as it rewrites them."""
        with torch.no_grad():
            if self.text_attack is None:
                return _classes(network, prompts), None
            rewritten = self.text_attack.rewrite(network.encode_text, prompts.flat, self.budget, prompts.rivals())
            return _classes(network, prompts), _classes(network, prompts.rewritten(rewritten))

    def _right(
        self,
        network: DualEncoder,
        device: torch.device,
        batch: Labelled,
        texts: TextEmbeddings,
        rewritten: TextEmbeddings | None,
        seed: int,
    ) -> dict[str, Mask]:
        """Which images of a batch are answered rightly."""
        images, labels = batch.images.to(device), batch.labels.to(device)
        pixels, _ = self.image_attack.spends(self.budget)
        assert pixels is not None

        def answer(images: Images, texts: TextEmbeddings = texts) -> Tensor:
            return network.logits(network.encode_image(images), texts)

        bad = self.image_attack(
            ImageVictim(answer), images, Untargeted(labels), pixels, keys(batch.ids, seed, "validation").to(device)
        )
        with torch.no_grad():
            found = {CLEAN: answer(images).argmax(1) == labels, ROBUST: answer(bad).argmax(1) == labels}
            if rewritten is not None:
                found[TEXT] = answer(images, rewritten).argmax(1) == labels
        return found


def _classes(network: DualEncoder, prompts: Prompts) -> TextEmbeddings:
    """One embedding per class: the mean over templates of unit text embeddings, as models answer."""
    texts = F.normalize(network.encode_text(prompts.flat).float(), dim=1)
    return texts.view(len(prompts.names), -1, texts.shape[1]).mean(1)


def draw(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """The accuracies over the steps, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name in history[-1]:
        if name != "step":
            axes.plot([one["step"] for one in history], [100.0 * one[name] for one in history], marker="o", label=name)
    axes.set(xlabel="steps", ylabel="%", ylim=(0.0, 100.0))
    axes.grid(alpha=0.3)
    axes.legend()
    write(path, png(figure))
