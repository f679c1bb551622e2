"""The published data sets of the robustness literature, found in a local copy, with the prompt that the
papers give them."""

from __future__ import annotations

import glob
import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from crossguard import reading
from crossguard.data import Dataset
from crossguard.datasets.folders import Images
from crossguard.datasets.names import NUMBERS, SPLITS, class_list, known_names, unspoken
from crossguard.datasets.parquet import Parquet, split_column
from crossguard.datasets.shards import Shards
from crossguard.errors import CrossguardError
from crossguard.limits import whole
from crossguard.shapes import Labels

ROOT = "CROSSGUARD_DATA"  # the environment variable with the folder of all data sets
PHOTO = ("This is a photo of a {}",)  # the prompt of TeCoA (Mao et al. 2023) and MMCoA (Zhou et al. 2024) for most sets
WORDNET = ("words.txt", "LOC_synset_mapping.txt")  # where copies of ImageNet say what their WordNet ids mean


Copy: TypeAlias = Images | Parquet | Shards


@dataclass(frozen=True)
class Published:
    """What is known of a data set wherever its copy lies.

    Args:
        name: Its folder or file in the folder of all data sets.
        hub: Its data set on the Hugging Face hub in the layout that `Shards` reads, where there is one.
        names: Class names in label order, for a copy that has none, or numbers.
        first: The number of the first class, in a copy that has numbers.
        spoken: What to call a class whose name in the copy is no English, as `AnnualCrop`.
        tidied: Makes what one says of any other name of the copy, as of `001.ak47`.
        also: Other names of a split: what one copy calls `val` is `test` in another.
    """

    name: str
    hub: str | None = None
    names: tuple[str, ...] = ()
    first: int = 0
    spoken: Mapping[str, str] = field(default_factory=dict)
    tidied: Callable[[str], str] = str
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Known(Dataset):
    """A published data set in a local copy, with the prompt that the papers give it.

    `path` names the copy, or the environment variable CROSSGUARD_DATA a folder that holds it. In that folder,
    for CIFAR-10, these are looked for in this order: the folders `cifar10/`, `wds_vtab-cifar10/`,
    `vtab-cifar10/` and `vtab/cifar10/`, then the files `cifar10_test.parquet`, `cifar10-test.parquet` and
    `cifar10.parquet`. A folder may hold a CLIP_benchmark webdataset (see `Shards`), Parquet files
    (`test*.parquet`, there or one folder deeper), or subfolders of images, one a class, inside `test/` or directly.
    A copy without splits answers for the default split only.

    Classes are called what one says, also where the copy has WordNet ids, numbers or codes of countries for names; a
    copy with such names that are not known here is refused, and `classes` names them: in label order, which for folders
    is their sorted order, or as the path of a text file with one name a line.
    """

    path: str | None = None
    split: str = "test"
    templates: tuple[str, ...] = PHOTO  # pyright: ignore[reportIncompatibleMethodOverride]
    classes: tuple[str, ...] | str = ()
    size: int | None = None
    skip_broken: bool = False

    @staticmethod
    @abstractmethod
    def published() -> Published:
        """What is known of this data set."""

    @cached_property
    def copy(self) -> Copy:
        """The dataset behind the word: a `Shards`, a `Parquet` or an `Images`."""
        return self._named(self._within(Path(self.path).expanduser()) if self.path else self._found())

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    @cached_property
    def _names(self) -> tuple[str, ...]:
        names, published = self.copy.names, self.published()
        if self.classes:
            return names
        if published.names and unspoken(names) == "numbers":
            numbers = [number for number in map(whole, names) if number is not None]
            first = 0 if 0 in numbers else published.first
            within = len(numbers) == len(names) and all(0 <= one - first < len(published.names) for one in numbers)
            names = tuple(published.names[number - first] for number in numbers) if within else names
        names = tuple(published.spoken.get(name) or published.tidied(name) for name in names)
        coded = unspoken(published.spoken)  # what the folders of its publisher are called, if it is no word
        if coded == "WordNet ids" and any(unspoken([name]) == coded for name in names):
            meant = self._wordnet()
            names = tuple(meant.get(name, name) for name in names)
        strange = [name for name in names if unspoken([name]) == (coded or "") or unspoken(names)]
        if strange:
            raise CrossguardError(
                f"the classes of {self.copy.path!r} are {unspoken(strange)} ({', '.join(strange[:3])}), which tell a "
                f"text encoder nothing; give their names in this order, as in {type(self).__name__}(..., "
                "classes='names.txt') with one a line"
            )
        return names

    def _wordnet(self) -> Mapping[str, str]:
        """What the WordNet ids mean by the list that lies beside the images."""
        place = Path(self.copy.path).expanduser()
        for file in (folder / name for folder in (place, *list(place.parents)[:2]) for name in WORDNET):
            if file.is_file():
                pairs = (re.split(r"\s+", line, maxsplit=1) for line in reading.lines(reading.text(file, "repair it")))
                return {pair[0]: pair[1].split(",")[0].strip() for pair in pairs if len(pair) == 2}
        return {}

    @property
    def fingerprint(self) -> str:
        return self.copy.fingerprint

    @property
    def notes(self) -> tuple[str, ...]:
        return self.copy.notes

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

    def _splits(self) -> tuple[str, ...]:
        return (self.split, *self.published().also.get(self.split, ()))

    def _found(self) -> Copy:
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

    def _within(self, place: Path) -> Copy:
        """The copy at a place, by what lies there."""
        word = type(self).__name__
        if not place.exists():
            raise CrossguardError(f"there is no {str(place)!r} to read {word} from; give the path of its local copy")
        if place.is_file():
            told = split_column(str(place))
            split = next((split for split in self._splits() if split in told), self.split) if told else None
            return Parquet(str(place), split=split, **self._options())
        for split in self._splits():
            if any((place / split).glob("*.tar")):
                return Shards(str(place), split, **self._options())
            for files in (f"{split}*.parquet", f"data/{split}*.parquet", f"{split}/*.parquet"):
                if any(place.glob(files)):
                    return Parquet(str(Path(glob.escape(str(place))) / files), **self._options())
            if (place / split).is_dir():
                return Images(str(place / split), **self._options())
        for candidate in self._candidates(place):  # a folder around several data sets
            if candidate.exists():
                return self._within(candidate)
        for split in self._splits():  # the hub has a folder for each version of a set: `plain_text/`, `default/test/`
            for files in (f"*/{split}*.parquet", f"*/{split}/*.parquet"):
                holders = sorted({file.relative_to(place).parts[0] for file in place.glob(files)})
                holders = [name for name in holders if not name.startswith(".")]
                if len(holders) > 1:
                    raise CrossguardError(
                        f"{str(place)!r} holds several versions of {word} ({', '.join(holders)}); give the path of "
                        f"one, as in {word}({str(place / holders[0])!r})"
                    )
                if holders:
                    return self._within(place / holders[0])
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
        return Images(str(place), **self._options())

    def _options(self) -> dict[str, Any]:
        return {"classes": class_list(self.classes), "size": self.size, "skip_broken": self.skip_broken}

    def _named(self, copy: Copy) -> Copy:
        names = self.published().names
        if names and not self.classes and isinstance(copy, Parquet):
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
class MNIST(Known):
    """10 handwritten digits of 28 pixels, 10,000 to test (LeCun et al. 1998).

    openai/CLIP's prompt, `a photo of the number: "{}".`, holds bare figures; here the classes are called `zero` to
    `nine`, which every text encoder has words for.
    """

    templates: tuple[str, ...] = ("a photo of the number {}",)

    @staticmethod
    def published() -> Published:
        return Published("mnist", "wds_mnist", NUMBERS)


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
        wordnet = known_names("wordnet")
        return Published(
            "imagenet", "wds_imagenet1k", tuple(wordnet.values()), spoken=wordnet, also={"val": ("validation", "test")}
        )


