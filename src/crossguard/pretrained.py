"""The one place where a checkpoint reaches `transformers`: its configuration, weights, tokenizer and image processor.

A checkpoint comes from anywhere. `transformers` would run code that lies beside the weights, fetch what a configuration
names, and let the folder choose how attention is computed. So it is shown a folder of its own that holds nothing but
the files that are read here (`checkpoints.parts`), checked and without what they may not say. Whatever is wrong with
one of them ends in a sentence that names it.
"""

from __future__ import annotations

import base64
import copy
import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from crossguard.checkpoints import check_finite, check_tokenizer, check_weights, located, parts, quiet, shards
from crossguard.errors import CrossguardError
from crossguard.hub import converted, snapshot
from crossguard.reading import text

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

# Far above real models. A configuration that says more would fill the memory or take hours before any weight is read.
MOST_LAYERS = 2**16  # also of blocks, stages, heads and whatever else a configuration counts
MOST_LABELS = 2**17
MOST_NUMBER = 2**31 - 1
MOST_GROWTH = 1000  # times: how far a tokenizer may lengthen a text before it cuts it
MOST_IDS = 2**24  # of a tokenizer; the largest vocabulary in use has a million
MOST_TEXT = 2**28  # bytes of a tokenizer's file; the largest in use have 60 million
MOST_SETTINGS = 2**23  # bytes of any other file of settings

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

_SENTENCES = {
    "network": "{shown}/config.json describes a network that cannot be asked: {told}",
    "weights": "{shown}/config.json and its weights cannot be read together: {told}",
    "tokenizer": "{shown} holds no tokenizer that can be read (tokenizer.json, tokenizer_config.json, ...): {told}",
}


class _Size(NamedTuple):
    tensors: int
    numbers: int


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that has been looked at, in a folder of its own; what is read from it is ours to use.

    Args:
        shown: How the user calls it.
        folder: What `transformers` is shown.
        settings: What config.json says, without what is decided here.
    """

    shown: str
    folder: Path
    settings: dict[str, Any] | None
    size: _Size

    def config(self) -> PreTrainedConfig:
        """The configuration of a model."""
        import transformers

        if self.settings is None:
            raise CrossguardError(f"{self.shown} has no config.json, so it is no transformers checkpoint")
        kind = self.settings.get("model_type")
        if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
            what = "names no model_type" if kind is None else f"names the model_type {_short(kind)}"
            raise CrossguardError(
                f"{self.shown}/config.json cannot be read: it {what}, and transformers {transformers.__version__} "
                "knows none such; code of a checkpoint's own is never run"
            )
        with self.naming("config.json"):
            return transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(self.settings))

    def model(self, config: PreTrainedConfig, masked: bool = False) -> tuple[Any, dict[str, Any]]:
        """The network in float32, and what `transformers` tells about missing and unexpected weights.

        Args:
            masked: Whether it shall be a masked language model, and not whatever the configuration describes.
        """
        import transformers

        family = transformers.AutoModelForMaskedLM if masked else transformers.AutoModel
        with self.naming("weights"), _bounded(self.size, self.shown):
            model, info = family.from_pretrained(
                str(self.folder),
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
            )
        check_finite(model, self.shown)
        return model, info

    def tokenizer(self, config: PreTrainedConfig | None = None) -> Any:
        """The tokenizer; that of the model's kind where the folder names none."""
        import transformers
        from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

        told = _object(self.folder / "tokenizer_config.json", self.shown)
        if config is None:
            config = self._any_config()
        with self.naming("tokenizer"):
            for file, named in (("tokenizer_config.json", told), ("config.json", self.settings or {})):
                _check_class(
                    named.get("tokenizer_class"),
                    tokenizer_class_from_name,
                    transformers.PreTrainedTokenizerBase,
                    f"{self.shown}/{file}",
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(self.folder), config=config, local_files_only=True, trust_remote_code=False
            )
            check_tokenizer(tokenizer, self.shown)
            highest = max(tokenizer.get_vocab().values())
            tokenizer(["a photo of a cat"])  # some are read and cannot be asked
        if highest >= MOST_IDS:
            raise CrossguardError(
                f"the tokenizer of {self.shown} has a word with the number {highest:,}; at most {MOST_IDS:,} are read"
            )
        return tokenizer

    def image_processor(self, config: PreTrainedConfig) -> Any:
        """The image processor."""
        import transformers
        from transformers.image_processing_utils import ImageProcessingMixin
        from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

        nested = _object(self.folder / "processor_config.json", self.shown).get("image_processor")
        file = "preprocessor_config.json" if nested is None else "processor_config.json"
        told = _object(self.folder / file, self.shown) if nested is None else nested
        if not isinstance(told, dict):
            raise CrossguardError(f"{self.shown}/{file} cannot be read: its image_processor is {_short(told)}")
        with self.naming(file):
            for settings in (told, self.settings or {}):
                for key in ("image_processor_type", "feature_extractor_type"):
                    named = settings.get(key)
                    if isinstance(named, str):
                        named = named.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
                    for ending in ("", "Pil"):
                        _check_class(
                            f"{named}{ending}" if isinstance(named, str) else named,
                            get_image_processor_class_from_name,
                            ImageProcessingMixin,
                            f"{self.shown}/{file if settings is told else 'config.json'}",
                        )
            return transformers.AutoImageProcessor.from_pretrained(
                str(self.folder), config=config, local_files_only=True, trust_remote_code=False
            )

    def _any_config(self) -> PreTrainedConfig:
        """A configuration for a tokenizer alone, whose model may be of any kind or none."""
        import transformers

        kind = (self.settings or {}).get("model_type")
        if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
            return self.config()
        with self.naming("config.json"):
            return transformers.PreTrainedConfig.from_dict(copy.deepcopy(self.settings or {}))

    @contextmanager
    def naming(self, file: str) -> Iterator[None]:
        """Inside, whatever goes wrong becomes a sentence that names the file, and nothing is printed.

        Args:
            file: Its name, or "weights" or "tokenizer", which are read from several.
        """
        try:
            with quiet():
                yield
        except BaseException as error:  # transformers raises many kinds
            if not _is_damage(error):
                raise
            told = _told(error).replace(f"{self.folder}/", "").replace(str(self.folder), self.shown)
            if "size mismatch" in told or "mismatched" in told:
                raise CrossguardError(
                    f"the weights in {self.shown} have other shapes than its config.json says; fetch both from one "
                    "place"
                ) from error
            sentence = _SENTENCES.get(file, "{shown}/{file} cannot be read: {told}")
            raise CrossguardError(sentence.format(shown=self.shown, file=file, told=told)) from error


