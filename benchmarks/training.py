"""What a training step costs: beside its counted bare forwards and backwards, beside the released algorithm of MMCoA,
and beside the pixels that it waits for.

    python benchmarks/training.py steps                        # TeCoA, MMCoA, FARE, HPT-GPD on the shipped model
    python benchmarks/training.py steps --model both --batch 16            # the same and TGA-ZSR on a small CLIP
    python benchmarks/training.py released                     # MMCoA on the shipped model, batch 128
    python benchmarks/training.py released --model b32 --batch 8 --runs 2
    python benchmarks/training.py pixels --model ../shared/models/natural
    python benchmarks/training.py loss                         # the loss of MMCoA alone

`steps` writes down each forward that a step asks of a tower (of how many images or texts, and whether a gradient to
pixels or to weights follows), and asks the same again, bare, in turn with the steps. What is above 1 is the rest:
noise, steps and projections of the attack, the text search, losses, the optimizer.

`released` is a step of the published code of MMCoA: in each of ten attack steps all class prompts are read and every
weight gets a gradient; texts are attacked one at a time, with a forward of the language model for each; and each image
brings its own copy of its text into the loss. Both train copies of one model.

`pixels` trains on JPEGs of 224 pixels, which are decoded while steps are taken, and says for how long a step waited for
its images. `--pause` takes so many seconds in place of each step, as an accelerator does.

`loss` is one loss and its gradient, with distinct prompts and counts and with one prompt for each image; the values and
gradients are compared first.

Seconds are those of the processor, on one thread unless told otherwise, and on a GPU those of the clock. Contestants
take turns, and what is reported is the median of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attacks import paired
from checkpoints import both, both_b32
from loading import written
from text import Loop
from torch import Tensor

from crossguard import (
    FARE,
    HPTGPD,
    TGAZSR,
    FTStandard,
    HuggingFace,
    Images,
    MMCoA,
    Scenes,
    Substitute,
    TeCoA,
    Tiny,
    Words,
)
from crossguard.data import Dataset
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.run import Run
from crossguard.defenses.step import Learner
from crossguard.defenses.terms import in_batch
from crossguard.device import chosen, exact
from crossguard.models.base import Checkpoint
from crossguard.processes import ALONE
from crossguard.words import given

EPS = 1.0 / 255.0


def clock() -> float:
    """Seconds of the processor, or of the wall where a GPU computes."""
    if chosen().device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def model_of(name: str, folder: Path) -> Checkpoint:
    if name == "tiny":
        return Tiny()
    if name in ("b32", "both"):
        return both_b32(folder / name) if name == "b32" else both(folder / name)
    return HuggingFace(name)


def learner_of(recipe: Recipe, base: Checkpoint, data: Dataset, folder: Path) -> Learner:
    return Run(recipe, base, data, folder, {"recipe": "", "model": "", "data": ""}, ALONE).learner


# Counted forwards and backwards


@dataclass(frozen=True)
class Call:
    """One forward of a tower, and whether a gradient follows: to 'pixels', to 'weights' or to nothing ('')."""

    ask: Callable[[Any], Any]
    given: Any
    to: str

    def again(self, weights: Sequence[Tensor]) -> None:
        for one in weights:
            one.requires_grad_(self.to == "weights")
        given = self.given.clone().requires_grad_(True) if self.to == "pixels" else self.given
        with torch.set_grad_enabled(bool(self.to)):
            said = self.ask(given)
            total = said.sum() if isinstance(said, Tensor) else sum(part.sum() for part in said)
        if self.to:
            wanted = [given] if self.to == "pixels" else list(weights)
            torch.autograd.grad(total, wanted, allow_unused=True)  # type: ignore[arg-type]


class Heard:
    """A model of which every forward is written down."""

    def __init__(self, model: Any, calls: list[Call]) -> None:
        self.model, self.calls = model, calls

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.model, name)
        return heard(found, self.model, self.calls) if name in ("encode_image", "encode_text") else found


def heard(ask: Callable[[Any], Any], model: Any, calls: list[Call]) -> Callable[[Any], Any]:
    def asked(given: Any) -> Any:
        graph = torch.is_grad_enabled()
        pixels = graph and isinstance(given, Tensor) and given.requires_grad
        weights = graph and isinstance(model, torch.nn.Module) and any(one.requires_grad for one in model.parameters())
        kept = given.detach() if isinstance(given, Tensor) else list(given)
        calls.append(Call(ask, kept, "pixels" if pixels else "weights" if weights else ""))
        return ask(given)

    return asked


def counted(learner: Learner) -> list[Call]:
    """Where each forward of the learner's towers will be written down."""
    calls: list[Call] = []
    for name in ("encode_image", "encode_text", "patches"):
        ask = getattr(learner.network, name)
        setattr(learner.network, name, heard(ask, learner.network, calls))
    for name, teacher in learner.teachers.items():
        if isinstance(teacher, torch.nn.Module):
            for part in ("encode_image", "encode_text", "patches"):
                setattr(teacher, part, heard(getattr(teacher, part), teacher, calls))
        else:
            learner.teachers[name] = Heard(teacher, calls)  # type: ignore[assignment]
    return calls


