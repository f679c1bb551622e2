"""Where networks live and in which precision they compute: chosen once for the process, and said in every report."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache

import torch

from crossguard.errors import CrossguardError

VARIABLE = "CROSSGUARD_DEVICE"  # the environment variable that names the device where nothing else does
LOOK = 8  # an accelerator is waited for after 1, 2, 4 and 8 steps, and then after every 8th
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Choice:
    """A device, the precision of the weights on it, and whether float32 may be shortened to TF32."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    tf32: bool = False


_chosen: Choice | None = None


def best() -> torch.device:
    """The device of this process: the one that CROSSGUARD_DEVICE names, else its own GPU under `torchrun`, else the
    first one, or the CPU where there is none.

    Raises:
        CrossguardError: there is no such device here.
    """
    if named := os.environ.get(VARIABLE):
        try:
            return _found(named)
        except CrossguardError as error:
            raise CrossguardError(f"{VARIABLE}: {error}") from error
    return _gpu() if torch.cuda.is_available() else torch.device("cpu")


def chosen() -> Choice:
    """What `choose` was told last; without it, float32 on the best device there is."""
    return _chosen or Choice(best())


def choose(device: str | None = None, dtype: str = "float32", tf32: bool = False) -> Choice:
    """From now on networks are opened on this device and in this precision.

    Args:
        device: such as 'cpu', 'cuda' or 'cuda:1'; if not given, what CROSSGUARD_DEVICE says, or the best there is.
            Under `torchrun` each process has a GPU of its own, and 'cuda' is that one.
        dtype: of the weights and of the work of the towers: 'float32' or 'bfloat16'. Embeddings and logits are float32
            in both. Float16 is not offered, since the gradients of attacks underflow in it.
        tf32: let a GPU shorten the numbers that it multiplies to 10 bits behind the point, which is faster.

    Raises:
        CrossguardError: there is no such device here, or no such precision.
    """
    global _chosen
    if dtype not in DTYPES:
        raise CrossguardError(f"networks cannot compute in {dtype!r}; give one of {', '.join(DTYPES)}")
    _chosen = Choice(best() if device is None else _found(device), DTYPES[dtype], tf32)
    if _chosen.device.type == "cuda":
        torch.cuda.set_device(_chosen.device)  # what names no device of its own is made there too
    return _chosen


@contextmanager
def choosing(device: str | None = None, dtype: str = "float32", tf32: bool = False) -> Iterator[Choice]:
    """Inside, networks are opened as with `choose`; afterwards as before."""
    global _chosen
    before = _chosen
    try:
        yield choose(device, dtype, tf32)
    finally:
        _chosen = before


def shared() -> bool:
    """Whether several processes that `torchrun` started on this machine have one GPU between them."""
    return torch.cuda.is_available() and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()


def precision() -> str:
    """How the numbers depart from plain float32, which changes answers a little and so is part of a question; an empty
    text where they do not."""
    choice = chosen()
    if choice.dtype != torch.float32:
        return str(choice.dtype).removeprefix("torch.")
    return "float32 with TF32" if choice.tf32 and choice.device.type == "cuda" else ""


def describe() -> str:
    """The device and the precision in words, for a report."""
    choice = chosen()
    name = choice.device.type
    if choice.device.type == "cuda":
        name = f"cuda: {torch.cuda.get_device_name(choice.device)}, {'with' if choice.tf32 else 'without'} TF32"
    return name if choice.dtype == torch.float32 else f"{name}, {precision()}"


@contextmanager
def exact() -> Iterator[None]:
    """Inside, products and convolutions of float32 are computed in float32, unless TF32 was chosen.

    By default torch lets cuDNN shorten the numbers of a convolution to TF32, so that patch embeddings and convolutional
    towers would know 10 bits of each pixel, in the attack and in the judge.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if chosen().tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = chosen().tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@cache
def keep_memory() -> bool:
    """Tells the allocator of glibc to keep what is freed for the next forward; says whether it could be told.

    By default it hands every large activation back to the system, which then clears the pages of the next one: at 224
    pixels that is a third of the time of a small tower on a CPU. The memory that a process has at its peak it keeps.
    Elsewhere than with glibc, where the environment sets MALLOC_ variables of its own, and with
    CROSSGUARD_KEEP_MEMORY=0, nothing is changed.
    """
    if os.environ.get("CROSSGUARD_KEEP_MEMORY") == "0" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # others have a mallopt that means something else  # noqa: B018
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    never, no_limit, trim_threshold, mmap_max = 0, -1, -1, -4  # numbers of <malloc.h>
    return bool(mallopt(mmap_max, never)) and bool(mallopt(trim_threshold, no_limit))


def hand_back_memory() -> None:
    """Gives what is free to the system, where `keep_memory` keeps it: each thread keeps its own, and what a large image
    took while it was decoded none of them needs again."""
    with suppress(OSError, AttributeError, TypeError):  # the last on Windows, the others without glibc
        ctypes.CDLL(None).malloc_trim(0)


def memory(device: torch.device) -> int:
    """The bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _found(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CrossguardError(f"there is no device {name!r}; give 'cpu', 'cuda' or 'cuda:1'") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise CrossguardError(f"the device {name!r} cannot be used here; give 'cpu'{_gpus()}")
    if device.index is None:
        return _gpu()
    if device.index >= torch.cuda.device_count():
        raise CrossguardError(f"there is no device {name!r}; give 'cpu'{_gpus()}")
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise CrossguardError(f"{name!r} would put all processes on one GPU; give 'cuda', so that each has its own")
    return device


def _gpu() -> torch.device:
    """The GPU of this process. Where there are more processes than GPUs, several have the same one."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _gpus() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return "".join(f", 'cuda:{number}'" for number in range(count))


def waits(device: torch.device) -> bool:
    """Whether the program has to wait for this device where it reads a number that is computed there. It runs ahead of
    an accelerator otherwise; on a CPU every number is there at once."""
    return device.type != "cpu"


def looks(step: int, device: torch.device) -> bool:
    """Whether a search looks, after this step, at who has won and whether all numbers are finite.

    To look, the program has to wait for an accelerator, and in between it does not. On a CPU nobody waits, so there it
    looks after each step, which saves the most. When it looks changes no image: who has won keeps what it has.
    """
    done = step + 1
    return not waits(device) or done % LOOK == 0 or (done < LOOK and done & (done - 1) == 0)


def check_gradients() -> None:
    """Refuses to go on under `torch.inference_mode()`, where no gradient can be taken, and where a network that is
    loaded could never be attacked later on."""
    if torch.is_inference_mode_enabled():
        raise CrossguardError(
            "attacks and training take gradients, which torch.inference_mode() forbids; leave it out, or use "
            "torch.no_grad()"
        )
