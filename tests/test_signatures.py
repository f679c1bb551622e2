"""Signatures of words: read from the source, they say what the classes say, and nothing heavy is loaded."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import crossguard
from crossguard import signatures, words
from crossguard.errors import CrossguardError
from crossguard.signatures import Parameter, check, find

HEAVY = {"torch", "transformers", "torchvision", "accelerate", "pyarrow", "beartype", "matplotlib"}


def test_the_source_says_of_every_word_what_its_class_says(monkeypatch: pytest.MonkeyPatch):
    real = {
        name: signatures.of(kind)
        for name in crossguard.VOCABULARY
        if words.is_word(kind := getattr(crossguard, name))
    }  # fmt: skip

    def refuse(name: str) -> type:
        raise AssertionError(f"the source of {name} is not plain enough, so its module would be loaded")

    monkeypatch.setattr(words, "find", refuse)
    assert set(signatures.names()) == set(real)
    for name, signature in real.items():
        assert find(name) == signature


@pytest.mark.parametrize(
    ("above", "kind"), [("Recipe", "recipe"), ("Trainable", "trainable"), ("VisionLanguageModel", "model")]
)
def test_what_stands_between_is_no_kind_of_its_own(above: str, kind: str):
    """`AgainstDomains` stands between `Recipe` and `DANN`."""
    below = [
        name
        for name in signatures.names()
        if isinstance(word := getattr(crossguard, name), type) and issubclass(word, getattr(crossguard, above))
    ]
    assert below and {name: find(name).kind for name in below} == dict.fromkeys(below, kind)


def test_a_signature_in_full():
    found = find("WordShare")
    assert (found.name, found.kind) == ("WordShare", "budget")
    assert found.summary.startswith("At most this share of the words of a string may be replaced")
    assert found.parameters == (Parameter("share", "float", "0.4", True),)
    assert [(one.name, one.default) for one in find("Both").parameters] == [("pixels", None), ("words", None)]


def test_what_fields_inherit_stands_with_the_class_that_brought_them():
    found = find("TeCoA")
    assert len(found.inherited) == 1 and "\n    batch: " in "\n" + found.inherited[0][1]
    assert not any(one.positional for one in found.parameters)


def test_a_word_of_a_plugin_is_asked_itself(monkeypatch: pytest.MonkeyPatch):
    @dataclasses.dataclass(frozen=True)
    class Alien:
        """Says where it is from. And more."""

        size: int = 1
        name: str = "a"

    class Point:
        def load(self) -> type:
            return Alien

    monkeypatch.setattr(crossguard, "plugins", lambda: {"Alien": Point()})
    assert find("Alien").parameters == (Parameter("size", "int", "1", True), Parameter("name", "str", "'a'", True))
    assert find("Alien").summary == "Says where it is from"
    assert signatures.names()[-1] == "Alien"
    check("Alien(2)")
    with pytest.raises(CrossguardError, match="no field 'sise'; did you mean 'size'"):
        check("Alien(sise=2)")
    vars(crossguard).pop("Alien")


WRONG = [
    "PGDD",
    "PGD(step_size=1)",
    "ZeroShot(Scenes(), tempaltes=('a {}',))",
    "Fit(TeCoA(), Tiny(), Sceness())",
    "(PGD(), Squar())",
    "Linf(1, 2)",
    "Linf()",
    "Linf(eps=1, **{})",
    "Both(1)",
    "build('1')",
    "Loss()",
    "Linf(",
    "",
]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_with_a_name_or_a_field_is_said_as_when_it_is_built(text: str):
    with pytest.raises(CrossguardError) as building:
        words.build(text)
    with pytest.raises(CrossguardError) as checking:
        check(text)
    assert str(checking.value) == str(building.value)


def test_names_of_an_experiment_file_are_known_where_it_says_so():
    check("Fit(TeCoA(), Tiny(), data)", ["data"])
    with pytest.raises(CrossguardError, match="unknown name 'dta'; did you mean 'data'"):
        check("Fit(TeCoA(), Tiny(), dta)", ["data"])


def test_what_was_listed_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CROSSGUARD_CACHE", str(tmp_path / "cache"))
    listed = signatures.listed()
    assert [name for name, _, _ in listed] == [name for name in signatures.names() if name in crossguard.VOCABULARY]
    assert ["PGD", "attack", find("PGD").summary] in listed
    kept = tmp_path / "cache" / "words.json"
    written = json.loads(kept.read_text())
    monkeypatch.setattr(signatures, "_exports", dict)  # whoever reads the source now finds nothing
    assert signatures.listed() == listed
    for content in ("{", json.dumps(written | {"about": "others"}), json.dumps(written | {"words": [["PGD"]]})):
        kept.write_text(content)
        assert signatures.listed() == []


def test_the_stub_names_everything_once():
    tree = ast.parse(Path(crossguard.__file__).with_suffix(".pyi").read_text())
    named = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len(named) == len(set(named)) and tuple(sorted(named)) == crossguard.VOCABULARY
    assert callable(crossguard.evaluate) and callable(crossguard.diagnose)  # though modules have the same names


def test_listing_words_and_refusing_misspelt_ones_is_light(tmp_path: Path):
    grid = tmp_path / "grid.toml"
    grid.write_text('task = "ZeroShot(Scenes())"\nmodel = "Tiny()"\nattack = ["PGD()", "Squar()"]\nbudget = "Linf(1)"')
    commands = [
        ["--help"],
        ["words"],
        ["words", "AutoAttack"],
        ["words", "Autoattac"],
        ["eval", "--task", "ZeroShot(Scenes())", "--model", "Tiny()", "--attack", "PGD(stepps=1)"],
        ["attack", "--task", "ZeroShot(Scenes())", "--model", "Tiny()", "--attack", "PGD", "--budget", "Linff(1)",
         "--keep", str(tmp_path)],
        ["train", "--recipe", "TeCoA()", "--model", "Tiny()", "--data", "Scenez()", "--out", str(tmp_path / "x")],
        ["transfer", "--task", "ZeroShot(Scenes())", "--model", "Tiny()", "--model", "b=Tiny(1)", "--attack", "PGD",
         "--budget", "Linf(1)"],
        ["run", str(grid)],
    ]  # fmt: skip
    code = (
        "import sys, json, crossguard; light = sorted(sys.modules); codes = []\n"
        "import crossguard.table, crossguard.cli\n"
        f"for arguments in {commands!r}:\n"
        "    try: crossguard.cli.main(arguments)\n"
        "    except SystemExit as end: codes.append(end.code)\n"
        "print(json.dumps([light, sorted(sys.modules), codes]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    light, after, codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 0, 2, 2, 2, 2, 2, 2], done.stderr
    for near in ("AutoAttack", "steps", "Linf", "Scenes", "takes none", "Square"):
        assert near in done.stderr
    assert not (HEAVY | {"numpy", "rich", "typer"}) & set(light)
    assert not HEAVY & set(after)
