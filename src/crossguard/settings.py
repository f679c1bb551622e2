"""What the settings of a checkpoint may say. They come from anywhere, and `transformers` does much of what they say."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from crossguard.errors import CrossguardError
from crossguard.limits import LABELS, LAYERS, LETTERS, SETTINGS, VOCABULARY, shortly
from crossguard.reading import is_text, read_json

_MOST = 2**31 - 1  # no size of a network is larger

# These would run code, or read what lies elsewhere.
_REFUSED = {
    "auto_map": "code of its own, which is never run",
    "quantization_config": "quantized weights, whose plug-ins are never loaded; give the checkpoint in float32 or half",
    "compression_config": "compressed weights, whose plug-ins are never loaded; give the checkpoint in float32 or half",
    "transformers_weights": "weights in another file; save it again with save_pretrained",
    "fusion_config": "fused layers, which are never made; remove that line",
    "kernel_config": "kernels of a hub, which are never loaded; remove that line",
    "checkpoint_path": "weights in another file, which are never read; remove that line",
    "mecab_option": "options of a program that cuts words, which are never passed on; remove that line",
    "sudachi_config_path": "a file of another program, which is never read; remove that line",
    "sudachi_resource_dir": "a folder of another program, which is never read; remove that line",
}

# What config.json may say of how a network is run. That is said here, for all checkpoints alike, or read off the
# weights; names with an underscore before them are notes of transformers to itself.
_RUN = frozenset(
    """attn_implementation experts_implementation dtype torch_dtype return_dict use_return_dict output_attentions
    output_hidden_states torchscript gradient_checkpointing name_or_path device_map distributed_config use_kernels
    configuration_files trust_remote_code code_revision""".split()  # noqa: SIM905
)

# What tokenizer_config.json may say of where its files are. They are those of the folder.
_PLACES = frozenset("fast_tokenizer_files tokenizer_object name_or_path trust_remote_code code_revision".split())  # noqa: SIM905

# Names of somebody's own, which may be any.
_OWN_NAMES = frozenset({"label2id", "extra_special_tokens", "model_specific_special_tokens"})

_ADDED = frozenset("id content single_word lstrip rstrip normalized special __type".split())  # noqa: SIM905

_COUNTS = re.compile(r"(^|_)(layers|depths?|blocks|stages|heads|groups|experts)($|_)")


def read_settings(file: Path) -> dict[str, Any]:
    """What a file of settings says, without what is decided here.

    Raises:
        CrossguardError: It is damaged, or would have code run or other places read.
    """
    told = read_json(file, dict[str, Any], "fetch it again", SETTINGS)
    for key, value in _held(told):
        for name in (key, value):
            if isinstance(name, str) and not is_text(name):
                raise CrossguardError(f"{file} holds {shortly(name)}, where a part of a character is missing")
    for key, value in _held(told, _OWN_NAMES):
        _check_setting(key, value, file)
    if file.name == "config.json":
        _check_config(told, file)
        return _without_run(told)
    if file.name == "special_tokens_map.json":
        return {key: _added(value) for key, value in told.items()}
    if file.name == "tokenizer_config.json":
        told = {key: value for key, value in told.items() if key not in _PLACES and not key.endswith("_file")}
        return {
            key: {number: _added(token) for number, token in value.items()}
            if key == "added_tokens_decoder" and isinstance(value, dict)
            else _added(value)
            if isinstance(value, list) or (isinstance(value, dict) and "content" in value)
            else value
            for key, value in told.items()
        }
    return told


def read_record(file: Path) -> dict[str, Any]:
    """What a record of open_clip says of a model, without what is decided here.

    Raises:
        CrossguardError: It is damaged, describes no model, or has sizes that no model has.
    """
    told = read_settings(file)
    for part in ("model_cfg", "preprocess_cfg", "text_config"):
        if part in told and not (isinstance(told[part], dict) or (told[part] is None and part != "model_cfg")):
            raise CrossguardError(f"{file} is broken: its {part} is {shortly(told[part])}")
    if "model_cfg" not in told:
        raise CrossguardError(f"{file} has no model_cfg, so it describes no model; fetch it again")
    _check_config(told["model_cfg"], file)
    if told.get("text_config") is not None:
        _check_config(told["text_config"], file)
        told["text_config"] = _without_run(told["text_config"])
    return told


def read_tokenizer(file: Path) -> tuple[dict[str, Any], bool]:
    """What tokenizer.json says, without what the library `tokenizers` would print its surprise about on stdout; and
    whether that is all that stands in the file.

    Raises:
        CrossguardError: It is damaged, or would fill the memory.
    """
    told = read_json(file, dict[str, Any], "fetch it again", VOCABULARY)
    _check_growth(told, file)
    added = told.get("added_tokens")
    kept = _added(added)
    return (told, True) if kept == added else (told | {"added_tokens": kept}, False)


def _held(told: Any, but: Collection[str] = (), key: str = "") -> Iterator[tuple[str, Any]]:
    """All values in settings with their names; what stands in a list has the name of the list.

    Args:
        but: Not what is in values of these names.
    """
    for name, value in told.items() if isinstance(told, dict) else ((key, value) for value in told):
        yield name, value
        if isinstance(value, list | dict) and name not in but:
            yield from _held(value, but, name)


def _without_run(told: Any) -> Any:
    """A configuration without what it says of how a network is run."""
    if isinstance(told, list):
        return [_without_run(value) for value in told]
    if not isinstance(told, dict):
        return told
    return {
        key: value if key in _OWN_NAMES else _without_run(value)
        for key, value in told.items()
        if key not in _RUN and not key.startswith("_")
    }


def _added(tokens: Any) -> Any:
    """Added tokens without settings that there are none of."""
    if isinstance(tokens, list):
        return [_added(token) for token in tokens]
    return {key: value for key, value in tokens.items() if key in _ADDED} if isinstance(tokens, dict) else tokens


def _check_setting(key: str, value: Any, file: Path) -> None:
    """Raises where a setting would run code or read what lies elsewhere."""
    if key in _REFUSED and value not in (None, False, "", [], {}):
        raise CrossguardError(f"{file} says {key!r}: {_REFUSED[key]}")
    if key.removeprefix("_").startswith("attn_implementation") and "/" in str(value):
        raise CrossguardError(f"{file} asks for attention of a hub ({shortly(value)}), which is never loaded")
    if (key == "backbone" and isinstance(value, str)) or (key == "architecture" and ":" in str(value)):
        raise CrossguardError(f"{file} names the {key} {shortly(value)}, which lies elsewhere and is not read")


def _check_config(told: dict[str, Any], file: Path) -> None:
    """Raises where a configuration has sizes that no model has, or names that are none."""
    named = told.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise CrossguardError(f"{file} is broken: its architectures are {shortly(named)}, which is no list of names")
    for key, value in _held(told):
        if isinstance(value, int):
            if abs(value) > _MOST:
                raise CrossguardError(f"{file} says {key}: {shortly(value)}; at most {_MOST:,} can be used")
            if key == "num_labels":
                LABELS.check(value, str(file))
            elif _COUNTS.search(key):
                LAYERS.check(value, f"{file} ({key})")


def _check_growth(told: dict[str, Any], file: Path) -> None:
    """Raises where a tokenizer would make far longer texts of texts, or look into endless words: a few replacements one
    after the other can fill any memory."""
    letters, nodes = 1, [told.get("normalizer"), told.get("pre_tokenizer")]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += [value for value in node.values() if isinstance(value, list | dict)]
            texts = [node[key] for key in ("content", "prepend", "replacement") if isinstance(node.get(key), str)]
            letters *= max(map(len, [" ", *texts])) * _longest(node.get("precompiled_charsmap"))
        LETTERS.check(letters, f"what {file} makes of a letter")
    LETTERS.check(json.dumps(told.get("post_processor")).count("SpecialToken"), f"what {file} puts around a text")
    model = told.get("model")
    longest = model.get("max_input_chars_per_word") if isinstance(model, dict) else None
    if isinstance(longest, int):
        LETTERS.check(min(longest, _MOST), f"a word that {file} looks into")


def _longest(charsmap: Any) -> int:
    """How many times longer SentencePiece's map of characters makes a text at most; 1 where there is no map."""
    try:
        data = base64.b64decode(charsmap)
    except (ValueError, TypeError):
        return 1
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")  # they stand behind the trie
    return max(1, max(map(len, texts)) // 32)  # Unicode's own longest has 33 bytes, of a sign that is seldom written
