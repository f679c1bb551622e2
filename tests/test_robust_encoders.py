"""Pickles become safetensors by one command, and robust encoders are read in the layouts that they are published in."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossguard import SGD, HuggingFace, RobustEncoder, TeCoA, build
from crossguard.cli import main
from crossguard.convert import convert
from crossguard.errors import CrossguardError
from fixtures import Blots, floats, pictures, save_clip

IMAGES, TEXTS = floats(pictures(3, 40, 36)), ("a red circle", "two squares")


def openai_tower(folder: Path) -> dict[str, Tensor]:
    """The image tower of a CLIP of transformers in the names and shapes of OpenAI."""
    held = load_file(folder / "model.safetensors")
    names = {
        "class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }  # fmt: skip
    pairs = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}
    for layer in range(2):
        ours, theirs = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        pairs |= {f"{ours}.ln_1": f"{theirs}.layer_norm1", f"{ours}.ln_2": f"{theirs}.layer_norm2"}
        pairs |= {f"{ours}.mlp.c_fc": f"{theirs}.mlp.fc1", f"{ours}.mlp.c_proj": f"{theirs}.mlp.fc2"}
        pairs[f"{ours}.attn.out_proj"] = f"{theirs}.self_attn.out_proj"
    names |= {f"{one}.{part}": f"{other}.{part}" for one, other in pairs.items() for part in ("weight", "bias")}
    found = {ours: held[f"vision_model.{theirs}"] for ours, theirs in names.items()}
    found["proj"] = held["visual_projection.weight"].T
    for layer in range(2):
        for part in ("weight", "bias"):
            parts = [held[f"vision_model.encoder.layers.{layer}.self_attn.{one}_proj.{part}"] for one in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{part}"] = torch.cat(parts)
    return {name: value.clone().contiguous() for name, value in found.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("robust") / "base", hidden_act="quick_gelu")


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the base became, whole and in the format of transformers; the oracle of all layouts."""
    return save_clip(tmp_path_factory.mktemp("robust") / "robust", seed=7, hidden_act="quick_gelu")


def refused(ask: Callable[[], Any]) -> str:
    with pytest.raises(CrossguardError) as told:
        ask()
    assert len(str(told.value)) <= 320 and "\n" not in str(told.value)
    return str(told.value)


# --- crossguard convert ---


def test_a_pickle_beside_its_settings_becomes_a_checkpoint(
    robust: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "old", tmp_path / "new"
    shutil.copytree(robust, source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert "convert it with 'crossguard convert'" in refused(HuggingFace(str(source)).load)
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source / "pytorch_model.bin"), str(out)])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "copied config.json, preprocessor_config.json, tokenizer.json" in told.replace("\n", " ")
    assert f"HuggingFace('{out}')" in told.replace("\n", "")
    expected = HuggingFace(str(robust)).load()
    assert torch.equal(HuggingFace(str(out)).load().encode_image(IMAGES), expected.encode_image(IMAGES))
    assert "is there already" in refused(lambda: convert(source / "pytorch_model.bin", out))


def test_the_model_is_found_in_the_state_of_a_training(tmp_path: Path) -> None:
    tensors = {"module.a": torch.arange(3.0), "module.b": torch.ones(2, 2).T}
    state = {
        "epoch": 3,
        "state_dict": {"prompt": torch.zeros(1)},
        "optimizer": {},
        "vision_encoder_state_dict": tensors,
    }
    torch.save(state, tmp_path / "model.pth.tar")
    done = convert(tmp_path / "model.pth.tar", tmp_path / "a.safetensors")
    assert done[0] == "took 'vision_encoder_state_dict', and left out epoch, optimizer, state_dict"
    assert "took 'module.' off all names" in done[1] and done[-1].startswith("wrote 2 tensors of 7 numbers to ")
    held = load_file(tmp_path / "a.safetensors")
    assert held.keys() == {"a", "b"} and torch.equal(held["a"], tensors["module.a"])
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 1}, tmp_path / "b.pt")
    assert convert(tmp_path / "b.pt", tmp_path / "b.safetensors")[0] == "took 'state_dict', and left out epoch"
    torch.save({"x": torch.ones(1), "input_resolution": torch.tensor(224), "note": "text"}, tmp_path / "c.pt")
    assert "left out input_resolution, note" in convert(tmp_path / "c.pt", tmp_path / "c.safetensors")[0]


def test_nothing_of_a_pickle_is_run(tmp_path: Path) -> None:
    class Bait:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "caught",))

    with (tmp_path / "bait.bin").open("wb") as file:
        pickle.dump({"a": Bait()}, file)
    torch.save({"a": torch.zeros(1), "b": Bait()}, tmp_path / "bait.pt")
    for bait in (tmp_path / "bait.bin", tmp_path / "bait.pt"):
        ask = partial(convert, bait, tmp_path / "x.safetensors")
        assert "holds more than plain tensors" in refused(ask)
    assert not (tmp_path / "caught").exists() and not (tmp_path / "x.safetensors").exists()
    with (tmp_path / "bait.bin").open("rb") as file:
        pickle.load(file)
    assert (tmp_path / "caught").exists()  # it is one


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"

    def told(content: Any, name: str = "a.pt", to: Path = out) -> str:
        torch.save(content, tmp_path / name)
        return refused(lambda: convert(tmp_path / name, to))

    assert "holds a list and no tensors by name" in told([torch.zeros(1)])
    assert "none of these is known as the tensors of a model" in told(
        {"x": {"a": torch.zeros(1)}, "y": {"b": torch.zeros(1)}}
    )
    assert "with --config, or an output that ends in .safetensors" in told(
        {"a": torch.zeros(1)}, to=tmp_path / "folder"
    )
    assert "there is no file" in refused(lambda: convert(tmp_path / "nothing.pt", out))
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert "one of safetensors already" in refused(lambda: convert(tmp_path / "a.safetensors", out))
    (tmp_path / "noise.pt").write_bytes(b"nothing of the kind")
    assert "or is damaged, so it is not read" in refused(lambda: convert(tmp_path / "noise.pt", out))
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "script.pt")
    assert "a TorchScript archive, which holds code" in refused(lambda: convert(tmp_path / "script.pt", out))


