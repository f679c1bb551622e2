"""Dual encoders of open_clip: CLIP, CoCa's dual part, and towers of timm and `transformers` inside of them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from crossguard import records
from crossguard.checkpoints import OPEN_CLIP_WEIGHTS, RECORD
from crossguard.errors import CrossguardError
from crossguard.files import save_tensors, staging, write
from crossguard.models.base import Checkpoint, DualEncoder, Preprocess, constant, normalization
from crossguard.models.probing import PROBES, check_images, check_texts
from crossguard.models.splicing import Splice
from crossguard.models.tokens import Tokens
from crossguard.pretrained import tokenizing
from crossguard.records import Record, naming
from crossguard.shapes import Embeddings, Images, Resized
from crossguard.words import Reads

_STRINGS = 256  # read at once
_OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # open_clip's default mean and std


@dataclass(frozen=True)
class OpenCLIP(Checkpoint, Reads):
    """A dual encoder that open_clip knows how to build; needs `pip install 'crossguard[open_clip]'`.

    Weights are read from safetensors only, in float32. Images are prepared as the checkpoint's own record says; a bare
    file of weights has none, and is prepared as open_clip does then (OpenAI's mean and deviation), unless an
    open_clip_config.json lies beside it. A CoCa answers with its two encoders; its captioner is kept and never asked.

    Args:
        name: a folder with an open_clip_config.json, a hub id as 'hf-hub:owner/name', or an architecture of open_clip
            such as 'ViT-B-32'.
        pretrained: the weights of an architecture: a tag of open_clip such as 'laion2b_s34b_b79k', or a file.
    """

    name: str
    pretrained: str = ""

    def load(self) -> DualEncoder:
        return opened(records.read(self.name, self.pretrained))

    def content(self) -> str:
        return records.content(self.name, self.pretrained)

    def saved(self, folder: Path) -> Checkpoint:
        return OpenCLIP(str(folder))


class OpenCLIPEncoder(DualEncoder):
    """A model of open_clip with its tokenizer and its preprocessing made differentiable.

    Args:
        model: a CLIP, CustomTextCLIP or CoCa of open_clip.
        tokenizer: open_clip's own.
        preprocess: of the record.
        record: what the checkpoint was read from, which `save` writes again; None for a model that was made in memory.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, preprocess: Preprocess, record: Record | None) -> None:
        super().__init__()
        self.model: Any = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.preprocess, self.record = preprocess, record
        self.tokens = OpenTokens(tokenizer, record.length if record else None, int(self.table.num_embeddings))
        self.first = next(name for name, _ in model.named_parameters() if name.startswith("visual."))

    @property
    def table(self) -> nn.Embedding:
        """Where the text tower looks its tokens up."""
        text = getattr(self.model, "text", self.model)
        table = getattr(text, "token_embedding", None)
        return table if table is not None else text.transformer.get_input_embeddings()

    def encode_image(self, images: Images) -> Embeddings:
        return self.encode_fitted(self.fitted(images))

    def fitted(self, images: Images) -> Resized:
        return self.preprocess.fitted(images)

    def encode_fitted(self, pixels: Resized) -> Embeddings:
        pixels = self.preprocess.normalized(pixels).to(self.model.get_parameter(self.first).dtype)
        return self.model.encode_image(pixels, normalize=False)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        ids, _ = self.tokens(texts)
        return torch.cat([self._text(part) for part in ids.split(_STRINGS)])

    def _text(self, ids: Tensor) -> Embeddings:
        return self.model.encode_text(ids.to(self.table.weight.device), normalize=False)

    def splice(self, texts: Sequence[str], words: str, lists: Sequence[int] = ()) -> Splice:
        return Splice(_Spliced(self), self.tokens, None, texts, words, lists)

    def cut(self, texts: Sequence[str]) -> int:
        return self.tokens.cut(texts)

    @property
    def scale(self) -> Tensor:
        return self.model.logit_scale.exp().reshape(())

    @property
    def bias(self) -> Tensor:
        bias, scale = self.model.logit_bias, self.model.logit_scale
        return constant((0.0,), scale.device, scale.dtype)[0] if bias is None else bias.reshape(())

    def towers(self) -> dict[str, dict[str, nn.Parameter]]:
        towers: dict[str, dict[str, nn.Parameter]] = {"image": {}, "text": {}, "head": {}}
        for name, parameter in sorted(self.model.named_parameters(), key=lambda named: _stage(named[0])):
            if name.startswith("text_decoder."):  # CoCa's captioner: no embedding depends on it
                continue
            kind = "head" if name.startswith("logit_") else "image" if name.startswith("visual.") else "text"
            # The last matrices have no module of their own; by this name each is a layer like any other.
            towers[kind][f"{name}.weight" if name.endswith(_OUTPUTS) else name] = parameter
        return towers

    def save(self, folder: Path) -> None:
        """Writes a folder that open_clip reads ('local-dir:...'): weights, record, and tokenizer if it has its own."""
        if self.record is None:
            raise CrossguardError(
                "this model of open_clip was made in memory, and nothing says how to build it again; save it with "
                "open_clip, and give OpenCLIP('folder')"
            )
        with staging(folder) as stage:
            held = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                    for name, value in self.model.state_dict().items()}  # fmt: skip
            save_tensors(stage / OPEN_CLIP_WEIGHTS, held, {"format": "pt"})
            write(stage / RECORD, json.dumps(self.record.content(), indent=2) + "\n")
            self.tokens.save(stage)


