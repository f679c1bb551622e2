"""Looks at what an attack made and an evaluation kept: samples for a terminal, as a picture, as a page."""

from __future__ import annotations

import base64
import html
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text
from torch import Tensor

from crossguard import files
from crossguard.budgets import Budget, Linf, PixelBudget
from crossguard.data import Dataset
from crossguard.datasets.kept import INDEX, REPORT, Kept, rounded
from crossguard.errors import CrossguardError
from crossguard.report import Ranks, Report, ReportError, shortened
from crossguard.words import build

FORMATS = (".png", ".html")
LISTED = 5  # texts of one class or image; more are counted
TALLEST = 60_000  # pixels of a picture; Agg draws no more than 65535

Pieces = tuple[tuple[str, str], ...]  # words that are 'same', 'old' or 'new'
Facts = list[tuple[str, str]]
Texts = list[tuple[str, Pieces]]


@dataclass(frozen=True)
class Verdict:
    """Whether a sample was answered rightly and still is.

    Args:
        fell: whether one of its captions found the image and no longer does.
    """

    right: bool
    stands: bool
    fell: bool = False

    @property
    def lost(self) -> bool:
        """Whether the attack turned a right answer into a wrong one."""
        return self.right and not self.stands

    def __str__(self) -> str:
        return " -> ".join("right" if one else "wrong" for one in (self.right, self.stands))


@dataclass(frozen=True)
class Sample:
    """What is said of one kept sample, wherever it is shown.

    Args:
        row: its place in the folder.
        facts: names and values.
        texts: each with what it is the text of.
    """

    row: int
    id: str
    verdict: Verdict
    facts: tuple[tuple[str, str], ...]
    texts: tuple[tuple[str, Pieces], ...]

    @property
    def title(self) -> str:
        return f"{self.id}: {self.verdict}"


@dataclass(frozen=True)
class Shot:
    """The images of a sample, in [0, 1]; the clean one is None where the data does not give it."""

    adversarial: Tensor
    clean: Tensor | None

    @cached_property
    def factor(self) -> int:
        """By how much the perturbation can be magnified before it leaves [-1/2, 1/2]."""
        peak = 0.0 if self.clean is None else float((self.adversarial - self.clean).abs().max())
        return max(1, int(0.5 / peak + 1e-3)) if peak > 0 else 1

    @property
    def panels(self) -> Iterator[tuple[str, Tensor | None]]:
        """The images with their titles, in the order in which they are shown."""
        yield "clean", self.clean
        if self.clean is None:
            yield "perturbation", None
        else:
            delta = self.adversarial - self.clean
            title = f"perturbation × {self.factor}" if bool(delta.any()) else "perturbation: none"
            yield title, (0.5 + self.factor * delta).clamp(0, 1)
        yield "under attack", self.adversarial


