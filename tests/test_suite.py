"""The test suite itself: shapes are checked wherever a test calls the package, and nothing vanishes unseen."""

from __future__ import annotations

import pytest
import torch

import conftest
from crossguard.budgets import Linf


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


def test_a_missing_package_fails_where_nothing_may_be_missing() -> None:
    assert conftest.needed("torch") is torch
    with pytest.raises(ImportError):
        conftest.needed("no_such_package", reason="whatever")