_OUTPUTS = (".proj", "text_projection")


def _stage(name: str) -> int:
    """Where in a tower a parameter is: before its blocks, in them, or behind them."""
    inside = name.removeprefix("visual.").removeprefix("text.")
    if inside.startswith(("class_embedding", "positional_embedding", "token_embedding", "cls_emb", "conv1.")):
        return 0
    return 2 if inside.startswith("text_projection") or inside == "proj" else 1


class OpenTokens:
    """The ids of strings as open_clip reads them: always as many as the context, and without a mask (`Tokens`).

    Args:
        tokenizer: SimpleTokenizer, HFTokenizer or SigLipTokenizer of open_clip.
        length: the most tokens of a string; that of the tokenizer, if not given.
        rows: how many tokens the tower has an embedding for.
    """

    padded = True

    def __init__(self, tokenizer: Any, length: int | None, rows: int) -> None:
        self.tokenizer, self.rows = tokenizer, rows
        self.length = int(length or tokenizer.context_length)
        self.inner = getattr(tokenizer, "tokenizer", None)  # of `transformers`
        self.turn = threading.Lock()  # it is told how to cut and to pad before it is asked

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and a mask of ones, each of shape (strings, tokens), on the CPU."""
        with self.turn, tokenizing(texts):
            ids = self.tokenizer(list(texts), context_length=self.length) if texts else self._none()
        if ids.numel() and int(ids.max()) >= self.rows:
            raise CrossguardError(
                f"the tokenizer writes a token as number {int(ids.max()):,}, and the text tower has {self.rows:,} "
                "embeddings; fetch the tokenizer and the record from one place"
            )
        return ids, torch.ones_like(ids)

    def bare(self, words: str) -> Tensor:
        """The ids of these words alone, without special tokens."""
        return torch.tensor(self._bare(words), dtype=torch.long)

    def cut(self, texts: Sequence[str]) -> int:
        """How many of the strings have more tokens than are read."""
        return sum(len(self._bare(text)) + self._special > self.length for text in texts)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer, if it is none that open_clip has by itself."""
        if self.inner is not None:
            Tokens(self.inner, self.length, True).save(folder)

    def _none(self) -> Tensor:
        return torch.zeros(0, self.length, dtype=torch.long)

    def _bare(self, text: str) -> list[int]:
        with self.turn, tokenizing([text]):
            if self.inner is None:
                return self.tokenizer.encode(text)
            clean = getattr(self.tokenizer, "clean_fn", None) or _canonical
            return self.inner(clean(text), add_special_tokens=False)["input_ids"]

    @property
    def _special(self) -> int:
        """How many tokens are written around a string."""
        if self.inner is None:
            return 2
        if getattr(self.tokenizer, "tokenizer_mode", "") == "clips":
            return 3
        return self.inner.num_special_tokens_to_add()


