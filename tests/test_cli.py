"""The command line and experiments, with an evaluation that answers at once."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import crossguard
from crossguard import bar, cli, experiment, files
from crossguard.bar import Bar
from crossguard.device import Choice, best, chosen, describe
from crossguard.errors import CrossguardError
from crossguard.experiment import Experiment, Watch
from crossguard.processes import Processes
from crossguard.report import Outcomes, Report

evaluation = importlib.import_module("crossguard.evaluate")  # `crossguard.evaluate` is the function

GRID = """
task   = "ZeroShot(Scenes('object'))"
model  = {base = "Tiny()", coarse = "BitDepth(Tiny(), bits=3)"}
attack = ["None", "PGD(steps=100)", "Substitute()"]
budget = ["Both(Linf(8/255), Words(1))"]
seed   = 3
limit  = 10
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every question that reaches the evaluation; each is answered at once, and remembered here."""
    questions: list[dict[str, Any]] = []

    def answer(
        task: Any, model: Any, attack: Any = None, budget: Any = None, surrogate: Any = None,
        limit: int | None = None, seed: int = 0, batch: int = 128,
        progress: Callable[[int, int], None] | None = None, **options: Any,
    ) -> Report:  # fmt: skip
        question = evaluation.question(task, model, attack, budget, surrogate, limit, seed)
        questions.append(question | {"batch": batch, "task object": task} | options)
        if progress is not None:
            progress(2, 2)
        whole = {name: [0, 0] for name in ("label", "clean", "gradients", "forwards")}
        outcomes = Outcomes(
            id=["a", "b"],
            adversarial=[0, 1],
            clean_margin=[1.0, 1.0],
            adversarial_margin=[1.0, -1.0],
            size=[0.0, 0.0],
            **whole,
        )
        report = Report(question, outcomes, ("A doubt; look again [closely].",))
        if (out := options.pop("out", None)) is not None:
            report.save(out, options.pop("overwrite"))
        return report

    monkeypatch.setattr(evaluation, "evaluate", answer)
    return questions


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text(GRID)
    return tmp_path / "grid.toml"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="crossguard")


def error(*arguments: str) -> str:
    """The one sentence of a call that must fail as a user's mistake."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    said = result.stderr.strip()
    assert said.startswith("crossguard: error: ") and "\n" not in said
    return said


EVAL = ("eval", "--task", "ZeroShot(Scenes('object'))", "--model", "Tiny")


# Commands


def test_eval_prints_the_question_and_the_rates(tmp_path: Path, asked: list[dict[str, Any]]):
    out = tmp_path / "deep" / "one.json"
    result = call(*EVAL, "--attack", "PGD(steps=100)", "--budget", "Linf(8/255)", "--limit", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines() if "  " in line)
    said = {name: value.strip() for name, value in lines.items()}
    assert said["attack"] == "PGD(steps=100)" and said["budget"] == "Linf(8/255)" and said["knowledge"] == "white box"
    assert said["robust accuracy"] == "50.0 % [9.5, 90.5]" and said["n"] == "2" and said["seed"] == "0"
    assert "- A doubt; look again [closely]." in result.stdout
    assert Report.load(out).robust.value == 0.5
    assert asked[0]["limit"] == "2" and asked[0]["batch"] == 128


