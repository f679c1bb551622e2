"""Images in folders: one subfolder a class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from crossguard.datasets.pixels import SUFFIXES, Decoded, Opened
from crossguard.errors import CrossguardError


@dataclass(frozen=True)
class Images(Decoded):
    """A folder with one subfolder of images a class, sorted by name; `sea_lion/` is the class `sea lion`.

    A sample's id is its path below the folder. Files that are no images by their ending, and hidden ones, are
    not looked at.

    Args:
        path: The folder.
        templates: Prompt templates with `{}` for the class name.
        size: Resizes the short side and cuts out the middle square; None keeps the images as they are.
        skip_broken: Leaves unreadable images out and counts them; every image is decoded at opening to know.
    """

    path: str
    templates: tuple[str, ...] = ("a photo of a {}",)  # pyright: ignore[reportIncompatibleMethodOverride]
    size: int | None = None
    skip_broken: bool = False

    def _open(self) -> Opened:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "does not exist"
            raise CrossguardError(f"the folder {self.path!r} {what}; give a folder that holds one subfolder a class")
        # Every file is listed anew for a new word: a folder's own date says nothing about what lies deeper.
        files = tuple(
            (
                folder.name,
                tuple(sorted(str(file.relative_to(root)) for file in folder.rglob("*") if _is_image(file))),
            )
            for folder in sorted(root.iterdir())
            if folder.is_dir() and not folder.name.startswith(".")
        )
        stats = [(root / file).stat() for _, held in files for file in held]
        return _opened(str(root), files, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats), self.skip_broken)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


@lru_cache(maxsize=8)
def _opened(
    root: str,
    files: tuple[tuple[str, tuple[str, ...]], ...],
    changed: tuple[tuple[int, int], ...],
    skip_broken: bool,
) -> Opened:
    if not files:
        raise CrossguardError(f"the folder {root!r} has no subfolder; put the images of each class into one of its own")
    empty = [folder for folder, held in files if not held]
    if empty:
        raise CrossguardError(
            f"the class folder {str(Path(root) / empty[0])!r} holds no image ({', '.join(SUFFIXES)}); "
            "fill it or remove it"
        )
    paths = [file for _, held in files for file in held]
    labels = [label for label, (_, held) in enumerate(files) for _ in held]
    source = Opened(
        ids=tuple(Path(file).as_posix() for file in paths),
        labels=torch.tensor(labels, dtype=torch.int64),
        names=tuple(folder.replace("_", " ") for folder, _ in files),
        read=lambda index: (Path(root) / paths[index]).read_bytes(),
        where=lambda index: f"the image {str(Path(root) / paths[index])!r}",
    )
    return source.whole(skip_broken)
