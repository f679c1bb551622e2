"""Where images and captions find each other: what an adversary wants there, and who comes out at which rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.goals import Goal, log_odds, nobody
from crossguard.shapes import Embeddings, Labels, Logits, Mask, Owners, PerImage, TextEmbeddings

Similarity = Callable[[Embeddings, TextEmbeddings], Logits]  # of every image with every text; a model's `logits`

AT_ONCE = 2**25  # similarities that are held at once: 128 MB, and a few times that while they are ranked


@dataclass(frozen=True)
class Away(Goal):
    """Away from given embeddings, several for each sample: the weighted sum of 1 - cosine.

    With the clean embedding alone it is `Drift`; with the captions of an image it is the set-level goal of SGA (Lu et
    al. 2023), with both that of Co-Attack (Zhang et al. 2022). The victim may answer with several embeddings of a
    sample side by side (views of an image); then their losses add up.

    Args:
        targets: the embeddings to get away from, `k` for each sample.
        weights: of each of them; 0 where a sample has fewer than `k`.
        divergence: climb KL(softmax(target) || softmax(new)) of the unit embeddings, as the reference code does; it is
            (1 - cosine) / d within about 1 %, so this changes the scale more than the outcome.
    """

    targets: Tensor
    weights: Tensor
    divergence: bool = False
    wins: ClassVar[bool] = False

    def loss(self, outputs: Tensor) -> PerImage:
        targets = F.normalize(self.targets.float(), dim=2)
        views = F.normalize(outputs.float().view(len(outputs), -1, targets.shape[2]), dim=2)
        if self.divergence:
            shares = targets.softmax(2)
            apart = (shares * shares.log()).sum(2)[:, None, :] - views.log_softmax(2) @ shares.transpose(1, 2)
        else:
            apart = 1.0 - views @ targets.transpose(1, 2)
        return (apart * self.weights[:, None, :]).sum((1, 2))

    def won(self, outputs: Tensor) -> Mask:
        return nobody(outputs)

    def at(self, keep: Tensor) -> Away:
        keep = keep.to(self.targets.device)
        return replace(self, targets=self.targets[keep], weights=self.weights[keep])

    def counts(self) -> tuple[int, ...]:
        return len(self.targets), len(self.weights)


@dataclass(frozen=True)
class Gallery:
    """All images and captions of a retrieval, as a model embeds them clean: what an attacked one must fall behind.

    Args:
        owners: for each caption, the number of its image.
        similarity: logits of every image with every text.
    """

    images: Embeddings
    texts: TextEmbeddings
    owners: Owners
    similarity: Similarity

    def lost_images(self, rows: Labels, captions: TextEmbeddings, owners: Owners) -> LostImages:
        """The goal for the images at `rows` while their captions have these embeddings.

        Args:
            owners: for each of `captions`, its place in `rows`.
        """
        with torch.no_grad():
            logits = self.similarity(self.images, captions).float().T  # captions, images
            own = rows[owners][:, None]
            rest = logits.scatter(1, own, -torch.inf)
            bars = torch.stack([rest.logsumexp(1), rest.amax(1)], 1)
        partners, there = grouped(torch.cat([captions.float(), bars], 1), owners, len(rows))
        return LostImages(self, rows, partners[..., :-2], there, partners[..., -2], partners[..., -1])

    def lost_texts(self, rows: Labels, images: Embeddings) -> LostTexts:
        """The goal for captions whose own images, at `rows` of the gallery, have these embeddings; one for each
        caption."""
        return LostTexts(self, rows, images.float())


@dataclass(frozen=True)
class LostImages(Goal):
    """Images and their captions that do not find each other: a caption of another image comes first for the image, and
    another image comes first for each of its captions.

    The loss is the cross-entropy of both directions, that of the image over all captions and the mean of those of its
    captions over all images, with the model's own scale. Ours, not from a paper: what ranks are made of. It knows the
    clean gallery; `Away` needs nothing but the pair.
    """

    gallery: Gallery
    rows: Labels
    captions: Tensor  # (n, m, d)
    there: Tensor  # (n, m): an image may have fewer than m captions
    rest: Tensor  # (n, m): log-sum-exp of the logits of each caption with the other images
    bars: Tensor  # (n, m): the largest of them

    def loss(self, outputs: Tensor) -> PerImage:
        others, own = self._logits(outputs)
        by_image = F.softplus(log_odds(others, own.masked_fill(~self.there, -torch.inf).logsumexp(1)))
        by_text = F.softplus(self.rest - own).masked_fill(~self.there, 0.0).sum(1)
        return by_image + by_text / self.there.sum(1).clamp_min(1)

    def won(self, outputs: Tensor) -> Mask:
        others, own = self._logits(outputs)
        return self._behind(others, own) & ((self.bars >= own) | ~self.there).all(1)

    def image_lost(self, outputs: Tensor) -> Mask:
        """Whether a caption of another image comes first for the image."""
        return self._behind(*self._logits(outputs))

    def _behind(self, others: Logits, own: Tensor) -> Mask:
        return others.amax(1) >= own.masked_fill(~self.there, -torch.inf).amax(1)

    def at(self, keep: Tensor) -> LostImages:
        keep = keep.to(self.rows.device)
        return replace(
            self,
            rows=self.rows[keep],
            captions=self.captions[keep],
            there=self.there[keep],
            rest=self.rest[keep],
            bars=self.bars[keep],
        )

    def counts(self) -> tuple[int, ...]:
        return len(self.rows), len(self.captions)

    def _logits(self, outputs: Tensor) -> tuple[Logits, Tensor]:
        """The logits of each image with the captions of the others, and with its own."""
        gallery = self.gallery
        mine = gallery.owners[None, :] == self.rows[:, None]
        others = gallery.similarity(outputs, gallery.texts).float().masked_fill(mine, -torch.inf)
        n, m = self.there.shape
        own = gallery.similarity(outputs, self.captions.flatten(0, 1)).float().view(n, n, m)
        return others, own[torch.arange(n, device=own.device), torch.arange(n, device=own.device)]


@dataclass(frozen=True)
class LostTexts(Goal):
    """Captions that do not find their image: another one comes first. The loss is the cross-entropy over all images,
    with the model's own scale. Ours, not from a paper."""

    gallery: Gallery
    rows: Labels  # of the own image, for each caption
    images: Tensor  # its embedding as it is now

    def loss(self, outputs: Tensor) -> PerImage:
        others, own = self._logits(outputs)
        return F.softplus(log_odds(others, own))

    def won(self, outputs: Tensor) -> Mask:
        others, own = self._logits(outputs)
        return others.amax(1) >= own

    def at(self, keep: Tensor) -> LostTexts:
        keep = keep.to(self.rows.device)
        return replace(self, rows=self.rows[keep], images=self.images[keep])

    def counts(self) -> tuple[int, ...]:
        return len(self.rows), len(self.images)

    def _logits(self, outputs: Tensor) -> tuple[Logits, PerImage]:
        """The logits of each caption with the images of others, and with its own."""
        gallery = self.gallery
        others = gallery.similarity(gallery.images, outputs).float().T.scatter(1, self.rows[:, None], -torch.inf)
        # Images of several captions are asked about once.
        distinct, place = self.images.unique(dim=0, return_inverse=True)
        return others, gallery.similarity(distinct, outputs).float().T.gather(1, place[:, None])[:, 0]


