"""Adversarial images and texts that an evaluation kept: written as it goes on, read later as data for any model."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from crossguard import files, reading
from crossguard.data import Dataset, Prompts
from crossguard.datasets.pixels import SUFFIXES, decode
from crossguard.errors import CrossguardError
from crossguard.limits import ENCODED, shortly
from crossguard.reading import fingerprint
from crossguard.report import differs
from crossguard.shapes import Images, Labels

INDEX = "kept.json"
UNFINISHED = ".kept.json"  # the question of an evaluation that has not kept everything yet
AGAIN = "run the evaluation with --keep again"
REPORT = "report.json"  # beside the kept images, where `crossguard attack` wrote
FORMATS = ("safetensors", "png")


class _Told(TypedDict, total=False):
    label: int
    texts: list[str]
    clean_texts: list[str]


class _Sample(_Told):
    """What is read of each sample in the index."""

    id: str
    file: str
    row: int


class _Question(TypedDict, total=False):
    question: dict[str, str]


class _Index(_Question):
    """What is read of the index."""

    names: list[str]
    texts: list[list[str]]
    clean_texts: list[list[str]]
    samples: list[_Sample]


@dataclass(frozen=True)
class Kept(Dataset):
    """What `crossguard eval --keep FOLDER` wrote: images as the attack left them, with their labels and class prompts,
    or with their captions.

    A clean evaluation on it asks whether what was crafted on one model fools another.

    Args:
        path: the folder.
        rewritten: with the texts as the attack rewrote them; the clean ones otherwise.
    """

    path: str
    rewritten: bool = True

    @property
    def _index(self) -> _Index:
        return self._told[0]

    @cached_property
    def _told(self) -> tuple[_Index, str]:
        """The index, and a hash of it."""
        path = Path(self.path) / INDEX
        try:
            written = reading.content(path, AGAIN)
        except reading.Missing:
            raise CrossguardError(
                f"{self.path} holds no kept images ({INDEX} is missing); give the folder of a finished 'eval --keep'"
            ) from None
        content = reading.parse_json(written, _Index, f"{str(path)!r}", AGAIN)
        for which in ("texts", "clean_texts"):
            for name, texts in zip(content["names"], content[which], strict=False):
                for text in (name, *texts):
                    reading.check_text(text, f"the class {shortly(name)} in {str(path)!r}")
        for sample in content["samples"]:
            for text in (*sample.get("texts", ()), *sample.get("clean_texts", ())):
                reading.check_text(text, f"a caption of {shortly(sample['id'])} in {str(path)!r}")
        return content, hashlib.sha256(written).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._index["samples"])

    @property
    def question(self) -> Mapping[str, str]:
        """What was asked when the images were kept."""
        return self._index.get("question", {})

    @property
    def samples(self) -> Sequence[Mapping[str, Any]]:
        """What is known of each sample: its id, where its image is, and what became of it."""
        return self._index["samples"]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._index["names"])

    def id(self, index: int) -> str:
        return self._index["samples"][index]["id"]

    def labels(self) -> Labels:
        return torch.tensor([sample.get("label", -1) for sample in self._index["samples"]], dtype=torch.int64)

    def captions(self, index: int) -> tuple[str, ...]:
        sample = self._index["samples"][index]
        return tuple(sample.get("texts" if self.rewritten else "clean_texts", ()))

    def prompts(self, templates: Sequence[str] | None = None) -> Prompts:
        if templates:
            return Prompts.of(self.names, templates)
        texts = self._index["texts" if self.rewritten else "clean_texts"]
        return Prompts(self.names, tuple(tuple(one) for one in texts))

    @property
    def fingerprint(self) -> str:
        """Says what the index holds, and how large the files of the images are."""
        sizes = {file: _size(self._place(file)) for file in {sample["file"] for sample in self._index["samples"]}}
        return fingerprint((self._told[1], *sorted(sizes.items())))

    def _place(self, file: str) -> Path:
        """Where a file is that the index names."""
        return reading.inside(Path(self.path), file, f"the index {str(Path(self.path) / INDEX)!r}")

    def image(self, index: int) -> Tensor:
        return (self.stored(index) * 255.0).round().to(torch.uint8)

    def stored(self, index: int) -> Tensor:
        sample = self._index["samples"][index]
        path = self._place(sample["file"])
        if path.suffix == ".png":
            content = reading.content(path, AGAIN, ENCODED)
            return decode(content, None, repr(str(path)), AGAIN).to(torch.float32) / 255.0
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:  # reads no more than the row
                images, row = file.get_slice("images"), sample["row"]
                count = images.get_shape()[0]
                if 0 <= row < count:
                    return images[row : row + 1][0]
        except Exception as error:  # safetensors has one error for every kind of damage
            raise CrossguardError(f"{path} is damaged ({error}); {AGAIN}") from error
        raise CrossguardError(f"{path} is damaged (it has {count} images); {AGAIN}")


def _size(path: Path) -> int:
    """In bytes; -1 where there is no file, which is said when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def check_folder(folder: Path, question: Mapping[str, str], overwrite: bool = False) -> bool:
    """Raises where the images of this question would replace those of another, or lie among images of somebody else:
    these might be overwritten, and a data set that is read from there would have more samples than before.

    Args:
        overwrite: nothing is refused.

    Returns:
        Whether an evaluation of this question began to keep its images here and was stopped.
    """
    found = {name: _question(folder / name) for name in (INDEX, UNFINISHED)}
    for there in found.values():
        if not overwrite and there is not None and there != dict(question):
            raise CrossguardError(
                f"{folder} holds what was kept for another question ({differs(there, question)}); give another "
                "folder, or overwrite this one"
            )
    if not overwrite and folder.is_dir() and not any((folder / name).exists() for name in found):
        for file in sorted(folder.iterdir()):
            if file.name.lower().endswith(SUFFIXES):
                raise CrossguardError(
                    f"{folder} holds images that no evaluation kept ({file.name}); give a folder of its own"
                )
    return found[UNFINISHED] == dict(question)


