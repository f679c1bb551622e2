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
    for name in ("../outside/model.safetensors", str(outside / "model.safetensors"), "c.safetensors", "evil.bin", 3):
        indexed(weight_map=placed | {names[0]: name})
        assert "index.json names " in refused(whole, folder)
    for told in ([], 3, {}, [[]]):
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
    (snapshot / "preprocessor_config.json").unlink()
    assert "nor complete in the hub cache" in refused(whole, Path("somebody/tiny"))