def grouped(values: Tensor, owners: Labels, count: int) -> tuple[Tensor, Tensor]:
    """The values of each of `count` owners side by side, shape (count, m, d), filled up with zeros; and which are
    there. `owners` need not be sorted."""
    most = int(owners.bincount(minlength=count).amax()) if len(owners) else 1
    order = owners.argsort(stable=True)
    sizes = owners.bincount(minlength=count)
    starts = sizes.cumsum(0) - sizes
    column = torch.arange(len(owners), device=owners.device) - starts[owners[order]]
    held = values.new_zeros(count, most, values.shape[1])
    there = torch.zeros(count, most, dtype=torch.bool, device=values.device)
    held[owners[order], column] = values[order]
    there[owners[order], column] = True
    return held, there


def image_ranks(
    images: Embeddings,
    texts: TextEmbeddings,
    owners: Owners,
    similarity: Similarity,
    among: TextEmbeddings | None = None,
) -> Labels:
    """For each image the rank of the best of its captions among all texts, 0 for the first; in blocks of bounded
    memory. Who is equal counts as better: an answer that is decided by the order of a list is none.

    Args:
        among: what the texts of others are, if not `texts`.
    """
    found: list[Tensor] = []
    distinct, now, others = _distinct(texts, among)
    size = max(1, AT_ONCE // max(1, len(distinct), len(texts)))
    for rows in torch.arange(len(images), device=images.device).split(size):
        own = owners[None, :] == rows[:, None]
        logits = similarity(images[rows], distinct).float()
        best = logits[:, now].masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        found.append(((logits[:, others] >= best) & ~own).sum(1).cpu())
    return torch.cat(found)


def text_ranks(
    images: Embeddings,
    texts: TextEmbeddings,
    owners: Owners,
    similarity: Similarity,
    among: Embeddings | None = None,
) -> Owners:
    """For each text the rank of its image among all images, 0 for the first; in blocks of bounded memory.

    Args:
        among: what the images of others are, if not `images`.
    """
    found: list[Tensor] = []
    distinct, now, others = _distinct(images, among)
    size = max(1, AT_ONCE // max(1, len(distinct), len(images)))
    for rows in torch.arange(len(texts), device=images.device).split(size):
        place = owners[rows][:, None]
        logits = similarity(distinct, texts[rows]).float().T
        own = logits[:, now].gather(1, place)
        found.append((logits[:, others].scatter(1, place, -torch.inf) >= own).sum(1).cpu())
    return torch.cat(found)


def _distinct(embeddings: Tensor, among: Tensor | None) -> tuple[Tensor, Tensor | slice, Tensor | slice]:
    """Each embedding once, and where both kinds are among them. In two columns of a product equal ones would differ by
    rounding, and the order of a list would decide after all."""
    both = embeddings if among is None else torch.cat([embeddings, among])
    first, last = slice(len(embeddings)), slice(len(both) - len(embeddings), None)
    distinct, places = both.unique(dim=0, return_inverse=True)
    return (both, first, last) if len(distinct) == len(both) else (distinct, places[first], places[last])
