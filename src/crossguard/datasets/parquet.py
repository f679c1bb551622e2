"""Images, labels and captions in Parquet files, as this project and as the Hugging Face hub write them."""

from __future__ import annotations

import glob
import importlib
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePath
from typing import Any, overload

import numpy as np
import torch

from crossguard import reading
from crossguard.datasets import index
from crossguard.datasets.names import check_order, class_list, split_of, spoken
from crossguard.datasets.pixels import DIGEST, Decoded, Memory, Opened, digest, together
from crossguard.errors import CrossguardError
from crossguard.files import reason
from crossguard.limits import ENCODED, SAMPLES, TABLE, TEXT, Limit, shortly
from crossguard.printing import one_line

IMAGE = ("image", "img")
LABEL = ("label", "labels", "fine_label")
CAPTIONS = ("captions", "caption")

ON_DISK = 20  # as much again may lie unpacked in files of its own, for row groups too large to be held
WORTH_KEEPING = 100_000_000  # bytes of images: below that, they are hashed faster than anybody notices


@dataclass(frozen=True)
class Parquet(Decoded):
    """Images with labels or captions in Parquet files, as the Hugging Face hub has them.

    The column `image` holds encoded images (bytes, or Hugging Face's struct of bytes and path); beside it are
    `label` and `name`, or `captions`. `key` names the samples where it is unique, else the row number does.

    Rows with captions that have the same image, byte for byte, are one sample with the captions of all; to know them,
    all images are read once. Underscores in class names are spaces.

    Args:
        path: A file, a folder of files, or a pattern such as `data/test-*.parquet`.
        classes: Class names in label order, where the file has none or others are wanted; or the path of a
            text file with one a line.
        templates: Prompt templates with `{}` for the class name.
        domain: Keeps the rows whose column `domain` says this.
        split: Keeps this split alone, by the names of files and folders (`test-00000-of-00002.parquet`,
            `test.parquet`, `default/test/0000.parquet`) or by the column `split`; `all` takes everything. Files of
            several splits need it.
        size: Resizes the short side and cuts out the middle square; None keeps the images as they are.
        skip_broken: Leaves unreadable images out and counts them; every image is decoded at opening to know.
    """

    path: str
    classes: tuple[str, ...] | str = ()
    templates: tuple[str, ...] = ("a photo of a {}",)  # pyright: ignore[reportIncompatibleMethodOverride]
    domain: str | None = None
    split: str | None = None
    size: int | None = None
    skip_broken: bool = False

    def _open(self) -> Opened:
        files = parquet_files(self.path)
        if self.split not in (None, "all"):
            files = [file for file in files if split_of(file.path) == self.split] or files
        _check_splits(self.path, files, self.split)
        root, classes = _root(self.path), class_list(self.classes)
        told = reading.identities(Path(root), files)
        return _opened(root, tuple(files), told, classes, self.domain, self.split, self.skip_broken)


def parquet_files(path: str) -> list[reading.Found]:
    """The files that `path` names, by their paths below `_root`, sorted."""
    place, root = Path(path).expanduser(), Path(_root(path))
    if place.is_dir():
        files = reading.below(place, (".parquet",))
        if not files:
            raise CrossguardError(f"the folder {path!r} holds no .parquet file; give the folder or the file that does")
        return files
    named = [place] if place.is_file() else map(Path, glob.glob(str(place), recursive=True))  # noqa: PTH207
    files = [(file.relative_to(root).as_posix(), file.stat()) for file in named if file.is_file()]
    if not files:
        raise CrossguardError(
            f"there is no file {path!r}; give the path of a Parquet file, of a folder of them, or a pattern"
        )
    listed = [reading.Found(name, noted.st_size, noted.st_mtime_ns) for name, noted in files]
    return sorted(listed, key=lambda file: file.path.split("/"))


