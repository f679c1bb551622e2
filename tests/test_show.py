"""Keep what an attack makes, and look at it: on a terminal, as a picture, as a page."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from crossguard.datasets.kept import Kept
from crossguard.look import FORMATS, Look, Shot, lines, marks, picture
from crossguard.report import Report
from test_cli import call, error

LIMIT = 6
ATTACK = ("--model", "Tiny()", "--attack", "Independent(PGD(steps=3), Substitute())")
ATTACK += ("--budget", "Both(Linf(8/255), Words(1))", "--limit", str(LIMIT))
TASKS = {"classes": "ZeroShot(Scenes('color'))", "captions": "Retrieval(Scenes('color'))"}
drawing = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


Made = Callable[[str], tuple[Path, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Gives the folder of a task, and what the command that made it said."""

    @cache
    def make(name: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp("kept") / name
        command = ("attack", "--task", TASKS[name], *ATTACK, "--keep", str(folder), "--show", "2")
        result = call(*command)
        assert result.exit_code == 0, result.output
        return folder, result.stdout

    return make


@pytest.fixture(params=list(TASKS))
def kept(request: pytest.FixtureRequest, made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made(request.param)[0], tmp_path / request.param))


@pytest.fixture
def classes(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("classes")[0], tmp_path / "kept"))


@pytest.fixture
def captions(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("captions")[0], tmp_path / "kept"))


