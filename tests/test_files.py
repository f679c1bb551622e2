"""Files are written as a whole or not at all, with the permissions that any new file has."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crossguard import HuggingFace, checkpoints, files, turns
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


def test_a_checkpoint_is_the_same_however_it_was_used(tmp_path: Path) -> None:
    network, one, two = HuggingFace(str(save_clip(tmp_path / "clip"))).load(), tmp_path / "one", tmp_path / "two"
    network.save(one)
    network.cut(["two words"])
    two.mkdir()
    for name in ("model-00001-of-00002.safetensors", "training.safetensors", "old.safetensors"):
        (two / name).write_bytes(b"of an earlier one")
    weights = {"a": "old.safetensors", "b": "model-00001-of-00002.safetensors"}
    (two / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert {file.name for file in checkpoints.weights(two)} == {"old.safetensors", "model-00001-of-00002.safetensors"}
    network.save(two)
    assert HuggingFace(str(one)).fingerprint == HuggingFace(str(two)).fingerprint
    left = {path.name: path.read_bytes() for path in two.iterdir()}
    assert left.pop("training.safetensors") == b"of an earlier one", "it is not the model's"
    assert left == {path.name: path.read_bytes() for path in one.iterdir()}


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


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    mine, here = os.getpid(), files.here()
    gone = [f".{name}{here}-{number}.0123abcd.tmp" for name in ("", "x.", "a b.") for number in (process.pid, mine)]
    gone.append(".old.00000000-1.0123abcd.tmp")
    stay = [
        f".x.{here}-{os.getppid()}.0123abcd.tmp",
        ".new.00000000-1.0123abcd.tmp",
        ".notes.tmp",
        "x.tmp",
        ".x.12.tmp",
    ]
    folder = gone.pop(0)

    def litter() -> None:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / ".tmpAbC").write_text("of a library")
        for name in (*gone, *stay):
            (tmp_path / name).write_text("half")
        os.utime(tmp_path / gone[-1], (0, 0))

    litter()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis").write_text("mine")
    (tmp_path / f".x.{here}-{process.pid}.11111111.tmp").symlink_to(tmp_path / "elsewhere")
    with files.writing(tmp_path / "x") as temporary:  # what is written at the moment is no leftover
        files.check_writable(tmp_path)
        temporary.write_text("whole")
    assert {path.name for path in tmp_path.iterdir()} == {*stay, "x", "elsewhere"}
    assert (tmp_path / "x").read_text() == "whole" and (tmp_path / "elsewhere" / "thesis").exists()
    deep = tmp_path / "deep"
    deep.mkdir()
    (deep / gone[0]).write_text("half")
    files.write(deep / "y", "")
    assert [path.name for path in deep.iterdir()] == ["y"], "who writes first tidies"


def test_files_of_a_stage_take_their_places(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with files.staging(tmp_path) as stage:
        for name in "ab":
            (stage / name).write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}
    files.write(tmp_path / ("n" * 200), "a long name")


def test_what_is_added_goes_into_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match="link cannot be written"):
        files.append(tmp_path / "link", "yours")
    assert (tmp_path / "elsewhere").read_text() == "mine"
    with pytest.raises(WriteError, match="new cannot be written: no such file"):
        files.append(tmp_path / "new", "a", make=False)
    for text in ("a\n", "é\n"):
        files.append(tmp_path / "new", text)
    assert (tmp_path / "new").read_text() == "a\né\n"


def test_a_folder_is_owned_by_one_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = list[str]()

    def second() -> None:
        with turns.owned(tmp_path, "writes"):
            order.append("second")

    thread = threading.Thread(target=second)
    with turns.owned(tmp_path, "writes") as note:
        note.close()
        turns.Note(note.path.with_suffix(""), "half done")
        thread.start()
        thread.join(0.2)
        (waited,) = (one.doing for name, one in turns.workers(tmp_path, ".lock").items() if name != ".lock")
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"crossguard: waiting for process {os.getpid()} that writes in {tmp_path} since [0-9:]+: half done\n", said
    )
    assert waited == f"waits for process {os.getpid()}"
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "notes go away"
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match=r"\.lock cannot be locked: "), turns.owned(tmp_path, "writes"):
        pass
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_log_that_cannot_be_written_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    log, handler = logging.Logger("full"), files.LogFile(Path("/dev/full"))
    log.addHandler(handler)
    log.warning("a line")
    handler.close()
    assert capsys.readouterr().err == ""


def test_the_errors_of_tokenizers_are_errors_of_writing(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="x cannot be written: No space left"), files.writing(tmp_path / "x"):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(RuntimeError), files.writing(tmp_path / "x"):
        raise RuntimeError("a mistake of our own")
    assert not list(tmp_path.iterdir())


def test_the_errors_of_safetensors_are_errors_of_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(WriteError, match="x cannot be written: I/O error: No space left"):
        files.save_tensors(tmp_path / "x", {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
