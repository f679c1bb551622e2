"""Encoded images become pixels: decoding, resizing, a bounded memory of what was decoded, and the part of a dataset
that is the same whatever the images were stored in."""

from __future__ import annotations

import hashlib
import io
import threading
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import torch
from cachetools import LRUCache
from PIL import Image, ImageOps
from torch import Tensor

from crossguard.data import Dataset
from crossguard.device import hand_back_memory
from crossguard.errors import CrossguardError
from crossguard.files import reason
from crossguard.limits import ENCODED, PIXELS
from crossguard.printing import one_line
from crossguard.shapes import Labels
from crossguard.threads import ahead

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # never EPS and the like, which run other programs
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ROTATED = frozenset({"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})  # where an orientation may be noted

LARGEST_SIDE = 8192  # of a resized image: some 200 MB of pixels
BAND = 2**22  # pixels that are put on white at a time
LARGE = 2**24  # pixels of an image that no other thread decodes another large one beside

Held = TypeVar("Held")


class Memory(Generic[Held]):
    """What was used last, as long as it fits into `limit` bytes; shared by all threads.

    Args:
        size: of a thing that is held, in bytes.
    """

    def __init__(self, limit: int, size: Callable[[Held], int]) -> None:
        self._held: LRUCache[Hashable, Held] = LRUCache(limit, size)
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """How many bytes may be held."""
        return int(self._held.maxsize)

    @limit.setter
    def limit(self, limit: int) -> None:
        """Forgets everything as well."""
        with self._lock:
            self._held = LRUCache(limit, self._held.getsizeof)

    @property
    def size(self) -> int:
        """How many bytes are held."""
        return int(self._held.currsize)

    def get(self, key: Hashable, make: Callable[[], Held]) -> Held:
        """What is held under `key`, made when it is not there: once, however many threads ask for it."""
        with self._lock:
            if key in self._held:
                return self._held[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._held:  # made by another thread in the meantime
                    return self._held[key]
            try:
                made = make()
            finally:
                with self._lock:
                    self._making.pop(key, None)
            with self._lock, suppress(ValueError):  # larger than all that may be held
                self._held[key] = made
        return made

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._held.clear()


DECODED: Memory[np.ndarray] = Memory(limit=1_500_000_000, size=lambda pixels: pixels.nbytes)


def decode(data: bytes, size: int | None = None, what: str = "the image", give: str = "repair it") -> Tensor:
    """The pixels of an encoded image as uint8 RGB, shape (3, h, w): upright, the first frame, transparency on white.

    Args:
        size: See `fitted`.
        what: Where the image comes from, for the error.
        give: What to do where it is broken, for the error.

    Raises:
        CrossguardError: The bytes are no whole image, or one of too many pixels.
    """

    def made(image: Image.Image) -> Tensor:
        image = fitted(image, size)
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    return _read(data, made, what, give)


def _read(data: bytes, made: Callable[[Image.Image], Held], what: str, give: str) -> Held:
    """What is made of an encoded image, once it is upright and in RGB; see `decode`."""
    ENCODED.check(len(data), what)
    try:
        with _opened(data) as opened:
            count = opened.width * opened.height
            PIXELS.check(count, what)
            if count <= LARGE:
                return made(_upright(opened))
            with _one_at_a_time:
                found = made(_upright(opened))
                opened.close()
                hand_back_memory()
                return found
    except CrossguardError:
        raise
    except Exception as error:  # what a decoder raises on broken bytes is not bounded by any documentation
        reason = "it is cut short or damaged" if isinstance(error, OSError | EOFError) else one_line(str(error))
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "it is no image in a format known here: JPEG, PNG, WebP, BMP, GIF, TIFF"
        raise CrossguardError(f"{what} cannot be read ({reason}); {give}") from error


def _upright(opened: Image.Image) -> Image.Image:
    opened.load()
    return rgb(ImageOps.exif_transpose(opened) if ROTATED & opened.info.keys() else opened)


def _opened(data: bytes) -> Image.Image:
    """The image, of which the header alone is read. Pillow's own limit on pixels, which is none of a dataset's but of
    the whole process, and warns on standard error, does not count here: ours is checked before the pixels are read."""
    with _header:
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = usual


_header, _one_at_a_time = threading.Lock(), threading.Lock()


DIGEST = 16  # bytes


def digest(image: bytes) -> bytes:
    """What tells an encoded image from all others: equal for copies, byte for byte."""
    return hashlib.blake2b(image, digest_size=DIGEST).digest()


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: grey repeated, a palette looked up, 16 bits cut to 8, transparency put on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ValueError(f"pixels of mode {image.mode!r} have no agreed white")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        opaque = Image.new("RGB", image.size)
        height = max(1, BAND // image.width)
        for top in range(0, image.height, height):  # each step makes a copy, of a large image as well
            band = image.crop((0, top, image.width, min(top + height, image.height))).convert("RGBA")
            white = Image.new("RGBA", band.size, "white")
            opaque.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
        return opaque
    return image.convert("RGB")


def fitted(image: Image.Image, size: int | None) -> Image.Image:
    """The short side brought to `size` (bicubic) and the middle square cut out, as CLIP's own preprocessing does."""
    if size is None or image.size == (size, size):
        return image
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    PIXELS.check(width * height, f"an image of {image.width} by {image.height} pixels, brought to {size}, ")
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
    """What a source turned out to hold when it was opened; one for all equal words of a process.

    Args:
        ids: of the samples.
        labels: of the samples; -1 without a class.
        names: of the classes.
        read: the encoded image of a sample; called by several threads at once.
        where: names the image of a sample to its owner.
        captions: of the samples; empty where there are none at all.
        templates: prompt templates that come with the data.
        skipped: where the broken images are that were left out.
        notes: what a report should say of the data.
        fingerprint: of the files read: another one when they have changed.
    """

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
        return decode(*self._encoded(index, size))

    def check(self, index: int) -> None:
        """Raises where the image of a sample cannot be decoded; takes less memory than its pixels do."""
        data, _, what, give = self._encoded(index)
        _read(data, lambda image: None, what, give)

    def _encoded(self, index: int, size: int | None = None) -> tuple[bytes, int | None, str, str]:
        """What `decode` takes."""
        give = "repair or remove it, or leave such images out with skip_broken=True (--skip-broken)"
        try:
            data = self.read(index)
        except CrossguardError:
            raise
        except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
            told = reason(error) if isinstance(error, OSError) else str(error)
            raise CrossguardError(f"{self.where(index)} cannot be read ({told}); {give}") from error
        return data, size, self.where(index), give

    def whole(self, skip_broken: bool) -> Opened:
        """This source, with what is broken left out where that was asked for: every image is decoded once to know it.
        Otherwise only the first one is tried, which tells images from other bytes."""
        if not skip_broken:
            self.check(0)
            return self
        tried = list(ahead(self._is_whole, range(len(self.ids)), 256))
        keep = [index for index, whole in enumerate(tried) if whole]
        skipped = [self.where(index) for index, whole in enumerate(tried) if not whole]
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

    def _is_whole(self, index: int) -> bool:
        try:
            self.check(index)
        except CrossguardError:
            return False
        return True


class Decoded(Dataset):
    """A dataset of encoded images; decoded ones are remembered, `DECODED.limit` bytes a process."""

    size: int | None
    skip_broken: bool

    @abstractmethod
    def _open(self) -> Opened: ...

    @cached_property
    def opened(self) -> Opened:
        """The source behind the word."""
        check_size(self.size)
        return self._open()

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

    @property
    def fingerprint(self) -> str:
        return self.opened.fingerprint

    def id(self, index: int) -> str:
        return self.opened.ids[index]

    def image(self, index: int) -> Tensor:
        opened, size = self.opened, self.size
        index = range(len(opened.ids))[index]
        held = DECODED.get((opened, index, size), lambda: opened.pixels(index, size).numpy())
        return torch.from_numpy(held.copy())  # torch would start threads of its own to copy it, in each that decodes

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
