"""How much a file may hold, and whole numbers as people write them.

A file of a few kilobytes can ask for gigabytes of memory or for hours: a picture of one color, a table of one long
word. The limits here are far above real data. Whoever has larger data raises one by the environment variable that its
error names, for all that is read afterwards.
"""

from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass
from typing import Any

from crossguard.errors import CrossguardError

LARGEST = 2**63 - 1  # whole numbers beyond this mean nothing to a tensor

_WHOLE = re.compile(r"-?[0-9]{1,18}")


def whole(text: str) -> int | None:
    """The whole number that a text is, in ASCII digits, perhaps with a minus before them; None where it is none, or has
    more than 18 digits: Python reads `²` as a digit, `1_0` as ten, and raises beyond 4,300 digits."""
    return int(text) if _WHOLE.fullmatch(text) else None


def at_least(name: str, value: Any, least: int) -> int:
    """The whole number that was given as `name`; raises where it is none, or not between `least` and `LARGEST`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise CrossguardError(f"{name} must be a whole number of at least {least}, not {shortly(value)}")
    if not least <= number <= LARGEST:
        most = f" and at most {LARGEST}" if number > LARGEST else ""
        raise CrossguardError(f"{name} must be a whole number of at least {least}{most}, not {shortly(number)}")
    return number


def shortly(value: object) -> str:
    """What was given, in at most 80 characters for an error: numbers of thousands of digits have no text at all."""
    try:
        told = repr(value)
    except (ValueError, RecursionError):
        return "a huge number" if isinstance(value, int) else f"a {type(value).__name__} too large to be shown"
    return shortened(told)


def shortened(text: str) -> str:
    """The text, or its beginning and end, in at most 80 characters."""
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


@dataclass(frozen=True)
class Limit:
    """The most of something that is read from a file.

    Args:
        name: of the limit; the environment variable CROSSGUARD_MOST_NAME sets it.
        usual: the most, where that is not set.
        unit: what is counted.
    """

    name: str
    usual: int
    unit: str

    @property
    def variable(self) -> str:
        return f"CROSSGUARD_MOST_{self.name}"

    @property
    def most(self) -> int:
        """The limit now."""
        told = os.environ.get(self.variable, "")
        if not told:
            return self.usual
        most = whole(told)
        if most is None or most < 1:
            raise CrossguardError(f"{self.variable} says {shortly(told)}; give a number of {self.unit}, 1 or more")
        return most

    def check(self, count: int, what: str) -> None:
        """Raises where there is more of it than the limit allows.

        Args:
            what: has so much of it, for the error: "the image 'a/x.png'".
        """
        if count > self.most:
            raise CrossguardError(self.sentence(count, what))

    def sentence(self, count: int, what: str) -> str:
        return (
            f"{what} has {count:,} {self.unit}, and at most {self.most:,} are read; set {self.variable} to a larger "
            "number if that is meant"
        )


PIXELS = Limit("PIXELS", 2**27, "pixels")  # of one image: 134 megapixels, some 500 MB while it is decoded
ENCODED = Limit("IMAGE_BYTES", 2**28, "bytes")  # of one encoded image
TEXT = Limit("CHARACTERS", 100_000, "characters")  # of a caption, a class name, a prompt
SAMPLES = Limit("SAMPLES", 20_000_000, "samples")  # of a table, or of all shards of a split
TABLE = Limit("TABLE_BYTES", 1_000_000_000, "bytes")  # of all that is no image in one Parquet file
FILE = Limit("FILE_BYTES", 1_000_000_000, "bytes")  # of a JSON file or a list, unpacked
EXPERIMENT = Limit("EXPERIMENT_BYTES", 1_000_000, "bytes")  # of a TOML file
DEPTH = Limit("DEPTH", 100, "levels of nesting")  # of a JSON or a TOML file
SETTINGS = Limit("SETTINGS_BYTES", 2**23, "bytes")  # of a file of settings of a checkpoint
VOCABULARY = Limit("VOCABULARY_BYTES", 2**28, "bytes")  # of a file with the words of a tokenizer; 60 million are in use
WORDS = Limit("WORDS", 2**24, "words")  # of a tokenizer; a million are in use
LETTERS = Limit(
    "LETTERS", 1_000, "letters or tokens"
)  # that a tokenizer makes of one, sets around a text, sees in a word
LAYERS = Limit("LAYERS", 2**16, "layers, blocks or heads")  # that a configuration counts
LABELS = Limit("LABELS", 2**17, "labels")  # of a configuration
SIDE = Limit("SIDE", 2_048, "pixels")  # of a side of the images that a network reads; a thousand are in use

ALL = (
    PIXELS, ENCODED, TEXT, SAMPLES, TABLE, FILE, EXPERIMENT, DEPTH, SETTINGS, VOCABULARY, WORDS, LETTERS, LAYERS,
    LABELS, SIDE,
)  # fmt: skip
