"""Tiny models with random weights in stock formats, and a small dataset, for tests of models and training."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from crossguard.data import Dataset
from crossguard.models.fresh import Fresh
from crossguard.shapes import Labels

WORDS = "a an the photo picture of red green blue circle square star disc box thing two and".split()  # noqa: SIM905
TOWER: dict[str, int] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def save_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words with BERT's special ones."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return fast


def save_clip(folder: Path, seed: int = 0, size: int = 32, **sizes: Any) -> Path:
    """A CLIP with its own byte-level tokenizer (letters only) and its own image processor."""
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)
    tower = TOWER | sizes
    config = transformers.CLIPConfig(
        text_config=tower | {
            "vocab_size": len(vocabulary), "max_position_embeddings": 24, "bos_token_id": 52, "eos_token_id": 53,
            "pad_token_id": 53,
        },
        vision_config=tower | {"image_size": size, "patch_size": 8},
        projection_dim=16, logit_scale_init_value=3.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder


def save_metaclip(folder: Path) -> Path:
    """A MetaCLIP 2 whose end-of-text is the token 2, as in the released weights; here that calls for no rule of old."""
    tokenizer = save_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[SEP] $A [CLS]", special_tokens=[("[SEP]", 3), ("[CLS]", 2)]
    )
    tokenizer.save_pretrained(folder)
    config = transformers.MetaClip2Config(
        text_config=TOWER | {
            "vocab_size": len(tokenizer), "max_position_embeddings": 24, "bos_token_id": 3, "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MetaClip2Model(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_siglip(folder: Path, seed: int = 0) -> Path:
    """A SigLIP: no mask, texts padded to the context, a bias on the logits, images squeezed to a square."""
    tokenizer = save_tokenizer(folder)
    config = transformers.SiglipConfig(
        text_config=TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0},
        vision_config=TOWER | {"image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(seed)
    model = transformers.SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.5)
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def small(tokenizer: Path, seed: int = 0, size: int = 16) -> Fresh:
    """A dual encoder of a few thousand parameters that trains in milliseconds."""
    return Fresh(
        tokenizer=str(tokenizer), size=size, widths=(8, 16), depths=(1, 1), text_width=32, text_layers=2,
        dimensions=12, seed=seed,
    )  # fmt: skip


def change_config(folder: Path, **changes: Any) -> None:
    """Rewrites fields of config.json; `text_config__x` reaches into a part."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, inner = name.rpartition("__")
        (config[part] if part else config)[inner] = value
    path.write_text(json.dumps(config))


@dataclass(frozen=True)
class Blots(Dataset):
    """Random images of three classes, with two captions each; nothing to learn, but always the same.

    Args:
        order: the samples in this order, to show that nothing depends on it.
    """

    count: int = 24
    size: int = 16
    order: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.order) or self.count

    @property
    def names(self) -> tuple[str, ...]:
        return ("red circle", "green square", "blue star")

    def place(self, index: int) -> int:
        return self.order[index] if self.order else index

    def id(self, index: int) -> str:
        return f"blot-{self.place(index)}"

    def image(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.place(index))
        return torch.randint(0, 256, (3, self.size, self.size), generator=generator, dtype=torch.uint8)

    def labels(self) -> Labels:
        return torch.tensor([self.place(index) * 7 % 5 % 3 for index in range(len(self))])

    def captions(self, index: int) -> tuple[str, ...]:
        name = self.names[int(self.labels()[index])]
        return (f"a {name}", f"the picture of {name}")


def pictures(count: int, height: int, width: int, low: int = 0, high: int = 255, seed: int = 0) -> Tensor:
    """Noise as uint8: the worst case of any resize."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def floats(images: Tensor) -> Tensor:
    return images.to(torch.float32) / 255.0


def tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
