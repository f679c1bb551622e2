"""Ask a model a question and get a report: `evaluate(task, model, attack, budget, surrogate)`."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from crossguard.attacks.base import Attack
from crossguard.budgets import Budget
from crossguard.data import spread
from crossguard.errors import CrossguardError
from crossguard.goals import margin
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import Wrapper
from crossguard.report import Outcomes, Report, versions
from crossguard.seeds import keys
from crossguard.tasks.base import Task
from crossguard.words import show


def question(
    task: Task,
    model: VisionLanguageModel,
    attack: Attack | None,
    budget: Budget | None,
    surrogate: VisionLanguageModel | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """The question word for word: what changes the answer, and nothing else. Budgets are cut down to what the attack
    spends."""
    for value, kind, name in ((task, Task, "task"), (model, VisionLanguageModel, "model")):
        if not isinstance(value, kind):
            raise CrossguardError(f"{value!r} is no {name}")
    if attack is not None and not isinstance(attack, Attack):
        raise CrossguardError(f"{attack!r} is no attack")
    if surrogate is not None and not isinstance(surrogate, VisionLanguageModel):
        raise CrossguardError(f"{surrogate!r} is no model to craft on")
    if limit is not None and limit < 1:
        raise CrossguardError(f"a limit of {limit} samples is not possible; give 1 or more")
    if attack is None:
        budget, surrogate = None, None
    else:
        if not isinstance(budget, Budget):
            raise CrossguardError(
                f"{show(attack, short=True)} needs a budget, such as 'Linf(8/255)'; {budget!r} is none"
            )
        pixels, words = attack.spends(budget)
        budget = budget if pixels is not None and words is not None else pixels or words
    return {
        "task": show(task),
        "model": show(model),
        "attack": show(attack),
        "budget": show(budget),
        "surrogate": show(surrogate),
        "knowledge": _knowledge(model, attack, surrogate),
        "limit": str(limit),
        "seed": str(seed),
    }


def evaluate(
    task: Task,
    model: VisionLanguageModel,
    attack: Attack | None = None,
    budget: Budget | None = None,
    surrogate: VisionLanguageModel | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """The report of one model on one task under one attack.

    Args:
        attack: None asks the clean question alone.
        surrogate: craft on this model instead, which alone says what the adversary knows: nothing given is a white
            box, the
            undefended base of a wrapper a gray box, any other model a transfer attack.
        limit: that many samples, spread evenly over the task.
        seed: of all noise; each sample draws its own, so `batch` changes nothing but speed and memory.
        progress: is told (samples done, samples in all) after each batch.
    """
    asked = question(task, model, attack, budget, surrogate, limit, seed)
    if len(task) == 0:
        raise CrossguardError(f"{show(task, short=True)} has no samples")
    indices = spread(len(task), limit)
    began = time.monotonic()
    trial = task.prepare(model, attack, budget, None if attack is None else surrogate)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    ids: list[str] = []
    for samples in task.batches(batch, indices):
        answers = trial.answer(samples, keys(samples.ids, seed))
        labels = samples.labels
        ids += samples.ids
        values = (
            labels,
            answers.clean.argmax(1),
            answers.adversarial.argmax(1),
            margin(answers.clean, labels),
            margin(answers.adversarial, labels),
            answers.size,
            answers.queries.gradients,
            answers.queries.forwards,
        )
        for name, value in zip(_COLUMNS, values, strict=True):
            columns[name].append(value.detach().cpu().numpy())
        if progress is not None:
            progress(len(ids), len(indices))
    notes = list(trial.notes) + _skipped(task)
    device = "cuda: " + torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    outcomes = Outcomes(ids, *(np.concatenate(columns[name]) for name in _COLUMNS))
    return Report(asked, outcomes, tuple(notes), versions(device), time.monotonic() - began)


_COLUMNS = (
    "label",
    "clean",
    "adversarial",
    "clean_margin",
    "adversarial_margin",
    "size",
    "gradients",
    "forwards",
)


def _knowledge(model: VisionLanguageModel, attack: Attack | None, surrogate: VisionLanguageModel | None) -> str:
    if attack is None:
        return "no attack"
    if surrogate is None or surrogate == model:
        return "white box"
    base = model
    while isinstance(base, Wrapper):
        base = base.base
        if surrogate == base:
            return "gray box"
    return "transfer"


def _skipped(task: Task) -> list[str]:
    skipped = getattr(getattr(task, "data", None), "skipped", 0)
    return [f"{skipped} broken file(s) were left out of the data"] if skipped else []
