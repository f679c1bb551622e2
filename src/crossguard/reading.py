"""Files as they are read: texts in UTF-8, the files below a folder, and what tells that they have changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from crossguard.errors import CrossguardError
from crossguard.files import reason

LEFT_BEHIND = frozenset({"__MACOSX"})  # folders that archives hold without anybody having put them there


class Found(NamedTuple):
    """A file below a folder: its path there (with `/`), its size in bytes and its date in nanoseconds."""

    path: str
    size: int
    modified: int


def text(file: Path, give: str) -> str:
    """The content of a text file in UTF-8, without the byte order mark that some editors put first.

    Args:
        give: What would do instead, for the error: "give a text file with one class name a line".

    Raises:
        CrossguardError: The file cannot be read or is in another encoding.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CrossguardError(f"{str(file)!r} cannot be read ({reason(error)}); {give}") from error
    return decoded(data, repr(str(file)), give)


def decoded(data: bytes, what: str, give: str) -> str:
    """The text that bytes hold in UTF-8, with or without a byte order mark; see `text`.

    Args:
        what: Where the bytes come from, for the error.
    """
    try:
        found = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CrossguardError(f"{what} cannot be read (it is not UTF-8 text); {give}") from error
    if "\0" in found:  # as UTF-16 without a byte order mark has it
        raise CrossguardError(f"{what} cannot be read (it is not UTF-8 text but holds null bytes); {give}")
    return found


def lines(content: str) -> list[str]:
    r"""The lines of a text, each stripped. Lines end with `\n` or `\r\n` and nowhere else: a caption may hold the other
    signs that Python takes for line ends, such as U+2028. Empty lines count unless they come last."""
    listed = [line.strip() for line in content.split("\n")]
    while listed and not listed[-1]:
        listed.pop()
    return listed


def folders(root: Path) -> list[str]:
    """The names of the folders in a folder, sorted; hidden ones left out."""
    return [entry.name for entry in _entries(root) if entry.is_dir()]


def below(root: Path, endings: Sequence[str]) -> list[Found]:
    """The files with one of these (lower-case) endings in a folder and in the folders inside it, in the order of their
    names, folder by folder.

    Links are followed, round trips excepted. What is hidden is not looked at, at any depth.
    """
    own = root.stat()
    return list(_below(root, "", frozenset({(own.st_dev, own.st_ino)}), tuple(endings)))


def _below(folder: Path, inside: str, above: frozenset[tuple[int, int]], endings: tuple[str, ...]) -> Iterator[Found]:
    for entry in _entries(folder):
        if entry.is_dir():
            noted = entry.stat()
            itself = (noted.st_dev, noted.st_ino)
            if itself not in above:  # else a link back to a folder that it lies in
                yield from _below(folder / entry.name, f"{inside}{entry.name}/", above | {itself}, endings)
        elif entry.name.lower().endswith(endings) and entry.is_file():
            noted = entry.stat()
            yield Found(inside + entry.name, noted.st_size, noted.st_mtime_ns)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            seen = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in LEFT_BEHIND]
    except OSError as error:
        raise CrossguardError(f"the folder {str(folder)!r} cannot be read ({reason(error)})") from error
    for entry in seen:
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise CrossguardError(
                f"the name {os.fsencode(entry.name)!r} in the folder {str(folder)!r} is not UTF-8; rename it"
            ) from None
    return sorted(seen, key=lambda entry: entry.name)


def fingerprint(rows: Iterable[object]) -> str:
    """A short text that says what was read, from what tells that it has changed: names, sizes, dates, contents."""
    told = hashlib.sha256()
    for row in rows:
        told.update(row if isinstance(row, bytes) else repr(row).encode())
        told.update(b"\n")
    return told.hexdigest()[:16]
