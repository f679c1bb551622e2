"""What was found out about large files, kept beside them for the next process: an index of shards, hashes of images.

It lies in the folder that the environment variable CROSSGUARD_CACHE names, by default `crossguard` in the user's cache
folder. It only saves time: what is missing, broken or older than its files is made anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from crossguard import files
from crossguard.errors import CrossguardError

VERSION = 1

Read = Sequence[tuple[str, int, int]]  # the files behind an index: path, size, date in nanoseconds


def folder() -> Path:
    """Where indexes are kept."""
    named = os.environ.get("CROSSGUARD_CACHE")
    if named:
        return Path(named).expanduser()
    around = os.environ.get("XDG_CACHE_HOME")
    return (Path(around) if around else Path("~/.cache").expanduser()) / "crossguard"


def recall(kind: str, read: Read, identities: Sequence[str] = ()) -> Mapping[str, np.ndarray] | None:
    """What was remembered of this kind about these very files; None where nothing was, or about earlier ones.

    Args:
        identities: what else tells the files from earlier ones; see `reading.identities`.
    """
    try:
        with np.load(_place(kind, read), allow_pickle=False) as opened:
            found = {name: opened[name] for name in opened.files}
    except Exception:  # what numpy raises on broken bytes is not bounded by any documentation
        return None
    return found if found.pop("about", np.zeros(0)).tobytes() == _about(kind, read, identities) else None


def remember(kind: str, read: Read, arrays: Mapping[str, np.ndarray], identities: Sequence[str] = ()) -> None:
    """Keeps arrays about these files, where the folder can be written to."""
    content = io.BytesIO()
    np.savez(content, **arrays, about=np.frombuffer(_about(kind, read, identities), np.uint8))  # pyright: ignore[reportArgumentType]
    with suppress(CrossguardError, OSError):
        files.write(_place(kind, read), content.getvalue())


def _place(kind: str, read: Read) -> Path:
    """One file for the same paths, so that what has changed replaces what was."""
    named = "\0".join((kind, *(str(Path(path).absolute()) for path, _, _ in read)))
    told = hashlib.sha256(named.encode("utf-8", "surrogatepass"))
    return folder() / f"{kind}-{told.hexdigest()[:24]}.npz"


def _about(kind: str, read: Read, identities: Sequence[str]) -> bytes:
    paths = [(str(Path(path).absolute()), size, date) for path, size, date in read]
    return json.dumps((VERSION, kind, paths, list(identities))).encode()
