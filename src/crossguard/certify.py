"""What of a smoothed model is certain: for each image a radius within which no perturbation changes the vote.

Randomized smoothing (Cohen, Rosenfeld and Kolter, ICML 2019). Let f be any function from pixels to classes and p the
probability that f takes an image with normal noise of standard deviation std for its top class. If p > 1/2, then no
perturbation of L2 norm below std * Phi^-1(p) changes which class is the most probable one (their Theorem 1, with the
bound 1 - p for the others). The probability is not known, but drawn from, so all is said with a confidence.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from crossguard import files
from crossguard.answer import Answer, counting
from crossguard.data import Dataset, Prompts
from crossguard.device import precision
from crossguard.errors import CrossguardError
from crossguard.evaluate import question
from crossguard.figures import blank, clipped, png
from crossguard.limits import at_least, shortly
from crossguard.models.base import VisionLanguageModel
from crossguard.models.smoothing import Smoothed
from crossguard.opening import evaluating
from crossguard.printing import progress_bar
from crossguard.processes import Processes, joined, leads
from crossguard.reading import read_json
from crossguard.report import Rate, key, shortened
from crossguard.seeds import derive, drawing, fold, normal
from crossguard.table import in_markdown
from crossguard.tasks.base import Task, finite
from crossguard.tasks.zero_shot import ZeroShot
from crossguard.telling import tell
from crossguard.words import contents, given, show, within

GUESSES, SAMPLES, ALPHA = 100, 100_000, 0.001  # of the paper
QUICK = 1_000  # draws that are counted unless told otherwise
PICTURE, TEXT, DRAWS = "certified.png", "certified.md", "draws"
RADII = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)  # of the table

_READ_AT_ONCE = 4096  # embeddings that are compared with all classes
_TITLE = 48  # characters of a name in the picture
_SCHEMA = 1


@dataclass(frozen=True)
class Certificate:
    """What is known of one image.

    Args:
        id: of the sample.
        label: its true class.
        vote: the class that most of the counted draws are taken for, whether that is certain or not.
        top: the class that is certified; None, if the method abstains.
        count: how many of the counted draws are taken for the guess.
        lower: what the probability of the guess is at least, with the confidence 1 - alpha.
        radius: no perturbation of this L2 norm or less, in pixels of [0, 1], changes the top class; 0 if it abstains.
    """

    id: str
    label: int
    vote: int
    top: int | None
    count: int
    lower: float
    radius: float


@dataclass(frozen=True)
class Certified:
    """The certificates of a smoothed model on a task.

    Args:
        question: word for word, with everything that the numbers hang on.
        names: of the classes.
        images: one certificate for each.
        std: of the noise.
        samples: draws that are counted for each image.
        guesses: draws before these, by which a class is guessed.
        alpha: how likely the certificate of an image is wrong, at most.
        pixels: how many numbers an image has, by which L2 and Linf compare; None where images differ in that.
        seconds: that drawing took, whenever that was.
        asked: how many forwards of an image tower that took now; what is known from before asks for none.
        notes: what a reader should know.
    """

    question: Mapping[str, str]
    names: tuple[str, ...]
    images: tuple[Certificate, ...]
    std: float
    samples: int
    guesses: int
    alpha: float
    pixels: int | None
    seconds: float
    asked: int = 0
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        return "\n".join(lines({shortened(self.question.get("model", "")): self}))

    def at(self, radius: float) -> Rate:
        """Certified accuracy: of how many images the right class is certified against every perturbation of this L2
        norm or less. (The paper counts radii from `radius` on, where its theorem is about smaller perturbations.)"""
        return Rate(int((self._right > radius).sum()), len(self))

    @property
    def clean(self) -> Rate:
        """How often the vote is right, whether that is certain or not."""
        return Rate(sum(one.vote == one.label for one in self.images), len(self))

    @property
    def abstained(self) -> Rate:
        """Of how many images no class is certified at all."""
        return Rate(sum(one.top is None for one in self.images), len(self))

    @property
    def reach(self) -> float:
        """The largest radius that so many draws can certify: that of an image of which all agree."""
        return radius_of(lower_bound(self.samples, self.samples, self.alpha), self.std)

    @cached_property
    def _right(self) -> np.ndarray:
        """The radius of each image whose certified class is right; -1 of the others."""
        return np.asarray([one.radius if one.top == one.label else -1.0 for one in self.images])

    def curve(self) -> tuple[list[float], list[Rate]]:
        """Certified accuracy over the radius: where it falls, and to what; from 0 on."""
        falls = sorted({0.0, *(float(radius) for radius in self._right if radius > 0.0)})
        return falls, [self.at(radius) for radius in falls]

    def save(self, path: Path) -> None:
        """Writes all of it as JSON."""
        content = asdict(replace(self, images=())) | {"schema": _SCHEMA}
        content["images"] = {name: [getattr(one, name) for one in self.images] for name in _COLUMNS}
        files.write(path, json.dumps({name: content[name] for name in content if name != "asked"}) + "\n")

    @staticmethod
    def load(path: Path) -> Certified:
        """What `save` wrote."""
        again = f"remove {path} and certify again"
        held = read_json(path, _Saved, again)
        if held["schema"] != _SCHEMA:
            raise CrossguardError(f"{path} is of another version of this package; {again}")
        columns = held["images"]
        if len({len(columns[name]) for name in _COLUMNS}) != 1:
            raise CrossguardError(f"{path} is broken: its columns differ in length; {again}")
        rows = zip(*(columns[name] for name in _COLUMNS), strict=True)
        return Certified(
            held["question"], tuple(held["names"]), tuple(Certificate(*row) for row in rows), held["std"],
            held["samples"], held["guesses"], held["alpha"], held["pixels"], held["seconds"],
            notes=tuple(held["notes"]),
        )  # fmt: skip


_COLUMNS = ("id", "label", "vote", "top", "count", "lower", "radius")


class _Columns(TypedDict):
    id: list[str]
    label: list[int]
    vote: list[int]
    top: list[int | None]
    count: list[int]
    lower: list[float]
    radius: list[float]


class _Saved(TypedDict):
    schema: int
    question: dict[str, str]
    names: list[str]
    images: _Columns
    std: float
    samples: int
    guesses: int
    alpha: float
    pixels: int | None
    seconds: float
    notes: list[str]


@evaluating()
def certify(
    task: Task | Dataset | str | Path,
    model: VisionLanguageModel | str | Path,
    samples: int = QUICK,
    guesses: int = GUESSES,
    alpha: float = ALPHA,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 128,
    out: str | Path | None = None,
    embeddings: bool = True,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Certified:
    """A certificate for each image of a task: the class that the smoothed model takes it for, and the L2 radius within
    which nothing changes that, or that neither is certain.

    For each image `guesses` noisy copies guess a class, and `samples` others count how often it comes; the lower bound
    of Clopper and Pearson (1934) on its probability gives the radius. Where that is not above 1/2 the method abstains.
    Classes of equally many guesses are told apart by their order, which is as good as any: what was guessed takes no
    part in the count.

    The certificate is that of the vote over *all* noise, not of the 100 draws by which `Smoothed` itself answers. It is
    wrong of an image with a probability of `alpha` at most, over the draws. It is about real numbers and normal noise;
    here both are float32, and the noise of a pixel, made of 24 bits, ends at 5.8 standard deviations. The noise of an
    image follows from its pixels and the seed, so neither batches, order, limit nor the class list change it. A model
    that tells the images of a batch apart by its neighbors is no function of an image, and has no certificate.

    What noisy images are taken for is read off their embeddings. With `out`, these are kept, and another class list
    over the same images asks no image tower; that takes 4 bytes for each number of an embedding, 2 MB for an image with
    1,100 draws of 512 numbers. More `samples` later add draws to those that are there: decide on their number before
    you look, since who adds draws until an image is certified spends `alpha` more than once. So does who chooses
    prompts by what is certified. Around another defense an answer may hang on more than an embedding: then the class of
    each draw is kept, for this class list.

    Args:
        model: a `Smoothed`; its `draws` take no part.
        samples: 1,000 here; the paper takes 100,000, which costs a hundred times as much and reaches radii of 3.8
            standard deviations where these reach 2.5.
        limit: that many samples (`Dataset.chosen`).
        batch: noisy copies at once.
        out: a folder for the result and for what the model said. Who asks again goes on there.
        embeddings: whether embeddings are kept; without them the class of each draw is, which needs 4 bytes.
        progress: is told (images done, images in all); see `evaluate`.
    """
    task, model = given("task", task), given("model", model)
    assert isinstance(task, Task) and isinstance(model, VisionLanguageModel)
    model = check_smoothed(model)
    if not isinstance(task, ZeroShot):
        raise CrossguardError(
            f"a certificate is about the class of an image, and {show(task, short=True)} has no classes; give ZeroShot("
            "data) with data that have class names"
        )
    samples, guesses = at_least("samples", samples, 1), at_least("guesses", guesses, 1)
    batch, seed = at_least("batch", batch, 1), at_least("seed", seed, 0)
    alpha = checked_alpha(alpha)
    asked = question(task, model, None, None, None, limit, seed)
    asked |= {"samples": str(samples), "guesses": str(guesses), "alpha": repr(alpha)}
    folder = None if out is None else Path(out)
    path = None if folder is None else folder / f"{key(asked)}.json"
    if not len(task):
        raise CrossguardError(f"{show(task, short=True)} has no samples")
    group = joined()
    with group.meeting():
        if group.tell(path is not None and path.is_file()):
            assert path is not None
            return Certified.load(path)
        if folder is not None:
            with group.together():
                files.check_writable(folder)
        told = progress_bar("certifying") if progress in (None, True) and leads() else nullcontext(progress)
        with told as telling:
            made = _certify(
                task, model, asked, samples, guesses, alpha, limit, seed, batch, folder, embeddings,
                telling if callable(telling) else None, group,
            )  # fmt: skip
        if path is not None:
            with group.together():
                if group.first:
                    made.save(path)
    return made


def check_smoothed(model: VisionLanguageModel) -> Smoothed:
    """The same model; raises where it is no vote over noise."""
    if isinstance(model, Smoothed):
        if model.std == 0.0:
            raise CrossguardError("Smoothed(std=0.0) draws no noise, so nothing is certain; give a std above 0")
        return model
    name = show(model, short=True)
    if any(within(model, Smoothed)):
        raise CrossguardError(
            f"the certificate is that of a vote, and in {name} the vote is inside of another defense; put Smoothed "
            "outermost"
        )
    raise CrossguardError(f"{name} has no certificate; put it into a vote over noise: Smoothed({name}, std=0.25)")


def checked_alpha(alpha: float) -> float:
    """The same number; raises where it is no probability that a certificate could be wrong with."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0.0 < alpha < 1.0:
        raise CrossguardError(
            f"alpha is how likely a certificate may be wrong, and {shortly(alpha)} is no probability between 0 and 1; "
            f"the paper takes {ALPHA}"
        )
    return float(alpha)