def said(*arguments: str) -> str:
    result = call("show", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes the index of a folder; a function gets what stood there."""
    path = folder / "kept.json"
    content = json.loads(path.read_text())
    for name, change in changes.items():
        content[name] = change(content[name]) if callable(change) else change
    path.write_text(json.dumps(content))


def titles(text: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", text, re.MULTILINE)


# Keeping


@pytest.mark.parametrize("name", list(TASKS))
def test_attack_keeps_images_and_report_and_shows_the_first(name: str, made: Made) -> None:
    folder, text = made(name)
    report = Report.load(folder / "report.json")
    assert len(Kept(str(folder))) == LIMIT and report.question["attack"].startswith("Independent(")
    assert [path.name for path in folder.glob(".*")] == [".lock"], "something unfinished is left"
    assert f"written to {folder / 'report.json'}" in text and len(titles(text)) == 2
    assert text.endswith(f"'crossguard show {folder}' shows more\n")
    assert all(sample["index"] == int(sample["id"].split("/")[-1]) for sample in Look(folder).kept.samples)


@pytest.mark.parametrize(
    ("missing", "said"), [("--attack", "--attack"), ("--budget", "PGD() needs a budget"), ("--keep", "--keep")]
)
def test_attack_needs_attack_budget_and_folder(missing: str, said: str, tmp_path: Path) -> None:
    given = {"--attack": "PGD()", "--budget": "Linf(8/255)", "--keep": str(tmp_path / "kept")}
    rest = [text for option, value in given.items() if option != missing for text in (option, value)]
    assert said in error("attack", "--task", TASKS["classes"], "--model", "Tiny()", *rest)


def test_attack_without_an_attack_is_a_mistake(tmp_path: Path) -> None:
    arguments = ("attack", "--task", TASKS["classes"], "--model", "Tiny()", "--keep", str(tmp_path / "kept"))
    assert "--attack None makes nothing" in error(*arguments, "--attack", "None", "--budget", "None")
    assert "--show must be" in error(*arguments, "--attack", "PGD()", "--budget", "Linf(8/255)", "--show", "-1")
    assert not (tmp_path / "kept").exists()
    (tmp_path / "kept" / "report.json").mkdir(parents=True)
    assert "is a folder" in error(*arguments, "--attack", "PGD()", "--budget", "Linf(8/255)")


def test_another_report_and_no_samples(tmp_path: Path) -> None:
    folder, other = tmp_path / "a folder", tmp_path / "other.json"
    result = call(
        "attack", "--task", TASKS["classes"], "--model", "Tiny()", "--attack", "PGD(steps=1)",
        "--budget", "Linf(4/255)", "--limit", "2", "--keep", str(folder), "--keep-as", "png", "--out", str(other),
        "--show", "0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert other.read_bytes() == (folder / "report.json").read_bytes()
    assert not titles(result.stdout) and f"'crossguard show '{folder}'' shows more" in result.stdout
    shots, doubt = Look(folder).shots(Look(folder).pick(2))
    assert doubt == "" and all(shot.clean is not None for shot in shots), "rounded images are near enough"
    assert "Linf 4/255 of at most 4/255" in said(str(folder))


# Looking


def test_show_tells_of_classes(classes: Path) -> None:
    text = said(str(classes))
    assert len(titles(text)) == 4
    report = Report.load(classes / "report.json")
    look = Look(classes)
    for number, sample in enumerate(look.pick(LIMIT)):
        label, before, after = (
            look.kept.names[int(column[number])]
            for column in map(list, (report.outcomes.label, report.outcomes.clean, report.outcomes.adversarial))  # pyright: ignore
        )
        assert dict(sample.facts)["label"] == label and dict(sample.facts)["answer"] == f"{before} -> {after}"
        assert [name for name, _ in sample.texts] == list(dict.fromkeys((label, before, after)))
        assert sample.verdict.right == (label == before) and sample.verdict.stands == (label == after)
    assert "perturbation  Linf 8/255 of at most 8/255" in text
    assert re.search(r"\[-\w+-\]\{\+\w+\+\}", text), "no change is marked"


def test_show_tells_of_captions(captions: Path) -> None:
    text = said(str(captions), "--count", "1")
    report = Report.load(captions / "report.json").ranks
    sample = Kept(str(captions)).samples[0]
    changed = sum(new != old for new, old in zip(sample["texts"], sample["clean_texts"], strict=True))
    assert re.search(rf"captions +{len(sample['texts'])}, of which {changed} changed", text)
    among = {0: len(report) - report.images, 1: report.images}
    ranks = {
        one: f"rank {int(old) + 1} -> {int(new) + 1} of {among[int(text)]}"
        for one, text, old, new in zip(report.id, report.text, report.clean, report.adversarial, strict=True)
    }
    assert re.search(f"image to text +{ranks[sample['id']]}", text)
    for number in range(len(sample["texts"])):
        rank = ranks[f"{sample['id']}#{number}"]
        assert re.search(rf"caption {number + 1} \((changed|as it was), {rank}\)", text)
    (captions / "report.json").unlink()
    text = said(str(captions), "--count", "1")
    assert "rank" not in text and re.search(r"caption 1 \((changed|as it was)\)", text)


def test_samples_are_shown_by_their_ids(classes: Path) -> None:
    samples = Kept(str(classes)).samples
    text = said(str(classes), "--id", samples[5]["id"], "--id", samples[2]["id"])
    assert [samples[5]["id"] in titles(text)[0], samples[2]["id"] in titles(text)[1], len(titles(text))] == [
        True,
        True,
        2,
    ]
    lead = f"{samples[5]['clean_margin']:+.2f} -> {samples[5]['adversarial_margin']:+.2f}"
    assert f"lead          {lead} logits" in text
    assert "has no sample 'nowhere'" in error("show", str(classes), "--id", "nowhere")


def test_a_report_of_another_question_has_no_ranks_here(captions: Path) -> None:
    path = captions / "report.json"
    path.write_text(path.read_text().replace('"seed": "0"', '"seed": "1"'))
    assert "rank" not in said(str(captions))


def test_changed_comes_first(kept: Path) -> None:
    changes = {"clean": 0, "adversarial": 0, "label": 0, "right": True, "stands": True}

    def one_lost(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        samples = [sample | changes for sample in samples]
        return [*samples[:-1], samples[-1] | {"adversarial": 1, "stands": False}]

    (kept / "report.json").unlink()
    rewrite(kept, samples=one_lost)
    plainly, first = (titles(said(str(kept), "--count", "2", *option)) for option in ((), ("--changed",)))
    assert [title.split(": ")[1] for title in plainly] == ["right -> right"] * 2
    assert [title.split(": ")[1] for title in first] == ["right -> wrong", "right -> right"]
    assert first[1] == plainly[0]
    assert "6 samples, of which the attack turned 1 from right to wrong" in said(str(kept))


def test_marks_of_changes() -> None:
    assert marks("a red circle", "a red circle") == (("same", "a red circle"),)
    assert marks("a red circle", "a blue circle") == (
        ("same", "a"), ("old", "red"), ("new", "blue"), ("same", "circle"),
    )  # fmt: skip
    assert marks("a red circle", "a blue ring") == (("same", "a"), ("old", "red circle"), ("new", "blue ring"))
    assert marks("a circle here", "a ci rcle here") == (
        ("same", "a"), ("old", "circle"), ("new", "ci rcle"), ("same", "here"),
    )  # fmt: skip
    assert marks("a b", "a") == (("same", "a"), ("old", "b"))
    assert marks("", "a") == (("new", "a"),)


def test_colors_mark_on_a_terminal(classes: Path) -> None:
    (sample,) = Look(classes).pick(1)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    for line in lines(1, sample, True):
        console.print(line)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "\x1b[9;31m" in text and "\x1b[1;32m" in text and "[-" not in text


def test_a_sample_that_is_hostile_to_terminals_and_pages(captions: Path, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \x1b[2J"

    def hostile(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        texts = [f"{evil} $x$", *samples[0]["texts"][1:]]
        return [samples[0] | {"id": f"{samples[0]['id']}<img src=x>", "texts": texts}, *samples[1:]]

    rewrite(captions, samples=hostile)
    out = tmp_path / "page.html"
    text = said(str(captions), "--count", "1", "--out", str(out))
    page = out.read_text()
    assert "\x1b" not in text + page
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page


# Pictures and pages


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def _without_images(page: Path) -> str:
    return re.sub(r'src="data:image/png;base64,[^"]*"', "", page.read_text())


def test_a_page_needs_no_other_file(kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "page.HTML"
    assert f"written to {out}" in said(str(kept), "--count", "3", "--out", str(out))
    tags = _Tags(out.read_text()).found
    names = [tag for tag, _ in tags]
    assert names.count("section") == 3 and names.count("img") == 9 and "del" in names and "ins" in names
    assert not {"script", "link", "iframe"} & set(names) and not re.search(r"//|url\(|@import", _without_images(out))
    (policy,) = (held["content"] for tag, held in tags if held.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    sources = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    images = [Image.open(io.BytesIO(base64.b64decode(source.split("base64,")[1]))) for source in sources]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert {(image.format, image.size) for image in images} == {("PNG", (32, 32))}
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@drawing
def test_a_picture(kept: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    said(str(kept), "--count", "1", "--out", str(one))
    said(str(kept), "--count", "2", "--out", str(two))
    first, second = Image.open(one), Image.open(two)
    assert first.format == "PNG" and first.width == second.width and first.height < second.height
    assert len(first.convert("RGB").getcolors(1 << 24) or ()) > 500, "there are no images in the picture"
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["one.png", "two.png"]


@drawing
def test_a_picture_has_images_in_equal_boxes_and_nothing_in_its_margins(classes: Path) -> None:
    rewrite(classes, samples=lambda samples: [samples[0] | {"id": "W" * 300}, *samples[1:]])
    look = Look(classes)
    magenta = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    shots = [Shot(magenta.expand(3, *size), None) for size in ((5, 10), (900, 300))]
    drawn = np.asarray(Image.open(io.BytesIO(picture(look, look.pick(2), shots, "x " * 200))).convert("RGB"))
    rows, columns = np.nonzero((drawn == (255, 0, 255)).all(2))
    gap = int(np.argmax(np.diff(np.unique(rows)))) + 1  # between the two images
    wide, tall = (np.isin(rows, part) for part in np.split(np.unique(rows), [gap]))
    for image, (height, width) in ((wide, (130, 260)), (tall, (260, 87))):
        assert abs(np.ptp(rows[image]) + 1 - height) <= 2 and abs(np.ptp(columns[image]) + 1 - width) <= 2
        assert abs(columns[image].mean() - (30 + 130)) <= 1, "the image is not in the middle of its box"
    rows, columns = np.nonzero((drawn < 250).any(2))
    assert min(rows.min(), columns.min(), *np.subtract(drawn.shape[:2], (rows.max(), columns.max()))) >= 28


@drawing
def test_a_picture_is_not_endless(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossguard.look.TALLEST", 1000)
    out = classes / "a.png"
    assert "too tall; give a smaller --count" in error("show", str(classes), "--count", "6", "--out", str(out))
    assert not out.exists()


def test_without_matplotlib_a_picture_is_one_sentence(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "a picture needs matplotlib" in error("show", str(classes), "--out", str(classes / "a.png"))


def test_a_perturbation_is_magnified_around_grey() -> None:
    clean = torch.full((3, 2, 2), 0.5)
    delta = torch.zeros(3, 2, 2)
    delta[0, 0, 0], delta[1, 0, 0] = 8 / 255, -4 / 255
    shot = Shot(clean + delta, clean)
    (_, (title, shown), _) = shot.panels
    assert title == "perturbation × 15" and shown is not None
    assert torch.allclose(shown[:, 0, 0], torch.tensor([0.5 + 120 / 255, 0.5 - 60 / 255, 0.5]), atol=1e-5)
    assert bool((shown[:, 1] == 0.5).all())
    assert [title for title, _ in Shot(clean, clean).panels][1] == "perturbation: none"


def test_clean_images_are_found_by_id_in_old_folders(kept: Path) -> None:
    rewrite(kept, samples=lambda samples: [{k: v for k, v in one.items() if k != "index"} for one in samples])
    look = Look(kept)
    shots, doubt = look.shots(look.pick(LIMIT))
    assert doubt == ""
    for shot in shots:
        assert shot.clean is not None and float((shot.adversarial - shot.clean).abs().max()) < 8.01 / 255


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("ZeroShot(Images('/nowhere'))", "the folder '/nowhere' does not exist"),
        ("Unheard()", "unknown name 'Unheard'"),
        ("ZeroShot(Scenes('color', style='sketch'))", "the data has no sample"),
        ("ZeroShot(Subset(Scenes('color'), 1))", "the data has no sample"),
    ],
)
def test_without_the_data_the_attacked_image_is_shown_alone(
    task: str, reason: str, classes: Path, tmp_path: Path
) -> None:
    rewrite(classes, question=lambda question: question | {"task": task})
    out = tmp_path / "page.html"
    result = call("show", str(classes), "--count", "4", "--out", str(out))
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("crossguard: without clean images: ") and reason in line
    images = [attributes["alt"] for tag, attributes in _Tags(out.read_text()).found if tag == "img"]
    assert images.count("under attack") == 4 and len(images) < 12


@drawing
def test_a_picture_without_clean_images_is_narrower(classes: Path, tmp_path: Path) -> None:
    whole, alone = tmp_path / "whole.png", tmp_path / "alone.png"
    said(str(classes), "--count", "1", "--out", str(whole))
    rewrite(classes, question=lambda question: question | {"task": "Unheard()"})
    said(str(classes), "--count", "1", "--out", str(alone))
    assert Image.open(alone).width < Image.open(whole).width


def test_data_that_is_no_longer_what_it_was_is_not_shown_as_clean(kept: Path) -> None:
    rewrite(kept, samples=lambda samples: [one | {"size": 0.2} for one in samples])
    look = Look(kept)
    (shot,), doubt = look.shots(look.pick(1))
    assert shot.clean is None and "is not the image that was attacked" in doubt


# Mistakes


def test_folders_that_cannot_be_shown(tmp_path: Path, classes: Path) -> None:
    assert "holds no kept images (kept.json is missing)" in error("show", str(tmp_path / "none"))
    (tmp_path / "file").write_text("")
    assert "cannot be read (not a directory)" in error("show", str(tmp_path / "file"))
    index = classes / "kept.json"
    whole = index.read_text()
    for broken in (whole[:100], "[]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "[" * 100_000):
        index.write_text(broken)
        assert "kept.json' is broken" in error("show", str(classes))
    index.write_text(whole)
    rewrite(classes, samples=[])
    assert "holds no samples" in error("show", str(classes))


BROKEN = "; run the evaluation with --keep again"


@pytest.mark.parametrize("change", [
    {"label": 99}, {"label": -1}, {"label": "red"}, {"label": True}, {"clean": None}, {"adversarial": 10},
    {"id": 3}, {"file": 3}, {"size": None}, {"rounded_size": "x"},
])  # fmt: skip
def test_a_broken_sample_of_classes_is_one_sentence(change: dict[str, Any], classes: Path) -> None:
    rewrite(classes, samples=lambda samples: [samples[0] | change, *samples[1:]])
    told = error("show", str(classes))
    assert "kept.json' is broken: " in told and told.endswith(BROKEN)


@pytest.mark.parametrize(
    "change", [{"texts": ["a"]}, {"clean_texts": None}, {"right": "yes"}, {"stands": 1}, {"size": "x"}, {"id": 3}]
)
def test_a_broken_sample_with_captions_is_one_sentence(change: dict[str, Any], captions: Path) -> None:
    rewrite(captions, samples=lambda samples: [samples[0] | change, *samples[1:]])
    told = error("show", str(captions))
    assert "kept.json' is broken: " in told and told.endswith(BROKEN)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda texts: texts[:-1], "10 classes need the same number of prompts"),
        (lambda texts: [one * 2 for one in texts], "its classes have not as many prompts as they had"),
    ],
)
def test_prompts_that_are_not_as_many_are_one_sentence(change: Any, told: str, classes: Path) -> None:
    rewrite(classes, texts=change)
    assert f"kept.json' is broken: {told}" in error("show", str(classes))


def test_a_missing_image_file_is_one_sentence(kept: Path) -> None:
    (shard,) = kept.glob("*.safetensors")
    shard.unlink()
    assert f"the kept image file {shard} is missing" in error("show", str(kept))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--count", "0"), "--count must be a whole number of at least 1, not 0"),
        (("--out", "a.pdf"), f"--out a.pdf has an unknown ending; give one of {', '.join(FORMATS)}"),
        (("--out", "a"), "has an unknown ending"),
        (("--out", "/proc/none/a.html"), "the folder /proc/none cannot be written to"),
    ],
)
def test_mistakes_of_show(options: tuple[str, ...], said: str, classes: Path) -> None:
    assert said in error("show", str(classes), *options)


def test_a_folder_in_the_way_of_the_page(classes: Path) -> None:
    (classes / "a.html").mkdir()
    assert "is a folder; give the name of a file in it" in error("show", str(classes), "--out", str(classes / "a.html"))
