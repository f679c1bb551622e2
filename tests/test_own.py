"""Words of one's own: files that are named by hand, and classes that are registered."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import crossguard
from crossguard import Linf, Scenes, Tiny, ZeroShot, cli, own, signatures
from crossguard.errors import CrossguardError
from crossguard.evaluate import question
from crossguard.experiment import Experiment
from crossguard.words import build, contents, find, names, register, show

MINE = '''
"""Words of mine."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import crossguard as cg
from crossguard import CandidateSource, ImageAttack, Loss, Margin

Path(__file__).with_name("ran").touch()


@dataclass(frozen=True)
class Corner(ImageAttack):
    """Goes to the corner of the box. Nobody knows why.

    Args:
        times: how often.
    """

    times: int = 1
    loss: Loss = Margin()

    def search(self, victim, clean, goal, budget, seeds):
        return budget.project(clean + budget.eps, clean)


@dataclass(frozen=True)
class Corners(Corner):
    """Several."""

    share: float = 1
    places: tuple[str, ...] = ("left",)


@dataclasses.dataclass(frozen=True)
class Edge(cg.ImageAttack):
    """Goes to the edge."""

    def search(self, victim, clean, goal, budget, seeds):
        return clean


@dataclass(frozen=True)
class Halves(CandidateSource):
    """Is there to be inherited from."""


@dataclass
class Thawed(ImageAttack):
    def search(self, victim, clean, goal, budget, seeds):
        return clean


class Bare(ImageAttack):
    def search(self, victim, clean, goal, budget, seeds):
        return clean


@dataclass(frozen=True)
class Listed(ImageAttack):
    places: list[int] = dataclasses.field(default_factory=list)

    def search(self, victim, clean, goal, budget, seeds):
        return clean
