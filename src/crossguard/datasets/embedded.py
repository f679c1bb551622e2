"""Scenes: a generated world of small captioned images that needs no download and has no last sample.

Shapes are signed distance functions, so edges are smooth at any size. Arrays only ever see sums, products,
quotients, square roots, comparisons and floors, which IEEE 754 rounds in one way: the same index gives the
same pixels on every machine.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from crossguard.data import Dataset
from crossguard.datasets import grammar
from crossguard.datasets.grammar import Draws, Scene, Thing
from crossguard.errors import CrossguardError
from crossguard.shapes import Labels

Plane: TypeAlias = np.ndarray
Shape: TypeAlias = Callable[[Plane, Plane], Plane]

_COUNTS: Final[Mapping[str, int]] = {"train": 20_000, "val": 1_000, "test": 2_000, "heldout": 1_000}
_CLASSES: Final[Mapping[str, tuple[str, ...]]] = {
    "shape": tuple(grammar.SHAPES),
    "color": tuple(grammar.COLORS),
    "texture": tuple(grammar.TEXTURES),
    "object": tuple(f"{color} {shape}" for color, shape in grammar.COMBINATIONS),
    "texture_object": tuple(f"{finish} {shape}" for shape in grammar.SHAPES for finish in grammar.TEXTURES),
    "relation": (),
}
_CACHE_BYTES: Final = 160_000_000


@dataclass(frozen=True)
class Scenes(Dataset):
    """Colored, textured shapes on grounds, drawn on the fly.

    One thing per image: a color (10), a shape (12) and a texture (5) on a ground, small to large, somewhere,
    a little turned. `classes` only says what the label is: `shape`, `color`, `texture`, `object` (color and
    shape, 120 classes) or `texture_object` (texture and shape, 60); sample 7 is one image in all of them.
    `relation` shows two things, one left of, right of, above or below the other; it has captions and no
    classes, so its labels are -1.

    The held-out combinations of color and shape (12 of 120: each shape once) never occur in `train`, neither
    in pixels nor in words. `val` and `test` draw from all combinations, `heldout` from those 12 only. `style`
    is the domain; a sample shows the same scene in each, at any size.

    Args:
        classes: What the label names.
        split: `train`, `val`, `test` or `heldout`.
        style: `photo`, `sketch`, `night` or `cartoon`.
        size: Width and height in pixels.
        count: Number of samples; by default 20,000, 1,000, 2,000 and 1,000 for the four splits.
    """

    classes: str = "object"
    split: str = "test"
    style: str = "photo"
    size: int = 32
    count: int | None = None

    def __post_init__(self) -> None:
        for what, given, possible in (
            ("class set", self.classes, _CLASSES),
            ("split", self.split, grammar.SPLITS),
            ("style", self.style, grammar.STYLES),
        ):
            if given not in possible:
                raise CrossguardError(f"unknown {what} {given!r} of Scenes; choose one of {', '.join(possible)}")
        for what, number in (("size", self.size), ("count", self.count)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise CrossguardError(f"the {what} of Scenes must be a whole number, not {number!r}")
        if not 16 <= self.size <= 512:
            raise CrossguardError(f"scenes of {self.size} pixels are not possible; give a size from 16 to 512")
        if self.count is not None and self.count < 1:
            raise CrossguardError(f"a count of {self.count} scenes is not possible; give 1 or more")

    def __len__(self) -> int:
        return _COUNTS[self.split] if self.count is None else self.count

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in label order, such as `red circle`; empty for `relation`."""
        return _CLASSES[self.classes]

    @property
    def templates(self) -> tuple[str, ...]:
        """`a photo of a {}`; colors and textures are adjectives and need `a photo of a {} object`."""
        return ("a photo of a {} object",) if self.classes in ("color", "texture") else ("a photo of a {}",)

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """True single-word synonyms of the canonical words of class names, templates and captions."""
        return grammar.ALIASES

    def id(self, index: int) -> str:
        """Names the picture; class sets that show the same pictures share it."""
        kind = "pair" if self._pair else "single"
        return f"scenes/{kind}/{self.split}/{self.style}/{self.size}/{self._place(index)}"

    def scene(self, index: int) -> Scene:
        """What the sample shows, in words and numbers."""
        return grammar.scene(self.split, self._place(index), self._pair)

    def image(self, index: int) -> Tensor:
        """The image as uint8, shape (3, size, size)."""
        cached = _cache(self.size)
        return torch.from_numpy(cached(self.split, self.style, self._place(index), self._pair).copy())

    def labels(self) -> Labels:
        """The labels of all samples; -1 where there are no classes."""
        if self._pair:
            return torch.full((len(self),), -1, dtype=torch.int64)
        indices = np.arange(len(self))
        combinations = grammar.SPLITS[self.split]
        shapes, colors, finishes = tuple(grammar.SHAPES), tuple(grammar.COLORS), grammar.texture(indices)
        chosen = grammar.combination(indices, self.split)
        color = np.array([colors.index(color) for color, _ in combinations])[chosen]
        shape = np.array([shapes.index(shape) for _, shape in combinations])[chosen]
        label = {
            "shape": shape,
            "color": color,
            "texture": finishes,
            "object": shape * len(colors) + color,
            "texture_object": shape * len(grammar.TEXTURES) + finishes,
        }
        return torch.from_numpy(label[self.classes].astype(np.int64))

    def captions(self, index: int) -> tuple[str, ...]:
        """Five true captions; the second is the plainest, `a photo of a red circle` in its commonest form."""
        draws = Draws("captions", self._pair, self.split, self.style, self._place(index))
        return grammar.captions(self.scene(index), self.style, draws)

    @property
    def _pair(self) -> bool:
        return self.classes == "relation"

    def _place(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no sample {index} among {len(self)} scenes")
        return int(index)


@functools.cache
def _cache(size: int) -> Callable[[str, str, int, bool], Plane]:
    # Adversarial training revisits its images; the bound keeps a long run from filling the memory.
    @functools.lru_cache(maxsize=_CACHE_BYTES // (3 * size * size + 400))
    def rendered(split: str, style: str, index: int, pair: bool) -> Plane:
        return render(grammar.scene(split, index, pair), style, size, Draws("pixels", pair, split, style, index))

    return rendered


# --- pixels

_PAINT: Final[Mapping[str, tuple[int, int, int]]] = {
    "red": (222, 28, 32),
    "yellow": (252, 216, 20),
    "lime": (160, 234, 40),
    "green": (16, 132, 48),
    "cyan": (30, 214, 224),
    "blue": (28, 64, 220),
    "purple": (128, 36, 176),
    "pink": (255, 128, 186),
    "brown": (118, 68, 28),
    "gray": (134, 136, 140),
}
_GROUND: Final[Mapping[str, tuple[int, int, int]]] = {
    "grass": (112, 140, 92),
    "sand": (216, 200, 164),
    "snow": (234, 238, 242),
    "brick": (162, 122, 108),
    "wood": (176, 146, 112),
    "stone": (112, 112, 114),
    "cloth": (148, 154, 178),
}


def render(seen: Scene, style: str, size: int, draws: Draws) -> Plane:
    """The picture of a scene as uint8, shape (3, size, size)."""
    canvas = _RENDERERS[style](seen, _Canvas.of(size, draws), draws)
    return np.rint(canvas.clip(0.0, 255.0)).astype(np.uint8)


@dataclass(frozen=True)
class _Canvas:
    """The coordinates of the pixels, and what is random about each: `field` is smooth, `grain` and `noise`
    are not. `noise` has a variance of 1, the others lie in [-1, 1]."""

    size: int
    x: Plane
    y: Plane
    field: Plane
    grain: Plane
    noise: Plane

    @staticmethod
    def of(size: int, draws: Draws) -> _Canvas:
        x, y, cell, weight = _grid(size)
        area = size * size
        raw = draws.bytes(64 + area + 6 * area).astype(np.float32)
        lattice = raw[:64].reshape(8, 8)
        rows = lattice[cell] + weight[:, None] * (lattice[cell + 1] - lattice[cell])
        field = rows[:, cell] + weight * (rows[:, cell + 1] - rows[:, cell])
        grain = raw[64 : 64 + area].reshape(size, size)
        # The sum of two uniform draws is close enough to a bell, and exact in integers.
        noise = (raw[64 + area : 64 + 4 * area] + raw[64 + 4 * area :]).reshape(3, size, size)
        return _Canvas(size, x, y, field * (2 / 255) - 1.0, grain * (2 / 255) - 1.0, (noise - 255.0) * (1 / 104.0))


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Plane, Plane, Plane, Plane]:
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    at = line * 6.9
    cell = np.floor(at).astype(np.int64)
    part = (at - cell).astype(np.float32)
    return line[None, :], line[:, None], cell, part * part * (3.0 - 2.0 * part)


def _rgb(color: tuple[int, int, int]) -> Plane:
    return np.array(color, dtype=np.float32)[:, None, None]


def _photo(seen: Scene, canvas: _Canvas, draws: Draws) -> Plane:
    image = _lit(seen, canvas, draws)
    return image + canvas.noise * draws.between(3.0, 8.0)


def _night(seen: Scene, canvas: _Canvas, draws: Draws) -> Plane:
    image = _lit(seen, canvas, draws)
    lamp = _rgb((100, 88, 66)) if draws.unit() < 0.5 else _rgb((78, 92, 104))
    dx, dy = canvas.x - draws.between(0.3, 0.7), canvas.y - draws.between(0.3, 0.7)
    glow = 0.26 + 0.46 / (1.0 + 5.0 * (dx * dx + dy * dy))
    return image * glow * (lamp * 0.01) + canvas.noise * draws.between(7.0, 12.0) + 4.0


def _sketch(seen: Scene, canvas: _Canvas, draws: Draws) -> Plane:
    image = _rgb((246, 243, 234)) * (1.0 + 0.025 * canvas.grain + 0.02 * canvas.field)
    width = draws.between(0.022, 0.03)
    for thing in seen.things:
        u, v = _local(thing, canvas)
        distance = _SHAPES[thing.shape](u, v) * thing.half + 0.012 * canvas.field
        inside = _inside(distance, canvas.size)
        line = _inside(np.abs(distance) - width, canvas.size)
        ink = _rgb(_PAINT[thing.color]) * 0.92
        wash = inside * (0.12 + 0.5 * _pattern(thing, canvas, draws))
        image = image + np.maximum(wash, line * (0.92 + 0.08 * canvas.grain)) * (ink - image)
    return image


def _cartoon(seen: Scene, canvas: _Canvas, draws: Draws) -> Plane:
    relief = np.floor(_GROUNDS[seen.ground](canvas, draws) * 8.0 + 0.5) * 0.125
    image = _rgb(_GROUND[seen.ground]) * (1.0 + relief) * 0.8 + 51.0
    for thing in seen.things:
        u, v = _local(thing, canvas)
        distance = _SHAPES[thing.shape](u, v) * thing.half
        image = image + _inside(distance - 0.02, canvas.size) * (20.0 - image)
        image = image + _inside(distance + 0.02, canvas.size) * (_painted(thing, canvas, draws) - image)
    return image


_RENDERERS: Final[Mapping[str, Callable[[Scene, _Canvas, Draws], Plane]]] = {
    "photo": _photo,
    "sketch": _sketch,
    "night": _night,
    "cartoon": _cartoon,
}


def _lit(seen: Scene, canvas: _Canvas, draws: Draws) -> Plane:
    tint = np.array([[[draws.between(0.95, 1.05)]] for _ in range(3)], dtype=np.float32)
    image = _rgb(_GROUND[seen.ground]) * tint * (1.0 + _GROUNDS[seen.ground](canvas, draws))
    for thing in seen.things:
        u, v = _local(thing, canvas)
        distance = _SHAPES[thing.shape](u, v) * thing.half
        shadow = np.clip(1.0 - distance * 14.0, 0.0, 1.0)
        rim = np.clip(1.0 + distance * 20.0, 0.0, 1.0)
        paint = _painted(thing, canvas, draws) * (1.0 - 0.3 * rim - 0.05 * canvas.grain)
        image = image * (1.0 - 0.3 * shadow)
        image = image + _inside(distance, canvas.size) * (paint - image)
    slope = draws.between(-0.3, 0.3) * (canvas.x - 0.5) + draws.between(-0.3, 0.3) * (canvas.y - 0.5)
    return image * (slope + draws.between(0.9, 1.08))


def _painted(thing: Thing, canvas: _Canvas, draws: Draws) -> Plane:
    paint = _rgb(_PAINT[thing.color])
    # A highlight is nearly white; all other patterns are a darker tone of the color, so red never turns pink.
    tone = paint * 0.1 + 229.0 if thing.texture == "glossy" else paint * 0.36
    return paint + _pattern(thing, canvas, draws) * (tone - paint)


def _local(thing: Thing, canvas: _Canvas) -> tuple[Plane, Plane]:
    # Cosine and sine from the tangent of the half angle: quotients round alike everywhere, libm does not.
    square = thing.turn * thing.turn
    cos, sin = (1 - square) / (1 + square), 2 * thing.turn / (1 + square)
    dx, dy = (canvas.x - thing.x) / thing.half, (canvas.y - thing.y) / thing.half
    return dx * cos + dy * sin, dy * cos - dx * sin


def _inside(distance: Plane, size: int) -> Plane:
    """How much of each pixel is inside; `distance` is in widths of the image."""
    return np.clip(0.5 - distance * size, 0.0, 1.0)


# --- textures


def _pattern(thing: Thing, canvas: _Canvas, draws: Draws) -> Plane:
    """Where the pattern of a thing's texture lies, from 0 to 1."""
    tilt, phase = draws.between(-0.4, 0.4), draws.unit()
    norm = 1.0 / math.sqrt(1.0 + tilt * tilt)
    dx, dy = canvas.x - thing.x, canvas.y - thing.y
    along, across = (dx + tilt * dy) * norm, (dy - tilt * dx) * norm
    return _PATTERNS[thing.texture](along, across, phase, canvas.size)


def _plain(along: Plane, across: Plane, phase: float, size: int) -> Plane:
    return _NOTHING


def _striped(along: Plane, across: Plane, phase: float, size: int) -> Plane:
    return _wave(across, 0.15, phase, size)


def _dotted(along: Plane, across: Plane, phase: float, size: int) -> Plane:
    row, column = across / 0.17 + phase, along / 0.17 + phase
    row, column = row - np.floor(row) - 0.5, column - np.floor(column) - 0.5
    return _inside((np.sqrt(row * row + column * column) - 0.3) * 0.17, size)


def _checkered(along: Plane, across: Plane, phase: float, size: int) -> Plane:
    rows, columns = _wave(across, 0.26, phase, size), _wave(along, 0.26, phase, size)
    return rows + columns - 2.0 * rows * columns


def _glossy(along: Plane, across: Plane, phase: float, size: int) -> Plane:
    band = (along + across) * 0.7071
    broad, fine = np.abs(band + 0.03) - 0.035, np.abs(band - 0.06) - 0.014
    return _inside(np.minimum(broad, fine), size)


_NOTHING: Final = np.zeros((1, 1), dtype=np.float32)
_PATTERNS: Final[Mapping[str, Callable[[Plane, Plane, float, int], Plane]]] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "glossy": _glossy,
}


