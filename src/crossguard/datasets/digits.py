"""The handwritten digits that scikit-learn brings along: a small world beside MNIST that needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crossguard.data import Dataset
from crossguard.datasets.names import NUMBERS
from crossguard.datasets.pixels import check_size, fitted
from crossguard.errors import CrossguardError
from crossguard.shapes import Labels

_SPLITS: Final = {"all": slice(None), "train": slice(1347), "test": slice(1347, None)}


@dataclass(frozen=True)
class Digits(Dataset):
    """1,797 handwritten digits of 8 x 8 pixels in 17 shades of gray (Alpaydin and Kaynak 1998), as scikit-learn has
    them: `pip install crossguard[digits]`.

    They are the digits of `MNIST` in another hand, another size and another scanner, with the same class names.

    Args:
        split: `train` (the first 1,347 in scikit-learn's order), `test` (the other 450) or `all`. The split is ours:
            scikit-learn has none.
        size: Width and height of the digit in pixels, resized by Pillow (bicubic); None keeps the 8 x 8.
        margin: Black pixels on each side of it. These digits fill their images, and those of MNIST do not:
            `size=20, margin=4` is what MNIST has.
    """

    split: str = "test"
    size: int | None = None
    margin: int = 0

    def __post_init__(self) -> None:
        if self.split not in _SPLITS:
            raise CrossguardError(f"unknown split {self.split!r} of Digits; choose one of {', '.join(_SPLITS)}")
        check_size(self.size)
        if self.margin < 0:
            raise CrossguardError(f"Digits(margin={self.margin}) is not possible; give 0 or more pixels")

    @cached_property
    def _read(self) -> tuple[np.ndarray, np.ndarray]:
        """The images in 17 shades and their labels."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise CrossguardError(
                "Digits reads the data that come with scikit-learn, which is not installed; try "
                "pip install crossguard[digits]"
            ) from error
        held: Any = load_digits()
        return held.images[_SPLITS[self.split]], held.target[_SPLITS[self.split]]

    def __len__(self) -> int:
        return len(self._read[1])

    @property
    def names(self) -> tuple[str, ...]:
        return NUMBERS

    @property
    def templates(self) -> tuple[str, ...]:
        """The prompt of `MNIST`."""
        return ("a photo of the number {}",)

    def id(self, index: int) -> str:
        first = _SPLITS[self.split].start or 0
        return f"digits/{first + range(len(self))[index]}"

    def image(self, index: int) -> Tensor:
        """The digit in white on black, as uint8, shape (3, h, w): shade s of 16 becomes the rounded 255 s / 16."""
        gray = np.rint(self._read[0][index] * (255.0 / 16.0)).astype(np.uint8)
        square = np.pad(np.array(fitted(Image.fromarray(gray), self.size)), self.margin)
        return torch.from_numpy(square)[None].repeat(3, 1, 1)

    def labels(self) -> Labels:
        return torch.from_numpy(self._read[1].astype(np.int64))