def test_train_prints_the_word_that_reads_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fit(self: Any, model: Any, data: Any, out: Path) -> Any:
        calls.append((self, model, data, out))
        out.mkdir()
        (out / "crossguard.json").write_text('{"steps": 3, "seconds": 61.2, "loss": 1.25}')
        return crossguard.HuggingFace(str(out))

    monkeypatch.setattr(crossguard.Recipe, "fit", fit)
    (tmp_path / "images").mkdir()
    result = call(
        "train", "--recipe", "TeCoA(steps=3)", "--model", "Tiny()", "--data", "Images('images')",
        "--out", str(tmp_path / "out"), "--skip-broken",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert crossguard.build(result.stdout.strip()) == crossguard.HuggingFace(str(tmp_path / "out"))
    assert result.stderr.splitlines() == [
        "crossguard: 3 steps in 61 seconds, loss 1.25",
        f"crossguard: to measure it: crossguard eval --model {tmp_path / 'out'} --data ... --attack APGD --eps 4/255",
    ]
    ((recipe, model, data, _),) = calls
    assert (recipe, model) == (crossguard.TeCoA(steps=3), crossguard.Tiny())
    assert data == crossguard.Images("images", skip_broken=True)


@pytest.mark.parametrize(
    ("step", "said"), [(None, "before a step was saved; the same command starts from the beginning"), (460, "step 460")]
)
def test_a_training_that_is_stopped_says_where_it_goes_on(
    step: int | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fit(self: Any, model: Any, data: Any, out: Path) -> Any:
        if step is not None:
            files.save_tensors(out / "training.safetensors", {"a": torch.zeros(1)}, {"step": str(step)})
        raise KeyboardInterrupt

    monkeypatch.setattr(crossguard.Recipe, "fit", fit)
    words = ("--recipe", "TeCoA()", "--model", "Tiny()", "--data", "Scenes()", "--out", str(tmp_path / "out"))
    result = call("train", *words)
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr.startswith("crossguard: interrupted") and result.stderr.endswith(f"{said}\n")


def test_skip_broken_reaches_the_data_of_a_task(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/cat", "b/dog"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "1.png")
    task = "ZeroShot(Concat((Images('a'), Images('b'))))"
    assert call("eval", "--task", task, "--model", "Tiny", "--skip-broken").exit_code == 0
    assert asked[0]["task object"].data.parts[1].skip_broken
    assert "--skip-broken: nothing in --task" in error(*EVAL, "--skip-broken")


def test_words_lists_the_vocabulary_by_kind():
    result = call("words")
    assert result.exit_code == 0
    assert "cannot be loaded" not in result.stdout
    sections = dict(part.split("\n", 1) for part in result.stdout.split("\n\n") if "\n" in part)
    for kind, name in (
        ("attack", "PGD"),
        ("budget", "Both"),
        ("model", "Tiny"),
        ("recipe", "MMCoA"),
        ("task", "ZeroShot"),
    ):
        assert f"  {name} " in sections[kind]


def test_words_shows_the_fields_of_one():
    result = call("words", "Both")
    assert "Both (budget)" in result.stdout and "  pixels: PixelBudget\n  words: TextBudget\n" in result.stdout
    assert "count: int = 1" in call("words", "Words").stdout
    assert "did you mean 'PGD'?" in error("words", "PGDD")
    listed = call("words", "Recipe").stdout
    assert listed.startswith("recipe\n") and "  FARE" in listed and "  HPTGPD" in listed and "\n  PGD " not in listed
    assert "  MaskedLM" in call("words", "CandidateSource").stdout


def test_version():
    assert call("--version").stdout == f"crossguard {crossguard.__version__}\n"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "crossguard", "table", "/nowhere/[b]"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "crossguard: error: there is no folder /nowhere/[b]; give the one that 'crossguard run' wrote to\n"
    )


# Mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--attack": "PGDD"}, "--attack: unknown name 'PGDD'; did you mean 'PGD'?"),
        ({"--attack": "PGD(stps=1)"}, "--attack: PGD has no field 'stps'; did you mean 'steps'?"),
        ({"--attack": "Tiny"}, "--attack: Tiny() is not an attack"),
        ({"--model": "None"}, "--model: None is not a model"),
        ({"--attack": "PGD"}, "needs a budget"),
        ({"--attack": "PGD", "--budget": "Linf(-1)"}, "--budget: Linf(eps=-1.0) is not a budget"),
        ({"--attack": "PGD", "--budget": "Linf(8)"}, "--budget: Linf(eps=8.0) is not a budget"),
        ({"--attack": "PGD", "--budget": "Words(1)"}, "allows no change of pixels"),
        ({"--limit": "0"}, "--limit must be a whole number of at least 1, not 0"),
        ({"--batch": "-5"}, "--batch must be a whole number of at least 1, not -5"),
        ({"--seed": "-1"}, "--seed must be a whole number of at least 0, not -1"),
        ({"--out": "/proc/none/x.json"}, "the folder /proc/none cannot be written to"),
        ({"--out": "/tmp"}, "--out /tmp is a folder"),
    ],
)
def test_mistakes_of_eval(changes: dict[str, str], said: str, asked: list[dict[str, Any]]):
    arguments = {"--task": "ZeroShot(Scenes('object'))", "--model": "Tiny"} | changes
    assert said in error("eval", *(text for pair in arguments.items() for text in pair))


