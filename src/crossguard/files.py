"""Files that are there as a whole or not at all, and what they hold in a short text."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from crossguard.errors import CrossguardError

if TYPE_CHECKING:
    from torch import Tensor


LOCK = ".lock"

_TEMPORARY = re.compile(r"\.(?:.*\.)?([0-9a-f]{8})-([0-9]{1,9})\.[0-9a-f]{8}\.tmp", re.DOTALL)
_A_DAY = 86400.0  # seconds

_open: set[str] = set()  # what this process is writing now
_tidied: set[tuple[int, str]] = set()  # folders, and the process that has tidied them


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
    from safetensors.torch import save_file

    with writing(path) as temporary:
        save_file(dict(tensors), temporary, None if metadata is None else dict(metadata))


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Lends a path to write a file to; when the block ends, what was written there takes the place of `path`.

    As for `staging`: whatever goes wrong, the old file stays and nothing half-written is left.

    Raises:
        WriteError: the system refuses to write.
    """
    with staging(path.parent, path.name) as stage:
        yield stage / path.name


@contextmanager
def staging(folder: Path, name: str = "") -> Iterator[Path]:
    """Lends an empty folder inside of `folder`; when the block ends, each file in it takes its place in `folder`, one
    after the other, each as a whole.

    They are flushed to the disk first, and have the permissions that any new file has here. Libraries that write
    temporary files of their own leave them in the folder that is lent, which goes away. One that a killed process left
    is removed by the next process that writes in `folder`.

    Args:
        name: what is written, for error messages and as part of the name of the folder that is lent; everything in
            `folder`, if not given.

    Raises:
        WriteError: the system refuses to write.
    """
    stage = folder / f".{name[:60]}{'.' * bool(name)}{_tag()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy_first(folder)
        _open.add(stage.name)
        try:
            stage.mkdir()
            mode = stage.stat().st_mode & 0o666  # what the umask leaves of a new file
            yield stage
            written = sorted(stage.iterdir())
            for file in written:
                file.chmod(mode)  # a library may have written it for its owner alone
                _flush(file)
            for file in written:
                file.replace(folder / file.name)
        finally:
            _open.discard(stage.name)
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise WriteError(f"{folder / name} cannot be written: {reason(error)}") from error
    except Exception as error:
        if not _of_a_writer(error):
            raise
        raise WriteError(f"{folder / name} cannot be written: {' '.join(str(error).split())}") from error
    with suppress(OSError):  # makes the renames last through a power cut, where the system allows that
        _flush(folder)


def append(path: Path, text: str, make: bool = True) -> None:
    """Adds a text to the end of a file, and waits until it is on the disk. What is written through a link would land
    elsewhere, so that is refused.

    Args:
        make: whether the file and its folder are made where they are not there yet.
    """
    flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | (os.O_CREAT if make else 0)
    try:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, flags, 0o666)
        try:
            rest = text.encode()
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {reason(error)}") from error


def check_writable(folder: Path) -> None:
    """Raises now rather than after hours of work if no file can be written in the folder. Where it is not there, it is
    not there afterwards: what is found wrong later than this leaves no empty folders."""
    missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    try:
        make_writable(folder)
    finally:
        for one in missing:
            with suppress(OSError):  # it could not be made, or another process has put something there
                one.rmdir()


def make_writable(folder: Path) -> None:
    """Makes the folder, and raises if no file can be written in it. Removes what killed processes have left there
    half-written."""
    probe = folder / f".{_tag()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise WriteError(f"the folder {folder} cannot be written to: {reason(error)}") from error
    tidy(folder)


class LogFile(logging.FileHandler):
    """A log that is appended to a file. A line that cannot be written, for want of space or because its folder is
    gone, is left out: what matters is written elsewhere, and says so."""

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise WriteError(f"{path} cannot be written: {reason(error)}") from error

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):  # what is still waiting does not fit either
            super().close()


def tidy(folder: Path) -> None:
    """Removes what processes that are gone have left half-written in a folder."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            named = _TEMPORARY.fullmatch(entry.name)
            if named and entry.name not in _open and _gone(entry, *named.groups()):
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        Path(entry.path).unlink()


def _tidy_first(folder: Path) -> None:
    """Tidies a folder when this process first writes there."""
    key = os.getpid(), str(folder.absolute())
    if key not in _tidied:
        _tidied.add(key)
        tidy(folder)


def _gone(entry: os.DirEntry[str], where: str, number: str) -> bool:
    """Whether the process is gone that made this temporary file. One of another machine is waited for for a day."""
    if where != here():
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _A_DAY
    # One of our own number is of an earlier process that had it: what we write now is in `_open`.
    return int(number) == os.getpid() or gone(where, int(number))


def gone(where: str, number: int) -> bool:
    """Whether a process is known to have ended; of one elsewhere nobody here knows.

    Args:
        where: what `here` said there.
    """
    if where != here():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _tag() -> str:
    """Names a temporary file after this process."""
    return f"{here()}-{os.getpid()}.{secrets.token_hex(4)}"


@cache
def here() -> str:
    """Where numbers of processes are those of here: this machine, and inside of it this container."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def _of_a_writer(error: Exception) -> bool:
    """Whether a library says in a way of its own that it cannot write: safetensors by its one kind of error, tokenizers
    by a bare `Exception`."""
    from safetensors import SafetensorError

    return isinstance(error, SafetensorError) or type(error) is Exception


def digest(paths: Iterable[Path]) -> str:
    """A hash of the names and contents of files, 12 characters long; an empty text for none.

    A file is read again only where its size or one of its dates has changed.
    """
    whole, names = hashlib.sha256(), sorted(paths, key=lambda path: path.name)
    for path in names:
        whole.update(f"{path.name}\0{hashed(path)}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()[:12] if names else ""


def hashed(path: Path) -> str:
    """The SHA-256 of what a file holds; read again only where its size or one of its dates has changed."""
    try:
        found = path.stat()
        return _content(str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except OSError as error:
        raise CrossguardError(f"{path} cannot be read: {reason(error)}") from error


@lru_cache(maxsize=65536)
def _content(path: str, size: int, *dates: int) -> str:
    del size, dates  # only part of the key
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: OSError) -> str:
    """What the operating system says, without its numbers."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
