"""How fast defenses are at test time, in one run and as ratios.

    python benchmarks/test_time.py rtpt                       # on the shipped model and the scenes
    python benchmarks/test_time.py rtpt --model b32 --images 4 --classes 100 --views 8
    python benchmarks/test_time.py rtpt --model b32 --images 1 --classes 1000 --views 8 --memory
    python benchmarks/test_time.py price                      # defenses that attack back, beside what they are made of
    python benchmarks/test_time.py audit --images 100 --threads 2 --eps 4

`rtpt` answers the same images by the same views three times: by the loop of the authors' code (one image at a time, its
views embedded anew in each of four forwards, and all prompts read anew as well), by the word asked about one image at a
time, and by the word asked about batches. The answers are asserted equal. `b32` is a text tower of the size of CLIP
ViT-B/32 with a small image tower, both of random weights; its loop reads each prompt padded to the longest, where the
authors' code pads to 77 tokens. With `--memory` a process of its own says by how much it grew.

`price` times one answer of TTC and of SCC, and divides it by the forwards and backwards that were counted in it, each
at the price of a bare one.

`audit` audits TTC with all its defaults, within 5/255 if not told otherwise, and divides the CPU seconds by the
forwards and backwards that were counted in it, each at the price of a bare one. What is above 1 is noise, steps,
judging, reports, and gradients of gradients (in the smooth stand-in of TTC), which cost more than those that are
counted. Then it asks the same with every adversary about all images (`--whole`); the rungs that both have in common are
asked once and count for both. That the worst case is the same for every image is asserted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoints import b32
from torch import Tensor

from crossguard import RTPT, SCC, TTC, Linf, Prompts, Scenes, Tiny, ZeroShot
from crossguard.answer import counting, logits_of
from crossguard.audit import audit
from crossguard.experiment import Cell, Watch
from crossguard.models.base import Checkpoint
from crossguard.models.views import tpt_views
from crossguard.report import Report
from crossguard.seeds import by_position, drawing


class Loop:
    """R-TPT as its authors' code runs it, one image at a time."""

    def __init__(self, word: RTPT, prompts: Prompts) -> None:
        assert isinstance(word.base, Checkpoint)
        self.word, self.model, self.network = word, word.base, word.base.network
        self.splice = self.network.splice(prompts.flat, word.words)
        self.splice.packed = None  # the prompts are read whole, not their beginning once

    def __call__(self, image: Tensor, key: Tensor) -> Tensor:
        word = self.word
        with drawing(key):
            (views,) = tpt_views(image, word.keys(1, "views"), word.views, word.mixed)
        context = torch.nn.Parameter(self.splice.start.clone())

        def answered(images: Tensor) -> Tensor:
            return self.model.logits(self.model.encode_image(images), self.splice(context))

        with torch.no_grad():
            answered(image)
            embeddings = F.normalize(self.model.encode_image(views), dim=1)
            answered(views)
        optimizer = torch.optim.AdamW([context], word.lr)
        logits = answered(views)
        surprise = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
        surprise[surprise.argsort()[: max(1, int(word.views * word.keep))]].mean().backward()
        optimizer.step()
        with torch.no_grad():
            logits = answered(views)
        cosines = (embeddings @ embeddings.T).fill_diagonal_(-torch.inf)
        score = cosines.topk(min(word.neighbors, word.views - 1)).values.mean(1)
        return (score / word.temperature).softmax(0) @ logits


def model_of(name: str, folder: Path) -> Checkpoint:
    if name == "tiny":
        return Tiny()
    return b32(folder)


def prompts_of(count: int) -> Prompts:
    """So many classes, of the names of the scenes; two of them joined, where these are too few."""
    names = list(Scenes(classes="object").names)
    names += [f"{one} and {other}" for one in names for other in names]
    return Prompts.of(tuple(names[:count]), ("a photo of a {}",))


