"""Crossguard attacks, defends and measures CLIP-like vision-language models.

Every public name is here, and every frozen dataclass of numbers, strings, tuples and words among them is a
word: of scripts, of the command line, of experiment files and of reports. To add one is to export it: a line in
`__init__.pyi`, beside this file. Names load when first used, so that importing the package loads neither torch nor
transformers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import lazy_loader

__version__ = "0.1.0"

# The stub also guards `evaluate` and `diagnose`, functions that importing the modules of these names would hide.
_exported, _, _names = lazy_loader.attach_stub(__name__, __file__)

VOCABULARY = tuple(sorted(_names))

__all__ = ["VOCABULARY", "__version__", *_names]  # pyright: ignore[reportUnsupportedDunderAll]


@cache
def plugins() -> dict[str, Any]:
    """The entry points of the group `crossguard` of installed packages: word -> entry point, unloaded. Looked up once a
    process: that reads the metadata of all packages, some 10 ms."""
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group="crossguard")}


def __getattr__(name: str) -> Any:
    if name in VOCABULARY:
        return _exported(name)
    if name.startswith("_") or name not in (found := plugins()):
        raise AttributeError(f"module 'crossguard' has no attribute {name!r}")
    globals()[name] = found[name].load()
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *VOCABULARY})
