"""Where networks live and in which precision they compute."""

from __future__ import annotations

import os

import torch


def best() -> torch.device:
    """The device of this process: its own GPU under `torchrun`, else the first one, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