@pytest.mark.parametrize(
    "arguments", [("eval",), ("frob",), ("eval", "--limit", "x"), ("table",), ("eval", "--modle", "x")]
)
def test_mistakes_of_usage(arguments: tuple[str, ...]):
    result = call(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (CrossguardError("a [bold]sentence[/]"), 2, "crossguard: error: a [bold]sentence[/]\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "crossguard: error: /x: permission denied\n"),
        (OSError(28, "No space left on device"), 2, "crossguard: error: no space left on device\n"),
        (MemoryError(), 2, "crossguard: error: the memory of this machine is full; a smaller --batch needs less"),
        (RuntimeError("mat1 and mat2\nmore"), 1, "crossguard: error: unexpected RuntimeError: mat1 and mat2; this may"),
        (KeyError(), 1, "crossguard: error: unexpected KeyError; this may be a fault of Crossguard, and 'crossguard"),
        (KeyboardInterrupt(), 130, "crossguard: interrupted before a batch was answered; the same command starts"),
    ],
)
def test_what_goes_wrong_is_one_sentence(raised: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(evaluation, "evaluate", fail)
    result = call(*EVAL)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(said) and result.stderr.count("\n") == 1


def test_sigterm_ends_a_command_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)

    def terminated(*_: object, progress: Callable[[int, int], None], **__: object) -> None:
        progress(128, 400)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(evaluation, "evaluate", terminated)
    result = call(*EVAL)
    assert (result.exit_code, result.stdout) == (143, "")
    assert result.stderr == (
        "crossguard: interrupted after 128 of 400 samples; run the same command to go on from there\n"
    )
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_nobody_expected_shows_its_traceback_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setenv("CROSSGUARD_DEBUG", "0")
    monkeypatch.setattr(evaluation, "evaluate", fail)
    assert "Traceback" not in call(*EVAL).stderr
    shown = call("--debug", *EVAL)
    assert shown.exit_code == 1 and "in fail" in shown.stderr and shown.stderr.splitlines()[-1].startswith("crossguard")


SHORT = (*EVAL, "--limit", "12", "--batch", "4")


