"""Bad input on the command line, with the real parts behind it: one sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from crossguard import cli
from fixtures import save_clip, save_tokenizer, small

TASK = "ZeroShot(Scenes('object'))"
TRAIN = "Scenes('object', 'train', count=16)"


def said(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), prog_name="crossguard")
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("crossguard: error: ") and "Traceback" not in result.stderr
    return result.stderr


def asked(**changes: str) -> str:
    options = {"task": TASK, "model": "Tiny()", "limit": "4"} | changes
    return said("eval", *(part for name, value in options.items() for part in (f"--{name}", value)))


def trained(out: Path, recipe: str = "FTStandard(steps=1, batch=8)", model: str = "Tiny()", data: str = TRAIN) -> str:
    return said("train", "--recipe", recipe, "--model", model, "--data", data, "--out", str(out))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frob",), "No such command 'frob'"),
        (("eval", "--limit", "x"), "Invalid value for '--limit'"),
        (("eval",), "Missing option '--model'"),
        (("eval", "--modle", "x"), "No such option"),
    ],
)
def test_usage(arguments: tuple[str, ...], words: str) -> None:
    assert words in said(*arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "Fresh(patch=64)"}, "need at least 256 pixels"),
        ({"model": "Tiny(3)"}, "was given 1 value without a name"),
        ({"limit": str(2**70)}, "and at most"),
        ({"task": "ZeroShot(Concat((Scenes(),), size=1000000))"}, "an image size of 1000000 pixels is not possible"),
        ({"task": "ZeroShot(Scenes('relation'))"}, "the class list is empty"),
        ({"attack": "PGD(steps=1)", "budget": "Words(1)"}, "PGD(steps=1) changes pixels, but Words(1) allows no"),
        ({"attack": "Substitute()", "budget": "Characters(2)"}, "Substitute() replaces whole words"),
    ],
)
def test_questions(changes: dict[str, str], words: str) -> None:
    assert words in asked(**changes)


def test_checkpoints(tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip")
    weights = clip / "model.safetensors"
    model = f"HuggingFace({str(clip)!r})"
    good = weights.read_bytes()
    tensors = load_file(weights)
    save_file({name: torch.full_like(value, torch.nan) for name, value in tensors.items()}, weights, {"format": "pt"})
    assert "holds NaN or infinite values" in asked(model=model)
    torch.save({"a": torch.zeros(1)}, weights)
    assert "is a pickle file under another name, which is never read" in asked(model=model)
    weights.write_bytes(good)
    save_tokenizer(tmp_path / "words")
    (clip / "tokenizer.json").write_bytes((tmp_path / "words" / "tokenizer.json").read_bytes())
    assert "clip holds no tokenizer that can be read" in asked(model=model)
    (tmp_path / "empty").mkdir()
    assert "holds no tokenizer that can be read" in asked(model=f"Fresh(tokenizer={str(tmp_path / 'empty')!r})")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("FTStandard(steps=1, batch=8, augment=Augment(shift=40))", "is too far for images of (32, 32) pixels"),
        ("FTStandard(augment=Augment(shift=-1))", "give 0 or more pixels"),
        ("FTStandard(optimizer=Adam(betas=(2.0, 3.0)))", "give two from 0 to below 1"),
        ("FTStandard(warmup=-1)", "give 0 or more steps"),
        ("FTStandard(clip=0.0)", "give a positive norm"),
        ("PGD()", "PGD() is not a recipe"),
        ("MMCoA(steps=0)", "trains nothing"),
    ],
)
def test_recipes(tmp_path: Path, recipe: str, words: str) -> None:
    assert words in trained(tmp_path / "out", recipe)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_training_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written to" in trained(tmp_path / "file" / "out")
    assert "BitDepth(Tiny()) has no network of its own" in trained(tmp_path / "a", model="BitDepth(Tiny())")
    assert "has captions and no classes" in trained(tmp_path / "b", data="Scenes('relation', 'train', count=16)")


def test_a_model_is_not_trained_among_the_answers_of_an_experiment(tmp_path: Path) -> None:
    (tmp_path / "experiment.json").write_text("{}")
    assert "holds the answers of an experiment; train into another folder" in trained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors")) and not (tmp_path / "crossguard.json").exists()


def test_the_half_files_of_a_training(tmp_path: Path) -> None:
    (tmp_path / "training.safetensors").write_bytes(b"\x10\x00\x00")
    assert "delete it to start the training again" in trained(tmp_path)
    for content in ("{", "[]", ""):
        (tmp_path / "crossguard.json").write_text(content)
        assert "delete the folder to train again" in trained(tmp_path)


def test_saving_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tmp_path / "words")
    network = small(tmp_path / "words").load()
    capfd.readouterr()
    bars = transformers.logging.is_progress_bar_enabled()
    network.save(tmp_path / "out")
    assert capfd.readouterr() == ("", "") and transformers.logging.is_progress_bar_enabled() == bars
    assert json.loads((tmp_path / "out/config.json").read_text())