def _wave(at: Plane, period: float, phase: float, size: int) -> Plane:
    """Bands of equal width, from 0 to 1, with soft edges."""
    at = at / period + phase
    return np.clip((np.abs(at - np.floor(at) - 0.5) - 0.25) * (period * size) + 0.5, 0.0, 1.0)


# --- grounds: relief as a relative change of brightness


def _grass(canvas: _Canvas, draws: Draws) -> Plane:
    return 0.14 * canvas.grain + 0.1 * canvas.field


def _sand(canvas: _Canvas, draws: Draws) -> Plane:
    at = canvas.y * 7.0 + canvas.field * 0.8
    return 0.05 * canvas.grain + 0.2 * np.abs(at - np.floor(at) - 0.5) - 0.05


def _snow(canvas: _Canvas, draws: Draws) -> Plane:
    return 0.06 * canvas.field + 0.02 * canvas.grain


def _brick(canvas: _Canvas, draws: Draws) -> Plane:
    row = canvas.y * 5.0 + draws.unit()
    column = canvas.x * 2.5 + 0.5 * (np.floor(row) - 2.0 * np.floor(row * 0.5)) + draws.unit()
    across, along = np.abs(row - np.floor(row) - 0.5), np.abs(column - np.floor(column) - 0.5)
    edge = np.minimum((0.5 - across) * 0.2, (0.5 - along) * 0.4)
    return 0.35 * np.clip((0.022 - edge) * canvas.size + 0.5, 0.0, 1.0) + 0.05 * canvas.grain - 0.05


