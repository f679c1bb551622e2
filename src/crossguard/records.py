"""The one place where a checkpoint reaches open_clip: its record, weights, text tower and tokenizer.

A record (open_clip_config.json) comes from anywhere. open_clip would fetch what it names, unpickle weights, and build
whatever it describes. So open_clip is shown settings that were read and checked here, weights in safetensors, and a
folder of its own with the configuration of a text tower; and nothing of it is asked to open anything itself.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crossguard import hub
from crossguard.checkpoints import (
    OPEN_CLIP_WEIGHTS,
    RECORD,
    check_file,
    check_finite,
    check_inside,
    check_tokenizer,
    check_weights,
    located,
    parts,
    quiet,
)
from crossguard.errors import CrossguardError
from crossguard.files import digest
from crossguard.limits import SIDE, WORDS, shortly
from crossguard.pretrained import Size, bounded, is_damage, pretrained, shapes_in, told_by
from crossguard.settings import read_record, read_settings

_PREFERRED = (OPEN_CLIP_WEIGHTS, "open_clip_pytorch_model.safetensors", "model.safetensors")
_HUB, _LOCAL = "hf-hub:", "local-dir:"
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TIMM = re.compile(r"\w[\w.-]*")

# What open_clip's tokenizers are told, beside their context; others would name code or files, or draw at random.
_TOKENIZER = {"clean": str, "strip_sep_token": bool, "language": str}


@dataclass(frozen=True)
class Record:
    """A checkpoint of open_clip that has been looked at.

    Args:
        shown: how the user calls it.
        model: what its network is built from, in open_clip's own words.
        preprocess: how images are prepared: mean, std, interpolation, resize_mode.
        weights: in safetensors.
        text: the configuration of a text tower of `transformers`, if it has one.
        words: a folder with the tokenizer, if it is one of `transformers`.
    """

    shown: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path
    text: dict[str, Any] | None = None
    words: Path | None = None

    @property
    def text_cfg(self) -> dict[str, Any]:
        return self.model["text_cfg"]

    def network(self) -> Any:
        """The network with its weights, in float32 on the CPU."""
        shapes = shapes_in(self.weights, str(self.weights))
        with naming(self.shown):
            network = _built(self, Size(len(shapes), sum(shape.numel() for shape in shapes.values())))
        held = _fitting(network, load(self.weights))
        _check_fit(network, {name: value.shape for name, value in held.items()}, self.shown)
        network.load_state_dict(held)
        check_finite(network, self.shown)
        return network

    def tokenizer(self) -> Any:
        """open_clip's own tokenizer, around one of `transformers` if the record names one."""
        kinds, told = library().tokenizer, _tokenizer_settings(self)
        if self.words is None:
            if told.get("strip_sep_token") or "language" in told:
                raise CrossguardError(
                    f"{self.shown} tells CLIP's own tokenizer {shortly(told)}, which it does not know"
                )
            return kinds.SimpleTokenizer(context_length=self.length, clean=told.get("clean", "lower"))
        with pretrained(str(self.words), shown=self.shown, weights=False) as source:
            inner = source.tokenizer()
        check_tokenizer(inner, self.shown)
        WORDS.check(max(inner.get_vocab().values()), f"the tokenizer of {self.shown}")
        # Made without its __init__, which would open the tokenizer itself.
        tokenizer = kinds.HFTokenizer.__new__(kinds.HFTokenizer)
        tokenizer.tokenizer, tokenizer.context_length = inner, self.length
        tokenizer.tokenizer_mode = self.text_cfg.get("tokenizer_mode") or ""
        tokenizer.clean_fn = kinds.get_clean_fn(told.get("clean", "whitespace"))
        tokenizer.strip_sep_token = bool(told.get("strip_sep_token", False))
        if "language" in told:
            tokenizer.set_lang_fn = inner.set_src_lang_special_tokens
            tokenizer.set_language(told["language"])
        return tokenizer

    @property
    def length(self) -> int:
        """The context: how many tokens of a text are read."""
        return int(self.text_cfg.get("context_length", 77))

    def content(self) -> dict[str, Any]:
        """What open_clip_config.json says of this checkpoint. open_clip reads its first two entries; the third is the
        text tower's own configuration, which open_clip would look up by the name that the first has of it."""
        told: dict[str, Any] = {"model_cfg": self.model, "preprocess_cfg": self.preprocess}
        return told if self.text is None else told | {"text_config": self.text}


def library() -> Any:
    """The package open_clip.

    Raises:
        CrossguardError: it is not installed, or cannot be used with the torch that is.
    """
    try:
        return importlib.import_module("open_clip")
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise CrossguardError(
            "OpenCLIP needs the package open_clip_torch with a torchvision that fits this torch (pip install "
            f"'crossguard[open_clip]'): {told_by(error)}"
        ) from error