def steps(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        base = model_of(options.model, Path(place))
        data = Scenes("color", "train", count=4 * options.batch)
        shared: dict[str, Any] = {"steps": 10_000, "batch": options.batch}
        recipes: dict[str, Recipe] = {
            "FTStandard": FTStandard(**shared), "TeCoA": TeCoA(**shared), "MMCoA": MMCoA(**shared),
            "FARE": FARE(**shared), "HPTGPD": HPTGPD(proxy=Tiny(), **shared),
        }  # fmt: skip
        if options.model != "tiny":
            recipes["TGAZSR"] = TGAZSR(**shared)
        recipes = {name: one for name, one in recipes.items() if options.recipe in ("", name)}
        learners = {name: learner_of(one, base, data, Path(place) / name) for name, one in recipes.items()}
        calls = {name: counted(one) for name, one in learners.items()}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in recipes}
        for turn in range(options.runs + 1):
            for name, learner in learners.items():
                calls[name].clear()
                began = clock()
                learner.take(turn)
                step, bare = clock() - began, 0.0
                weights = list(learner.trained.values())
                for call in list(calls[name]):
                    began = clock()
                    call.again(weights)
                    bare += clock() - began
                for one in weights:
                    one.requires_grad_(True)
                if turn:  # the first one fills memories
                    took[name].append((step, bare))
        rows = []
        for name in recipes:
            ratio = statistics.median(step / bare for step, bare in took[name])
            seconds = statistics.median(step for step, _ in took[name])
            asked = [f"{len(call.given)}{'>' + call.to if call.to else ''}" for call in calls[name]]
            rows.append({"recipe": name, "seconds": round(seconds, 4), "step_over_bare": round(ratio, 3)})
            print(f"{name}: {seconds:.3f} s a step, {ratio:.3f} of the bare cost of {' '.join(asked)}", flush=True)
    print(json.dumps({"model": options.model, "batch": options.batch, "rows": rows}))


# The released algorithm


