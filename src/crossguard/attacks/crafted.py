"""An attack on a surrogate, carried out once for all models that are asked about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

        return self._once("texts", "\n".join(texts).encode(), craft)[1]

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        if self.spends(budget)[0] is None:
            return images

        def craft() -> tuple[dict[str, Tensor], list[str]]:
            return {"images": self.attack.perturb(victim, images, goal, budget, seeds)}, []

        return self._images(craft, victim.before.queries, images, seeds)[0]

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        apart = self.spends(budget)[0] is None  # images that stay come back as they are, for the task to see that

        def craft() -> tuple[dict[str, Tensor], list[str]]:
            made, words = self.attack.match(victim, images, texts, budget, seeds)
            return {} if apart else {"images": made}, words

        return self._images(craft, victim.encode.queries, images, seeds)

    def _images(self, craft: _Craft, queries: Queries | None, clean: Images, seeds: Seeds) -> tuple[Images, list[str]]:
        def counted() -> tuple[dict[str, Tensor], list[str]]:
            tensors, texts = craft()
            if queries is not None:
                tensors |= {"forwards": queries.forwards, "gradients": queries.gradients}
            return tensors, texts

        tensors, texts = self._once("images", seeds.cpu().numpy().tobytes(), counted)
        if queries is not None:
            queries.forwards.copy_(tensors["forwards"])
            queries.gradients.copy_(tensors["gradients"])
        return tensors["images"].to(clean.device) if "images" in tensors else clean, texts

    def _once(self, kind: str, what: bytes, craft: _Craft) -> tuple[dict[str, Tensor], list[str]]:
        path = self.folder / f"{kind}-{hashlib.sha256(what).hexdigest()[:16]}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                texts = json.loads(file.metadata()["texts"])
                return {name: file.get_tensor(name) for name in file.keys()}, texts  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # not there yet, or broken
            tensors, texts = craft()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with suppress(WriteError):  # what does not fit on the disk is made again
            save_tensors(path, tensors, {"texts": json.dumps(texts)})
        return tensors, texts


_Craft = Callable[[], tuple[dict[str, Any], list[str]]]
