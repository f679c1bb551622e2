"""The one place where a checkpoint reaches `transformers`: its configuration, weights, tokenizer and image processor.

A checkpoint comes from anywhere. `transformers` would run code that lies beside the weights, fetch what a configuration
names, and let the folder choose how attention is computed. So it is shown a folder of its own that holds nothing but
the files that are read here (`checkpoints.parts`), checked and without what they may not say. Whatever is wrong with
one of them ends in a sentence that names it.
"""

from __future__ import annotations

import copy
import json
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
from crossguard.limits import VOCABULARY, WORDS, shortly
from crossguard.printing import one_line
from crossguard.settings import read_settings, read_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

# The files of settings; of the others, what transformers reads are vocabularies.
_SETTINGS = frozenset(
    """config.json tokenizer_config.json special_tokens_map.json added_tokens.json preprocessor_config.json
    processor_config.json""".split()  # noqa: SIM905
)

_SENTENCES = {
    "network": "{shown}/config.json describes a network that cannot be asked: {told}",
    "weights": "{shown}/config.json and its weights cannot be read together: {told}",
    "tokenizer": "{shown} holds no tokenizer that can be read (tokenizer.json, tokenizer_config.json, ...): {told}",
}


class Size(NamedTuple):
    """How large the weights of a checkpoint are."""

    tensors: int
    numbers: int


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that has been looked at, in a folder of its own; what is read from it is ours to use.

    Args:
        shown: How the user calls it.
        folder: What `transformers` is shown.
        settings: What each of its files of settings says, without what is decided here.
        size: How large its weights are.
    """

    shown: str
    folder: Path
    settings: dict[str, dict[str, Any]]
    size: Size

    def config(self) -> PreTrainedConfig:
        """The configuration of a model."""
        import transformers

        if "config.json" not in self.settings:
            raise CrossguardError(f"{self.shown} has no config.json, so it is no transformers checkpoint")
        told = self.settings["config.json"]
        kind = told.get("model_type")
        if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
            what = "names no model_type" if kind is None else f"names the model_type {shortly(kind)}"
            raise CrossguardError(
                f"{self.shown}/config.json cannot be read: it {what}, and transformers {transformers.__version__} "
                "knows none such; code of a checkpoint's own is never run"
            )
        with self.naming("config.json"):
            return transformers.CONFIG_MAPPING[kind].from_dict(copy.deepcopy(told))

    def model(self, config: PreTrainedConfig, masked: bool = False) -> tuple[Any, dict[str, Any]]:
        """The network in float32, and what `transformers` tells about missing and unexpected weights.

        Args:
            masked: Whether it shall be a masked language model, and not whatever the configuration describes.
        """
        import transformers

        family = transformers.AutoModelForMaskedLM if masked else transformers.AutoModel
        with self.naming("weights"), bounded(self.size, self.shown):
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

        if config is None:
            config = self._any_config()
        with self.naming("tokenizer"):
            for file in ("tokenizer_config.json", "config.json"):
                _check_class(
                    self.settings.get(file, {}).get("tokenizer_class"),
                    tokenizer_class_from_name,
                    transformers.PreTrainedTokenizerBase,
                    f"{self.shown}/{file}",
                )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(self.folder), config=config, local_files_only=True, trust_remote_code=False
            )
            check_tokenizer(tokenizer, self.shown)
            WORDS.check(max(tokenizer.get_vocab().values()), f"the tokenizer of {self.shown}")
            tokenizer(["a photo of a cat"])  # some are read and cannot be asked
        return tokenizer

    def image_processor(self, config: PreTrainedConfig) -> Any:
        """The image processor."""
        import transformers
        from transformers.image_processing_utils import ImageProcessingMixin
        from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

        file, told = "preprocessor_config.json", self.settings.get("preprocessor_config.json", {})
        nested = self.settings.get("processor_config.json", {}).get("image_processor")
        if nested is not None:
            file, told = "processor_config.json", nested
        if not isinstance(told, dict):
            raise CrossguardError(f"{self.shown}/{file} is broken: its image_processor is {shortly(told)}")
        with self.naming(file):
            for settings in (told, self.settings.get("config.json", {})):
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

        told = self.settings.get("config.json", {})
        kind = told.get("model_type")
        if isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
            return self.config()
        with self.naming("config.json"):
            return transformers.PreTrainedConfig.from_dict(copy.deepcopy(told))

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
            if not is_damage(error):
                raise
            told = told_by(error).replace(f"{self.folder}/", "").replace(str(self.folder), self.shown)
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
        if not is_damage(error):
            raise
        example = f"{texts[0]!r:.60}" if texts else "none"
        raise CrossguardError(f"the tokenizer cannot read texts such as {example}: {told_by(error)}") from error


def is_damage(error: BaseException) -> bool:
    """Whether this is of a library that was given something odd. The tokenizers in Rust raise a kind that is no
    Exception."""
    if isinstance(error, CrossguardError | MemoryError):
        return False
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def pretrained(
    path: str, shown: str = "", weights: bool = True, images: bool = False, words: bool = True
) -> Iterator[Pretrained]:
    """Lends a checkpoint: a local folder, or what a hub id stands for, from the local cache if all is there.

    Args:
        shown: How errors shall call it; as the user does, if empty.
        weights: Whether weights are needed; else it may be a tokenizer alone.
        images: Whether an image processor is needed.
        words: Whether a tokenizer is needed.

    Raises:
        CrossguardError: It is no checkpoint, or not one that may be read.
    """
    shown = shown or path
    origin = source = Path(located(path))
    if not origin.is_dir():
        origin = source = snapshot(path, images, words)
        if weights and not any(origin.glob("*.safetensors")):
            source = converted(path) or origin
    with tempfile.TemporaryDirectory(prefix="crossguard-") as made:
        folder = Path(made)
        size = Size(0, 0) if not weights else _stage_weights(source, folder, shown)
        yield Pretrained(shown, folder, _stage_settings(origin, folder), size)


def _stage_weights(source: Path, folder: Path, shown: str) -> Size:
    """Puts links to the weights into the folder, and returns how large they are."""
    if (source / "adapter_config.json").exists():
        raise CrossguardError(
            f"{shown}/adapter_config.json makes this an adapter of another checkpoint; merge both with peft "
            "(merge_and_unload) and save the result"
        )
    check_weights(source)
    numbers, places = 0, {}
    for file in shards(source):
        shapes = shapes_in(file, f"{shown}/{file.name}")
        numbers += sum(shape.numel() for shape in shapes.values())
        places |= dict.fromkeys(shapes, file.name)
        _link(file, folder)
    if set(places.values()) != {"model.safetensors"}:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return Size(len(places), numbers)


def _stage_settings(origin: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Puts links to vocabularies into the folder, and settings without what they may not say, which it returns."""
    settings = {}
    for file in parts(origin):
        if file.name in _SETTINGS:
            settings[file.name] = read_settings(file)
            (folder / file.name).write_text(json.dumps(settings[file.name]))
        elif file.name == "tokenizer.json":
            told, whole = read_tokenizer(file)
            if whole:
                _link(file, folder)
            else:
                (folder / file.name).write_text(json.dumps(told))
        elif file.suffix not in (".safetensors", ".py") and not file.name.endswith(".safetensors.index.json"):
            VOCABULARY.check(file.stat().st_size, str(file))
            _link(file, folder)
    return settings


