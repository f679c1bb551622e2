"""What a model is: pixels in [0, 1] and strings in, embeddings out; and the trainable module behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.shapes import Embeddings, Images, Logits, Resized, TextEmbeddings

_TEXTS_AT_ONCE = 1024  # bounds the memory of encoding thousands of prompts


@dataclass(frozen=True)
class Preprocess:
    """The family's own image processor, differentiable: resize, center crop and normalization of pixels in [0, 1].

    `resize` is the short side before the crop (CLIP); None sets height and width directly (SigLIP). Resizing is bicubic
    or bilinear with anti-aliasing, with Pillow's kernel: rows first, then columns, each pass clipped to [0, 1]. Pillow
    also rounds each pass to 8 bits, which has no gradient and is left out. So images of the model's own size are the
    processor's exactly, and at other sizes no pixel differs by more than 1.1/255. (Pillow 13 takes some tall images
    columns first; those differ by up to 20/255 at the few pixels where a pass overshoots the range of 8 bits.)
    """

    height: int
    width: int
    resize: int | None  # the short side before the crop; None: straight to (height, width)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: str = "bicubic"

    def __call__(self, images: Images) -> Resized:
        height, width = images.shape[-2:]
        if self.resize is None:
            images = self._resized(images, self.height, self.width)
        else:
            short = min(height, width)
            images = self._resized(images, int(self.resize * height / short), int(self.resize * width / short))
            images = _center_crop(images, self.height, self.width)
        mean = torch.tensor(self.mean, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
        return (images - mean) / std

    def _resized(self, images: Images, height: int, width: int) -> Resized:
        if images.shape[-2:] == (height, width):
            return images
        for size in ((images.shape[-2], width), (height, width)):  # as Pillow: rows first, each pass clipped
            images = F.interpolate(images, size, mode=self.mode, align_corners=False, antialias=True).clamp(0.0, 1.0)
        return images


class DualEncoder(nn.Module):
    """The live network behind a model word: two towers, a scale and a bias. This is what recipes train and save."""

    @abstractmethod
    def encode_image(self, images: Images) -> Embeddings:
        """Raw image embeddings of pixels in [0, 1] at any resolution, differentiable in pixels and parameters."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        """Raw text embeddings, differentiable in the parameters."""

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the network reads; their ends are not seen."""
        del texts
        return 0

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """The factor on cosines, positive; a function of the parameter, so it can be trained."""

    @property
    @abstractmethod
    def bias(self) -> Tensor:
        """What is added to scaled cosines; zero for CLIP."""

    @abstractmethod
    def towers(self) -> dict[str, dict[str, nn.Parameter]]:
        """The named parameters by tower, each from input to output: `image`, `text` and `head` (scale and bias)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes a checkpoint in the family's own format, readable without this package."""

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        """Scaled cosines of every image with every text, plus the bias, in float32."""
        return cosine(images, texts) * self.scale.float() + self.bias.float()

    def forward(self, images: Images, texts: Sequence[str] | None) -> tuple[Embeddings, TextEmbeddings | None]:
        """Both towers in one call, as distributed training wants it; without texts, the image tower alone."""
        return self.encode_image(images), None if texts is None else self.encode_text(texts)


class VisionLanguageModel(ABC):
    """Pixels and strings in, embeddings out. Pixels are in [0, 1] at any resolution: resizing and normalization live
    inside, differentiably, so a budget means the same for every model and applies at the resolution the data has.
    Embeddings are raw; only `logits` puts them on the sphere, with the model's own scale and bias. A defended model
    is a model."""

    random: bool = False  # the same question may be answered differently
    differentiable: bool = True  # gradients are the true ones; otherwise they are an approximation (BPDA)

    @abstractmethod
    def encode_image(self, images: Images) -> Embeddings:
        """Raw embeddings, shape (n, d)."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        """Raw embeddings, shape (n, d)."""

    @abstractmethod
    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        """Scaled cosines plus bias, shape (images, texts)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the network lives."""

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads; their ends are not seen."""
        del texts
        return 0

    def classifier(self, prompts: Prompts) -> Callable[[Images], Logits]:
        """Images to one logit per class. The prompts are encoded here, once: unit embeddings averaged over
        templates."""
        classes = self.class_embeddings(prompts)
        # Classes of the same prompts get the same column, equal to the bit: computed apart they would differ by
        # rounding, and the answer would depend on the batch.
        place = {texts: row for row, texts in reversed(list(enumerate(prompts.texts)))}
        same = [place[texts] for texts in prompts.texts]
        distinct = sorted(place.values())
        columns = torch.tensor([distinct.index(row) for row in same], device=classes.device)
        if len(distinct) == len(same):
            return lambda images: self.logits(self.encode_image(images), classes)
        kept = classes[distinct]
        return lambda images: self.logits(self.encode_image(images), kept)[:, columns]

    def class_embeddings(self, prompts: Prompts) -> Embeddings:
        """One embedding per class: the mean over templates of unit text embeddings, without gradient."""
        with torch.no_grad():
            texts = F.normalize(self.encode_text(prompts.flat).float(), dim=1)
            return texts.view(len(prompts.names), -1, texts.shape[1]).mean(1)


class Checkpoint(VisionLanguageModel):
    """A model with a network of its own, loaded on first use. Equal words share one network, frozen and in evaluation
    mode; `load` makes a fresh one for whoever wants to train it."""

    @abstractmethod
    def load(self) -> DualEncoder:
        """A new network, on the CPU, trainable, in evaluation mode."""

    def stamp(self) -> object:
        """Changes when what `load` would read has changed, so that a rewritten checkpoint is read again."""
        return None

    @property
    def network(self) -> DualEncoder:
        """The shared network of this word: frozen, in evaluation mode, on the best device there is."""
        return _shared(self, self.stamp())

    @property
    def device(self) -> torch.device:
        return self.network.scale.device

    def encode_image(self, images: Images) -> Embeddings:
        return self.network.encode_image(images.to(self.device))

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        network = self.network
        chunks = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        return torch.cat([network.encode_text(chunk) for chunk in chunks])

    def cut(self, texts: Sequence[str]) -> int:
        return self.network.cut(texts)

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        return self.network.logits(images, texts)


@lru_cache(maxsize=8)
def _shared(word: Checkpoint, stamp: object) -> DualEncoder:
    del stamp  # only part of the key
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return word.load().requires_grad_(False).eval().to(device)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient: attacks run faster and cannot leave anything in `.grad`. Restored on
    exit."""
    wanting = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def cosine(images: Embeddings, texts: TextEmbeddings) -> Logits:
    """The cosine of every image with every text, in float32."""
    return F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T


def check_finite(network: nn.Module, source: str) -> None:
    """Raises when a weight is NaN or infinite: such a model would look perfectly robust."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CrossguardError(f"the weights in {source} are damaged: {name!r} holds NaN or infinite values")


def _center_crop(images: Images, height: int, width: int) -> Resized:
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    if top < 0 or left < 0:
        raise CrossguardError(f"an image of {tuple(images.shape[-2:])} is too small for a crop of {(height, width)}")
    return images[..., top : top + height, left : left + width]
