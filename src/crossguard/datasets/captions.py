"""Images in a folder and a file of their captions, as retrieval benchmarks come."""

from __future__ import annotations

import csv
import io
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from crossguard import reading
from crossguard.datasets.pixels import Decoded, Opened
from crossguard.errors import CrossguardError
from crossguard.limits import shortly, whole
from crossguard.printing import plain

NAMED = ("image", "image_name")  # columns of a table
TOLD = ("caption", "comment")


@dataclass(frozen=True)
class Captions(Decoded):
    """Images of a folder with their captions from a file, in the file's order.

    What the file is, is seen from its content: COCO's JSON of captions; Karpathy's JSON with its splits (COCO,
    Flickr8k, Flickr30k); the lists of ALBEF, Co-Attack and SGA, `[{"image", "caption"}]`; the lines
    `name.jpg#0<tab>caption` of Flickr8k and Flickr30k; a table with the header `image,caption` or
    `image_name| comment_number| comment`.

    A sample's id is the image's name in the file. The image is looked for under this name in the folder, then in
    the subfolder that the file tells (Karpathy's `filepath`), then under the last part of its name.

    Args:
        path: The folder of the images.
        file: The file of the captions.
        split: Keeps the images of this split alone (`restval` is one of its own); `all` takes every image. A file
            of several splits needs it, one without splits has no use for it.
        size: Resizes the short side and cuts out the middle square; None keeps the images as they are.
        skip_broken: Leaves missing and unreadable images out and counts them; every image is decoded at opening
            to know.
    """

    path: str
    file: str
    split: str | None = None
    size: int | None = None
    skip_broken: bool = False

    def _open(self) -> Opened:
        root, file = Path(self.path).expanduser(), Path(self.file).expanduser()
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise CrossguardError(f"the folder {self.path!r} {what}; give the folder that holds the images")
        if not file.is_file():
            what = "is a folder" if file.exists() else "does not exist"
            raise CrossguardError(f"the captions file {self.file!r} {what}; give the JSON or text file of the captions")
        noted = file.stat()
        dated = (noted.st_size, noted.st_mtime_ns, noted.st_ctime_ns)
        listed = _chosen(str(file), _listed(str(file), dated), self.split)
        found = tuple(_found(root, self.file, image) for image in listed)
        told = reading.identities(Path(), [at for at in found if at is not None])
        return _opened(str(root), str(file), listed, found, told, self.skip_broken)


@dataclass(frozen=True)
class _Listed:
    """An image as the captions file has it."""

    name: str
    captions: tuple[str, ...]
    folder: str = ""
    split: str | None = None


def _found(root: Path, file: str, image: _Listed) -> reading.Found | None:
    name = image.name.lstrip("/")
    if "\0" in f"{name}{image.folder}":  # a name that no file can have is that of no file
        return None
    for tried in (name, f"{image.folder.strip('/')}/{name}".lstrip("/"), PurePosixPath(name).name):
        place = reading.inside(root, tried, f"the captions file {file!r}", links=True)
        try:
            noted = place.stat()
        except OSError:
            continue
        if stat.S_ISREG(noted.st_mode):
            return reading.Found(str(place), noted.st_size, noted.st_mtime_ns)
    return None


@lru_cache(maxsize=8)
def _opened(
    root: str,
    file: str,
    listed: tuple[_Listed, ...],
    found: tuple[reading.Found | None, ...],
    told: tuple[str, ...],
    skip_broken: bool,
) -> Opened:
    missing = [image.name for image, at in zip(listed, found, strict=True) if at is None]
    if missing and not skip_broken:
        raise CrossguardError(
            f"{len(missing)} of the {len(listed)} images of {file!r} are not in {root!r}, the first being "
            f"{missing[0]!r}; give the folder that holds them, or leave missing images out with skip_broken=True "
            "(--skip-broken)"
        )
    of: dict[str, str] = {}
    for image, at in zip(listed, found, strict=True):
        if at is not None and of.setdefault(at.path, image.name) != image.name:
            raise CrossguardError(
                f"{of[at.path]!r} and {image.name!r} of {file!r} are both found as {at.path!r} only; "
                "give the folder that their names begin in"
            )
    places = [str(Path(root) / image.name) if at is None else at.path for image, at in zip(listed, found, strict=True)]
    source = Opened(
        ids=tuple(image.name for image in listed),
        labels=torch.full((len(listed),), -1),  # no class, and no label that could pass for one
        names=(),
        read=lambda index: Path(places[index]).read_bytes(),
        where=lambda index: f"the image {places[index]!r}",
        captions=tuple(image.captions for image in listed),
        fingerprint=reading.fingerprint((*listed, *(at is not None for at in found), *told)),
    )
    return source.whole(skip_broken)


