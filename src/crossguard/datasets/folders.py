"""Images in folders: one subfolder a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from crossguard import reading
from crossguard.datasets.names import SPLITS, check_order, class_list, spoken
from crossguard.datasets.pixels import SUFFIXES, Decoded, Opened
from crossguard.errors import CrossguardError


@dataclass(frozen=True)
class Images(Decoded):
    """A folder with one subfolder of images a class, sorted by name; `sea_lion/` is the class `sea lion`.

    Where the subfolders are the letters of the alphabet with the classes sorted into them (`a/abbey/`,
    `b/bakery/shop/`), as in SUN397, the classes are those (`abbey`, `bakery shop`). Where all images lie in `images/`
    beside a file `val_annotations.txt`, as in Tiny-ImageNet, this file says their classes.

    A sample's id is its path below the folder. Files that are no images by their ending, and what is hidden at any
    depth, are not looked at; links are followed.

    Args:
        path: The folder.
        classes: What to call the classes, in the sorted order of the subfolders, where their names are not what one
            says; or the path of a text file with one name a line.
        templates: Prompt templates with `{}` for the class name.
        size: Resizes the short side and cuts out the middle square; None keeps the images as they are.
        skip_broken: Leaves unreadable images out and counts them; every image is decoded at opening to know.
    """

    path: str
    classes: tuple[str, ...] | str = ()
    templates: tuple[str, ...] = ("a photo of a {}",)  # pyright: ignore[reportIncompatibleMethodOverride]
    size: int | None = None
    skip_broken: bool = False

    def _open(self) -> Opened:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise CrossguardError(f"the folder {self.path!r} {what}; give a folder that holds one subfolder a class")
        # Every file is listed anew for a new word: a folder's own date says nothing about what lies deeper.
        held = tuple(file for file in reading.below(root, SUFFIXES) if "/" in file.path)
        folders = tuple(reading.folders(root))
        listed = _annotated(root / ANNOTATED) if folders == ("images",) and (root / ANNOTATED).is_file() else ()
        told = reading.identities(root, held)
        return _opened(str(root), folders, held, told, listed, class_list(self.classes), self.skip_broken)


ANNOTATED = "val_annotations.txt"


def _annotated(file: Path) -> tuple[tuple[str, str], ...]:
    """The name and the class of each image that the list of Tiny-ImageNet has."""
    rows = (line.split("\t") for line in reading.lines(reading.text(file, "fetch it again")))
    return tuple((row[0], row[1]) for row in rows if len(row) > 1)


@lru_cache(maxsize=8)
def _opened(
    root: str,
    folders: tuple[str, ...],
    files: tuple[reading.Found, ...],
    told: tuple[str, ...],
    annotated: tuple[tuple[str, str], ...],
    classes: tuple[str, ...],
    skip_broken: bool,
) -> Opened:
    if not folders:
        raise CrossguardError(f"the folder {root!r} has no subfolder; put the images of each class into one of its own")
    paths = [file.path for file in files]
    _check_splits(root, folders, paths)
    inside = [path.rsplit("/", 1)[0] for path in paths]
    if annotated:
        classes_of = dict(annotated)
        lacking = [path for path in paths if path.rsplit("/", 1)[1] not in classes_of]
        if lacking:
            raise CrossguardError(f"{ANNOTATED} of {root!r} does not list the image {lacking[0]!r}; list or remove it")
        inside = [classes_of[path.rsplit("/", 1)[1]] for path in paths]
        folders = tuple(sorted(set(classes_of.values())))
        names = tuple(map(spoken, folders))
    elif _by_letter(folders, inside):
        folders = tuple(sorted(set(inside), key=lambda folder: folder.split("/")))
        names = tuple(spoken(folder.split("/", 1)[1].replace("/", " ")) for folder in folders)
    else:
        inside = [path.split("/", 1)[0] for path in paths]
        names = tuple(map(spoken, folders))
    empty = sorted(set(folders) - set(inside))
    if empty and not annotated:
        raise CrossguardError(
            f"the class folder {str(Path(root) / empty[0])!r} holds no image ({', '.join(SUFFIXES)}); "
            "fill it or remove it"
        )
    if classes:
        if len(classes) != len(folders):
            raise CrossguardError(
                f"{len(classes)} classes were given for the {len(folders)} class folders of {root!r}; give one each"
            )
        check_order(classes, dict(enumerate(names)), f"the folder {root!r}")
    numbers = {folder: label for label, folder in enumerate(folders)}
    source = Opened(
        ids=tuple(paths),
        labels=torch.tensor([numbers[folder] for folder in inside], dtype=torch.int64),
        names=classes or names,
        read=lambda index: (Path(root) / paths[index]).read_bytes(),
        where=lambda index: f"the image {str(Path(root) / paths[index])!r}",
        fingerprint=reading.fingerprint((*zip(paths, told, strict=True), annotated, classes)),
    )
    return source.whole(skip_broken)


def _check_splits(root: str, folders: Sequence[str], paths: Sequence[str]) -> None:
    """Raises where the subfolders are the splits of a data set, and its classes lie inside them."""
    splits = [folder for folder in folders if folder.lower() in SPLITS]
    # A class may well be called "train"; it has its images inside it, not in folders of classes.
    nested = [split for split in splits if len({path.split("/")[1] for path in paths if _deep(path, split)}) > 1]
    flat = [split for split in splits if any(path.count("/") == 1 and path.startswith(f"{split}/") for path in paths)]
    if len(splits) > 1 or (splits and len(splits) == len(folders)) or set(nested) - set(flat):
        raise CrossguardError(
            f"the subfolders of {root!r} are the splits {', '.join(splits)}, not classes; give one of them, as in "
            f"{str(Path(root) / splits[0])!r}"
        )


def _deep(path: str, folder: str) -> bool:
    return path.count("/") > 1 and path.startswith(f"{folder}/")


def _by_letter(folders: Sequence[str], inside: Sequence[str]) -> bool:
    """Whether classes are sorted into folders by the letter that their names begin with."""
    if not all(len(folder) == 1 and folder.isalpha() for folder in folders):
        return False
    parts = [folder.split("/") for folder in set(inside)]
    return bool(parts) and all(len(part) > 1 and part[1].lower().startswith(part[0].lower()) for part in parts)
