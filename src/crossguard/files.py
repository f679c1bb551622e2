"""Files that are there as a whole or not at all, and what they hold in a short text."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from crossguard.errors import CrossguardError

if TYPE_CHECKING:
    from torch import Tensor


class WriteError(CrossguardError):
    """A file or folder that cannot be written: no space, no permission, something in the way."""


def write(path: Path, content: str | bytes) -> None:
    """Writes a file as a whole or not at all, as `writing` does."""
    data = content.encode() if isinstance(content, str) else content
    with writing(path) as temporary:
        temporary.write_bytes(data)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file as a whole or not at all. It goes to the disk as it is, without a copy in memory.

    The tensors must be contiguous and must not share memory.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, None if metadata is None else dict(metadata))
        except SafetensorError as error:  # its own kind of error, also where the disk is full
            raise WriteError(f"{path} cannot be written: {error}") from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Lends a path beside `path` to write to; when the block ends, what was written there takes the place of `path`.

    It is flushed to the disk first, and has the permissions that any new file has here. Whatever goes wrong, the old
    file stays and nothing half-written is left.

    Raises:
        WriteError: the system refuses to write.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # a library may have put a file of its own here, for its owner alone
            _flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {reason(error)}") from error
    with suppress(OSError):  # makes the rename last through a power cut, where the system allows that
        _flush(path.parent)


def share(path: Path) -> None:
    """Gives a file the permissions that any new file has in its folder: some libraries write files that only their
    owner may read, whatever the umask."""
    probe = _probe(path.parent)
    try:
        try:
            probe.touch(exist_ok=False)
            path.chmod(probe.stat().st_mode)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"{path} cannot be shared: {reason(error)}") from error


def check_writable(folder: Path) -> None:
    """Makes the folder, and raises now rather than after hours of work if no file can be written in it."""
    probe = _probe(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"the folder {folder} cannot be written to: {reason(error)}") from error


def digest(paths: Iterable[Path]) -> str:
    """A hash of the names and contents of files, 12 characters long; an empty text for none.

    A file is read again only where its size or one of its dates has changed.
    """
    whole, names = hashlib.sha256(), sorted(paths, key=lambda path: path.name)
    for path in names:
        try:
            found = path.stat()
            content = _content(str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        except OSError as error:
            raise CrossguardError(f"{path} cannot be read: {reason(error)}") from error
        whole.update(f"{path.name}\0{content}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()[:12] if names else ""


@lru_cache(maxsize=65536)
def _content(path: str, size: int, *dates: int) -> str:
    del size, dates  # only part of the key
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: OSError) -> str:
    """What the operating system says, without its numbers."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _probe(folder: Path) -> Path:
    return folder / f".{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
