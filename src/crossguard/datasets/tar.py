"""The members of a tar file and where their bytes are, found by reading one block of 512 bytes for each.

`tarfile` makes an object with a dozen fields of every member, which takes longer than reading the images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from crossguard.errors import CrossguardError
from crossguard.limits import whole

BLOCK = 512
RECORD = re.compile(rb"(\d{1,18}) ([^=]+)=")  # of a header of POSIX: its length, its key
OCTAL = re.compile(rb"[0-7]+")
CHECKED = 4096  # headers whose checksums are verified at once
LONGEST = 1_000_000  # bytes that say what the next member is called: no path is that long

FILE, OLD_FILE, CONTIGUOUS = b"0", b"\0", b"7"
WITHOUT_DATA = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})  # links, devices, folders, pipes
LONG_NAME, LONG_LINK, SPARSE = b"L", b"K", b"S"  # of GNU tar
EXTENDED, EXTENDED_BY_SUN, FOR_ALL = b"x", b"X", b"g"  # of POSIX: what the next member, or all that follow, are called
ABOUT_OTHERS = frozenset({LONG_NAME, LONG_LINK, EXTENDED, EXTENDED_BY_SUN, FOR_ALL})


def members(file: BinaryIO, path: str) -> Iterator[tuple[str, int, int]]:
    """The files in an uncompressed tar file: the name of each, and where its bytes begin and how many there are.

    Reads the formats ustar, GNU and POSIX (pax), as `tarfile` does, but refuses what is damaged after its first member,
    where `tarfile` takes it for the end.

    Raises:
        CrossguardError: It is no tar file, is damaged or cut short, or holds sparse files.
    """
    end = os.fstat(file.fileno()).st_size
    at = 0
    longer: str | None = None  # the name that a header of GNU tar has announced
    general: dict[str, str] = {}
    special: dict[str, str] = {}
    headers: list[bytes] = []
    if not end:
        raise _not_whole(path, "it is empty")
    while at < end:  # a file that was not closed properly lacks the block of zeros at the end
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise _cut(path) if at else _not_whole(path, "it has not one whole header")
        kind = header[156:157]
        if not header[0] and not header[148] and not any(header):
            break
        headers.append(header)
        if at == 0 or len(headers) == CHECKED:
            _verify(headers, path)
            headers = []
        size = _number(header[124:136], path)
        data = at + BLOCK
        if special or general:
            size = int(special.get("size", general.get("size", size)))
        if kind in WITHOUT_DATA:
            size = 0
        at = data + (size + BLOCK - 1) // BLOCK * BLOCK
        if data + size > end:
            raise _cut(path)
        if size > LONGEST and kind in ABOUT_OTHERS:
            raise _not_whole(path, f"a name in it takes {size:,} bytes")
        if kind in (EXTENDED, EXTENDED_BY_SUN):
            special = _records(file.read(size), path)
        elif kind == FOR_ALL:
            general |= _records(file.read(size), path)
        elif kind == LONG_NAME:
            longer = _name(file.read(size), path)
        elif kind != LONG_LINK:
            if kind == SPARSE:
                raise _not_whole(path, "it holds sparse files, which are not read")
            if kind in (FILE, OLD_FILE, CONTIGUOUS):
                name = special.get("path") or longer or general.get("path") or _short_name(header, path)
                if not name.endswith("/"):
                    yield name, data, size
            special, longer = {}, None
    _verify(headers, path)


def _short_name(header: bytes, path: str) -> str:
    name = _name(header[:100], path)
    return f"{_name(header[345:500], path)}/{name}" if header[345] else name


def _name(field: bytes, path: str) -> str:
    try:
        return field.split(b"\0", 1)[0].decode()
    except UnicodeDecodeError:
        raise _not_whole(path, f"the name of its member {field.split(bytes(1), 1)[0]!r} is not UTF-8") from None


def _number(field: bytes, path: str) -> int:
    """A number in octal digits or, where these do not suffice, in bytes."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not OCTAL.fullmatch(digits):  # also a number below zero, with which a reader would go back for ever
        raise _not_whole(path, "a header in it is damaged")
    return int(digits, 8)


def _records(data: bytes, path: str) -> dict[str, str]:
    """What a header of POSIX says: records of the form `length key=value`, of which the name and the size count."""
    found: dict[str, str] = {}
    at = 0
    while (match := RECORD.match(data, at)) and int(match[1]):
        key, value = match[2], data[match.end() : at + int(match[1]) - 1]
        if key.startswith(b"GNU.sparse"):
            raise _not_whole(path, "it holds sparse files, which are not read")
        if key == b"path":
            found["path"] = _name(value, path)
        elif key == b"size":
            found["size"] = str(_decimal(value, path))
        at += int(match[1])
    return found


def _decimal(field: bytes, path: str) -> int:
    number = whole(field.decode("ascii", errors="replace"))
    if number is None or number < 0:
        raise _not_whole(path, "a header in it is damaged")
    return number


def _verify(headers: list[bytes], path: str) -> None:
    """Raises where the checksum of a header is not that of its bytes."""
    if not headers:
        return
    blocks = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    told = np.array([_number(header[148:156], path) for header in headers])
    # The checksum counts itself as blanks; some writers took bytes for signed.
    sums = blocks.sum(1, dtype=np.int64) - blocks[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")
    signed = blocks.view(np.int8).sum(1, dtype=np.int64) - blocks.view(np.int8)[:, 148:156].sum(1, dtype=np.int64)
    if not bool(((told == sums) | (told == signed + 8 * ord(" "))).all()):
        raise _not_whole(path, "a header in it is damaged")


def _not_whole(path: str, why: str) -> CrossguardError:
    return CrossguardError(f"the shard {path!r} is no whole tar file ({why}); fetch it again")


def _cut(path: str) -> CrossguardError:
    return CrossguardError(f"the shard {path!r} is cut short; fetch it again")