class Look:
    """A folder that `crossguard attack --keep` or `crossguard eval --keep` wrote.

    Ranks are known where the report of the same question lies beside the images.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.kept = Kept(str(folder))
        if len(self.kept) == 0:
            raise CrossguardError(f"{folder} holds no samples; run the evaluation with --keep again")
        with self._whole():
            self.question = {str(part): str(word) for part, word in self.kept.question.items()}
            self.ranks = self._ranks()
            self.verdicts = [self._verdict(kept) for kept in self.kept.samples]

    def pick(self, count: int, changed: bool = False) -> list[Sample]:
        """The first samples.

        Args:
            changed: those first that the attack turned from right to wrong, then those of which a caption fell.
        """
        rows = list(range(len(self.verdicts)))
        if changed:
            rows.sort(key=lambda row: (not self.verdicts[row].lost, not self.verdicts[row].fell))
        with self._whole():
            samples = [self._sample(row) for row in rows[:count]]
            paths = [self.folder / self.kept.samples[sample.row]["file"] for sample in samples]
        for path in paths:
            if not path.is_file():
                raise CrossguardError(f"the kept image file {path} is missing; run the evaluation with --keep again")
        return samples

    @property
    def summary(self) -> str:
        lost = sum(verdict.lost for verdict in self.verdicts)
        return f"{len(self.verdicts)} samples, of which the attack turned {lost} from right to wrong"

    @property
    def header(self) -> tuple[tuple[str, str], ...]:
        """The question in short words."""
        parts = ("task", "model", "attack", "budget", "surrogate")
        found = [(part, shortened(self.question[part])) for part in parts if part in self.question]
        return tuple((part, plain(text)) for part, text in found if text != "None")

    def shots(self, samples: Sequence[Sample]) -> tuple[list[Shot], str]:
        """The images of samples, and a sentence where the clean ones are not to be had."""
        shots, doubt = [], ""
        for sample in samples:
            (adversarial,) = next(self.kept.batches(1, [sample.row])).images
            clean = None
            try:
                clean = self._clean(self.kept.samples[sample.row], adversarial)
            except CrossguardError as error:
                doubt = doubt or f"without clean images: {plain(str(error))}"
            shots.append(Shot(adversarial, clean))
        return shots, doubt

    # Reading

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Makes a sentence of what is wrong in the index."""
        try:
            yield
        except CrossguardError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CrossguardError(f"{self.folder / INDEX} is broken; run the evaluation with --keep again") from error

    def _verdict(self, kept: Mapping[str, Any]) -> Verdict:
        if self.kept.names:
            return Verdict(kept["clean"] == kept["label"], kept["adversarial"] == kept["label"])
        image, captions = self._ranked(kept)
        fell = any(rank is not None and rank[0] == 0 < rank[1] for rank in captions)
        if image is None:
            return Verdict(bool(kept["right"]), bool(kept["stands"]), fell)
        return Verdict(image[0] == 0, image[1] == 0, fell)

    def _sample(self, row: int) -> Sample:
        kept = self.kept.samples[row]
        facts, texts = self._classes(kept) if self.kept.names else self._captions(kept)
        facts.append(("perturbation", self._size(float(kept["size"]))))
        return Sample(row, plain(kept["id"]), self.verdicts[row], tuple(facts), tuple(texts))

    def _classes(self, kept: Mapping[str, Any]) -> tuple[Facts, Texts]:
        """The label and the answers, with the prompts of these classes."""
        label, before, after = (kept[one] for one in ("label", "clean", "adversarial"))
        names = {number: plain(_at(self.kept.names, number)) for number in (label, before, after)}
        texts: Texts = []
        for number, name in names.items():
            pairs = list(zip(*(_at(prompts, number) for prompts in self._prompts), strict=True))
            texts += [(name, marks(old, new)) for old, new in pairs[:LISTED]] + _more(name, pairs)
        return [("label", names[label]), ("answer", f"{names[before]} -> {names[after]}")], texts

    def _captions(self, kept: Mapping[str, Any]) -> tuple[Facts, Texts]:
        """The captions, with the ranks where they are known."""
        pairs = list(zip(kept["clean_texts"], kept["texts"], strict=True))
        image, captions = self._ranked(kept)
        facts = [("captions", f"{len(pairs)}, of which {sum(old != new for old, new in pairs)} changed")]
        if image is not None:
            facts.append(("image to text", _rank(image)))
        texts: Texts = []
        for number, ((old, new), rank) in enumerate(zip(pairs[:LISTED], captions, strict=False), 1):
            state = "as it was" if old == new else "changed"
            texts.append((f"caption {number} ({state}{f', {_rank(rank)}' if rank else ''})", marks(old, new)))
        return facts, texts + _more("captions", pairs)

    @cached_property
    def _prompts(self) -> tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]]:
        """The texts of the classes before and after."""
        return Kept(self.kept.path, rewritten=False).prompts().texts, self.kept.prompts().texts

    @cached_property
    def _pixels(self) -> PixelBudget | None:
        """The part of the budget that concerns pixels; raises where the budget is a word of somebody's script."""
        budget = build(self.question.get("budget", "None"))
        return budget.image if isinstance(budget, Budget) else None

    def _size(self, size: float) -> str:
        try:
            pixels = self._pixels
        except CrossguardError:
            return f"{size:.4g}"
        if pixels is None:
            return "none"
        shown = [f"{255 * one:.3g}/255" if isinstance(pixels, Linf) else f"{one:.4g}" for one in (size, pixels.eps)]
        return f"{type(pixels).__name__} {shown[0]} of at most {shown[1]}"

    def _ranks(self) -> Mapping[tuple[int, str], tuple[int, int]]:
        """The ranks before and after of images (0) and captions (1), by id; none without a report of the question."""
        try:
            report = Report.load(self.folder / REPORT)
        except ReportError:
            return {}
        found = report.outcomes
        if not isinstance(found, Ranks) or dict(report.question) != self.question:
            return {}
        columns = (np.asarray(one).tolist() for one in (found.text, found.clean, found.adversarial))
        return {(text, one): (old, new) for one, text, old, new in zip(found.id, *columns, strict=True)}

    def _ranked(self, kept: Mapping[str, Any]) -> tuple[tuple[int, int] | None, list[tuple[int, int] | None]]:
        """The ranks of an image and of its captions, where they are known."""
        captions = [self.ranks.get((1, f"{kept['id']}#{number}")) for number in range(len(kept["texts"]))]
        return self.ranks.get((0, kept["id"])), captions

    # The data that was attacked

    @cached_property
    def _data(self) -> Dataset:
        data = getattr(build(self.question.get("task", "")), "data", None)
        if not isinstance(data, Dataset):
            raise CrossguardError("the task of the question has no data")
        return data

    @cached_property
    def _places(self) -> Mapping[str, int]:
        """Where each id of the data is; reads no image."""
        return {self._data.id(index): index for index in range(len(self._data))}

    def _clean(self, kept: Mapping[str, Any], adversarial: Tensor) -> Tensor:
        """The clean image of a sample; raises where the data is gone or is not what it was."""
        index, data = kept.get("index"), self._data
        if not isinstance(index, int) or not 0 <= index < len(data) or data.id(index) != kept["id"]:
            index = self._places.get(kept["id"])
        if index is None:
            raise CrossguardError(f"the data has no sample {kept['id']!r} any more")
        (clean,) = next(data.batches(1, [index])).images
        if clean.shape != adversarial.shape or not self._near(kept, adversarial - clean):
            raise CrossguardError(f"the sample {kept['id']!r} of the data is not the image that was attacked")
        return clean

    def _near(self, kept: Mapping[str, Any], delta: Tensor) -> bool:
        """Whether a perturbation has the size that was measured."""
        try:
            pixels = self._pixels
        except CrossguardError:
            return True
        png = str(kept["file"]).endswith(".png") and "rounded_size" in kept
        measured = float(kept["rounded_size" if png else "size"]) if pixels is not None else 0.0
        size = float((Linf(1.0) if pixels is None else pixels).size(delta[None])[0])
        return math.isclose(size, measured, rel_tol=1e-3, abs_tol=2 / 255)


