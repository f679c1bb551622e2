"""What a model is: pixels in [0, 1] and strings in, embeddings out; and the trainable module behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossguard.answer import Answer, Read, Said, counted, embeddings_of, logits_of
from crossguard.data import Prompts
from crossguard.device import Choice, chosen
from crossguard.errors import CrossguardError
from crossguard.models.splicing import Splice
from crossguard.opening import Opened, Opens, opened, opening
from crossguard.shapes import Embeddings, Images, Logits, PatchTokens, Resized, TextEmbeddings
from crossguard.words import Word, quoted

_LARGEST_NUMBER = 1e6  # that pixels are shifted or divided by; those of towers in use are below 1, or 255 at most
_IMAGES_AT_ONCE = 256  # without a gradient: bounds the memory of defenses that look at many views of each image
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
    fit: Literal["", "cover", "inside", "stretched"] = ""  # other ways: see `_fitted`
    fill: float = 0.0  # of what is left around an image that was fitted inside
    rounds: bool = False  # an odd margin is halved as torchvision does, and not down

    def __call__(self, images: Images) -> Resized:
        return self.normalized(self.fitted(images))

    def fitted(self, images: Images) -> Resized:
        """The pixels in [0, 1] at the size that the tower reads."""
        height, width = images.shape[-2:]
        if self.fit:
            images = self._fitted(images)
        elif self.resize is None:
            images = self._resized(images, self.height, self.width)
        else:
            short = min(height, width)
            images = self._resized(images, int(self.resize * height / short), int(self.resize * width / short))
            images = self._center_crop(images)
        return images

    def normalized(self, images: Images) -> Resized:
        """What the tower reads of pixels of its size."""
        mean, std = (constant(values, images.device, images.dtype) for values in (self.mean, self.std))
        return (images - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)

    def _fitted(self, images: Images) -> Resized:
        """The image in its own shape, as small as covers the frame and cropped, or as large as fits inside and padded
        (open_clip's ResizeKeepRatio and CenterCropOrPad); or stretched to a square, and cropped (ALIGN)."""
        if self.fit == "stretched":
            assert self.resize is not None
            return self._center_crop(self._resized(images, self.resize, self.resize))
        ratios = images.shape[-2] / self.height, images.shape[-1] / self.width
        ratio = max(ratios) if self.fit == "inside" else min(ratios)
        images = self._resized(images, round(images.shape[-2] / ratio), round(images.shape[-1] / ratio))
        down, across = max(0, self.height - images.shape[-2]), max(0, self.width - images.shape[-1])
        frame = (across // 2, (across + 1) // 2, down // 2, (down + 1) // 2)
        return self._center_crop(F.pad(images, frame, value=self.fill) if any(frame) else images)

    def _center_crop(self, images: Images) -> Resized:
        down, across = images.shape[-2] - self.height, images.shape[-1] - self.width
        if down < 0 or across < 0:
            raise CrossguardError(
                f"an image of {tuple(images.shape[-2:])} is too small for a crop of {(self.height, self.width)}"
            )
        top, left = (round(down / 2), round(across / 2)) if self.rounds else (down // 2, across // 2)
        return images[..., top : top + self.height, left : left + self.width]

    def _resized(self, images: Images, height: int, width: int) -> Resized:
        if images.shape[-2:] == (height, width):
            return images
        for size in ((images.shape[-2], width), (height, width)):  # as Pillow: rows first, each pass clipped
            images = F.interpolate(images, size, mode=self.mode, align_corners=False, antialias=True).clamp(0.0, 1.0)
        return images


def normalization(mean: Any, std: Any, name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """What pixels are shifted and divided by, as settings say it; raises where those are no three usable numbers each.

    Args:
        name: what holds these settings, for the error.
    """
    means, stds = (tuple(float(value) for value in values) for values in (mean, std))
    for part, found in (("image_mean", means), ("image_std", stds)):
        if len(found) != 3 or not all(abs(value) <= _LARGEST_NUMBER for value in found):
            raise CrossguardError(f"{name} has an {part} of {found!s:.60}; give three finite numbers")
    if min(stds) < 1.0 / _LARGEST_NUMBER:
        raise CrossguardError(f"{name} has an image_std of {stds!s:.60}; give three positive numbers")
    return means, stds  # type: ignore[return-value]


@lru_cache(maxsize=256)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The numbers as a tensor on the device, where they lie once and for all: sending them anew in each forward would
    make the device wait."""
    with torch.inference_mode(False):  # what is made in that mode could not be used outside of it
        return torch.tensor(values, device=device, dtype=dtype)


class DualEncoder(nn.Module):
    """The live network behind a model word: two towers, a scale and a bias. This is what recipes train and save."""

    @abstractmethod
    def encode_image(self, images: Images) -> Embeddings:
        """Raw image embeddings of pixels in [0, 1] at any resolution, differentiable in pixels and parameters."""

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        """Raw text embeddings, differentiable in the parameters."""

    @property
    def stock(self) -> Any:
        """The model of `transformers` inside, for what reaches into its towers; None where there is none."""
        return None

    def fitted(self, images: Images) -> Resized:
        """The pixels in [0, 1] at the size that the image tower reads: the first half of `encode_image`."""
        del images
        raise CrossguardError(
            f"a {type(self).__name__} does not say at which size it sees images, so none of its pixels can be learned; "
            "give a CLIP or SigLIP model"
        )

    def encode_fitted(self, pixels: Resized) -> Embeddings:
        """Raw embeddings of such pixels, which need not be in [0, 1]: the second half of `encode_image`."""
        return self.encode_image(pixels)

    def patches(self, images: Images) -> tuple[Embeddings, PatchTokens]:
        """Raw image embeddings and, from the same forward, the patch tokens in their space, row by row of the image."""
        del images
        raise CrossguardError(
            f"a {type(self).__name__} has no patch tokens in the space of its embeddings; give a CLIP, or a "
            "VisionTextDualEncoder with a ViT"
        )

    def patches_fitted(self, pixels: Resized, behind: int = 0) -> tuple[Embeddings, PatchTokens]:
        """The same of pixels at the size that the image tower reads.

        Args:
            behind: so many of the last tokens are no patches of the image, but were given to the tower.
        """
        del behind
        return self.patches(pixels)

    def splice(self, texts: Sequence[str], words: str, lists: Sequence[int] = ()) -> Splice:
        """The texts with learned vectors in place of these words, which are put in front of a text without them.

        Args:
            lists: for each text the number of its list of vectors, where texts have different ones.
        """
        del texts, words, lists
        raise CrossguardError(f"a {type(self).__name__} cannot read learned tokens; give a CLIP or SigLIP model")

    @property
    def forwards(self) -> int:
        """How many forwards of the image tower the embedding of an image takes."""
        return 1

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

    def cast(self, dtype: torch.dtype) -> DualEncoder:
        """The same network with towers of this precision; scale and bias stay in float32, since a rounded scale would
        change every logit."""
        head = [(parameter, parameter.data) for parameter in self.towers()["head"].values()]
        self.to(dtype)
        for parameter, exact in head:
            parameter.data = exact
        return self

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        """Scaled cosines of every image with every text, plus the bias, in float32 also where autocast is on."""
        return cosine(images, texts) * self.scale.float() + self.bias.float()


class VisionLanguageModel(Word, ABC):
    """Pixels and strings in, embeddings out. Pixels are in [0, 1] at any resolution: resizing and normalization live
    inside, differentiably, so a budget means the same for every model and applies at the resolution the data has.
    Embeddings are raw; only `logits` puts them on the sphere, with the model's own scale and bias. A defended model
    is a model."""

    random: bool = False  # the same question may be answered differently
    masks: bool = False  # has steps without a gradient, which attacks see through by an approximation (BPDA)

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

    @property
    def forwards(self) -> int:
        """How many forwards of an image tower the embedding of an image takes, defenses not counted."""
        return 1

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the model reads; their ends are not seen."""
        del texts
        return 0

    def answer(self, classes: Prompts | TextEmbeddings | None = None) -> Answer:
        """What this model says to images, for as long as anybody asks. The networks are opened here, and no file is
        looked at when images come.

        Args:
            classes: the prompts of classes, which are encoded here, once: unit embeddings averaged over templates;
                then it answers with one logit per class. With embeddings of texts (the captions of a retrieval), or
                without any, it answers with embeddings.
        """
        with opening() as held:
            if isinstance(classes, Prompts):
                texts, tell = self.class_embeddings(classes), logits_of
                read = self._reading(texts, classes.texts)
            else:
                texts, tell = classes, embeddings_of
                read = None if texts is None else self._reading(texts)

        def hard(images: Images) -> Said:
            with held.inside():
                return Said(counted(self.encode_image(images), self.forwards), reading)

        def reading_inside(embeddings: Embeddings) -> Logits:
            assert read is not None
            with held.inside():
                return read(embeddings)

        reading = None if read is None else reading_inside
        return Answer(hard, texts=texts, read=reading, random=self.random, masks=self.masks, tell=tell)

    def classifier(self, prompts: Prompts) -> Callable[[Images], Logits]:
        """Images to one logit per class (`answer`)."""
        return self.answer(prompts)

    def _reading(self, texts: TextEmbeddings, strings: Sequence[object] = ()) -> Read:
        """Embeddings to one logit for each text. Classes of the same prompts get the same column, equal to the bit:
        computed apart they would differ by rounding, and the answer would depend on the batch."""
        place = {one: row for row, one in reversed(list(enumerate(strings)))}
        distinct = sorted(place.values())
        if len(distinct) == len(strings):
            return lambda embeddings: self.logits(embeddings, texts)
        kept = texts[distinct]
        columns = torch.tensor([distinct.index(place[one]) for one in strings], device=texts.device)
        return lambda embeddings: self.logits(embeddings, kept)[:, columns]

    def class_embeddings(self, prompts: Prompts) -> Embeddings:
        """One embedding per class: the mean over templates of unit text embeddings, without gradient."""
        with torch.no_grad():
            texts = F.normalize(self.encode_text(prompts.flat).float(), dim=1)
            return texts.view(len(prompts.names), -1, texts.shape[1]).mean(1)


class Checkpoint(VisionLanguageModel, Opens):
    """A model with a network of its own. Equal words share one network, frozen and in evaluation mode; `load` makes a
    fresh one for whoever wants to train it.

    The files behind a word are looked at when the network is opened: once inside `opening()`, as in an evaluation or a
    classifier, and outside at each question.
    """

    @abstractmethod
    def load(self) -> DualEncoder:
        """A new network, on the CPU, in float32, trainable, in evaluation mode."""

    def saved(self, folder: Path) -> Checkpoint | None:
        """The word that reads what a network of this one has written there (`DualEncoder.save`); None where that is the
        format of `transformers`, which `HuggingFace` reads."""
        del folder
        return None

    def open(self) -> DualEncoder:
        """The shared network of this word as its files are now: frozen, in evaluation mode, on the device and in the
        precision of `device.chosen()`."""
        with Opened().inside():
            return self.network

    @property
    def network(self) -> DualEncoder:
        """The shared network of this word; inside `opening()` always the very same."""
        with opening() as held:
            return held.network(self, self._loaded, lambda network: network)

    def _loaded(self, choice: Choice) -> DualEncoder:
        network = self.load().requires_grad_(False).eval()
        return (network if choice.dtype == torch.float32 else network.cast(choice.dtype)).to(choice.device)

    @property
    def device(self) -> torch.device:
        held = opened()
        return (chosen() if held is None else held.choice).device

    def encode_image(self, images: Images) -> Embeddings:
        with opening():
            network, images = self.network, images.to(self.device)
            graph = torch.is_grad_enabled() and images.requires_grad
            if len(images) <= _IMAGES_AT_ONCE or graph or _together.get():
                return network.encode_image(images).float()
            return torch.cat([network.encode_image(part) for part in images.split(_IMAGES_AT_ONCE)]).float()

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        def read() -> Embeddings:
            network = self.network
            chunks = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
            return torch.cat([network.encode_text(chunk) for chunk in chunks]).float()

        held = opened()
        if held is None or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return read()
        return held.remembered((self, tuple(texts)), read)

    @property
    def forwards(self) -> int:
        return self.network.forwards

    def cut(self, texts: Sequence[str]) -> int:
        return self.network.cut(texts)

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        return self.network.logits(images, texts)


def checkpoint(model: VisionLanguageModel, who: str) -> Checkpoint:
    """The same model; raises where it has no network of its own.

    Args:
        who: wants one, for the error.
    """
    if not isinstance(model, Checkpoint):
        raise CrossguardError(
            f"{who} asks for the network of a checkpoint, and {quoted(model)} has none; give HuggingFace('folder') or "
            "the like, and put a defense around the result"
        )
    return model


def asked_of(word: object) -> Iterator[Checkpoint]:
    """The models with a network of their own that a word asks. What such a model was trained from, or by, is no part of
    what it is now, and is not looked at."""
    if isinstance(word, Checkpoint):
        yield word
        return
    parts: Iterable[object] = word if isinstance(word, tuple) else ()
    if is_dataclass(word):
        parts = [getattr(word, field.name) for field in fields(word)]
    for part in parts:
        yield from asked_of(part)


_together: ContextVar[bool] = ContextVar("crossguard_together", default=False)


@contextmanager
def together() -> Iterator[None]:
    """Inside, all images of a question go through a tower in one forward, as is needed by what tells them apart by
    their place in it."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


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
    """The cosine of every image with every text, in float32 also where autocast is on: in bfloat16 a thousand logits
    would have some 150 values, and many classes would tie."""
    with torch.autocast(images.device.type, enabled=False):
        return F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T
