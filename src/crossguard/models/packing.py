"""Causal text towers that compute the beginning of many strings once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crossguard.models.families import family
from crossguard.shapes import Embeddings

_PAYS = 0.8  # worth it if the tower reads at most this share of the tokens
_ROW = 256  # tokens of a row at most, so that masks stay small in towers of a long context


class PrefixPacking:
    """The text features of a CLIP tower, where strings that begin alike share the work of their beginning.

    No token of a causal tower sees those behind it, so up to where two strings part, their states are the same. Sorted,
    the strings of a batch merge into tries, whose nodes lie side by side in rows of at most the tower's context: each
    node has its depth for a position, and a mask shows it its ancestors and itself alone. The stock tower reads these
    rows in one forward, and each string is pooled at its own last node. The features are the stock ones up to rounding,
    and those of equal strings are equal to the bit.

    Where this would not save a fifth of the tokens, the tower reads the strings themselves. So it does for good if it
    answers a small probe differently in the two ways, as with an implementation of attention that ignores such masks.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sound: bool | None = None  # whether both ways agree; None: not tried yet

    def usable(self) -> bool:
        """Whether nothing asks for what only the stock path gives: gradients, dropout, its roundings in less than
        float32, or a hook, which expects one string in each row."""
        tower = self.model.text_model
        device = self.model.logit_scale.device.type
        if tower.training or next(tower.parameters()).dtype != torch.float32 or torch.is_autocast_enabled(device):
            return False
        if any(module._forward_hooks or module._forward_pre_hooks for module in tower.modules()):
            return False
        return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters()))

    def __call__(self, ids: Tensor, mask: Tensor) -> Embeddings:
        """The features of tokenized strings, which are padded on the right to one length.

        Args:
            ids: token ids of shape (strings, length), on the CPU.
            mask: 0 for padding.
        """
        if len(ids) < 2 or not self.reads(ids, mask):
            return self._stock(ids, mask)
        strings, place = self.distinct(ids, self.ends(ids))
        tries = Tries.of(strings, self.limit(ids.shape[1]))
        if tries.size <= _PAYS * ids.numel():
            return self._packed(strings, tries)[place]
        if len(strings) == len(ids):
            return self._stock(ids, mask)
        one = torch.empty(len(strings), dtype=torch.long)
        one[place] = torch.arange(len(ids))
        return self._stock(ids[one], mask[one])[place]

    def reads(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether the features of these strings come out right: no state that is pooled is of padding, and the tower
        has answered the probe alike in both ways."""
        if bool((mask.cumprod(1).sum(1) <= self.ends(ids)).any()):
            return False
        if self.sound is None:
            self.sound = self._agrees()
        return self.sound

    def distinct(self, ids: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct strings, sorted, with -1 behind their ends; and which of them each string is."""
        depth = torch.arange(ids.shape[1])
        return torch.unique(ids.where(depth <= ends[:, None], -1), dim=0, return_inverse=True)

    def limit(self, length: int) -> int:
        """The most tokens of a row of strings of this length."""
        return min(int(self.model.config.text_config.max_position_embeddings), max(_ROW, length))

    def ends(self, ids: Tensor) -> Tensor:
        """Which token of each string is pooled, by the stock rule: the first end-of-text, or the first of the highest
        id where the configuration has the end-of-text of old checkpoints of CLIP."""
        end = self.model.text_model.eos_token_id
        if end == 2 and family(self.model).highest:
            return ids.int().argmax(1)
        return (ids == end).int().argmax(1)

    def _stock(self, ids: Tensor, mask: Tensor) -> Embeddings:
        device = self.model.logit_scale.device
        output = self.model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device))
        return output.pooler_output

    def _packed(self, strings: Tensor, tries: Tries) -> Embeddings:
        model, device = self.model, self.model.logit_scale.device
        tokens, positions, seen = tries.rows(strings)
        hidden = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
        output = model.text_model(
            input_ids=tokens.to(device), attention_mask=hidden.to(device), position_ids=positions.to(device)
        )
        row, column = tries.row.to(device), tries.last.to(device)
        return model.text_projection(output.last_hidden_state[row, column])

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether both ways give the same features of three strings, two of which begin alike."""
        size, end = int(self.model.config.text_config.vocab_size), self.model.text_model.eos_token_id
        if end == 2 and family(self.model).highest:
            end = size - 1
        a, b, c = [token for token in range(min(size, 4)) if token != end][:3]
        ids = torch.tensor([[a, a, b, end], [a, a, end, end], [c, b, end, end]])
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]])
        strings, place = torch.unique(ids.where(mask > 0, -1), dim=0, return_inverse=True)
        try:
            packed = self._packed(strings, Tries.of(strings, strings.numel()))[place]
        except Exception:  # a tower that does not take such masks may refuse them in many ways
            return False
        return torch.allclose(packed, self._stock(ids, mask), rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Tries:
    """How sorted distinct strings share rows: as a string shares no node with the ones of another row, and within a row
    what the one before it begins with, only the rest of it is new."""

    fresh: Tensor  # (strings, depth): which tokens are nodes of their own
    column: Tensor  # (strings, depth): the node of each token, in its row
    row: Tensor
    last: Tensor  # the node at which each string ends
    width: int

    @classmethod
    def of(cls, strings: Tensor, limit: int) -> Tries:
        """Fills one row after the other.

        Args:
            strings: token ids, distinct and sorted, with -1 behind the end.
            limit: the most nodes of a row, at least the longest string.
        """
        length = (strings >= 0).sum(1)
        shared = torch.zeros_like(length)
        shared[1:] = (strings[1:] == strings[:-1]).cumprod(1).sum(1)
        rows, kept, sizes = list[int](), list[int](), list[int]()
        for tokens, same in zip(length.tolist(), shared.tolist(), strict=True):
            if not sizes or sizes[-1] + tokens - same > limit:
                sizes.append(0)
                same = 0
            sizes[-1] += tokens - same
            rows.append(len(sizes) - 1)
            kept.append(same)
        row = torch.tensor(rows)
        depth = torch.arange(strings.shape[1])
        fresh = (depth >= torch.tensor(kept)[:, None]) & (depth < length[:, None])
        # Nodes are numbered from string to string, so the node above or at a token is the last one made at its depth.
        number = torch.zeros_like(strings)
        number[fresh] = torch.arange(sum(sizes))
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        column = number.cummax(0).values - starts[row, None]
        return cls(fresh, column, row, column.gather(1, length[:, None] - 1)[:, 0], max(sizes))

    @property
    def size(self) -> int:
        """How many tokens the tower reads."""
        return (int(self.row[-1]) + 1) * self.width

    def rows(self, strings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The token and the position of each node of each row, and which nodes it sees."""
        shape = (int(self.row[-1]) + 1, self.width)
        tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        owner, level = self.fresh.nonzero(as_tuple=True)
        row, column = self.row[owner], self.column[owner, level]
        tokens[row, column] = strings[owner, level]
        positions[row, column] = level
        seen = torch.eye(self.width, dtype=torch.bool).repeat(shape[0], 1, 1)  # what fills up a row sees itself
        node, above = (torch.arange(strings.shape[1]) <= level[:, None]).nonzero(as_tuple=True)
        seen[row[node], column[node], self.column[owner[node], above]] = True
        return tokens, positions, seen
