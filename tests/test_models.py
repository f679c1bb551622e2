"""Models against the family's own processor, tokenizer and network; and every way a checkpoint can be bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizers_models
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import crossguard
from crossguard.attacks.base import ImageVictim
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.goals import Untargeted
from crossguard.models.base import VisionLanguageModel, frozen, together
from crossguard.models.embedded import WEIGHTS, Tiny
from crossguard.models.fresh import Fresh, FreshCNN, FreshViT
from crossguard.models.huggingface import HuggingFace, TransformersEncoder, _check_reading, _preprocess
from crossguard.models.probing import PROBES
from crossguard.models.purification import BitDepth
from crossguard.testing import check_model
from fixtures import TOWER, WORDS, change_config, floats, pictures, save_clip, save_siglip, save_tokenizer, small

FAMILIES = ("clip", "siglip", "dual")
TEXTS = ["a photo of a red circle", "square", "the picture of two blue stars and a green box"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, and a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    save_tokenizer(root / "tokenizer")
    small(root / "tokenizer", size=32).load().save(root / "dual")
    return {
        "clip": save_clip(root / "clip"),
        "siglip": save_siglip(root / "siglip"),
        "dual": root / "dual",
        "tokenizer": root / "tokenizer",
    }


def word(folders: dict[str, Path], family: str) -> HuggingFace:
    return HuggingFace(str(folders[family]))


def processed(folder: Path, images: Tensor) -> Tensor:
    """What the family's own processor makes of 8-bit images."""
    # The reference must be Pillow's, also where there is a torchvision.
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert type(processor).__name__.endswith("Pil")
    made = [processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="np") for image in images]
    return torch.from_numpy(np.concatenate([one["pixel_values"] for one in made]))


