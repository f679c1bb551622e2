"""Checkpoints from strangers: no code of theirs runs, nothing of them leads elsewhere, and whatever is odd about one
ends in a sentence that names the file."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import crossguard
from crossguard.attacks.candidates import MaskedLM
from crossguard.errors import CrossguardError
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace

SOURCE = Path(crossguard.__file__).parent
TINY, WORDS = SOURCE / "assets" / "tiny", SOURCE / "assets" / "masked_lm"

# --- One opener ---


def openers(path: Path) -> set[str]:
    """The calls in a file by which `transformers` or the hub would open something."""
    named = {"from_pretrained", "from_config", "from_dict", "snapshot_download", "hf_hub_download", "cached_file"}
    unsafe = {"get_class_from_dynamic_module", "load_state_dict_from_url", "pipeline"}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            found |= {name} & (named | unsafe)
    return found


def test_there_is_one_opener() -> None:
    found = {str(path.relative_to(SOURCE)): openers(path) for path in SOURCE.rglob("*.py")}
    assert {name: calls for name, calls in found.items() if calls} == {
        "pretrained.py": {"from_pretrained", "from_dict"},
        "hub.py": {"snapshot_download"},
    }


def test_the_opener_never_trusts_code() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse((SOURCE / "pretrained.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
    ]
    assert len(calls) == 3
    for call in calls:
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert given["trust_remote_code"] == "False" and given["local_files_only"] == "True"


# --- Code ---

EVIL = """
import os, pathlib
pathlib.Path(os.environ["PWNED"]).write_text("ran")
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class EvilConfig(PreTrainedConfig):
    model_type = "evil"
