"""Tar shards in the layout of CLIP_benchmark, in which most zero-shot and retrieval benchmarks can be had."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from crossguard import reading
from crossguard.datasets import index, tar
from crossguard.datasets.names import check_order, class_list, spoken
from crossguard.datasets.packed import Lazy, Packed
from crossguard.datasets.pixels import SUFFIXES, Decoded, Opened, digest, together
from crossguard.errors import CrossguardError
from crossguard.limits import ENCODED, SAMPLES, TABLE, TEXT, shortly, whole

WORTH_KEEPING = 1000  # samples: below that, shards are looked through faster than anybody notices

ENCODING = "write it in UTF-8"


@dataclass(frozen=True)
class Shards(Decoded):
    """A local copy of a data set in the webdataset layout of CLIP_benchmark.

    That is `classnames.txt`, `zeroshot_classification_templates.txt` with `{c}` for the class name, and
    `{split}/*.tar` with an image and a `.cls` (for retrieval a `.txt` of captions) a sample. Samples of a retrieval
    that have the same image, byte for byte, are one sample with the captions of all.

    The shards are looked through once and then read at the offset of each image; nothing is unpacked. Where everything
    is, is remembered in the folder CROSSGUARD_CACHE (by default in the user's cache folder) until a shard changes. A
    sample's id is its shard and its name in it. The templates are those of the copy.

    Args:
        path: The folder that holds the split folders.
        split: The split folder, usually `train` or `test`.
        classes: Class names in label order instead of those in `classnames.txt`; or the path of a text file with one
            a line.
        size: Resizes the short side and cuts out the middle square; None keeps the images as they are.
        skip_broken: Leaves unreadable images out and counts them; every image is decoded at opening to know.
    """

    path: str
    split: str = "test"
    classes: tuple[str, ...] | str = ()
    size: int | None = None
    skip_broken: bool = False

    @property
    def templates(self) -> tuple[str, ...]:
        return self.opened.templates or super().templates

    def _open(self) -> Opened:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise CrossguardError(
                f"the folder {self.path!r} does not exist; give a local copy of a CLIP_benchmark webdataset"
            )
        folder = root / self.split
        if not folder.is_dir():
            splits = sorted(place.name for place in root.iterdir() if any(place.glob("*.tar")))
            there = (
                f"there are {', '.join(splits)}" if splits else "there is no split folder with .tar files in it at all"
            )
            raise CrossguardError(f"{self.path!r} has no split {self.split!r}; {there}")
        shards = [(file, file.stat()) for file in _shards(folder)]
        read = tuple((str(file), noted.st_size, noted.st_mtime_ns) for file, noted in shards)
        # The texts beside the shards are small: their content says more than their dates.
        texts = tuple((name, _lines(root / f"{name}.txt")) for name in TEXTS)
        told = reading.identities(folder, [reading.Found(Path(path).name, size, date) for path, size, date in read])
        return _opened(str(root), read, told, texts, class_list(self.classes), self.skip_broken)


TEXTS = ("dataset_type", "classnames", "zeroshot_classification_templates")

_Told = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class _Index:
    """Where the samples of a split are: for each the number of its shard and the place, size and name of its image in
    it, and what its `.cls` and `.txt` say (nothing where it has none)."""

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    name: Packed
    label: Packed
    text: Packed

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, for a file."""
        found = {"shard": self.shard, "offset": self.offset, "size": self.size}
        for name, packed in (("name", self.name), ("label", self.label), ("text", self.text)):
            found |= {f"{name}.held": packed.held, f"{name}.ends": packed.ends}
        return found

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray]) -> _Index:
        """What `arrays` made an index into."""
        name, label, text = (Packed(arrays[f"{of}.held"], arrays[f"{of}.ends"]) for of in ("name", "label", "text"))
        return _Index(arrays["shard"], arrays["offset"], arrays["size"], name, label, text)

    @staticmethod
    def joined(parts: Sequence[_Index]) -> _Index:
        """One index of several shards."""
        return _Index(
            shard=np.concatenate([part.shard for part in parts]),
            offset=np.concatenate([part.offset for part in parts]),
            size=np.concatenate([part.size for part in parts]),
            name=Packed.joined([part.name for part in parts]),
            label=Packed.joined([part.label for part in parts]),
            text=Packed.joined([part.text for part in parts]),
        )