@dataclass(frozen=True)
class TinyImageNet(Known):
    """200 classes of ImageNet at 64 pixels, 10,000 to validate (Le and Yang 2015)."""

    split: str = "val"

    @staticmethod
    def published() -> Published:
        return Published("tiny_imagenet", spoken=known_names("wordnet"), also={"val": ("validation", "valid")})


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
        return Published("caltech256", tidied=_of_caltech)


@dataclass(frozen=True)
class SUN397(Known):
    """397 classes of places (Xiao et al. 2010).

    The papers use all of it; the webdataset copy has splits.
    """

    @staticmethod
    def published() -> Published:
        # As TensorFlow's copy has them: /a/apse/indoor. In folders, `Images` knows the letters for what they are.
        return Published("sun397", "wds_sun397", tidied=lambda name: re.sub("^/[a-z]/", "", name).replace("/", " "))


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
        return Published("flowers", "wds_vtab-flowers", tuple(known_names("flowers").values()), first=1)


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
        return Published("country211", "wds_country211", spoken=known_names("countries"))


@dataclass(frozen=True)
class StanfordCars(Known):
    """196 models of cars (Krause et al. 2013)."""

    templates: tuple[str, ...] = ("A photo of a {}.",)

    @staticmethod
    def published() -> Published:
        return Published("cars", "wds_cars")


@dataclass(frozen=True)
class PACS(Known):
    """7 classes of objects in four domains: photographs, art paintings, cartoons and sketches (Li et al. 2017). The
    classes are the same in all domains, so each can be the source or the target of `Domains`.

    A copy is a folder with one folder for each domain, or Parquet files with a column `domain`.

    Args:
        domain: `photo`, `art_painting`, `cartoon` or `sketch`.
    """

    domain: str = "photo"

    def __post_init__(self) -> None:
        if self.domain not in DOMAINS:
            raise CrossguardError(f"unknown domain {self.domain!r} of PACS; choose one of {', '.join(DOMAINS)}")

    @staticmethod
    def published() -> Published:
        return Published("pacs")

    def _within(self, place: Path) -> Copy:
        for folder in (place, place / self.published().name):
            if (folder / self.domain).is_dir():
                return Images(str(folder / self.domain), **self._options())
        copy = super()._within(place)
        if not isinstance(copy, Parquet):
            raise CrossguardError(
                f"{str(place)!r} does not tell the domains of PACS apart; give a folder that holds "
                f"{', '.join(DOMAINS)}, or Parquet files with a column 'domain'"
            )
        return replace(copy, domain=self.domain)


DOMAINS = ("photo", "art_painting", "cartoon", "sketch")  # of PACS


def _of_caltech(name: str) -> str:
    """`american flag` of `002.american-flag`, and `faces easy` of `253.faces-easy-101`, a class of Caltech-101."""
    bare = re.sub(r"^\d+\.", "", name).removesuffix("-101")
    return bare if bare in ("t-shirt", "yo-yo") else bare.replace("-", " ")


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
