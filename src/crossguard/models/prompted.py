"""Dual encoders with learned numbers beside their weights: words of a text, tokens of an image, pixels; and the model
word that reads them.

Each kind of prompt is a dual encoder around another one and changes one thing of it, so kinds combine by standing
around each other. What they are is saved in `prompts.json`, their numbers in `prompts.safetensors`, and the encoder
that they stand around only where it was trained with them.
"""

from __future__ import annotations

import json
import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossguard.checkpoints import check_finite, fingerprint, located
from crossguard.errors import CrossguardError
from crossguard.files import digest, save_tensors, write
from crossguard.limits import SETTINGS, shortly
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel, checkpoint
from crossguard.models.huggingface import HuggingFace, TransformersEncoder
from crossguard.models.splicing import Splice
from crossguard.models.towers import ImageTower, blocks
from crossguard.reading import misfit, read_json
from crossguard.seeds import derive, normal, uniform
from crossguard.shapes import Embeddings, Images, Logits, PatchTokens, Resized, Seeds, TextEmbeddings
from crossguard.words import show

_RECORD, _NUMBERS = "prompts.json", "prompts.safetensors"
_FOLDER = "give the folder of a training that learned prompts"
_STD = 0.02  # of vectors before they are learned, in CoOp, MaPLe and their descendants
_MOST_TOKENS, _MOST_NUMBERS = 1000, 2**26  # of a prompt: more is a mistake, or a record that would fill the memory
_FILLERS = ("x", "o", "a", "and")  # words, one of which is a single token for any tokenizer


