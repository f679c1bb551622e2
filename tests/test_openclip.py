"""open_clip's own models, read from what open_clip writes, against open_clip itself (`open_clips` says how it runs)."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import crossguard
import open_clips
from crossguard import PGD, SGD, Interpolated, Linf, Live, OpenCLIP, RobustEncoder, TeCoA, ZeroShot, evaluate, records
from crossguard.errors import CrossguardError
from crossguard.models.huggingface import HuggingFace
from crossguard.models.openclip import OpenCLIPEncoder, preprocessing
from fixtures import TOWER, WORDS, Blots, floats, pictures, save_clip, save_tokenizer

open_clip = open_clips.package()

TEXTS = ("a red circle", "two green squares on a table", "", "Blue STAR!")
VIT = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
CUSTOM = {"clean": "canonicalize"}
WORDY = {**TEXT, "vocab_size": 40, "context_length": 20, "hf_tokenizer_name": "nobody/words"}


@dataclass(frozen=True)
class Kind:
    """A small model of open_clip.

    Args:
        model: what open_clip builds it from.
        preprocess: what differs from open_clip's usual preparation of images.
        words: whether it has a tokenizer of its own.
    """

    model: dict[str, Any]
    preprocess: dict[str, Any] = field(default_factory=dict)
    words: bool = False


def model(vision: dict[str, Any] = VIT, text: dict[str, Any] = TEXT, **more: Any) -> dict[str, Any]:
    return {"embed_dim": 32, "vision_cfg": dict(vision), "text_cfg": dict(text)} | more


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
HF = {"hf_tokenizer_name": "nobody/bert", "hf_model_name": "nobody/bert", "hf_proj_type": "mlp", "context_length": 24}
TIMM = {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 64}
POOLED = {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
CAPTIONED = {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True}
SIGLIP = {**WORDY, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "tokenizer_kwargs": CUSTOM}

KINDS = {
    "ViT": Kind(model(), {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}),
    "ViT with QuickGELU": Kind(model(quick_gelu=True), {"interpolation": "bilinear"}),
    "RN50": Kind(model(RESNET), {"resize_mode": "squash"}),
    "ConvNeXt": Kind(model(TIMM), {"mean": 0.5, "std": 0.5}),
    "CoCa": Kind(model(POOLED, CAPTIONED, custom_text=True, multimodal_cfg={**TEXT, "attn_pooler_heads": 2})),
    "SigLIP": Kind(model(text=SIGLIP, custom_text=True, init_logit_bias=-10.0), {"resize_mode": "squash"}, True),
    "BiomedCLIP": Kind(model(text=HF), {"resize_mode": "longest", "fill_color": 255}, True),
    "wide": Kind(model({**VIT, "image_size": [32, 48]})),
}


def write(folder: Path, kind: Kind, seed: int = 0) -> Any:
    """Saves a model as open_clip does, and returns it."""
    folder.mkdir()
    told = json.loads(json.dumps(kind.model))
    torch.manual_seed(seed)
    built, text = json.loads(json.dumps(told)), None
    if "hf_model_name" in told["text_cfg"]:
        config = transformers.BertConfig(vocab_size=40, max_position_embeddings=64, pad_token_id=0, **TOWER)
        config.save_pretrained(folder.parent / f"{folder.name}-bert")
        text = json.loads((folder.parent / f"{folder.name}-bert" / "config.json").read_text())
        built["text_cfg"] |= {"hf_model_name": str(folder.parent / f"{folder.name}-bert"), "hf_model_pretrained": False}
    custom = built.pop("custom_text", False) or text is not None
    family = open_clip.CoCa if "multimodal_cfg" in built else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    network = family(**built).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # some are zero, or whatever the memory held
            parameter.copy_(parameter.nan_to_num(0.0, 0.0, 0.0).clamp(-10, 10) + 0.05 * torch.randn_like(parameter))
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    record = {"model_cfg": told, "preprocess_cfg": kind.preprocess} | ({"text_config": text} if text else {})
    (folder / "open_clip_config.json").write_text(json.dumps(record))
    if kind.words:
        save_tokenizer(folder)
    return network


def transform(kind: Kind, network: Any) -> Any:
    """How open_clip prepares an image of Pillow's for this model."""
    merged = open_clip.transform.merge_preprocess_dict({}, kind.preprocess | {"size": network.visual.image_size})
    return open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**merged), is_train=False)


