"""The Hugging Face hub, asked once: what is cached is used, what cannot be had is said in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

from crossguard.errors import CrossguardError


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


def cached(path: str) -> bool:
    """Whether the local cache of the hub has the configuration and the weights of this model."""
    from huggingface_hub import try_to_load_from_cache

    return all(isinstance(try_to_load_from_cache(path, name), str) for name in ("config.json", "model.safetensors"))


def revision(path: str) -> str:
    """The revision of this model that the local cache of the hub has, shortened; empty where it has none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, "config.json")
    except HFValidationError:  # a path of this machine, and nothing is there
        return ""
    return Path(found).parent.name[:12] if isinstance(found, str) else ""
