"""Files are written as a whole or not at all, with the permissions that any new file has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossguard import HuggingFace, files
from crossguard.files import WriteError
from fixtures import save_clip, save_tokenizer, small


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_every_writer_honors_the_umask(tmp_path: Path, umask: int) -> None:
    files.write(tmp_path / "text", "a")
    files.save_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
    assert [mode(path) for path in (tmp_path / "text", tmp_path / "tensors")] == [0o666 & ~umask] * 2


def test_a_checkpoint_can_be_read_by_whom_the_umask_allows(tmp_path: Path, umask: int) -> None:
    save_tokenizer(tmp_path / "words")
    small(tmp_path / "words").load().save(tmp_path / "out")
    assert {mode(path) for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def test_a_checkpoint_is_written_by_whoever_saves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = HuggingFace(str(save_clip(tmp_path / "clip"))).load()
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    network.save(tmp_path / "out")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "should_save_on_this_rank" not in vars(network.model)


def test_tensors_come_back_with_what_was_said_of_them(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "deep" / "x.safetensors"
    files.save_tensors(path, {"a": torch.arange(3)}, {"step": "4"})
    files.save_tensors(path, {"a": torch.arange(3), "b": torch.ones(1)}, {"step": "5"})
    assert load_file(path)["a"].tolist() == [0, 1, 2]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"step": "5"}
    assert [one.name for one in path.parent.iterdir()] == ["x.safetensors"]


def test_what_goes_wrong_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write(path, "old")
    with pytest.raises(ZeroDivisionError), files.writing(path) as temporary:
        temporary.write_text(f"half{1 // 0}")
    with pytest.raises(WriteError, match="x cannot be written: no space left on device"), files.writing(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["x"]
    with pytest.raises(WriteError, match="cannot be written: file exists"):
        files.write(path / "below", "new")


def test_the_errors_of_safetensors_are_errors_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(WriteError, match="x cannot be written: I/O error: No space left"):
        files.save_tensors(tmp_path / "x", {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