@lru_cache(maxsize=16)
def _opened(
    root: str,
    read: tuple[tuple[str, int, int], ...],
    identities: tuple[str, ...],
    texts: _Told,
    classes: tuple[str, ...],
    skip_broken: bool,
) -> Opened:
    told = dict(texts)
    kind = "\n".join(told["dataset_type"]).strip()
    if kind == "multilabel":
        raise CrossguardError(
            f"{root!r} has several labels an image (multilabel), which is not supported; give another set"
        )
    held = _indexed(read, identities)

    def where(sample: int) -> str:
        return f"{held.name[sample].decode()!r} in {read[held.shard[sample]][0]!r}"

    def image(sample: int) -> bytes:
        path, size, date = read[held.shard[sample]]
        with Path(path).open("rb") as file:
            noted = os.fstat(file.fileno())
            if (noted.st_size, noted.st_mtime_ns) != (size, date):  # something else may lie at that place by now
                raise CrossguardError(
                    f"the shard {path!r} has changed since it was looked through; ask again when nobody writes to it"
                )
            file.seek(int(held.offset[sample]))
            return file.read(int(held.size[sample]))

    def named(sample: int) -> str:
        return f"{Path(read[held.shard[sample]][0]).stem}/{held.name[sample].decode().rsplit('.', 1)[0]}"

    names: tuple[str, ...] = ()
    captions: Sequence[tuple[str, ...]] = ()
    rows = np.arange(len(held.size))  # of the samples, the first one of each image
    if kind == "retrieval" or not len(held.label.held):
        _check_captions(held, where)
        first = _same_images(held, image, read, identities)
        rows, counts = np.unique(first, return_counts=True)
        grouped = np.split(np.argsort(first, kind="stable"), np.cumsum(counts)[:-1]) if len(rows) < len(first) else None

        def told_of(place: int) -> tuple[str, ...]:
            alike = rows[place : place + 1] if grouped is None else grouped[place]
            return tuple(caption for row in alike.tolist() for caption in _captions(held.text[row], where(row)))

        captions = Lazy(len(rows), told_of)
        labels = torch.full((len(rows),), -1)  # no class, and no label that could pass for one
    else:
        written = tuple(map(spoken, told["classnames"]))
        if not written and not classes:
            raise CrossguardError(
                f"{root!r} has no classnames.txt with one class name a line; fetch it with the shards"
            )
        check_order(classes, dict(enumerate(written)), f"{str(Path(root) / 'classnames.txt')!r}")
        names = classes or written
        labels = torch.tensor([_label(held.label[row], where, row, len(names)) for row in range(len(rows))])
    templates = [line.replace("{c}", "{}") for line in told["zeroshot_classification_templates"]]
    source = Opened(
        ids=Lazy(
            len(rows),
            lambda place: named(int(rows[place])),
        ),
        labels=labels,
        names=names,
        read=lambda place: image(int(rows[place])),
        where=lambda place: where(int(rows[place])),
        captions=captions,
        templates=tuple(template for template in templates if template.strip()),
        notes=together(len(held.size), len(rows), "samples"),
        fingerprint=reading.fingerprint(
            (*((Path(path).name, one) for (path, _, _), one in zip(read, identities, strict=True)), texts, classes)
        ),
    )
    return source.whole(skip_broken)


def _lines(file: Path) -> tuple[str, ...]:
    """The lines of a small text file; none if it does not exist. Empty lines count unless they come last:
    they are class names that somebody forgot."""
    return tuple(reading.lines(reading.text(file, ENCODING))) if file.is_file() else ()


def _shards(folder: Path) -> list[Path]:
    """The shards of a split in the order of their numbers, all of them or an error: a missing one would
    change every result without a word."""
    listed = (file for file in folder.glob("*.tar") if not file.name.startswith("."))
    shards = sorted(listed, key=lambda file: (len(file.stem) if file.stem.isdigit() else 99, file.stem))
    told = "".join(_lines(folder / "nshards.txt"))
    if told:
        count = whole(told)
        if count is None or count < 0:
            raise CrossguardError(
                f"{str(folder / 'nshards.txt')!r} says {shortly(told)}, not a number of shards; fetch it again"
            )
        there = {shard.stem for shard in shards}
        # One more than there are shards is looked for at most, however many the file promises.
        missing = [number for number in range(min(count, len(shards) + 1)) if str(number) not in there]
        if missing and (len(shards) != count or all(shard.stem.isdigit() for shard in shards)):
            raise CrossguardError(
                f"{str(folder)!r} should hold {count} shards by its nshards.txt and holds {len(shards)}: "
                f"{missing[0]}.tar is missing; fetch it"
            )
        if len(shards) != count:
            raise CrossguardError(
                f"{str(folder)!r} should hold {count} shards by its nshards.txt and holds {len(shards)}; fetch it again"
            )
    if not shards:
        raise CrossguardError(f"{str(folder)!r} holds no .tar file; fetch the shards of this split")
    return shards