'''


@pytest.fixture(autouse=True)
def _forgets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(own.VARIABLE, raising=False)
    own.forget()
    before = list(sys.path)
    yield
    sys.path[:] = before
    own.forget()


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def call(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, list(arguments), prog_name="crossguard")
    return done.exit_code, done.stdout, done.stderr


def refusal(work: Any) -> str:
    with pytest.raises(CrossguardError) as refused:
        work()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_file_is_listed_explained_and_corrected_without_being_run(mine: Path):
    listed = call("words", "--words", "mine.py")[1]
    attacks = listed.partition("\nattack\n")[2].partition("\n\n")[0] or listed.partition("attack\n")[2]
    assert "  Corner " in attacks and "Goes to the corner of the box\n" in attacks and "  PGD " in attacks
    assert "Halves" not in listed
    assert "  times: int = 1\n" in call("words", "Corner", "--words", "mine.py")[1]
    asked = (
        "eval",
        "--task",
        "ZeroShot(Scenes())",
        "--model",
        "Tiny()",
        "--budget",
        "Linf(1/255)",
        "--words",
        "mine.py",
    )
    assert "did you mean 'Corner'" in call(*asked, "--attack", "Cornr()")[2]
    assert "did you mean 'times'" in call(*asked, "--attack", "Corner(tims=1)")[2]
    own.forget()
    assert "unknown name 'Corner'" in refusal(lambda: build("Corner()"))


def test_listing_leaves_a_plain_file_unrun(mine: Path):
    mine.write_text(MINE.partition("@dataclasses.dataclass")[0])
    call("words", "--words", "mine.py")
    assert not (mine.parent / "ran").exists()
    assert build("Corner(2)").times == 2 and (mine.parent / "ran").exists()


def test_the_source_of_a_file_says_what_its_classes_say(mine: Path):
    file = own.add(mine)
    for name in ("Corner", "Corners"):
        read = signatures._class(file.home, name)
        assert read is not None and read.word and read.plain
        assert read.signature == signatures.of(find(name)) == signatures.find(name)
    assert signatures.find("Edge") == signatures.of(find("Edge")), "whose base cannot be seen in the source"


def test_words_of_a_file_are_words(mine: Path):
    own.add("mine.py")
    word = build("Corner(times=3)")
    assert show(word) == "Corner(times=3, loss=Margin())" and build(show(word)) == word
    assert {"Corner", "Corners"} <= set(names())
    clean = torch.rand(2, 3, 4, 4)
    moved = word(lambda images: images.flatten(1), clean, torch.zeros(2, dtype=torch.long), Linf(0.1))
    assert torch.allclose(moved, (clean + 0.1).clamp(max=1))


def test_what_is_no_word_says_why(mine: Path):
    own.add(mine)
    assert "Thawed is no word: put @dataclass(frozen=True) above the class" in refusal(lambda: build("Thawed()"))
    assert "mine.py has a class Bare; a word needs @dataclass(frozen=True)" in refusal(lambda: build("Bare()"))
    assert "its field places is of the type list[int], which has no text" in refusal(lambda: build("Listed()"))
    assert "it does not say " in refusal(lambda: build("Halves()"))


def test_files_that_are_no_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def said(content: str | bytes, name: str = "x.py") -> str:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return refusal(lambda: own.add(name))

    assert "'none.py' cannot be read (no such file or directory); give a Python file" in refusal(
        lambda: own.add("none.py")
    )
    assert "'x.py', line 2, is not Python: " in said("a = 1\nb = = 2")
    assert "it is not UTF-8 text" in said(b"\xff\xfe")
    assert "'x.py' has no words" in said("a = 1")
    assert "put @dataclass(frozen=True) above A" in said("class A: pass")
    words = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass {}: pass\n"
    assert "'x.py' has a class PGD, which is the name of another word" in said(words.format("PGD"))
    assert not own.names()
    Path("y.py").write_text(words.format("Twice"))
    own.add("y.py")
    assert "'x.py' has a class Twice, which is the name" in said(words.format("Twice"))
    Path("z.py").write_text(words.format("Late") + "\nimport nowhere_at_all")
    own.add("z.py")
    assert "z.py', line 5, cannot be run: ModuleNotFoundError: No module" in refusal(lambda: build("Late"))
    assert "line 5, cannot be run" in refusal(lambda: build("Late")), "it fails alike when asked again"


GRID = """
task = "ZeroShot(Scenes('object'))"
model = "Tiny()"
attack = "Corner()"
budget = "Linf(1/255)"
limit = 1
words = ["mine.py"]
"""


def test_an_experiment_of_a_stranger_runs_no_code(mine: Path, monkeypatch: pytest.MonkeyPatch):
    Path("far").mkdir()
    grid = Path("far/grid.toml")
    grid.write_text(GRID.replace("mine.py", "../mine.py"))
    code, out, said = call("run", str(grid), "--out", "out")
    assert (code, out) == (2, "") and said.count("\n") == 1
    assert "would run the code of 'far/../mine.py'; if you trust it, say so with --trust" in said
    assert not Path("ran").exists() and not Path("out").exists() and "Corner" not in names()
    assert build(next(iter(Experiment.load(grid, trust=True).cells())).question["attack"]).times == 1
    own.forget()
    own.add(mine)  # by hand
    assert len(Experiment.load(grid).cells()) == 1
    own.forget()
    monkeypatch.setenv(own.VARIABLE, str(mine))
    assert len(Experiment.load(grid).cells()) == 1
    grid.write_text(GRID.replace('["mine.py"]', "[3]"))
    assert "words must be a list of Python files" in refusal(lambda: Experiment.load(grid))
    grid.write_text(GRID.replace("mine.py", "none.py"))
    assert "grid.toml: words: 'far/none.py' cannot be read" in refusal(lambda: Experiment.load(grid, trust=True))


def test_a_changed_file_asks_the_questions_again(mine: Path):
    Path("grid.toml").write_text(GRID)
    told = []
    for change in ("", "", "# another line\n"):
        mine.write_text(MINE + change)
        code, _, said = call("run", "grid.toml", "--trust")
        assert code == 0, said
        told.append(said.splitlines()[0])
    assert told == ["1 cells, 0 answered already", "1 cells, 1 answered already", "1 cells, 0 answered already"]
    reports = [path for path in Path("runs/grid").glob("*.json") if path.name != "experiment.json"]
    asked = [json.loads(path.read_text())["question"] for path in reports]
    assert len({question["attack files"] for question in asked}) == 2
    assert len({question["attack"] for question in asked}) == 1


def test_what_a_file_imports_from_beside_it_counts(tmp_path: Path):
    (tmp_path / "far.py").write_text("EPS = 1\n")
    (tmp_path / "near.py").write_text("def step():\n    from far import EPS\n    return EPS\n")
    text = MINE.replace("import dataclasses\n", "import dataclasses\nfrom near import step\n", 1)
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "nobody.py").write_text("")
    told = []
    for file, content in (("nobody.py", "1"), ("far.py", "EPS = 2\n"), ("near.py", "def step():\n    return 3\n")):
        own.forget()
        own.add(tmp_path / "mine.py")
        told.append(contents(build("Corner()")))
        (tmp_path / file).write_text(content)
        sys.modules.pop("near", None)
    own.forget()
    own.add(tmp_path / "mine.py")
    told.append(contents(build("Corner()")))
    sys.modules.pop("near", None)
    sys.modules.pop("far", None)
    assert told[0] == told[1], "what it does not import"
    assert len(set(told)) == 3 and all(one.startswith("Corner.code:") for one in told)


def test_code_of_ones_own_is_in_every_part_of_a_question(mine: Path):
    own.add(mine)

    @dataclasses.dataclass(frozen=True)
    class Narrow(Linf):
        pass

    asked = question(ZeroShot(Scenes()), Tiny(), build("Corner()"), Narrow(0.1))
    assert asked["attack files"].startswith("Corner.code:") and asked["budget files"].startswith("Narrow.code:")
    plain = question(ZeroShot(Scenes()), Tiny(), crossguard.PGD(), Linf(0.1))
    assert "attack files" not in plain and "budget files" not in plain and "code" not in plain["weights"]


def test_a_registered_class_is_a_word():
    @register
    @dataclasses.dataclass(frozen=True)
    class Mine(crossguard.ImageAttack):
        """Does nothing."""

        size: int = 3

        def search(self, victim: Any, clean: Any, goal: Any, budget: Any, seeds: Any) -> Any:
            return clean

    assert build("Mine(4)") == Mine(4) and show(Mine()) == "Mine(size=3)"
    assert "  Mine " in call("words")[1]

    @dataclasses.dataclass(frozen=True)
    class Other:
        pass

    Other.__name__ = "Mine"
    assert "is called Mine, which is the name of another word" in refusal(lambda: register(Other))
    Other.__name__ = "PGD"
    assert "is called PGD" in refusal(lambda: register(Other))
    assert build("Mine()") == Mine()


def test_registering_what_is_no_word_says_why():
    class Plain:
        pass

    @dataclasses.dataclass
    class Thawed:
        pass

    for kind, said in ((Plain, "Plain is no word: put @dataclass(frozen=True)"), (Thawed, "Thawed is no word: put"),
                       (crossguard.Attack, "Attack is no word")):  # fmt: skip
        assert said in refusal(lambda kind=kind: register(kind))


CELL = """
import dataclasses
STEP = {step}
def twice(x):
    return {twice}
@dataclasses.dataclass(frozen=True)
class Cell:
    size: int = 1
    kind = {kind!r}
    def ask(self):
        return twice(STEP)
    @property
    def half(self):
        return {half}
"""


def test_a_notebook_has_no_file_so_the_code_counts(monkeypatch: pytest.MonkeyPatch):
    notebook = types.ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, "a_notebook", notebook)

    def made(**changes: Any) -> str:
        cell = {"step": 1, "twice": "2 * x", "kind": "a", "half": "self.size / 2"} | changes
        exec(CELL.format(**cell), vars(notebook))
        return own.code(vars(notebook)["Cell"])

    told = [made(), made(step=2), made(twice="x + x"), made(kind="b"), made(half="self.size / 3")]
    assert len(set(told)) == 5 and all(told)
    assert made() == told[0]


def test_the_environment_names_files(mine: Path, monkeypatch: pytest.MonkeyPatch):
    other = mine.with_name("other.py")
    other.write_text(
        MINE.replace("Corner", "OtherCorner")
        .replace("Edge", "OtherEdge")
        .replace("Halves", "Wholes")
        .replace("Thawed", "A")
        .replace("Listed", "B")
    )
    monkeypatch.setenv(own.VARIABLE, os.pathsep.join([str(mine), str(other)]))
    assert build("Corner()").times == 1 and build("OtherCorner()").times == 1
    monkeypatch.setenv(own.VARIABLE, "none.py")
    assert f"{own.VARIABLE}: 'none.py' cannot be read" in refusal(lambda: build("Nobody()"))


def test_listing_words_of_a_file_is_light(mine: Path):
    mine.write_text(MINE.partition("@dataclasses.dataclass")[0])
    code = (
        "import sys, crossguard.cli\n"
        "try: crossguard.cli.main(['words', 'Corner', '--words', 'mine.py'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "times: int = 1" in done.stdout


@pytest.mark.slow
def test_every_process_of_torchrun_knows_the_words(mine: Path):
    asked = ("eval", "--task", "ZeroShot(Scenes('object'))", "--model", "Tiny()", "--attack", "Corner()", "--budget",
             "Linf(8/255)", "--limit", "6", "--words", "mine.py", "--device", "cpu")  # fmt: skip
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "crossguard"]
    for prefix, out in ((run, "two.json"), ([sys.executable, "-m", "crossguard"], "one.json")):
        subprocess.run([*prefix, *asked, "--out", out], check=True, capture_output=True, timeout=200)
    one, two = (json.loads(Path(file).read_text()) for file in ("one.json", "two.json"))
    assert one["question"] == two["question"] and "Corner.code:" in one["question"]["attack files"]
    for column in ("id", "label", "clean", "adversarial"):
        assert one["outcomes"][column] == two["outcomes"][column]
    assert one["outcomes"]["adversarial_margin"] == pytest.approx(two["outcomes"]["adversarial_margin"], abs=1e-3)
