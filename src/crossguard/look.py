"""Looks at what an attack made and an evaluation kept: samples for a terminal, as a picture, as a page."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from rich.console import Console
from rich.text import Text
from torch import Tensor

from crossguard import files
from crossguard.budgets import Budget, Linf, PixelBudget
from crossguard.data import Dataset, Prompts
from crossguard.datasets.keeping import keeping, rounded
from crossguard.datasets.kept import AGAIN, INDEX, REPORT, Kept
from crossguard.errors import CrossguardError
from crossguard.figures import png
from crossguard.limits import shortly
from crossguard.pages import figure, render
from crossguard.printing import in_notebook, plain
from crossguard.processes import ALONE
from crossguard.reading import misfit
from crossguard.report import Ranks, Report, ReportError, shortened
from crossguard.words import build, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import RendererAgg

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


class _Rounded(TypedDict, total=False):
    rounded_size: float


class _Sized(_Rounded):
    size: float


class _Answered(_Sized):
    """What is shown of a sample of classes."""

    label: int
    clean: int
    adversarial: int


class _Captioned(_Sized):
    """What is shown of a sample with captions."""

    right: bool
    stands: bool
    texts: list[str]
    clean_texts: list[str]


class Look:
    """A folder that `crossguard attack --keep` or `crossguard eval --keep` wrote.

    Ranks are known where the report of the same question lies beside the images.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.kept = Kept(str(folder))
        if len(self.kept) == 0:
            raise CrossguardError(f"{folder} holds no samples; run the evaluation with --keep again")
        self._check()
        self.question = dict(self.kept.question)
        self.ranks = self._ranks()
        self.verdicts = [self._verdict(kept) for kept in self.kept.samples]

    def pick(self, count: int, changed: bool = False, ids: Sequence[str] = ()) -> list[Sample]:
        """The first samples.

        Args:
            changed: those first that the attack turned from right to wrong, then those of which a caption fell.
            ids: of these samples alone.
        """
        known = {sample["id"]: row for row, sample in enumerate(self.kept.samples)}
        for one in ids:
            if one not in known:
                raise CrossguardError(f"{self.folder} has no sample {shortly(one)}{nearest(one, known)}")
        rows = [known[one] for one in ids] or list(range(len(self.verdicts)))
        if changed:
            rows.sort(key=lambda row: (not self.verdicts[row].lost, not self.verdicts[row].fell))
        samples = [self._sample(row) for row in rows[:count]]
        for path in (self.folder / self.kept.samples[sample.row]["file"] for sample in samples):
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

    def _check(self) -> None:
        """Raises where the index lacks what is shown of a sample; what any reader needs, `Kept` has looked at."""
        names, samples = self.kept.names, list(self.kept.samples)
        wrong = misfit(samples, list[_Answered] if names else list[_Captioned], "samples")
        if not wrong and names:
            told = {kept[one] for kept in samples for one in ("label", "clean", "adversarial")}
            if min(told) < 0 or max(told) >= len(names):
                wrong = f"it has no class {min(told) if min(told) < 0 else max(told)}"
            wrong = wrong or self._odd_prompts()
        elif not wrong and any(len(kept["texts"]) != len(kept["clean_texts"]) for kept in samples):
            wrong = "a sample has not as many captions as there were"
        if wrong:
            raise CrossguardError(f"{str(self.folder / INDEX)!r} is broken: {wrong}; {AGAIN}")

    def _odd_prompts(self) -> str:
        """What is wrong with the prompts of the classes; empty where nothing is."""
        try:
            old, new = ({len(one) for one in prompts} for prompts in self._prompts)
        except CrossguardError as error:  # of one of the two
            return str(error)
        return "" if old == new else "its classes have not as many prompts as they had"

    def _verdict(self, kept: Mapping[str, Any]) -> Verdict:
        if self.kept.names:
            return Verdict(kept["clean"] == kept["label"], kept["adversarial"] == kept["label"])
        image, captions = self._ranked(kept)
        fell = any(rank is not None and rank[0] == 0 < rank[1] for rank in captions)
        if image is None:
            return Verdict(kept["right"], kept["stands"], fell)
        return Verdict(image[0] == 0, image[1] == 0, fell)

    def _sample(self, row: int) -> Sample:
        kept = self.kept.samples[row]
        facts, texts = self._classes(kept) if self.kept.names else self._captions(kept)
        facts.append(("perturbation", self._size(float(kept["size"]))))
        before, after = kept.get("clean_margin"), kept.get("adversarial_margin")
        if isinstance(before, float) and isinstance(after, float):  # by how much the label leads
            facts.append(("lead", f"{before:+.2f} -> {after:+.2f} logits"))
        return Sample(row, plain(kept["id"]), self.verdicts[row], tuple(facts), tuple(texts))

    def _classes(self, kept: Mapping[str, Any]) -> tuple[Facts, Texts]:
        """The label and the answers, with the prompts of these classes."""
        label, before, after = (kept[one] for one in ("label", "clean", "adversarial"))
        names = {number: plain(self.kept.names[number]) for number in (label, before, after)}
        texts: Texts = []
        for number, name in names.items():
            pairs = list(zip(*(prompts[number] for prompts in self._prompts), strict=True))
            texts += [(name, marks(old, new)) for old, new in pairs[:LISTED]] + _more(name, pairs)
        return [("label", names[label]), ("answer", f"{names[before]} -> {names[after]}")], texts

    def _captions(self, kept: Mapping[str, Any]) -> tuple[Facts, Texts]:
        """The captions, with the ranks where they are known."""
        pairs = list(zip(kept["clean_texts"], kept["texts"], strict=True))
        image, captions = self._ranked(kept)
        facts = [("captions", f"{len(pairs)}, of which {sum(old != new for old, new in pairs)} changed")]
        if image is not None:
            facts.append(("image to text", self._rank(image, 0)))
        texts: Texts = []
        for number, ((old, new), rank) in enumerate(zip(pairs[:LISTED], captions, strict=False), 1):
            state = "as it was" if old == new else "changed"
            texts.append((f"caption {number} ({state}{f', {self._rank(rank, 1)}' if rank else ''})", marks(old, new)))
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

    def _rank(self, ranks: tuple[int, int], text: int) -> str:
        """Ranks before and after of a caption (1) among all images, or of an image (0) among all captions."""
        among = sum(1 for one, _ in self.ranks if one != text)
        return f"rank {ranks[0] + 1} -> {ranks[1] + 1} of {among}"

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


