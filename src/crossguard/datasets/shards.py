"""Tar shards in the layout of CLIP_benchmark, in which most zero-shot and retrieval benchmarks can be had."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from crossguard.datasets.pixels import SUFFIXES, Decoded, Opened
from crossguard.errors import CrossguardError


@dataclass(frozen=True)
class Shards(Decoded):
    """A local copy of a data set in the webdataset layout of CLIP_benchmark.

    That is `classnames.txt`, `zeroshot_classification_templates.txt` with `{c}` for the class name, and
    `{split}/*.tar` with an image and a `.cls` (for retrieval a `.txt` of captions) a sample.

    The shards are indexed once and then read at the offset of each image; nothing is unpacked. A sample's id
    is its shard and its name in it. Class names are taken as they are, and the templates are those of the
    copy.

    Args:
        path: The folder that holds the split folders.
        split: The split folder, usually `train` or `test`.
        size: Resizes the short side and cuts out the middle square; None keeps the images as they are.
        skip_broken: Leaves unreadable images out and counts them; every image is decoded at opening to know.
    """

    path: str
    split: str = "test"
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
        listed = [*folder.glob("*.tar"), *root.glob("*.txt"), *folder.glob("nshards.txt")]
        changed = tuple(sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in listed))
        return _opened(str(root), self.split, changed, self.skip_broken)


@dataclass(frozen=True)
class _Member:
    """A file inside a shard: where its bytes are."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@lru_cache(maxsize=16)
def _opened(root: str, split: str, changed: tuple[tuple[str, int, int], ...], skip_broken: bool) -> Opened:
    kind = "\n".join(_lines(Path(root) / "dataset_type.txt")).strip()
    if kind == "multilabel":
        raise CrossguardError(
            f"{root!r} has several labels an image (multilabel), which is not supported; give another set"
        )
    names = _lines(Path(root) / "classnames.txt")
    templates = [line.replace("{c}", "{}") for line in _lines(Path(root) / "zeroshot_classification_templates.txt")]
    samples = _samples(_shards(Path(root) / split))
    images = [_only(sample, SUFFIXES) for sample in samples]
    captions: list[tuple[str, ...]] = []
    labels = [-1] * len(samples)  # no class, and no label that could pass for one
    if kind == "retrieval" or not any(".cls" in sample for sample in samples):
        for image, sample in zip(images, samples, strict=True):
            texts = sample[".txt"].read().decode("utf-8", errors="replace").splitlines() if ".txt" in sample else []
            captions.append(tuple(text.strip() for text in texts if text.strip()))
            if not captions[-1]:
                raise CrossguardError(
                    f"{image.name!r} in {str(image.shard)!r} has neither a label (.cls) nor captions (.txt)"
                )
        names = []
    else:
        if not names:
            raise CrossguardError(
                f"{root!r} has no classnames.txt with one class name a line; fetch it with the shards"
            )
        labels = [_label(sample, image, len(names)) for image, sample in zip(images, samples, strict=True)]
    source = Opened(
        ids=tuple(f"{image.shard.stem}/{image.name.rsplit('.', 1)[0]}" for image in images),
        labels=torch.tensor(labels, dtype=torch.int64),
        names=tuple(names),
        read=lambda index: images[index].read(),
        where=lambda index: f"{images[index].name!r} in {str(images[index].shard)!r}",
        captions=tuple(captions),
        templates=tuple(template for template in templates if template.strip()),
    )
    return source.whole(skip_broken)


def _lines(file: Path) -> list[str]:
    """The lines of a small text file; none if it does not exist. Empty lines count unless they come last:
    they are class names that somebody forgot."""
    if not file.is_file():
        return []
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    except UnicodeDecodeError as error:
        raise CrossguardError(f"{str(file)!r} is not UTF-8 text; fetch it again") from error


def _shards(folder: Path) -> list[Path]:
    """The shards of a split in the order of their numbers, all of them or an error: a missing one would
    change every result without a word."""
    shards = sorted(folder.glob("*.tar"), key=lambda file: (len(file.stem) if file.stem.isdigit() else 99, file.stem))
    told = "".join(_lines(folder / "nshards.txt"))
    if told and not told.isdigit():
        raise CrossguardError(f"{str(folder / 'nshards.txt')!r} says {told!r}, not a number of shards; fetch it again")
    wanted = {str(number) for number in range(int(told or 0))}
    missing = sorted(wanted - {shard.stem for shard in shards}, key=int)
    if told and missing and (len(shards) != int(told) or all(shard.stem.isdigit() for shard in shards)):
        raise CrossguardError(
            f"{str(folder)!r} should hold {told} shards by its nshards.txt and lacks {len(missing)}, "
            f"the first being {missing[0]}.tar; fetch what is missing"
        )
    if told and len(shards) != int(told):
        raise CrossguardError(
            f"{str(folder)!r} should hold {told} shards by its nshards.txt and holds {len(shards)}; fetch it again"
        )
    if not shards:
        raise CrossguardError(f"{str(folder)!r} holds no .tar file; fetch the shards of this split")
    return shards


def _samples(shards: Sequence[Path]) -> list[dict[str, _Member]]:
    """The members of each sample by their ending, shard by shard; what belongs together has one name up to
    its first dot, as in every webdataset."""
    samples: dict[tuple[Path, str], dict[str, _Member]] = {}
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as tar:
                members = [member for member in tar if member.isfile()]
        except (tarfile.TarError, OSError) as error:
            raise CrossguardError(f"the shard {str(shard)!r} is no whole tar file ({error}); fetch it again") from error
        end = max((member.offset_data + member.size for member in members), default=0)
        if end > shard.stat().st_size:
            raise CrossguardError(f"the shard {str(shard)!r} is cut short; fetch it again")
        for member in members:
            folder, _, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            if stem:
                key = (shard, f"{folder}/{stem}")
                found = _Member(shard, member.name, member.offset_data, member.size)
                samples.setdefault(key, {})[f".{ending.lower()}"] = found
    if not samples:
        raise CrossguardError(f"the shards of {str(shards[0].parent)!r} hold no samples; fetch them again")
    return list(samples.values())


def _only(sample: dict[str, _Member], endings: Sequence[str]) -> _Member:
    found = [sample[ending] for ending in endings if ending in sample]
    if len(found) != 1:
        any_member = next(iter(sample.values()))
        raise CrossguardError(
            f"the sample of {any_member.name!r} in {str(any_member.shard)!r} has {len(found)} images "
            f"({', '.join(sample)}); it should have one"
        )
    return found[0]


def _label(sample: dict[str, _Member], image: _Member, classes: int) -> int:
    text = sample[".cls"].read().decode("ascii", errors="replace").strip() if ".cls" in sample else ""
    if not text.lstrip("-").isdigit():
        what = f"the label {text!r}, which is not a whole number" if text else "no label (.cls)"
        raise CrossguardError(f"{image.name!r} in {str(image.shard)!r} has {what}; fetch the shard again")
    if not 0 <= int(text) < classes:
        raise CrossguardError(
            f"label {text} of {image.name!r} in {str(image.shard)!r} is outside classnames.txt "
            f"with its {classes} names (0 to {classes - 1})"
        )
    return int(text)
