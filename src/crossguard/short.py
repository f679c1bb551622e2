"""Short forms of words: a path or a hub id where a model or data is expected, resolved by what is there.

Only names of files are looked at, and the beginning of a file of captions, so nothing heavy is loaded. The long form
is what reports hold.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from crossguard.checkpoints import kind, located
from crossguard.errors import CrossguardError
from crossguard.files import reason
from crossguard.limits import shortly

_HUB = re.compile(r"(hf-hub:)?\w[\w.-]*/\w[\w.-]*")
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_CAPTIONS = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".token")
_NAMED = re.compile(rb"""[^"'\s,|#:\\]+\.(?:jpe?g|png|webp|bmp|gif|tiff?)\b""", re.IGNORECASE)
_ENOUGH = 1000  # entries of a folder that are looked at; it may hold a million images
_BEGINNING = 1_000_000  # bytes of a file of captions in which the name of an image must stand


def model(text: str) -> str:
    """The word of the model that a path or a hub id stands for; empty where it is neither.

    Raises:
        CrossguardError: the path is there, and no model.
    """
    shown = text.strip()
    what, place = kind(shown), Path(located(shown))
    word = {"transformers": "HuggingFace", "open_clip": "OpenCLIP"}.get(what or "")
    if word is not None:
        found = f"{word}({shown!r})"
        both = (place / "prompts.json").is_file()  # weights and prompts that were trained together
        return f"PromptTuned({found}, {shown!r})" if both else found
    if _exists(place):
        if (place / "prompts.json").is_file():
            raise CrossguardError(
                f"{shown!r} holds prompts and not the model that they were learned for; give both, as in "
                f"PromptTuned(Tiny(), {shown!r})"
            )
        if what == "pickle":
            raise CrossguardError(f"{shown!r} holds pickles, which are not read; save the model with safetensors")
        if what == "weights":
            raise CrossguardError(
                f"{shown!r} holds weights alone; give the folder with their configuration, or say what they are the "
                f"weights of, as in OpenCLIP('ViT-B-32', {shown!r})"
            )
        as_data = f" (it is data: {_found(shown)})" if _found(shown) else ""
        raise CrossguardError(
            f"{shown!r} is no checkpoint of a model{as_data}; give a folder with config.json or open_clip_config.json"
        )
    if _HUB.fullmatch(shown):
        return f"OpenCLIP({shown!r})" if shown.startswith("hf-hub:") else f"HuggingFace({shown!r})"
    return ""


def data(text: str) -> str:
    """The word of the data that a path stands for; empty where nothing is there.

    Raises:
        CrossguardError: something is there, and no data that is known by its look.
    """
    shown = text.strip()
    found = _found(shown)
    if found:
        return found
    if not _exists(Path(located(shown))):
        return ""
    as_model = f" (it is a model: {model(shown)})" if kind(shown) in ("transformers", "open_clip") else ""
    raise CrossguardError(
        f"{shown!r} is no data{as_model}; give a folder with one subfolder of images a class, a Parquet file or a "
        "folder of them, shards of CLIP_benchmark, or a file of captions beside its images"
    )


def quoted(text: str) -> str:
    """The advice to put a text in quotes where it is a file, a folder or a hub id; nothing, where it is none."""
    shown = text.strip()
    place = Path(located(shown))
    if _exists(place):
        what = "a folder" if place.is_dir() else "a file"
        word = next((word for word in (_told(model, shown), _told(data, shown)) if word), f"HuggingFace({shown!r})")
        return f"{shown!r} is {what}: quote it, as in {word}"
    if _HUB.fullmatch(shown) and not re.fullmatch(r"[\w.]+/[\d.]+|[\d.]+/[\w.]+", shown) and "-" in shown:
        return f"a hub id needs quotes, as in HuggingFace({shown!r})"
    return ""