def checked_radii(radii: Sequence[float]) -> tuple[float, ...]:
    """The same radii, each once; raises where one is none."""
    for radius in radii:
        if not 0.0 <= radius < math.inf:
            raise CrossguardError(f"a radius of {radius} is not possible; give 0 or more, in pixels of [0, 1]")
    return tuple(dict.fromkeys(radii))


def _certify(
    task: ZeroShot,
    model: Smoothed,
    asked: Mapping[str, str],
    samples: int,
    guesses: int,
    alpha: float,
    limit: int | None,
    seed: int,
    batch: int,
    out: Path | None,
    embeddings: bool,
    progress: Callable[[int, int], None] | None,
    group: Processes,
) -> Certified:
    indices = task.chosen(limit)
    trial = task.prepare(model, None, None, None, indices, seed)
    assert trial.prompts is not None
    prompts = trial.prompts[0]
    voters = _Voters(model, model.base.answer(prompts), prompts, seed, batch, out, embeddings)
    found, shapes, done = dict[int, Certificate](), set[tuple[int, ...]](), 0
    if progress is not None:
        progress(0, len(indices))
    with group.together(), torch.no_grad():
        mine = group.share(indices)
        places = iter(mine)
        for samples_here in task.batches(1, mine):
            image, label = samples_here.images[0], int(samples_here.labels[0])
            said = voters.classes(image, guesses + samples)
            guess, vote, count = counted_votes(said, guesses, len(prompts.names))
            lower = lower_bound(count, samples, alpha)
            radius = radius_of(lower, model.std)
            top = guess if radius > 0.0 else None
            found[next(places)] = Certificate(samples_here.ids[0], label, vote, top, count, lower, radius)
            shapes.add(tuple(image.shape))
            done += group.world
            if progress is not None:
                progress(min(done, len(indices)), len(indices))
    parts = group.gather((found, shapes, voters.seconds, voters.asked))
    known = {index: one for part, *_ in parts for index, one in part.items()}
    sizes = {math.prod(shape) for _, several, *_ in parts for shape in several}
    notes = list(trial.notes)
    if lower_bound(samples, samples, alpha) <= 0.5:
        least = math.floor(math.log(alpha) / math.log(0.5)) + 1
        notes.append(f"{samples} draws certify nothing at alpha={alpha:g}, even where all agree; take {least} or more")
    return Certified(
        asked, prompts.names, tuple(known[index] for index in indices), model.std, samples, guesses, alpha,
        sizes.pop() if len(sizes) == 1 else None, sum(seconds for *_, seconds, _ in parts),
        sum(forwards for *_, forwards in parts), tuple(notes),
    )  # fmt: skip