def _more(name: str, pairs: Sequence[object]) -> Texts:
    return [(f"{name}: {len(pairs) - LISTED} more", ())] if len(pairs) > LISTED else []


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


SHOWN = 8  # samples whose images an evaluation holds in memory


@dataclass(frozen=True)
class Held:
    """The first samples of an evaluation as they are in memory, for `Report.show`.

    Args:
        rows: what is known of each; with its place in the data.
        images: of each, under attack.
        prompts: the class prompts before and after the attack, where there are classes.
    """

    rows: Sequence[Mapping[str, Any]]
    images: Sequence[Tensor]
    prompts: tuple[Prompts, Prompts] | None

    def __call__(self, report: Report, count: int, changed: bool) -> None:
        with (
            tempfile.TemporaryDirectory() as folder,
            keeping(Path(folder) / "kept", report.question, "safetensors", True, ALONE) as kept,
        ):
            kept.begin()
            rows = [
                {**row, **place}
                for row, image in zip(self.rows, self.images, strict=True)
                for place in kept.add([row["index"]], image[None])
            ]
            kept.finish(rows, self.prompts)
            report.save(kept.folder / REPORT)
            look = Look(kept.folder)
            samples = look.pick(count, changed)
            if in_notebook():
                from IPython.display import HTML, display  # pyright: ignore[reportMissingImports]

                display(HTML(page(look, samples, *look.shots(samples), frame="piece.html")))
                return
        console = Console(markup=False, highlight=False)
        for number, sample in enumerate(samples, 1):
            for line in lines(number, sample, console.is_terminal and not console.no_color):
                console.print(line, soft_wrap=True)


