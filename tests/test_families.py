"""Dual encoders of transformers: each family answers as transformers' own code; what is none says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from crossguard.errors import CrossguardError
from crossguard.models.huggingface import HuggingFace, TransformersEncoder
from fixtures import TOWER, floats, pictures, save_clip, save_metaclip, save_siglip, save_tokenizer

TEXTS = ["a photo of a red circle", "square", "the picture of two blue stars and a green box"]
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
SQUARE = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """Settings of a text tower that ends its texts with this tokenizer's [SEP]."""
    return {
        **TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 3, **more,
    }  # fmt: skip


def align(folder: Path) -> Any:
    tokenizer = save_tokenizer(folder)
    # As in the released checkpoint: stretched, cropped, bilinear, and from -1 to 1.
    EfficientNetImageProcessorPil(
        size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}, do_center_crop=True, resample=2,
        rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False, include_top=False,
    ).save_pretrained(folder)  # fmt: skip
    stages: dict[str, Any] = {
        "kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 32], "strides": [1, 2],
        "expand_ratios": [1, 2], "num_block_repeats": [1, 1], "depthwise_padding": [],
    }  # fmt: skip
    vision = {"image_size": 32, "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 32, **stages}
    config = transformers.AlignConfig(
        text_config=text(tokenizer), vision_config=vision, projection_dim=32, temperature_init_value=0.07
    )
    return transformers.AlignModel(config)


def altclip(folder: Path) -> Any:
    tokenizer = save_tokenizer(folder)
    SQUARE.save_pretrained(folder)
    words = text(tokenizer, project_dim=32, max_position_embeddings=40)
    config = transformers.AltCLIPConfig(text_config=words, vision_config=VISION, projection_dim=16)
    return transformers.AltCLIPModel(config)


def chinese_clip(folder: Path) -> Any:
    tokenizer = save_tokenizer(folder)
    SQUARE.save_pretrained(folder)
    config = transformers.ChineseCLIPConfig(text_config=text(tokenizer), vision_config=VISION, projection_dim=16)
    return transformers.ChineseCLIPModel(config)


def clipseg(folder: Path) -> Any:
    """Saved with its decoder, as it is published; its images are larger than those that the tower was built for."""
    tokenizer = save_tokenizer(folder)
    ViTImageProcessorPil(size={"height": 40, "width": 40}).save_pretrained(folder)
    config = transformers.CLIPSegConfig(
        text_config=text(tokenizer), vision_config=VISION, projection_dim=16, extract_layers=[0, 1], reduce_dim=8,
        decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    return transformers.CLIPSegForImageSegmentation(config)


def groupvit(folder: Path) -> Any:
    tokenizer = save_tokenizer(folder)
    SQUARE.save_pretrained(folder)
    vision = {**VISION, "depths": [1, 1, 1], "num_group_tokens": [4, 4, 0], "num_output_groups": [4, 4, 0]}
    config = transformers.GroupViTConfig(
        text_config=text(tokenizer), vision_config=vision, projection_dim=16, projection_intermediate_dim=24
    )
    return transformers.GroupViTModel(config)


def owlvit(folder: Path) -> Any:
    tokenizer = save_tokenizer(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    config = transformers.OwlViTConfig(text_config=text(tokenizer), vision_config=VISION, projection_dim=16)
    return transformers.OwlViTModel(config)


def aimv2(folder: Path) -> Any:
    tokenizer = save_tokenizer(folder)
    SQUARE.save_pretrained(folder)
    config = transformers.Aimv2Config(text_config=text(tokenizer), vision_config=VISION, projection_dim=16)
    return transformers.Aimv2Model(config)


FAMILIES = {make.__name__: make for make in (align, altclip, chinese_clip, clipseg, groupvit, owlvit, aimv2)}
SAVED: dict[str, Callable[[Path], Path]] = {"clip": save_clip, "metaclip_2": save_metaclip, "siglip": save_siglip}


def saved(name: str, folder: Path) -> Any:
    """A random checkpoint of a family, as transformers saves it; the model that transformers reads there."""
    torch.manual_seed(0)
    if name in SAVED:
        SAVED[name](folder)
    else:
        model = FAMILIES[name](folder)
        with torch.no_grad():
            for parameter in model.parameters():  # as they are made, images of ALIGN vanish
                parameter.add_((0.5 if name == "align" else 0.1) * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return transformers.AutoModel.from_pretrained(folder).eval()


def pooled(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.pooler_output


@pytest.mark.parametrize("name", [*FAMILIES, *SAVED])
def test_embeddings_and_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    stock = saved(name, tmp_path)
    network = HuggingFace(str(tmp_path)).load()
    assert isinstance(network, TransformersEncoder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    side = 40 if name in ("align", "clipseg") else 32  # nothing is resized, so nothing is rounded to 8 bits
    images = pictures(3, side, side)
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    padding: dict[str, Any] = {"padding": "max_length", "max_length": 64} if name == "siglip" else {"padding": True}
    padding |= {} if name == "siglip" else {"truncation": True, "max_length": network.length}
    ids = tokenizer(TEXTS, return_tensors="pt", return_token_type_ids=False, **padding)
    if name == "siglip":
        ids.pop("attention_mask")
    with torch.no_grad():
        found, words = network.encode_image(floats(images)), network.encode_text(TEXTS)
        expected, said = pooled(stock.get_image_features(pixel_values=pixels)), pooled(stock.get_text_features(**ids))
        assert expected.std(0).max() > 1e-4 and said.std(0).max() > 1e-4
        assert torch.allclose(found, expected, atol=1e-5), (found - expected).abs().max()
        assert torch.allclose(words, said, atol=1e-5), (words - said).abs().max()
        logits = stock(pixel_values=pixels, **ids).logits_per_image
        assert torch.allclose(network.logits(found, words), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_towers_hold_every_parameter_once_and_are_told_apart(name: str, tmp_path: Path) -> None:
    stock = saved(name, tmp_path)
    network = HuggingFace(str(tmp_path)).load().requires_grad_(True)
    towers = network.towers()
    named = [name for tower in towers.values() for name in tower]
    assert sorted(named) == sorted(name for name, _ in stock.named_parameters())
    assert list(towers["head"]) == ["temperature" if name == "align" else "logit_scale"]
    image, words = network.encode_image(floats(pictures(2, 32, 32))).sum(), network.encode_text(TEXTS).sum()
    image.backward()
    assert {key for key, one in network.model.named_parameters() if one.grad is not None} <= set(towers["image"])
    network.zero_grad(set_to_none=True)
    words.backward()
    assert {key for key, one in network.model.named_parameters() if one.grad is not None} <= set(towers["text"])


@pytest.mark.parametrize("name", ["align", "altclip"])
def test_they_are_saved_in_their_own_format(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "a")
    network = HuggingFace(str(tmp_path / "a")).load()
    network.save(tmp_path / "b")
    again = HuggingFace(str(tmp_path / "b")).load()
    images = floats(pictures(2, 50, 40))
    assert torch.equal(again.encode_image(images), network.encode_image(images))
    assert torch.equal(again.scale, network.scale)


def refused(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    with pytest.raises(CrossguardError) as told:
        HuggingFace(str(folder)).load()
    assert len(str(told.value)) <= 320
    return str(told.value)


def test_what_is_no_dual_encoder_says_what_it_is(tmp_path: Path) -> None:
    bert = transformers.BertModel(transformers.BertConfig(**TOWER, vocab_size=30))
    assert "holds a 'bert' model, a language model, which is no dual encoder" in refused(tmp_path / "a", bert)
    vit = transformers.ViTModel(transformers.ViTConfig(**VISION))
    assert "holds a 'vit' model, which reads images alone, which is no dual encoder" in refused(tmp_path / "b", vit)
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    assert "the image tower of a 'clip' model alone, which is no dual encoder" in refused(tmp_path / "c", tower)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = {**sizes, "model_type": "opt", "vocab_size": 40, "ffn_dim": 32, "word_embed_proj_dim": 32}
    former = {**TOWER, "encoder_hidden_size": 32, "vocab_size": 40}
    blip = transformers.Blip2Config(
        vision_config=VISION, text_config=language, qformer_config=former, num_query_tokens=2
    )
    assert "blip-2" in (told := refused(tmp_path / "d", transformers.Blip2Model(blip))) and "dual encoder" in told
    words, patches = {**TOWER, "vocab_size": 30, "projection_size": 32}, {**TOWER, "patch_size": 8}
    naflex = transformers.Siglip2Model(transformers.Siglip2Config(text_config=words, vision_config=patches))
    assert "SigLIP 2 NaFlex" in refused(tmp_path / "e", naflex)