def split_column(file: str) -> tuple[str, ...]:
    """The splits that the column `split` of a file tells apart; none without such a column."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as handle:
            if "split" not in handle.schema_arrow.names:
                return ()
            told = _columns(file, handle, ["split"])["split"]
    except (CrossguardError, pa.ArrowException, OSError, UnicodeDecodeError):  # who reads the images says what is wrong
        return ()
    return tuple(dict.fromkeys(str(value) for value in told if value is not None))


def _root(path: str) -> str:
    """The folder that the files of a path lie below: itself, or the part of a pattern that is the same for all."""
    place = Path(path).expanduser()
    if place.is_dir():
        return str(place)
    fixed = PurePath(place.parent)
    while not place.exists() and glob.has_magic(str(fixed)):
        fixed = fixed.parent
    return str(fixed)


def _check_splits(path: str, files: Sequence[reading.Found], split: str | None) -> None:
    """Raises where files are of several splits and none was chosen, by name."""
    splits = {split_of(file.path) for file in files}
    if split is None and len(splits) > 1:
        named = sorted(name for name in splits if name is not None)
        one = "test" if "test" in named else named[0]
        others = ", and files of none" if None in splits else ""
        raise CrossguardError(
            f"{path!r} holds several splits ({', '.join(named)}{others}), and a number over their mixture misleads; "
            f"name one, as in split={one!r}, or take everything with split='all'"
        )


@lru_cache(maxsize=32)
def _opened(
    root: str,
    files: tuple[reading.Found, ...],
    told: tuple[str, ...],
    classes: tuple[str, ...],
    domain: str | None,
    split: str | None,
    skip_broken: bool,
) -> Opened:
    tables = [
        _Table.of(str(Path(root) / file.path), (file.size, file.modified, one))
        for file, one in zip(files, told, strict=True)
    ]
    first = tables[0].file
    chosen = [_chosen(tables, "domain", domain), _chosen(tables, "split", _split_wanted(root, files, tables, split))]
    everything = [
        (number, row)
        for number, table in enumerate(tables)
        for row in range(table.rows)
        if all(column is None or column[number][row] for column in chosen)
    ]
    if not everything:
        known = sorted({str(value) for table in tables for value in table.domains or ()})
        reason = f"no row of the domain {domain!r}; its domains are {', '.join(known)}" if domain else "no rows"
        raise CrossguardError(f"{first!r} holds {reason}")
    rows = [(tables[number], row) for number, row in everything]
    names, labels = _classes(tables, classes, rows)
    if not names:
        _check_captions(rows)
    texts = [table.captions[row] if table.captions is not None else () for table, row in rows]
    captioned = all(table.captions is not None for table in tables)
    groups = _same_images(rows, labels) if captioned else [[place] for place in range(len(rows))]

    heads = [rows[group[0]] for group in groups]
    keys = [table.keys[row] if table.keys else None for table, row in heads]
    if None in keys or len(set(keys)) != len(keys):
        near = os.path.commonpath([PurePath(file.path).parent for file in files])
        names_of = [PurePath(file.path).relative_to(near).as_posix() for file in files]
        numbers = (everything[group[0]] for group in groups)
        keys = [str(row) if len(tables) == 1 else f"{names_of[number]}:{row}" for number, row in numbers]
    source = Opened(
        ids=tuple(str(key) for key in keys),
        labels=torch.tensor([labels[group[0]] for group in groups], dtype=torch.int64),
        names=names,
        read=lambda place: heads[place][0].read(heads[place][1]),
        where=lambda place: f"row {heads[place][1]} of {heads[place][0].file!r}",
        captions=tuple(tuple(text for place in group for text in texts[place]) for group in groups)
        if captioned
        else (),
        notes=together(len(rows), len(groups), "rows"),
        fingerprint=reading.fingerprint((*zip((file.path for file in files), told, strict=True), classes)),
    )
    return source.whole(skip_broken)


def _chosen(tables: Sequence[_Table], column: str, wanted: str | None) -> list[list[bool]] | None:
    """For each row of each table whether its column says what is wanted; None where nothing is."""
    if wanted is None:
        return None
    values = [table.domains if column == "domain" else table.splits for table in tables]
    missing = next((table.file for table, held in zip(tables, values, strict=True) if held is None), None)
    if missing is not None:
        raise CrossguardError(f"{missing!r} has no column {column!r}; leave {column}={wanted!r} out")
    return [[value == wanted for value in held or ()] for held in values]


def _split_wanted(root: str, files: Sequence[reading.Found], tables: Sequence[_Table], split: str | None) -> str | None:
    """What the column `split` must say, None where all rows are wanted; raises where a choice is missing or in vain."""
    told = sorted({str(value) for table in tables for value in table.splits or () if value is not None})
    if split is None and len(told) > 1:
        one = "test" if "test" in told else told[0]
        raise CrossguardError(
            f"{tables[0].file!r} holds the splits {', '.join(told)} (column 'split'), and a number over their mixture "
            f"misleads; name one, as in split={one!r}, or take everything with split='all'"
        )
    if split in (None, "all"):
        return None
    if split in told:
        return split
    named = {split_of(file.path) for file in files}
    if named == {split}:
        return None
    there = sorted({*told, *(name for name in named if name is not None)})
    what = f"its splits are {', '.join(there)}" if there else f"it has no splits; leave split={split!r} out"
    raise CrossguardError(f"{root!r} has no split {split!r}; {what}")


def _same_images(rows: Sequence[tuple[_Table, int]], labels: Sequence[int]) -> list[list[int]]:
    """The rows by their images: those whose images are equal, byte for byte, and of one class, are in one list."""
    digests = {id(table): table.digests() for table in {id(table): table for table, _ in rows}.values()}
    groups: dict[tuple[int, object], list[int]] = {}
    for place, (table, row) in enumerate(rows):
        groups.setdefault((labels[place], digests[id(table)][row] or place), []).append(place)
    return list(groups.values())


@dataclass(frozen=True, eq=False)
class _Table:
    """One file: all its columns but the images, and where the images are."""

    file: str
    rows: int
    column: str
    starts: tuple[int, ...]  # the first row of every row group, and the number of rows
    modified: tuple[int, int, str]  # size, date, and what `reading.identities` says
    sizes: tuple[int, ...]  # of the images of every row group, in bytes
    labels: list[Any] | None
    named: list[Any] | None
    schema_names: tuple[str, ...]
    captions: list[tuple[str, ...]] | None
    keys: list[Any] | None
    domains: list[Any] | None
    splits: list[Any] | None

    @staticmethod
    def of(file: str, modified: tuple[int, int, str]) -> _Table:
        """Opens a file and reads everything but its images."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            handle = pq.ParquetFile(file)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise CrossguardError(f"{file!r} is not a whole Parquet file; check the path or fetch it again") from error
        with handle:
            schema = handle.schema_arrow
            image = _first(IMAGE, schema.names)
            if image is None:
                raise CrossguardError(
                    f"{file!r} has no column 'image' (its columns: {', '.join(schema.names) or 'none'}); "
                    "images belong there as encoded bytes"
                )
            kind: Any = schema.field(image).type
            if not _holds_bytes(kind):
                raise CrossguardError(
                    f"the column {image!r} of {file!r} holds {kind}, not encoded images; "
                    "write the bytes of a JPEG, PNG or WebP file there"
                )
            label, captions = _first(LABEL, schema.names), _first(CAPTIONS, schema.names)
            asked = (label, "name", captions, "key", "domain", "split")
            wanted = [name for name in asked if name is not None and name in schema.names]
            SAMPLES.check(handle.metadata.num_rows, repr(file))
            try:
                rest = _columns(file, handle, wanted)
                groups = [handle.metadata.row_group(group) for group in range(handle.num_row_groups)]
                sizes = tuple(_size(group, image) for group in groups)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise _damaged(file, "damaged", error) from error
            counts = [group.num_rows for group in groups]
            for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
                ENCODED.check(size // max(count, 1), f"an image in row group {number} of {file!r}")
            rows = handle.metadata.num_rows
            if {rows, sum(counts), *map(len, rest.values())} != {rows}:
                raise _damaged(file, "damaged", ValueError("its columns have other numbers of rows than it says"))

        column = rest.get
        texts = rest.get(captions)
        return _Table(
            file=file,
            rows=rows,
            column=image,
            starts=tuple(np.cumsum([0, *counts]).tolist()),
            modified=modified,
            sizes=sizes,
            labels=column(label),
            named=column("name"),
            schema_names=_schema_names(schema.metadata or {}, label),
            captions=None if texts is None else [_texts(value, file, captions) for value in texts],
            keys=column("key"),
            domains=column("domain"),
            splits=column("split"),
        )

    def read(self, row: int) -> bytes:
        """The encoded image of a row; its row group is read whole and remembered for its neighbors."""
        group = _group(self.starts, row)
        held = GROUPS.get((self.file, self.modified, self.column, group), partial(self._read_group, group))
        data = held[row - self.starts[group]]
        if data is None:
            raise CrossguardError(
                f"row {row} of {self.file!r} has no image bytes; fill it, or go on without such images "
                "with skip_broken=True (--skip-broken)"
            )
        return data

    def _read_group(self, group: int) -> Sequence[bytes | None]:
        if self.sizes[group] <= GROUPS.limit // 2:
            return list(self._images(group))
        return _Unpacked.of(self._images(group), self.file)

    def _images(self, group: int) -> Iterator[bytes | None]:
        """The images of a row group one after the other, a few of them in memory."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # With a buffer, a column is read as it is used and not at once.
            with pq.ParquetFile(self.file, buffer_size=1 << 20, pre_buffer=False) as handle:
                at_once = self._at_once(handle, group)
                left = self.starts[group + 1] - self.starts[group]
                for batch in handle.iter_batches(at_once, row_groups=[group], columns=[self.column]):
                    left -= len(batch)
                    _check_lengths(batch.column(0), f"an image in row group {group} of {self.file!r}", ENCODED)
                    for value in batch.column(0).to_pylist():
                        yield value["bytes"] if isinstance(value, dict) else value
            if left:
                raise pa.ArrowInvalid("a row group has another number of images than rows")
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(self.file, "damaged or gone", error) from error

    def _at_once(self, handle: Any, group: int) -> int:
        """How many rows are unpacked at a time: encoded images hardly get smaller when they are packed once more, and
        where they do, a file may hold one large image in every row and store it once."""
        told = handle.metadata.row_group(group)
        return 256 if _size(told, self.column) <= 4 * _size(told, self.column, packed=True) else 1

    def digests(self) -> Sequence[bytes]:
        """A hash of every image; empty for a row without one. Those of a large file are remembered."""
        read = ((self.file, *self.modified[:2]),)
        known = index.recall("digests", read)
        if known is None:
            images = (image for group in range(len(self.sizes)) for image in self._images(group))
            made = (bytes(DIGEST) if image is None else digest(image) for image in images)
            known = {"held": np.frombuffer(b"".join(made), np.uint8)}
            if sum(self.sizes) >= WORTH_KEEPING:
                index.remember("digests", read, known)
        held, empty = known["held"].tobytes(), bytes(DIGEST)
        each = (held[start : start + DIGEST] for start in range(0, len(held), DIGEST))
        return [b"" if one == empty else one for one in each]


class _Unpacked(Sequence[bytes | None]):
    """The images of a row group that is too large for memory, one after the other in a nameless file, which goes away
    with this object."""

    def __init__(self, file: Any, ends: np.ndarray, empty: frozenset[int]) -> None:
        self.file, self.ends, self.empty = file, ends, empty

    @staticmethod
    def of(images: Iterable[bytes | None], source: str) -> _Unpacked:
        """These images in such a file, in the folder of indexes if it can be written to."""
        place = index.folder()
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            place = Path(tempfile.gettempdir())
        ends, empty = [], set[int]()
        try:
            file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
            for row, image in enumerate(images):
                if image is None:
                    empty.add(row)
                else:
                    file.write(image)
                ends.append(file.tell())
            file.flush()
        except OSError as error:
            raise CrossguardError(
                f"the images of {source!r}, which are one large row group, cannot be unpacked to {str(place)!r} "
                f"({reason(error)}); name another folder in CROSSGUARD_CACHE, or write the file in smaller row groups"
            ) from error
        return _Unpacked(file, np.array(ends, np.int64), frozenset(empty))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, row: int) -> bytes | None: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[bytes | None]: ...
    def __getitem__(self, row: int | slice) -> bytes | Sequence[bytes | None] | None:
        if isinstance(row, slice):
            return [self[one] for one in range(len(self))[row]]
        if row in self.empty:
            return None
        start = int(self.ends[row - 1]) if row else 0
        return os.pread(self.file.fileno(), int(self.ends[row]) - start, start)  # by several threads at once


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this type holds encoded images, in any of the ways that Arrow has for bytes."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _size(group: Any, name: str, packed: bool = False) -> int:
    """How many bytes a column of a row group takes, unpacked or as it is stored."""
    columns = (group.column(number) for number in range(group.num_columns))
    own = [one for one in columns if one.path_in_schema.split(".")[0] == name]
    return sum(one.total_compressed_size if packed else one.total_uncompressed_size for one in own)


def _columns(file: str, handle: Any, names: Sequence[str]) -> dict[str | None, list[Any]]:
    """Columns of a file that hold no images, if what they hold fits into memory."""
    import pyarrow.parquet as pq

    groups = [handle.metadata.row_group(group) for group in range(handle.num_row_groups)]
    for name in names:
        sizes = [_size(group, name) for group in groups]
        TABLE.check(sum(sizes), f"the column {name!r} of {file!r}")
        for size, group in zip(sizes, groups, strict=True):
            most = 4 * TEXT.most * max(group.num_rows, 1)  # bytes: a character has up to four
            TEXT.check(TEXT.most * size // most, f"a text in the column {name!r} of {file!r}")
    # A text that many rows have may be stored once; read so, it is in memory once.
    schema = handle.schema
    leaves = [schema.column(number) for number in range(len(schema))]
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path.split(".")[0] in names]
    found: dict[str | None, list[Any]] = {}
    with pq.ParquetFile(file, read_dictionary=texts) as opened:
        for name in names:
            column = opened.read(columns=[name])[name]
            for chunk in column.chunks:
                _check_lengths(chunk, f"a text in the column {name!r} of {file!r}", TEXT, TABLE)
            try:
                found[name] = column.cast(_plain(column.type)).to_pylist()
            except UnicodeDecodeError as error:
                raise CrossguardError(
                    f"the column {name!r} of {file!r} holds texts that are not UTF-8; write the file again"
                ) from error
    return found


def _plain(kind: Any) -> Any:
    """The type of a column whose texts are stored one by one."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    return pa.large_string() if pa.types.is_string(kind) else kind


def _check_lengths(array: Any, what: str, limit: Limit, total: Limit | None = None) -> None:
    """Raises where one of the texts or images in an array is longer than a limit, or all of them together than
    another."""
    import pyarrow as pa

    pc: Any = importlib.import_module("pyarrow.compute")  # its functions are made when it is imported
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        array = array.flatten()
    if pa.types.is_struct(array.type):
        array = array.field("bytes") if array.type.get_field_index("bytes") >= 0 else array.flatten()[0]
    lengths, times = array, None
    if pa.types.is_dictionary(array.type):
        lengths, times = array.dictionary, array.indices
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(kind(lengths.type) for kind in kinds):
        return
    lengths = pc.binary_length(lengths)
    limit.check(pc.max(lengths).as_py() or 0, what)
    if total is not None:
        each = lengths if times is None else pc.take(lengths, times)
        total.check(pc.sum(each).as_py() or 0, what)


def _damaged(file: str, how: str, error: Exception) -> CrossguardError:
    return CrossguardError(f"{file!r} is {how} ({one_line(str(error))}); fetch it again")


def _group(starts: Sequence[int], row: int) -> int:
    return bisect_right(starts, row) - 1


def _bytes(group: Sequence[bytes | None]) -> int:
    if isinstance(group, _Unpacked):
        return int(group.ends[-1]) // ON_DISK
    return sum(len(data) for data in group if data is not None) + 64 * len(group)


GROUPS: Memory[Sequence[bytes | None]] = Memory(limit=1_000_000_000, size=_bytes)  # encoded images of whole row groups


def _first(candidates: Iterable[str], names: Sequence[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def _texts(value: Any, file: str, column: str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise CrossguardError(
            f"the column {column!r} of {file!r} holds {shortly(value)}, which is no caption; give strings or lists "
            "of them"
        )
    return tuple(text or "" for text in texts)


def _check_captions(rows: Sequence[tuple[_Table, int]]) -> None:
    """Raises where a row that has captions only lacks one, or has an empty one."""
    for table, row in rows:
        texts = table.captions[row] if table.captions else ()
        if not texts:
            raise CrossguardError(f"row {row} of {table.file!r} has no caption; write one or remove the row")
        if not all(text.strip() for text in texts):
            raise CrossguardError(f"a caption in row {row} of {table.file!r} is empty; write or remove it")


def _schema_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """The names of a Hugging Face ClassLabel feature, from the metadata that the hub's files carry."""
    try:
        told = reading.parse_json(metadata.get(b"huggingface", b"{}"), Any, "the metadata", "")
        feature = told["info"]["features"][label]
        return tuple(str(name) for name in feature["names"]) if feature.get("_type") == "ClassLabel" else ()
    except (CrossguardError, KeyError, TypeError, AttributeError):
        return ()


def _classes(
    tables: Sequence[_Table], classes: tuple[str, ...], rows: Sequence[tuple[_Table, int]]
) -> tuple[tuple[str, ...], list[int]]:
    """Class names and labels of the rows; the names come from `classes`, the schema, or the column `name`."""
    file = tables[0].file
    labels = [table.labels[row] if table.labels else None for table, row in rows]
    named = [table.named[row] if table.named else None for table, row in rows]
    if all(label is None for label in labels) and all(name is None for name in named):
        if any(table.captions for table in tables):
            return (), [-1] * len(rows)  # captions only: no class, and no label that could pass for one
        raise CrossguardError(f"{file!r} has neither labels nor captions; add a column 'label' (int) or 'captions'")
    if all(label is None or isinstance(label, str) for label in labels):  # names alone, numbered in sorted order
        texts = named if all(label is None for label in labels) else labels
        if None in texts:
            raise CrossguardError(
                f"row {rows[texts.index(None)][1]} of {file!r} has no class; name it or remove the row"
            )
        texts = [spoken(str(text)) for text in texts]
        names = classes or tuple(sorted(set(texts)))
        place = {name: number for number, name in reversed(list(enumerate(names)))}
        unknown = sorted(set(texts) - set(names))
        if unknown:
            raise CrossguardError(f"the class {unknown[0]!r} of {file!r} is not among the {len(names)} classes given")
        return names, [place[text] for text in texts]

    numbers: list[int] = []
    for (table, row), label in zip(rows, labels, strict=True):
        if not isinstance(label, int) or isinstance(label, bool):
            raise CrossguardError(f"the label {shortly(label)} in row {row} of {table.file!r} is not a whole number")
        numbers.append(label)
    told = _told(tables, classes)
    if not classes and not told:
        raise CrossguardError(
            f"{file!r} has labels but no class names; add a column 'name', or give them with classes=(...)"
        )
    if not classes:
        hole = next((label for label in range(max(told) + 1) if label not in told), None)
        if hole is not None:
            raise CrossguardError(
                f"label {hole} of {file!r} has no name, as no row carries it; "
                "give the whole class list with classes=(...)"
            )
    check_order(classes, told, repr(file))
    names = classes or tuple(told[label] for label in range(max(told) + 1))
    for (table, row), label in zip(rows, numbers, strict=True):
        if not 0 <= label < len(names):
            raise CrossguardError(
                f"label {label} in row {row} of {table.file!r} is outside the class list of {len(names)} "
                f"names (0 to {len(names) - 1})"
            )
    return names, numbers


def _told(tables: Sequence[_Table], classes: tuple[str, ...]) -> dict[int, str]:
    """The class names that the files have, by label. All their rows speak for them, also those that were not chosen."""
    schema = tables[0].schema_names
    for table in tables:
        if table.schema_names and table.schema_names != schema:
            raise CrossguardError(
                f"{table.file!r} and {tables[0].file!r} do not have the same class names; give one set at a time"
            )
    told = {label: spoken(name) for label, name in enumerate(schema)}
    called = [
        (table, label, spoken(str(name)))
        for table in tables
        for label, name in zip(table.labels or (), table.named or (), strict=False)
        if isinstance(label, int) and name is not None
    ]
    # Where the classes are known, a column of other names, such as those of files, is not about classes.
    known = {name.lower() for name in (*told.values(), *classes)}
    if known and not any(name.lower() in known for _, _, name in called):
        return told
    for table, label, name in called:
        if told.setdefault(label, name).lower() != name.lower():
            raise CrossguardError(
                f"label {label} of {table.file!r} is called both {told[label]!r} and {name!r}; give each label one name"
            )
    return told