def counted_votes(classes: Tensor, guesses: int, count: int) -> tuple[int, int, int]:
    """What the draws of an image say: the class that the first ones guess, the class of most of the others, and how
    many of these are of the guess. Of classes with equally many the first one is taken.

    Args:
        classes: that each draw is taken for.
        guesses: how many guess.
        count: of the classes there are.
    """
    first, others = (torch.bincount(part, minlength=count) for part in (classes[:guesses], classes[guesses:]))
    guess = int(first.argmax())
    return guess, int(others.argmax()), int(others[guess])


@lru_cache(maxsize=65536)
def lower_bound(successes: int, n: int, alpha: float) -> float:
    """The one-sided lower bound of Clopper and Pearson (1934): the probability at which `successes` or more of `n`
    come up with probability `alpha`. The true one lies below it with a probability of `alpha` at most, whatever it is.

    It is the root of a sum of binomials, found by bisection from below, so that rounding does not make it too large.
    """
    if successes == 0:
        return 0.0
    if successes == n:
        return alpha ** (1.0 / n)
    hits = torch.arange(successes, n + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(hits + 1) - torch.lgamma(n - hits + 1)
    wanted, low, high = math.log(alpha), 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        terms = ways + hits * math.log(middle) + (n - hits) * math.log1p(-middle)
        if float(terms.logsumexp(0)) > wanted:
            high = middle
        else:
            low = middle
    return low


def radius_of(lower: float, std: float) -> float:
    """The L2 radius of an image whose top class has at least this probability (Cohen et al. 2019, Theorem 1); 0 where
    that may not be the most probable one."""
    return std * NormalDist().inv_cdf(lower) if lower > 0.5 else 0.0


class _Voters:
    """What a model takes the noisy copies of an image for: asked, or remembered in a folder. Copy number i of an image
    is always the same.

    Args:
        inner: the answer of what stands inside of the vote.
    """

    def __init__(
        self,
        model: Smoothed,
        inner: Answer,
        prompts: Prompts,
        seed: int,
        batch: int,
        out: Path | None,
        embeddings: bool,
    ) -> None:
        self.model, self.inner, self.seed, self.batch = model, inner, seed, batch
        self.seconds, self.asked = 0.0, 0
        self.reads = inner.read if embeddings else None  # what is kept are embeddings, if they can be read later
        self.about = {
            "model": show(model.base), "weights": contents(model.base), "precision": precision(),
            "std": repr(model.std), "seed": str(seed), "of each draw": "embedding" if self.reads else "class",
        }  # fmt: skip
        if self.reads is None:
            self.about["classes"] = json.dumps(prompts.texts)
        self.folder = None if out is None else out / DRAWS / key(self.about)

    def classes(self, image: Tensor, draws: int) -> Tensor:
        """What the first so many copies are taken for."""
        name = hashlib.sha256(f"{tuple(image.shape)}".encode() + image.contiguous().cpu().numpy().tobytes()).hexdigest()
        known, seconds = self._kept(name, draws)
        missing = draws - (0 if known is None else len(known))
        if missing > 0:
            began = time.perf_counter()
            with counting() as costs:
                fresh = torch.cat(list(self._ask(image, derive(name, self.seed), draws - missing, draws)))
            self.asked += costs.forwards
            seconds += time.perf_counter() - began
            known = fresh if known is None else torch.cat([known, fresh])
            self._keep(name, known, seconds)
        assert known is not None
        self.seconds += seconds
        if self.reads is None:
            return known[:draws].long()
        parts, device = known[:draws].split(_READ_AT_ONCE), self.model.device
        return torch.cat([finite(self.reads(part.to(device))).argmax(1).cpu() for part in parts])

    def _ask(self, image: Tensor, noise: int, first: int, last: int) -> Iterator[Tensor]:
        """The embeddings of the copies from number `first` to `last`, or their classes."""
        own, device = torch.tensor([noise], dtype=torch.int64), self.model.device
        image = image.to(device)
        for start in range(first, last, self.batch):
            numbers = torch.arange(start, min(start + self.batch, last))
            drawn = fold(own.expand(len(numbers)), numbers)
            copies = (image + self.model.std * normal(drawn, tuple(image.shape), device)).clamp(0.0, 1.0)
            with drawing(fold(drawn, derive("inside"))):
                said = self.inner.hard(copies)
                kept = finite(said.logits).argmax(1).int() if self.reads is None else said.embeddings.float()
            yield finite(kept, "embeddings").cpu() if self.reads else kept.cpu()
            tell("{} of {} draws", int(numbers[-1]) + 1, last)

    def _kept(self, name: str, draws: int) -> tuple[Tensor | None, float]:
        """What is known of an image, of so many draws at most, and the seconds that it took."""
        from safetensors import SafetensorError, safe_open

        if self.folder is None:
            return None, 0.0
        with suppress(OSError, SafetensorError, KeyError, TypeError, ValueError):  # not there yet, or broken
            with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
                told, found = file.metadata(), file.get_tensor("draws")
            fits = (found.dtype, found.ndim) == ((torch.int32, 1) if self.reads is None else (torch.float32, 2))
            if fits and told["digest"] == _digest(found):
                return found[:draws] if len(found) >= draws else found, float(told["seconds"])
        return None, 0.0

    def _keep(self, name: str, draws: Tensor, seconds: float) -> None:
        if self.folder is not None:
            told = self.about | {"seconds": f"{seconds:.3f}", "digest": _digest(draws)}
            files.save_tensors(self.folder / f"{name}.safetensors", {"draws": draws.contiguous()}, told)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:32]


