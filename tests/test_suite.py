"""The test suite itself: shapes are checked wherever a test calls the package, and nothing vanishes unseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float
from torch import Tensor

import conftest
from crossguard.answer import Said
from crossguard.budgets import Linf
from crossguard.models.base import Preprocess

Rows = Float[Tensor, "n 3"]


def test_shapes_are_checked_in_the_first_calls_and_then_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, right, budget = torch.zeros(2, 3), torch.zeros(2, 3, 1, 1), Linf(0.5)
    for _ in range(2):
        refused = []
        for _ in range(conftest.FIRST // 2 + conftest.EVERY):
            budget.size(right)
            try:
                budget.size(wrong)
            except Exception as error:
                refused.append(type(error).__name__)
        assert set(refused) == {"TypeCheckError"} and len(refused) == conftest.FIRST // 2 + 2
        monkeypatch.setattr(conftest, "_tests", conftest._tests + 1)  # the next test begins anew


def test_dataclasses_are_checked_when_they_are_made() -> None:
    for _ in range(conftest.FIRST + 2):
        Said(torch.zeros(2, 3), lambda embeddings: embeddings)
        with pytest.raises(jaxtyping.TypeCheckError):
            Said(torch.zeros(2), lambda embeddings: embeddings)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The functions that were checked, each time that they were."""
    made = list[Any]()
    original = conftest.Calls.check

    def check(known: conftest.Calls, function: Any, *given: Any) -> Any:
        made.append(function)
        return original(known, function, *given)

    monkeypatch.setattr(conftest.Calls, "check", check)
    yield made
    made.clear()


def test_what_was_in_order_is_not_checked_again_and_whatever_looks_otherwise_is(
    checks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "FIRST", 1000)

    def turned(turn: Callable[[Tensor], Any]) -> Callable[..., Any]:
        @conftest.sampled(typechecker=beartype)
        def function(rows: Rows, names: list[str], like: Rows | None = None) -> Rows:
            return turn(rows)

        return function

    rows = torch.zeros(2, 3)
    for _ in range(2):  # the second is of the same definition
        function = turned(lambda rows: rows + 1)
        for _ in range(3):
            assert torch.equal(function(rows + 1, ["a", "b"]), rows + 2)
    assert len(checks) == 1
    function(torch.zeros(4, 3), ["a", "b"])
    function(rows, ["a", "b"], like=rows)
    assert len(checks) == 3
    for wrong in (
        lambda: function(torch.zeros(3, 2), ["a", "b"]),
        lambda: function(rows.long(), ["a", "b"]),
        lambda: function(rows, ["a", 2]),
        lambda: function(rows, ["a", "b"], like=torch.zeros(1, 3)),
        lambda: turned(lambda rows: rows.T)(rows, ["a", "b"]),
        lambda: turned(lambda rows: rows[1:])(rows, ["a", "b"]),
        lambda: turned(lambda rows: None)(rows, ["a", "b"]),
    ):
        refused = 0
        for _ in range(24):  # not each time: of a list beartype looks at one element
            try:
                wrong()
            except jaxtyping.TypeCheckError:
                refused += 1
        assert refused > 1


def test_where_an_annotation_names_values_every_call_is_checked() -> None:
    mean = (0.5, 0.5, 0.5)
    Preprocess(8, 8, None, mean, mean, fit="cover")
    with pytest.raises(jaxtyping.TypeCheckError):
        Preprocess(8, 8, None, mean, mean, fit="covered")  # type: ignore[arg-type]


def test_a_missing_package_fails_where_nothing_may_be_missing() -> None:
    assert conftest.needed("torch") is torch
    with pytest.raises(ImportError):
        conftest.needed("no_such_package", reason="whatever")
