"""The published data sets of the robustness literature, found in a local copy, with the prompt that the
papers give them."""

from __future__ import annotations

import glob
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from crossguard.data import Dataset
from crossguard.datasets.folders import Images
from crossguard.datasets.parquet import Parquet
from crossguard.datasets.pixels import Decoded, given
from crossguard.datasets.shards import Shards
from crossguard.errors import CrossguardError
from crossguard.shapes import Labels

ROOT = "CROSSGUARD_DATA"  # the environment variable with the folder of all data sets
PHOTO = ("This is a photo of a {}",)  # the prompt of TeCoA (Mao et al. 2023) and MMCoA (Zhou et al. 2024) for most sets
SPLITS = frozenset({"train", "test", "val", "valid", "validation", "dev"})


@dataclass(frozen=True)
class Published:
    """What is known of a data set wherever its copy lies.

    Args:
        name: Its folder or file in the folder of all data sets.
        hub: Its data set on the Hugging Face hub in the layout that `Shards` reads, where there is one.
        names: Class names in label order, for a copy that has none.
        spoken: What to call a class whose name in the copy is no English, as `AnnualCrop`.
        also: Other names of a split: what one copy calls `val` is `test` in another.
    """

    name: str
    hub: str | None = None
    names: tuple[str, ...] = ()
    spoken: Mapping[str, str] = field(default_factory=dict)
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Known(Dataset):
    """A published data set in a local copy, with the prompt that the papers give it.

    `path` names the copy, or the environment variable CROSSGUARD_DATA a folder that holds it. In that folder,
    for CIFAR-10, these are looked for in this order: the folders `cifar10/`, `wds_vtab-cifar10/`,
    `vtab-cifar10/` and `vtab/cifar10/`, then the files `cifar10_test.parquet`, `cifar10-test.parquet` and
    `cifar10.parquet`. A folder may hold a CLIP_benchmark webdataset (see `Shards`), Parquet files
    (`test*.parquet`, there or in `data/`), or subfolders of images, one a class, inside `test/` or directly.
    A copy without splits answers for the default split only.
    """

    path: str | None = None
    split: str = "test"
    templates: tuple[str, ...] = PHOTO  # pyright: ignore[reportIncompatibleMethodOverride]
    size: int | None = None
    skip_broken: bool = False

    @staticmethod
    @abstractmethod
    def published() -> Published:
        """What is known of this data set."""

    @cached_property
    def copy(self) -> Decoded:
        """The dataset behind the word: a `Shards`, a `Parquet` or an `Images`."""
        return self._named(self._within(Path(self.path).expanduser()) if self.path else self._found())

    @property
    def names(self) -> tuple[str, ...]:
        spoken = self.published().spoken
        return tuple(spoken.get(name, name) for name in self.copy.names)

    @property
    def skipped(self) -> int:
        """How many broken images were left out; `copy.opened.skipped` names them."""
        return self.copy.skipped

    def __len__(self) -> int:
        return len(self.copy)

    def id(self, index: int) -> str:
        return self.copy.id(index)

    def image(self, index: int) -> Tensor:
        return self.copy.image(index)

    def labels(self) -> Labels:
        return self.copy.labels()

    def __getstate__(self) -> dict[str, Any]:
        return given(self)

    def _splits(self) -> tuple[str, ...]:
        return (self.split, *self.published().also.get(self.split, ()))

    def _found(self) -> Decoded:
        """The copy in the folder of all data sets."""
        word, published, root = type(self).__name__, self.published(), os.environ.get(ROOT)
        if root:
            for place in self._candidates(Path(root).expanduser()):
                if place.exists():
                    return self._within(place)
        where = f"{ROOT} is not set" if not root else f"{root!r} ({ROOT}) holds none"
        if published.hub:
            get = f"download clip-benchmark/{published.hub} (Hugging Face hub, data set)"
            local = published.hub
        else:
            get = "get it from its publisher (one subfolder of images a class, or Parquet)"
            local = published.name
        raise CrossguardError(
            f"there is no local copy of {word}, split {self.split!r}: no path was given, and {where}; {get} "
            f"and pass its folder, as in {word}(path='data/{local}'), or set {ROOT} to the folder around it"
        )

    def _candidates(self, root: Path) -> Iterator[Path]:
        published = self.published()
        yield root / published.name
        if published.hub:
            bare = published.hub.removeprefix("wds_")
            yield from (root / published.hub, root / bare, root / bare.replace("-", "/", 1))
        yield from (root / f"{published.name}{mark}{split}.parquet" for split in self._splits() for mark in "_-")
        if self._is_default_split():
            yield root / f"{published.name}.parquet"

    def _is_default_split(self) -> bool:
        return self.split == type(self).__dataclass_fields__["split"].default

    def _within(self, place: Path) -> Decoded:
        """The copy at a place, by what lies there."""
        word, size, skip = type(self).__name__, self.size, self.skip_broken
        if not place.exists():
            raise CrossguardError(f"there is no {str(place)!r} to read {word} from; give the path of its local copy")
        if place.is_file():
            return Parquet(str(place), size=size, skip_broken=skip)
        for split in self._splits():
            if any((place / split).glob("*.tar")):
                return Shards(str(place), split, size, skip)
            for files in (f"{split}*.parquet", f"data/{split}*.parquet"):
                if any(place.glob(files)):
                    return Parquet(str(Path(glob.escape(str(place))) / files), size=size, skip_broken=skip)
            if (place / split).is_dir():
                return Images(str(place / split), size=size, skip_broken=skip)
        for candidate in self._candidates(place):  # a folder around several data sets
            if candidate.exists():
                return self._within(candidate)
        folders = {folder.name for folder in place.iterdir() if folder.is_dir() and not folder.name.startswith(".")}
        others = sorted(
            SPLITS & folders | {file.name for file in (*place.glob("*.parquet"), *place.glob("data/*.parquet"))}
        )
        if others or not folders:
            what = (
                f"it holds {', '.join(others[:5])}" if others else "it holds neither folders, .tar nor .parquet files"
            )
            raise CrossguardError(f"{str(place)!r} has no split {self.split!r} of {word}: {what}")
        if not self._is_default_split():
            raise CrossguardError(
                f"{str(place)!r} holds {word} without splits, so without {self.split!r}; leave the split out"
            )
        return Images(str(place), size=size, skip_broken=skip)

    def _named(self, copy: Decoded) -> Decoded:
        names = self.published().names
        if names and isinstance(copy, Parquet):
            try:
                len(copy.names)
            except CrossguardError:  # if it was not for want of names, the same is raised again
                copy = replace(copy, classes=names)
        return copy