def _wood(canvas: _Canvas, draws: Draws) -> Plane:
    at = canvas.x * 6.0 + canvas.field * 0.35 + draws.unit()
    return 0.36 * np.abs(at - np.floor(at) - 0.5) + 0.03 * canvas.grain - 0.1


def _stone(canvas: _Canvas, draws: Draws) -> Plane:
    return 0.22 * canvas.field + 0.08 * canvas.grain


def _cloth(canvas: _Canvas, draws: Draws) -> Plane:
    row, column = canvas.y * 10.0, canvas.x * 10.0
    return 0.2 * (np.abs(row - np.floor(row) - 0.5) + np.abs(column - np.floor(column) - 0.5)) - 0.1


_GROUNDS: Final[Mapping[str, Callable[[_Canvas, Draws], Plane]]] = {
    "grass": _grass,
    "sand": _sand,
    "snow": _snow,
    "brick": _brick,
    "wood": _wood,
    "stone": _stone,
    "cloth": _cloth,
}


# --- shapes: signed distances in half extents, negative inside, y pointing down


def _circle(u: Plane, v: Plane) -> Plane:
    return np.sqrt(u * u + v * v) - 0.9


def _square(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(v - 0.74, np.abs(u) * 0.872 - v * 0.490 - 0.456)


def _star(u: Plane, v: Plane) -> Plane:
    # Inside a pentagram is what lies beyond at most one of its lines: the second largest distance decides.
    largest = second = _NOTHING - 9.0
    for nu, nv in _NORMALS:
        distance = u * nu + v * nv
        second = np.maximum(second, np.minimum(largest, distance))
        largest = np.maximum(largest, distance)
    return np.maximum(second - 0.36, np.sqrt(u * u + v * v) - 1.0)


_NORMALS: Final = ((0.0, 1.0), (0.9511, 0.309), (0.5878, -0.809), (-0.5878, -0.809), (-0.9511, 0.309))


def _heart(u: Plane, v: Plane) -> Plane:
    u, v = np.abs(u), v - 0.06
    du, dv = u - 0.4, v + 0.4
    return np.minimum(np.sqrt(du * du + dv * dv) - 0.5657, (u + np.abs(v) - 0.8) * 0.7071)


def _cross(u: Plane, v: Plane) -> Plane:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 0.3, v - 0.92), np.maximum(u - 0.92, v - 0.3))