def _indexed(read: tuple[tuple[str, int, int], ...], identities: tuple[str, ...]) -> _Index:
    """Where everything is in these shards, from the last time or looked for now."""
    known = index.recall("shards", read, identities)
    if known is not None:
        return _Index.of(known)
    found = _Index.joined([_looked_through(number, Path(path)) for number, (path, _, _) in enumerate(read)])
    SAMPLES.check(len(found.size), f"the split {str(Path(read[0][0]).parent)!r}")
    if not len(found.size):
        raise CrossguardError(f"the shards of {str(Path(read[0][0]).parent)!r} hold no samples; fetch them again")
    if len(found.size) >= WORTH_KEEPING:
        index.remember("shards", read, found.arrays(), identities)
    return found


def _looked_through(number: int, shard: Path) -> _Index:
    """The samples of one shard; what belongs together has one name up to its first dot, as in every webdataset."""
    endings: dict[str, dict[str, tuple[str, int, int]]] = {}
    images: list[tuple[str, int, int]] = []
    labels: list[bytes] = []
    texts: list[bytes] = []
    told = 0
    with shard.open("rb") as file:
        for name, offset, size in tar.members(file, str(shard)):
            folder, _, last = name.rpartition("/")
            stem, _, ending = last.partition(".")
            if not stem or folder.startswith("__MACOSX"):
                continue
            found = endings.setdefault(f"{folder}/{stem}", {})
            ending = f".{ending.lower()}"
            if ending in found:
                raise CrossguardError(
                    f"the shard {str(shard)!r} holds {found[ending][0]!r} and {name!r}, two members of one sample with "
                    "one ending; write each sample under a name of its own"
                )
            found[ending] = (name, offset, size)
            SAMPLES.check(len(endings), f"the shard {str(shard)!r}")
        for sample in endings.values():
            held = [sample[ending] for ending in SUFFIXES if ending in sample]
            if len(held) != 1:
                name = next(iter(sample.values()))[0]
                raise CrossguardError(
                    f"the sample of {name!r} in {str(shard)!r} has {len(held)} images "
                    f"({', '.join(sample)}); it should have one"
                )
            ENCODED.check(held[0][2], f"the image {held[0][0]!r} in {str(shard)!r}")
            images.append(held[0])
            labels.append(_content(file, sample.get(".cls")))
            texts.append(_content(file, sample.get(".txt")))
            told += len(labels[-1]) + len(texts[-1])
            TABLE.check(told, f"the text in {str(shard)!r}")
    return _Index(
        shard=np.full(len(images), number, np.int32),
        offset=np.array([offset for _, offset, _ in images], np.int64),
        size=np.array([size for _, _, size in images], np.int64),
        name=Packed.of(name.encode() for name, _, _ in images),
        label=Packed.of(labels),
        text=Packed.of(texts),
    )


def _content(file: BinaryIO, member: tuple[str, int, int] | None) -> bytes:
    if member is None:
        return b""
    _, offset, size = member
    file.seek(offset)
    return file.read(size)


def _captions(text: bytes, what: str) -> list[str]:
    listed = [line for line in reading.lines(reading.decoded(text, what, ENCODING)) if line]
    for line in listed:
        TEXT.check(len(line), f"a caption of {what}")
    return listed


def _check_captions(held: _Index, where: Callable[[int], str]) -> None:
    """Raises where a sample of a retrieval has no caption, or one in another encoding."""
    most = TEXT.most
    for row, text in enumerate(held.text):
        try:
            told = len(text) <= most and bool(text.decode().strip())
        except UnicodeDecodeError:
            told = False
        if not told and not _captions(text, f"the captions of {where(row)}"):
            raise CrossguardError(f"{where(row)} has neither a label (.cls) nor captions (.txt)")


def _same_images(
    held: _Index,
    image: Callable[[int], bytes],
    read: tuple[tuple[str, int, int], ...],
    identities: tuple[str, ...],
) -> np.ndarray:
    """For each sample the first one whose image is the same, byte for byte."""
    first = index.recall("twins", read, identities)
    if first is None:
        _, of, counts = np.unique(held.size, return_inverse=True, return_counts=True)
        alike = np.flatnonzero(counts[of] > 1)  # images of different sizes differ, unread
        seen: dict[bytes, int] = {}
        first = {"first": np.arange(len(held.size))}
        for row in alike.tolist():
            first["first"][row] = seen.setdefault(digest(image(row)), row)
        if len(alike) >= WORTH_KEEPING:
            index.remember("twins", read, first, identities)
    return first["first"]


def _label(text: bytes, where: Callable[[int], str], row: int, classes: int) -> int:
    told = text.decode("ascii", errors="replace").strip()
    label = whole(told)
    if label is None:
        what = f"the label {shortly(told)}, which is not a whole number" if told else "no label (.cls)"
        raise CrossguardError(f"{where(row)} has {what}; fetch the shard again")
    if not 0 <= label < classes:
        raise CrossguardError(
            f"label {label} of {where(row)} is outside classnames.txt with its {classes} names (0 to {classes - 1})"
        )
    return label