@dataclass(frozen=True)
class CIFAR10(Known):
    """10 classes of 32-pixel photographs, 10,000 to test (Krizhevsky 2009)."""

    @staticmethod
    def published() -> Published:
        names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
        return Published("cifar10", "wds_vtab-cifar10", names)


@dataclass(frozen=True)
class CIFAR100(Known):
    """100 classes of 32-pixel photographs, 10,000 to test (Krizhevsky 2009)."""

    @staticmethod
    def published() -> Published:
        return Published("cifar100", "wds_vtab-cifar100")


@dataclass(frozen=True)
class STL10(Known):
    """10 classes of 96-pixel photographs, 8,000 to test (Coates et al. 2011)."""

    @staticmethod
    def published() -> Published:
        names = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
        return Published("stl10", "wds_stl10", names)


@dataclass(frozen=True)
class ImageNet(Known):
    """1,000 classes of photographs, 50,000 to validate (Russakovsky et al. 2015)."""

    split: str = "val"

    @staticmethod
    def published() -> Published:
        return Published("imagenet", "wds_imagenet1k", also={"val": ("validation", "test")})


@dataclass(frozen=True)
class TinyImageNet(Known):
    """200 classes of ImageNet at 64 pixels, 10,000 to validate (Le and Yang 2015)."""

    split: str = "val"

    @staticmethod
    def published() -> Published:
        return Published("tiny_imagenet", also={"val": ("validation", "valid")})


