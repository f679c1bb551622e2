"""Texts of which some words are learned vectors: the seam of prompt tuning."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossguard.errors import CrossguardError
from crossguard.models.packing import PrefixPacking, Tries
from crossguard.models.tokens import Reading
from crossguard.models.towers import blocks, changing
from crossguard.shapes import Context, Deeper, Spliced

_BYTES = 2**30  # of what a text tower keeps for its gradient at once; more rows are read in several forwards


class Splice:
    """Texts in which the tokens of some words are given as vectors, one list of vectors for each image or one for all.

    Only what the tower looks up for these tokens is another; positions, padding and end-of-text are those of the words.
    So the vectors of the words themselves, `start`, give the plain embeddings of the texts. A text without the words
    has them put in front.

    All pairs of an image and a text are read together. A causal tower reads the beginning that the texts share once for
    each image (see `PrefixPacking`). Where the states that a gradient needs would take more than 1 GiB, the pairs are
    read in several forwards and, for the gradient, once more each.

    Texts may also have different vectors: then the context is the lists of vectors one after the other.

    Args:
        model: of `transformers`; its tower looks each token up once, in a table of its own.
        tokens: what makes its ids of strings.
        packing: of this model, if its tower is causal.
        texts: one embedding each.
        words: what the vectors stand for, such as 'a photo of a'; placeholders such as 'x x x x' do as well.
        lists: for each text the number of its list of vectors, from 0 on; if empty, all texts have one list.
    """

    def __init__(
        self,
        model: Any,
        tokens: Reading,
        packing: PrefixPacking | None,
        texts: Sequence[str],
        words: str,
        lists: Sequence[int] = (),
    ) -> None:
        self.model, self.packing = model, packing
        self.table = _table(model)
        own = tokens.bare(words)
        if not len(own):
            raise CrossguardError(f"the words {words!r} have no tokens to be replaced; give at least one word")
        ids, mask, where = _placed(tokens, list(texts), words, own)
        device = self.table.weight.device
        which = torch.tensor(lists or [0])
        with torch.no_grad():
            self.start: Context = self.table(own.to(device)).detach().float().repeat(int(which.max()) + 1, 1)
        self.deeper: Deeper | None = None
        place = torch.arange(ids.shape[1]) - where[:, None]
        slots = (place + len(own) * which[:, None]).where((place >= 0) & (place < len(own)), -1)
        seen = {} if tokens.padded else {"attention_mask": mask.to(device)}
        self.plain = _Rows(ids.to(device), slots.to(device), seen)
        self.packed: _Packed | None = None
        if packing is not None and packing.reads(ids, mask):
            self.packed = _packed(packing, ids, slots, int(self.table.num_embeddings), device)

    @property
    def count(self) -> int:
        """How many texts there are."""
        return len(self.plain.tokens)

    def begun(self, start: Context, deeper: Deeper | None = None) -> Splice:
        """The same texts with other vectors to start from.

        Args:
            deeper: vectors that take the places of the words' tokens before the second layer of the tower, the third
                and so on, as deep prompts do; the same for all images.
        """
        for vectors in (start,) if deeper is None else (start, *deeper):
            self._check(vectors)
        found = copy(self)
        found.start, found.deeper = start, deeper
        return found

    def __call__(self, context: Context) -> Spliced:
        """Raw embeddings of every text with the vectors of every image, differentiable in the vectors.

        Args:
            context: one vector for each token of the words.
        """
        self._check(context)
        vectors = context.reshape(-1, *context.shape[-2:])
        packed = self.packed if self.packing is not None and self.packing.usable() else None
        rows = self.plain if packed is None else packed.rows
        total = len(vectors) * len(rows.tokens)
        step = max(1, _BYTES // (rows.tokens.shape[1] * self._cost(rows.tokens.shape[1])))
        again = total > step and torch.is_grad_enabled()
        deeper = self.deeper
        learned = [context] if deeper is None else [context, deeper]
        again &= any(one.requires_grad for one in [*learned, *self.model.text_model.parameters()])
        found = list[Tensor]()
        for start in range(0, total, step):
            flat = torch.arange(start, min(start + step, total), device=vectors.device)
            read = self._read if packed is None else self._read_packed
            if again:
                found.append(checkpoint(read, vectors, deeper, flat, use_reentrant=False, preserve_rng_state=False))  # type: ignore[arg-type]
            else:
                found.append(read(vectors, deeper, flat))
        embeddings = torch.cat(found).view(len(vectors), -1, found[0].shape[1])
        if packed is not None:
            embeddings = embeddings[:, packed.place]
        return embeddings.float().view(*context.shape[:-2], *embeddings.shape[1:])

    def _check(self, vectors: Context) -> None:
        if vectors.shape[-2:] != self.start.shape:
            raise CrossguardError(
                f"learned tokens of shape {tuple(vectors.shape[-2:])} do not fit; the words they stand for have "
                f"{self.start.shape[0]} tokens of {self.start.shape[1]} numbers"
            )

    def _deepened(self, deeper: Tensor | None, slots: Tensor) -> AbstractContextManager[None]:
        """Inside, the tower has these vectors at the marked places before its second layer, its third and so on."""
        if deeper is None or not len(deeper):
            return nullcontext()
        layers = blocks(self.model.text_model)
        if layers is None or len(deeper) >= len(layers):
            raise CrossguardError(
                f"tokens before {len(deeper) + 1} layers cannot be learned in a text tower that has "
                f"{'none that are known here' if layers is None else len(layers)}; give a smaller depth"
            )
        marked = slots[..., None] >= 0

        def change(layer: int, states: Tensor) -> Tensor:
            if states.shape[:-1] != slots.shape:
                raise CrossguardError("this text tower reads other tokens than it is given, so none can be learned")
            return torch.where(marked, deeper[layer].to(states.dtype)[slots.clamp(min=0)], states)

        return changing(layers[1 : len(deeper) + 1], change)

    def _cost(self, width: int) -> int:
        """The bytes that the tower keeps of one token for its gradient, rounded up: states, the wide layer twice, and
        what the token makes of the others of its row, where attention is not fused."""
        config = self.model.config.text_config
        hidden = int(config.hidden_size)
        wide = int(getattr(config, "intermediate_size", 4 * hidden))
        kept = 8 * hidden + 2 * wide + 2 * width * int(config.num_attention_heads)
        return kept * int(config.num_hidden_layers) * self.table.weight.element_size()

    def _read(self, vectors: Tensor, deeper: Tensor | None, flat: Tensor) -> Tensor:
        """The embeddings of the pairs of these numbers, image by image and text by text."""
        rows = self.plain
        image, row = flat // len(rows.tokens), flat % len(rows.tokens)
        slots = rows.slots[row]
        with _replaced(self.table, vectors, image, slots), self._deepened(deeper, slots):
            output = self.model.get_text_features(input_ids=rows.tokens[row], **rows.of(row))
        return output if isinstance(output, Tensor) else output.pooler_output

    def _read_packed(self, vectors: Tensor, deeper: Tensor | None, flat: Tensor) -> Tensor:
        """The embeddings of all distinct texts that end in these rows, image by image."""
        packed = self.packed
        assert packed is not None
        rows, count = packed.rows, len(packed.rows.tokens)
        image, row = flat // count, flat % count
        slots = rows.slots[row]
        with _replaced(self.table, vectors, image, slots), self._deepened(deeper, slots):
            output = self.model.text_model(input_ids=rows.tokens[row], **rows.of(row))
        ends = torch.arange(len(vectors), device=flat.device)[:, None] * count + packed.row
        local = ends.flatten() - flat[0]
        here = (local >= 0) & (local < len(flat))
        column = packed.last.repeat(len(vectors))[here]
        return self.model.text_projection(output.last_hidden_state[local[here], column])


@dataclass(frozen=True)
class _Rows:
    """What the tower reads for one image."""

    tokens: Tensor  # (rows, width)
    slots: Tensor  # (rows, width): which vector stands here, or -1
    given: Mapping[str, Tensor]  # what else it is given of each row

    def of(self, row: Tensor) -> dict[str, Tensor]:
        return {name: value[row] for name, value in self.given.items()}


@dataclass(frozen=True)
class _Packed:
    """Rows that hold the distinct texts as tries."""

    rows: _Rows
    row: Tensor  # (distinct texts,): ascending
    last: Tensor  # (distinct texts,): the column at which each ends
    place: Tensor  # (texts,): the distinct text that each is


def _packed(packing: PrefixPacking, ids: Tensor, slots: Tensor, size: int, device: torch.device) -> _Packed:
    marked = ids.where(slots < 0, size + slots)  # a learned token is unlike all others
    strings, place = packing.distinct(marked, packing.ends(ids))
    tries = Tries.of(strings, packing.limit(ids.shape[1]))
    tokens, positions, seen = tries.rows(strings)
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
    given = {"attention_mask": mask.to(device), "position_ids": positions.to(device)}
    rows = _Rows(tokens.where(tokens < size, 0).to(device), (tokens - size).clamp(min=-1).to(device), given)
    return _Packed(rows, tries.row.to(device), tries.last.to(device), place.to(device))


def _table(model: Any) -> nn.Embedding:
    """Where the text tower looks its tokens up."""
    try:
        table = model.text_model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        table = None
    if not isinstance(table, nn.Embedding):
        raise CrossguardError(
            f"the text tower of a {type(model).__name__} has no table of tokens that is known here, so it cannot read "
            "learned tokens; give a CLIP or SigLIP model"
        )
    return table


def _placed(tokens: Reading, texts: list[str], words: str, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ids and mask of the texts, and where in each the words begin."""
    if not texts:
        raise CrossguardError("there are no texts to splice learned tokens into")
    where = _first(tokens(texts)[0], own)
    texts = [text if at >= 0 else f"{words} {text}" for text, at in zip(texts, where.tolist(), strict=True)]
    ids, mask = tokens(texts)
    where = _first(ids, own)
    lost = [text for text, at in zip(texts, where.tolist(), strict=True) if at < 0]
    if lost:
        raise CrossguardError(
            f"the {len(own)} tokens of {words!r} are not among the {ids.shape[1]} tokens that are read of "
            f"{lost[0][:80]!r}; give fewer words, or words that the tokenizer does not join to others"
        )
    return ids, mask, where


def _first(ids: Tensor, own: Tensor) -> Tensor:
    """Where the tokens first stand in each row, -1 where they do not."""
    if ids.shape[1] < len(own):
        return torch.full((len(ids),), -1)
    found = (ids.unfold(1, len(own), 1) == own).all(2)
    return found.int().argmax(1).where(found.any(1), -1)


@contextmanager
def _replaced(table: nn.Embedding, vectors: Tensor, image: Tensor, slots: Tensor) -> Iterator[None]:
    """Inside, what the table says of the marked tokens in this thread are the vectors of each row's image."""
    here, calls = threading.get_ident(), 0

    def splice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        del module, inputs
        if threading.get_ident() != here:
            return None
        calls += 1
        if output.shape[:-1] != slots.shape:
            raise CrossguardError("this text tower looks up other tokens than it is given, so none can be learned")
        learned = vectors.to(output.dtype)[image[:, None], slots.clamp(min=0)]
        return torch.where(slots[..., None] >= 0, learned, output)

    handle = table.register_forward_hook(splice)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise CrossguardError(f"this text tower looks its tokens up {calls} times, so none can be learned")
