"""What scripts and notebooks see: attacks on tensors, rates as numbers, frames, pictures, a bar."""

from __future__ import annotations

import inspect
import io
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import crossguard
from crossguard import (
    APGD,
    PGD,
    Both,
    Linf,
    Report,
    Retrieval,
    Scenes,
    Substitute,
    Tiny,
    Untargeted,
    Words,
    ZeroShot,
    evaluate,
    look,
)
from crossguard.errors import CrossguardError
from crossguard.report import Rate

TASK = ZeroShot(Scenes("object"))


def refusal(work: Any) -> str:
    with pytest.raises(CrossguardError) as refused:
        work()
    assert "\n" not in str(refused.value)
    return str(refused.value)


class Linear(nn.Module):
    """The logits are sums of pixels; nothing of Crossguard's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


def test_attacks_take_any_module_images_and_labels():
    torch.manual_seed(0)
    net, images = Linear(), 0.25 + torch.rand(5, 3, 4, 4) / 2
    with torch.no_grad():
        labels = net(images).argmax(1)
    for attack in (PGD(), APGD(steps=5)):
        moved = attack(net, images, labels, Linf(8 / 255))
        assert torch.equal(moved, attack(net, images, Untargeted(labels), Linf(8 / 255)))
        assert 0 < (moved - images).abs().max() <= 8 / 255 + 1e-6
        with torch.no_grad():
            margin = [out.gather(1, labels[:, None])[:, 0] - out.logsumexp(1) for out in (net(images), net(moved))]
        assert (margin[1] < margin[0]).all()
    assert torch.equal(PGD()(net, images, labels.int(), Linf(0.1)), PGD()(net, images, labels, Linf(0.1)))
    assert all(part.grad is None for part in net.parameters())


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1], "one for each image: torch.as_tensor(labels), not a list"),
        (torch.zeros(2).numpy(), "torch.as_tensor(labels), not a ndarray"),
        (3, "one for each image, not a int; else give a goal such as Targeted(classes)"),
        (torch.zeros(2), "not float32; give labels.long()"),
        (torch.zeros(2, dtype=torch.bool), "not bool; give labels.long()"),
        (torch.zeros(2, 3), "not of shape (2, 3); of scores or one-hot rows they are scores.argmax(1)"),
        (torch.zeros(3, dtype=torch.long), "Untargeted has 3 entries for 2 images"),
    ],
)
def test_what_is_no_label_says_what_would_be(labels: Any, said: str):
    ready: Any = inspect.unwrap(PGD.ready)  # as it is where nobody checks types
    assert said in refusal(lambda: ready(PGD(), Linear(), torch.rand(2, 3, 4, 4), labels, Linf(0.1), None))


def test_a_rate_is_a_number_and_is_formatted_as_one():
    rate = Rate(13, 20)
    assert float(rate) == 0.65 and f"{rate:.3f}" == "0.650" and f"{rate:.0%}" == "65%"
    assert f"{rate}" == str(rate) == "65.0 % [43.3, 81.9]"


def told(capsys: pytest.CaptureFixture[str], work: Any) -> list[str]:
    capsys.readouterr()
    work()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("task", "attack", "budget"),
    [
        (TASK, PGD(steps=2), Linf(8 / 255)),
        (TASK, crossguard.Joint(PGD(steps=1), Substitute()), Both(Linf(1 / 255), Words(1))),
        (Retrieval(Scenes("object")), Substitute(), Words(1)),
    ],
)
def test_a_report_shows_what_show_shows_of_a_kept_folder(
    task: Any, attack: Any, budget: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    report = evaluate(task, Tiny(), attack, budget, limit=10, batch=4, out=tmp_path / "kept" / "report.json",
                      keep=tmp_path / "kept")  # fmt: skip
    kept = look.Look(tmp_path / "kept")
    console = Console(markup=False, highlight=False)

    def shown(count: int) -> None:
        for number, sample in enumerate(kept.pick(count), 1):
            for line in look.lines(number, sample, False):
                console.print(line, soft_wrap=True)

    for count in (2, look.SHOWN):
        assert told(capsys, lambda count=count: report.show(count)) == told(capsys, lambda count=count: shown(count))
    assert len([line for line in told(capsys, lambda: report.show(100)) if line[:1].isdigit()]) == look.SHOWN
    assert "its images are no longer in memory" in refusal(Report.load(tmp_path / "kept" / "report.json").show)
    assert "count must be a whole number of at least 1" in refusal(lambda: report.show(0))


def test_nobody_attacked_so_nothing_is_to_be_shown():
    assert "since nobody attacked" in refusal(evaluate(TASK, Tiny(), limit=2).show)


def test_a_notebook_gets_pictures_in_a_piece_of_a_page(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    pages: list[str] = []
    shell, display = ModuleType("IPython"), ModuleType("IPython.display")
    vars(shell)["get_ipython"] = lambda: SimpleNamespace(kernel=1)
    vars(display).update(HTML=lambda text: text, display=pages.append)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    report = evaluate(TASK, Tiny(), PGD(steps=1), Linf(8 / 255), limit=3, progress=False)
    report.show(2)
    assert len(pages) == 1 and pages[0].count("<section") == 2
    assert pages[0].count("data:image/png;base64,") == 6, "clean, perturbation and under attack of each"
    assert "<html" not in pages[0] and "<body" not in pages[0] and capsys.readouterr().out == ""


def test_a_frame_has_a_row_for_each_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    report = evaluate(TASK, Tiny(), PGD(steps=1), Linf(8 / 255), limit=3)
    assert "pip install pandas" in refusal(report.frame)
    pandas = ModuleType("pandas")
    vars(pandas)["DataFrame"] = dict
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    frame = report.frame()
    assert set(frame) == {*report.outcomes.columns, "label_name", "clean_name", "adversarial_name"}
    assert {len(column) for column in frame.values()} == {3}
    assert frame["label_name"] == [Scenes("object").names[label] for label in frame["label"]]
    ranks = evaluate(Retrieval(Scenes("object")), Tiny(), limit=2)
    assert set(ranks.frame()) == set(ranks.outcomes.columns)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_moves_where_somebody_sees_it(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    for stream, progress in ((Terminal(), None), (Terminal(), False), (io.StringIO(), None)):
        monkeypatch.setattr(sys, "stderr", stream)
        evaluate(TASK, Tiny(), limit=4, batch=2, progress=progress)
        said.append(stream.getvalue())
    assert "evaluating" in said[0] and "2/4" in said[0] and "4/4" in said[0]
    assert said[1:] == ["", ""]
