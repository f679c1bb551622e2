"""Randomized smoothing: the answer of a model to noise about an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F

from crossguard.answer import Answer, Gate, Said
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import Lent, Wrapper
from crossguard.seeds import among
from crossguard.shapes import Embeddings, Images, Logits

_T = TypeVar("_T")


@dataclass(frozen=True)
class Smoothed(Wrapper):
    """Randomized smoothing (Cohen et al., ICML 2019): Gaussian noise is added to an image `draws` times, and the class
    that most of the noisy images are taken for wins. Within which radius nothing changes that says `certify`.

    The logits are log((votes + p) / (draws + 1)), p the mean probability over the draws: one more voter, who shares the
    vote and only decides between classes of equally many. A vote has no gradient; attacks see through it by that of log
    p, which is the smooth stand-in as well (Salman et al., NeurIPS 2019). Where embeddings are asked for (a retrieval),
    it is the mean of the unit embeddings.

    Noisy images are cut to [0, 1], which the paper does not do, since models here read no other pixels. The certificate
    stays what it is: the theorem is about any function of pixels and normal noise, and the cut comes after the noise,
    so it is the first step of that function. (Noise that is cut itself, or made to fit the image, would be no normal
    noise, and nothing would follow.) The standard deviation is one of the paper's; it guesses by 100 draws before it
    certifies by 100,000. An image costs as many forwards as there are draws, and with finitely many the vote may miss
    what the certificate is about: the class that most of all noise would be taken for.

    Args:
        std: of the noise, in pixels of [0, 1].
    """

    base: VisionLanguageModel
    std: float = 0.25
    draws: int = 100
    random = True
    masks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.std < float("inf"):
            raise CrossguardError(f"Smoothed(std={self.std}) is not possible; give 0 or more, in pixels of [0, 1]")
        if self.draws < 1:
            raise CrossguardError(f"Smoothed(draws={self.draws}) asks nobody; give 1 or more")

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live

        def asked(ask: Callable[[Images], Said], combine: Callable[[Sequence[Logits]], Logits]) -> Callable[..., Said]:
            def answer(images: Images) -> Said:
                return _mean(self._each(images, ask), combine)

            return answer

        return replace(
            inner,
            hard=asked(inner.hard, _votes),
            soft=asked(inner.smooth.hard, _probability),
            gates={name: self._furthest(gate) for name, gate in inner.gates.items()},
        )

    def _furthest(self, gate: Gate) -> Gate:
        return lambda images: torch.stack(self._each(images, gate)).amax(0)

    def _each(self, images: Images, ask: Callable[[Images], _T]) -> list[_T]:
        """What is said to each noisy copy, one after the other, so that no batch has to hold them all."""
        every, found = torch.ones(len(images), dtype=torch.bool), list[_T]()
        for _ in range(self.draws):
            noisy = (images + self.std * self.normal(images)).clamp(0.0, 1.0)
            with among(every, type(self).__name__):  # so that what is drawn inside hangs on nothing but the copy
                found.append(ask(noisy))
        return found


def _mean(said: Sequence[Said], combine: Callable[[Sequence[Logits]], Logits]) -> Said:
    reads = [one.read for one in said if one.read is not None]

    def read(embeddings: Embeddings) -> Logits:
        return combine([one(embeddings) for one in reads])

    return Said(
        torch.stack([F.normalize(one.embeddings, dim=1) for one in said]).mean(0),
        read if reads else None,
        {name: torch.stack([one.gates[name] for one in said]).amax(0) for name in said[0].gates},
        (lambda: combine([one.logits for one in said])) if reads else None,
    )


def _probability(logits: Sequence[Logits]) -> Logits:
    """The logarithm of the mean probability."""
    return torch.logsumexp(torch.stack([one.log_softmax(1) for one in logits]), 0) - math.log(len(logits))


def _votes(logits: Sequence[Logits]) -> Logits:
    """The logarithm of the share of votes (`Smoothed`), with the gradient of the mean probability."""
    near = _probability(logits)
    votes = torch.stack([F.one_hot(one.argmax(1), one.shape[1]) for one in logits]).sum(0)
    hard = torch.logaddexp(votes.log(), near.detach()) - math.log(len(logits) + 1)
    return hard + (near - near.detach())  # plus zero, exactly
