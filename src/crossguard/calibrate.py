"""Thresholds for the model at hand: those of papers were found on one CLIP, and on another model a gate may never open,
or always."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from crossguard.answer import Answer
from crossguard.data import Dataset
from crossguard.errors import CrossguardError
from crossguard.limits import at_least
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import Wrapper
from crossguard.opening import evaluating
from crossguard.report import Rate
from crossguard.seeds import drawing, fold, keys
from crossguard.tasks.base import CLEAN, Task
from crossguard.words import given, mapped, show


@dataclass(frozen=True)
class Threshold:
    """One threshold that was found.

    Args:
        defense: its name.
        gate: of the defense.
        field: of the defense, which holds the threshold.
        before, after: its values.
        opened_before, opened_after: how many of the clean images the gate opens for.
    """

    defense: str
    gate: str
    field: str
    before: float
    after: float
    opened_before: Rate
    opened_after: Rate

    def __str__(self) -> str:
        return (
            f"{self.defense}({self.field}={self.before:.6g}) opens for {self.opened_before} of clean images, "
            f"{self.field}={self.after:.6g} for {self.opened_after}"
        )


@dataclass(frozen=True)
class Calibrated:
    """A defended model with thresholds of its own."""

    model: VisionLanguageModel
    thresholds: tuple[Threshold, ...]


@evaluating()
def calibrate(
    model: VisionLanguageModel | str | Path,
    task: Task | Dataset | str | Path,
    share: float = 0.05,
    limit: int | None = 200,
    seed: int = 0,
    batch: int = 128,
) -> Calibrated:
    """The model with each threshold moved to where the gate opens for a given share of clean images: a quantile of what
    the gate compares with it. No label takes part, and no attack.

    Of defenses around each other the innermost is calibrated first, and the next around what came of it. Whether
    attacked images then pass the gate is another question, which the notes of a report answer.

    Words may be given as text, as `evaluate` takes them.

    Args:
        task: whose images are asked about, and whose classes, where a defense looks at them.
        share: of the clean images; 0.05 opens for one of twenty.
        limit: that many samples (`Dataset.chosen`).
        seed: of the noise of random defenses, which is that of an evaluation with the same seed.
    """
    if not 0.0 <= share <= 1.0:
        raise CrossguardError(f"a gate cannot open for {share} of the images; give a share from 0 to 1, such as 0.05")
    batch, seed = at_least("batch", batch, 1), at_least("seed", seed, 0)
    model, task = given("model", model), given("task", task)
    assert isinstance(task, Task) and isinstance(model, VisionLanguageModel)
    indices, found = task.chosen(limit), list[Threshold]()
    if not indices:
        raise CrossguardError(f"{show(task, short=True)} has no samples to calibrate on")

    def moved(word: Any) -> Any:
        if not isinstance(word, Wrapper):
            return word
        moved_fields = set[str]()
        for gate, field, slope in word.thresholds:
            if field in moved_fields:
                continue
            values = _values(word, gate, task, indices, seed, batch)
            if values is None:  # with these settings it has no such gate
                continue
            moved_fields.add(field)
            old = float(getattr(word, field))
            new = _threshold(old, slope, values, share)
            try:
                word = replace(cast(Any, word), **{field: new})
            except CrossguardError as error:
                raise CrossguardError(
                    f"{type(word).__name__} would need {field}={new:.6g} to open for {100 * share:.3g} % of the clean "
                    f"images: {error}"
                ) from error
            after = _values(word, gate, task, indices, seed, batch)
            assert after is not None
            rates = (Rate(int((one > 0).sum()), len(one)) for one in (values, after))
            found.append(Threshold(type(word).__name__, gate, field, old, new, *rates))
        return word

    made = mapped(model, moved)
    if not found:
        raise CrossguardError(
            f"{show(model, short=True)} has no gate that could be calibrated; of the defenses here, TTC, SCC, DOC, "
            "CSR, DBD, MAC and Gated have one"
        )
    return Calibrated(made, tuple(found))


def _values(
    model: VisionLanguageModel, gate: str, task: Task, indices: Sequence[int], seed: int, batch: int
) -> Tensor | None:
    """What a gate says to the clean images, in the draw of an evaluation; None where the model has no such gate."""
    trial, found = task.prepare(model, None, None, None, indices, seed), list[Tensor]()
    for samples in task.batches(batch, indices):
        answer, _ = trial.climb(samples)
        if not isinstance(answer, Answer) or gate not in answer.gates:
            return None
        with torch.no_grad(), drawing(fold(keys(samples.ids, seed), CLEAN)):
            found.append(answer.gates[gate](samples.images.to(model.device)).cpu())
    return torch.cat(found)


def _threshold(old: float, slope: float, values: Tensor, share: float) -> float:
    """The shortest number that opens a gate for a share of these images.

    Args:
        slope: how the gate moves with the threshold, 1 or -1.
        values: of the gate, with the old threshold.
    """
    ordered = values.double().sort(descending=True).values.tolist()
    count, edge = round(share * len(ordered)), 1e-4
    high = ordered[count - 1] if count else ordered[0] + 2 * edge
    low = ordered[count] if count < len(ordered) else ordered[-1] - 2 * edge
    ends = sorted(old - slope * value for value in (low, high))
    middle = (ends[0] + ends[1]) / 2
    for digits in range(1, 17):
        near = float(f"{middle:.{digits}g}")
        # Rounding in float32 must not decide: stay off the ends by a part of the gap.
        if abs(near - middle) < 0.25 * (ends[1] - ends[0]) and math.isfinite(near):
            return near
    return middle