# What people look at


def lines(results: Mapping[str, Certified], radii: Sequence[float] | None = None) -> list[str]:
    """A table in markdown, a row for each model, and what it says.

    Args:
        radii: of the columns; those of `RADII` that any of the models can reach, if None.
    """
    radii = checked_radii(radii) if radii else _reached(results)
    each = list(results.items())
    columns = [f"certified, L2 {radius:g}" for radius in radii]
    found = [
        _row(["model", "n", "vote right", *columns, "abstained", "draws", "seconds"]),
        "|---|---:|---:|" + "---:|" * (len(columns) + 3),
    ]
    for name, one in each:
        rates = [str(one.at(radius)) for radius in radii]
        draws = f"{one.guesses} + {one.samples:,}"
        cells = [str(len(one)), str(one.clean), *rates, str(one.abstained), draws, f"{one.seconds:.0f}"]
        found.append(_row([in_markdown(name), *cells]))
    found.append("")
    alphas = " or ".join(dict.fromkeys(f"{100 * (1 - one.alpha):.6g} %" for _, one in each))
    found.append(
        "Certified: the right class, and no perturbation of that L2 norm (pixels in [0, 1], at the size of the data) "
        f"changes the vote over all noise; for each image with a confidence of {alphas}. Intervals are over images "
        "(Wilson, 95 %)."
    )
    for name, one in each:
        told = f"{in_markdown(name)}: noise of {one.std:g} is {255 * one.std:.3g} levels of 255"
        if one.reach > 0.0:
            told += f"; {one.samples:,} draws that all agree certify a radius of {one.reach:.3g}"
            if one.samples < SAMPLES:
                most = radius_of(lower_bound(SAMPLES, SAMPLES, one.alpha), one.std)
                told += f", the {SAMPLES:,} of the paper {most:.3g}"
        found.append(f"- {told}.")
    pixels = {one.pixels for _, one in each}
    if len(pixels) == 1 and (count := next(iter(pixels))) is not None:
        root, radius = math.sqrt(count), max((radius for radius in radii if radius > 0.0), default=0.1)
        found.append(
            f"- In Linf: an image has {count:,} numbers, so a radius r holds against changes of r / {root:.3g}: "
            f"{radius:g} against {255 * radius / root:.2g}/255 in each."
        )
    found += [f"- {in_markdown(note)}" for note in dict.fromkeys(note for _, one in each for note in one.notes)]
    return found


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _reached(results: Mapping[str, Certified]) -> tuple[float, ...]:
    most = max((one.reach for one in results.values()), default=0.0)
    return tuple(radius for radius in RADII if radius <= most) or RADII[:1]