class PromptedEncoder(DualEncoder):
    """A dual encoder with learned numbers at one place; all else is that of the encoder inside.

    A kind of prompt writes what it changes of `fitted`, `encode_fitted` and `encode_text`. Its parameters are its own,
    its settings what it is made of again.
    """

    kind: ClassVar[str]
    settings: dict[str, Any]  # of JSON: with the encoder inside they make this one again, up to its parameters

    def __init__(self, inner: DualEncoder) -> None:
        super().__init__()
        self.inner = inner
        self.train(inner.training)

    @classmethod
    @abstractmethod
    def remade(cls, inner: DualEncoder, settings: dict[str, Any]) -> PromptedEncoder:
        """One with these settings and any numbers; raises where they do not fit."""

    @abstractmethod
    def moves(self) -> tuple[str, ...]:
        """The towers whose embeddings depend on the parameters: 'image', 'text' or both."""

    @property
    def number(self) -> int:
        """How many prompts stand inside."""
        return len(prompts(self)) - 1

    @property
    def stock(self) -> Any:
        return self.inner.stock

    def encode_image(self, images: Images) -> Embeddings:
        return self.encode_fitted(self.fitted(images))

    def fitted(self, images: Images) -> Resized:
        return self.inner.fitted(images)

    def encode_fitted(self, pixels: Resized) -> Embeddings:
        return self.inner.encode_fitted(pixels)

    def patches(self, images: Images) -> tuple[Embeddings, PatchTokens]:
        return self.patches_fitted(self.fitted(images))

    def patches_fitted(self, pixels: Resized, behind: int = 0) -> tuple[Embeddings, PatchTokens]:
        return self.inner.patches_fitted(pixels, behind)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return self.inner.encode_text(texts)

    def splice(self, texts: Sequence[str], words: str, lists: Sequence[int] = ()) -> Splice:
        return self.inner.splice(texts, words, lists)

    @property
    def forwards(self) -> int:
        return self.inner.forwards

    def cut(self, texts: Sequence[str]) -> int:
        return self.inner.cut(texts)

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        return self.inner.logits(images, texts)

    @property
    def scale(self) -> Tensor:
        return self.inner.scale

    @property
    def bias(self) -> Tensor:
        return self.inner.bias

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters of this prompt alone."""
        return {name: one for name, one in self.named_parameters() if not name.startswith("inner.")}

    def towers(self) -> dict[str, dict[str, nn.Parameter]]:
        """Those of the encoder inside, and the prompt's as `prompt0.pixels`: under 'text' where texts depend on them,
        so that whoever remembers what a still tower said of texts does not."""
        found = {tower: dict(named) for tower, named in self.inner.towers().items()}
        tower = "text" if "text" in self.moves() else "image"
        found[tower] |= {f"prompt{self.number}.{name}": one for name, one in self.own().items()}
        return found

    def cast(self, dtype: torch.dtype) -> DualEncoder:
        """Prompts stay in float32: they are few, and what they are added to may be in it."""
        self.inner.cast(dtype)
        return self

    def save(self, folder: Path) -> None:
        """Writes all prompts and the encoder inside, each in its own format."""
        inner: DualEncoder = self
        while isinstance(inner, PromptedEncoder):
            inner = inner.inner
        inner.save(folder)
        save_prompts(prompts(self), folder, alone=False)


def prompts(network: DualEncoder) -> list[PromptedEncoder]:
    """The prompts around an encoder, from the inside out."""
    found = list[PromptedEncoder]()
    while isinstance(network, PromptedEncoder):
        found.append(network)
        network = network.inner
    return found[::-1]


def save_prompts(listed: Sequence[PromptedEncoder], folder: Path, alone: bool = True) -> None:
    """Writes these prompts, from the inside out.

    Args:
        alone: the encoder that they stand around is elsewhere, so its fingerprint is kept; otherwise it was trained
            with them and lies beside them.
    """
    told = [{"kind": one.kind, "settings": one.settings} for one in listed]
    numbers = {
        f"{number}.{name}": parameter.detach().float().cpu().contiguous().clone()
        for number, one in enumerate(listed)
        for name, parameter in one.own().items()
    }
    save_tensors(folder / _NUMBERS, numbers)
    base = {"base": fingerprint(listed[0].inner)} if alone else {}
    write(folder / _RECORD, json.dumps({**base, "prompts": told}, indent=1))


# Pixels


class _Framing(TypedDict):
    height: int
    width: int
    pad: int | None
    clip: bool
    normalized: bool


class FramedEncoder(PromptedEncoder):
    """Learned pixels that are added to every image at the size that the image tower reads: a frame, or all of them.

    Args:
        pad: how wide the frame is, in such pixels; all pixels are learned, if None.
        clip: whether what comes out is clipped to [0, 1].
        normalized: the unit of what is learned is that of normalized pixels, as in the released code of TeCoA, instead
            of pixels of [0, 1].
        start: standard deviation of what is learned before it is learned, in its unit.
        seed: of it.
    """

    kind = "frame"
    factor: Tensor  # of what is learned: its unit in pixels, and 0 inside of the frame

    def __init__(
        self,
        inner: DualEncoder,
        pad: int | None,
        clip: bool,
        normalized: bool = False,
        start: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(inner)
        with torch.no_grad():
            height, width = inner.fitted(torch.zeros(1, 3, 64, 64, device=inner.scale.device)).shape[-2:]
        if pad is not None and not 0 < 2 * pad < min(height, width):
            raise CrossguardError(
                f"a frame of {pad} pixels leaves nothing of an image of {height} x {width}; give 1 to "
                f"{(min(height, width) - 1) // 2}, or None for all pixels"
            )
        self.clip = clip
        self.settings = {"height": height, "width": width, "pad": pad, "clip": clip, "normalized": normalized}
        self.pixels = nn.Parameter(start * _noise(self, seed, (3, height, width)))
        unit = torch.tensor(_unit(inner) if normalized else (1.0, 1.0, 1.0), device=inner.scale.device)
        factor = unit[:, None, None].repeat(1, height, width)
        if pad is not None:
            factor[:, pad:-pad, pad:-pad] = 0.0
        self.register_buffer("factor", factor, persistent=False)

    @classmethod
    def remade(cls, inner: DualEncoder, settings: dict[str, Any]) -> PromptedEncoder:
        _check(settings, _Framing)
        found = cls(inner, settings["pad"], settings["clip"], settings["normalized"])
        _check_size(found, settings)
        return found

    def moves(self) -> tuple[str, ...]:
        return ("image",)

    def fitted(self, images: Images) -> Resized:
        images = self.inner.fitted(images) + self.pixels * self.factor
        return images.clamp(0.0, 1.0) if self.clip else images


class _ClassFraming(_Framing):
    names: list[str]


class ClassFramedEncoder(PromptedEncoder):
    """Learned pixels for each class (C-AVP, Chen et al. 2023). An image is seen with those of every class, and its
    logit for a class is the logarithm of the probability that it has with the pixels of this class.

    Its embedding of an image is one for each class, side by side, so an image costs as many forwards as there are
    classes. That of a text has as many copies side by side, of which those of its own class are twice as long: so it is
    known in `logits` which pixels a class has, whatever the order of the classes. A text has those of the longest class
    name in it, as in `Place`; for a text that names no class, the logarithms with all pixels are averaged.

    Args:
        names: of the classes.
        pad, clip: as those of `FramedEncoder`.
    """

    kind = "class frames"
    factor: Tensor

    def __init__(self, inner: DualEncoder, names: tuple[str, ...], pad: int | None, clip: bool) -> None:
        super().__init__(inner)
        frame = FramedEncoder(inner, pad, clip)
        self.clip, self.place = clip, Place("", None, names)
        self.settings = {**frame.settings, "names": list(names)}
        self.pixels = nn.Parameter(0.0 * _noise(self, 0, (len(names), *frame.pixels.shape)))
        self.register_buffer("factor", frame.factor, persistent=False)

    @classmethod
    def remade(cls, inner: DualEncoder, settings: dict[str, Any]) -> PromptedEncoder:
        _check(settings, _ClassFraming)
        found = cls(inner, tuple(settings["names"]), settings["pad"], settings["clip"])
        _check_size(found, settings)
        return found

    def moves(self) -> tuple[str, ...]:
        return ("image",)

    @property
    def forwards(self) -> int:
        return len(self.place.names) * self.inner.forwards

    def encode_image(self, images: Images) -> Embeddings:
        return self.encode_fitted(self.fitted(images))

    def encode_fitted(self, pixels: Resized) -> Embeddings:
        seen = pixels[:, None] + self.pixels * self.factor
        seen = seen.clamp(0.0, 1.0) if self.clip else seen
        return self.inner.encode_fitted(seen.flatten(0, 1)).unflatten(0, (len(pixels), -1)).flatten(1)

    def patches_fitted(self, pixels: Resized, behind: int = 0) -> tuple[Embeddings, PatchTokens]:
        del pixels, behind
        raise CrossguardError(
            "this model has learned pixels for each class, and so no patch tokens of an image alone; give a loss "
            "without them"
        )

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        found, count = self.inner.encode_text(texts), len(self.place.names)
        own = torch.tensor(self.place.lists(texts), device=found.device)
        return seen_with(found.repeat(1, count), count, own)

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        count = len(self.place.names)
        views, copies = images.unflatten(1, (count, -1)), texts.unflatten(1, (count, -1))
        each = [self.inner.logits(views[:, number], copies[:, number]) for number in range(count)]
        known = torch.stack(each, 1).log_softmax(2)  # (images, pixels, classes)
        lengths = copies.detach().float().norm(dim=2)
        own = (lengths > 1.5 * lengths.amin(1, keepdim=True)).to(known.dtype)
        shares = torch.where(own.any(1, keepdim=True), own, torch.ones_like(own))
        return (known * (shares / shares.sum(1, keepdim=True)).T).sum(1)

    def splice(self, texts: Sequence[str], words: str, lists: Sequence[int] = ()) -> Splice:
        raise CrossguardError("this model has learned pixels for each class, so its words cannot be tuned beside them")


def seen_with(texts: Tensor, count: int, own: Tensor) -> Tensor:
    """Copies of embeddings of texts side by side, of which those of one class each are twice as long.

    Args:
        count: how many classes there are.
        own: the class of each text; none of the copies is longer where it is `count`.
    """
    copies = F.normalize(texts.unflatten(1, (count, -1)).float(), dim=2)
    longer = F.one_hot(own, count + 1)[:, :count].to(copies.dtype)
    return (copies * (1.0 + longer)[..., None]).flatten(1)


# Tokens of images


class _Tokens(TypedDict):
    tokens: int
    depth: int


class TokenEncoder(PromptedEncoder):
    """Learned tokens that the image tower reads behind those of every image; before each of the first `depth` layers
    they are new ones (visual prompt tuning, Jia et al. 2022).

    Args:
        depth: 1 for tokens before the first layer alone (shallow); all layers, if None.
        start: their standard deviation before they are learned.
        seed: of it.
    """

    kind = "image tokens"

    def __init__(self, inner: DualEncoder, tokens: int, depth: int | None, start: float = _STD, seed: int = 0) -> None:
        super().__init__(inner)
        tower = ImageTower.of(inner.stock, "this prompt")
        depth = len(tower.blocks) if depth is None else depth
        _check_tokens(tokens)
        _check_depth(depth, len(tower.blocks), "image")
        self.settings = {"tokens": tokens, "depth": depth}
        self.vectors = nn.Parameter(start * _noise(self, seed, (depth, tokens, tower.width)))
        _check_seeing(self)

    @classmethod
    def remade(cls, inner: DualEncoder, settings: dict[str, Any]) -> PromptedEncoder:
        _check(settings, _Tokens)
        return cls(inner, settings["tokens"], settings["depth"])

    def moves(self) -> tuple[str, ...]:
        return ("image",)

    def encode_fitted(self, pixels: Resized) -> Embeddings:
        with _given(self.inner, self.vectors):
            return self.inner.encode_fitted(pixels)

    def patches_fitted(self, pixels: Resized, behind: int = 0) -> tuple[Embeddings, PatchTokens]:
        with _given(self.inner, self.vectors):
            return self.inner.patches_fitted(pixels, behind + self.vectors.shape[1])


# Words of texts


@dataclass(frozen=True)
class Place:
    """Where learned vectors stand in a text, and which ones.

    They take the place of `words`, and in a text without these words they stand in front. With names of classes each
    class has vectors of its own: a text has those of the longest class name in it (whole words, whatever the case); a
    text that names no class, as a text may after an attack, has the mean of all.

    Args:
        words: what the vectors stand for.
        tokens: how many there are; as many as the words have tokens, if None.
        names: of the classes; all texts have the same vectors, if there are none.
    """

    words: str
    tokens: int | None
    names: tuple[str, ...] = ()

    def filler(self, inner: DualEncoder) -> str:
        """What stands in a text where the vectors go: the words themselves, or some of as many tokens."""
        if self.tokens is None:
            return self.words
        _check_tokens(self.tokens)
        for word in _FILLERS:
            found = " ".join([word] * self.tokens)
            self._check_length(inner, found, self.tokens)
            if len(inner.splice([found], found).start) == self.tokens:
                return found
        raise CrossguardError(
            f"the tokenizer of this model has no word that stands for one of {self.tokens} learned tokens; give the "
            "words that they replace, and tokens=None"
        )

    def start(self, inner: DualEncoder) -> Tensor:
        """The vectors that the tower itself has for the filler."""
        filler = self.filler(inner)
        self._check_length(inner, filler, len(filler.split()))
        return inner.splice([filler], filler).start.clone()

    def with_filler(self, texts: Sequence[str], filler: str) -> list[str]:
        """The texts with the filler in place of the words, or in front."""
        if self.tokens is None or not self.words:
            return [text if self.tokens is None else f"{filler} {text}" for text in texts]
        pattern = re.compile(rf"(?<!\w){re.escape(self.words)}(?!\w)", re.IGNORECASE)
        found = [pattern.subn(lambda _: filler, text, count=1) for text in texts]
        return [new if count else f"{filler} {new}" for new, count in found]

    def lists(self, texts: Sequence[str]) -> list[int]:
        """The class that each text names; the number of classes where it names none."""
        numbers = {name.lower(): number for number, name in reversed(list(enumerate(self.names)))}
        longest = sorted(numbers, key=len, reverse=True)
        pattern = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in longest))
        found = (max(pattern.findall(text.lower()), key=len, default="") for text in texts)
        return [numbers.get(name, len(self.names)) for name in found]

    def encode(self, inner: DualEncoder, texts: Sequence[str], filler: str, vectors: Tensor) -> Embeddings:
        """The raw embeddings of the texts with these vectors.

        Args:
            vectors: (lists, layers, tokens, width), one list for each class or a single one.
        """
        if not texts:
            return inner.encode_text(texts)
        if self.names:
            vectors = torch.cat([vectors, vectors.mean(0, keepdim=True)])
            here, lists = torch.unique(torch.tensor(self.lists(texts)), return_inverse=True)
            vectors, numbers = vectors[here.to(vectors.device)], lists.tolist()
        else:
            numbers = list[int]()
        vectors = vectors.transpose(0, 1).flatten(1, 2)
        splice = inner.splice(self.with_filler(texts, filler), filler, numbers)
        splice = splice.begun(vectors[0], vectors[1:] if len(vectors) > 1 else None)
        return splice(splice.start)

    def _check_length(self, inner: DualEncoder, filler: str, tokens: int) -> None:
        if inner.cut([filler]):
            raise CrossguardError(
                f"a context of {tokens} {'words' if self.tokens is None else 'tokens'} is longer than the text tower "
                "reads; give fewer"
            )


class _Context(TypedDict):
    words: str
    tokens: int | None
    depth: int
    names: list[str]


class ContextEncoder(PromptedEncoder):
    """Learned vectors in place of words of every text (CoOp, Zhou et al. 2022), for all classes or for each; before
    each of the first `depth` layers of the text tower they are new ones.

    Args:
        place: where they stand; without a number of tokens they begin as the words themselves, and otherwise at random.
        depth: 1 for vectors before the first layer alone.
        seed: of vectors that begin at random. Those of deeper layers do.
    """

    kind = "context"

    def __init__(self, inner: DualEncoder, place: Place, depth: int, seed: int = 0) -> None:
        super().__init__(inner)
        start, self.filler = place.start(inner), place.filler(inner)
        _check_text_depth(inner, depth)
        self.place = place
        self.settings = {"words": place.words, "tokens": place.tokens, "depth": depth, "names": list(place.names)}
        vectors = _STD * _noise(self, seed, (max(1, len(place.names)), depth, *start.shape))
        if place.tokens is None:
            vectors[:, 0] = start
        self.vectors = nn.Parameter(vectors)

    @classmethod
    def remade(cls, inner: DualEncoder, settings: dict[str, Any]) -> PromptedEncoder:
        _check(settings, _Context)
        place = Place(settings["words"], settings["tokens"], tuple(settings["names"]))
        return cls(inner, place, settings["depth"])

    def moves(self) -> tuple[str, ...]:
        return ("text",)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return self.place.encode(self.inner, texts, self.filler, self.vectors)

    def splice(self, texts: Sequence[str], words: str, lists: Sequence[int] = ()) -> Splice:
        """The words that are learned can be tuned further, from where they are."""
        if words not in (self.place.words, self.filler) or self.place.names or lists:
            raise CrossguardError(
                f"this model has learned {'what each class' if self.place.names else self.place.words!r} has in place "
                f"of words, so {words!r} cannot be tuned; tune the model without its prompts"
            )
        splice = self.inner.splice(self.place.with_filler(texts, self.filler), self.filler)
        own = self.vectors[0].detach()
        return splice.begun(own[0], own[1:] if len(own) > 1 else None)

    def cut(self, texts: Sequence[str]) -> int:
        return _cut(self.inner, texts, self.place, self.filler)


# Both sides


class _Coupled(TypedDict):
    words: str
    tokens: int | None
    depth: int


class CoupledEncoder(PromptedEncoder):
    """Learned tokens of both towers, tied to each other by linear maps: before the first layer those of images follow
    from the words of texts, as in MaPLe (Khattak et al. 2023), and before the others those of texts follow from those
    of images, as in the released code of FAP (Zhou et al. 2024).

    Args:
        place: where the vectors stand in a text; all texts have the same.
        depth: before how many layers of each tower tokens are learned.
        seed: of tokens and maps before they are learned.
    """

    kind = "coupled tokens"

    def __init__(self, inner: DualEncoder, place: Place, depth: int, seed: int = 0) -> None:
        super().__init__(inner)
        tower = ImageTower.of(inner.stock, "this prompt")
        _check_depth(depth, len(tower.blocks), "image")
        _check_text_depth(inner, depth)
        start, self.filler = place.start(inner), place.filler(inner)
        self.place = place
        self.settings = {"words": place.words, "tokens": place.tokens, "depth": depth}
        count, width = start.shape
        random = place.tokens is not None
        self.context = nn.Parameter(_STD * _noise(self, seed, (count, width)) if random else start)
        self.vectors = nn.Parameter(_STD * _noise(self, seed + 1, (depth - 1, count, tower.width)))
        self.to_image = nn.Parameter(_spread(self, seed + 2, (tower.width, width), width))
        self.to_image_bias = nn.Parameter(_spread(self, seed + 3, (tower.width,), width))
        self.to_text = nn.Parameter(_spread(self, seed + 4, (depth - 1, width, tower.width), tower.width))
        self.to_text_bias = nn.Parameter(_spread(self, seed + 5, (depth - 1, width), tower.width))
        _check_seeing(self)

    @classmethod
    def remade(cls, inner: DualEncoder, settings: dict[str, Any]) -> PromptedEncoder:
        _check(settings, _Coupled)
        return cls(inner, Place(settings["words"], settings["tokens"]), settings["depth"])

    def moves(self) -> tuple[str, ...]:
        return ("image", "text")

    def encode_fitted(self, pixels: Resized) -> Embeddings:
        with _given(self.inner, self._of_images()):
            return self.inner.encode_fitted(pixels)

    def patches_fitted(self, pixels: Resized, behind: int = 0) -> tuple[Embeddings, PatchTokens]:
        vectors = self._of_images()
        with _given(self.inner, vectors):
            return self.inner.patches_fitted(pixels, behind + vectors.shape[1])

    def _of_images(self) -> Tensor:
        """The tokens of images, of which the first follow from the words."""
        return torch.cat([(self.context @ self.to_image.T + self.to_image_bias)[None], self.vectors])

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        deeper = self.vectors @ self.to_text.mT + self.to_text_bias[:, None]
        return self.place.encode(self.inner, texts, self.filler, torch.cat([self.context[None], deeper])[None])

    def splice(self, texts: Sequence[str], words: str, lists: Sequence[int] = ()) -> Splice:
        raise CrossguardError(
            "this model has learned tokens of both towers that hang together, so words cannot be tuned alone; tune the "
            "model without its prompts"
        )

    def cut(self, texts: Sequence[str]) -> int:
        return _cut(self.inner, texts, self.place, self.filler)


# The word


class _Entry(TypedDict):
    kind: str
    settings: dict[str, Any]


class _Base(TypedDict, total=False):
    base: str  # the fingerprint of its weights, where it is elsewhere


class _Record(_Base):
    prompts: list[_Entry]


@dataclass(frozen=True)
class PromptTuned(Checkpoint):
    """A model with learned prompts: words of texts, tokens of images, a frame of pixels. The folder holds the prompts
    alone, and the model that they were learned for is the base. Of that they know the weights by a hash, so that a base
    that was trained once more is refused.

    It is a model like any other: attacks see through the prompts, and defenses stand around it. To attack the base
    instead, without knowing of the prompts, give it as the surrogate.
    """

    base: VisionLanguageModel
    folder: str

    def __post_init__(self) -> None:
        checkpoint(self.base, "PromptTuned")

    def content(self) -> str:
        folder = Path(located(self.folder))
        files = [folder / _RECORD, folder / _NUMBERS]
        return digest(files) if all(file.is_file() for file in files) else ""

    def saved(self, folder: Path) -> Checkpoint:
        """The base and its prompts were trained together, so that both are there, with those inside of the base."""
        base = checkpoint(self.base, "PromptTuned").saved(folder) or HuggingFace(str(folder))
        return base if isinstance(base, PromptTuned) else PromptTuned(base, str(folder))

    def load(self) -> DualEncoder:
        folder = Path(located(self.folder))
        if not (folder / _NUMBERS).is_file():
            raise CrossguardError(f"there is no {_NUMBERS} in {self.folder!r}; {_FOLDER}")
        told = read_json(folder / _RECORD, _Record, _FOLDER, SETTINGS)
        network, base = checkpoint(self.base, "PromptTuned").load(), show(self.base, short=True)
        learned = told.get("base")
        now = learned and fingerprint(network)
        for entry in told["prompts"]:
            if entry["kind"] not in _KINDS:
                kind = shortly(entry["kind"])
                raise CrossguardError(f"{folder / _RECORD} is broken: no prompts are of the kind {kind}; {_FOLDER}")
            try:
                network = _KINDS[entry["kind"]].remade(network, entry["settings"])
            except CrossguardError as error:
                raise CrossguardError(f"the prompts of {self.folder!r} do not fit {base}: {error}") from error
        _fill(prompts(network)[-len(told["prompts"]) :] if told["prompts"] else [], folder / _NUMBERS, base)
        if learned != now:
            raise CrossguardError(
                f"the prompts of {self.folder!r} were learned for other weights ({learned}) than {base} has now "
                f"({now}); give the base that they were learned for, or train them again"
            )
        check_finite(network, str(folder))
        return network.eval()


_KINDS: dict[str, type[PromptedEncoder]] = {
    kind.kind: kind for kind in (FramedEncoder, ClassFramedEncoder, TokenEncoder, ContextEncoder, CoupledEncoder)
}


def _fill(listed: Sequence[PromptedEncoder], path: Path, base: str) -> None:
    """Reads the numbers of these prompts."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CrossguardError(f"{path} cannot be read as safetensors; {_FOLDER}") from error
    wanted = {f"{n}.{name}": one for n, p in enumerate(listed) for name, one in p.own().items()}
    if found.keys() != wanted.keys():
        raise CrossguardError(f"{path} holds the numbers of other prompts than {_RECORD} beside it says; {_FOLDER}")
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise CrossguardError(
                f"{path} holds prompts of shape {tuple(found[name].shape)}, and for {base} they have shape "
                f"{tuple(parameter.shape)}; give the base that they were learned for"
            )
        with torch.no_grad():
            parameter.copy_(found[name])