def marks(before: str, after: str) -> Pieces:
    """The words of two texts: what stayed, what went, what came."""
    old, new = (plain(text).split(" ") for text in (before, after))
    found: list[tuple[str, list[str]]] = []
    if len(old) == len(new):  # as budgets of words count, place by place
        steps = [(left == right, [left], [right]) for left, right in zip(old, new, strict=True)]
    else:
        codes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        steps = [(tag == "equal", old[a:b], new[c:d]) for tag, a, b, c, d in codes]
    for same, left, right in steps:
        if same and found and found[-1][0] == "same":
            found[-1][1].extend(left)
        elif same:
            found.append(("same", [*left]))
        elif len(found) > 1 and found[-2][0] == "old":
            found[-2][1].extend(left)
            found[-1][1].extend(right)
        else:
            found += [("old", [*left]), ("new", [*right])]
    joined = [(kind, " ".join(words)) for kind, words in found]
    return tuple((kind, words) for kind, words in joined if words)


def plain(text: str) -> str:
    """The text with everything that a terminal would obey spelled out."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def lines(number: int, sample: Sample, color: bool) -> Iterator[Text]:
    """A sample for a terminal.

    Args:
        color: whether colors mark what changed, or `[-old-]{+new+}`.
    """
    yield Text(f"{number}. {sample.title}", style="bold" if color else "")
    width = max(len(name) for name, _ in sample.facts)
    for name, value in sample.facts:
        yield Text(f"   {name:<{width}}  {value}")
    width = max((len(name) for name, _ in sample.texts), default=0)
    for name, pieces in sample.texts:
        line = Text(f"   {name:<{width}} ")
        previous = ""
        for kind, words in pieces:
            style, left, right = _SIGNS[kind]
            line.append("" if not color and (previous, kind) == ("old", "new") else " ")
            line.append(words if color else f"{left}{words}{right}", style=style if color else "")
            previous = kind
        line.rstrip()
        yield line


_SIGNS = {"same": ("", "", ""), "old": ("red strike", "[-", "-]"), "new": ("bold green", "{+", "+}")}


def _at(listed: Sequence[Any], number: int) -> Any:
    if number < 0:
        raise IndexError(number)
    return listed[number]


def _more(name: str, pairs: Sequence[object]) -> Texts:
    return [(f"{name}: {len(pairs) - LISTED} more", ())] if len(pairs) > LISTED else []


def _rank(ranks: tuple[int, int]) -> str:
    return f"rank {ranks[0] + 1} -> {ranks[1] + 1}"


def save(look: Look, samples: Sequence[Sample], out: Path) -> str:
    """Writes samples as a picture or a page, by the ending of the file; returns a sentence where clean images are
    missing."""
    check(out)
    shots, doubt = look.shots(samples)
    files.write(out, (page if out.suffix.lower() == ".html" else picture)(look, samples, shots, doubt))
    return doubt


def check(out: Path) -> None:
    """Raises where `save` would know no form for the file."""
    if out.suffix.lower() not in FORMATS:
        raise CrossguardError(f"--out {out} has an unknown ending; give one of {', '.join(FORMATS)}")


# A page


def page(look: Look, samples: Sequence[Sample], shots: Sequence[Shot], doubt: str) -> str:
    """One HTML file that needs no other."""
    head = "".join(f"<dt>{html.escape(name)}<dd>{html.escape(text)}" for name, text in look.header)
    note = f"<p class=doubt>{html.escape(doubt)}" if doubt else ""
    body = "\n".join(_section(sample, shot) for sample, shot in zip(samples, shots, strict=True))
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>Before and under attack</title><style>{_STYLE}</style></head>\n<body><h1>Before and under attack</h1>"
        f"<dl>{head}</dl><p>{html.escape(look.summary)}; {len(samples)} shown.{note}\n{body}\n</body></html>\n"
    )


def _section(sample: Sample, shot: Shot) -> str:
    figures = "".join(
        f"<figure><img{_scaled(image)} alt='{html.escape(title)}' src='data:image/png;base64,{_png(image)}'>"
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, image in shot.panels
        if image is not None
    )
    facts = "".join(f"<dt>{html.escape(name)}<dd>{html.escape(value)}" for name, value in sample.facts)
    texts = "".join(
        f"<dt>{html.escape(name)}<dd>" + " ".join(_TAGS[kind].format(html.escape(words)) for kind, words in pieces)
        for name, pieces in sample.texts
    )
    kind = " class=lost" if sample.verdict.lost else ""
    return (
        f"<section{kind}><h2>{html.escape(sample.title)}</h2><div class=row>{figures}"
        f"<dl>{facts}{texts}</dl></div></section>"
    )


_TAGS = {"same": "{}", "old": "<del>{}</del>", "new": "<ins>{}</ins>"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222;
  background: #fff }
h1 { font-size: 1.4em } h2 { font-size: 1em; margin: 0 0 .6em; overflow-wrap: anywhere }
section { border-top: 1px solid #ccc; padding: 1em 0 } .lost h2 { color: #b00020 } .doubt { color: #8a5000 }
.row { display: flex; flex-wrap: wrap; gap: 1em } .row dl { flex: 1 1 22em }
figure { margin: 0 } figcaption { text-align: center; font-size: .85em; color: #555 }
img { width: 11em; display: block } .small { image-rendering: pixelated }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15em 1em; margin: 0; align-content: start }
dt { color: #555; max-width: 18em; overflow-wrap: anywhere } dd { margin: 0; overflow-wrap: anywhere }
del { color: #b00020; background: #fde8ea } ins { color: #0a6b2d; background: #e2f5e7; text-decoration: none }
""".strip()


