"""Short forms of words: paths, hub ids, sizes, and objects that are given in Python."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

import crossguard
from crossguard import (
    Captions,
    HuggingFace,
    Images,
    Linf,
    Parquet,
    Retrieval,
    Scenes,
    Tiny,
    ZeroShot,
    cli,
    short,
    words,
)
from crossguard.errors import CrossguardError
from crossguard.words import build, expanded, given, read, show


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with something of each kind."""
    monkeypatch.chdir(tmp_path)
    for folder in ("ckpt/clip", "both", "pics/cat", "pics/sea_lion", "wds/train", "flat", "photos", "hub/data", "kept",
                   "ours", "letters/a/abbey"):  # fmt: skip
        Path(folder).mkdir(parents=True)
    Path("ckpt/clip/config.json").write_text('{"model_type": "clip"}')
    Path("both/config.json").write_text('{"model_type": "clip"}')
    Path("both/open_clip_config.json").write_text("{}")
    Path("ours/open_clip_config.json").write_text("{}")
    for image in ("pics/cat/1.png", "pics/sea_lion/1.png", "flat/1.png", "photos/one.jpg", "letters/a/abbey/1.png"):
        Image.new("RGB", (8, 8)).save(image)
    for file in ("wds/train/0.tar", "hub/data/test-0.parquet", "table.parquet", "weights.safetensors", "old.pt"):
        Path(file).touch()
    Path("captions.json").write_text(json.dumps([{"image": "one.jpg", "caption": ["a dot", "a point"]}]))
    Path("photos/captions.txt").write_text("one.jpg#0\ta dot\n")
    Path("lost.json").write_text(json.dumps([{"image": "nowhere.jpg", "caption": ["a dot"]}]))
    Path("kept/kept.json").write_text("{}")
    return tmp_path


def refusal(work: Any) -> str:
    with pytest.raises(CrossguardError) as refused:
        work()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("pics", "Images('pics')"),
        ("./pics/", "Images('./pics/')"),
        ("letters", "Images('letters')"),
        ("table.parquet", "Parquet('table.parquet')"),
        ("hub", "Parquet('hub')"),
        ("hub/data/test-*.parquet", "Parquet('hub/data/test-*.parquet')"),
        ("wds", "Shards('wds', split='train')"),
        ("wds/train", "Shards('wds', split='train')"),
        ("captions.json", "Captions('photos', 'captions.json')"),
        ("photos/captions.txt", "Captions('photos', 'photos/captions.txt')"),
        ("kept", "Kept('kept')"),
        ("nothing", ""),
    ],
)
def test_what_data_a_path_leads_to(path: str, word: str):
    assert short.data(path) == word
    if word:
        assert words.is_word(type(build(word)))


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("ckpt/clip", "HuggingFace('ckpt/clip')"),
        ("both", "HuggingFace('both')"),
        ("ours", "OpenCLIP('ours')"),
        ("openai/clip-vit-base-patch32", "HuggingFace('openai/clip-vit-base-patch32')"),
        ("hf-hub:microsoft/BiomedCLIP", "OpenCLIP('hf-hub:microsoft/BiomedCLIP')"),
        ("nothing", ""),
        ("a/b/c", ""),
    ],
)
def test_what_model_a_path_leads_to(path: str, word: str):
    assert short.model(path) == word


def test_what_is_there_and_something_else_says_what_it_is():
    assert "'pics' is no checkpoint of a model (it is data: Images('pics'))" in refusal(lambda: short.model("pics"))
    assert "'ckpt/clip' is no data (it is a model: HuggingFace('ckpt/clip'))" in refusal(
        lambda: short.data("ckpt/clip")
    )
    assert "holds pickles" in refusal(lambda: short.model("old.pt"))
    assert "holds weights alone" in refusal(lambda: short.model("weights.safetensors"))
    assert "'nowhere.jpg' lies in no folder beside it; give Captions(" in refusal(lambda: short.data("lost.json"))
    assert "'flat' is no data; give a folder with one subfolder" in refusal(lambda: short.data("flat"))


def test_words_are_words_whatever_lies_beside_them(here: Path):
    (here / "Tiny").mkdir()
    (here / "PGD").mkdir()
    for kind, text in (("model", "Tiny"), ("model", " Tiny ( )"), ("attack", "PGD"), ("surrogate", "None"),
                       ("task", "Nobody()"), ("model", "base"), ("model", "nothing")):  # fmt: skip
        assert expanded(kind, text, ("base",)) == text
    assert "did you mean 'Tiny'" in refusal(lambda: read("model", "Tny"))