def picture(results: Mapping[str, Certified]) -> bytes:
    """Certified accuracy over the L2 radius, as PNG: a curve for each model, with its interval, that ends where its
    draws reach no further."""
    canvas = blank(7.6, 4.6)
    axes = canvas.subplots()
    most = max((one.reach for one in results.values()), default=0.0) or 1.0
    for number, (name, one) in enumerate(results.items()):
        color, (falls, rates) = f"C{number % 10}", one.curve()
        at = [*falls, max(one.reach, falls[-1])]
        shares, lows, highs = ([100 * end for end in (*ends, ends[-1])] for ends in _ends(rates))
        axes.fill_between(at, lows, highs, step="post", color=color, alpha=0.15, linewidth=0)
        axes.step(at, shares, where="post", color=color, linewidth=1.6, label=clipped(name, _TITLE))
        axes.plot([0.0], [100 * one.clean.value], marker="o", color=color, fillstyle="none", clip_on=False)
        axes.axvline(one.reach, color=color, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, most * 1.04)
    axes.set_ylim(0, 101)
    axes.set_xlabel("radius r: no perturbation of L2 norm r or less changes the vote (pixels in [0, 1])", fontsize=9)
    counts = sorted({len(one) for one in results.values()})
    axes.set_ylabel(f"% right and certified (n = {', '.join(map(str, counts))}, 95 %)", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    pixels = {one.pixels for one in results.values()}
    if len(pixels) == 1 and (count := next(iter(pixels))) is not None:
        scale = 255 / math.sqrt(count)
        above = axes.secondary_xaxis(
            "top", functions=(lambda r: np.multiply(r, scale), lambda level: np.divide(level, scale))
        )
        above.set_xlabel("the same in Linf, r / sqrt(d), in levels of 255", fontsize=9)
        above.tick_params(labelsize=8)
    legend = axes.legend(
        title="circle: the vote is right; dotted: as far as the draws reach", title_fontsize=8, fontsize=8,
        frameon=False, loc="upper right",
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
    tasks = {shortened(one.question.get("task", "")) for one in results.values()}
    if len(tasks) == 1:
        canvas.suptitle(clipped(tasks.pop(), _TITLE), fontsize=10, parse_math=False)
    return png(canvas)


def _ends(rates: Sequence[Rate]) -> tuple[list[float], list[float], list[float]]:
    """The values of rates, and the ends of their intervals."""
    intervals = [rate.interval for rate in rates]
    return [rate.value for rate in rates], [low for low, _ in intervals], [high for _, high in intervals]