def _scaled(image: Tensor) -> str:
    """Pixels are kept sharp where an image is enlarged."""
    return " class=small" if image.shape[-1] < 165 else ""


def _png(image: Tensor) -> str:
    content = io.BytesIO()
    rounded(image).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode("ascii")


# A picture. Everything is placed in pixels from the top left corner.

_DPI = 150
_BOX, _GAP, _MARGIN, _COLUMN = 260, 18, 30, 780  # images, between them, around all, texts
_LINE, _TITLE = 27, 30  # of text; above an image
_INK = {"same": "#222222", "old": "#b00020", "new": "#0a6b2d", "name": "#666666", "lost": "#b00020"}


def picture(look: Look, samples: Sequence[Sample], shots: Sequence[Shot], doubt: str) -> bytes:
    """A row per sample: clean image, perturbation around grey, image under attack, and the texts."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CrossguardError(
            "a picture needs matplotlib ('pip install matplotlib'); --out FILE.html needs nothing"
        ) from error
    alone = all(shot.clean is None for shot in shots)
    left = _MARGIN + (1 if alone else 3) * (_BOX + _GAP) + _GAP
    width = left + _COLUMN + _MARGIN
    figure = Figure(dpi=_DPI, facecolor="white")
    pen = _Pen(figure, FigureCanvasAgg(figure).get_renderer())
    head = [pen.broken([(f"{name}:", "name"), (text, "same")], width - 2 * _MARGIN) for name, text in look.header]
    head.append(pen.broken([(f"{look.summary}; {len(samples)} shown", "name")], width - 2 * _MARGIN))
    head += [pen.broken([(doubt, "lost")], width - 2 * _MARGIN)] if doubt else []
    blocks = [pen.block(sample) for sample in samples]
    top = _MARGIN + _LINE * sum(map(len, head)) + _GAP
    heights = [max(_BOX + _TITLE, _LINE * len(block)) + 2 * _GAP for block in blocks]
    height = top + sum(heights) + _MARGIN
    if height > TALLEST:
        raise CrossguardError(f"a picture of {len(samples)} samples is too tall; give a smaller --count, or FILE.html")
    figure.set_size_inches(width / _DPI, height / _DPI)
    pen.size = width, height
    pen.write(_MARGIN, _MARGIN, [line for block in head for line in block])
    for block, shot, tall in zip(blocks, shots, heights, strict=True):
        pen.rule(top, _MARGIN, width - _MARGIN)
        panels = [*shot.panels][-1:] if alone else [*shot.panels]
        for number, (title, image) in enumerate(panels):
            x = _MARGIN + number * (_BOX + _GAP)
            pen.image(x, top + _GAP, title, image)
        pen.write(left, top + _GAP, block)
        top += tall
    content = io.BytesIO()
    pen.save(content)
    return content.getvalue()


Run = tuple[float, str, str]  # where a word begins, the word, and its kind


class _Pen:
    """Draws on a matplotlib figure at pixels."""

    def __init__(self, figure: Any, renderer: Any) -> None:
        self.figure, self.renderer = figure, renderer
        self.size: tuple[int, int] = 1, 1
        self.widths: dict[tuple[str, str], float] = {}

    def font(self, kind: str) -> dict[str, Any]:
        weight = "bold" if kind in ("new", "title", "lost") else "normal"
        return {"family": "DejaVu Sans", "size": 9, "weight": weight}

    def width(self, word: str, kind: str) -> float:
        from matplotlib.font_manager import FontProperties

        if (word, kind) not in self.widths:
            font = FontProperties(**self.font(kind))
            with warnings.catch_warnings(action="ignore"):  # of signs that the font does not have
                self.widths[word, kind] = self.renderer.get_text_width_height_descent(word, font, False)[0]
        return self.widths[word, kind]

    def broken(self, runs: Sequence[tuple[str, str]], column: int, indent: int = 0) -> list[list[Run]]:
        """Words in lines of a column, of which all but the first are indented."""
        rows: list[list[Run]] = [[]]
        x, space = 0.0, self.width("n", "same") * 0.55
        for text, kind in runs:
            for word in self._fitting(text.split(" "), kind, column - indent):
                wide = self.width(word, kind)
                if rows[-1] and x + wide > column:
                    rows.append([])
                    x = float(indent)
                rows[-1].append((x, word, kind))
                x += wide + space
        return rows

    def _fitting(self, words: Sequence[str], kind: str, column: int) -> Iterator[str]:
        """The words, those cut that are longer than a line."""
        for word in words:
            while word and self.width(word, kind) > column:
                end = max(1, int(len(word) * column / self.width(word, kind)) - 1)
                yield word[:end]
                word = word[end:]
            if word:
                yield word

    def block(self, sample: Sample) -> list[list[Run]]:
        """All that is said of a sample, in lines."""
        rows = self.broken([(sample.title, "lost" if sample.verdict.lost else "title")], _COLUMN)
        for name, value in sample.facts:
            rows += self.broken([(f"{name}:", "name"), (value, "same")], _COLUMN, 30)
        for name, pieces in sample.texts:
            rows += self.broken([(f"{name}:" if pieces else name, "name"), *((w, k) for k, w in pieces)], _COLUMN, 30)
        return rows

    def write(self, left: int, top: int, rows: Sequence[Sequence[Run]]) -> None:
        for number, row in enumerate(rows):
            y = top + _LINE * number + 0.75 * _LINE
            for x, word, kind in row:
                self._text(left + x, y, word, kind)
            for first, last in _stretches(row):
                end = last[0] + self.width(last[1], last[2])
                self._line(left + first[0], left + end, y - 0.27 * _LINE, _INK["old"], 1.0)

    def image(self, left: int, top: int, title: str, image: Tensor | None) -> None:
        self._text(left + _BOX / 2, top + 0.6 * _TITLE, title, "name", "center")
        if image is None:
            self._text(left + _BOX / 2, top + _TITLE + _BOX / 2, "not found", "name", "center")
            return
        rows, columns = image.shape[-2:]
        scale = _BOX / max(rows, columns)
        wide, tall = columns * scale, rows * scale
        x, y = left + (_BOX - wide) / 2, top + _TITLE + (_BOX - tall) / 2
        axes = self.figure.add_axes(
            (x / self.size[0], 1 - (y + tall) / self.size[1], wide / self.size[0], tall / self.size[1])
        )
        axes.set_axis_off()
        pixels = image.permute(1, 2, 0).numpy()
        axes.imshow(pixels, interpolation="nearest" if scale >= 1 else "antialiased", aspect="auto")

    def rule(self, y: int, left: int, right: int) -> None:
        self._line(float(left), float(right), float(y), "#cccccc", 0.6)

    def save(self, content: io.BytesIO) -> None:
        with warnings.catch_warnings(action="ignore"):  # of signs that the font does not have
            self.figure.savefig(content, format="png", dpi=_DPI)

    def _text(self, x: float, y: float, text: str, kind: str, align: str = "left") -> None:
        self.figure.text(
            x / self.size[0], 1 - y / self.size[1], text, color=_INK.get(kind, _INK["same"]), ha=align, va="baseline",
            parse_math=False, **self.font(kind),
        )  # fmt: skip

    def _line(self, left: float, right: float, y: float, color: str, width: float) -> None:
        from matplotlib.lines import Line2D

        wide, high = self.size
        self.figure.add_artist(
            Line2D((left / wide, right / wide), (1 - y / high, 1 - y / high), color=color, linewidth=width)
        )


def _stretches(row: Sequence[Run]) -> Iterator[tuple[Run, Run]]:
    """The first and the last of adjacent words that went, which are struck through together."""
    first: Run | None = None
    last: Run | None = None
    for run in [*row, (0.0, "", "end")]:
        if run[2] == "old":
            first, last = first or run, run
        elif first is not None and last is not None:
            yield first, last
            first = None
