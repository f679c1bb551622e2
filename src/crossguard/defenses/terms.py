"""The terms of training losses: small functions of clean and adversarial embeddings of both towers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.errors import CrossguardError
from crossguard.shapes import Embeddings, Labels, Logits, TextEmbeddings

CLEAN, ADVERSARIAL = "clean", "adversarial"


@dataclass(frozen=True)
class Views:
    """What a loss sees of a step: raw embeddings of the images and of the distinct texts, each clean and/or
    adversarial.

    `own[i]` is the row of the texts that belongs to image `i`; `logits` is the student's scaled cosine.
    """

    images: Mapping[str, Embeddings]
    texts: Mapping[str, TextEmbeddings]
    own: Labels
    logits: Callable[[Embeddings, TextEmbeddings], Logits]


class Term(ABC):
    """One summand of a training loss. `image` and `text` name the views it needs: 'clean' or 'adversarial'."""

    image: str
    text: str
    weight: float

    @abstractmethod
    def __call__(self, views: Views) -> Tensor:
        """The value, a mean over the batch, before its weight."""


@dataclass(frozen=True)
class InBatch(Term):
    """The symmetric contrastive loss of CLIP over the batch: the sum of image-to-text and text-to-image cross-entropy.

    With identity targets, so two images of one class repel each other's copy of the same prompt, as in MMCoA's
    released code. Only distinct texts are encoded; `counts` restore exactly the value and the gradient of the
    duplicated batch.
    """

    image: str = CLEAN
    text: str = CLEAN
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, views: Views) -> Tensor:
        return in_batch(views.logits(views.images[self.image], views.texts[self.text]), views.own)


@dataclass(frozen=True)
class OverClasses(Term):
    """The one-way cross-entropy of each image over the prompts of all classes: the loss of TeCoA and of PGD in
    MMCoA."""

    image: str = CLEAN
    text: str = CLEAN
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, views: Views) -> Tensor:
        return F.cross_entropy(views.logits(views.images[self.image], views.texts[self.text]), views.own)


def in_batch(logits: Logits, own: Labels) -> Tensor:
    """Symmetric in-batch cross-entropy from logits of n images with k distinct texts, where image i owns text `own[i]`.

    Image to text: -s_i,own + log sum_k n_k exp(s_ik), with n_k copies of text k in the batch (0 drops a text that
    nobody owns). Text to image: each copy of a text has its own image as target, so summed over copies
    -s_i,own + log sum_j exp(s_j,own(i)).
    """
    counts = torch.bincount(own, minlength=logits.shape[1]).to(logits.dtype)
    matched = logits.gather(1, own[:, None])[:, 0]
    to_text = torch.logsumexp(logits + counts.log(), dim=1) - matched
    to_image = torch.logsumexp(logits, dim=0)[own] - matched
    return to_text.mean() + to_image.mean()


def _check(term: InBatch | OverClasses) -> None:
    for view in (term.image, term.text):
        if view not in (CLEAN, ADVERSARIAL):
            raise CrossguardError(f"{type(term).__name__} cannot see a view {view!r}; give 'clean' or 'adversarial'")
