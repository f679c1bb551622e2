"""Checkpoints that benchmarks make for themselves, with random weights: what they measure is time."""

from __future__ import annotations

from pathlib import Path

import torch

from crossguard import HuggingFace
from crossguard.attacks.candidates import EMBEDDED


def b32(folder: Path) -> HuggingFace:
    """A CLIP with a text tower of the size of that of ViT-B/32, and next to no image tower."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    image = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return _clip(folder, text, image, 32, 512)


def both(folder: Path) -> HuggingFace:
    """A CLIP with two towers of twelve layers of a quarter of the width of ViT-B/16, for images of 112 pixels."""
    tower = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3}
    return _clip(folder, tower, tower, 112, 128)


def both_b32(folder: Path) -> HuggingFace:
    """A CLIP with two towers of the size of those of ViT-B/32, for images of 224 pixels."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    image = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return _clip(folder, text, image | {"patch_size": 32}, 224, 512)


def _clip(folder: Path, text: dict[str, int], image: dict[str, int], size: int, dimensions: int) -> HuggingFace:
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    config = transformers.CLIPConfig(
        text_config=text | {
            "vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.sep_token_id,
            "bos_token_id": tokenizer.cls_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={"patch_size": 16} | image | {"image_size": size},
        projection_dim=dimensions,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return HuggingFace(str(folder))