def _check(settings: dict[str, Any], kind: Any) -> None:
    wrong = misfit(settings, kind)
    if wrong:
        raise CrossguardError(f"their {_RECORD} is broken: {wrong}")


def _unit(network: DualEncoder) -> tuple[float, float, float]:
    """How many pixels of [0, 1] a unit of normalized pixels is, by channel."""
    while isinstance(network, PromptedEncoder):
        network = network.inner
    if not isinstance(network, TransformersEncoder):
        raise CrossguardError(
            f"a {type(network).__name__} does not say how it normalizes pixels; learn them in their own unit"
        )
    return network.preprocess.std


def _check_size(network: PromptedEncoder, settings: dict[str, Any]) -> None:
    """Raises where pixels were learned for images of another size."""
    own = network.settings
    if (own["height"], own["width"]) != (settings["height"], settings["width"]):
        raise CrossguardError(
            f"it was learned for images of {settings['height']} x {settings['width']} pixels, and this base reads "
            f"{own['height']} x {own['width']}"
        )


def _check_tokens(tokens: int) -> None:
    if not 1 <= tokens <= _MOST_TOKENS:
        raise CrossguardError(f"{tokens} learned tokens are not possible; give 1 to {_MOST_TOKENS}")


def _check_depth(depth: int, layers: int, tower: str) -> None:
    if not 1 <= depth <= layers:
        raise CrossguardError(f"tokens before {depth} layers are not possible: the {tower} tower has {layers}")


