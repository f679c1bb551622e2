"""What all tests share: with CROSSGUARD_STRICT=1 (as in CI) a package that is missing fails its tests, which otherwise
skip."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def needed(name: str, *_: object, **__: object) -> ModuleType:
    """`pytest.importorskip` where nothing may be missing."""
    return importlib.import_module(name)


if os.environ.get("CROSSGUARD_STRICT", "0") not in ("", "0"):
    pytest.importorskip = needed  # pyright: ignore[reportAttributeAccessIssue]