def _diamond(u: Plane, v: Plane) -> Plane:
    return (np.abs(u) + 0.66 * np.abs(v) - 0.66) * 0.835


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(np.sqrt(u * u + v * v) - 0.7) - 0.24


def _crescent(u: Plane, v: Plane) -> Plane:
    bite = u - 0.5
    moon = np.maximum(np.sqrt(u * u + v * v) - 0.96, 0.76 - np.sqrt(bite * bite + v * v))
    # Nothing of it lies right of the horns; without this the shadow would close the circle.
    return np.maximum(moon, 2.0 * (u - 0.594))


def _bolt(u: Plane, v: Plane) -> Plane:
    # A triangle and its reflection in the center: the same three lines with both signs turned.
    left, right = 0.757 * u + 0.653 * v, 0.992 * u + 0.128 * v
    upper = np.maximum(np.maximum(v - 0.16, -left - 0.35), right - 0.269)
    lower = np.maximum(np.maximum(-v - 0.16, left - 0.35), -right - 0.269)
    return np.minimum(upper, lower)


def _bowtie(u: Plane, v: Plane) -> Plane:
    u = np.abs(u)
    return np.maximum(u - 0.95, (np.abs(v) - 0.7 * u - 0.08) * 0.819)


def _drop(u: Plane, v: Plane) -> Plane:
    below = v - 0.33
    cone = np.maximum(np.abs(u) * 0.888 - (v + 0.97) * 0.4615, v - 0.06)
    return np.minimum(np.sqrt(u * u + below * below) - 0.6, cone)


_SHAPES: Final[Mapping[str, Shape]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
    "crescent": _crescent,
    "bolt": _bolt,
    "bowtie": _bowtie,
    "drop": _drop,
}
