"""What docs/own_words.md shows is run as it stands there."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crossguard import Scenes, cli, own, signatures
from crossguard.datasets.keeping import rounded

PAGE = (Path(__file__).parents[1] / "docs" / "own_words.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]
MINE = "\n\n".join(PYTHON[:4])


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "grid.toml").write_text(next(text for kind, text in BLOCKS if kind == "toml"))
    scenes = Scenes("shape", count=6)
    (tmp_path / "shots").mkdir()
    for index in range(6):
        name = scenes.names[int(scenes.labels()[index])]
        rounded(scenes.image(index) / 255).save(tmp_path / "shots" / f"{name}.{index:04}.png")
    own.forget()
    yield tmp_path
    own.forget()
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_page_runs(command: str, mine: Path):
    program, *arguments = shlex.split(command)
    done = CliRunner().invoke(cli.app, arguments, prog_name=program)
    assert done.exit_code == 0, done.output
    if arguments[0] == "words" and len(arguments) == 3:
        assert all(f"  {name} " in done.output for name in ("RandomSigns", "Blurred", "Flat", "Halves"))
    elif arguments[0] != "train":
        assert any(name in done.output for name in ("RandomSigns", "Blurred"))


def test_the_python_of_the_page_runs(mine: Path, capsys: pytest.CaptureFixture[str]):
    (mine / "script.py").write_text(PYTHON[4])
    runpy.run_path("script.py")
    said = capsys.readouterr().out
    assert "RandomSigns" in said and "label" in said


def test_the_words_of_the_page_are_read_from_their_source(mine: Path):
    file = own.add("mine.py")
    for name, kind in (("RandomSigns", "attack"), ("Blurred", "model"), ("Flat", "dataset"), ("Halves", "recipe")):
        found = signatures.find(name)
        assert found.kind == kind and found.summary
    assert file.module is None, "listing them runs nothing"
    assert not os.environ.get(own.VARIABLE)
