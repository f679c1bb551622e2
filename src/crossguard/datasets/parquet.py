"""Images, labels and captions in Parquet files, as this project and as the Hugging Face hub write them."""

from __future__ import annotations

import glob
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from crossguard.datasets.pixels import Decoded, Memory, Opened
from crossguard.errors import CrossguardError

IMAGE = ("image", "img")
LABEL = ("label", "labels", "fine_label")
CAPTIONS = ("captions", "caption")

GROUPS: Memory[list[bytes | None]] = Memory(limit=1_000_000_000)  # encoded images of whole row groups


@dataclass(frozen=True)
class Parquet(Decoded):
    """Images with labels or captions in Parquet files, as the Hugging Face hub has them.

    The column `image` holds encoded images (bytes, or Hugging Face's struct of bytes and path); beside it are
    `label` and `name`, or `captions`. `key` names the samples where it is unique, else the row number does.

    Args:
        path: A file, a folder of files, or a pattern such as `data/test-*.parquet`.
        classes: Class names in label order, where the file has none or others are wanted; or the path of a
            text file with one a line.
        templates: Prompt templates with `{}` for the class name.
        domain: Keeps the rows whose column `domain` says this.
        size: Resizes the short side and cuts out the middle square; None keeps the images as they are.
        skip_broken: Leaves unreadable images out and counts them; every image is decoded at opening to know.
    """

    path: str
    classes: tuple[str, ...] | str = ()
    templates: tuple[str, ...] = ("a photo of a {}",)  # pyright: ignore[reportIncompatibleMethodOverride]
    domain: str | None = None
    size: int | None = None
    skip_broken: bool = False

    def _open(self) -> Opened:
        files = tuple(str(file) for file in parquet_files(self.path))
        changed = tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in map(Path, files))
        return _opened(files, changed, class_list(self.classes), self.domain, self.skip_broken)


def parquet_files(path: str) -> list[Path]:
    """The files that `path` names, sorted; never two splits of one set at once."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        files = sorted(place.rglob("*.parquet"))
        splits = sorted({file.name.split("-")[0] for file in files if "-of-" in file.name})
        if len(splits) > 1:
            raise CrossguardError(
                f"the folder {path!r} holds several splits ({', '.join(splits)}); "
                f"name one, as in '{Path(path) / '**' / (splits[0] + '-*.parquet')}'"
            )
        if not files:
            raise CrossguardError(f"the folder {path!r} holds no .parquet file; give the folder or the file that does")
        return files
    files = sorted(Path(file) for file in glob.glob(str(place), recursive=True))  # noqa: PTH207
    if not files:
        raise CrossguardError(
            f"there is no file {path!r}; give the path of a Parquet file, of a folder of them, or a pattern"
        )
    return files


def class_list(classes: Sequence[str] | str) -> tuple[str, ...]:
    """Class names given one by one, or as the path of a text file with one name a line."""
    if not isinstance(classes, str):
        return tuple(classes)
    try:
        names = tuple(Path(classes).expanduser().read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise CrossguardError(
            f"the class list {classes!r} cannot be read; give a text file with one class name a line"
        ) from error
    return tuple(name.strip() for name in names[: len(names) - (bool(names) and not names[-1].strip())])


@lru_cache(maxsize=32)
def _opened(
    files: tuple[str, ...],
    changed: tuple[tuple[int, int], ...],
    classes: tuple[str, ...],
    domain: str | None,
    skip_broken: bool,
) -> Opened:
    tables = [_Table.of(file, modified) for file, modified in zip(files, changed, strict=True)]
    if domain is not None:
        missing = [table.file for table in tables if table.domains is None]
        if missing:
            raise CrossguardError(f"{missing[0]!r} has no column 'domain'; leave domain={domain!r} out")
    everything = [
        (table, row)
        for table in tables
        for row in range(table.rows)
        if domain is None or (table.domains is not None and table.domains[row] == domain)
    ]
    if not everything:
        known = sorted({str(value) for table in tables for value in table.domains or ()})
        reason = f"no row of the domain {domain!r}; its domains are {', '.join(known)}" if domain else "no rows"
        raise CrossguardError(f"{files[0]!r} holds {reason}")

    one_file = len(tables) == 1
    keys = [table.keys[row] if table.keys else None for table, row in everything]
    if None in keys or len(set(keys)) != len(keys):
        keys = [str(row) if one_file else f"{Path(table.file).name}:{row}" for table, row in everything]
    names, labels = _classes(tables, classes, everything)
    if not names:
        _check_captions(everything)
    captioned = all(table.captions is not None for table in tables)
    source = Opened(
        ids=tuple(str(key) for key in keys),
        labels=torch.tensor(labels, dtype=torch.int64),
        names=names,
        read=lambda index: everything[index][0].read(everything[index][1]),
        where=lambda index: f"row {everything[index][1]} of {everything[index][0].file!r}",
        captions=tuple(table.captions[row] for table, row in everything if table.captions) if captioned else (),
    )
    return source.whole(skip_broken)


@dataclass(frozen=True, eq=False)
class _Table:
    """One file: all its columns but the images, and where the images are."""

    file: str
    rows: int
    column: str
    starts: tuple[int, ...]  # the first row of every row group, and the number of rows
    modified: tuple[int, int]
    labels: list[Any] | None
    named: list[Any] | None
    schema_names: tuple[str, ...]
    captions: list[tuple[str, ...]] | None
    keys: list[Any] | None
    domains: list[Any] | None

    @staticmethod
    def of(file: str, modified: tuple[int, int]) -> _Table:
        """Opens a file and reads everything but its images."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            handle = pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
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
            if pa.types.is_struct(kind):
                kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
            if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                raise CrossguardError(
                    f"the column {image!r} of {file!r} holds {kind}, not encoded images; "
                    "write the bytes of a JPEG, PNG or WebP file there"
                )
            label, captions = _first(LABEL, schema.names), _first(CAPTIONS, schema.names)
            wanted = [name for name in (label, "name", captions, "key", "domain") if name in schema.names]
            try:
                rest = handle.read(columns=wanted) if wanted else None
            except (pa.ArrowException, OSError) as error:
                raise CrossguardError(f"{file!r} is damaged ({error}); fetch it again") from error
            sizes = [handle.metadata.row_group(group).num_rows for group in range(handle.num_row_groups)]
            rows = handle.metadata.num_rows

        def column(name: str | None) -> list[Any] | None:
            return rest[name].to_pylist() if rest is not None and name in wanted else None

        texts = column(captions)
        return _Table(
            file=file,
            rows=rows,
            column=image,
            starts=tuple(sum(sizes[:group]) for group in range(len(sizes) + 1)),
            modified=modified,
            labels=column(label),
            named=column("name"),
            schema_names=_schema_names(schema.metadata or {}, label),
            captions=None if texts is None else [_texts(value, file, captions) for value in texts],
            keys=column("key"),
            domains=column("domain"),
        )

    def read(self, row: int) -> bytes:
        """The encoded image of a row; its row group is read whole and remembered for its neighbors."""
        group = _group(self.starts, row)
        held = GROUPS.get((self.file, self.modified, self.column, group), partial(self._read_group, group), _bytes)
        data = held[row - self.starts[group]]
        if data is None:
            raise CrossguardError(
                f"row {row} of {self.file!r} has no image bytes; fill it, or go on without such images "
                "with skip_broken=True (--skip-broken)"
            )
        return data

    def _read_group(self, group: int) -> list[bytes | None]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(self.file) as handle:
                column = handle.read_row_group(group, columns=[self.column])[self.column]
        except (pa.ArrowException, OSError) as error:
            raise CrossguardError(f"{self.file!r} is damaged or gone ({error}); fetch it again") from error
        if not pa.types.is_struct(column.type):
            return column.to_pylist()
        return [None if value is None else value["bytes"] for value in column.to_pylist()]


