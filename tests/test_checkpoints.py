"""What a folder or a file holds, told without loading it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from crossguard.checkpoints import RECORD, kind


def folder(root: Path, **files: object) -> str:
    root.mkdir()
    for name, content in files.items():
        (root / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(root)


def test_folders_are_told_apart_by_their_records(tmp_path: Path) -> None:
    clip, record = {"model_type": "clip"}, RECORD.removesuffix(".json")
    assert kind(folder(tmp_path / "a", config=clip)) == "transformers"
    assert kind(folder(tmp_path / "b", **{record: {}})) == "open_clip"
    assert kind(folder(tmp_path / "c", config=clip, **{record: {}})) == "transformers"
    # timm's own config.json, as in many folders of open_clip on the hub, describes no model of transformers.
    assert kind(folder(tmp_path / "d", config={"architecture": "vit"}, **{record: {}})) == "open_clip"
    assert kind(folder(tmp_path / "e", config="{", **{record: {}})) == "open_clip"
    assert kind(folder(tmp_path / "f", config="{")) == ""
    assert kind(folder(tmp_path / "g", other={})) == ""


@pytest.mark.parametrize(
    ("name", "expected"), [("a.safetensors", "weights"), ("a.pt", "pickle"), ("a.bin", "pickle"), ("a.txt", "")]
)
def test_single_files(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / name).touch()
    assert kind(str(tmp_path / name)) == expected


@pytest.mark.parametrize("path", ["", "not/there", "owner/name", "a\0b", "~nobody/x", "~\0", "x" * 5000, "PGD()"])
def test_what_is_no_path_is_of_no_kind(path: str) -> None:
    assert kind(path) == ""


def test_looking_loads_no_torch() -> None:
    code = "import sys; from crossguard.checkpoints import kind; kind('.'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
