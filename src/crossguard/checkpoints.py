"""Folders and hub ids in the formats of `transformers` and open_clip: what dual encoders and language models are read
from."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from crossguard.errors import CrossguardError
from crossguard.files import digest
from crossguard.hub import revision
from crossguard.limits import SETTINGS, shortly
from crossguard.reading import read_json

if TYPE_CHECKING:
    from torch import nn

_PICKLES = (".bin", ".pt", ".pth", ".pkl")
PICKLED = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how they begin
_PARTS = ("config.json", "vocab", "merges", "tokenizer", "added_tokens", "special_tokens", "preproc", "processor")
_WEIGHTS = "model.safetensors"
_INDEX = ".safetensors.index.json"
RECORD = "open_clip_config.json"  # of a folder that open_clip reads
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"  # what it looks for there first

Kind = Literal["transformers", "open_clip", "weights", "pickle", ""]


def kind(path: str) -> Kind:
    """What kind of checkpoint a local path is, by the names of its files and one line of config.json; loads nothing.

    A folder of `transformers` is for `HuggingFace`, one of open_clip for `OpenCLIP`; where both stand in one folder, as
    on the hub, it is one of `transformers` if config.json says which model it describes. A single file is "weights"
    (safetensors) or "pickle". Empty for everything else, and for what is not there.
    """
    here = Path(located(path))
    try:
        if here.is_file():
            return "weights" if here.suffix == ".safetensors" else "pickle" if here.suffix in _PICKLES else ""
        if _names_a_model(here / "config.json"):
            return "transformers"
        return "open_clip" if (here / RECORD).is_file() else ""
    except (OSError, ValueError):  # this can be no path
        return ""


def _names_a_model(config: Path) -> bool:
    """Whether a config.json says which model of `transformers` it describes; not where it is damaged."""
    try:
        return config.is_file() and "model_type" in read_json(config, dict[str, Any], "", SETTINGS)
    except CrossguardError:
        return False


def located(path: str) -> str:
    """The path with the user's home folder in place of a `~` at its start; hub ids stay as they are."""
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except (RuntimeError, ValueError):  # of a user who is not known here, or who has a null byte in the name
        return path


def weights(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights; none where they are not all there. What else lies in the folder, such as the
    state of a training, is no part of the model."""
    try:
        return shards(folder)
    except CrossguardError:  # loading says why
        record, own = folder / RECORD, folder / OPEN_CLIP_WEIGHTS
        return [own] if record.is_file() and own.is_file() else []


class _Index(TypedDict):
    weight_map: dict[str, str]


def parts(folder: Path) -> list[Path]:
    """The files of a checkpoint that its answers depend on. Nothing else of a folder is read.

    Raises:
        CrossguardError: One of them is a link to a place outside of the folder.
    """
    found = (
        file
        for file in folder.glob("*")
        if file.name.startswith(_PARTS) or file.suffix == ".model" or file.name.endswith(_INDEX)
    )
    return [check_inside(file, folder) for file in sorted({*found, *weights(folder)}) if file.is_file()]


def check_inside(file: Path, folder: Path) -> Path:
    """The same file; raises where it is a link that leads out of its folder. In the cache of the hub, files are links
    to the folder "blobs" of their model."""
    whole, real = folder.resolve(), file.resolve()
    cached = whole.parent.parent / "blobs" if whole.parent.name == "snapshots" else whole
    if not (real.is_relative_to(whole) or real.is_relative_to(cached)):
        raise CrossguardError(
            f"{file} is a link that leads out of its folder, so it is not read; put the file itself there, or give the "
            "folder that it leads to"
        )
    return file


def content(path: str) -> str:
    """What a checkpoint holds, in a short text: the hash of a folder's weights, configuration, tokenizer and image
    processor, or the revision of a hub id; empty where nothing is there yet."""
    folder = Path(located(path))
    if folder.is_dir():
        return digest(parts(folder)) if weights(folder) else ""
    return revision(path)


def check_weights(folder: Path) -> None:
    """Raises unless the folder has weights in safetensors that may be tried: pickles could run code, and a pointer of
    git-lfs stands for a file that was never fetched."""
    found = [check_inside(file, folder) for file in sorted(folder.glob("*.safetensors")) if file.is_file()]
    if not found:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        what = f"only {pickles[0]}, a pickle file, which is never read" if pickles else "no weights"
        raise CrossguardError(
            f"{folder} holds {what}; convert it with 'crossguard convert', or download the weights as model.safetensors"
        )
    for file in found:
        check_file(file)


def check_file(file: Path) -> None:
    """Raises where a file with the name of safetensors is a pickle, or a pointer of git-lfs."""
    with file.open("rb") as opened:
        start = opened.read(24)
    if start.startswith(PICKLED):
        raise CrossguardError(
            f"{file} is a pickle file under another name, which is never read; convert it with 'crossguard convert', "
            "or download the weights as model.safetensors"
        )
    if start.startswith(b"version https://git-lfs"):
        raise CrossguardError(
            f"{file} is a pointer of git-lfs and not the weights; fetch them with 'git lfs pull', or download the "
            "checkpoint with 'hf download'"
        )


def shards(folder: Path) -> list[Path]:
    """The files with the weights of a checkpoint: model.safetensors, or what its index names.

    Raises:
        CrossguardError: There are none, or the index names what is no file of this folder.
    """
    if (folder / _WEIGHTS).is_file():
        return [check_inside(folder / _WEIGHTS, folder)]
    index = folder / f"{_WEIGHTS}.index.json"
    if not index.is_file():
        raise CrossguardError(f"{folder} has neither {_WEIGHTS} nor {index.name}; save it again with save_pretrained")
    told = read_json(check_inside(index, folder), _Index, "fetch it again", SETTINGS)
    names = set(told["weight_map"].values())
    if not names:
        raise CrossguardError(f"{index} names no weights; fetch it again")
    for name in sorted(names):
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or not (folder / name).is_file():
            raise CrossguardError(
                f"{index} names {shortly(name)}, which is no file with weights in this folder; fetch all files again"
            )
    return [check_inside(folder / name, folder) for name in sorted(names)]


def fingerprint(network: nn.Module) -> str:
    """A hash of the weights of a network, whatever files they came from, 12 characters long."""
    whole = hashlib.sha256()
    add_weights(whole, network)
    return whole.hexdigest()[:12]


def add_weights(whole: hashlib._Hash, network: nn.Module) -> None:
    """Adds the names, shapes and numbers of all weights to a hash."""
    held = network.state_dict()
    for name in sorted(held):
        value = held[name].detach().cpu()
        whole.update(f"{name}\0{tuple(value.shape)}\0".encode())
        whole.update(value.contiguous().numpy().tobytes())


def check_finite(network: nn.Module, source: str) -> None:
    """Raises when a weight is NaN or infinite: such a model would look perfectly robust."""
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CrossguardError(f"the weights in {source} are damaged: {name!r} holds NaN or infinite values")


def check_tokenizer(tokenizer: Any, source: str) -> None:
    """Raises for the empty tokenizer that `transformers` makes where its files are missing."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise CrossguardError(f"{source} holds no tokenizer; add its files, such as tokenizer.json")


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, `transformers` prints nothing, neither errors nor progress bars: what matters of them is raised."""
    import transformers

    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