# --- Robust encoders ---


@pytest.mark.parametrize(
    ("method", "wrap"),
    [
        ("FARE", lambda tower: tower),
        (
            "TeCoA",
            lambda tower: {"vision_encoder_state_dict": tower, "state_dict": {"pad_up": torch.zeros(2)}, "epoch": 9},
        ),
        ("Sim-CLIP", lambda tower: {f"module.{name}": value for name, value in tower.items()}),
        ("QT-AFT", lambda tower: {"vision_encoder_state_dict": tower, "optimizer": {"state": {}}}),
    ],
)
def test_a_published_image_tower(
    method: Any, wrap: Callable[..., Any], base: Path, robust: Path, tmp_path: Path
) -> None:
    """As a pickle in the layout of its authors, converted; images are those of the robust model, texts of the base."""
    file = tmp_path / "published.pt"
    torch.save(wrap(openai_tower(robust)), file)
    word = RobustEncoder(method, str(file), HuggingFace(str(base)))
    assert "convert it first" in refused(word.load)
    convert(file, tmp_path / "tower.safetensors")
    word = RobustEncoder(method, str(tmp_path / "tower.safetensors"), HuggingFace(str(base)))
    network = word.load()
    assert torch.allclose(network.encode_image(IMAGES), HuggingFace(str(robust)).load().encode_image(IMAGES), atol=1e-6)
    assert torch.equal(network.encode_text(TEXTS), HuggingFace(str(base)).load().encode_text(TEXTS))
    assert word.fingerprint and word.fingerprint != HuggingFace(str(base)).fingerprint


def test_the_same_file_as_part_of_a_whole_model(base: Path, robust: Path, tmp_path: Path) -> None:
    """Towers are also saved under the name that they have in a whole model."""
    tower = {f"visual.{name}": value for name, value in openai_tower(robust).items()}
    save_file(tower, tmp_path / "tower.safetensors")
    found = RobustEncoder("FARE", str(tmp_path / "tower.safetensors"), HuggingFace(str(base))).load()
    assert torch.allclose(found.encode_image(IMAGES), HuggingFace(str(robust)).load().encode_image(IMAGES), atol=1e-6)


def test_leaf_has_the_words_of_its_base(base: Path, robust: Path, tmp_path: Path) -> None:
    leaf = tmp_path / "leaf"
    leaf.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(robust / name, leaf)
    assert "tokenizer" in refused(HuggingFace(str(leaf)).load)
    word = RobustEncoder("LEAF", str(leaf), HuggingFace(str(base)))
    found, expected = word.load(), HuggingFace(str(robust)).load()
    assert torch.equal(found.encode_image(IMAGES), expected.encode_image(IMAGES))
    assert torch.equal(found.encode_text(TEXTS), expected.encode_text(TEXTS))


def test_a_wrong_layout_says_what_it_is(base: Path, robust: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"

    def told(tensors: dict[str, Tensor], method: Any = "FARE") -> str:
        save_file(tensors, file)
        return refused(RobustEncoder(method, str(file), HuggingFace(str(base))).load)

    tower = openai_tower(robust)
    whole = {f"visual.{name}": value for name, value in tower.items()} | {"text_projection": torch.zeros(1)}
    assert "holds a whole model of open_clip, which OpenCLIP reads; FARE is published as an image tower" in told(whole)
    hf = load_file(robust / "model.safetensors")
    assert "holds a CLIP of transformers, which HuggingFace reads" in told(hf)
    assert "holds tensors such as 'a'" in told({"a": torch.zeros(1)})
    assert "Delta-CLIP is published as a checkpoint of open_clip" in told(tower, "Delta-CLIP")
    assert "FARE is published as an image tower alone" in refused(RobustEncoder("FARE", str(robust)).load)
    short = {name: value for name, value in tower.items() if "resblocks.1" not in name}
    assert "the image tower in" in (found := told(short)) and "give the base that it was trained from" in found
    small = tower | {"positional_embedding": torch.zeros(5, 32)}
    assert "has the shape (5, 32)" in told(small)
    damaged = tower | {"ln_post.bias": torch.full((32,), torch.nan)}
    assert "holds NaN" in told(damaged)
    assert "method must be 'FARE' or 'TeCoA' or" in refused(lambda: build("RobustEncoder('FAREST', 'x')"))
    assert "there is no file" in refused(RobustEncoder("FARE", "nothing.safetensors").load)


def test_a_robust_encoder_is_trained_on(base: Path, robust: Path, tmp_path: Path) -> None:
    save_file(openai_tower(robust), tmp_path / "tower.safetensors")
    word = RobustEncoder("FARE", str(tmp_path / "tower.safetensors"), HuggingFace(str(base)))
    recipe = TeCoA(steps=1, batch=8, optimizer=SGD(lr=0.1), warmup=0)
    trained = recipe.fit(word, Blots(16, 32), tmp_path / "out")
    assert trained == HuggingFace(str(tmp_path / "out"))
    assert not torch.equal(trained.load().encode_image(IMAGES), word.load().encode_image(IMAGES))
