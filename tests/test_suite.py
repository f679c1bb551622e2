"""The test suite itself: shapes are checked wherever a test calls the package, and nothing vanishes unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

import conftest
from crossguard.budgets import Linf

Rows = Float[Tensor, "n 3"]


def test_shapes_are_checked_in_the_first_calls_and_then_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, budget = torch.zeros(2, 3), Linf(0.5)
    for _ in range(2):
        refused = []
        for _ in range(conftest.FIRST + 2 * conftest.EVERY):
            try:
                budget.size(wrong)
            except Exception as error:
                refused.append(type(error).__name__)
        assert set(refused) == {"TypeCheckError"} and len(refused) == conftest.FIRST + 2
        monkeypatch.setattr(conftest, "_tests", conftest._tests + 1)  # the next test begins anew


def test_functions_of_one_definition_share_their_checks_and_nothing_else() -> None:
    def turned(turn: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        @conftest.sampled(typechecker=beartype)
        def function(rows: Rows) -> Rows:
            return turn(rows)

        return function

    rows, known = torch.zeros(2, 3), len(conftest._checks)
    for added in range(3):
        again = turned(lambda inner: inner + 1)
        outer = turned(lambda inner, added=added, again=again: again(inner) + added)
        assert torch.equal(outer(rows), rows + 1 + added)
    assert len(conftest._checks) == known + 1
    for wrong in (
        lambda: turned(lambda rows: rows)(torch.zeros(3, 2)),
        lambda: turned(lambda rows: rows.T)(rows),
        lambda: turned(lambda rows: None)(rows),
    ):
        with pytest.raises(jaxtyping.TypeCheckError):
            wrong()
    assert torch.equal(turned(lambda rows: rows)(rows), rows)


def test_a_missing_package_fails_where_nothing_may_be_missing() -> None:
    assert conftest.needed("torch") is torch
    with pytest.raises(ImportError):
        conftest.needed("no_such_package", reason="whatever")