@contextmanager
def tokenizing(texts: Sequence[str]) -> Iterator[None]:
    """Inside, a tokenizer that cannot read a text says so in a sentence: some have no token for an unknown word, and
    some a pattern that would take for ever."""
    try:
        yield
    except BaseException as error:  # each maker of tokenizers raises kinds of its own
        if not _is_damage(error):
            raise
        example = f"{texts[0]!r:.60}" if texts else "none"
        raise CrossguardError(f"the tokenizer cannot read texts such as {example}: {_told(error)}") from error


def _is_damage(error: BaseException) -> bool:
    """Whether this is of a library that was given something odd. The tokenizers in Rust raise a kind that is no
    Exception."""
    if isinstance(error, CrossguardError | MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def pretrained(path: str, shown: str = "", weights: bool = True, images: bool = False) -> Iterator[Pretrained]:
    """Lends a checkpoint: a local folder, or what a hub id stands for, from the local cache if all is there.

    Args:
        shown: How errors shall call it; as the user does, if empty.
        weights: Whether weights are needed; else it may be a tokenizer alone.
        images: Whether an image processor is needed.

    Raises:
        CrossguardError: It is no checkpoint, or not one that may be read.
    """
    shown = shown or path
    origin = source = Path(located(path))
    if not origin.is_dir():
        origin = source = snapshot(path, images)
        if weights and not any(origin.glob("*.safetensors")):
            source = converted(path) or origin
    with tempfile.TemporaryDirectory(prefix="crossguard-") as made:
        folder = Path(made)
        size = _stage(origin, source if weights else None, folder, shown)
        settings = folder / "config.json"
        told = _object(settings, shown) if settings.exists() else None
        if told is not None:
            _check_config(told, f"{shown}/config.json")
        yield Pretrained(shown, folder, told, size)


def _stage(origin: Path, source: Path | None, folder: Path, shown: str) -> _Size:
    """Puts what may be read into the folder: links to weights and vocabularies, and settings without what they may not
    say. Returns how large the weights of `source` are."""
    if (origin / "adapter_config.json").exists() and source:
        raise CrossguardError(
            f"{shown}/adapter_config.json makes this an adapter of another checkpoint; merge both with peft "
            "(merge_and_unload) and save the result"
        )
    size = _Size(0, 0)
    if source is not None:
        check_weights(source)
        listed = shards(source)
        size = _measured(listed, shown)
        for file in listed:
            _link(file, folder)
        if len(listed) > 1 or listed[0].name != "model.safetensors":
            index = {"metadata": {}, "weight_map": _weight_map(listed)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in parts(origin):
        if file.suffix == ".safetensors" or file.name.endswith((".py", ".safetensors.index.json")):
            continue
        vocabulary = file.name.startswith(("tokenizer.json", "vocab", "merges")) or file.suffix == ".model"
        most, held = MOST_TEXT if vocabulary else MOST_SETTINGS, file.stat().st_size
        if held > most:
            raise CrossguardError(f"{shown}/{file.name} has {held:,} bytes; at most {most:,} are read")
        if file.name == "tokenizer.json":
            _stage_tokenizer(file, folder, shown)
        elif vocabulary or file.suffix != ".json":
            _link(file, folder)
        else:
            told = _json(file, f"{shown}/{file.name}")
            (folder / file.name).write_text(json.dumps(_allowed(told, file.name, f"{shown}/{file.name}")))
    return size


def _stage_tokenizer(file: Path, folder: Path, shown: str) -> None:
    """A link to the tokenizer, or a copy without what `tokenizers` would print its surprise about on stdout."""
    told = _object(file, shown)
    _check_growth(told, f"{shown}/{file.name}")
    added = told.get("added_tokens")
    kept = _added(added) if isinstance(added, list) else added
    if kept == added:
        _link(file, folder)
    else:
        (folder / file.name).write_text(json.dumps(told | {"added_tokens": kept}))


def _check_growth(told: dict[str, Any], shown: str) -> None:
    """Raises where a tokenizer would make far longer texts of texts, or look at all pieces of endless words: a few
    replacements one after the other can fill any memory."""
    growth, nodes = 1, [told.get("normalizer"), told.get("pre_tokenizer")]
    while nodes:
        node = nodes.pop()
        if isinstance(node, list):
            nodes += node
        elif isinstance(node, dict):
            nodes += [value for value in node.values() if isinstance(value, list | dict)]
            growth *= max([1, *(len(node[key]) for key in ("content", "prepend") if isinstance(node.get(key), str))])
            growth *= _longest(node.get("precompiled_charsmap"))
        if growth > MOST_GROWTH:
            raise CrossguardError(f"{shown} would make texts more than {MOST_GROWTH:,} times as long; fetch it again")
    around = told.get("post_processor")
    pieces = json.dumps(around).count("SpecialToken") if isinstance(around, dict) else 0
    model = told.get("model")
    letters = model.get("max_input_chars_per_word", 0) if isinstance(model, dict) else 0
    for count, what in ((pieces, "special tokens around a text"), (letters, "letters of a word")):
        if isinstance(count, int) and count > MOST_GROWTH:
            raise CrossguardError(f"{shown} says {_short(count)} {what}; at most {MOST_GROWTH:,} are read")


def _longest(charsmap: Any) -> int:
    """The longest text that SentencePiece's map of characters puts in place of one; 1 where there is no map."""
    try:
        data = base64.b64decode(charsmap)
    except (ValueError, TypeError):
        return 1
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")  # behind the trie
    return max(1, max(map(len, texts)) // 16)  # real ones reach some fifty bytes


def _added(tokens: Any) -> Any:
    """Added tokens without settings that there are none of."""
    if isinstance(tokens, list):
        return [_added(token) for token in tokens]
    return {key: value for key, value in tokens.items() if key in _ADDED} if isinstance(tokens, dict) else tokens


def _link(file: Path, folder: Path) -> None:
    try:
        (folder / file.name).symlink_to(file.resolve())
    except OSError:  # a file system without links
        shutil.copyfile(file, folder / file.name)


def _measured(files: Sequence[Path], shown: str) -> _Size:
    """How many tensors and numbers the weights hold, by their headers alone."""
    from safetensors import safe_open

    tensors = numbers = 0
    for file in files:
        try:
            with safe_open(str(file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    shape = opened.get_slice(name).get_shape()
                    tensors, numbers = tensors + 1, numbers + torch.Size(shape).numel()
        except Exception as error:  # safetensors has one error for every kind of damage
            raise CrossguardError(f"{shown}/{file.name} cannot be read: {_told(error)}") from error
    return _Size(tensors, numbers)


def _weight_map(files: Sequence[Path]) -> dict[str, str]:
    from safetensors import safe_open

    found = {}
    for file in files:
        with safe_open(str(file), "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    return found


@contextmanager
def _bounded(size: _Size, shown: str) -> Iterator[None]:
    """Inside, no network is built that is far larger than the weights for it: a configuration of twenty thousand layers
    would take hours, one of a billion rows all memory. Weights that are tied stand twice in a network and once in the
    file, and a few may be missing, which is said later."""
    from torch.nn.modules import module

    most = _Size(4 * size.tensors + 1000, 2 * size.numbers + 2**26)
    mine, seen, counted = threading.get_ident(), set[tuple[int, str]](), [0]

    def count(owner: nn.Module, name: str, held: Tensor | None) -> None:
        place = (id(owner), name)
        if held is None or threading.get_ident() != mine or place in seen:
            return
        seen.add(place)
        counted[0] += held.numel()
        if len(seen) > most.tensors or counted[0] > most.numbers:
            raise CrossguardError(
                f"{shown}/config.json describes a far larger model than its weights, which hold {size.tensors:,} "
                f"tensors of {size.numbers:,} numbers; fetch both from one place"
            )

    hooks = [
        module.register_module_parameter_registration_hook(count),
        module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _json(file: Path, shown: str) -> Any:
    try:
        return json.loads(text(file, "fetch it again"))
    except CrossguardError:
        raise
    except (ValueError, RecursionError) as error:
        raise CrossguardError(f"{shown} cannot be read: it is no JSON ({_told(error)})") from error


def _object(file: Path, shown: str) -> dict[str, Any]:
    """What a file of settings says, nothing where there is none."""
    told = _json(file, f"{shown}/{file.name}") if file.exists() else {}
    if not isinstance(told, dict):
        raise CrossguardError(f"{shown}/{file.name} cannot be read: it holds {_short(told)} where settings stand")
    return told


def _allowed(told: Any, file: str, shown: str, depth: int = 0) -> Any:
    """What a file of settings says without what is decided here; raises for what is refused."""
    if isinstance(told, list):
        return [_allowed(value, file, shown, depth + 1) for value in told]
    if not isinstance(told, dict):
        if isinstance(told, str):
            _check_text(told, shown)
        return told
    kept = {}
    if (depth and file.startswith("special_tokens")) or "__type" in told or "content" in told:
        told = _added(told)
    for key, value in told.items():
        _check_text(key, shown)
        if file.startswith("added_tokens") or key in _OWN_NAMES:
            kept[key] = _texts(value, shown)
            continue
        if key == "added_tokens_decoder" and isinstance(value, dict):
            value = {number: _added(token) for number, token in value.items()}
        _check_setting(key, value, shown)
        run = file == "config.json" and (key in _RUN or key.startswith("_"))
        place = file == "tokenizer_config.json" and depth == 0 and (key in _PLACES or key.endswith("_file"))
        if not run and not place:
            kept[key] = _allowed(value, file, shown, depth + 1)
    return kept


def _texts(told: Any, shown: str) -> Any:
    """The same; raises where a text in it is none."""
    for value in told if isinstance(told, list) else [*told, *told.values()] if isinstance(told, dict) else [told]:
        if isinstance(value, str):
            _check_text(value, shown)
        elif isinstance(value, list | dict):
            _texts(value, shown)
    return told


def _check_setting(key: str, value: Any, shown: str) -> None:
    """Raises where a setting would run code or read what lies elsewhere."""
    if key in _REFUSED and value not in (None, False, "", [], {}):
        raise CrossguardError(f"{shown} says {key!r}: {_REFUSED[key]}")
    if key.removeprefix("_").startswith("attn_implementation") and "/" in str(value):
        raise CrossguardError(f"{shown} asks for attention of a hub ({_short(value)}), which is never loaded")
    if (key == "backbone" and isinstance(value, str)) or (key == "architecture" and ":" in str(value)):
        raise CrossguardError(f"{shown} names the {key} {_short(value)}, which lies elsewhere and is not read")


def _check_text(told: str, shown: str) -> None:
    try:
        told.encode()
    except UnicodeEncodeError:
        raise CrossguardError(
            f"{shown} holds {_short(told)}, which is no text: a part of a character is missing"
        ) from None


def _check_config(told: dict[str, Any], shown: str) -> None:
    """Raises where config.json counts what no model has."""
    named = told.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise CrossguardError(
            f"{shown} cannot be read: its architectures are {_short(named)}, which is no list of names"
        )

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, held in value.items():
                walk(held, name)
        elif isinstance(value, list):
            for held in value:
                walk(held, key)
        elif isinstance(value, int):
            most = MOST_LABELS if key == "num_labels" else MOST_LAYERS if _COUNTS.search(key) else MOST_NUMBER
            if abs(value) > most:
                raise CrossguardError(f"{shown} says {key}: {_short(value)}; at most {most:,} is read")

    walk(told, "")


def _check_class(name: object, find: Any, kind: type, shown: str) -> None:
    """Raises where a class is named that is none of `transformers`, or does something else there."""
    if name is None:
        return
    found = find(name) if isinstance(name, str) and name.isidentifier() else object
    if found is None or getattr(found, "is_dummy", False):  # one of another package: transformers knows a way round
        return
    if not isinstance(found, type) or not issubclass(found, kind):
        raise CrossguardError(f"{shown} names the class {_short(name)}, which is none that is used for this")


def _short(value: object) -> str:
    try:
        told = ascii(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too large to be shown"
    return told if len(told) <= 60 else f"{told[:45]}...{told[-10:]}"


def _told(error: BaseException) -> str:
    """What a library says, on one line, short, and in characters that can be printed."""
    told = " ".join(str(error).split()) or type(error).__name__
    told = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in told)
    return told if len(told) <= 120 else f"{told[:117]}..."