def read_by(kind: Kind, folder: Path) -> Any:
    """open_clip's own tokenizer of a folder."""
    context = kind.model["text_cfg"]["context_length"]
    if kind.words:
        return open_clip.tokenizer.HFTokenizer(
            str(folder), context_length=context, **kind.model["text_cfg"].get("tokenizer_kwargs", {})
        )
    return open_clip.tokenizer.SimpleTokenizer(context_length=context)


def pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(one.permute(1, 2, 0))) for one in images]


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal within 1e-4, and within a hundredth of what tells one sample from another."""
    return float((found - expected).abs().max()) <= min(1e-4, 1e-2 * float(expected.std(0).max()))


def refused(ask: Callable[[], Any]) -> str:
    with pytest.raises(CrossguardError) as told:
        ask()
    assert len(str(told.value)) <= 320 and "\n" not in str(told.value)
    return str(told.value)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    file = folder / "open_clip_config.json"
    told = json.loads(file.read_text())
    change(told)
    file.write_text(json.dumps(told))
    return str(folder)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open_clip") / "vit"
    write(folder, KINDS["ViT"])
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_embeddings_are_open_clip_s(name: str, tmp_path: Path) -> None:
    """Of images of the model's own size and of texts, in eval mode; scale and bias too; read back by open_clip."""
    kind, folder = KINDS[name], tmp_path / "model"
    network = write(folder, kind)
    ours = OpenCLIP(str(folder)).load()
    assert isinstance(ours, OpenCLIPEncoder)
    height, width = ours.preprocess.height, ours.preprocess.width
    images, prepare = pictures(3, height, width), transform(kind, network)
    prepared = torch.stack([prepare(one) for one in pil(images)])
    with torch.no_grad():
        found, expected = ours.encode_image(floats(images)), network.encode_image(prepared, normalize=False)
        assert near(found, expected)
        expected = network.encode_text(read_by(kind, folder)(list(TEXTS)), normalize=False)
        assert near(ours.encode_text(TEXTS), expected)
        assert torch.allclose(ours.scale, network.logit_scale.exp())
        assert float(ours.bias) == (0.0 if network.logit_bias is None else float(network.logit_bias))

    ours.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "open_clip_model.safetensors")
    assert again.keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.items())
    assert torch.equal(OpenCLIP(str(tmp_path / "again")).load().encode_text(TEXTS), ours.encode_text(TEXTS))
    if "hf_model_name" in kind.model["text_cfg"]:
        return  # open_clip would look up the text tower's configuration on the hub
    theirs = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'again'}", return_transform=False).eval()
    with torch.no_grad():
        assert torch.allclose(theirs.encode_image(prepared, normalize=False), found, atol=1e-4)
        ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'again'}")(list(TEXTS))
        assert torch.allclose(theirs.encode_text(ids, normalize=False), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["ViT", "ViT with QuickGELU", "RN50", "BiomedCLIP", "wide"])
@pytest.mark.parametrize("size", [(41, 67), (75, 40), (20, 33), (32, 35)])
def test_images_of_other_sizes_are_prepared_as_open_clip_does(name: str, size: tuple[int, int]) -> None:
    kind = KINDS[name]
    side = kind.model["vision_cfg"]["image_size"]
    ours = preprocessing(kind.preprocess, side if isinstance(side, int) else tuple(side), "x")
    settings = kind.preprocess | {"size": side if isinstance(side, int) else tuple(side)}
    merged = open_clip.transform.merge_preprocess_dict({}, settings)
    theirs = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**merged), is_train=False)
    images = pictures(4, *size, low=60, high=200)
    expected = torch.stack([theirs(one) for one in pil(images)])
    difference = (ours(floats(images)) - expected).abs() * torch.tensor(ours.std).view(1, 3, 1, 1)
    assert float(difference.max()) <= 1.1 / 255.0