def rtpt(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = model_of(options.model, Path(folder)), prompts_of(options.classes)
        data, keys = Scenes(), by_position(options.images)
        images = torch.stack([data.image(index).float() / 255.0 for index in range(options.images)])
        word = RTPT(model, views=options.views)
        answer, loop = word.answer(prompts), Loop(word, prompts)

        def batched(size: int) -> Tensor:
            found = list[Tensor]()
            for rows in torch.arange(options.images).split(size):
                with drawing(keys[rows]), torch.no_grad():
                    found.append(answer(images[rows]))
            return torch.cat(found)

        def looped() -> Tensor:
            return torch.stack([loop(images[i : i + 1], keys[i : i + 1]) for i in range(options.images)])

        ways: dict[str, Callable[[], Tensor]] = {
            "loop of the authors": looped,
            "the word, one image at a time": lambda: batched(1),
            f"the word, {options.batch} images at a time": lambda: batched(options.batch),
        }
        seconds, found = dict[str, float](), dict[str, Tensor]()
        for _ in range(options.runs):  # in turns, so that a busy machine is busy for all
            for name, way in ways.items():
                start = time.process_time()
                found[name] = way()
                seconds[name] = min(seconds.get(name, torch.inf), time.process_time() - start)
        expected = found["loop of the authors"]
        apart = max(float((one - expected).abs().max()) for one in found.values())
        spread = float(expected.std(1).mean())
        assert apart < 1e-2 * spread, f"the answers differ by {apart}, where the classes differ by {spread}"
        for name, least in seconds.items():
            ratio = seconds["loop of the authors"] / least
            print(f"{name}: {options.images / least:.2f} images per CPU second, {ratio:.2f} times the loop")
        print(f"logits differ by {apart:.1g} at most, those of an image have a standard deviation of {spread:.2g}")


class Spent(Watch):
    """The CPU seconds of each cell of an audit, by its key."""

    def __init__(self) -> None:
        self.seconds = dict[str, float]()
        self.start_of = 0.0

    def asks(self, cell: Cell) -> None:
        self.start_of = time.process_time()

    def answers(self, cell: Cell, report: Report) -> None:
        self.seconds[cell.key] = time.process_time() - self.start_of


def audited(options: argparse.Namespace) -> None:
    data, model = Scenes(), Tiny()
    images = torch.stack([data.image(index).float() / 255.0 for index in range(options.images)])
    bare = model.answer(data.prompts())

    def forwards() -> None:
        with torch.no_grad():
            bare(images)

    def backwards() -> None:
        bare.ascend(images, lambda said: logits_of(said).square().sum(1))

    def least(way: Callable[[], None]) -> float:
        """CPU seconds of an image."""
        found = torch.inf
        for _ in range(options.runs + 1):  # the first one warms up
            start = time.process_time()
            way()
            found = min(found, time.process_time() - start)
        return found / options.images

    one, both = least(forwards), least(backwards)
    budget, each = Linf(options.eps / 255), Spent()
    with tempfile.TemporaryDirectory() as folder:
        with counting() as costs:
            began, start = time.monotonic(), time.process_time()
            made = audit(ZeroShot(data), TTC(model), budget, folder, limit=options.images, watch=each)
            seconds, spent = time.monotonic() - began, time.process_time() - start
        first = dict(each.seconds)
        whole = audit(ZeroShot(data), TTC(model), budget, folder, limit=options.images, whole=True, watch=each)
    for ladder, other in zip(made.ladders, whole.ladders, strict=True):
        left, all_left = (said.correct & said.standing for said in (ladder.worst, other.worst))
        assert bool((left == all_left).all()), f"{ladder.name}: the worst case is another"
        staged = {rung.report.key for rung in ladder.rungs if rung.staged}
        quick = sum(first[rung.report.key] for rung in ladder.rungs)
        slow = sum(each.seconds[rung.report.key] for rung in other.rungs)
        print(
            f"{ladder.name}: {quick:.0f} CPU seconds, {sum(first[key] for key in staged):.0f} of them of the rungs "
            f"about what is left; with every rung about all images {slow:.0f}, {slow / quick:.2f} times as many"
        )
    one, both = min(one, least(forwards)), min(both, least(backwards))  # the machine may have been busy before
    parts = (costs.forwards - costs.backwards) * one + costs.backwards * both
    for ladder in made.ladders:
        for rung in ladder.attacked:
            asked = [sum(counts) / options.images for counts in (rung.outcomes.gradients, rung.outcomes.forwards)]
            print(
                f"{ladder.name}, {rung.name}: {asked[0]:.0f} gradients and {asked[1]:.0f} answers an image, of "
                f"{rung.asked()} images, {first[rung.report.key]:.1f} CPU seconds"
            )
    print(f"a bare forward: {1000 * one:.3g} CPU milliseconds an image, with a backward {1000 * both:.3g}")
    print(
        f"an audit of TTC on {options.images} images: {seconds:.0f} seconds, {spent:.0f} CPU seconds on "
        f"{options.threads} threads, {spent / parts:.2f} times its {costs.forwards / 1e6:.2f} million forwards and "
        f"{costs.backwards / 1e6:.2f} million backwards"
    )


def price(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = model_of(options.model, Path(folder)), prompts_of(options.classes)
        data, keys = Scenes(), by_position(options.images)
        images = torch.stack([data.image(index).float() / 255.0 for index in range(options.images)])
        bare = model.answer(prompts)
        defended = {"TTC": TTC(model).answer(prompts), "SCC": SCC(model).answer(prompts)}

        def asked(answer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
            def ask() -> None:
                with drawing(keys), torch.no_grad():
                    answer(images)

            return ask

        ways: dict[str, Callable[[], object]] = {
            "a bare forward": asked(bare),
            "a bare forward and backward": lambda: bare.ascend(images, lambda said: logits_of(said).square().sum(1)),
        } | {name: asked(answer) for name, answer in defended.items()}
        seconds = dict[str, float]()
        for _ in range(options.runs + 1):  # the first one warms up
            for name, way in ways.items():
                start = time.process_time()
                way()
                seconds[name] = min(seconds.get(name, torch.inf), time.process_time() - start)
        one, both = (seconds[name] for name in ("a bare forward", "a bare forward and backward"))
        for name, least in seconds.items():
            told = f"{name}: {1000 * least / options.images:.3g} CPU milliseconds an image"
            if name in defended:
                with counting() as costs:
                    ways[name]()
                forwards, backwards = (count / options.images for count in (costs.forwards, costs.backwards))
                parts = (forwards - backwards) * one + backwards * both
                told += f", {least / parts:.2f} times its {forwards:g} forwards and {backwards:g} backwards"
            print(told)


def grown(options: argparse.Namespace) -> None:
    """Answers one batch and prints how large the process was before and at most, in megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = model_of(options.model, Path(folder)), prompts_of(options.classes)
        images = torch.rand(options.images, 3, 32, 32)
        model.encode_image(images[:1])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer = RTPT(model, views=options.views).answer(prompts)
        with drawing(by_position(options.images)), torch.no_grad():
            answer(images)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([before // 1024, after // 1024]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("what", choices=["rtpt", "price", "audit"])
    parser.add_argument("--model", choices=["tiny", "b32"], default="tiny")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--views", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--eps", type=float, default=5.0, help="of an audit, in 255ths")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead, in a process of its own")
    parser.add_argument("--grown", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "price":
        price(options)
    elif options.what == "audit":
        audited(options)
    elif options.grown:
        grown(options)
    elif options.memory:
        answer = subprocess.run([sys.executable, *sys.argv, "--grown"], check=True, capture_output=True, text=True)
        before, after = json.loads(answer.stdout.splitlines()[-1])
        print(f"the process grew from {before} to {after} MB")
    else:
        rtpt(options)


if __name__ == "__main__":
    main()