def read(name: str, tag: str) -> Record:
    """The checkpoint that these two mean (`OpenCLIP`), looked at and checked.

    Raises:
        CrossguardError: it is none, or not one that may be read.
    """
    library()
    folder, repository = _folder(name)
    if folder is not None:
        if tag:
            raise CrossguardError(
                f"OpenCLIP({name!r}, {shortly(tag)}) names weights twice: the folder has its own; leave one of them out"
            )
        return _of_folder(folder, name, repository)
    return _of_architecture(name, tag)


def content(name: str, tag: str) -> str:
    """What the files of a checkpoint hold, in a short text; empty where nothing is there yet."""
    if name.startswith(_HUB):
        return hub.revision(name.removeprefix(_HUB), RECORD)
    folder = Path(located(name.removeprefix(_LOCAL)))
    if folder.is_dir():
        try:
            return digest(_files(folder))
        except CrossguardError:  # loading says why
            return ""
    file = Path(located(tag))
    if file.is_file():
        return digest([file, *(_files(file.parent, file) if (file.parent / RECORD).is_file() else ())])
    try:
        return hub.revision(_repository(name, tag), RECORD)
    except CrossguardError:
        return ""


def _files(folder: Path, but: Path | None = None) -> list[Path]:
    """The files of a folder that the answers of its checkpoint depend on."""
    named = [_weights(folder, str(folder))] if but is None else []
    words = [file for file in parts(folder) if file.suffix != ".safetensors"]
    return sorted({folder / RECORD, *named, *words} - {but})


def _folder(name: str) -> tuple[Path | None, str]:
    """The folder that a name means, and the hub id behind it if there is one; None for the name of an architecture."""
    if not name.strip():
        raise CrossguardError("the name of the model is empty; give a folder, 'hf-hub:owner/name', or an architecture")
    if name.startswith(_HUB):
        repository = name.removeprefix(_HUB)
        return hub.recorded(repository), repository
    here = Path(located(name.removeprefix(_LOCAL)))
    if here.is_file():
        raise CrossguardError(
            f"{name} is a file; give its architecture first, as in OpenCLIP('ViT-B-32', {name!r}), or its folder if "
            f"that has an {RECORD}"
        )
    if here.is_dir():
        if not (here / RECORD).is_file():
            which = ", so HuggingFace reads it" if (here / "config.json").is_file() else ""
            raise CrossguardError(f"{name} has no {RECORD}, so it is no checkpoint of open_clip{which}")
        return here, ""
    if name.startswith((_LOCAL, "/", "./", "../", "~")):
        raise CrossguardError(f"there is no folder {name.removeprefix(_LOCAL)!r}; give the folder of a checkpoint")
    return None, ""


def _of_folder(folder: Path, shown: str, repository: str) -> Record:
    told = read_record(check_inside(folder / RECORD, folder))
    record = Record(shown, told["model_cfg"], told.get("preprocess_cfg") or {}, _weights(folder, shown))
    return _checked(record, told.get("text_config"), folder, repository)


