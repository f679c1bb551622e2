"""What our attacks cost: beside a bare loop of gradients, beside AutoAttack, and beside the PGD of other libraries.

    python benchmarks/attacks.py                          # a PGD step beside a bare forward and backward
    python benchmarks/attacks.py step --model "HuggingFace('../shared/models/natural')" --size 224 --batch 8
    python benchmarks/attacks.py autoattack --victim resnet20 --images 32 --runs 1
    python benchmarks/attacks.py pgd --victim hardened --runs 5

Both sides of a comparison attack the same victim on the same images within the same budget, in turn, and their
questions are counted by the same counter in front of the victim. Victims: see victims.py; those on CIFAR-10 need the
files in ../shared/data. The others need `pip install pyautoattack foolbox torchattacks`. Our PGD has its defaults: it
keeps the best point, and images that are beaten or go in circles leave the batch, which they do not in the loops of the
others. Peak memory is that of a process of its own for each side.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from victims import VICTIMS, Counted, answered

from crossguard import PGD, AutoAttack, Linf, Scenes, Untargeted, VisionLanguageModel, ZeroShot, build

SIDES = ("crossguard", "autoattack", "foolbox", "torchattacks")


def main() -> None:
    parser = argparse.ArgumentParser(description="our attacks against a bare loop and against other libraries")
    parser.add_argument("part", nargs="?", choices=("step", "autoattack", "pgd"), default="step")
    parser.add_argument("--victim", choices=VICTIMS, default="resnet20")
    parser.add_argument("--eps", type=float, default=None, help="in units of 1/255; 8, and 4 for the hardened network")
    parser.add_argument("--images", type=int, default=None, help="how many; only those answered correctly are attacked")
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="Tiny()", help="of the part step, in words")
    parser.add_argument("--size", type=int, default=32, help="of its images, in pixels")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, in processes of their own")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if options.part == "step":
        step(options.model, options.size, options.runs or 7, options.steps or 20, options.batch, options.threads)
        return
    scene = Scene.of(options)
    if options.side is not None:
        print(json.dumps(peak(scene, options.side)))
        return
    others = ("autoattack",) if options.part == "autoattack" else ("foolbox", "torchattacks")
    print(f"{options.part} on {len(scene.images)} images, {options.victim}, {scene.budget}, {options.threads} threads")
    for other in others:
        compare(scene, other, options.runs or (1 if options.part == "autoattack" else 5))
    if options.memory:
        for side in ("crossguard", *others):
            command = [sys.executable, *sys.argv, "--side", side]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            before, after = json.loads(answer.splitlines()[-1])
            print(f"{side}: the process grew to {after:.0f} MB, {before:.0f} MB of it before the attack")


def step(model: str, side: int, runs: int, steps: int, count: int, threads: int) -> None:
    """A PGD step beside a bare forward and backward through frozen weights, by the loop alone and with its defaults.

    Without `best` and `stop` both do the same number of gradients on the same images, and the bare loop only lacks
    projection, budget and bookkeeping. With them the best point is kept, at the cost of one more forward, and within a
    budget too small to win nobody leaves. The shipped model is a checkpoint like others too, where it is copied:
    `HuggingFace('COPY')` of src/crossguard/assets/tiny.
    """
    task = ZeroShot(Scenes("object", "test"))
    batch = next(task.batches(count, range(count)))
    images = F.interpolate(batch.images, (side, side), mode="nearest")
    answer = cast(VisionLanguageModel, build(model)).classifier(task.data.prompts())
    with torch.no_grad():
        labels = answer(images).argmax(1)

    def bare() -> None:
        for _ in range(steps):
            pixels = images.detach().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(answer(pixels), labels, reduction="sum"), pixels)

    settings = {"loop": (PGD(steps=steps, best=False, stop=False), 8 / 255), "defaults": (PGD(steps=steps), 1e-6)}
    print(f"PGD-{steps} on {count} images of {side} pixels, {model}, {threads} threads, {runs} pairs")
    for name, (attack, eps) in settings.items():
        ratios = paired(partial(attack, answer, images, Untargeted(labels), Linf(eps)), bare, runs)
        print(f"{name}, ratio per pair: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
        print(json.dumps({f"pgd_{name}_over_bare_loop": round(statistics.median(ratios), 3)}), flush=True)


@dataclass(frozen=True)
class Scene:
    """A victim, the images that it answers correctly, and a budget."""

    part: str
    victim: Counted
    images: Tensor
    labels: Tensor
    budget: Linf
    steps: int

    @staticmethod
    def of(options: argparse.Namespace) -> Scene:
        count = options.images or (32 if options.part == "autoattack" else 64)
        eps = options.eps if options.eps is not None else 4.0 if options.victim == "hardened" else 8.0
        victim, images, labels = answered(options.victim, count)
        return Scene(options.part, victim, images, labels, Linf(eps / 255), options.steps or 100)

    def attack(self, side: str, seed: int) -> Callable[[], Tensor]:
        """The attack of that side, to be run."""
        eps = self.budget.eps
        if side == "crossguard":
            attack = AutoAttack() if self.part == "autoattack" else PGD(self.steps)
            goal, seeds = Untargeted(self.labels), torch.arange(len(self.images)) + 1000 * seed
            return lambda: attack(self.victim, self.images, goal, self.budget, seeds)
        if side == "autoattack":
            from pyautoattack import AutoAttack as Reference

            reference = Reference(self.victim, norm="Linf", eps=eps, seed=seed, version="standard", device="cpu")
            reference.verbose = False
            return lambda: reference.run_standard_evaluation(self.images, self.labels, batch_size=250)[0]
        torch.manual_seed(seed)
        if side == "foolbox":
            import foolbox

            model = foolbox.PyTorchModel(self.victim, bounds=(0, 1), device="cpu")
            pgd = foolbox.attacks.LinfPGD(steps=self.steps, abs_stepsize=0.25 * eps)
            # its call adds a forward and a clipping to the loop; the loop alone is the fair comparison
            criterion = foolbox.criteria.Misclassification(self.labels)
            return lambda: pgd.run(model, self.images, criterion, epsilon=eps)
        import torchattacks

        other = torchattacks.PGD(self.victim, eps=eps, alpha=0.25 * eps, steps=self.steps)
        return lambda: other(self.images, self.labels)


@dataclass(frozen=True)
class Cost:
    seconds: float
    busy: float  # seconds of all cores together: the fairer number where others use the machine
    gradients: float
    forwards: float
    robust: int


def run(scene: Scene, side: str, seed: int) -> Cost:
    attack, victim, count = scene.attack(side, seed), scene.victim, max(len(scene.images), 1)
    victim.gradients = victim.forwards = 0
    began, used = time.perf_counter(), time.process_time()
    made = attack()
    seconds, busy = time.perf_counter() - began, time.process_time() - used
    gradients, forwards = victim.gradients / count, victim.forwards / count
    scene.budget.check(made.detach(), scene.images)
    with torch.no_grad():
        left = int((victim(made).argmax(1) == scene.labels).sum())
    return Cost(seconds, busy, gradients, forwards, left)


def compare(scene: Scene, other: str, runs: int) -> None:
    """Pairs of runs with the same seed, the first of each pair in turn."""
    pairs = []
    for seed in range(runs):
        sides = ("crossguard", other) if seed % 2 == 0 else (other, "crossguard")
        costs = {side: run(scene, side, seed) for side in sides}
        pairs.append((costs["crossguard"], costs[other]))
        for side in ("crossguard", other):
            cost = costs[side]
            asked = f"per image {cost.gradients:7.1f} gradients {cost.forwards:8.1f} forwards"
            left = f"{cost.robust} of {len(scene.images)} left"
            print(
                f"  {seed} {side:>12}: {cost.seconds:8.2f} s ({cost.busy:.2f} s of cores), {asked}, {left}", flush=True
            )
    wall = statistics.median(theirs.seconds / ours.seconds for ours, theirs in pairs)
    busy = statistics.median(theirs.busy / ours.busy for ours, theirs in pairs)
    print(json.dumps({f"times_faster_than_{other}": round(wall, 2), "by_time_of_cores": round(busy, 2)}), flush=True)


def peak(scene: Scene, side: str) -> tuple[float, float]:
    """The largest size of this process in megabytes, before and after the attack."""

    def largest() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    attack, before = scene.attack(side, 0), largest()
    attack()
    return before, largest()


def paired(first: Callable[[], object], second: Callable[[], object], runs: int) -> list[float]:
    """Seconds of the first over seconds of the second, run in turn, after one warm-up of each."""

    def seconds(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    first(), second()
    ratios = []
    for run in range(runs):
        if run % 2:
            below = seconds(second)
            ratios.append(seconds(first) / below)
        else:
            above = seconds(first)
            ratios.append(above / seconds(second))
    return ratios


if __name__ == "__main__":
    main()
