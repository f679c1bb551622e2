"""How strong our attacks are beside AutoAttack's own code: each of the four of the standard ensemble alone, and the
worst case of all, on the same victims, images and budgets, over several seeds.

    python benchmarks/strength.py run --victim resnet20 --images 100 --eps 2 4 8 --seeds 3
    python benchmarks/strength.py table

`run` appends one line for each victim, radius, seed and attack to runs/benchmarks/strength.jsonl and skips what is
there; `table` prints it. Victims: see victims.py. Seeds differ between the sides: it is robust counts that are
compared, and each attack draws its own noise.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import victims
from torch import Tensor, nn

from crossguard import AutoAttack, Linf, Untargeted
from crossguard.attacks.base import ImageAttack

FILE = victims.KEPT / "strength.jsonl"
NAMES = ("apgd-ce", "apgd-t", "fab-t", "square")
SIDES = ("ours", "theirs")


def main() -> None:
    parser = argparse.ArgumentParser(description="our attacks and AutoAttack's own, robust counts side by side")
    parser.add_argument("part", choices=("run", "table"))
    parser.add_argument("--victim", choices=victims.VICTIMS, default="resnet20")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--eps", type=float, nargs="+", default=[0.5, 1, 2, 4, 8], help="in units of 1/255")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--attacks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.part == "run":
        measure(options)
    print(table(lines()))


@dataclass(frozen=True)
class Scene:
    """A victim and the images that it answers rightly."""

    victim: nn.Module
    images: Tensor
    labels: Tensor

    def left(self, side: str, name: str, eps: float, seed: int) -> list[bool]:
        """Which images one attack leaves standing."""
        made = (self.ours if side == "ours" else self.theirs)(name, eps, seed)
        Linf(eps).check(made.detach(), self.images)
        with torch.no_grad():
            return (self.victim(made).argmax(1) == self.labels).tolist()

    def ours(self, name: str, eps: float, seed: int) -> Tensor:
        attack: ImageAttack = dict(zip(NAMES, AutoAttack().parts(Linf(eps)), strict=True))[name]
        seeds = torch.arange(len(self.images)) + 100_000 * (seed + 1)
        return attack(self.victim, self.images, Untargeted(self.labels), Linf(eps), seeds)

    def theirs(self, name: str, eps: float, seed: int) -> Tensor:
        from pyautoattack import AutoAttack as Reference

        reference = Reference(self.victim, norm="Linf", eps=eps, seed=seed, version="standard", device="cpu")
        reference.attacks_to_run = [name]  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        reference.verbose = False
        return reference.run_standard_evaluation(self.images, self.labels, batch_size=250)[0]


def measure(options: argparse.Namespace) -> None:
    scene = Scene(*victims.answered(options.victim, options.images))
    known = {key(line) for line in lines()}
    FILE.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for eps in options.eps:
            for name in options.attacks:
                line: dict[str, Any] = {
                    "victim": options.victim, "images": options.images, "eps": eps, "seed": seed, "attack": name,
                }  # fmt: skip
                if key(line) in known:
                    continue
                for side in SIDES:
                    began = time.process_time()
                    line[side] = scene.left(side, name, eps / 255, seed)
                    line[f"{side} seconds"] = round(time.process_time() - began, 2)
                with FILE.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(
                    f"{options.victim} {eps:g}/255 seed {seed} {name}: {sum(line['ours'])} / {sum(line['theirs'])} of "
                    f"{options.images}, {line['ours seconds']} / {line['theirs seconds']} s",
                    flush=True,
                )


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[part] for part in ("victim", "images", "eps", "seed", "attack"))


def table(found: list[dict[str, Any]]) -> str:
    """Robust counts, ours / theirs, summed over the seeds that both have; and the seconds of the cores."""
    cells: dict[tuple[Any, ...], dict[tuple[int, str], dict[str, Any]]] = defaultdict(dict)
    for line in found:
        cells[line["victim"], line["images"], line["eps"]][line["seed"], line["attack"]] = line
    rows = [
        "| victim | eps | images x seeds | " + " | ".join(NAMES) + " | all | theirs over ours, seconds |",
        "|---|---:|---:|" + "---:|" * (len(NAMES) + 2),
    ]
    for (victim, images, eps), held in cells.items():
        names = [name for name in NAMES if any(name == attack for _, attack in held)]
        seeds = sorted({seed for seed, _ in held if all((seed, name) in held for name in names)})
        if not seeds:
            continue
        counts = []
        for name in NAMES:
            parts = [held[seed, name] for seed in seeds if name in names]
            counts.append(" / ".join(str(sum(sum(part[side]) for part in parts)) for side in SIDES) if parts else "-")
        left = {
            side: sum(sum(map(all, zip(*(held[seed, name][side] for name in names), strict=True))) for seed in seeds)
            for side in SIDES
        }
        spent = {side: sum(held[seed, name][f"{side} seconds"] for seed in seeds for name in names) for side in SIDES}
        rows.append(
            f"| {victim} | {eps:g}/255 | {images} x {len(seeds)} | {' | '.join(counts)} | {left['ours']} / "
            f"{left['theirs']} | {spent['theirs'] / max(spent['ours'], 0.01):.1f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
