"""Adversarial images and texts that an evaluation kept: written as it goes on, read later as data for any model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from crossguard import files, reading
from crossguard.data import Dataset, Prompts
from crossguard.datasets.pixels import decode
from crossguard.errors import CrossguardError
from crossguard.limits import ENCODED, shortly
from crossguard.printing import one_line
from crossguard.reading import fingerprint
from crossguard.shapes import Labels

INDEX = "kept.json"
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


class _Kept(TypedDict, total=False):
    question: dict[str, str]
    files: dict[str, str]  # SHA-256 by name


class _Index(_Kept):
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
        path = reading.inside(Path(self.path), INDEX, "the kept folder")
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
        """Says what the index and the files of the images hold.

        Raises:
            CrossguardError: a file is missing, or is not the one that was kept.
        """
        told = self._index.get("files", {})
        found = {
            file: files.hashed(self._place(file)) for file in {sample["file"] for sample in self._index["samples"]}
        }
        for file, content in sorted(found.items()):
            if told.get(file, content) != content:
                raise CrossguardError(
                    f"{self._place(file)} is not the file that was kept there, but has been changed since; {AGAIN}"
                )
        return fingerprint((self._told[1], *sorted(found.items())))

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
                    image = images[row : row + 1][0]
                    if not bool(((image >= 0) & (image <= 1)).all()):
                        raise ValueError("its pixels are not in [0, 1]")
                    return image
        except Exception as error:  # safetensors has one error for every kind of damage
            raise CrossguardError(f"{path} is damaged ({one_line(str(error))}); {AGAIN}") from error
        raise CrossguardError(f"{path} is damaged (it has {count} images); {AGAIN}")
