"""The page of test-time defenses says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from crossguard import Wrapper, words
from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.seeds import by_position, drawing, keys, uniform

PAGE = (Path(__file__).parents[1] / "docs" / "test_time.md").read_text()
ROWS = dict(re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE))


@pytest.mark.parametrize("name", [name for name, cost in ROWS.items() if cost != "needs a file"])
def test_a_defense_costs_what_the_page_says(name: str) -> None:
    model = words.build(f"{name}(Tiny())")
    answer = model.answer(Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",)))
    with counting() as costs, torch.no_grad(), drawing(keys("a")):
        _ = answer.hard(uniform(by_position(1), (3, 32, 32))).logits
    told = re.fullmatch(r"(\d+) F(?: \+ (\d+) B)?", ROWS[name])
    assert told is not None, ROWS[name]
    assert (costs.forwards, costs.backwards) == (int(told[1]), int(told[2] or 0))


def test_the_page_has_all_defenses() -> None:
    kinds = set[str]()
    for name in words.names():
        try:
            kind = words.find(name)
        except CrossguardError:  # a kind of which words are made
            continue
        kinds |= {name} if issubclass(kind, Wrapper) else set()
    assert kinds == set(ROWS)