def test_data_are_the_task_that_fits_them():
    assert read("task", "pics") == ZeroShot(Images("pics"))
    assert read("task", "captions.json") == Retrieval(Captions("photos", "captions.json"))
    assert read("task", "Scenes('object')") == ZeroShot(Scenes("object"))
    assert read("data", "pics") == Images("pics")
    assert "Tiny() is not a task" in refusal(lambda: read("task", "Tiny()"))


def test_paths_inside_of_words_are_resolved_where_a_word_is_wanted():
    assert build("BitDepth('ckpt/clip')") == crossguard.BitDepth(HuggingFace("ckpt/clip"))
    assert build("ZeroShot('pics')") == ZeroShot(Images("pics"))
    assert build("Fit(TeCoA(), 'ckpt/clip', data='table.parquet')").data == Parquet("table.parquet")
    assert build("Images('ckpt/clip')") == Images("ckpt/clip"), "a text is wanted there"
    assert "base must be a VisionLanguageModel, and 'nothing' was given" in refusal(
        lambda: build("BitDepth('nothing')")
    )
    assert "'pics' is no checkpoint of a model" in refusal(lambda: build("BitDepth('pics')"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("BitDepth(ckpt/clip)", "'ckpt/clip' is a folder: quote it, as in HuggingFace('ckpt/clip')"),
        ("ZeroShot(pics)", "'pics' is a folder: quote it, as in Images('pics')"),
        ("ZeroShot(table.parquet)", "'table.parquet' is a file: quote it, as in Parquet('table.parquet')"),
        ("BitDepth(openai/clip-vit-base-patch32)", "a hub id needs quotes, as in HuggingFace('openai/clip-"),
        ("./pics", "'./pics' is a folder: quote it, as in Images('./pics')"),
    ],
)
def test_a_path_without_quotes_is_told_so_before_names_that_are_near(text: str, said: str):
    assert said in refusal(lambda: build(text))


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("data", "pcis", "unknown name 'pcis'; 'pics' is a folder here, or did you mean 'PACS'?"),
        ("data", "letterz", "unknown name 'letterz'; 'letters' is a folder here, or did you mean 'TTE'?"),
        ("task", "ckpt/clp", "there is no file or folder 'ckpt/clp'; 'clip' is a folder in 'ckpt'"),
        ("data", "tabel.parquet", "there is no file or folder 'tabel.parquet'; 'table.parquet' is a file here"),
        ("data", "no/such/place", "there is no file or folder 'no/such/place'"),
        ("model", "./ckpt/x/y", "there is no file or folder './ckpt/x/y'"),
        ("model", "Tinny", "unknown name 'Tinny'; did you mean 'Tiny'?"),
    ],
)
def test_a_path_that_is_not_there_is_told_so_and_what_is_near(kind: str, text: str, said: str):
    assert refusal(lambda: read(kind, text)).endswith(said)