class EvilTokenizer(PreTrainedTokenizerFast): pass
class EvilProcessor: pass
class EvilModel(PreTrainedModel): pass
"""

MAP = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel", "AutoModelForMaskedLM": "evil.EvilModel"}
TOKENIZER = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer"] * 2}}


def edit(folder: Path, name: str, change: dict[str, Any]) -> None:
    path = folder / name
    told = json.loads(path.read_text())
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(told.get(key), dict)
        told[key] = told[key] | value if both else value
    path.write_text(json.dumps(told))


def copied(source: Path, folder: Path, **changes: dict[str, Any]) -> Path:
    """A copy of a checkpoint with settings changed, and code beside it."""
    shutil.copytree(source, folder)
    (folder / "evil.py").write_text(EVIL)
    for name, change in changes.items():
        edit(folder, f"{name}.json", change)
    return folder


def words(path: str) -> None:
    MaskedLM(path).read(["a photo"], 5, 0.0, False)


def whole(path: str) -> None:
    HuggingFace(path).load()


def fresh(path: str) -> None:
    Fresh(path).load()


CODE: dict[str, tuple[Callable[[str], None], Path, dict[str, Any], str]] = {
    "an unknown model": (
        whole, TINY,
        {"config": {"model_type": "evil", "auto_map": MAP}},
        "config.json says 'auto_map': code of its own, which is never run",
    ),
    "a known model": (
        whole, TINY, {"config": {"auto_map": {"AutoModel": "evil.EvilModel"}}}, "config.json says 'auto_map'",
    ),
    "a tower": (
        whole, TINY, {"config": {"text_config": {"auto_map": {"AutoModel": "evil.EvilModel"}}}},
        "config.json says 'auto_map'",
    ),
    "a tokenizer": (whole, TINY, {"tokenizer_config": TOKENIZER}, "tokenizer_config.json says 'auto_map'"),
    "an image processor": (
        whole, TINY,
        {"preprocessor_config": {"auto_map": {"AutoImageProcessor": "evil.EvilProcessor"}}},
        "preprocessor_config.json says 'auto_map'",
    ),
    "a language model": (
        words, WORDS,
        {"config": {"model_type": "evil", "auto_map": MAP}},
        "config.json says 'auto_map'",
    ),
    "the tokenizer of a language model": (
        words, WORDS, {"tokenizer_config": TOKENIZER}, "tokenizer_config.json says 'auto_map'",
    ),
    "the tokenizer of Fresh": (fresh, TINY, {"tokenizer_config": TOKENIZER}, "tokenizer_config.json says 'auto_map'"),
    "a class that is no tokenizer": (
        whole, TINY, {"tokenizer_config": {"tokenizer_class": "AutoModel"}},
        "tokenizer_config.json names the class 'AutoModel', which is none that is used for this",
    ),
    "a class that loads others": (
        whole, TINY, {"tokenizer_config": {"tokenizer_class": "RagTokenizer"}}, "names the class 'RagTokenizer'",
    ),
    "a class by its file": (
        whole, TINY, {"tokenizer_config": {"tokenizer_class": "evil.EvilTokenizer"}}, "the class 'evil.EvilTokenizer'",
    ),
    "a tokenizer named by the model": (
        whole, TINY, {"config": {"tokenizer_class": "AutoModel"}, "tokenizer_config": {"tokenizer_class": None}},
        "config.json names the class 'AutoModel'",
    ),
    "a class that is no image processor": (
        whole, TINY, {"preprocessor_config": {"image_processor_type": "AutoModel"}},
        "preprocessor_config.json names the class 'AutoModel'",
    ),
    "kernels of a hub": (
        whole, TINY, {"config": {"_attn_implementation": "somebody/kernel"}}, "config.json asks for attention of a hub",
    ),
    "kernels for a tower": (
        whole, TINY, {"config": {"attn_implementation": {"text_config": "flash|somebody/kernel@main:f"}}},
        "config.json asks for attention of a hub",
    ),
    "a quantization": (
        whole, TINY, {"config": {"quantization_config": {"quant_method": "awq"}}},
        "config.json says 'quantization_config': quantized weights, whose plug-ins are never loaded",
    ),
}  # fmt: skip


def refused(ask: Callable[[str], None], folder: Path) -> str:
    """The sentence that a checkpoint is refused with."""
    with pytest.raises(CrossguardError) as raised:
        ask(str(folder))
    message = str(raised.value)
    assert "\n" not in message and len(message) <= 300 and message.isprintable(), message
    assert "/crossguard-" not in message, "the sentence names a folder that the user does not know"
    return message


@pytest.mark.parametrize("name", CODE)
def test_no_code_of_a_checkpoint_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever is asked would say yes; nobody is."""
    ask, source, changes, sentence = CODE[name]
    folder = copied(source, tmp_path / "evil", **changes)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda *given: asked.append(str(given)) or "y")
    monkeypatch.setenv("PWNED", str(tmp_path / "pwned"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert sentence in refused(ask, folder)
    assert not (tmp_path / "pwned").exists() and not asked
    assert capfd.readouterr() == ("", "")


def test_the_bait_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same folder does run its code where it is trusted; else the tests above could not fail."""
    import sys

    import transformers

    folder = copied(TINY, tmp_path / "evil", tokenizer_config=TOKENIZER)
    monkeypatch.setenv("PWNED", str(tmp_path / "pwned"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert (tmp_path / "pwned").exists()


# --- What lies elsewhere ---


def test_a_folder_never_reaches_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    asked: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    named = {"name_or_path": "somebody/other", "_name_or_path": "mistralai/other", "fix_mistral_regex": True}
    whole(str(copied(TINY, tmp_path / "whole", config=named, tokenizer_config=named)))
    words(str(copied(WORDS, tmp_path / "words", config=named, tokenizer_config=named)))
    fresh(str(tmp_path / "words"))
    folder = copied(TINY, tmp_path / "away", config={"vision_config": {"backbone": "somebody/other"}})
    refused(whole, folder)
    assert not asked


def test_weights_lie_in_the_folder(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    outside = tmp_path / "outside"
    shutil.copytree(TINY, outside)
    folder = tmp_path / "shape"
    shutil.copytree(TINY, folder)
    edit(folder, "config.json", {"transformers_weights": "../outside/model.safetensors"})
    assert "config.json says 'transformers_weights': weights in another file" in refused(whole, folder)
    edit(folder, "config.json", {"transformers_weights": None})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(outside / "model.safetensors")
    assert "model.safetensors is a link that leads out of its folder" in refused(whole, folder)
    (folder / "model.safetensors").unlink()
    weights = load_file(outside / "model.safetensors")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: weights[name] for name in held}, folder / file, {"format": "pt"})
    placed = {name: file for file, held in halves.items() for name in held}

    def indexed(**change: object) -> None:
        told = {"metadata": {}, "weight_map": placed} | change
        (folder / "model.safetensors.index.json").write_text(json.dumps(told))

    indexed()
    whole(str(folder))
    for name in ("../outside/model.safetensors", str(outside / "model.safetensors"), "c.safetensors", "evil.bin"):
        indexed(weight_map=placed | {names[0]: name})
        assert "index.json names " in refused(whole, folder)
    for told in ([], 3, {}, [[]], placed | {names[0]: 3}):
        indexed(weight_map=told)
        assert "model.safetensors.index.json" in refused(whole, folder)
    (folder / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json" in refused(whole, folder)


def test_settings_and_words_lie_in_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(TINY, outside)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        folder = tmp_path / name
        shutil.copytree(TINY, folder)
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)
        assert f"{name} is a link that leads out of its folder" in refused(whole, folder)
    folder = copied(TINY, tmp_path / "named", tokenizer_config={"tokenizer_file": "/nowhere", "vocab_file": "../x"})
    whole(str(folder))  # notes of the machine that it was saved on
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/other"}')
    assert "adapter_config.json makes this an adapter of another checkpoint" in refused(whole, folder)


def test_a_folder_of_the_hub_s_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, files are links to blobs; asked for by its name or by its path, without any network."""
    model = tmp_path / "models--somebody--tiny"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(TINY.iterdir())):
        shutil.copy(file, model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(model / "blobs" / str(number), snapshot))
    whole(str(snapshot))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    whole("somebody/tiny")
    assert HuggingFace("somebody/tiny").fingerprint
    (snapshot / "preprocessor_config.json").unlink()
    assert "nor complete in the hub cache" in refused(whole, Path("somebody/tiny"))


# --- Oddities ---


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "config.json", changes)


