"""Encoded images become pixels: decoding, resizing, a bounded memory of what was decoded, and the part of a
dataset that is the same whatever the images were stored in."""

from __future__ import annotations

import io
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from crossguard.data import Dataset
from crossguard.errors import CrossguardError
from crossguard.shapes import Labels

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # never EPS and the like, which run other programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ROTATED = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})  # where an orientation may be noted

LARGEST_SIDE = 8192  # of a resized image: some 200 MB of pixels

Held = TypeVar("Held")


class Memory(Generic[Held]):
    """What was used last, as long as it fits into `limit` bytes; shared by all threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._held: OrderedDict[Hashable, tuple[Held, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Held], size: Callable[[Held], int]) -> Held:
        """What is held under `key`, made (and measured in bytes) when it is not there."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
        made = make()
        cost = size(made)
        with self._lock:
            if key not in self._held and cost <= self.limit:
                self._held[key] = (made, cost)
                self.size += cost
                while self.size > self.limit:
                    self.size -= self._held.popitem(last=False)[1][1]
        return made

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._held.clear()
            self.size = 0


DECODED: Memory[Tensor] = Memory(limit=1_500_000_000)


def decode(data: bytes, size: int | None = None) -> Tensor:
    """The pixels of an encoded image as uint8 RGB, shape (3, h, w): upright, the first frame, transparency on
    white.

    Raises whatever Pillow raises when the bytes are no whole image.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened) if ROTATED & opened.info.keys() else opened
        image = fitted(rgb(image), size)
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: grey repeated, a palette looked up, 16 bits cut to 8, transparency put on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ValueError(f"pixels of mode {image.mode!r} have no agreed white")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def fitted(image: Image.Image, size: int | None) -> Image.Image:
    """The short side brought to `size` (bicubic) and the middle square cut out, as CLIP's own preprocessing
    does."""
    if size is None or image.size == (size, size):
        return image
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def check_size(size: int | None) -> None:
    """Raises where no image of this side can be made, or none that memory would hold."""
    if size is not None and not 1 <= size <= LARGEST_SIDE:
        raise CrossguardError(
            f"an image size of {size} pixels is not possible; give a size from 1 to {LARGEST_SIDE}, or None"
        )


@dataclass(frozen=True, eq=False)
class Opened:
    """What a source turned out to hold when it was opened; one for all equal words of a process."""

    ids: Sequence[str]
    labels: Labels
    names: tuple[str, ...]
    read: Callable[[int], bytes]
    where: Callable[[int], str]
    captions: Sequence[tuple[str, ...]] = ()
    templates: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what a report should say of the data
    fingerprint: str = ""  # of the files read: another one when they have changed

    def pixels(self, index: int, size: int | None = None) -> Tensor:
        """The decoded sample, not remembered."""
        try:
            return decode(self.read(index), size)
        except CrossguardError:
            raise
        except Exception as error:  # what a decoder raises on broken bytes is not bounded by any documentation
            reason = "it is cut short or damaged" if isinstance(error, OSError | EOFError) else str(error)
            if isinstance(error, Image.UnidentifiedImageError):
                reason = "it is no image in a format known here: JPEG, PNG, WebP, BMP, GIF, TIFF"
            raise CrossguardError(
                f"{self.where(index)} cannot be read ({reason}); repair or remove it, or leave such "
                "images out with skip_broken=True (--skip-broken)"
            ) from error

    def whole(self, skip_broken: bool) -> Opened:
        """This source, with what is broken left out where that was asked for: every image is decoded once to
        know it. Otherwise only the first one is tried, which tells images from other bytes."""
        if not skip_broken:
            self.pixels(0)
            return self
        keep: list[int] = []
        skipped: list[str] = []
        for index in range(len(self.ids)):
            try:
                self.pixels(index)
                keep.append(index)
            except CrossguardError:
                skipped.append(self.where(index))
        if not keep:
            raise CrossguardError(
                f"none of the {len(self.ids)} images can be read, the first being {skipped[0]}; "
                "check what the path names"
            )
        return replace(
            self,
            ids=tuple(self.ids[index] for index in keep),
            labels=self.labels[keep],
            read=lambda index: self.read(keep[index]),
            where=lambda index: self.where(keep[index]),
            captions=tuple(self.captions[index] for index in keep) if self.captions else (),
            skipped=tuple(skipped),
        )


def given(word: Any) -> dict[str, Any]:
    """The fields of a word alone: a copy in another process opens its source itself."""
    return {item.name: word.__dict__[item.name] for item in fields(word)}


class Decoded(Dataset):
    """A dataset of encoded images, opened on first use; decoded images are remembered, `DECODED.limit` bytes
    a process.

    A word keeps what it has opened; a new word sees a file that has changed since.
    """

    size: int | None
    skip_broken: bool

    @abstractmethod
    def _open(self) -> Opened: ...

    @cached_property
    def opened(self) -> Opened:
        """The source behind the word."""
        check_size(self.size)
        return self._open()

    def __getstate__(self) -> dict[str, Any]:
        return given(self)

    def __len__(self) -> int:
        return len(self.opened.ids)

    @property
    def names(self) -> tuple[str, ...]:
        return self.opened.names

    @property
    def skipped(self) -> int:
        """How many broken images were left out; `opened.skipped` names them."""
        return len(self.opened.skipped)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.opened.notes

    def id(self, index: int) -> str:
        return self.opened.ids[index]

    def image(self, index: int) -> Tensor:
        opened, size = self.opened, self.size
        index = range(len(opened.ids))[index]
        return DECODED.get(
            (opened, index, size), lambda: opened.pixels(index, size), lambda image: image.nbytes
        ).clone()

    def labels(self) -> Labels:
        return self.opened.labels

    def captions(self, index: int) -> tuple[str, ...]:
        return self.opened.captions[index] if self.opened.captions else ()


def together(rows: int, images: int, what: str) -> tuple[str, ...]:
    """The note of a source that has put the captions of equal images together."""
    if rows == images:
        return ()
    return (
        f"{rows} {what} of the data have {images} images: those with equal images are one, with the captions of all",
    )
