"""The Hugging Face hub, asked once: what is cached is used, what cannot be had is said in a sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

from crossguard.errors import CrossguardError
from crossguard.printing import one_line


def ask_hub(path: str) -> None:
    """Raises unless the hub has this model: one question, where `transformers` would retry for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(path, timeout=10)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CrossguardError(
            f"{path!r} is neither a folder here nor a model of the hub that you may read; "
            "check the name, or log in with 'hf auth login' if it is private"
        ) from error
    except Exception as error:  # no network, no server, or HF_HUB_OFFLINE
        where = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
        raise CrossguardError(
            f"{path!r} is neither a folder here nor complete in the hub cache ({where}), and the hub cannot be "
            f"reached; download it where there is a network (hf download {path}) and pass the folder"
        ) from error


# What is fetched of a model: settings, words and weights. Code and pickles stay where they are.
_WANTED = [
    "config.json",
    "vocab*",
    "merges*",
    "tokenizer*",
    "added_tokens*",
    "special_tokens*",
    "preproc*",
    "processor*",
]
_WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_UNWANTED = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl"]


def snapshot(path: str, images: bool = False, words: bool = True) -> Path:
    """The folder of the local cache that holds what is read of this model; what is not there yet is fetched.

    Args:
        images: Whether an image processor belongs to it.
        words: Whether a tokenizer belongs to it.

    Raises:
        CrossguardError: There is no such model, or it cannot be had from here.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        found = Path(snapshot_download(path, local_files_only=True))
        if _complete(found, images, words):
            return found
    except HFValidationError as error:
        raise CrossguardError(f"{path!r} is neither a folder here nor the name of a model of the hub") from error
    except OSError:  # nothing of it is there
        pass
    ask_hub(path)
    try:
        return Path(snapshot_download(path, allow_patterns=[*_WANTED, *_WEIGHTS, "*.model"], ignore_patterns=_UNWANTED))
    except Exception as error:  # of the network, the server, or the disk
        raise CrossguardError(f"{path!r} cannot be fetched from the hub: {one_line(str(error))[:150]}") from error


def _complete(folder: Path, images: bool, words: bool) -> bool:
    """Whether a folder of the cache has configuration, weights, and words and image processor if they are needed."""
    index = folder / "model.safetensors.index.json"
    whole = (folder / "model.safetensors").exists() or (
        index.exists()
        and all((folder / name).exists() for name in set(re.findall(r"[\w.-]+\.safetensors", index.read_text())))
    )
    kinds = [
        ("config.json",),
        *([("tokenizer.json", "vocab*", "*.model")] if words else []),
        *([("preproc*", "processor*")] if images else []),
    ]
    return whole and all(any(any(folder.glob(pattern)) for pattern in kind) for kind in kinds)


_RECORD = "open_clip_config.json"
_WORDS = ["tokenizer*", "vocab*", "merges*", "added_tokens*", "special_tokens*", "*.model", "config.json"]


def recorded(path: str) -> Path:
    """The folder of the local cache with a checkpoint of open_clip: record, words and weights. What is not there yet is
    fetched.

    Raises:
        CrossguardError: There is no such model, it has no weights in safetensors, or it cannot be had from here.
    """
    found = _cached(path)
    if found is not None and (found / _RECORD).is_file() and any(found.glob("*.safetensors")):
        return found
    ask_hub(path)
    found = _fetched(path, [_RECORD, *_WORDS, "open_clip_*.safetensors"])
    if not any(found.glob("*.safetensors")):
        found = _fetched(path, ["model.safetensors"])
    if not any(found.glob("*.safetensors")):
        raise CrossguardError(
            f"{path!r} has no weights in safetensors on the hub, and pickles are never read; download it with 'hf "
            "download' and use 'crossguard convert'"
        )
    return found


def single(path: str, file: str, fetch: bool, shown: str) -> Path:
    """One file of a model in the local cache of the hub.

    Args:
        fetch: whether it may be fetched where it is not there.
        shown: what needs it, for the error.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, file)
    if isinstance(found, str):
        return Path(found)
    if fetch:
        ask_hub(path)
        whole = _fetched(path, [file]) / file
        if whole.is_file():
            return whole
    raise CrossguardError(
        f"{shown} needs {file} of {path!r}, which is not in the hub cache; fetch it with 'hf download {path} {file}'"
    )


def words(path: str, fetch: bool, shown: str) -> Path:
    """The folder of the local cache with the tokenizer of a model.

    Args:
        fetch: whether it may be fetched where it is not there.
        shown: what needs it, for the error.
    """
    found = _cached(path)
    if found is None or not any(any(found.glob(pattern)) for pattern in ("tokenizer.json", "vocab*", "*.model")):
        if not fetch:
            raise CrossguardError(
                f"{shown} needs the tokenizer of {path!r}, which is not in the hub cache; fetch it with 'hf download "
                f'{path} --include "tokenizer*" "vocab*"\''
            )
        ask_hub(path)
        found = _fetched(path, _WORDS)
    return found


def _cached(path: str) -> Path | None:
    """The folder of the local cache for this model, if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except HFValidationError as error:
        raise CrossguardError(f"{path!r} is not the name of a model of the hub") from error
    except OSError:  # nothing of it is there
        return None


def _fetched(path: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=patterns, ignore_patterns=_UNWANTED))
    except Exception as error:  # of the network, the server, or the disk
        raise CrossguardError(f"{path!r} cannot be fetched from the hub: {one_line(str(error))[:150]}") from error


def converted(path: str) -> Path | None:
    """The folder of the cache with the safetensors that the hub's own robot has made of a model that has pickles only;
    None where there are none."""
    from transformers.safetensors_conversion import auto_conversion

    found = auto_conversion(path, ignore_errors_during_conversion=True)
    if not found or not found[0]:
        return None
    file = Path(found[0])
    if file.name.endswith(".index.json"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, revision=found[1], allow_patterns=_WEIGHTS))
    return file.parent


def revision(path: str, file: str = "config.json") -> str:
    """The revision of this model that the local cache of the hub has, shortened; empty where it has none.

    Args:
        file: one that every revision has.
    """
    found = cached(path, file)
    return "" if found is None else found.parent.name[:12]


def cached(path: str, file: str) -> Path | None:
    """A file of this model in the local cache of the hub; None where it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, file)
    except HFValidationError:  # a path of this machine, and nothing is there
        return None
    return Path(found) if isinstance(found, str) else None
