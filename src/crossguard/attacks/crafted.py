"""An attack on a surrogate, carried out once for all models that are asked about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crossguard.attacks.base import Attack, MatchVictim, PairVictim, Queries, TextVictim
from crossguard.budgets import Budget, PixelBudget, TextBudget
from crossguard.files import WriteError, save_tensors
from crossguard.goals import Goal
from crossguard.shapes import Images, Seeds


@dataclass(frozen=True)
class Crafted(Attack):
    """What the attack made is kept in a folder, a file for each batch, and given back when it is asked for again.

    On a surrogate an attack does not see who will judge it, and its noise hangs on the samples alone: what was made for
    one judge is to the bit what would be made for another. Counts of questions come back with the images.

    Args:
        attack: what is carried out.
        folder: of one task, surrogate, attack, budget, limit and seed; nothing in it is checked for that.
    """

    attack: Attack
    folder: Path

    def spends(self, budget: Budget) -> tuple[PixelBudget | None, TextBudget | None]:
        return self.attack.spends(budget)

    def rewrite(
        self,
        victim: TextVictim,
        texts: Sequence[str],
        budget: Budget,
        rivals: Sequence[AbstractSet[str]],
        goal: Goal | None = None,
    ) -> list[str]:
        def craft() -> tuple[dict[str, Tensor], list[str]]:
            return {}, self.attack.rewrite(victim, texts, budget, rivals, goal)

        return self._once("texts", "\n".join(texts).encode("utf-8", "surrogatepass"), craft, len(texts))[1]

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        if self.spends(budget)[0] is None:
            return images

        def craft() -> tuple[dict[str, Tensor], list[str]]:
            return {"images": self.attack.perturb(victim, images, goal, budget, seeds)}, []

        return self._images(craft, victim.before.queries, images, seeds, 0)[0]

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        apart = self.spends(budget)[0] is None  # images that stay come back as they are, for the task to see that

        def craft() -> tuple[dict[str, Tensor], list[str]]:
            made, words = self.attack.match(victim, images, texts, budget, seeds)
            return {} if apart else {"images": made}, words

        return self._images(craft, victim.encode.queries, images, seeds, len(texts), apart)

    def _images(
        self, craft: _Craft, queries: Queries | None, clean: Images, seeds: Seeds, texts: int, apart: bool = False
    ) -> tuple[Images, list[str]]:
        def counted() -> tuple[dict[str, Tensor], list[str]]:
            tensors, texts = craft()
            if queries is not None:
                tensors |= {"forwards": queries.forwards, "gradients": queries.gradients}
            return tensors, texts

        wanted = {} if apart else {"images": (clean.dtype, clean.shape)}
        if queries is not None:
            counts = {"forwards": queries.forwards, "gradients": queries.gradients}
            wanted |= {name: (count.dtype, count.shape) for name, count in counts.items()}
        tensors, words = self._once("images", seeds.cpu().numpy().tobytes(), counted, texts, wanted)
        if queries is not None:
            queries.forwards.copy_(tensors["forwards"])
            queries.gradients.copy_(tensors["gradients"])
        return tensors["images"].to(clean.device) if "images" in tensors else clean, words

    def _once(
        self, kind: str, what: bytes, craft: _Craft, count: int, wanted: Mapping[str, _Form] | None = None
    ) -> tuple[dict[str, Tensor], list[str]]:
        """What lies in the folder, if it is whole and has the form of what would be made now; otherwise it is made.

        Args:
            count: of the texts.
            wanted: the tensors that are made, with their types and shapes.
        """
        path = self.folder / f"{kind}-{hashlib.sha256(what).hexdigest()[:16]}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata()
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            words = json.loads(told["texts"])
            forms = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
            if told["digest"] == _digest(found, told["texts"]) and forms == (wanted or {}) and len(words) == count:
                return found, words
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
            pass  # not there yet, or broken
        tensors, texts = craft()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with suppress(WriteError):  # what does not fit on the disk is made again
            said = json.dumps(texts)
            save_tensors(path, tensors, {"texts": said, "digest": _digest(tensors, said)})
        return tensors, texts


def _digest(tensors: Mapping[str, Tensor], texts: str) -> str:
    """Tells what was written whole from what was not, or was changed since."""
    whole = hashlib.sha256(texts.encode())
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()


_Form = tuple[torch.dtype, torch.Size]


_Craft = Callable[[], tuple[dict[str, Any], list[str]]]