@pytest.mark.parametrize("place", [(), ("--out", "report.json"), ("--keep", "kept")])
def test_an_evaluation_that_was_stopped_goes_on(
    place: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    told: list[int] = []

    def stopping(_: object, done: int, total: int) -> None:
        told.append(done)
        told_to(_, done, total)
        if done == 8 and told != [8]:
            raise KeyboardInterrupt

    told_to = Bar.progress
    monkeypatch.setattr(Bar, "progress", stopping)
    stopped = call(*SHORT, *place)
    assert stopped.exit_code == 130 and told == [0, 4, 8]
    assert stopped.stderr.endswith("interrupted after 8 of 12 samples; run the same command to go on from there\n")
    told.clear()
    assert call(*SHORT, "--seed", "1").exit_code == 130, "another question took what was not its own"
    assert told == [0, 4, 8]
    told.clear()
    whole = call(*SHORT, *place)
    assert whole.exit_code == 0, whole.output
    assert told == [8, 12], "it began anew"
    told.clear()
    assert call(*SHORT, "--seed", "1").exit_code == 0 and told == [8, 12]
    assert not (tmp_path / "runs/.partial").exists()


def test_an_evaluation_where_nothing_can_be_written_says_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("")

    def stop(*_: object, progress: Callable[[int, int], None], **options: object) -> None:
        assert options["partial"] is None
        progress(4, 12)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    assert "after 4 of 12 samples, which are lost, since nothing can be written here" in call(*SHORT).stderr


def test_progress_is_told_in_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    assert call(*SHORT).stderr == "", "nothing for less than a minute"
    monkeypatch.setattr(bar, "EVERY", 0.0)
    lines = call(*SHORT).stderr.splitlines()
    assert [line.split(" samples")[0] for line in lines] == [f"evaluating: {done}/12" for done in (0, 4, 8, 12)]
    assert not list(tmp_path.iterdir()), "an evaluation leaves nothing behind"


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CROSSGUARD_DEBUG", "1")
    assert "Traceback" in call("words", "PGDD").stderr


# Experiments


def test_run_asks_each_question_once_and_prints_the_table(grid: Path, asked: list[dict[str, Any]]):
    result = call("run", "grid.toml")
    assert result.exit_code == 0, result.output
    assert len(asked) == 6
    assert {question["budget"] for question in asked} == {"None", "Linf(eps=8/255)", "Words(count=1)"}
    assert all(question["limit"] == "10" and question["seed"] == "3" for question in asked)
    assert (
        "| coarse (white box, BPDA) | 100.0 % [34.2, 100.0] | 50.0 % [9.5, 90.5] | 50.0 % [9.5, 90.5] |"
        in result.stdout
    )
    assert "6 cells, 0 answered already" in result.stderr and "[6/6] " in result.stderr
    out = grid.parent / "runs" / "grid"
    assert len([path for path in out.glob("*.json") if path.name != "experiment.json"]) == 6
    assert "asking" in (out / "log.txt").read_text() and "A doubt" in (out / "log.txt").read_text()
    again = call("run", "grid.toml")
    assert len(asked) == 6 and "6 cells, 6 answered already" in again.stderr and again.stdout == result.stdout
    assert call("table", str(out)).stdout == result.stdout
    assert json.loads(call("table", str(out), "--format", "json").stdout)["reports"][0]["model"] == "base"
    assert "unknown format 'pdf'" in error("table", str(out), "--format", "pdf")


def test_equal_questions_are_asked_once(grid: Path, asked: list[dict[str, Any]]):
    grid.write_text(
        GRID.replace(
            '["Both(Linf(8/255), Words(1))"]', '["Both(Linf(8/255), Words(1))", "Both(Linf(4/255), Words(1))"]'
        )
    )
    Experiment.load(grid).run(grid.parent / "out")
    assert len(asked) == 2 * (1 + 2 + 1)  # clean and text evaluations do not see the pixels' budget


def test_random_models_of_an_experiment_are_judged_by_its_draws(grid: Path, asked: list[dict[str, Any]]):
    grid.write_text(
        'task = "ZeroShot(Scenes())"\nmodel = ["GaussianNoise(Tiny())", "Tiny()"]\nattack = ["None", "PGD()"]\n'
        'budget = "Linf(8/255)"\ndraws = 3'
    )
    cells = Experiment.load(grid).cells()
    assert [cell.question.get("draws") for cell in cells] == [None, "3", None, None]  # what is fixed has one draw
    Experiment.load(grid).run(grid.parent / "out")
    assert {one["draws"] for one in asked} == {3}


def test_broken_and_foreign_answers_are_asked_again(grid: Path, asked: list[dict[str, Any]]):
    wanted = Experiment.load(grid)
    out = grid.parent / "out"
    wanted.run(out)
    first, second, third = (out / cell.file for cell in wanted.cells()[:3])
    assert first.name == f"base-clean.{Report.load(first).key[:6]}.json"
    first.write_text(first.read_text()[:50])
    second.write_bytes(third.read_bytes())
    asked.clear()
    reports = wanted.run(out)
    assert len(asked) == 2
    assert [report.key for report in reports] == [cell.key for cell in wanted.cells()]
    assert Report.load(first).key.startswith(first.stem.rpartition(".")[2])
    assert "asked again" in (out / "log.txt").read_text()


def test_a_cell_that_fails_does_not_stop_the_others(
    grid: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    answer = evaluation.evaluate

    def fail(*arguments: Any, **settings: Any) -> Report:
        if isinstance(arguments[2], crossguard.PGD):
            raise CrossguardError("the weights are damaged")
        return answer(*arguments, **settings)

    monkeypatch.setattr(evaluation, "evaluate", fail)
    result = call("run", "grid.toml", "--out", "out")
    assert result.exit_code == 2 and len(asked) == 4
    assert "| base (white box) | 100.0 % [34.2, 100.0] | 50.0 % [9.5, 90.5] |" in result.stdout
    assert "2 of 6 cells are not answered yet" in result.stdout
    assert result.stderr.count("not answered: the weights are damaged") == 1
    assert result.stderr.splitlines()[-1] == (
        "crossguard: error: grid.toml: 2 of 6 cells could not be answered: the weights are damaged "
        "(base, PGD(steps=100) and 1 more)"
    )


def test_a_model_that_cannot_be_read_is_opened_once(
    grid: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    opened: list[Any] = []

    def unreadable(self: Any) -> Any:
        opened.append(self)
        raise CrossguardError("the weights are damaged")

    monkeypatch.setattr(crossguard.Fresh, "open", unreadable)
    grid.write_text(GRID.replace("coarse = ", "lost = 'BitDepth(Fresh(), bits=3)', fresh = 'Fresh()', coarse = "))
    result = call("run", "grid.toml", "--out", "out")
    assert opened == [crossguard.Fresh()] and len(asked) == 6
    assert result.stderr.count("the weights are damaged") == 2, "once when it happens, once at the end"
    assert "6 of 12 cells could not be answered: the weights are damaged (lost, " in result.stderr.splitlines()[-1]


def test_answers_are_not_written_among_the_files_of_a_model(grid: Path, asked: list[dict[str, Any]]):
    (grid.parent / "model").mkdir()
    (grid.parent / "model" / "config.json").write_text("{}")
    assert "model holds a model (config.json); give the answers another folder" in error(
        "run", "grid.toml", "--out", "model"
    )
    assert not asked and len(list((grid.parent / "model").iterdir())) == 1


def test_networks_live_where_the_options_and_the_file_say(
    grid: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    places: list[str] = []
    answer = evaluation.evaluate

    def placed(*arguments: Any, **settings: Any) -> Report:
        places.append(describe())
        return answer(*arguments, **settings)

    monkeypatch.setattr(evaluation, "evaluate", placed)
    assert call(*EVAL, "--device", "cpu", "--dtype", "bfloat16").exit_code == 0
    assert "precision" in asked.pop()
    assert call(*EVAL).exit_code == 0 and "precision" not in asked.pop()
    grid.write_text(GRID + 'dtype = "bfloat16"\ndevice = "cpu"\n')
    assert call("run", "grid.toml").exit_code == 0
    assert {question.get("precision") for question in asked} == {"bfloat16"}
    assert [place.split(", ")[-1] for place in places] == ["bfloat16", "cpu"] + 6 * ["bfloat16"]
    asked.clear()
    assert call("run", "grid.toml", "--dtype", "float32").exit_code == 0
    assert len(asked) == 6 and not any("precision" in question for question in asked), "the answers are others"
    assert chosen() == Choice(best())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cuda:99"), "'cuda:99'"),
        (("--device", "tpu"), "give 'cpu'"),
        (("--dtype", "float16"), "networks cannot compute in 'float16'; give one of float32, bfloat16"),
    ],
)
def test_devices_that_are_not_there(options: tuple[str, ...], said: str, grid: Path, asked: list[dict[str, Any]]):
    assert said in error(*EVAL, *options)
    assert said in error("run", "grid.toml", *options)
    assert said in error(*TRANSFER, *options)
    training = ("train", "--recipe", "TeCoA()", "--model", "Tiny()", "--data", "Scenes()", "--out", "out")
    # A training has float32 weights; in which precision its steps compute is said by the recipe (bf16).
    assert (said if "--device" in options else "No such option: --dtype") in error(*training, *options)
    assert not asked and not (grid.parent / "out").exists()


def test_an_interrupted_run_goes_on(grid: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    answer = evaluation.evaluate

    def interrupt(*arguments: Any, **settings: Any) -> Report:
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", interrupt)
        stopped = call("run", "grid.toml")
    assert stopped.exit_code == 130 and stopped.stdout == ""
    assert stopped.stderr.endswith("crossguard: interrupted after 2 of 6 cells; run the same command to go on\n")
    assert len(asked) == 2
    assert call("run", "grid.toml").exit_code == 0
    assert len(asked) == 6


def test_two_runs_share_a_folder(grid: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(experiment, "POLL", 0.01)
    answer, meet = evaluation.evaluate, threading.Barrier(2, timeout=20)
    met: list[int] = []

    def together(*arguments: Any, **settings: Any) -> Report:
        if len(met) < 2:  # both runs must be inside a cell at the same time
            met.append(1)
            meet.wait()
        return answer(*arguments, **settings)

    monkeypatch.setattr(evaluation, "evaluate", together)
    wanted = Experiment.load(grid)
    results: list[list[Report]] = []
    threads = [threading.Thread(target=lambda: results.append(wanted.run(grid.parent / "out"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(asked) == 6 and [len(result) for result in results] == [6, 6]


def test_a_full_disk_stops_the_run(grid: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    wanted = Experiment.load(grid)

    class Fill(Watch):
        def start(self, cells: int, answered: int) -> None:
            monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(CrossguardError, match="cannot be written: no space left on device"):
        wanted.run(grid.parent / "out", Fill())
    assert len(asked) == 1
    assert not [path for path in (grid.parent / "out").glob("*.json") if path.name != "experiment.json"]


TRAINED = """
task      = "ZeroShot(Scenes('object'))"
model     = ["Tiny()", "BitDepth(Fit(FTStandard(), Tiny(), Scenes()))", "Fit(TeCoA(), Tiny(), Scenes())"]
attack    = ["None", "PGD(steps=100)", "PGD(steps=7)"]
budget    = "Linf(8/255)"
surrogate = ["None", "Fresh()"]
"""


def test_every_cell_is_in_one_shard_and_what_is_shared_in_the_same(grid: Path):
    grid.write_text(TRAINED)
    cells = Experiment.load(grid).cells()
    shards = [experiment.dealt(cells, (number, 3)) for number in (1, 2, 3)]
    assert sorted(cell.key for shard in shards for cell in shard) == sorted(cell.key for cell in cells)
    assert len(experiment.dealt(cells, (1, 1))) == len(cells)
    # All that is crafted on Fresh() for one attack is one part, and with it all that a trained model is asked.
    assert sorted(len(shard) for shard in shards) == [1, 2, len(cells) - 3]
    grid.write_text(GRID)
    cells = Experiment.load(grid).cells()
    assert [len(experiment.dealt(cells, (number, 4))) for number in (1, 2, 3, 4)] == [2, 2, 1, 1]
    two = [experiment.dealt(cells, (2, 2), Processes(rank, 2)) for rank in (0, 1)]
    assert sorted(cell.key for part in two for cell in part) == sorted(
        cell.key for cell in [*experiment.dealt(cells, (3, 4)), *experiment.dealt(cells, (4, 4))]
    )


def test_shards_answer_the_grid_without_locks(grid: Path, asked: list[dict[str, Any]]):
    first = call("run", "grid.toml", "--shard", "1/2")
    assert first.exit_code == 0, first.output
    assert len(asked) == 3 and "3 cells, 0 answered already" in first.stderr
    assert "3 of 6 cells are not answered yet" in first.stdout
    assert not list((grid.parent / "runs/grid/.locks").iterdir())
    second = call("run", "grid.toml", "--shard", "2/2")
    assert len(asked) == 6 and "not answered" not in second.stdout
    assert second.stdout == call("run", "grid.toml").stdout and len(asked) == 6
    late = call("run", "grid.toml", "--shard", "9/9", "--out", "late")
    assert late.exit_code == 0 and late.stdout == "" and "0 cells" in late.stderr
    for text, said in (
        ("2", "such as 2/8"),
        ("0/3", "no shard 0 of 3"),
        ("4/3", "no shard 4 of 3"),
        ("x/3", "not 'x/3'"),
    ):
        assert said in error("run", "grid.toml", "--shard", text)


def test_a_model_is_trained_by_one_process_while_others_take_other_cells(
    grid: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(experiment, "POLL", 0.01)
    monkeypatch.setenv("CROSSGUARD_FITS", str(grid.parent / "fits"))
    grid.write_text(TRAINED.replace("surrogate", "# "))
    training: list[str] = []
    trained: list[str] = []
    meet = threading.Barrier(2, timeout=20)

    def train(self: Any) -> None:
        if not self.trained:
            name = type(self.recipe).__name__
            assert name not in [*training, *trained], "two processes train the same model"
            training.append(name)
            meet.wait()  # both models are trained at the same time, by two processes
            training.remove(name)
            trained.append(name)
            self.folder.mkdir(parents=True)
            (self.folder / "crossguard.json").write_text("{}")

    monkeypatch.setattr(crossguard.Fit, "open", train)
    monkeypatch.setattr(crossguard.Tiny, "open", lambda self: None)
    wanted = Experiment.load(grid)
    results: list[list[Report]] = []
    threads = [threading.Thread(target=lambda: results.append(wanted.run(grid.parent / "out"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(trained) == ["FTStandard", "TeCoA"]
    assert len(asked) == 9 and [len(result) for result in results] == [9, 9]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("device = 3", "grid.toml: device must be a text in quotes, not 3"),
        ("modle = 'Tiny()'", "grid.toml: unknown key 'modle'; did you mean 'model'?"),
        ("limit = 0", "grid.toml: limit must be a whole number of at least 1, not 0"),
        ("limit = true", "grid.toml: limit must be a whole number of at least 1, not True"),
        ("draws = 0", "grid.toml: draws must be a whole number of at least 1, not 0"),
        ("seed = 'x'", "grid.toml: seed must be a whole number of at least 0, not 'x'"),
        ("model = 3", "grid.toml: model must be a list of words or a table of label = word, not 3"),
        ("model = [3]", "grid.toml: model holds 3; give a word in quotes"),
        ("model = []", "grid.toml: model is empty"),
        ("model = ['Tny()']", "grid.toml: model: unknown name 'Tny'; did you mean 'Tiny'?"),
        ("model = ['PGD()']", "grid.toml: model: PGD() is not a model"),
        ("budget = ['Words(1)']", "grid.toml: in the cell (ZeroShot(Scenes()), base, PGD(steps=100), Words(1)): "),
        ("model = [", "grid.toml' is not valid TOML: "),
        ('model = ["HuggingFace("x")"]', "inside of a text in double quotes write single ones, as in"),
        ("task", "grid.toml' is not valid TOML: "),
    ],
)
def test_mistakes_in_an_experiment(change: str, said: str, grid: Path, asked: list[dict[str, Any]]):
    name = change.split(" ")[0]
    kept = [line for line in GRID.splitlines() if line.split(" ")[0] != name]
    grid.write_text("\n".join([*kept, change]))
    assert said in error("run", "grid.toml")
    assert not asked and not (grid.parent / "runs").exists()


def test_experiments_that_are_no_text_or_lack_a_key(grid: Path):
    grid.write_bytes(b"\xff\xfe")
    assert "it is not UTF-8 text" in error("run", "grid.toml")
    grid.write_text("model = 'Tiny()'")
    assert "the key 'task' is missing" in error("run", "grid.toml")
    assert "there is no experiment file no.toml" in error("run", "no.toml")
    assert "cannot be read (is a directory)" in error("run", str(grid.parent))
    grid.write_text(GRID)
    (grid.parent / "taken").write_text("")
    assert "cannot be written to" in error("run", "grid.toml", "--out", "taken")


def test_a_word_explains_what_it_inherits() -> None:
    shown = call("words", "MMCoA").stdout
    assert "alpha: weight of the adversarial images" in shown
    assert "Args of every " in shown and "steps: optimizer steps." in shown


TRANSFER = (
    "transfer", "--task", "ZeroShot(Scenes('object'))", "--attack", "PGD()", "--budget", "Linf(8/255)",
    "--model", "plain = Tiny()", "--model", "BitDepth(Tiny(), bits=3)",
)  # fmt: skip


def test_transfer_asks_every_pair_and_prints_who_was_crafted_on(tmp_path: Path, asked: list[dict[str, Any]]):
    answer = call(*TRANSFER, "--out", str(tmp_path / "pairs"))
    assert answer.exit_code == 0, answer.output
    pairs = {(question["model"], question["surrogate"]): question["knowledge"] for question in asked}
    known: dict[bool, str] = {model == surrogate: said for (model, surrogate), said in pairs.items()}
    assert len(pairs) == 4 and known[True].startswith("white box") and known[False] in ("gray box", "transfer")
    lines = [line for line in answer.stdout.splitlines() if line.startswith("|")]
    assert lines[0] == "| crafted on | plain | BitDepth(Tiny(), bits=3) |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["nobody", "plain", "BitDepth(Tiny(), bits=3)"]
    assert "-" not in [cell.strip() for line in lines[2:] for cell in line.split("|")]
    again = call("table", str(tmp_path / "pairs"), "--transfer")
    assert [line for line in again.stdout.splitlines() if line.startswith("|")] == lines and len(asked) == 4


def test_mistakes_of_transfer(tmp_path: Path, asked: list[dict[str, Any]]):
    folder = ("--out", str(tmp_path / "pairs"))
    assert "needs two models" in error(*TRANSFER[:-2], *folder)
    assert "given twice" in error(*TRANSFER, "--model", "plain=Tiny()", *folder)
    assert "--model: unknown name" in error(*TRANSFER, "--model", "x=Tinny()", *folder)
    call(*TRANSFER, *folder)
    assert "give one" in error("table", str(tmp_path / "pairs"), "--worst", "--transfer")


RETRIEVED = ("--task", "Retrieval(Scenes('object'))", "--model", "Tiny()", "--limit", "6")


def test_a_refused_run_leaves_what_an_earlier_one_kept(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    both = ("--budget", "Both(Linf(4/255), Words(1))", "--keep", str(kept), "--overwrite")
    assert call("attack", *RETRIEVED, "--attack", "SGA(PGD(steps=2))", *both).exit_code == 0
    before = {file.name: file.read_bytes() for file in kept.iterdir()}
    assert "has no classes" in error("attack", *RETRIEVED, "--attack", "SGA(FAB())", *both)
    assert "needs to be told when it has won" in error("attack", *RETRIEVED, "--attack", "SGA(RayS(queries=5))", *both)
    assert "kept as 'jpg'" in error("attack", *RETRIEVED, "--attack", "SGA(PGD(steps=2))", *both, "--keep-as", "jpg")
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
    assert call("show", str(kept)).exit_code == 0


def test_a_refused_run_leaves_nothing_new(tmp_path: Path) -> None:
    out, kept = tmp_path / "reports" / "r.json", tmp_path / "kept"
    asked = (*RETRIEVED, "--attack", "CoAttack(RayS(queries=5))", "--budget", "Both(Linf(4/255), Words(1))")
    assert "Away never says so" in error("eval", *asked, "--out", str(out), "--keep", str(kept))
    assert "kept as 'jpg'" in error("eval", *asked, "--keep", str(kept), "--keep-as", "jpg")
    places = ("--limit", "2", "--out", str(out), "--keep", str(kept))
    for option, wrong, said in (
        ("--task", "Nonsense()", "unknown name"),
        ("--attack", "Tiny()", "is not an attack"),
        ("--model", "HuggingFace('nowhere/at-all')", "nowhere/at-all"),
    ):
        words = {"--task": "ZeroShot(Scenes('shape'))", "--model": "Tiny()", "--attack": "PGD(steps=1)"}
        words |= {"--budget": "Linf(1/255)", option: wrong}
        assert said in error("eval", *(text for pair in words.items() for text in pair), *places)
    assert not list(tmp_path.iterdir())


def test_what_another_question_left_is_not_replaced_unasked(tmp_path: Path) -> None:
    kept, out = tmp_path / "kept", tmp_path / "r.json"
    joint = ("--attack", "Joint(PGD(steps=1))", "--budget", "Both(Linf(4/255), Words(1))")
    image = ("--attack", "PGD(steps=1)", "--budget", "Linf(4/255)")
    assert call("attack", *RETRIEVED, *joint, "--keep", str(kept), "--out", str(out)).exit_code == 0
    before = {file: file.read_bytes() for file in (*kept.iterdir(), out)}
    said = error("eval", *RETRIEVED, *image, "--keep", str(kept))
    assert (
        "kept holds what was kept for another question (attack: Joint(image=PGD(steps=1)) there, PGD(steps=1)" in said
    )
    assert "r.json holds the report of another question (attack: " in error(
        "eval", *RETRIEVED, *image, "--out", str(out)
    )
    other = error("attack", *RETRIEVED, *image, "--keep", str(tmp_path / "new"), "--out", str(out))
    assert "r.json holds the report of another question" in other, "said before anything is attacked"
    (tmp_path / "mine.json").write_text('{"a": 1}')
    assert "mine.json is not a report" in error("eval", *RETRIEVED, "--out", str(tmp_path / "mine.json"))
    assert {file: file.read_bytes() for file in before} == before
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'
    assert call("eval", *RETRIEVED, *joint, "--keep", str(kept), "--out", str(out)).exit_code == 0, "the same question"
    assert call("eval", *RETRIEVED, *image, "--keep", str(kept), "--out", str(out), "--overwrite").exit_code == 0
    asked = Report.load(out).question
    assert (
        asked["attack"].startswith("PGD(steps=1,") and asked == json.loads((kept / "kept.json").read_text())["question"]
    )
    assert not (kept / "report.json").exists(), "the report of the images that went"


@pytest.mark.parametrize("given", [("--budget", "Linf(8/255)"), ("--surrogate", "Tiny()")])
def test_a_budget_or_surrogate_that_nobody_spends_is_refused(given: tuple[str, str], asked: list[dict[str, Any]]):
    said = error(*EVAL, *given)
    assert f"a {given[0][2:]} needs an attack, and {given[1]} was given without one" in said and not asked


def test_a_grid_of_clean_cells_alone_has_no_budget(grid: Path, asked: list[dict[str, Any]]):
    grid.write_text(GRID.replace('["None", "PGD(steps=100)", "Substitute()"]', '["None"]'))
    with pytest.raises(CrossguardError, match="a budget needs an attack"):
        Experiment.load(grid).run(grid.parent / "out")
    assert not asked


def test_a_kept_folder_holds_nothing_of_the_run_before(tmp_path: Path) -> None:
    asked = ("attack", *RETRIEVED, "--attack", "PGD(steps=2)", "--budget", "Linf(4/255)", "--keep", str(tmp_path / "k"))
    assert call(*asked, "--keep-as", "png", "--batch", "2").exit_code == 0
    assert len(list((tmp_path / "k").glob("*.png"))) == 6
    assert call(*asked).exit_code == 0
    assert not list((tmp_path / "k").glob("*.png")) and len(list((tmp_path / "k").glob("*.safetensors"))) == 1


def test_what_doubts_say_of_texts_and_transfers_without_an_attack(tmp_path: Path) -> None:
    shown = call("eval", *RETRIEVED, "--attack", "Substitute()", "--budget", "Words(1)", "--doubt", "4").stdout
    assert "the attack is on texts alone: most checks look at pixels" in shown
    clean = [word if word not in ("PGD()", "Linf(8/255)") else "None" for word in TRANSFER]
    assert "needs an attack to craft with" in error(*clean, "--out", str(tmp_path / "pairs"))
    assert not (tmp_path / "pairs").exists()
