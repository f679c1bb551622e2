"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from crossguard.errors import CrossguardError


class WriteError(CrossguardError):
    """A file or folder that cannot be written: no space, no permission, something in the way."""


def write(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: to a temporary one beside it, flushed to the disk, then renamed over the old.

    Whatever goes wrong, the old file stays and nothing half-written is left.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {reason(error)}") from error


def check_writable(folder: Path) -> None:
    """Makes the folder, and raises now rather than after hours of work if no file can be written in it."""
    probe = folder / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"the folder {folder} cannot be written to: {reason(error)}") from error


def reason(error: OSError) -> str:
    """What the operating system says, without its numbers."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _flush_folder(folder: Path) -> None:
    """Makes a rename last through a power cut, where the system allows that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