def _chosen(file: str, listed: tuple[_Listed, ...], split: str | None) -> tuple[_Listed, ...]:
    """The images of a split, each once and with captions that say something."""
    if not listed:
        raise CrossguardError(f"the captions file {file!r} lists no image; fetch it again")
    splits = [plain(split) for split in sorted({image.split for image in listed if image.split is not None})]
    if split is None and len({image.split for image in listed}) > 1:
        one = "test" if "test" in splits else splits[0]
        raise CrossguardError(
            f"{file!r} holds the splits {', '.join(splits)}, and a number over their mixture misleads; "
            f"name one, as in split={one!r}, or take everything with split='all'"
        )
    if split not in (None, "all", *splits):
        if not splits:
            raise CrossguardError(f"{file!r} has no splits; leave split={split!r} out")
        raise CrossguardError(f"{file!r} has no image of the split {split!r}; its splits are {', '.join(splits)}")
    chosen = tuple(image for image in listed if split in (None, "all", image.split))
    for name, count in Counter(image.name for image in chosen).items():
        if count > 1:
            raise CrossguardError(f"{file!r} lists the image {name!r} {count} times; list it once")
    for image in chosen:
        if not image.captions:
            raise CrossguardError(f"the image {image.name!r} of {file!r} has no caption; write one or remove the image")
        if "" in image.captions:
            raise CrossguardError(f"a caption of the image {image.name!r} of {file!r} is empty; write or remove it")
    return chosen


@lru_cache(maxsize=4)
def _listed(file: str, dated: tuple[int, int, int]) -> tuple[_Listed, ...]:
    """All images of a captions file, in whichever format it is."""
    text = reading.text(Path(file), "give the JSON or text file of the captions in UTF-8")
    listed = _json(file, text) if text.lstrip()[:1] in ("{", "[") else _lines(file, text)
    if listed is None:
        raise CrossguardError(
            f"{file!r} is no captions file known here; give COCO's captions, Karpathy's splits, a JSON list of "
            "'image' and 'caption', lines of 'name.jpg#0<tab>caption', or a table with the header image,caption"
        )
    return tuple(listed)


def _json(file: str, text: str) -> Iterable[_Listed] | None:
    data = reading.parse_json(text, list[Any] | dict[str, Any], f"the captions file {file!r}", "fetch it again")
    if isinstance(data, list):
        known = not data or (isinstance(data[0], dict) and {"image", "caption"} <= data[0].keys())
        return _pairs(file, data) if known else None
    images, annotations = data.get("images"), data.get("annotations")
    if not isinstance(images, list):
        return None
    if isinstance(annotations, list):
        return _coco(file, images, annotations)
    known = not images or any(isinstance(image, dict) and "sentences" in image for image in images)
    return _karpathy(file, images) if known else None


def _coco(file: str, images: list[Any], annotations: list[Any]) -> Iterable[_Listed]:
    names: dict[int | str, str] = {}
    for place, (key, name) in _rows(file, "images", images, "id", "file_name"):
        if not isinstance(key, int | str) or key in names:
            raise CrossguardError(f"{place} has the id {shortly(key)}, which is no id of its own; give each image one")
        names[key] = _name(place, name)
    told: dict[int | str, list[str]] = {key: [] for key in names}
    for place, (key, caption) in _rows(file, "annotations", annotations, "image_id", "caption"):
        if not isinstance(key, int | str) or key not in told:
            raise CrossguardError(
                f"{place} is of the image {shortly(key)}, which the file does not list; fetch it again"
            )
        told[key].append(_text(place, caption))
    return [_Listed(name, tuple(told[key])) for key, name in names.items()]


