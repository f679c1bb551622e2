"""Which device and which precision: chosen in words, refused in one sentence, float32 kept as it is."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from crossguard import device
from crossguard.errors import CrossguardError


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with device.choosing():
        yield


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A machine with four GPUs, and which of them were made the current one."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", device.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return current


def test_each_process_of_a_machine_has_a_gpu_of_its_own(
    four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.best() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert device.choose().device == device.choose("cuda").device == torch.device("cuda", rank)
        assert four_gpus[-1] == torch.device("cuda", rank)
    with pytest.raises(CrossguardError, match="all processes on one GPU"):
        device.choose("cuda:1")
    assert device.choose("cpu").device == torch.device("cpu")


def test_the_environment_names_the_device_where_nothing_else_does(
    four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSGUARD_DEVICE", "cpu")
    assert device.best() == device.chosen().device == device.choose().device == torch.device("cpu")
    assert device.choose("cuda").device == torch.device("cuda", 0) and device.choose("cuda:3").device.index == 3
    monkeypatch.setenv("CROSSGUARD_DEVICE", "cuda:2")
    assert device.choose().device == torch.device("cuda", 2)
    monkeypatch.setenv("CROSSGUARD_DEVICE", "gpu")
    with pytest.raises(CrossguardError, match=r"^CROSSGUARD_DEVICE: there is no device 'gpu'"):
        device.choose()
    monkeypatch.setenv("CROSSGUARD_DEVICE", "")
    assert device.best() == torch.device("cuda", 0)


def test_more_processes_than_gpus_share_them(four_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device.shared()
    for world, shared in ((4, False), (6, True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
        assert device.shared() is shared
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert device.best() == torch.device("cuda", 1)


def test_what_is_chosen_is_said(four_gpus: list[torch.device]) -> None:
    device.choose("cuda:2")
    assert device.chosen().device == torch.device("cuda", 2) == four_gpus[-1]
    assert device.describe() == "cuda: GPU cuda:2, without TF32" and device.precision() == ""
    device.choose("cuda", "bfloat16")
    assert device.describe() == "cuda: GPU cuda:0, without TF32, bfloat16" and device.precision() == "bfloat16"
    device.choose(tf32=True)
    assert device.describe() == "cuda: GPU cuda:0, with TF32" and device.precision() == "float32 with TF32"
    device.choose("cpu", tf32=True)
    assert device.describe() == "cpu" and device.precision() == ""


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"device": "cuda:7"}, "there is no device 'cuda:7'; give 'cpu', 'cuda:0', 'cuda:1', 'cuda:2', 'cuda:3'"),
        ({"device": "gpu"}, "there is no device 'gpu'"),
        ({"device": "mps"}, "'mps' cannot be used here"),
        ({"dtype": "float16"}, "'float16'; give one of float32, bfloat16"),
    ],
)
def test_what_is_not_there_is_one_sentence(four_gpus: list[torch.device], given: dict[str, str], sentence: str) -> None:
    before = device.chosen()
    with pytest.raises(CrossguardError, match=sentence):
        device.choose(**given)
    assert device.chosen() == before


def test_a_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CrossguardError, match=r"'cuda' cannot be used here; give 'cpu'$"):
        device.choose("cuda")


def test_a_choice_ends_with_its_block() -> None:
    before = device.chosen()
    with pytest.raises(KeyError), device.choosing("cpu", "bfloat16"):  # noqa: PT012
        assert device.chosen().dtype == torch.bfloat16
        raise KeyError
    assert device.chosen() == before


@pytest.mark.parametrize("allowed", [False, True])
def test_float32_stays_float32_unless_tf32_is_chosen(allowed: bool) -> None:
    def settings() -> tuple[str, bool, bool]:
        cuda = torch.backends.cuda.matmul
        return torch.get_float32_matmul_precision(), cuda.allow_tf32, torch.backends.cudnn.allow_tf32

    before = settings()
    torch.backends.cudnn.allow_tf32 = True  # torch's own default
    try:
        device.choose(tf32=allowed)
        with device.exact():
            assert settings() == (("high", True, True) if allowed else ("highest", False, False))
        assert settings() == (*before[:2], True)
    finally:
        torch.backends.cudnn.allow_tf32 = before[2]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the allocator of glibc")
def test_freed_memory_is_kept_unless_somebody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that is repeated then gets no new pages from the system."""
    for name in ("MALLOC_ARENA_MAX", "CROSSGUARD_KEEP_MEMORY"):
        monkeypatch.setenv(name, "0")
        assert not device.keep_memory.__wrapped__()
        monkeypatch.delenv(name)
    assert device.keep_memory.__wrapped__()
    code = (
        "import resource, torch; from crossguard import device; torch.set_num_threads(1)\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): torch.ones(64_000_000 // 4)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "leave = faults(); assert device.keep_memory(); faults(); print(leave, faults())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    leave, keep = done.stdout.split()
    assert int(keep) < 100 and int(keep) < int(leave) / 2