def _question(path: Path) -> dict[str, str] | None:
    """What an index is the answer to; None where there is none, or one that cannot be read."""
    try:
        return reading.read_json(path, _Question, AGAIN).get("question")
    except CrossguardError:
        return None


def begin(folder: Path, question: Mapping[str, str], alone: bool = True) -> None:
    """Takes away what an earlier run kept, the index first: until `finish`, the folder is not to be read.

    Args:
        alone: whether no other process writes images into the folder already.
    """
    stale: set[str] = set()
    with suppress(CrossguardError, TypeError):  # nothing is there, or its index is broken
        stale = {sample["file"] for sample in Kept(str(folder)).samples if alone}
    if _question(folder / INDEX) not in (None, dict(question)):
        stale.add(REPORT)  # of the images that go
    try:
        for name in (INDEX, *stale):
            if Path(name).name == name:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise files.WriteError(f"{folder / INDEX} cannot be replaced: {files.reason(error)}") from error
    files.write(folder / UNFINISHED, json.dumps({"question": dict(question)}) + "\n")


def keep(folder: Path, form: str, indices: Sequence[int], images: Images) -> list[dict[str, Any]]:
    """Writes the images of one batch and says where each is; `finish` makes the folder readable."""
    if form == "png":
        places = []
        for index, image in zip(indices, images, strict=True):
            name = f"{index:06d}.png"
            _save_png(folder / name, rounded(image))
            places.append({"file": name, "row": 0, "index": index})
        return places
    name = f"images-{indices[0]:06d}.safetensors"
    files.save_tensors(folder / name, {"images": images.detach().cpu().contiguous()})
    return [{"file": name, "row": row, "index": index} for row, index in enumerate(indices)]


def finish(
    folder: Path,
    question: Mapping[str, str],
    samples: Sequence[Mapping[str, Any]],
    prompts: tuple[Prompts, Prompts] | None = None,
) -> None:
    """Writes the index; written last, it says that everything else is there.

    Args:
        prompts: the class prompts before and after the attack; without them the samples have captions of their own,
            as `texts` and `clean_texts`.
    """
    content: dict[str, Any] = {"question": dict(question), "names": (), "clean_texts": (), "texts": ()}
    if prompts is not None:
        before, after = prompts
        content |= {"names": before.names, "clean_texts": before.texts, "texts": after.texts}
    content["samples"] = [
        {name: value for name, value in sample.items() if name not in ("embedding", "rounded")} for sample in samples
    ]
    files.write(folder / INDEX, json.dumps(content) + "\n")
    (folder / UNFINISHED).unlink(missing_ok=True)


def rounded(image: Tensor) -> Image.Image:
    """The image with 8 bits."""
    pixels = (image * 255.0).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def _save_png(path: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, "PNG")
    files.write(path, content.getvalue())