def near(text: str) -> str:
    """`; 'images' is a folder here`: what is there and has nearly the name of a path that is not; else nothing."""
    place = Path(located(text.strip()))
    names = {one.name: one.is_dir() for one in _listed(place.parent)}
    close = difflib.get_close_matches(place.name, names, n=1, cutoff=0.7)
    if not close:
        return ""
    where = "here" if place.parent == Path() else f"in {str(place.parent)!r}"
    return f"; {close[0]!r} is a {'folder' if names[close[0]] else 'file'} {where}"


def _told(read: Callable[[str], str], shown: str) -> str:
    try:
        return read(shown)
    except CrossguardError:
        return ""


def _found(shown: str) -> str:
    """The word of data by the look of its files; empty where they look like none."""
    place = Path(located(shown))
    if re.search(r"[*?]", shown) and shown.endswith(".parquet"):
        return f"Parquet({shown!r})"
    if not _exists(place):
        return ""
    if not place.is_dir():
        if place.suffix.lower() == ".parquet":
            return f"Parquet({shown!r})"
        return _captioned(shown, place) if place.suffix.lower() in _CAPTIONS else ""
    here = _listed(place)
    names = {one.name for one in here}
    if "kept.json" in names:
        return f"Kept({shown!r})"
    if any(one.name.endswith(".tar") for one in here):
        return f"Shards({str(Path(shown).parent)!r}, split={place.resolve().name!r})"
    folders = [one for one in here if one.is_dir()]
    inside = {folder.name: _listed(Path(folder.path)) for folder in folders[:50]}
    splits = [name for name, held in inside.items() if any(one.name.endswith(".tar") for one in held)]
    if splits:
        return f"Shards({shown!r})" if "test" in splits else f"Shards({shown!r}, split={splits[0]!r})"
    if any(one.name.endswith(".parquet") for held in (here, *inside.values()) for one in held):
        return f"Parquet({shown!r})"
    told = [one.name for one in here if one.name.endswith((".json", ".token", ".csv"))]
    if len(told) == 1 and (found := _captioned(str(Path(shown) / told[0]), place / told[0])):
        return found
    if any(_holds_images(Path(folder.path), inside.get(folder.name)) for folder in folders[:50]):
        return f"Images({shown!r})"
    return ""


def _captioned(shown: str, file: Path) -> str:
    """The word for a file of captions and the folder beside it that has its first image; empty where none has."""
    try:
        with file.open("rb") as opened:
            named = [match.decode("utf-8", "replace") for match in islice(_NAMED.findall(opened.read(_BEGINNING)), 20)]
    except OSError as error:
        raise CrossguardError(f"{shown!r} cannot be read ({reason(error)})") from error
    if not named:
        return ""
    base, above = Path(shown).parent, file.parent
    places = [base, *(base / one.name for one in _listed(above) if one.is_dir())]
    places += [base.parent / one.name for one in _listed(above.resolve().parent) if one.is_dir()]
    for folder in places:
        for name in named:
            here = Path(located(str(folder)))
            if (here / name.lstrip("/")).is_file() or (here / Path(name).name).is_file():
                return f"Captions({str(folder)!r}, {shown!r})"
    raise CrossguardError(
        f"{shown!r} looks like a file of captions, but {shortly(named[0])} lies in no folder beside it; give "
        f"Captions('folder of the images', {shown!r})"
    )


def _holds_images(folder: Path, here: list[os.DirEntry[str]] | None) -> bool:
    """Whether a folder, or one inside it, has an image."""
    here = _listed(folder) if here is None else here
    if any(one.name.lower().endswith(_IMAGES) for one in here):
        return True
    deeper: Iterator[Path] = (Path(one.path) for one in here if one.is_dir())
    return any(one.name.lower().endswith(_IMAGES) for inside in islice(deeper, 3) for one in _listed(inside))


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    """The first entries of a folder, without what is hidden; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((one for one in islice(entries, _ENOUGH) if one.name[0] != "."), key=lambda one: one.name)
    except OSError:
        return []


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # this can be no path
        return False