def processor(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "preprocessor_config.json", changes)


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "tokenizer.json", changes)


def put(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content

    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def header(told: object, size: int | None = None) -> bytes:
    data = json.dumps(told).encode()
    return (len(data) if size is None else size).to_bytes(8, "little") + data


def pipe(name: str) -> Callable[[Path], None]:
    """Whoever opens it waits for ever."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def twice(text: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": {"String": "a"}, "content": text}


HUGE = {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}
LARGER = "config.json describes a far larger model than its weights, which hold 88 tensors of 809,569 numbers"

ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "config: a number": (put("config.json", "3"), "config.json' is broken: its content is 3, not an object"),
    "config: brackets": (put("config.json", "[" * 100_000), "config.json' is broken: it is nested too deeply"),
    "config: deep": (put("config.json", '{"a":' * 900 + "1" + "}" * 900), "config.json' has 101 levels"),
    "config: long": (put("config.json", "[" + " " * 2**23 + "]"), "CROSSGUARD_MOST_SETTINGS_BYTES"),
    "config: digits": (put("config.json", '{"a": ' + "9" * 5000 + "}"), "config.json' is broken"),
    "config: cut": (put("config.json", '{"model_type": "cl'), "config.json' is broken: it is not whole JSON"),
    "config: architectures": (config(architectures=3), "config.json is broken: its architectures are 3"),
    "config: no model": (config(model_type="nonsense"), "config.json cannot be read: it names the model_type"),
    "config: half a character": (config(architectures=["\ud800"]), "config.json holds '\\ud800', where a part of"),
    "config: half a name": (config(**{"\udfff": 1}), "config.json holds '\\udfff', where a part of a character"),
    "config: layers": (config(text_config={"num_hidden_layers": 20_000}), LARGER),
    "config: 10^12 layers": (config(text_config={"num_hidden_layers": 10**12}), "num_hidden_layers: 1000000000000"),
    "config: 10^6 layers": (config(text_config={"num_hidden_layers": 10**6}), "CROSSGUARD_MOST_LAYERS"),
    "config: stages": (config(vision_config={"depths": [60_000] * 3}), LARGER),
    "config: width": (config(text_config={"hidden_size": 10**9}), LARGER),
    "config: vocabulary": (config(text_config={"vocab_size": 10**12}), "config.json says vocab_size: 1000000000000"),
    "config: positions": (config(text_config={"max_position_embeddings": 2**31 - 1}), LARGER),
    "config: labels": (config(num_labels=10**7), "CROSSGUARD_MOST_LABELS"),
    "config: below zero": (config(projection_dim=-1), "config.json and its weights cannot be read together"),
    "config: a backbone": (config(vision_config={"backbone": "somebody/other"}), "names the backbone 'somebody/other'"),
    "config: NaN": (config(text_config={"layer_norm_eps": float("nan")}), "text tower of"),
    "config: a pipe": (pipe("config.json"), "has no config.json"),
    "tokenizer: words beyond": (
        tokenizer(model={"vocab": {"circle": 10**6, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[PAD]": 0}}),
        "writes 'circle' as number 1,000,000, and its text tower has 498 embeddings",
    ),
    "tokenizer: far beyond": (
        tokenizer(model={"vocab": {"circle": 4 * 10**9, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}}), "CROSSGUARD_MOST_WORDS",
    ),
    "tokenizer: cut": (put("tokenizer.json", '{"version": "1.0", "trun'), "tokenizer.json' is broken"),
    "tokenizer: another": (put("tokenizer.json", '{"added_tokens": []}'), "holds no tokenizer that can be read"),
    "tokenizer: growth": (
        tokenizer(normalizer={"type": "Sequence", "normalizers": [twice("a" * 100)] * 4}), "CROSSGUARD_MOST_LETTERS",
    ),
    "tokenizer: long words": (
        tokenizer(model={"max_input_chars_per_word": 10**9}), "CROSSGUARD_MOST_LETTERS",
    ),
    "tokenizer: no length": (
        lambda folder: edit(folder, "tokenizer_config.json", {"model_max_length": -1}), "may have -1 tokens",
    ),
    "tokenizer: a pipe": (pipe("tokenizer.json"), "holds no tokenizer"),
    "images: two means": (processor(image_mean=[0.5, 0.5]), "preprocessor_config.json has an image_mean of (0.5, 0.5)"),
    "images: no mean": (processor(image_mean=[float("nan")] * 3), "json has an image_mean of (nan, nan, nan)"),
    "images: huge mean": (processor(image_mean=[1e308] * 3), "json has an image_mean of (1e+308, 1e+308, 1e+308)"),
    "images: no deviation": (processor(image_std=[0, 0, 0]), "json has an image_std of (0.0, 0.0, 0.0)"),
    "images: below zero": (processor(size={"shortest_edge": -3}), "json makes images with a shortest_edge of -3"),
    "images: large": (processor(size={"shortest_edge": 40_000}), "the shortest_edge in"),
    "images: 2^63": (processor(crop_size={"height": 2**63, "width": 2**63}), "CROSSGUARD_MOST_SIDE"),
    "images: a list": (processor(size=[32]), "preprocessor_config.json cannot be read"),
    "images: cut": (put("preprocessor_config.json", "{"), "preprocessor_config.json' is broken"),
    "weights: empty": (put("model.safetensors", b""), "model.safetensors cannot be read"),
    "weights: a huge header": (put("model.safetensors", header({}, 2**63)), "model.safetensors cannot be read"),
    "weights: a long header": (put("model.safetensors", header({}, 10**8)), "model.safetensors cannot be read"),
    "weights: a huge shape": (put("model.safetensors", header(HUGE)), "model.safetensors cannot be read"),
    "weights: others": (put("model.safetensors", header({})), "lack 88 tensors"),
    "weights: a pipe": (pipe("model.safetensors"), "holds no weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_checkpoint_is_one_sentence(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, sentence = ODD[name]
    shutil.copytree(TINY, tmp_path / "odd")
    change(tmp_path / "odd")
    said = refused(whole, tmp_path / "odd")
    assert any(part in said for part in sentence.split("|")), said
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("config.json", "3"), "config.json' is broken"),
        (config(architectures=3, model_type="clip"), "config.json is broken: its architectures are 3"),
        (config(num_hidden_layers=20_000), "config.json describes a far larger model"),
        (config(hidden_act="__import__('os')"), "cannot be read together"),
        (tokenizer(model={"vocab": {"##a": 10**6, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3}}), "do not belong together"),
        (put("model.safetensors", b"no weights"), "model.safetensors cannot be read"),
    ],
)
def test_an_odd_language_model_is_one_sentence(
    change: Callable[[Path], None], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(WORDS, tmp_path / "odd")
    change(tmp_path / "odd")
    assert sentence in refused(words, tmp_path / "odd")
    assert capfd.readouterr() == ("", "")


def test_a_model_with_all_its_weights_may_be_of_any_size(tmp_path: Path) -> None:
    """What is compared with the weights is what is built, whatever the configuration says beside that."""
    folder = copied(TINY, tmp_path / "free", config={"image_size": 10**9, "seed": 2**31 - 1})
    whole(str(folder))


# --- Settings that decide nothing ---


def test_how_a_network_is_run_is_not_the_folder_s_to_say(tmp_path: Path) -> None:
    import torch

    told = {
        "dtype": "__import__('os')", "torch_dtype": "float16", "_attn_implementation": "flash_attention_2",
        "attn_implementation": "eager", "return_dict": False, "output_attentions": True, "torchscript": True,
        "_name_or_path": "somebody/other", "configuration_files": ["config.9.json"], "use_kernels": True,
    }  # fmt: skip
    folder = copied(TINY, tmp_path / "told", config=told | {"text_config": told})
    (folder / "generation_config.json").write_text("{")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("raise SystemExit(3)")
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes(header({}))
    network, plain = HuggingFace(str(folder)).load(), HuggingFace(str(TINY)).load()
    texts = ["a red circle", "a blue star"]
    assert torch.equal(network.encode_text(texts), plain.encode_text(texts))
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    network.save(tmp_path / "one")
    plain.save(tmp_path / "two")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_added_tokens_of_other_versions_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copied(TINY, tmp_path / "added")
    told = json.loads((folder / "tokenizer.json").read_text())
    told["added_tokens"][0]["colour"] = "red"
    (folder / "tokenizer.json").write_text(json.dumps(told))
    token = {"content": "[UNK]", "colour": "red"}
    edit(folder, "tokenizer_config.json", {"added_tokens_decoder": {"1": token}})
    (folder / "special_tokens_map.json").write_text(json.dumps({"unk_token": token}))
    whole(str(folder))
    assert capfd.readouterr() == ("", "")


def test_a_text_that_the_tower_has_no_embedding_for_is_named(tmp_path: Path) -> None:
    """Tokens that were added beyond the embeddings are no fault until a text has one."""
    folder = copied(TINY, tmp_path / "added")
    told = json.loads((folder / "tokenizer.json").read_text())
    told["added_tokens"].append(told["added_tokens"][0] | {"id": 498, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(told))
    model = HuggingFace(str(folder))
    model.encode_text(["a red circle"])
    with pytest.raises(CrossguardError, match="writes '<image>' as number 498, and the text tower has 498 embeddings"):
        model.encode_text(["a red <image>"])


def test_an_unknown_word_without_a_token_for_it_is_a_sentence(tmp_path: Path) -> None:
    from fixtures import save_clip

    folder = save_clip(tmp_path)
    edit(folder, "tokenizer_config.json", {"unk_token": "nobody"})
    edit(folder, "tokenizer.json", {"model": {"unk_token": "nobody"}})
    with pytest.raises(CrossguardError, match=r"tokenizer cannot read texts such as 'é'|holds no tokenizer that can"):
        HuggingFace(str(folder)).encode_text(["é"])