def test_a_bare_file_of_weights(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the name of its architecture; a record beside it says how images are prepared, else open_clip does."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", KINDS["ViT"].model)
    file = tmp_path / "weights.safetensors"
    shutil.copy(vit / "open_clip_model.safetensors", file)
    theirs = open_clip.create_model("tiny-vit", pretrained=str(file)).eval()
    prepare, images = transform(Kind({}), theirs), pictures(2, 32, 32)
    word = OpenCLIP("tiny-vit", str(file))
    with torch.no_grad():
        expected = theirs.encode_image(torch.stack([prepare(one) for one in pil(images)]))
        assert torch.allclose(word.load().encode_image(floats(images)), expected, atol=1e-4)
    beside = OpenCLIP("tiny-vit", str(vit / "open_clip_model.safetensors")).load()
    whole = OpenCLIP(str(vit)).load()
    assert torch.equal(beside.encode_image(floats(images)), whole.encode_image(floats(images)))
    assert not torch.allclose(whole.encode_image(floats(images)), expected, atol=1e-4)
    before = word.fingerprint
    save_file({name: value + 1.0 for name, value in load_file(file).items()}, file)
    assert before and word.fingerprint != before


def test_the_fingerprint_is_of_record_weights_and_words(tmp_path: Path) -> None:
    write(tmp_path / "a", KINDS["SigLIP"])
    word = OpenCLIP(str(tmp_path / "a"))
    seen = [word.fingerprint]
    edit(tmp_path / "a", lambda told: told["preprocess_cfg"].update(mean=[0.1, 0.1, 0.1]))
    seen.append(word.fingerprint)
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    seen.append(word.fingerprint)
    (tmp_path / "a" / "README.md").write_text("nothing")
    assert word.fingerprint == seen[-1] and len(set(seen)) == 3 and all(seen)
    (tmp_path / "a" / "open_clip_model.safetensors").unlink()
    assert word.fingerprint == ""


def quick_clip(folder: Path) -> dict[str, torch.Tensor]:
    """A CLIP of transformers whose parts open_clip has too, as the weights that open_clip would have."""
    save_clip(folder, size=32, hidden_size=64, num_attention_heads=2, intermediate_size=256, hidden_act="quick_gelu")
    held = load_file(folder / "model.safetensors")
    renamed = {"visual.proj": held["visual_projection.weight"].T, "text_projection": held["text_projection.weight"].T}
    for theirs, ours in (
        ("logit_scale", "logit_scale"),
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ):
        renamed[ours] = held[theirs]
    norms = {"vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm": "visual.ln_post",
             "text_model.final_layer_norm": "ln_final"}  # fmt: skip
    for tower, place in (("vision_model", "visual."), ("text_model", "")):
        for layer in range(2):
            source, target = f"{tower}.encoder.layers.{layer}", f"{place}transformer.resblocks.{layer}"
            norms |= {f"{source}.layer_norm{number}": f"{target}.ln_{number}" for number in (1, 2)}
            norms |= {f"{source}.mlp.fc1": f"{target}.mlp.c_fc", f"{source}.mlp.fc2": f"{target}.mlp.c_proj"}
            norms[f"{source}.self_attn.out_proj"] = f"{target}.attn.out_proj"
            for part in ("weight", "bias"):
                three = [held[f"{source}.self_attn.{name}_proj.{part}"] for name in "qkv"]
                renamed[f"{target}.attn.in_proj_{part}"] = torch.cat(three)
    for source, target in norms.items():
        renamed |= {f"{target}.{part}": held[f"{source}.{part}"] for part in ("weight", "bias")}
    return {name: value.clone().contiguous() for name, value in renamed.items()}


