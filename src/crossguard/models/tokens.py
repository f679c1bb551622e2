"""Strings as the ids that a text tower reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from crossguard.checkpoints import quiet
from crossguard.errors import CrossguardError
from crossguard.pretrained import tokenizing

# What tokenizers disagree about: case, accents, runs of spaces, signs, emoji, special tokens, and nothing at all.
_PROBES = ("a photo of a cat", "", "  Two  spaces,Naïve 😀!", "<|endoftext|> [SEP] </s>", "word " * 200)

# A tokenizer is told how to cut and to pad before it is asked, so threads must take turns.
_turn = threading.Lock()


@runtime_checkable
class Reading(Protocol):
    """How strings become ids."""

    padded: bool  # to the whole context, and without a mask

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, each of shape (strings, tokens), on the CPU."""
        ...

    def bare(self, words: str) -> Tensor:
        """The ids of these words alone, without special tokens."""
        ...


class Tokens:
    """The ids and the mask of strings, cut at the tower's context.

    Attacks on texts read tens of thousands of strings. The `tokenizers` behind most tokenizers of `transformers` reads
    them in a third of the time if it is asked itself; where its answer to a few probes is another, or where there is
    none, the tokenizer is called as usual.

    Args:
        tokenizer: of `transformers`.
        length: the most tokens of a string.
        padded: whether strings are padded to this length, and not to the longest of them.
        rows: how many tokens the tower has an embedding for, if that is known.
    """

    def __init__(self, tokenizer: Any, length: int, padded: bool, rows: int | None = None) -> None:
        self.tokenizer, self.length, self.padded, self.rows = tokenizer, length, padded, rows
        self.direct: bool | None = None  # whether the backend gives the same; None: not tried yet

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, each of shape (strings, tokens), on the CPU."""
        with _turn, tokenizing(texts):
            if self.direct is None:
                self.direct = self._agrees()
            ids, mask = self._direct(texts) if self.direct and texts else self._stock(texts)
        if self.rows is not None and ids.numel() and int(ids.max()) >= self.rows:
            highest = int(ids.max())
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise CrossguardError(
                f"the tokenizer writes {token!r:.40} as number {highest:,}, and the text tower has {self.rows:,} "
                "embeddings; leave it out of the texts, or fetch tokenizer and config.json from one place"
            )
        return ids, mask

    def bare(self, words: str) -> Tensor:
        """The ids of these words alone, without special tokens."""
        with _turn, quiet(), tokenizing([words]):
            return torch.tensor(self.tokenizer(words, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the strings have more tokens than are read."""
        if not texts:
            return 0
        with _turn, quiet(), tokenizing(texts):
            whole = self.tokenizer(list(texts), truncation=False)["input_ids"]
        return sum(len(tokens) > self.length for tokens in whole)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer. Its file would tell how it was asked last, to cut and to pad, and so be another one
        after each use; it is written as if nobody had asked yet."""
        with _turn:
            if getattr(self.tokenizer, "is_fast", False):
                self.tokenizer.backend_tokenizer.no_truncation()
                self.tokenizer.backend_tokenizer.no_padding()
            self.tokenizer.save_pretrained(folder)

    def _stock(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            list(texts),
            padding="max_length" if self.padded else True,
            truncation=True,
            max_length=self.length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def _direct(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        from transformers.tokenization_utils_base import PaddingStrategy, TruncationStrategy

        self.tokenizer.set_truncation_and_padding(
            padding_strategy=PaddingStrategy.MAX_LENGTH if self.padded else PaddingStrategy.LONGEST,
            truncation_strategy=TruncationStrategy.LONGEST_FIRST,
            max_length=self.length,
            stride=0,
            pad_to_multiple_of=None,
            padding_side=None,
        )
        found = self.tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
        ids = np.array([one.ids for one in found], dtype=np.int64)
        mask = np.array([one.attention_mask for one in found], dtype=np.int64)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def _agrees(self) -> bool:
        if not getattr(self.tokenizer, "is_fast", False):
            return False
        try:
            return all(
                torch.equal(ours, stock)
                for ours, stock in zip(self._direct(_PROBES), self._stock(_PROBES), strict=True)
            )
        except Exception:  # tokenizers of other versions and makers lack these methods in many ways
            return False