def _canonical(text: str) -> str:
    """What a SigLipTokenizer of open_clip makes of a text before it reads it."""
    return records.library().tokenizer.get_clean_fn("canonicalize")(text)


class _Spliced:
    """A model of open_clip as a `Splice` asks for one of `transformers`."""

    def __init__(self, encoder: OpenCLIPEncoder) -> None:
        text = getattr(encoder.model, "text", None)
        inside = getattr(text, "transformer", None) if text is not None else encoder.model.transformer
        blocks = getattr(inside, "resblocks", None)
        config = getattr(inside, "config", None)
        width = encoder.table.embedding_dim
        self.config = SimpleNamespace(
            text_config=config
            if blocks is None
            else SimpleNamespace(
                hidden_size=width, num_hidden_layers=len(blocks), num_attention_heads=max(1, width // 64)
            )
        )
        self.text_model = SimpleNamespace(
            get_input_embeddings=lambda: encoder.table,
            encoder=SimpleNamespace(layers=blocks) if blocks is not None else getattr(inside, "encoder", None),
            parameters=lambda: encoder.towers()["text"].values(),
        )
        self._read = encoder._text

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        return self._read(input_ids)


def opened(record: Record) -> DualEncoder:
    """The network of a record, after it was asked about a few texts and an image."""
    model = record.network()
    tokenizer = record.tokenizer()
    with naming(record.shown), torch.no_grad():
        preprocess = preprocessing(record.preprocess, model.visual.image_size, record.shown)
        encoder = OpenCLIPEncoder(model, tokenizer, preprocess, record).eval()
        texts = encoder.encode_text(PROBES)
        check_texts(texts, record.shown)
        seen = encoder.encode_image(torch.full((1, 3, preprocess.height, preprocess.width), 0.5))
        check_images(seen, texts, record.shown)
    return encoder


def preprocessing(told: dict[str, Any], size: Any, shown: str) -> Preprocess:
    """open_clip's preparation of images for evaluation (`image_transform`), differentiable.

    Args:
        told: mean, std, interpolation, resize_mode and fill_color, where they are not open_clip's defaults.
        size: of the images that the tower reads.
    """
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = (told.get(part) or usual for part, usual in zip(("mean", "std"), _OPENAI, strict=True))
    mean, std = (value if isinstance(value, list | tuple) else (value,) * 3 for value in (mean, std))
    mean, std = normalization(mean, std, f"the record of {shown}")
    mode, resize = told.get("interpolation") or "bicubic", told.get("resize_mode") or "shortest"
    if mode not in ("bicubic", "bilinear", "random") or resize not in ("shortest", "longest", "squash"):
        raise CrossguardError(
            f"the record of {shown} resizes {resize!r:.40} by {mode!r:.40}; known are shortest, longest and squash by "
            "bicubic and bilinear"
        )
    mode = "bilinear" if mode == "bilinear" else "bicubic"
    fill = float(told.get("fill_color") or 0) / 255.0
    if resize == "squash":
        return Preprocess(height, width, None, mean, std, mode)
    if resize == "longest":
        return Preprocess(height, width, None, mean, std, mode, fit="inside", fill=fill, rounds=True)
    if height != width:  # open_clip forgets the interpolation here, and so takes its default
        return Preprocess(height, width, None, mean, std, "bicubic", fit="cover", rounds=True)
    return Preprocess(height, width, height, mean, std, mode, rounds=True)
