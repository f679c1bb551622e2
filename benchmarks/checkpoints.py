"""Checkpoints that benchmarks make for themselves, with random weights: what they measure is time."""

from __future__ import annotations

from pathlib import Path

import torch

from crossguard import HuggingFace
from crossguard.attacks.candidates import EMBEDDED


def b32(folder: Path) -> HuggingFace:
    """A CLIP with a text tower of the size of that of ViT-B/32, and next to no image tower."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
            "num_attention_heads": 8, "max_position_embeddings": 77, "eos_token_id": tokenizer.sep_token_id,
            "bos_token_id": tokenizer.cls_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16,
        },
        projection_dim=512,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return HuggingFace(str(folder))