# The command line


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches the evaluation, which then ends."""
    questions: list[dict[str, Any]] = []

    def answer(task: Any, model: Any, attack: Any, budget: Any, *_: Any, **__: Any) -> None:
        questions.append({"task": task, "model": model, "attack": attack, "budget": budget})
        raise CrossguardError("asked")

    import importlib

    monkeypatch.setattr(importlib.import_module("crossguard.evaluate"), "evaluate", answer)
    monkeypatch.setattr(HuggingFace, "fingerprint", "")
    return questions


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), prog_name="crossguard")


def test_short_options_are_the_long_ones_and_said_in_full(asked: list[dict[str, Any]]):
    done = call("eval", "--data", "pics", "--model", "ckpt/clip", "--attack", "AutoAttack", "--eps", "4/255")
    assert asked == [
        {
            "task": ZeroShot(Images("pics")),
            "model": HuggingFace("ckpt/clip"),
            "attack": crossguard.AutoAttack(),
            "budget": Linf(4 / 255),
        }
    ]
    assert done.stderr.splitlines()[:2] == [
        "crossguard: --task pics is ZeroShot(Images('pics'))",
        "crossguard: --model ckpt/clip is HuggingFace('ckpt/clip')",
    ]
    call("eval", "--data", "Scenes('object')", "--model", "Tiny", "--attack", "PGD", "--eps", "0.5", "--norm", "L2")
    assert asked[1]["task"] == ZeroShot(Scenes("object")) and asked[1]["budget"] == crossguard.L2(0.5)
    long = call("eval", "--task", "ZeroShot(Scenes())", "--model", "Tiny()", "--attack", "PGD", "--budget", "Linf(1)")
    assert " is " not in long.stderr.replace("is gray", "") and len(asked) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--task": "ZeroShot(Scenes())"}, "--task and --data say both what is asked; give one of them"),
        ({"--data": None}, "nothing is asked; give --data, such as a folder of class folders, or a --task"),
        ({"--norm": "l7"}, "--norm 'l7' is not known; give one of linf, l2, l1"),
        ({"--eps": None, "--norm": "l2"}, "give --eps, such as 4/255"),
        ({"--budget": "Linf(1)"}, "--budget and --eps say both how far"),
        ({"--eps": "four"}, "--eps must be a number such as 4/255, not 'four'"),
        ({"--eps": "Linf(1)"}, "--eps must be a number such as 4/255, not 'Linf(1)'"),
        ({"--eps": "8"}, "--budget: Linf(eps=8.0) is not a budget"),
        ({"--data": "nothing"}, "--task: unknown name 'nothing'"),
        ({"--data": "ckpt/clip"}, "--task: 'ckpt/clip' is no data (it is a model: HuggingFace('ckpt/clip'))"),
        ({"--model": "pics"}, "--model: 'pics' is no checkpoint of a model (it is data: Images('pics'))"),
    ],
)
def test_mistakes_in_short_options(changes: dict[str, str | None], said: str, asked: list[dict[str, Any]]):
    options = {"--data": "pics", "--model": "Tiny", "--attack": "PGD", "--eps": "4/255"} | changes
    done = call("eval", *(text for pair in options.items() if pair[1] is not None for text in pair))
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("error: ") == 1 and not asked


def test_an_experiment_takes_paths_and_its_labels_are_words(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HuggingFace, "fingerprint", "")
    (here / "grid.toml").write_text('task = "pics"\nmodel = ["ckpt/clip", "Tiny"]\n')
    grid = crossguard.Experiment.load("grid.toml").grid
    assert list(grid["task"]) == ["ZeroShot(Images('pics'))"]
    assert list(grid["model"]) == ["HuggingFace('ckpt/clip')", "Tiny()"]


# Python


@dataclass(frozen=True)
class Mine(Images):
    """Takes whatever it is given, as a class does that nobody checks."""


def test_what_is_given_in_python_may_be_text_a_path_a_class_or_have_lists_in_it():
    assert given("attack", "PGD(steps=3)") == given("attack", crossguard.PGD(steps=3))
    assert given("attack", crossguard.PGD) == crossguard.PGD() and given("attack", None) is None
    assert given("task", Path("pics")) == given("task", Images("pics")) == ZeroShot(Images("pics"))
    listed: Any = ["a {}", "the {}"]
    place: Any = Path("pics")
    task = given("task", ZeroShot(Mine(place, templates=listed)))
    assert task.data == Mine("pics", templates=("a {}", "the {}")) and isinstance(task.data.path, str)
    assert show(Mine(place), short=True) == "Mine('pics')"
    whole = ZeroShot(Scenes("object"))
    assert given("task", whole) is whole, "what it has opened stays"
    number: Any = 3
    assert "Mine: path must be a string in quotes, and 3 was given" in refusal(lambda: given("data", Mine(number)))
    assert "the class Tiny without its brackets" not in refusal(lambda: given("attack", Tiny))


def test_evaluate_takes_words_as_text():
    text = crossguard.evaluate("Scenes('object')", "Tiny", crossguard.PGD, "Linf(1/255)", limit=2)
    word = crossguard.evaluate(ZeroShot(Scenes("object")), Tiny(), crossguard.PGD(), Linf(1 / 255), limit=2)
    assert dict(text.question) == dict(word.question)
    assert text.outcomes.columns["clean_margin"].tolist() == word.outcomes.columns["clean_margin"].tolist()
    assert "'Tny'; did you mean 'Tiny'" in refusal(lambda: crossguard.evaluate("Scenes()", "Tny"))


@dataclass(frozen=True)
class Steps(crossguard.PGD):
    """Takes whatever it is given."""


def test_a_word_made_in_python_holds_tuples_and_texts_and_names_the_field_that_does_not_fit():
    place: Any = Path("pics")
    listed: Any = ["a {}"]
    word = Mine(place, templates=listed)
    assert word == Mine("pics", templates=("a {}",)) and hash(word) == hash(Mine("pics", templates=("a {}",)))
    wrong: Any = "10"
    assert "Steps: steps must be a whole number, and '10' was given" in refusal(lambda: Steps(steps=wrong))
    assert Steps(steps=3).steps == 3