def _check_text_depth(inner: DualEncoder, depth: int) -> None:
    layers = blocks(getattr(inner.stock, "text_model", None))
    if depth > 1:
        _check_depth(depth, 1 if layers is None else len(layers), "text")


def _check_seeing(network: PromptedEncoder) -> None:
    """Raises where the image tower cannot take the tokens: some count what they read."""
    try:
        with torch.no_grad():
            network.encode_image(torch.zeros(1, 3, 64, 64, device=network.scale.device))
    except CrossguardError:
        raise
    except Exception as error:  # towers refuse more tokens in many ways
        raise CrossguardError("the image tower of this model reads no more tokens than its own") from error


def _given(inner: DualEncoder, vectors: Tensor) -> AbstractContextManager[object]:
    """Inside, the image tower has these tokens, one list for each layer."""
    tower = ImageTower.of(inner.stock, "this prompt")
    return tower.given(vectors[:1], vectors[1:] if len(vectors) > 1 else None)


def _cut(inner: DualEncoder, texts: Sequence[str], place: Place, filler: str) -> int:
    if place.tokens is not None:
        texts = place.with_filler(texts, filler)
    return inner.cut(texts)


def _noise(network: PromptedEncoder, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that follow from the seed and the kind of the prompt."""
    return normal(_key(network, seed, shape), shape)[0].to(network.inner.scale.device)


def _spread(network: PromptedEncoder, seed: int, shape: tuple[int, ...], inputs: int) -> Tensor:
    """Uniform numbers up to one over the square root of what goes in, as torch begins a linear map."""
    found = 2.0 * uniform(_key(network, seed, shape), shape)[0] - 1.0
    return (found * inputs**-0.5).to(network.inner.scale.device)


def _key(network: PromptedEncoder, seed: int, shape: tuple[int, ...]) -> Seeds:
    if math.prod(shape) > _MOST_NUMBERS:
        raise CrossguardError(
            f"prompts of {math.prod(shape):,} numbers are too many; {_MOST_NUMBERS:,} are the most, so give fewer "
            "tokens, layers or classes"
        )
    return torch.tensor([derive(network.kind, seed)])
