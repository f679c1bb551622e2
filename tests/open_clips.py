"""The real package open_clip beside a torch without a torchvision of its own kind.

torchvision has no build for the CPU build of torch, and the one for GPUs cannot be imported beside it: the operators
that it describes to torch are missing. None of them is used here, so they are declared. transformers would take such a
torchvision for a whole one, so `make` puts both into a folder of their own (`.venv/open_clip`), which is looked into
after transformers has looked for torchvision and found none. Where open_clip itself can be imported, that is used.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch

BESIDE = Path(sys.prefix) / "open_clip"


class _Beside:
    """Finds packages in that folder after all others. It is not on `sys.path`, since processes that a test starts are
    given that, and would take the torchvision there for a whole one."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(BESIDE)], target) if path is None else None


_declared: list[torch.library.Library] = []  # what is declared ends with its library


def package() -> Any:
    """open_clip; skips whoever asks where it is not there."""
    if importlib.util.find_spec("open_clip") is None and BESIDE.is_dir():
        from transformers.utils import import_utils

        for name in ("torchvision", "torchvision_v2", "timm"):
            getattr(import_utils, f"is_{name}_available")()  # remembered for good
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        sys.meta_path.append(_Beside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("open_clip")
        except ImportError:  # also where nothing may be missing: an index may have no torchvision to put beside it
            pytest.skip("the package open_clip_torch is not installed", allow_module_level=True)