def test_both_families_agree_on_the_same_weights(tmp_path: Path) -> None:
    weights = quick_clip(tmp_path / "hf")
    text = TEXT | {
        "vocab_size": 54,
        "context_length": 24,
        "hf_tokenizer_name": "nobody/clip",
        "pool_type": "eos",
        "eos_id": 53,
    }
    told = model(VIT, text, quick_gelu=True) | {"embed_dim": 16, "custom_text": True}
    folder = tmp_path / "oc"
    folder.mkdir()
    prefixed = {
        name if name.startswith(("visual.", "logit")) else f"text.{name}": value for name, value in weights.items()
    }
    save_file(prefixed, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": told, "preprocess_cfg": {}}))
    for file in (tmp_path / "hf").glob("*token*"):
        shutil.copy(file, folder)
    theirs, ours = HuggingFace(str(tmp_path / "hf")).load(), OpenCLIP(str(folder)).load()
    images, texts = floats(pictures(3, 32, 32)), ["a red box", "the sky"]
    with torch.no_grad():
        assert torch.allclose(ours.encode_image(images), theirs.encode_image(images), atol=1e-5)
        assert torch.allclose(ours.encode_text(texts), theirs.encode_text(texts), atol=1e-5)
        assert torch.allclose(
            ours.logits(ours.encode_image(images), ours.encode_text(texts)),
            theirs.logits(theirs.encode_image(images), theirs.encode_text(texts)),
            atol=1e-4,
        )


@pytest.mark.parametrize("name", ["ViT", "SigLIP"])
def test_it_is_trained_and_stays_open_clip_s(name: str, tmp_path: Path) -> None:
    kind, base = KINDS[name], tmp_path / "base"
    write(base, kind)
    recipe = TeCoA(steps=2, batch=8, optimizer=SGD(lr=0.1), warmup=0)
    trained = recipe.fit(OpenCLIP(str(base)), Blots(16, 32), tmp_path / "out")
    assert trained == OpenCLIP(str(tmp_path / "out"))
    assert recipe.fit(OpenCLIP(str(base)), Blots(16, 32), tmp_path / "out") == trained  # finished: found again
    before, after = (load_file(folder / "open_clip_model.safetensors") for folder in (base, tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "visual.proj" in moved and all(name.startswith("visual.") for name in moved)
    assert "library_name: open_clip" in (tmp_path / "out" / "README.md").read_text()
    theirs = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}", return_transform=False).eval()
    prepared = torch.stack([transform(kind, theirs)(one) for one in pil(pictures(2, 32, 32))])
    with torch.no_grad():
        expected = theirs.encode_image(prepared)
        assert torch.allclose(trained.load().encode_image(floats(pictures(2, 32, 32))), expected, atol=1e-4)


def test_the_last_layer_of_a_tower_is_its_last(vit: Path) -> None:
    towers = OpenCLIP(str(vit)).load().towers()
    for tower, first, last in (("image", "visual.", "visual.proj.weight"), ("text", "", "text_projection.weight")):
        names = list(towers[tower])
        assert names[-1] == last and names.index(f"{first}transformer.resblocks.1.ln_1.weight") < len(names) - 3
        assert names[0] in ("visual.class_embedding", "positional_embedding")
    assert list(towers["head"]) == ["logit_scale"]


def test_a_captioner_is_kept_and_no_part_of_a_tower(tmp_path: Path) -> None:
    network = write(tmp_path / "coca", KINDS["CoCa"])
    ours = OpenCLIP(str(tmp_path / "coca")).load()
    named = {name for tower in ours.towers().values() for name in tower}
    assert not any("text_decoder" in name for name in named)
    assert sum(parameter.numel() for tower in ours.towers().values() for parameter in tower.values()) == sum(
        parameter.numel() for name, parameter in network.named_parameters() if "text_decoder" not in name
    )


@pytest.mark.parametrize("name", ["ViT", "CoCa", "SigLIP", "BiomedCLIP"])
def test_learned_tokens(name: str, tmp_path: Path) -> None:
    write(tmp_path / "model", KINDS[name])
    network = OpenCLIP(str(tmp_path / "model")).load()
    splice = network.splice(["a photo of red", "blue"], "a photo of")
    plain = network.encode_text(["a photo of red", "a photo of blue"])
    assert torch.allclose(splice(splice.start), plain, atol=1e-5)
    context = torch.stack([splice.start, torch.randn_like(splice.start)]).requires_grad_()
    found = splice(context)
    assert found.shape == (2, 2, 32) and not torch.allclose(found[0], found[1], atol=1e-3)
    (gradient,) = torch.autograd.grad(found.sum(), context)
    assert gradient.abs().amax((1, 2)).min() > 0
    other = torch.cat([splice.start, torch.randn_like(splice.start)])
    both = network.splice(["a photo of red", "blue"], "a photo of", [0, 1])(other)
    assert torch.allclose(both[0], plain[0], atol=1e-5) and not torch.allclose(both[1], plain[1], atol=1e-3)
    deep = splice.begun(splice.start, torch.randn_like(splice.start)[None])
    if name == "CoCa":
        assert "reads other tokens than it is given" in refused(lambda: deep(splice.start))
    else:
        assert not torch.allclose(deep(splice.start), plain, atol=1e-3)


def test_pixels_of_the_model_s_size_are_half_of_the_way(vit: Path) -> None:
    network, images = OpenCLIP(str(vit)).load(), floats(pictures(2, 40, 50))
    assert torch.equal(network.encode_fitted(network.fitted(images)), network.encode_image(images))
    assert network.fitted(images).shape == (2, 3, 32, 32)


@pytest.mark.parametrize(("name", "fits"), [("ViT", 14), ("CoCa", 13), ("SigLIP", 18), ("BiomedCLIP", 22)])
def test_texts_beyond_the_context_are_counted(name: str, fits: int, tmp_path: Path) -> None:
    """The context less the two tokens around a text."""
    write(tmp_path / "model", KINDS[name])
    network = OpenCLIP(str(tmp_path / "model")).load()
    assert network.cut([" ".join([WORDS[2]] * count) for count in (1, fits, fits + 1, 60)]) == 2


def test_lower_precision_leaves_the_scale(vit: Path) -> None:
    word = OpenCLIP(str(vit))
    whole, cast = word.load(), word.load().cast(torch.bfloat16)
    assert cast.scale.dtype == torch.float32 and torch.equal(cast.scale, whole.scale)
    images = floats(pictures(2, 32, 32))
    assert cast.encode_image(images).dtype == torch.bfloat16
    for found, expected in (
        (cast.encode_image(images), whole.encode_image(images)),
        (cast.encode_text(TEXTS), whole.encode_text(TEXTS)),
    ):
        assert torch.nn.functional.cosine_similarity(found.float(), expected).min() > 0.99


def test_an_evaluation(vit: Path) -> None:
    report = evaluate(ZeroShot(Blots(12, 32)), OpenCLIP(str(vit)), PGD(steps=3), Linf(8 / 255))
    assert report.question["model"] == f"OpenCLIP(name='{vit}', pretrained='')"
    assert float(report.robust) <= float(report.clean)


def test_a_hub_id_is_read_from_the_cache(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--somebody--tiny"
    snapshot = folder / "snapshots" / ("1" * 40)
    shutil.copytree(vit, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    word = OpenCLIP("hf-hub:somebody/tiny")
    assert torch.equal(word.load().encode_text(TEXTS), OpenCLIP(str(vit)).load().encode_text(TEXTS))
    assert word.fingerprint == "1" * 12
    config = KINDS["ViT"].model | {"vision_cfg": KINDS["ViT"].model["vision_cfg"]}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-vit", config)
    tag = {"hf_hub": "somebody/tiny/", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "resize_mode": "shortest"}
    monkeypatch.setattr(open_clip.pretrained, "get_pretrained_cfg", lambda name, given: tag if given == "mine" else {})
    tagged, images = OpenCLIP("tiny-vit", "mine"), floats(pictures(2, 32, 32))
    assert torch.equal(tagged.load().encode_image(images), word.load().encode_image(images))
    assert tagged.fingerprint == "1" * 12
    tag["quick_gelu"] = True
    assert "give OpenCLIP('tiny-vit-quickgelu', 'mine')" in refused(tagged.load)
    assert "the hub cannot be reached" in refused(OpenCLIP("hf-hub:somebody/other").load)


def test_what_a_record_may_not_say(vit: Path, tmp_path: Path) -> None:
    def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> str:
        shutil.copytree(vit, tmp_path / name)
        return refused(OpenCLIP(edit(tmp_path / name, change)).load)

    def text(**settings: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda told: told["model_cfg"]["text_cfg"].update(settings)

    def vision(**settings: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda told: told["model_cfg"]["vision_cfg"].update(settings)

    (tmp_path / "elsewhere").mkdir()
    assert "which lies elsewhere" in changed("a", vision(timm_model_name="hf-hub:somebody/evil"))
    assert "which is no hub id and is not read" in changed("b", text(hf_model_name=str(tmp_path / "elsewhere")))
    assert "which is no hub id" in changed("c", text(hf_tokenizer_name="../elsewhere"))
    assert "'nobody/words', which is not in the hub cache" in changed("d", text(hf_tokenizer_name="nobody/words"))
    assert "only clean, strip_sep_token and language" in changed(
        "e", text(tokenizer_kwargs={"bpe_path": "/etc/passwd"})
    )
    assert "only clean, strip_sep_token and language" in changed(
        "f", text(tokenizer_kwargs={"trust_remote_code": True})
    )
    assert "code of its own, which is never run" in changed("g", text(auto_map={"AutoModel": "evil.Model"}))
    assert "far larger model than its weights" in changed("h", text(vocab_size=2**30, width=2**16))
    assert "layers" in changed("i", text(layers=2**20))
    assert "has an image_size of 0; give 1 or more" in changed("j", vision(image_size=0))
    assert "the image_size of" in changed("k", vision(image_size=10**6))
    assert "cannot build" in changed("l", text(nonsense=1))
    assert "has no vision_cfg" in changed("m", lambda told: told["model_cfg"].pop("vision_cfg"))
    assert "has no model_cfg" in changed("n", lambda told: told.pop("model_cfg"))
    assert "resizes 'sideways'" in changed("o", lambda told: told["preprocess_cfg"].update(resize_mode="sideways"))
    assert "three positive numbers" in changed("p", lambda told: told["preprocess_cfg"].update(std=[0.1, 0, 0.1]))
    assert "and its architecture wants (9, 64)" in changed("r", text(context_length=9))
    assert "lack 12 tensors" in changed("s", text(layers=3))
    assert "has no place for" in changed("t", text(layers=1))


def test_weights_of_another_kind_are_told(vit: Path, tmp_path: Path) -> None:
    held = load_file(vit / "open_clip_model.safetensors")

    def told(name: str, tensors: dict[str, torch.Tensor]) -> str:
        shutil.copytree(vit, tmp_path / name)
        save_file(tensors, tmp_path / name / "open_clip_model.safetensors")
        return refused(OpenCLIP(str(tmp_path / name)).load)

    tower = {name.removeprefix("visual."): value for name, value in held.items() if name.startswith("visual.")}
    assert "they are the image tower of a CLIP in the layout of OpenAI and open_clip" in told("tower", tower)
    save_clip(tmp_path / "hf")
    assert "they are a CLIP of transformers, which HuggingFace reads" in told(
        "hf2", load_file(tmp_path / "hf" / "model.safetensors")
    )
    damaged = {name: value * float("nan") if name == "visual.proj" else value for name, value in held.items()}
    assert "'visual.proj' holds NaN" in told("nan", damaged)
    shutil.copytree(vit, tmp_path / "module")
    save_file(
        {f"module.{name}": value for name, value in held.items()}, tmp_path / "module" / "open_clip_model.safetensors"
    )
    expected = OpenCLIP(str(vit)).load().encode_text(TEXTS)
    assert torch.equal(OpenCLIP(str(tmp_path / "module")).load().encode_text(TEXTS), expected)


def test_old_names_of_text_towers_are_known(vit: Path, tmp_path: Path) -> None:
    """A CLIP of before open_clip 2.0, where the text tower is wanted in a module of its own."""
    shutil.copytree(vit, tmp_path / "old")
    word = OpenCLIP(edit(tmp_path / "old", lambda told: told["model_cfg"].update(custom_text=True)))
    assert torch.equal(word.load().encode_text(TEXTS), OpenCLIP(str(vit)).load().encode_text(TEXTS))


def test_what_is_no_checkpoint(vit: Path, tmp_path: Path) -> None:
    def told(*word: str) -> str:
        return refused(OpenCLIP(*word).load)

    save_clip(tmp_path / "hf")
    pickle = tmp_path / "pickled"
    shutil.copytree(vit, pickle)
    (pickle / "open_clip_model.safetensors").rename(pickle / "open_clip_pytorch_model.bin")
    assert "so HuggingFace reads it" in told(str(tmp_path / "hf"))
    assert "a pickle file, which is never read; convert it with 'crossguard convert'" in told(str(pickle))
    assert "is a pickle file, which is never read" in told("ViT-B-32", str(pickle / "open_clip_pytorch_model.bin"))
    assert "names weights twice" in told(str(vit), "openai")
    assert "give its architecture first" in told(str(vit / "open_clip_model.safetensors"))
    assert "did you mean 'ViT-B-32'?" in told("ViT-B-3", "openai")
    assert "without weights; give a file of weights, or a tag" in told("ViT-B-32")
    assert "neither a file here nor weights that open_clip knows of 'ViT-B-32'" in told("ViT-B-32", "nothing")
    assert "there is no folder './nothing'" in told("./nothing")
    assert "is empty" in told("")
    assert f"it is one of open_clip: give OpenCLIP('{vit}')" in refused(HuggingFace(str(vit)).load)
    assert "give OpenCLIP('hf-hub:a/b')" in refused(HuggingFace("hf-hub:a/b").load)


@pytest.mark.parametrize("name", ["ViT", "SigLIP"])
def test_an_object_of_open_clip_in_memory(name: str, tmp_path: Path) -> None:
    write(tmp_path / "base", KINDS[name])
    object_ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'base'}", return_transform=False)
    live = Live(object_, tokenizer=open_clip.get_tokenizer(f"local-dir:{tmp_path / 'base'}"))
    stored, images = OpenCLIP(str(tmp_path / "base")), floats(pictures(2, 40, 33))
    assert torch.equal(live.encode_image(images), stored.encode_image(images))
    assert torch.equal(live.encode_text(TEXTS), stored.encode_text(TEXTS))
    trained = TeCoA(steps=1, batch=8, optimizer=SGD(lr=0.1), warmup=0).fit(live, Blots(16, 32), tmp_path / "out")
    assert isinstance(trained, Live) and type(trained.model) is type(object_) and trained != live
    assert not torch.equal(trained.encode_image(images), live.encode_image(images))
    assert "needs its tokenizer" in refused(lambda: Live(object_))


def test_robust_encoders_of_open_clip(vit: Path, tmp_path: Path) -> None:
    """A whole checkpoint as it is; an image tower alone in a base of open_clip."""
    images = floats(pictures(2, 32, 32))
    expected = OpenCLIP(str(vit)).load().encode_image(images)
    for method in ("Delta-CLIP", "FARE"):
        assert torch.equal(RobustEncoder(method, str(vit)).load().encode_image(images), expected)
    assert RobustEncoder("FARE", str(vit)).fingerprint == OpenCLIP(str(vit)).fingerprint
    assert RobustEncoder("FARE", str(vit)).saved(tmp_path) == OpenCLIP(str(tmp_path))
    write(tmp_path / "base", KINDS["ViT"], seed=5)
    held = load_file(vit / "open_clip_model.safetensors")
    tower = {name.removeprefix("visual."): value for name, value in held.items() if name.startswith("visual.")}
    save_file(tower, tmp_path / "tower.safetensors")
    grafted = RobustEncoder("QT-AFT", str(tmp_path / "tower.safetensors"), OpenCLIP(str(tmp_path / "base")))
    assert torch.equal(grafted.load().encode_image(images), expected)
    assert torch.equal(grafted.load().encode_text(TEXTS), OpenCLIP(str(tmp_path / "base")).load().encode_text(TEXTS))
    assert "an image tower alone" in refused(RobustEncoder("Sim-CLIP", str(vit)).load)


def test_the_package_is_asked_for_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install 'crossguard[open_clip]'" in refused(OpenCLIP("ViT-B-32", "openai").load)
    for file in Path(crossguard.__file__).parent.rglob("*.py"):  # no module brings it along
        assert not re.search(r"^\s*(import|from) (open_clip|timm)\b", file.read_text(), re.MULTILINE), file


def test_the_record_that_is_written_is_the_one_that_was_read(tmp_path: Path) -> None:
    write(tmp_path / "a", KINDS["BiomedCLIP"])
    record = records.read(str(tmp_path / "a"), "")
    assert record.text is not None and replace(record, text=None).content().keys() == {"model_cfg", "preprocess_cfg"}
    assert record.content()["model_cfg"] == KINDS["BiomedCLIP"].model


def test_nothing_lies_between_models_that_prepare_images_otherwise(tmp_path: Path) -> None:
    usual, other = Kind(model()), Kind(model(), {"mean": 0.5, "std": 0.5})
    a, b, c = (tmp_path / name for name in "abc")
    for seed, (folder, kind) in enumerate(((a, usual), (b, usual), (c, other))):
        write(folder, kind, seed)
    Interpolated(OpenCLIP(str(a)), OpenCLIP(str(b))).load()
    with pytest.raises(CrossguardError, match="tokenizers or image processors differ"):
        Interpolated(OpenCLIP(str(a)), OpenCLIP(str(c))).load()