def _group(starts: Sequence[int], row: int) -> int:
    return bisect_right(starts, row) - 1


def _bytes(group: list[bytes | None]) -> int:
    return sum(len(data) for data in group if data is not None) + 64 * len(group)


def _first(candidates: Iterable[str], names: Sequence[str]) -> str | None:
    return next((name for name in candidates if name in names), None)


def _texts(value: Any, file: str, column: str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(text is None or isinstance(text, str) for text in texts):
        raise CrossguardError(
            f"the column {column!r} of {file!r} holds {str(value)[:40]!r}, which is no caption; give strings or lists "
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
        feature = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]
        return tuple(str(name) for name in feature["names"]) if feature.get("_type") == "ClassLabel" else ()
    except (ValueError, KeyError, TypeError, AttributeError):
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
        names = classes or tuple(sorted({str(text) for text in texts}))
        place = {name: number for number, name in reversed(list(enumerate(names)))}
        unknown = sorted({str(text) for text in texts} - set(names))
        if unknown:
            raise CrossguardError(f"the class {unknown[0]!r} of {file!r} is not among the {len(names)} classes given")
        return names, [place[str(text)] for text in texts]

    numbers: list[int] = []
    for (table, row), label in zip(rows, labels, strict=True):
        if not isinstance(label, int) or isinstance(label, bool):
            raise CrossguardError(f"the label {label!r} in row {row} of {table.file!r} is not a whole number")
        numbers.append(label)
    # All rows of the files speak for the names, also those that a domain leaves out.
    told: dict[int, str] = dict(enumerate(tables[0].schema_names))
    for table in tables:
        if table.schema_names and table.schema_names != tables[0].schema_names:
            raise CrossguardError(
                f"{table.file!r} and {file!r} do not have the same class names; give one set at a time"
            )
        for label, name in zip(table.labels or (), table.named or (), strict=False):
            if isinstance(label, int) and name is not None and told.setdefault(label, str(name)) != str(name):
                raise CrossguardError(
                    f"label {label} of {table.file!r} is called both {told[label]!r} and {name!r}; "
                    "give each label one name"
                )
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
    names = classes or tuple(told[label] for label in range(max(told) + 1))
    for (table, row), label in zip(rows, numbers, strict=True):
        if not 0 <= label < len(names):
            raise CrossguardError(
                f"label {label} in row {row} of {table.file!r} is outside the class list of {len(names)} "
                f"names (0 to {len(names) - 1})"
            )
    return names, numbers