def _link(file: Path, folder: Path) -> None:
    try:
        (folder / file.name).symlink_to(file.resolve())
    except OSError:  # a file system without links
        shutil.copyfile(file, folder / file.name)


def shapes_in(file: Path, shown: str) -> dict[str, torch.Size]:
    """The shapes of the tensors in a file, by its header alone."""
    from safetensors import safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            return {name: torch.Size(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors has one error for every kind of damage
        raise CrossguardError(f"{shown} cannot be read: {told_by(error)}") from error


@contextmanager
def bounded(size: Size, shown: str) -> Iterator[None]:
    """Inside, no network is built that is far larger than the weights for it: a configuration of twenty thousand layers
    would take hours, one of a billion rows all memory. Weights that are tied stand twice in a network and once in the
    file, and a few may be missing, which is said later."""
    from torch.nn.modules import module

    most = Size(4 * size.tensors + 1000, 2 * size.numbers + 2**26)
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


def _check_class(name: object, find: Any, kind: type, shown: str) -> None:
    """Raises where a class is named that is none of `transformers`, or does something else there."""
    if name is None:
        return
    found = find(name) if isinstance(name, str) and name.isidentifier() else object
    if found is None or getattr(found, "is_dummy", False):  # one of another package: transformers knows a way round
        return
    if not isinstance(found, type) or not issubclass(found, kind):
        raise CrossguardError(f"{shown} names the class {shortly(name)}, which is none that is used for this")


def told_by(error: BaseException) -> str:
    """What a library says, on one line, short, and in signs that can be printed."""
    told = one_line(str(error)) or type(error).__name__
    return told if len(told) <= 120 else f"{told[:117]}..."