def _of_architecture(name: str, tag: str) -> Record:
    open_clip = library()
    model = open_clip.get_model_config(name.replace("/", "-"))
    if model is None:
        near = _near(name, open_clip.list_models())
        raise CrossguardError(f"{name!r} is neither a folder here nor an architecture of open_clip{near}")
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none is known"
        raise CrossguardError(
            f"OpenCLIP({name!r}) names an architecture without weights; give a file of weights, or a tag of "
            f"open_clip ({tags:.120})"
        )
    shown, file = f"OpenCLIP({name!r}, {tag!r})", Path(located(tag))
    if file.suffix in (".bin", ".pt", ".pth") and file.is_file():
        raise CrossguardError(
            f"{tag} is a pickle file, which is never read; make weights of it with 'crossguard convert {tag} "
            "OUT.safetensors'"
        )
    if file.is_file():
        check_file(file)
        beside = read_record(file.parent / RECORD) if (file.parent / RECORD).is_file() else {}
        record = Record(shown, model, beside.get("preprocess_cfg") or {}, file)
        return _checked(record, beside.get("text_config"), file.parent, "")
    repository = _repository(name, tag)
    told = open_clip.pretrained.get_pretrained_cfg(name, tag)
    if bool(told.get("quick_gelu", False)) != bool(model.get("quick_gelu", False)):
        other = name.removesuffix("-quickgelu") if model.get("quick_gelu") else f"{name}-quickgelu"
        raise CrossguardError(
            f"the weights {tag!r} were not trained with the activation of {name!r}; give OpenCLIP({other!r}, {tag!r})"
        )
    folder = hub.recorded(repository)
    preprocess = {key: told[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in told}
    return _checked(Record(shown, model, preprocess, _weights(folder, shown)), None, folder, repository)


def _repository(name: str, tag: str) -> str:
    """The hub id that open_clip knows of a tag."""
    open_clip = library()
    told = open_clip.pretrained.get_pretrained_cfg(name.replace("/", "-"), tag)
    if not told:
        near = _near(tag, open_clip.list_pretrained_tags_by_model(name))
        raise CrossguardError(f"{tag!r} is neither a file here nor weights that open_clip knows of {name!r}{near}")
    repository = "/".join(str(told.get("hf_hub", "")).split("/")[:2])
    if not repository:
        raise CrossguardError(
            f"open_clip fetches {tag!r} of {name!r} from {told.get('url')} as a pickle, which is never read; download "
            "it and use 'crossguard convert'"
        )
    return repository


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _weights(folder: Path, shown: str) -> Path:
    """The file with the weights, in the order of open_clip; raises where there is none or more than one."""
    check_weights(folder)
    for name in _PREFERRED:
        if (folder / name).is_file():
            return check_inside(folder / name, folder)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise CrossguardError(
            f"{shown} has weights in {len(found)} files; name the one that is meant {OPEN_CLIP_WEIGHTS}"
        )
    return found[0]


def _checked(record: Record, text: Any, folder: Path, repository: str) -> Record:
    """The record with its text tower and tokenizer found, after its names and sizes were looked at.

    Args:
        text: the configuration of the text tower, where the record holds it.
        folder: where the weights are.
        repository: the hub id of that folder, from which more may be fetched.
    """
    model, shown = record.model, record.shown
    for part in ("vision_cfg", "text_cfg"):
        if not isinstance(model.get(part), dict):
            raise CrossguardError(f"the record of {shown} has no {part}, so it describes no dual encoder")
    vision, told = model["vision_cfg"], model["text_cfg"]
    sizes = vision.get("image_size", 224)
    for side in sizes if isinstance(sizes, list | tuple) else (sizes,):
        if not isinstance(side, int) or side < 1:
            raise CrossguardError(f"the record of {shown} has an image_size of {shortly(sizes)}; give 1 or more")
        SIDE.check(side, f"the image_size of {shown}")
    timm = vision.get("timm_model_name")
    if timm is not None and not (isinstance(timm, str) and _TIMM.fullmatch(timm)):
        raise CrossguardError(f"the record of {shown} names the tower {shortly(timm)}, which lies elsewhere")
    hf = told.get("hf_model_name")
    if hf is not None:
        record = replace(record, text=_text_config(record, text, hf, repository))
    words = told.get("hf_tokenizer_name") or (hf if hf is not None else None)
    if words:
        record = replace(record, words=_words(record, folder, words, repository))
    return record


def _text_config(record: Record, text: Any, name: object, repository: str) -> dict[str, Any]:
    """What config.json says of the text tower: that of the record itself, or of the hub id it names."""
    if isinstance(text, dict):
        return dict(text)
    if not isinstance(name, str) or not _ID.fullmatch(name) or Path(name).exists():
        raise CrossguardError(
            f"the record of {record.shown} names the text tower {shortly(name)}, which is no hub id and is not read"
        )
    return read_settings(hub.single(name, "config.json", bool(repository), record.shown))


def _words(record: Record, folder: Path, name: object, repository: str) -> Path:
    """A folder with the tokenizer: that of the checkpoint, or of the hub id that the record names."""
    if _holds_words(folder):
        return folder
    if not isinstance(name, str) or not _ID.fullmatch(name) or Path(name).exists():
        raise CrossguardError(
            f"the record of {record.shown} names the tokenizer {shortly(name)}, which is no hub id; put the files of "
            f"the tokenizer into {folder}"
        )
    return hub.words(name, bool(repository), record.shown)


def _holds_words(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer.json", "vocab*", "*.model"))


def _tokenizer_settings(record: Record) -> dict[str, Any]:
    told = record.text_cfg.get("tokenizer_kwargs") or {}
    wrong = [key for key in told if not isinstance(told[key], _TOKENIZER.get(key, ()))]
    if wrong or told.get("clean", "lower") not in ("lower", "whitespace", "canonicalize"):
        raise CrossguardError(
            f"the record of {record.shown} tells the tokenizer {shortly(told)}; only clean, strip_sep_token and "
            "language are known"
        )
    if record.text_cfg.get("tokenizer_mode") not in (None, "", "clips"):
        raise CrossguardError(f"the record of {record.shown} has a tokenizer_mode that is not known")
    return told


def _built(record: Record, size: Size) -> nn.Module:
    """The network without its weights. It is built on torch's meta device first, which takes no memory, so that one
    that is far larger than its weights is refused. Towers of timm are left out there: their names say how large they
    are."""
    open_clip, left = library(), ("custom_text", "output_dict", "cast_dtype")
    kept = {key: value for key, value in record.model.items() if key not in left}
    family = open_clip.CLIP
    if record.model.get("custom_text") or record.text is not None:
        family = open_clip.CoCa if "multimodal_cfg" in kept else open_clip.CustomTextCLIP
    with tempfile.TemporaryDirectory(prefix="crossguard-") as made:
        text = dict(record.text_cfg)
        if record.text is not None:
            (Path(made) / "config.json").write_text(json.dumps(record.text))
            text |= {"hf_model_name": made, "hf_model_pretrained": False}
        vision = dict(record.model["vision_cfg"]) | {"timm_model_pretrained": False}
        small = {"layers": 1, "width": 64, "output_tokens": vision.get("output_tokens", False)}
        first = small if vision.get("timm_model_name") else vision
        with torch.device("meta"), bounded(size, record.shown):
            family(**kept | {"text_cfg": text, "vision_cfg": first})
        with bounded(size, record.shown):
            return family(**kept | {"text_cfg": text, "vision_cfg": vision}).eval()


def load(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def _fitting(network: Any, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that this network has for them: of checkpoints of before open_clip 2.0, of training
    on several devices, and of scales that were vectors."""
    if all(name.startswith("module.") for name in held):
        held = {name.removeprefix("module."): value for name, value in held.items()}
    if "positional_embedding" in held and not hasattr(network, "positional_embedding"):
        text = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
        held = {f"text.{name}" if name.startswith(text) else name: value for name, value in held.items()}
    for name in ("logit_scale", "logit_bias"):
        own = getattr(network, name, None)
        if own is not None and name in held and held[name].numel() == own.numel():
            held[name] = held[name].reshape(own.shape)
    if getattr(network, "logit_bias", None) is not None and "logit_scale" in held:
        held.setdefault("logit_bias", torch.zeros_like(network.logit_bias))
    position = "text.transformer.embeddings.position_ids"  # of transformers before 4.31
    own = network.state_dict()
    held = {name: value for name, value in held.items() if name != position or name in own}
    return {name: value.to(own[name].dtype) if name in own else value for name, value in held.items()}


def _check_fit(network: nn.Module, held: Mapping[str, torch.Size], shown: str) -> None:
    own = {name: value.shape for name, value in network.state_dict().items()}
    missing, strange = sorted(own.keys() - held.keys()), sorted(held.keys() - own.keys())
    if missing:
        what = layout(held)
        raise CrossguardError(
            f"the weights of {shown} lack {len(missing)} tensors of its architecture, e.g. {missing[0]!r}"
            + (f"; they are {what}" if what else "; fetch the weights and the record from one place")
        )
    if strange:
        raise CrossguardError(
            f"the weights of {shown} hold {len(strange)} tensors that its architecture has no place for, e.g. "
            f"{strange[0]!r:.60}; give the architecture that they were trained with"
        )
    for name, shape in own.items():
        if held[name] != shape:
            raise CrossguardError(
                f"{name!r} in the weights of {shown} has the shape {tuple(held[name])}, and its architecture wants "
                f"{tuple(shape)}; give the architecture that they were trained with"
            )


def layout(names: Mapping[str, object]) -> str:
    """What the names of tensors say about the model that they are of; empty where they say nothing."""
    if any(name.startswith("vision_encoder_state_dict.") for name in names):
        return "an image tower beside the state of its training, as in the files of QT-AFT and of TeCoA's authors"
    if any(name.startswith("vision_model.") for name in names):
        texts = any(name.startswith("text_model.") for name in names)
        return "a CLIP of transformers, which HuggingFace reads" if texts else "an image tower of transformers"
    if "visual.conv1.weight" in names or any(name.startswith("visual.trunk.") for name in names):
        return "a whole model of open_clip, which OpenCLIP reads"
    if "conv1.weight" in names and "class_embedding" in names:
        return "the image tower of a CLIP in the layout of OpenAI and open_clip"
    if any(name.startswith(("prompter.", "add_prompter.", "pad_")) for name in names):
        return "learned visual prompts and no tower"
    return ""


@contextmanager
def naming(shown: str) -> Iterator[None]:
    """Inside, whatever goes wrong in a library becomes a sentence that names the checkpoint, and nothing is printed."""
    try:
        with quiet():
            yield
    except BaseException as error:  # open_clip and timm raise many kinds
        if not is_damage(error):
            raise
        raise CrossguardError(f"{shown} describes a network that open_clip cannot build: {told_by(error)}") from error