@dataclass(frozen=True)
class Caltech101(Known):
    """101 classes of objects (Fei-Fei et al. 2004).

    The papers use all of it; the webdataset copy has splits.
    """

    @staticmethod
    def published() -> Published:
        return Published("caltech101", "wds_vtab-caltech101")


@dataclass(frozen=True)
class Caltech256(Known):
    """256 classes of objects (Griffin et al. 2007); the papers use all of it."""

    templates: tuple[str, ...] = ("A photo of a {}.",)

    @staticmethod
    def published() -> Published:
        return Published("caltech256")


@dataclass(frozen=True)
class SUN397(Known):
    """397 classes of places (Xiao et al. 2010).

    The papers use all of it; the webdataset copy has splits.
    """

    @staticmethod
    def published() -> Published:
        return Published("sun397", "wds_sun397")


@dataclass(frozen=True)
class Food101(Known):
    """101 dishes (Bossard et al. 2014)."""

    templates: tuple[str, ...] = ("A photo of {}, a type of food.",)

    @staticmethod
    def published() -> Published:
        return Published("food101", "wds_food101")


@dataclass(frozen=True)
class OxfordPets(Known):
    """37 breeds of cats and dogs (Parkhi et al. 2012)."""

    templates: tuple[str, ...] = ("A photo of a {}, a type of pet.",)

    @staticmethod
    def published() -> Published:
        return Published("pets", "wds_vtab-pets")


@dataclass(frozen=True)
class Flowers102(Known):
    """102 flowers (Nilsback and Zisserman 2008)."""

    templates: tuple[str, ...] = ("A photo of a {}, a type of flower.",)

    @staticmethod
    def published() -> Published:
        return Published("flowers", "wds_vtab-flowers")


@dataclass(frozen=True)
class DTD(Known):
    """47 textures (Cimpoi et al. 2014)."""

    templates: tuple[str, ...] = ("A surface with a {} texture.",)

    @staticmethod
    def published() -> Published:
        return Published("dtd", "wds_vtab-dtd")


@dataclass(frozen=True)
class EuroSAT(Known):
    """10 uses of land from above (Helber et al. 2019).

    The papers use all of it; the webdataset copy has splits.
    """

    templates: tuple[str, ...] = ("A centered satellite photo of {}.",)

    @staticmethod
    def published() -> Published:
        return Published("eurosat", "wds_vtab-eurosat", spoken=EUROSAT)


@dataclass(frozen=True)
class FGVCAircraft(Known):
    """100 variants of aircraft (Maji et al. 2013).

    Names are as the copy has them: `707-320`, where the papers say `Boeing 707-320`.
    """

    templates: tuple[str, ...] = ("A photo of a {}, a type of aircraft.",)

    @staticmethod
    def published() -> Published:
        return Published("fgvc_aircraft", "wds_fgvc_aircraft")


@dataclass(frozen=True)
class Country211(Known):
    """211 countries, told from a photograph (Radford et al. 2021)."""

    templates: tuple[str, ...] = ("A photo I took in {}.",)

    @staticmethod
    def published() -> Published:
        return Published("country211", "wds_country211")


@dataclass(frozen=True)
class StanfordCars(Known):
    """196 models of cars (Krause et al. 2013)."""

    templates: tuple[str, ...] = ("A photo of a {}.",)

    @staticmethod
    def published() -> Published:
        return Published("cars", "wds_cars")


EUROSAT = {  # the folders of the published archive
    "AnnualCrop": "annual crop land",
    "Forest": "a forest",
    "HerbaceousVegetation": "brushland or shrubland",
    "Highway": "a highway or a road",
    "Industrial": "industrial buildings",
    "Pasture": "pasture land",
    "PermanentCrop": "permanent crop land",
    "Residential": "residential buildings",
    "River": "a river",
    "SeaLake": "a sea or a lake",
}