# A page


def page(look: Look, samples: Sequence[Sample], shots: Sequence[Shot], doubt: str, frame: str = "page.html") -> str:
    """One HTML file that needs no other.

    Args:
        frame: 'piece.html' is for a notebook, which is a page already.
    """
    shown = [
        (sample, [figure(title, rounded(image)) for title, image in shot.panels if image is not None])
        for sample, shot in zip(samples, shots, strict=True)
    ]
    return render(
        "look.html", frame=frame, title="Before and under attack", header=look.header, summary=look.summary,
        shown=shown, doubt=doubt,
    )  # fmt: skip


# A picture. Everything is measured in pixels.

_DPI = 150
_BOX, _GAP, _MARGIN, _COLUMN = 260, 18, 30, 780  # images, between them, around all, texts
_LINE, _TITLE = 27, 30  # of text; above an image
_INDENT = 30  # of lines that go on
_BLACK = "#222222"
_INK = {"old": "#b00020", "new": "#0a6b2d", "name": "#666666", "lost": "#b00020"}
_BOLD = ("new", "title", "lost")

Runs = list[tuple[str, str]]  # texts of several words, each with its kind
Line = list[tuple[float, str, str]]  # where a word begins, the word, and its kind


def picture(look: Look, samples: Sequence[Sample], shots: Sequence[Shot], doubt: str) -> bytes:
    """A row per sample: clean image, perturbation around grey, image under attack, and the texts."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CrossguardError(
            "a picture needs matplotlib ('pip install matplotlib'); --out FILE.html needs nothing"
        ) from error
    alone = all(shot.clean is None for shot in shots)
    columns = [*([_BOX] * (1 if alone else 3)), _COLUMN]
    width = sum(columns) + _GAP * (len(columns) - 1)
    told: list[Runs] = [[(f"{name}:", "name"), (text, "same")] for name, text in look.header]
    told.append([(f"{look.summary}; {len(samples)} shown", "name")])
    told += [[(doubt, "lost")]] if doubt else []
    blocks = [_broken(told, width), *(_broken(_said(sample), _COLUMN) for sample in samples)]
    rows = [_LINE * len(blocks[0]), *(max(_BOX, _LINE * len(block) - _TITLE) for block in blocks[1:])]
    between = _TITLE + 2 * _GAP
    height = sum(rows) + between * len(samples)
    if height + 2 * _MARGIN > TALLEST:
        raise CrossguardError(f"a picture of {len(samples)} samples is too tall; give a smaller --count, or FILE.html")
    whole = width + 2 * _MARGIN, height + 2 * _MARGIN
    canvas = Figure((whole[0] / _DPI, whole[1] / _DPI), dpi=_DPI, facecolor="white")
    grid = canvas.add_gridspec(
        len(rows), len(columns), width_ratios=columns, height_ratios=rows,
        left=_MARGIN / whole[0], right=1 - _MARGIN / whole[0], bottom=_MARGIN / whole[1], top=1 - _MARGIN / whole[1],
        wspace=_GAP * len(columns) / sum(columns), hspace=between * len(rows) / sum(rows),
    )  # fmt: skip
    _write(canvas.add_subplot(grid[0, :]), blocks[0])
    for number, (block, shot) in enumerate(zip(blocks[1:], shots, strict=True), 1):
        panels = [*shot.panels][-1:] if alone else [*shot.panels]
        rule = canvas.add_subplot(grid[number, :])
        rule.set_axis_off()
        rule.axhline(1 + (_TITLE + _GAP) / rows[number], color="#cccccc", linewidth=0.6, clip_on=False)
        rule.set_ylim(0, 1)
        for column, (title, image) in enumerate(panels):
            _draw(canvas.add_subplot(grid[number, column]), title, image)
        _write(canvas.add_subplot(grid[number, len(panels)]), block, _TITLE)
    with warnings.catch_warnings(action="ignore"):  # of signs that the font does not have
        return png(canvas)


def _said(sample: Sample) -> list[Runs]:
    """All that is said of a sample, a paragraph each."""
    facts: list[Runs] = [[(f"{name}:", "name"), (value, "same")] for name, value in sample.facts]
    texts = [
        [(f"{name}:" if pieces else name, "name"), *((words, kind) for kind, words in pieces)]
        for name, pieces in sample.texts
    ]
    return [[(sample.title, "lost" if sample.verdict.lost else "title")], *facts, *texts]


def _broken(paragraphs: Sequence[Runs], column: int) -> list[Line]:
    """Paragraphs in the lines of a column; what does not fit in the first line of each is indented."""
    lines: list[Line] = []
    space = _width("n", "same") * 0.55
    for runs in paragraphs:
        lines.append([])
        x = 0.0
        for text, kind in runs:
            for word in _fitting(text.split(), kind, column - _INDENT):
                wide = _width(word, kind)
                if lines[-1] and x + wide > column:
                    lines.append([])
                    x = float(_INDENT)
                lines[-1].append((x, word, kind))
                x += wide + space
    return lines


def _fitting(words: Sequence[str], kind: str, column: int) -> Iterator[str]:
    """The words, those cut that are longer than a line."""
    for word in words:
        while word:
            end = len(word) if (wide := _width(word, kind)) <= column else max(1, int(len(word) * column / wide) - 1)
            yield word[:end]
            word = word[end:]


@lru_cache(maxsize=65536)
def _width(word: str, kind: str) -> float:
    from matplotlib.font_manager import FontProperties

    with warnings.catch_warnings(action="ignore"):  # of signs that the font does not have
        return _renderer().get_text_width_height_descent(word, FontProperties(**_font(kind)), False)[0]


@cache
def _renderer() -> RendererAgg:
    """Measures words as they will be drawn: fonts are fitted to the pixels."""
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, _DPI)


def _font(kind: str) -> dict[str, Any]:
    return {"family": "DejaVu Sans", "size": 9, "weight": "bold" if kind in _BOLD else "normal"}


def _write(axes: Axes, lines: Sequence[Line], above: int = 0) -> None:
    """Lines of text, the first of which begins so far above the axes. Words that went are struck through, neighbors
    together."""
    axes.set_axis_off()
    axes.set_xlim(0, axes.bbox.width)
    axes.set_ylim(axes.bbox.height, 0)
    for number, line in enumerate(lines):
        y = _LINE * (number + 0.75) - above
        for (x, word, kind), after in zip(line, [*line[1:], None], strict=True):
            axes.text(x, y, word, color=_INK.get(kind, _BLACK), parse_math=False, **_font(kind))
            if kind == "old":
                end = after[0] if after is not None and after[2] == kind else x + _width(word, kind)
                axes.plot((x, end), (y - 0.27 * _LINE,) * 2, color=_INK[kind], linewidth=1.0, clip_on=False)


def _draw(axes: Axes, title: str, image: Tensor | None) -> None:
    axes.set_axis_off()
    axes.set_anchor("N")
    axes.set_title(title, color=_INK["name"], fontdict=_font("name"), pad=5)
    if image is None:
        axes.text(0.5, 0.5, "not found", color=_INK["name"], ha="center", **_font("name"))
        return
    tall, wide = image.shape[-2:]
    side = max(tall, wide)
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if side <= _BOX else "antialiased")
    axes.set_xlim((wide - side - 1) / 2, (wide + side - 1) / 2)  # a square, so that no image is larger than another
    axes.set_ylim(side - 0.5, -0.5)