def _karpathy(file: str, images: list[Any]) -> Iterator[_Listed]:
    for index, (place, (name, sentences)) in enumerate(_rows(file, "images", images, "filename", "sentences")):
        folder, split = images[index].get("filepath"), images[index].get("split")
        if not isinstance(sentences, list):
            raise CrossguardError(f"{place} has no list of sentences; give each as {{'raw': caption}}")
        captions = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
        yield _Listed(
            name=_name(place, name),
            captions=tuple(_text(place, caption) for caption in captions),
            folder=reading.check_text(folder, f"the folder in {place}") if isinstance(folder, str) else "",
            split=reading.check_text(split, f"the split in {place}") if isinstance(split, str) else None,
        )


def _pairs(file: str, rows: list[Any]) -> Iterable[_Listed]:
    """The list form; for training it has a row a caption."""
    told: dict[str, list[str]] = {}
    for place, (name, captions) in _rows(file, "", rows, "image", "caption"):
        texts = captions if isinstance(captions, list) else [captions]
        told.setdefault(_name(place, name), []).extend(_text(place, text) for text in texts)
    return _grouped(told)


def _lines(file: str, text: str) -> Iterable[_Listed] | None:
    first = next((line for line in text.split("\n") if line.strip()), "")
    if re.match(r"[^\t]+#\d+\t", first):
        return _tokens(file, text)
    for mark in (",", "|"):
        header = [name.strip().strip('"').lower() for name in first.split(mark)]
        if header[-1] in TOLD and any(name in header for name in NAMED):
            return _table(file, text, mark, header)
    return None


def _tokens(file: str, text: str) -> Iterable[_Listed]:
    told: dict[str, list[str]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            head, tab, caption = line.partition("\t")
            name, _, count = head.rpartition("#")
            if not (tab and name.strip() and whole(count.strip()) is not None):
                raise CrossguardError(f"line {number} of {file!r} is not 'name.jpg#0<tab>caption'; write it so")
            place = f"line {number} of {file!r}"
            told.setdefault(_name(place, name), []).append(_text(place, caption))
    return _grouped(told)


def _table(file: str, text: str, mark: str, header: Sequence[str]) -> Iterable[_Listed]:
    """A table whose last column is the caption, which may hold the mark between columns unquoted."""
    told: dict[str, list[str]] = {}
    column, last = next(header.index(name) for name in NAMED if name in header), len(header) - 1
    quoting = csv.QUOTE_MINIMAL if mark == "," else csv.QUOTE_NONE
    rows = csv.reader(io.StringIO(text), delimiter=mark, quoting=quoting, strict=True)
    try:
        filled = [(rows.line_num, row) for row in rows if any(cell.strip() for cell in row)][1:]
    except csv.Error as error:
        raise CrossguardError(f"line {rows.line_num} of {file!r} is no row of a table ({error}); repair it") from error
    for number, row in filled:
        caption = mark.join(row[last:]).strip()
        if header[last - 1] == "comment_number" and len(row) >= last and not caption:
            # The Flickr30k table in circulation lacks a mark once: '2199200615.jpg| 4   A dog runs across the grass .'
            count, _, rest = row[last - 1].strip().partition(" ")
            caption = rest.strip() if whole(count) is not None else ""
        if len(row) <= last and not caption:
            raise CrossguardError(f"line {number} of {file!r} has {len(row)} of {len(header)} columns; repair it")
        place = f"line {number} of {file!r}"
        told.setdefault(_name(place, row[column]), []).append(_text(place, caption))
    return _grouped(told)


def _grouped(told: dict[str, list[str]]) -> Iterable[_Listed]:
    return [_Listed(name, tuple(captions)) for name, captions in told.items()]


def _rows(file: str, which: str, rows: list[Any], *keys: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What the rows of a JSON list say under `keys`, and where each is."""
    for number, row in enumerate(rows):
        place = f"{which or 'row'}[{number}] of {file!r}"
        lacking = [key for key in keys if not isinstance(row, dict) or key not in row]
        if lacking:
            raise CrossguardError(f"{place} has no {lacking[0]!r}; each needs {' and '.join(map(repr, keys))}")
        yield place, tuple(row[key] for key in keys)


def _name(place: str, name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise CrossguardError(f"{place} has no name of an image file; write it or remove the row")
    return reading.check_text(name.strip(), f"the name in {place}")


def _text(place: str, caption: Any) -> str:
    if not isinstance(caption, str):
        raise CrossguardError(f"{place} has a caption that is no text; write each as a string")
    return reading.check_text(caption.strip(), f"a caption in {place}")