def reference(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval()


def refused(path: str | Path) -> str:
    """The sentence that a checkpoint is refused with."""
    with pytest.raises(CrossguardError) as raised:
        HuggingFace(str(path)).load()
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    return message


# --- The same numbers as the family's own code ---


@pytest.mark.parametrize("family", FAMILIES)
def test_images_at_the_model_s_own_size(folders: dict[str, Path], family: str) -> None:
    images = pictures(5, 32, 32)
    with torch.no_grad():
        expected = reference(folders[family]).get_image_features(pixel_values=processed(folders[family], images))
        found = word(folders, family).encode_image(floats(images))
    assert torch.allclose(found, expected.pooler_output, atol=1e-4, rtol=0)
    assert found.norm(dim=1).std() > 1e-6  # raw, not on the sphere


@pytest.mark.parametrize("family", FAMILIES)
def test_texts(folders: dict[str, Path], family: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[family])
    model = reference(folders[family])
    if family == "siglip":
        tokens = tokenizer(TEXTS, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        given = {"input_ids": tokens["input_ids"]}  # SigLIP looks at its padding
    else:
        tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
        given = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        expected = model.get_text_features(**given).pooler_output
        found = word(folders, family).encode_text(TEXTS)
        assert torch.allclose(found, expected, atol=1e-4, rtol=0)
        assert word(folders, family).encode_text(["red " * 300]).shape == (1, found.shape[1])  # cut, not an error


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_have_the_model_s_own_scale_and_bias(folders: dict[str, Path], family: str) -> None:
    model, own = word(folders, family), reference(folders[family])
    with torch.no_grad():
        images, texts = model.encode_image(floats(pictures(3, 32, 32))), model.encode_text(TEXTS)
        found = model.logits(images, texts)
        scale, bias = float(own.logit_scale.exp()), float(getattr(own, "logit_bias", 0.0))
        cosines = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    assert bias == (-3.5 if family == "siglip" else 0.0)
    assert torch.allclose(found, scale * cosines + bias, atol=1e-4)
    assert cosines.std() > 1e-3


def test_logits_are_those_of_the_family_s_forward(folders: dict[str, Path]) -> None:
    images = pictures(4, 32, 32)
    for family in ("clip", "siglip"):
        model, own = word(folders, family), reference(folders[family])
        padding, length = ("max_length", 64) if family == "siglip" else (True, 24)
        tokens = transformers.AutoTokenizer.from_pretrained(folders[family])(
            TEXTS, padding=padding, max_length=length, truncation=True, return_tensors="pt"
        )
        if family == "siglip":
            del tokens["attention_mask"]
        tokens.pop("token_type_ids", None)
        with torch.no_grad():
            expected = own(pixel_values=processed(folders[family], images), **tokens).logits_per_image
            found = model.logits(model.encode_image(floats(images)), model.encode_text(TEXTS))
        assert torch.allclose(found, expected, atol=1e-4)


WIDE = [(48, 64), (20, 20), (33, 47), (37, 101), (224, 224), (40, 32)]


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize(("height", "width"), [*WIDE, (100, 37), (64, 40)])
def test_other_sizes_differ_by_rounding(folders: dict[str, Path], family: str, height: int, width: int) -> None:
    """The bound of `Preprocess`: 1.1/255. Tall images hold no extremes, as Pillow 13 turns its passes there."""
    low, high = (0, 255) if (height, width) in WIDE else (64, 191)
    images = pictures(4, height, width, low, high)
    model = word(folders, family)
    network = model.network
    assert isinstance(network, TransformersEncoder)
    expected, found = processed(folders[family], images), network.preprocess(floats(images))
    assert found.shape == expected.shape == (4, 3, 32, 32)
    std = torch.tensor(network.preprocess.std).view(1, 3, 1, 1)
    assert float(((found - expected) * std).abs().max()) * 255 < 1.1
    with torch.no_grad():
        wanted = reference(folders[family]).get_image_features(pixel_values=expected).pooler_output
        assert float(F.cosine_similarity(model.encode_image(floats(images)), wanted).min()) > 0.9995


def test_resizing_stays_in_range_and_passes_gradients(folders: dict[str, Path]) -> None:
    network = word(folders, "siglip").network
    assert isinstance(network, TransformersEncoder)
    images = floats(pictures(2, 50, 21)).round().requires_grad_(True)  # black and white: the worst overshoots
    pixels = network.preprocess(images)
    assert pixels.min() >= -1.0 and pixels.max() <= 1.0  # mean 0.5, std 0.5
    pixels.sum().backward()
    assert images.grad is not None and bool(images.grad.flatten(1).any(1).all())


def test_many_images_are_embedded_in_parts_where_no_gradient_is_asked_for(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = word(folders, "clip"), floats(pictures(7, 32, 32))
    whole = model.encode_image(images)
    monkeypatch.setattr("crossguard.models.base._IMAGES_AT_ONCE", 3)
    network, sizes = model.network, list[int]()
    own = network.encode_image
    monkeypatch.setattr(network, "encode_image", lambda images: sizes.append(len(images)) or own(images))
    assert torch.allclose(model.encode_image(images), whole, atol=1e-5)
    assert torch.allclose(model.encode_image(images.requires_grad_(True)), whole, atol=1e-5)
    with together():
        assert torch.allclose(model.encode_image(images.detach()), whole, atol=1e-5)
    assert sizes == [3, 3, 1, 7, 7]


# --- The contract ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_of_a_model(folders: dict[str, Path], family: str) -> None:
    check_model(word(folders, family))


def test_the_contract_of_fresh_and_wrapped_models(folders: dict[str, Path]) -> None:
    fresh = small(folders["tokenizer"])
    check_model(fresh)
    check_model(BitDepth(fresh, bits=5))
    assert BitDepth(fresh).masks is True and fresh.masks is False
    if WEIGHTS.is_dir():
        check_model(Tiny())


def test_a_purifier_is_attacked_as_if_it_were_the_identity(folders: dict[str, Path]) -> None:
    base = word(folders, "clip")
    model = BitDepth(base, bits=2)
    prompts = Prompts.of(("red circle", "blue star"), ("a photo of a {}",))
    images, goal = floats(pictures(3, 32, 32)), Untargeted(torch.tensor([0, 1, 0]))
    pure = model.purify(images, base.answer())
    assert len(pure.unique()) == 4 and float((pure - images).abs().max()) <= 0.5 / 3 + 1e-6
    found, losses, _ = ImageVictim(model.classifier(prompts)).ascend(images, goal)
    expected, expected_losses, _ = ImageVictim(base.classifier(prompts)).ascend(pure, goal)
    other, _, _ = ImageVictim(base.classifier(prompts)).ascend(images, goal)
    assert torch.allclose(found, expected, atol=1e-6) and torch.allclose(losses, expected_losses, atol=1e-5)
    assert not torch.allclose(found, other, atol=1e-4)
    with pytest.raises(CrossguardError, match="1 to 8 bits"):
        BitDepth(base, bits=0)


def test_a_classifier_averages_unit_embeddings_over_templates(folders: dict[str, Path]) -> None:
    model = word(folders, "clip")
    prompts = Prompts.of(("red circle", "star"), ("a photo of a {}", "{}", "the {} thing"))
    images = floats(pictures(2, 32, 32))
    with torch.no_grad():
        rows = [F.normalize(model.encode_text(list(texts)), dim=1).mean(0) for texts in prompts.texts]
        cosines = F.normalize(model.encode_image(images), dim=1) @ F.normalize(torch.stack(rows), dim=1).T
        assert torch.allclose(model.classifier(prompts)(images), model.network.scale * cosines, atol=1e-4)
    assert not model.class_embeddings(prompts).requires_grad


# --- Sharing, reading again, freezing ---


def test_equal_words_share_one_frozen_network(folders: dict[str, Path]) -> None:
    first, second = word(folders, "clip"), word(folders, "clip")
    assert first is not second and first.network is second.network
    assert not first.network.training and not any(p.requires_grad for p in first.network.parameters())
    trainable = first.load()
    assert trainable is not first.network and all(p.requires_grad for p in trainable.parameters())


def test_a_rewritten_checkpoint_is_read_again(tmp_path: Path) -> None:
    model = HuggingFace(str(save_clip(tmp_path / "x", seed=0)))
    images = floats(pictures(1, 32, 32))
    before, network = model.encode_image(images), model.network
    assert model.network is network
    save_clip(tmp_path / "x", seed=1)
    assert model.network is not network and not torch.allclose(model.encode_image(images), before)
    network = model.network
    processor = json.loads((tmp_path / "x/preprocessor_config.json").read_text())
    (tmp_path / "x/preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.0, 0.0, 0.0]}))
    assert model.network is not network


def test_saving_and_loading_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    images = floats(pictures(2, 32, 32))
    for family in FAMILIES:
        model = word(folders, family)
        model.load().save(tmp_path / family)
        again = HuggingFace(str(tmp_path / family))
        assert torch.equal(model.encode_image(images), again.encode_image(images))
        assert torch.equal(model.encode_text(TEXTS), again.encode_text(TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_one_tower(folders: dict[str, Path], family: str) -> None:
    network = word(folders, family).load()
    towers = network.towers()
    everything = [id(parameter) for named in towers.values() for parameter in named.values()]
    assert sorted(everything) == sorted(id(parameter) for parameter in network.parameters())
    assert len(towers["head"]) == (2 if family == "siglip" else 1)
    for tower, given in (("image", None), ("text", ["a red star"])):
        network.zero_grad(set_to_none=True)
        made = network.encode_image(floats(pictures(2, 32, 32))) if given is None else network.encode_text(given)
        made.sum().backward()
        touched = {name for name, named in towers.items() if any(p.grad is not None for p in named.values())}
        assert touched == {tower}


def test_frozen_gives_back_what_it_took(folders: dict[str, Path]) -> None:
    network = word(folders, "clip").load()
    fixed = next(network.parameters()).requires_grad_(False)
    with pytest.raises(KeyError), frozen(network):  # noqa: PT012
        assert not any(parameter.requires_grad for parameter in network.parameters())
        raise KeyError
    assert not fixed.requires_grad and sum(not p.requires_grad for p in network.parameters()) == 1


def test_fresh_models_are_what_their_word_says(folders: dict[str, Path]) -> None:
    def weights(model: VisionLanguageModel) -> Tensor:
        assert isinstance(model, Fresh)
        return torch.cat([parameter.detach().flatten() for parameter in model.load().parameters()])

    state = torch.random.get_rng_state()
    one = weights(small(folders["tokenizer"]))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one, weights(small(folders["tokenizer"])))
    assert not torch.equal(one, weights(small(folders["tokenizer"], seed=1)))
    for wrong in ({"widths": (8,)}, {"patch": 0}, {"text_width": 33}, {"widths": (), "depths": ()}):
        with pytest.raises(CrossguardError):
            Fresh(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(CrossguardError, match="no tokenizer folder 'nowhere'"):
        Fresh(tokenizer="nowhere").load()


@pytest.mark.parametrize(
    "model",
    [FreshViT(width=32, depth=2, text_width=32), FreshCNN(widths=(8, 16), depths=(1, 2), text_width=32)],
    ids=lambda model: type(model).__name__,
)
def test_fresh_models_of_other_architectures(model: FreshViT | FreshCNN, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    network = model.load()
    assert torch.equal(state, torch.random.get_rng_state()) and not network.training
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    answer = network.encode_image(images)
    assert torch.equal(answer, model.load().encode_image(images))
    assert not torch.equal(answer, replace(model, seed=1).load().encode_image(images))
    assert answer.shape == (3, 64) and network.encode_text(["a red circle"]).shape == (1, 64)
    # One image alone answers as in a batch: batch norm, where there is one, has its own statistics.
    torch.testing.assert_close(network.encode_image(images[1:2]), answer[1:2], rtol=1e-3, atol=1e-3)
    network.save(tmp_path / "saved")
    torch.testing.assert_close(HuggingFace(str(tmp_path / "saved")).load().encode_image(images), answer)
    assert {name for name, held in network.towers().items() if held} == {"image", "text", "head"}


def test_the_features_of_a_fresh_cnn_neither_vanish_nor_agree() -> None:
    """Its layers keep the scale of what goes through them, and images differ from the first step on."""
    network = FreshCNN().load()
    images = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    embeddings = network.encode_image(F.interpolate(images, (32, 32), mode="bicubic").clamp(0, 1)).detach()
    assert 0.5 < float(embeddings.norm(dim=1).mean()) < 50
    assert abs(float(F.normalize(embeddings, dim=1).mean(0).square().sum())) < 0.3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: FreshViT(patch=5), "give a patch that divides the size"),
        (lambda: FreshViT(width=40), "give a multiple of 32"),
        (lambda: FreshViT(depth=0), "every size of FreshViT must be 1 or more"),
        (lambda: FreshCNN(size=7), "3 stages need at least 8 pixels"),
        (lambda: FreshCNN(widths=(24, 40)), "one depth for each width"),
        (lambda: FreshCNN(widths=(24, 40, 50)), "give multiples of 8"),
        (lambda: FreshCNN(kernel=4), "give an odd number, 3 or more"),
        (lambda: FreshCNN(seed=-1), "FreshCNN(seed=-1) is not possible"),
    ],
)
def test_impossible_fresh_models(wrong: Callable[[], object], words: str) -> None:
    with pytest.raises(CrossguardError, match=re.escape(words)):
        wrong()


# --- What is no model ---


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(folders["clip"], tmp_path / "shape")
    return tmp_path / "shape"


def test_a_path_that_is_no_checkpoint(tmp_path: Path, copy: Path) -> None:
    assert "there is no folder" in refused(tmp_path / "missing")
    assert "the path of the model is empty" in refused("")
    assert "is a file; give the folder" in refused(copy / "model.safetensors")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    (copy / "model.safetensors").unlink()
    assert "holds no weights" in refused(copy)
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    assert "only pytorch_model.bin, a pickle file, which is never read" in refused(copy)


def test_another_architecture(tmp_path: Path, folders: dict[str, Path]) -> None:
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    assert "holds a 'bert' model, a language model, which is no dual encoder" in refused(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders["tokenizer"]).save_pretrained(tmp_path)
    assert "holds a 'bert' model, a language model, which is no dual encoder" in refused(tmp_path)
    change_config(tmp_path, model_type="nonsense")
    assert "cannot be read" in refused(tmp_path)


def test_weights_that_do_not_fit(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    dropped = {name: tensor for name, tensor in weights.items() if name != "visual_projection.weight"}
    save_file(dropped, copy / "model.safetensors", {"format": "pt"})
    assert "lack 1 tensors of its architecture, e.g. 'visual_projection.weight'" in refused(copy)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    HuggingFace(str(copy)).load()
    change_config(copy, projection_dim=20)
    assert "have other shapes than its config.json says" in refused(copy)


def test_damaged_weights(copy: Path) -> None:
    path = copy / "model.safetensors"
    weights, data = load_file(path), path.read_bytes()
    for value in (float("nan"), float("inf")):
        broken = weights | {"text_projection.weight": torch.full_like(weights["text_projection.weight"], value)}
        save_file(broken, path, {"format": "pt"})
        assert "'text_projection.weight' holds NaN or infinite values" in refused(copy)
    for cut in (0, 4, 1000, len(data) - 1):
        path.write_bytes(data[:cut])
        assert f"{path} cannot be read" in refused(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_damaged_or_missing_parts(copy: Path, name: str) -> None:
    (copy / name).write_text("{")
    refused(copy)
    (copy / name).unlink()
    for other in ("tokenizer_config.json", "vocab.json", "merges.txt"):
        if name == "tokenizer.json":
            (copy / other).unlink(missing_ok=True)
    expected = {"config.json": "no config.json", "tokenizer.json": "holds no tokenizer"}.get(name, "cannot be read")
    assert expected in refused(copy)


@pytest.mark.parametrize("offline", [pytest.param("1", marks=pytest.mark.slow), "0"])
def test_a_hub_id_without_network_is_one_quick_sentence(tmp_path: Path, offline: str) -> None:
    """An address where nobody listens stands for the missing network."""
    code = "import crossguard; crossguard.HuggingFace('somebody/some-clip').load()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert "'somebody/some-clip' is neither a folder here nor complete in the hub cache" in last
    assert "hf download somebody/some-clip" in last and "Retry" not in done.stderr + done.stdout


# --- The real size ---

FULL = """
import resource, sys, torch
import crossguard
torch.set_num_threads(2)
model = crossguard.HuggingFace(sys.argv[1])
prompts = crossguard.Prompts.of(("red circle", "green square", "star"), ("a photo of a {}",))
images = torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
logits = model.classifier(prompts)(images)
assert logits.shape == (4, 3) and bool(torch.isfinite(logits).all())
print(sum(p.numel() for p in model.network.parameters()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_model_of_full_size_in_little_memory(tmp_path: Path) -> None:
    """A CLIP of the size of ViT-B/32 is loaded and asked about a handful of images."""
    save_clip(tmp_path)  # for the tokenizer
    config = transformers.CLIPConfig()  # ViT-B/32
    config.text_config.bos_token_id, config.text_config.eos_token_id = 52, 53
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            block = torch.randn(4096) * 0.02  # repeated: drawing 150 million numbers takes seconds
            parameter.copy_(block.repeat(parameter.numel() // 4096 + 1)[: parameter.numel()].view_as(parameter))
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight")):
                parameter.fill_(1.0)
        for part in (model.text_model, model.vision_model):
            embeddings = part.embeddings
            embeddings.position_ids.copy_(torch.arange(embeddings.position_ids.shape[1]))
    model.save_pretrained(tmp_path)
    del model
    transformers.AutoImageProcessor.from_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    own = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own | size))
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    parameters, kilobytes = map(int, done.stdout.split())
    assert parameters > 150_000_000
    assert kilobytes < 6_000_000


def test_importing_models_needs_no_torchvision() -> None:
    code = "import sys; sys.modules['torchvision'] = None; import crossguard; crossguard.HuggingFace; crossguard.Fresh"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert crossguard.HuggingFace is HuggingFace


def test_a_checkpoint_with_another_configuration_is_another(tmp_path: Path) -> None:
    """Reports are found again by what they asked; normalization and tokens are part of that, a note is not."""
    model = HuggingFace(str(save_clip(tmp_path)))
    own = model.fingerprint
    assert len(own) == 12
    (tmp_path / "notes.json").write_text("{}")
    assert model.fingerprint == own
    for name, key, value in (
        ("preprocessor_config.json", "image_mean", [0.1, 0.1, 0.1]),
        ("tokenizer_config.json", "model_max_length", 9),
        ("config.json", "logit_scale_init_value", 1.0),
    ):
        content = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(content | {key: value}))
        assert model.fingerprint != own
        own = model.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"size": {"height": 40, "width": 44}, "crop_size": {"height": 32, "width": 32}},
        {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 40}, "crop_pct": 0.8},
    ],
    ids=["no resize", "no scale", "sides and crop", "a share"],
)
def test_an_image_processor_that_does_something_else_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    save_clip(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CrossguardError, match=r"in a way that is not known here|only squares are known"):
        HuggingFace(str(tmp_path)).load()


@pytest.mark.parametrize(
    "change",
    [{"rescale_factor": 1 / 127.5}, {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 30}}],
    ids=["another scale", "square and crop"],
)
def test_other_scales_and_crops_of_squares_are_the_image_processor_s(tmp_path: Path, change: dict[str, Any]) -> None:
    save_clip(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    processor, images = transformers.AutoImageProcessor.from_pretrained(tmp_path), pictures(3, 40, 40)
    images = images if "size" in change else pictures(3, 32, 32)
    expected = processor(images=list(images), return_tensors="pt")["pixel_values"]
    found = _preprocess(processor)(floats(images))
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


# --- A model that reads or sees nothing ---


def test_a_tokenizer_that_never_writes_the_end_of_text_is_refused(copy: Path) -> None:
    change_config(copy, text_config__eos_token_id=51)
    assert "read at its end-of-text, token 51, and the tokenizer does not write it" in refused(copy)
    change_config(copy, text_config__eos_token_id=53)
    HuggingFace(str(copy)).load()
    change_config(copy, text_config__eos_token_id=2)  # configurations of old: the highest token is pooled
    network = HuggingFace(str(copy)).load()
    assert isinstance(network, TransformersEncoder)
    ids, mask = network.tokens(PROBES)
    network.tokens = lambda texts: (ids.where(ids < 52, 0), mask)  # type: ignore[assignment]
    with pytest.raises(CrossguardError, match="which is the one of the highest number, and the tokenizer does not"):
        _check_reading(network, "x")


def test_a_text_tower_that_hears_nothing_is_refused(tmp_path: Path) -> None:
    save_siglip(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("text_model.head.weight"))
    save_file(weights | {name: torch.zeros_like(weights[name])}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "gives all texts the same embedding, so it reads nothing" in refused(tmp_path)


def test_an_image_processor_of_another_resolution_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path, size=32)
    path = tmp_path / "preprocessor_config.json"
    size = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 40}}
    path.write_text(json.dumps(json.loads(path.read_text()) | size))
    said = refused(tmp_path)
    assert "makes images of 48 x 40 pixels, and its image tower reads 32 x 32" in said


# --- Families that need care, and files that are none ---


def test_a_pointer_of_git_lfs_is_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    said = refused(copy)
    assert "is a pointer of git-lfs and not the weights" in said and "git lfs pull" in said


def test_a_home_folder_is_found(copy: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(copy.parent))
    home, there = HuggingFace(f"~/{copy.name}"), HuggingFace(str(copy))
    assert torch.equal(home.encode_text(["a red box"]), there.encode_text(["a red box"]))
    assert home.fingerprint == there.fingerprint != ""
    save_tokenizer(copy.parent / "words")
    assert small(Path("~/words")).load() is not None
    assert small(Path("~/words")).fingerprint == small(copy.parent / "words").fingerprint
    assert "there is no folder" in refused("~nobody-of-this-name/model")


def save_words(folder: Path, special: tuple[str, str, str, str], single: str) -> int:
    """A tokenizer that tells no longest length; how many words it has."""
    vocabulary = {token: number for number, token in enumerate((*special, *WORDS))}
    made = Tokenizer(tokenizers_models.WordLevel(vocabulary, unk_token=special[3]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(token, vocabulary[token]) for token in single.split() if token != "$A"]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token=special[0], pad_token=special[1], sep_token=special[2], unk_token=special[3]
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.mark.parametrize("positions", [20, 40])
def test_texts_as_long_as_the_positions_of_roberta(tmp_path: Path, positions: int) -> None:
    """Its positions begin behind the padding token: of `positions`, two are never used."""
    words = save_words(tmp_path, ("<s>", "<pad>", "</s>", "<unk>"), "<s> $A </s>")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    towers = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**TOWER, image_size=32, patch_size=8),  # type: ignore[arg-type]
        transformers.RobertaConfig(
            **TOWER, vocab_size=words, max_position_embeddings=positions, pad_token_id=1, initializer_range=0.5
        ),  # type: ignore[arg-type]
        projection_dim=16,
    )
    torch.manual_seed(0)
    transformers.VisionTextDualEncoderModel(towers).save_pretrained(tmp_path)
    model = HuggingFace(str(tmp_path))
    network = model.network
    assert isinstance(network, TransformersEncoder) and network.length == positions - 2
    fits, longer = "red " * (positions - 4), "red " * (positions - 4) + "star"
    assert model.cut([fits]) == 0 and model.cut([longer]) == 1
    with torch.no_grad():
        assert torch.allclose(model.encode_text([fits]), model.encode_text([longer + " blue" * 50]), atol=1e-5)
        assert not torch.allclose(model.encode_text([fits]), model.encode_text([fits[:-4]]), atol=1e-5)


def test_families_that_are_not_read_say_what_they_are(tmp_path: Path) -> None:
    words = save_words(tmp_path, ("[CLS]", "[PAD]", "[SEP]", "[UNK]"), "[CLS] $A [SEP]")
    text = TOWER | {"vocab_size": words}
    vision = TOWER | {"image_size": 32, "patch_size": 8}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    flava = transformers.FlavaConfig(
        text_config=text, image_config=vision, multimodal_config=TOWER, hidden_size=32, projection_dim=16
    )
    naflex = transformers.Siglip2Config(
        text_config=text | {"max_position_embeddings": 64, "pad_token_id": 1},
        vision_config=TOWER | {"num_patches": 16, "patch_size": 8},
    )
    for model, sentence in (
        (transformers.FlavaModel(flava), "FLAVA, which has an embedding for every token"),
        (transformers.Siglip2Model(naflex), "SigLIP 2 NaFlex, which cuts every image into patches"),
    ):
        model.save_pretrained(tmp_path)
        assert sentence in refused(tmp_path)


# --- Float32 where it matters ---


def test_logits_are_float32_under_autocast(folders: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 64, generator=generator), torch.randn(1000, 64, generator=generator)
    network = word(folders, "clip").network
    expected = network.scale.float() * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    with torch.autocast("cpu", torch.bfloat16):
        found = network.logits(images, texts)
        assert (images @ texts.T).dtype == torch.bfloat16  # what it would be otherwise
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=1e-4)
    assert len(found[0].unique()) > 990


def test_half_precision_checkpoints_answer_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["clip"], tmp_path / "half")
    weights = load_file(tmp_path / "half/model.safetensors")
    halved = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(halved, tmp_path / "half/model.safetensors", {"format": "pt"})
    images, prompts = floats(pictures(2, 32, 32)), Prompts.of(("red circle", "star"), ("a {}",))
    with torch.no_grad():
        found, expected = (
            model.classifier(prompts)(images) for model in (HuggingFace(str(tmp_path / "half")), word(folders, "clip"))
        )
    assert found.dtype == torch.float32 and torch.allclose(found, expected, atol=0.05)