class Released:
    """A step of the published code of MMCoA, with the seconds of its parts."""

    def __init__(self, base: Checkpoint, prompts: list[str]) -> None:
        self.network = base.load().to(chosen().device).eval()
        self.prompts, self.seconds = prompts, {"images": 0.0, "texts": 0.0, "loss": 0.0}
        self.loop = Loop(self.network.encode_text, one_by_one=False, remembered=None)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-6)

    def take(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        began = clock()
        delta = torch.empty_like(images).uniform_(-EPS, EPS).requires_grad_(True)
        for _ in range(10):
            logits = self.network.logits(
                self.network.encode_image((images + delta).clamp(0, 1)), self.network.encode_text(self.prompts)
            )
            F.cross_entropy(logits, labels).backward()
            assert delta.grad is not None
            delta.data = (delta.data + EPS * delta.grad.sign()).clamp(-EPS, EPS)
            delta.grad.zero_()
        began = self._spent("images", began)
        texts = [self.prompts[label] for label in labels.tolist()]
        changed = self.loop(texts)
        began = self._spent("texts", began)
        target, total = torch.arange(len(texts), device=images.device), torch.zeros((), device=images.device)
        for seen, strings in (((images + delta.detach()).clamp(0, 1), texts), (images, changed)):
            logits = self.network.logits(self.network.encode_image(seen), self.network.encode_text(strings))
            total = total + 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        total.backward()
        self.optimizer.step()
        self._spent("loss", began)

    def _spent(self, part: str, began: float) -> float:
        now = clock()
        self.seconds[part] = now - began
        return now


def released(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        base = model_of(options.model, Path(place))
        data = Scenes("color", "train", count=4 * options.batch)
        ours = learner_of(MMCoA(steps=10_000, batch=options.batch), base, data, Path(place) / "ours")
        theirs = Released(base, data.prompts().flat)
        calls = counted(ours)
        rounds: list[dict[str, float]] = []
        read = ours.feeds[""].batch
        for turn in range(options.runs + 1):
            batch = read(turn)
            ours.feeds[""].batch = lambda _, batch=batch: batch  # type: ignore[method-assign]
            labels = batch.texts["classes"].place
            assert labels is not None
            calls.clear()
            began = clock()
            ours.take(turn)
            mine, bound = clock() - began, 0.0
            weights = list(ours.trained.values())
            for call in [call for call in calls if call.to == "pixels"]:
                began = clock()
                call.again(weights)
                bound += clock() - began
            for one in weights:
                one.requires_grad_(True)
            began = clock()
            theirs.take(batch.images, labels)
            other = clock() - began
            told = {"ours": mine, "our_image_gradients": bound, "theirs": other, **theirs.seconds}
            if turn:
                rounds.append(told)
                print(", ".join(f"{name} {value:.3f}" for name, value in told.items()), flush=True)
        middle = {name: round(statistics.median(one[name] for one in rounds), 4) for name in rounds[0]}
        ratio = statistics.median(one["ours"] / one["theirs"] for one in rounds)
        limit = statistics.median(one["our_image_gradients"] / one["theirs"] for one in rounds)
    print(json.dumps({
        "model": options.model, "batch": options.batch, "ours_over_theirs": round(ratio, 3),
        "image_gradients_over_theirs": round(limit, 3), "seconds": middle,
    }))  # fmt: skip


# Pixels


def pixels(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        base = model_of(options.model, Path(place))
        if options.data:
            data = given("data", options.data)
            assert isinstance(data, Dataset)
        else:
            written(Path(place) / "images", options.images, 224, 224)
            data = Images(str(Path(place) / "images"), size=224)
        kind = {"": FTStandard, "FTStandard": FTStandard, "MMCoA": MMCoA}[options.recipe]
        learner = learner_of(kind(steps=10_000, batch=options.batch), base, data, Path(place) / "run")
        feed, waited, took = learner.feeds[""], list[float](), list[float]()
        batch = feed.batch

        def watched(step: int) -> Any:
            began = time.perf_counter()
            found = batch(step)
            waited.append(time.perf_counter() - began)
            return found

        feed.batch = watched  # type: ignore[method-assign]
        for step in range(options.runs + 1):
            began = time.perf_counter()
            if options.pause:
                feed.batch(step)
                time.sleep(options.pause)
            else:
                learner.take(step)
            took.append(time.perf_counter() - began)
        feed.close()
        share = sum(waited[1:]) / sum(took[1:])
    print(f"first batch {waited[0]:.2f} s; later ones waited {', '.join(f'{one:.3f}' for one in waited[1:])} s")
    print(json.dumps({
        "recipe": kind.__name__, "batch": options.batch, "seconds_a_step": round(statistics.median(took[1:]), 3),
        "waited_a_step": round(statistics.median(waited[1:]), 4), "share_of_time": round(share, 4),
    }))  # fmt: skip


# The loss alone


def loss(options: argparse.Namespace) -> None:
    data = Scenes("color", "train", count=options.batch)
    batch = next(data.batches(options.batch))
    prompts, labels = data.prompts().flat, batch.labels
    network = Tiny().load().requires_grad_(True)
    attack = Substitute()

    def attacked(texts: list[str]) -> list[str]:
        with torch.no_grad():
            return attack(network.encode_text, texts, None, Words(1))

    def distinct() -> torch.Tensor:
        present, own = torch.unique(labels, return_inverse=True)
        texts = [prompts[label] for label in present.tolist()]
        images = network.encode_image(batch.images)
        both = network.encode_text(texts + attacked(texts)).view(2, len(texts), -1)
        return sum((0.5 * in_batch(network.logits(images, part), own).mean() for part in both), torch.zeros(()))

    def duplicated() -> torch.Tensor:
        texts = [prompts[label] for label in labels.tolist()]
        changed = [attacked([text])[0] for text in texts]
        images = network.encode_image(batch.images)
        target = torch.arange(len(texts))
        total = torch.zeros(())
        for part in (network.encode_text(texts), network.encode_text(changed)):
            logits = network.logits(images, part)
            total = total + 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        return total

    parameters = list(network.parameters())
    ours, theirs = (torch.autograd.grad(value(), parameters, allow_unused=True) for value in (distinct, duplicated))
    for left, right in zip(ours, theirs, strict=True):
        assert (left is None) == (right is None)
        assert left is None or right is None or torch.allclose(left, right, rtol=1e-3, atol=1e-4)
    assert torch.allclose(distinct(), duplicated(), rtol=1e-5)
    ratios = paired(lambda: duplicated().backward(), lambda: distinct().backward(), options.runs)
    print(
        f"one MMCoA loss and gradient on {options.batch} images of {len(set(labels.tolist()))} classes, "
        f"{options.runs} pairs"
    )
    print("ratio per pair: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    print(json.dumps({"duplicated_over_distinct_prompts": round(statistics.median(ratios), 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "released", "pixels", "loss"])
    parser.add_argument("--model", default="tiny", help="tiny, both, b32, or the folder of a checkpoint")
    parser.add_argument("--recipe", default="", help="of steps this one alone, of pixels FTStandard or MMCoA")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--data", default="", help="of pixels, in place of images that are made for it")
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with exact():
        {"steps": steps, "released": released, "pixels": pixels, "loss": loss}[options.what](options)


if __name__ == "__main__":
    main()
