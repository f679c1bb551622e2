"""What a generated scene is, and how it is put into words: true synonyms, five captions, endless sentences.

The world here is one of words and numbers; `embedded` turns it into pixels. Every draw comes from the raw
stream of a counter-based generator, which NumPy keeps fixed across versions and machines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from crossguard.errors import CrossguardError
from crossguard.seeds import derive

Choice = TypeVar("Choice")

# Canonical words begin with a consonant, so that "a photo of a {}" is grammatical for each of them. Synonyms
# stand in the order of their frequency in captions.
COLORS: Final[Mapping[str, tuple[str, ...]]] = {
    "red": ("crimson", "scarlet"),
    "yellow": ("golden", "lemon"),
    "lime": ("chartreuse",),
    "green": ("emerald", "jade"),
    "cyan": ("turquoise", "aqua"),
    "blue": ("cobalt", "sapphire"),
    "purple": ("violet", "plum"),
    "pink": ("rose", "rosy"),
    "brown": ("chocolate", "umber"),
    "gray": ("grey", "ashen"),
}
SHAPES: Final[Mapping[str, tuple[str, ...]]] = {
    "circle": ("disc", "disk"),
    "square": ("box", "quadrate"),
    "triangle": ("trigon",),
    "star": ("pentagram",),
    "heart": ("valentine", "loveheart"),
    "cross": ("plus",),
    "diamond": ("rhombus", "lozenge"),
    "ring": ("hoop", "annulus"),
    "crescent": ("moon", "lune"),
    "bolt": ("thunderbolt",),
    "bowtie": ("bow",),
    "drop": ("droplet", "teardrop"),
}
TEXTURES: Final[Mapping[str, tuple[str, ...]]] = {
    "plain": ("solid", "unpatterned"),
    "striped": ("banded", "stripy"),
    "dotted": ("spotted", "dappled"),
    "checkered": ("chequered", "checked"),
    "glossy": ("shiny", "gleaming"),
}
GROUNDS: Final[Mapping[str, tuple[str, ...]]] = {
    "grass": ("lawn", "turf"),
    "sand": (),
    "snow": (),
    "brick": ("brickwork",),
    "wood": ("timber",),
    "stone": ("rock",),
    "cloth": ("fabric",),
}
SIZES: Final[Mapping[str, tuple[str, ...]]] = {
    "small": ("little", "tiny"),
    "medium": (),
    "large": ("big", "huge"),
}
PLACES: Final[Mapping[str, tuple[int, int]]] = {
    "center": (0, 0),
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}
MEDIA: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "photo": {"photo": ("picture", "image", "snapshot")},
    "sketch": {"sketch": ("drawing", "picture", "image")},
    "night": {"photo": ("picture", "image", "snapshot")},
    "cartoon": {"cartoon": ("comic", "picture", "image")},
}
STYLES: Final = tuple(MEDIA)
RELATIONS: Final[Mapping[str, str]] = {"left": "right", "right": "left", "above": "below", "below": "above"}
NEARNESS: Final[Mapping[str, tuple[str, ...]]] = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
BESIDE: Final[Mapping[str, tuple[str, ...]]] = {
    "left": ("to its left", "on its left"),
    "right": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it", "beneath it"),
}
WHERE: Final[Mapping[str, tuple[str, ...]]] = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
OBJECT: Final = ("thing", "item")

ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    **COLORS,
    **SHAPES,
    **TEXTURES,
    **{word: synonyms for word, synonyms in (*GROUNDS.items(), *SIZES.items()) if synonyms},
    "photo": MEDIA["photo"]["photo"],
    "object": OBJECT,
    "center": ("middle",),
    "above": ("over",),
    "below": ("under", "beneath"),
}
"""Every canonical word with its single-word synonyms, the commonest first."""

COMBINATIONS: Final = tuple((color, shape) for shape in SHAPES for color in COLORS)
"""Color and shape of every object, in label order of the class set `object`."""

HELDOUT: Final = frozenset((tuple(COLORS)[(7 * place + 3) % 10], shape) for place, shape in enumerate(SHAPES))
"""The 12 combinations that training never shows: each shape once, each color once, red and green twice."""

CLASHES: Final[Mapping[str, tuple[str, ...]]] = {
    "green": ("grass",),
    "lime": ("grass",),
    "brown": ("brick", "wood"),
    "gray": ("stone", "cloth"),
    "yellow": ("sand",),
    "blue": ("cloth",),
    "red": ("brick",),
}
"""Grounds on which an object of that color would be hard to see; they never meet."""

SPLITS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "train": tuple(pair for pair in COMBINATIONS if pair not in HELDOUT),
    "val": COMBINATIONS,
    "test": COMBINATIONS,
    "heldout": tuple(pair for pair in COMBINATIONS if pair in HELDOUT),
}

# Multiples of an irrational number spread evenly over the unit interval, in every prefix and at every stride.
# These are the fractional parts of the golden ratio and of the square roots of two and three, in 64 bits.
# Shape, color and texture take one each, so that they are balanced together as well.
_GOLDEN: Final = 0x9E3779B97F4A7C15
_ROOT_TWO: Final = 0x6A09E667F3BCC908
_ROOT_THREE: Final = 0xBB67AE8584CAA73B


@dataclass(frozen=True)
class Thing:
    """One object. `x`, `y` (pointing down) and `half`, half its extent, are in widths of the image; `turn` is
    the tangent of half its rotation."""

    color: str
    shape: str
    texture: str
    size: str
    x: float
    y: float
    half: float
    turn: float


@dataclass(frozen=True)
class Scene:
    """What there is to see in any style: one thing at a place, or two, the first `relation` the second."""

    things: tuple[Thing, ...]
    ground: str
    place: str = ""
    relation: str = ""


class Draws:
    """Numbers that follow from `parts` alone, in the order in which they are asked for."""

    def __init__(self, *parts: object) -> None:
        self._bits = np.random.Philox(key=derive("crossguard.scenes", *parts))
        self._raw: list[int] = []

    def unit(self) -> float:
        """A number in [0, 1)."""
        if not self._raw:
            self._raw = self._bits.random_raw(32).tolist()
        return (self._raw.pop() >> 11) * 2.0**-53

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.unit()

    def one(self, choices: Sequence[Choice]) -> Choice:
        """One of the choices, all equally likely."""
        return choices[int(self.unit() * len(choices))]

    def word(self, canonical: str, synonyms: Sequence[str]) -> str:
        """The canonical word two times out of three, else a synonym, each next one half as often or rarer."""
        at = 0
        while at < len(synonyms) and self.unit() >= 2 / 3:
            at += 1
        return synonyms[at - 1] if at else canonical

    def bytes(self, count: int) -> np.ndarray:
        """`count` bytes, fresh from the generator."""
        return self._bits.random_raw((count + 7) // 8).astype("<u8", copy=False).view(np.uint8)[:count]


def combination(indices: np.ndarray, split: str) -> np.ndarray:
    """Which of the combinations of the split these scenes show."""
    # Each shape has the same number of colors in a split: 10, 9 or 1.
    colors = len(SPLITS[split]) // len(SHAPES)
    return _spread(indices, _GOLDEN, len(SHAPES)) * colors + _spread(indices, _ROOT_TWO, colors)


def texture(indices: np.ndarray) -> np.ndarray:
    """Which texture these scenes show, whatever the combination."""
    return _spread(indices, _ROOT_THREE, len(TEXTURES))


def _spread(indices: np.ndarray, multiplier: int, count: int) -> np.ndarray:
    place = (indices.astype(np.uint64) * np.uint64(multiplier)) >> np.uint64(32)
    return ((place * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def scene(split: str, index: int, pair: bool = False) -> Scene:
    """The scene of this index, the same in every style and at every size."""
    draws = Draws("pair" if pair else "single", split, index)
    at = np.array([index])
    color, shape = SPLITS[split][int(combination(at, split)[0])]
    finish = tuple(TEXTURES)[int(texture(at)[0])]
    return _two(draws, split, color, shape, finish) if pair else _single(draws, color, shape, finish)


def _single(draws: Draws, color: str, shape: str, finish: str) -> Scene:
    size = draws.one(tuple(SIZES))
    extent = {"small": (0.45, 0.52), "medium": (0.56, 0.63), "large": (0.68, 0.76)}[size]
    half = draws.between(*extent) / 2
    place = draws.one(tuple(PLACES))
    right, down = PLACES[place]
    room = 0.48 - half
    x = 0.5 + room * (right * draws.between(0.7, 1.0) + draws.between(-0.15, 0.15) * (right == 0))
    y = 0.5 + room * (down * draws.between(0.7, 1.0) + draws.between(-0.15, 0.15) * (down == 0))
    thing = Thing(color, shape, finish, size, x, y, half, draws.between(-0.16, 0.16))
    return Scene((thing,), _ground(draws, color), place=place)


def _two(draws: Draws, split: str, color: str, shape: str, finish: str) -> Scene:
    others = [pair for pair in SPLITS[split] if pair[0] != color and pair[1] != shape]
    other_color, other_shape = draws.one(others)
    relation = draws.one(tuple(RELATIONS))
    sign = -1 if relation in ("left", "above") else 1
    along = [0.5 + sign * 0.245 + draws.between(-0.02, 0.02), 0.5 - sign * 0.245 + draws.between(-0.02, 0.02)]
    across = [0.5 + draws.between(-0.1, 0.1), 0.5 + draws.between(-0.1, 0.1)]
    xs, ys = (along, across) if relation in ("left", "right") else (across, along)
    first, second = (
        Thing(c, s, t, "", x, y, draws.between(0.19, 0.23), draws.between(-0.14, 0.14))
        for c, s, t, x, y in zip(
            (color, other_color),
            (shape, other_shape),
            (finish, draws.one(tuple(TEXTURES))),
            xs,
            ys,
            strict=True,
        )
    )
    return Scene((first, second), _ground(draws, color, other_color), relation=relation)


def _ground(draws: Draws, *colors: str) -> str:
    clashing = {ground for color in colors for ground in CLASHES.get(color, ())}
    return draws.one([ground for ground in GROUNDS if ground not in clashing])


def captions(seen: Scene, style: str, draws: Draws) -> tuple[str, ...]:
    """Five true captions of the scene, each from another rule of the grammar."""
    return _pair_captions(seen, style, draws) if seen.relation else _single_captions(seen, style, draws)


def _single_captions(seen: Scene, style: str, draws: Draws) -> tuple[str, ...]:
    thing = seen.things[0]
    size = draws.word(thing.size, SIZES[thing.size]) if thing.size != "medium" else ""
    where = draws.word(WHERE[seen.place][0], WHERE[seen.place][1:])
    partly = draws.one(
        (
            _shape(thing, draws),
            f"{_texture(thing, draws)} {_shape(thing, draws)}",
            f"{_color(thing, draws)} {draws.word('object', OBJECT)}",
            f"{_texture(thing, draws)} {draws.word('object', OBJECT)}",
        )
    )
    everything = f"{size} {_texture(thing, draws)} {_object(thing, draws)}"
    return (
        _sentence(_medium(style, draws), everything, _setting(seen, style, draws)),
        _sentence(_opening(style), _object(thing, draws)),
        _sentence(_opening(style), partly),
        _sentence(draws.one(("", "there is", "this is")), _object(thing, draws), _setting(seen, style, draws)),
        _sentence(draws.one(("", _medium(style, draws))), f"{size} {_object(thing, draws)}", where),
    )


def _pair_captions(seen: Scene, style: str, draws: Draws) -> tuple[str, ...]:
    first, second = seen.things
    there = seen.relation
    back = RELATIONS[there]

    def near(relation: str) -> str:
        return draws.word(NEARNESS[relation][0], NEARNESS[relation][1:])

    def rich(thing: Thing) -> str:
        return _a(f"{_texture(thing, draws)} {_object(thing, draws)}")

    def bare(thing: Thing) -> str:
        return _a(_object(thing, draws))

    beside = draws.word(BESIDE[back][0], BESIDE[back][1:])
    opening = draws.one(("there is", "this is", _medium(style, draws)))
    return (
        f"{_opening(style)} {bare(first)} {near(there)} {bare(second)}",
        f"{bare(second)} {near(back)} {bare(first)}",
        f"{opening} {rich(first)} {near(there)} {rich(second)}",
        f"{bare(first)} {near(there)} {bare(second)} {_setting(seen, style, draws)}",
        f"{_medium(style, draws)} {bare(first)} with {bare(second)} {beside}",
    )


def _color(thing: Thing, draws: Draws) -> str:
    return draws.word(thing.color, COLORS[thing.color])


def _shape(thing: Thing, draws: Draws) -> str:
    return draws.word(thing.shape, SHAPES[thing.shape])


def _texture(thing: Thing, draws: Draws) -> str:
    return draws.word(thing.texture, TEXTURES[thing.texture])


def _object(thing: Thing, draws: Draws) -> str:
    return f"{_color(thing, draws)} {_shape(thing, draws)}"


def _opening(style: str) -> str:
    return f"a {next(iter(MEDIA[style]))} of"


def _medium(style: str, draws: Draws) -> str:
    canonical, synonyms = next(iter(MEDIA[style].items()))
    return f"{_a(draws.word(canonical, synonyms))} of"


def _setting(seen: Scene, style: str, draws: Draws) -> str:
    if style == "sketch":
        return draws.one(("on paper", "on white paper"))
    ground = f"on {draws.word(seen.ground, GROUNDS[seen.ground])}"
    return f"{ground} {draws.one(('at night', 'in the dark'))}" if style == "night" else ground


def _sentence(opening: str, noun: str, rest: str = "") -> str:
    return " ".join(f"{opening} {_a(noun.strip())} {rest}".split())


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def sentences(split: str, count: int) -> Iterator[str]:
    """`count` captions for language modeling: lower case, words between single spaces, no punctuation.

    Two scenes of three hold one object; styles take turns, photos every other time. Sentences of `train`
    never name a held-out combination.
    """
    if split not in SPLITS:
        raise CrossguardError(f"unknown split {split!r} of the scenes; choose one of {', '.join(SPLITS)}")
    if count < 1:
        raise CrossguardError(f"a count of {count} sentences is not possible; give 1 or more")
    styles = ("photo", "sketch", "photo", "night", "photo", "cartoon")
    index = 0
    while count > 0:
        pair, style = index % 3 == 2, styles[index // 3 % len(styles)]
        written = captions(scene(split, index, pair), style, Draws("sentences", split, index))
        yield from written[:count]
        count -= len(written)
        index += 1
