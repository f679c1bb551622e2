"""The audit of a defense: what is left of it when the adversary knows."""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from typer.testing import CliRunner

import crossguard.audit as audit_module
from crossguard import (
    PGD,
    TTC,
    Answer,
    BitDepth,
    Blind,
    Changed,
    CrossguardError,
    GaussianNoise,
    Linf,
    Ranks,
    Retrieval,
    Scenes,
    Square,
    Tiny,
    TinyViT,
    Untargeted,
    Wrapper,
    ZeroShot,
    evaluate,
)
from crossguard.attacks.knowledge import Adaptive
from crossguard.audit import PICTURE, TEXT, Audit, _bars, _Peak, audit, named, price
from crossguard.audit import picture as plotted
from crossguard.cli import app
from crossguard.compare import difference, paired
from crossguard.evaluate import question
from crossguard.experiment import INDEX, LOCKS, Cell, Experiment, Further, Unanswered, Watch, answered_in, dealt
from crossguard.models.base import VisionLanguageModel
from crossguard.models.kinds import Transform
from crossguard.models.wrapper import Lent
from crossguard.report import Outcomes, Rate
from crossguard.seeds import fold, keys
from crossguard.shapes import Images, PerImage
from crossguard.table import Answers
from crossguard.words import show
from toys import Dots, Toy

# --- Broken on purpose ---


@dataclass(frozen=True)
class Thermometer(Transform):
    """Codes each pixel by the levels that it is above (Buckman et al. 2018), which has no gradient."""

    base: VisionLanguageModel

    def transform(self, images: Images) -> Images:
        return torch.stack([(images > level / 32).float() for level in range(1, 33)]).mean(0)


@dataclass(frozen=True)
class Resized(Transform):
    """Enlarges an image by chance, and makes it small again (Xie et al. 2018)."""

    base: VisionLanguageModel
    random = True

    def transform(self, images: Images) -> Images:
        large = F.interpolate(F.interpolate(images, size=13, mode="bilinear"), size=6, mode="bilinear")
        chosen = self.uniform(images).flatten(1)[:, 0] > 0
        return torch.where(chosen.view(-1, 1, 1, 1), images, large)


@dataclass(frozen=True)
class Trusting(Wrapper):
    """Rounds images that have whole levels of 8 bits, and takes others for clean: so it never acts under attack."""

    base: VisionLanguageModel

    def around(self, inner: Answer, live: Lent) -> Answer:
        def gate(images: Images) -> PerImage:
            return 0.01 - (255 * images - (255 * images).round()).abs().flatten(1).amax(1)

        def act(images: Images) -> Changed:
            acts = (gate(images) > 0).view(-1, 1, 1, 1)
            made = torch.where(acts, (images * 63).round().detach() / 63, images)
            return Changed(made, {"whole levels": gate(images).detach()})

        return inner.before(act, gates={"whole levels": gate})


@dataclass(frozen=True)
class Leaking(Transform):
    """What leaves the range that all images have is part of the perturbation, and says from which label it leads away:
    goes back along it, a hundred times as far."""

    base: VisionLanguageModel

    def transform(self, images: Images) -> Images:
        return (images - 100 * (images - images.clamp(0.4, 0.6))).clamp(0, 1)


@functools.cache
def _labels(count: int) -> Tensor:
    images = torch.stack([Dots().image(index) for index in range(count)]).float() / 255
    first, second = Toy().classifier(Dots().prompts())(images).topk(2).indices.unbind(1)
    return torch.where(torch.arange(count) % 3 == 0, second, first)


@dataclass(frozen=True)
class Hard(Dots):
    """Every third image has the label that the model likes second best, so that there are mistakes to set right."""

    def labels(self) -> Tensor:
        return _labels(self.count)


TASK, BUDGET = ZeroShot(Hard(40)), Linf(6 / 255)
QUICK = PGD(steps=6, random_start=False)


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Audit]:
    """What would be drawn, which takes as long as all the rest."""
    made = list[Audit]()
    monkeypatch.setattr(audit_module, "picture", lambda one: made.append(one) or b"a picture")
    return made


def asked(model: VisionLanguageModel, out: Path, **options: Any) -> Audit:
    settings = dict[str, Any](task=TASK, attack=QUICK, samples=4, queries=40, draws=3)
    settings |= options
    return audit(settings.pop("task"), model, BUDGET, out, **settings)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Thermometer(Toy()), "no gradient leads from the answer to the pixels"),
        (Resized(Toy()), "not better than its base by more than the interval"),
        (Trusting(Toy()), "the gate 'whole levels' acts on .* and clean on 100.0 %: it lets pass what was attacked"),
        (Leaking(Toy()), "may read the label off the perturbation"),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_is_broken_falls_to_where_its_base_falls(model: VisionLanguageModel, why: str, tmp_path: Path) -> None:
    made = asked(model, tmp_path)
    assert made.base is not None
    ours, base = (ladder.worst.parts[0][2] for ladder in (made.defense, made.base))
    assert ours.value <= base.interval[1], "no broken defense is left standing above its base"
    assert any(re.search(why, doubt) for doubt in made.doubts), made.doubts
    compared = {Trusting: "lead astray (masked)", Leaking: "the first is a number of ignorance"}.get(type(model))
    if compared is not None:
        assert any(compared in doubt for doubt in made.doubts), "rungs are compared with each other"
    assert (made.unanswered is not None) == isinstance(model, Thermometer)
    left = made.defense.worst.correct & made.defense.worst.standing
    assert {rung.name for rung in made.defense.attacked} >= {"blind", "blind, PGD-10", "blind, PGD-100", "queries"}
    for rung in made.defense.rungs:
        assert not (left & ~(rung.outcomes.correct & rung.outcomes.standing)).any(), "no rung is below the worst case"


def test_a_ladder_without_some_rungs_does_not_look_whole(tmp_path: Path) -> None:
    made = asked(Thermometer(Toy()), tmp_path, queries=0, limit=16)
    assert made.defense.missing == ("straight", "own label") and made.defense.among == "3 of 5 adversaries"
    lines = made.lines()
    for name in made.defense.missing:
        assert f"| Thermometer(Toy(5.0)) | {name} | | | | not answered |" in lines
    (worst,) = [line for line in lines if line.startswith("| Thermometer(Toy(5.0)) | **worst")]
    assert "| 3 of 5 adversaries |" in worst
    assert sum(line.startswith("**Not complete**: the worst case of Thermometer") for line in lines) == 1
    assert made.base is not None and not made.base.missing and made.base.among == "all 4 adversaries"
    bars = [(name, rate is None) for name, rate, _ in _bars(made, made.defense, 0)]
    assert bars[-3:] == [("straight", True), ("own label", True), ("worst case of 3 of 5 adversaries", False)]
    assert plotted(made)[:4] == b"\x89PNG"


def test_noise_that_is_not_declared_is_found(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Secret(Transform):
        base: VisionLanguageModel

        def transform(self, images: Images) -> Images:
            return (images + 0.02 * self.normal(images)).clamp(0, 1)

    made = asked(Secret(Toy()), tmp_path, queries=0, limit=16)
    assert any("Secret answers otherwise when asked again and does not say so" in doubt for doubt in made.doubts)
    assert "average over noise" not in {rung.name for rung in made.defense.rungs}


# --- The ladder ---


def test_rungs_follow_from_what_a_defense_says_of_itself() -> None:
    def names(model: VisionLanguageModel, queries: int = 10) -> list[str]:
        goal = Untargeted(torch.tensor([0]))
        return list(named(Adaptive(QUICK, 4, queries), model.answer(TASK.data.prompts()), goal, BUDGET))

    blind, black = ["blind, PGD-10", "blind, PGD-100", "blind"], ["queries", "query, hard labels"]
    assert names(Toy()) == ["PGD-10", "PGD-100", "straight", "own label", *black]
    assert names(BitDepth(Toy()), 0) == [*blind, "straight", "own label", "smooth stand-in"]
    assert names(TTC(Trusting(Toy()))) == [
        *blind[:2], "blind", "blind to the outer 1 of 2", "straight", "average over noise", "own label",
        "at the gate tau", "at the gate whole levels", "smooth stand-in", *black,
    ]  # fmt: skip


def test_a_model_without_a_defense_has_no_base(tmp_path: Path) -> None:
    made = asked(Toy(), tmp_path, limit=16)
    assert made.base is None and not any("base" in line for line in made.lines())
    assert [rung.name for rung in made.defense.rungs] == [
        "clean",
        "PGD-10",
        "PGD-100",
        "straight",
        "own label",
        "queries",
        "query, hard labels",
    ]
    with pytest.raises(CrossguardError, match="no base to be compared with"):
        made.difference()


def test_an_audit_goes_on_and_tables_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a random defense beside others: the worst case of the table is that of the ladder."""
    model, beside = GaussianNoise(Toy(), 0.03), {"b|t`s": BitDepth(Toy(), 4)}

    def again() -> Audit:
        return asked(model, tmp_path, against=beside, transfer={"far": Toy(7.0)}, limit=24)

    first = again()

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("this was answered already")

    monkeypatch.setattr(sys.modules["crossguard.evaluate"], "evaluate", refused)
    second = again()
    told = [[line for line in one.lines() if "|" not in line or "%" in line] for one in (first, second)]
    assert told[0] == told[1] and (tmp_path / PICTURE).read_bytes() == b"a picture"
    assert plotted(first)[:4] == b"\x89PNG"
    names = [{rung.name.removeprefix("blind, ") for rung in ladder.attacked} for ladder in first.ladders]
    assert all(own >= {"crafted on far", "PGD-10", "PGD-100", "queries"} for own in names), "none of them is spared"
    lines = (tmp_path / TEXT).read_text().splitlines()
    assert any(line.startswith(r"| b\|t\`s | clean |") for line in lines), "a name is no markup"
    assert {line.replace(r"\|", "").count("|") for line in lines if "%" in line and line[0] == "|"} == {7}
    assert all("by most draws" in dict(rung.report.lines()) for rung in first.defense.attacked)
    (table,) = Answers.load(tmp_path).pooled().tables()
    assert table.columns == ("clean", "worst case, Linf(6/255)"), "one column, however many reports there are"
    for (label, (clean, worst)), ladder in zip(table.rows, first.ladders, strict=True):
        assert label == f"{ladder.name} (several adversaries, {len(ladder.attacked)} reports)"
        ((_, before, after),) = ladder.worst.parts
        assert (clean.rate, worst.rate) == (before, after)


@pytest.mark.parametrize("model", [TTC(Toy(), tau=0.02), BitDepth(Toy(), 4)], ids=lambda one: type(one).__name__)
def test_the_worst_case_is_that_of_all_rungs_about_all_samples(model: VisionLanguageModel, tmp_path: Path) -> None:
    """Each dear rung is asked about what stood after all before it, and finds there what it finds among all."""
    few = dict[str, Any](queries=5, samples=1, limit=24)
    quick, slow = asked(model, tmp_path / "quick", batch=13, **few), asked(model, tmp_path / "slow", whole=True, **few)
    assert sum(rung.staged for rung in quick.defense.rungs) >= 4
    saved = list[int]()
    for ours, theirs in zip(quick.ladders, slow.ladders, strict=True):
        assert [rung.name for rung in ours.rungs] == [rung.name for rung in theirs.rungs]
        left = ours.clean.judged.correct
        for one, other in zip(ours.rungs, theirs.rungs, strict=True):
            assert not other.staged and one.staged == (one.name not in WHOLE)
            said, all_said = one.outcomes, other.outcomes
            assert isinstance(said, Outcomes) and isinstance(all_said, Outcomes)
            asked_of = left if one.staged else np.ones(len(left), bool)
            if one.staged:
                assert one.report.asked == tuple(np.asarray(said.id)[left]) and one.asked() == left.sum()
                saved.append(int((~left).sum()))
                assert not np.asarray(said.forwards)[~left].any(), "nothing was asked about the others"
            assert np.array_equal(np.asarray(said.adversarial)[asked_of], np.asarray(all_said.adversarial)[asked_of])
            now = left & all_said.standing
            assert one.broken() == (asked_of & all_said.correct & ~all_said.standing).sum()
            if one.staged:
                assert one.rate().successes == now.sum() == (said.correct & said.standing).sum()
            left = now
        worst, whole = ours.worst, theirs.worst
        assert np.array_equal(worst.correct & worst.standing, whole.correct & whole.standing)
        assert np.array_equal(worst.correct & worst.standing, left)
    assert min(saved) > 0 and max(saved) < 24, "some samples were left out, and some were asked about"
    tables = [Answers.load(tmp_path / name).pooled().tables() for name in ("quick", "slow")]
    rates = [[[cell.rate for cell in cells] for table in some for _, cells in table.rows] for some in tables]
    assert rates[0] == rates[1]
    (table,) = Answers.load(tmp_path / "quick").tables()
    later = [column for column in table.columns if ", after the others" in column]
    assert len(later) >= sum(rung.staged for rung in quick.defense.rungs), "a column says that it is of what was left"


WHOLE = ("clean", "blind, PGD-10", "blind, PGD-100", "PGD-10", "PGD-100", "blind", "straight", "average over noise")


def test_where_nothing_stands_nothing_is_asked(tmp_path: Path) -> None:
    made = audit(TASK, TTC(Toy(), tau=0.02), Linf(0.4), tmp_path, attack=QUICK, samples=1, queries=5, draws=3, limit=8)
    last = made.defense.rungs[-1]
    assert last.name == "query, hard labels" and last.report.asked == () and last.rate().successes == 0
    assert any("| 0 of 8 | 0 | 0.0 % [0.0, 32.4] |" in line for line in made.lines())
    (path,) = tmp_path.glob(f"*{last.report.key[:6]}.json")
    assert type(last.report).load(path).gates == last.report.gates == {"tau": (Rate(0, 0), Rate(0, 0))}
    again = audit(TASK, TTC(Toy(), tau=0.02), Linf(0.4), tmp_path, attack=QUICK, samples=1, queries=5, draws=3, limit=8)
    assert again.defense.worst.parts == made.defense.worst.parts


def chained() -> Experiment:
    task, budget, toy = {"t": TASK}, {"b": BUDGET}, {"toy": Toy()}
    first = {"task": task, "model": toy, "attack": {"None": None, "weak": PGD(steps=1)}, "budget": budget}
    later = {"task": task, "model": toy, "attack": {"pgd": QUICK, "more": PGD(steps=9)}, "budget": budget}
    other = first | {"model": {"far": Toy(7.0)}}
    none = {"surrogate": {"None": None}}
    return Experiment(first | none, limit=12, more=(Further(other | none),), chains=(later | none,))


def test_who_comes_later_waits_for_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process works on one of them; meanwhile cells that hang on nobody are answered."""
    monkeypatch.setattr("crossguard.experiment.POLL", 0.0)
    experiment, asked = chained(), list[str]()
    clean, weak, clean_far, weak_far, pgd, more = experiment.cells()
    assert [cell.after for cell in (clean, weak, clean_far, weak_far)] == [()] * 4
    assert pgd.after == (clean.key, weak.key) and more.after == (*pgd.after, pgd.key)
    (tmp_path / LOCKS).mkdir()
    lock = FileLock(tmp_path / LOCKS / weak.key)
    lock.acquire()

    class Releasing(Watch):
        def asks(self, cell: Cell) -> None:
            asked.append(cell.key)

        def waits(self, cells: int, others: Mapping[str, str]) -> None:
            assert cells == 3 and asked == [clean.key, clean_far.key, weak_far.key]
            lock.release()

    reports = experiment.run(tmp_path, Releasing())
    assert asked[3:] == [weak.key, pgd.key, more.key] and len(reports) == 6
    parts = [{cell.key for cell in dealt(experiment.cells(), (part, 2))} for part in (1, 2)]
    chain = {clean.key, weak.key, pgd.key, more.key}
    assert chain <= parts[0] and not chain & parts[1], "between machines nobody waits for another"


def test_who_comes_later_does_without_what_cannot_be_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["crossguard.evaluate"]
    answered = module.evaluate

    def failing(task: Any, model: Any, attack: Any, *rest: Any, **options: Any) -> Any:
        if attack == QUICK:
            raise CrossguardError("not today")
        return answered(task, model, attack, *rest, **options)

    experiment = chained()
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", failing)
        with pytest.raises(Unanswered, match="1 of 6 cells could not be answered: not today"):
            experiment.run(tmp_path)
    (more,) = [
        report for report in answered_in(tmp_path, experiment.cells()) if len(report.question.get("after", "")) > 50
    ]
    weak = next(report for report in answered_in(tmp_path, experiment.cells()) if report.attacked)
    assert more.asked == tuple(np.asarray(weak.outcomes.id)[weak.outcomes.correct & weak.outcomes.standing])
    assert len(experiment.run(tmp_path)) == 6, "and is not asked again, when that is answered"


def test_labels_are_of_one_model_each(tmp_path: Path) -> None:
    model = BitDepth(Toy())
    with pytest.raises(CrossguardError, match="is a model of this audit already; give the one to compare with another"):
        asked(model, tmp_path, against={show(model, short=True): Toy(7.0)})
    made = asked(model, tmp_path, against={"the base": Toy()}, queries=0, limit=8)
    assert len(made.ladders) == 2, "the base stands there anyway"


def test_the_checks_of_diagnose_are_doubts_of_the_ladder(tmp_path: Path) -> None:
    few = asked(Trusting(Toy()), tmp_path, queries=0, limit=16)
    more = asked(Trusting(Toy()), tmp_path, queries=0, limit=16, doubt=16)
    new = [doubt for doubt in more.doubts if doubt not in few.doubts]
    assert any(doubt.startswith("zero gradients: for ") for doubt in new)
    assert any(doubt.startswith("transfer beats the white box") for doubt in new)


@dataclass(frozen=True)
class Captioned(Hard):
    """Each image with what its class is called."""

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.prompts().flat[int(self.labels()[index])],)


@pytest.mark.parametrize("goal", ["rank", "drift"])
def test_a_retrieval_is_compared_in_both_directions(goal: str, tmp_path: Path) -> None:
    made = asked(BitDepth(Toy(), 3), tmp_path, task=Retrieval(Captioned(12), goal=goal), queries=10)
    assert made.base is not None and "own label" not in {rung.name for rung in made.defense.rungs}
    assert sum("(bootstrap over images, 95 %)" in line for line in made.lines()) == 2
    ours, theirs = made.defense.worst, made.base.worst
    for part in (0, 1):
        middle, low, high = made.difference(part)
        rates = [said.parts[part][2] for said in (ours, theirs)]
        assert middle == pytest.approx(rates[0].value - rates[1].value) and low <= middle <= high
    before = made.defense.clean.outcomes.clean
    for rung in made.defense.attacked:
        same = np.array_equal(rung.outcomes.adversarial, before)
        assert not same or rung.knows.startswith("black box"), "it was attacked"
    assert all(doubt.startswith(("image to text R@1: ", "text to image R@1: ")) for doubt in made.doubts)


def test_reports_from_before_gates_were_told_are_refused_in_a_sentence(tmp_path: Path) -> None:
    asked(TTC(Toy()), tmp_path, queries=0, limit=8, attack=PGD(steps=1), samples=1)
    reports = {path: json.loads(path.read_text()) for path in tmp_path.glob("*.json") if path.name != INDEX}
    with_gates = [path for path, content in reports.items() if "gates" in content]
    for path in with_gates[:2]:
        path.write_text(json.dumps({name: part for name, part in reports[path].items() if name != "gates"}))
    said = rf"2 of {len(with_gates)} reports on TTC\(.*\) are older than the others .* remove \S+\.json and 1 more, or"
    with pytest.raises(CrossguardError, match=said):
        asked(TTC(Toy()), tmp_path, queries=0, limit=8, attack=PGD(steps=1), samples=1)


# --- Differences ---


def test_the_interval_of_a_paired_difference_covers_as_often_as_it_says() -> None:
    """Over all outcomes of 40 images, with their exact probabilities."""
    n = 40
    for p, q in ((0.3, 0.1), (0.1, 0.1), (0.5, 0.05)):
        covered = 0.0
        for more in range(n + 1):
            for less in range(n + 1 - more):
                _, low, high = paired(more, less, n)
                ways = math.comb(n, more) * math.comb(n - more, less)
                covered += ways * p**more * q**less * (1 - p - q) ** (n - more - less) * (low <= p - q <= high)
        assert 0.94 < covered < 0.975
    middle, low, high = paired(7, 2, 50)
    assert middle == pytest.approx(0.1) and paired(2, 7, 50) == pytest.approx((-middle, -high, -low))
    assert paired(0, 0, 10)[1] < 0.0 < paired(0, 0, 10)[2], "no difference among few is not a proof of none"


def ranks(adversarial: Any) -> Ranks:
    """Queries of 60 images, each with two captions; all first without an attack."""
    after = np.asarray(adversarial)
    return Ranks(
        id=[f"q{number}" for number in range(180)], image=np.concatenate([np.arange(60), np.repeat(np.arange(60), 2)]),
        text=[0] * 60 + [1] * 120, clean=[0] * 180, adversarial=after, size=[0.0] * 180, gradients=[0] * 180,
        forwards=[0] * 180,
    )  # fmt: skip


def test_a_difference_of_ranks_is_by_images() -> None:
    """Captions of an image fall together, so the interval is that of 60 images and not of 120 captions."""
    fallen = np.random.default_rng(3).random(60) < 0.4
    one, other = ranks(np.zeros(180, int)), ranks(np.concatenate([fallen, np.repeat(fallen, 2)]).astype(int))
    share = fallen.mean()
    for part in (0, 1):
        middle, low, high = difference(one, other, part)
        assert middle == pytest.approx(share)
        assert high - low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 60), rel=0.15)
    alike = difference(one, one, 1)
    assert alike == paired(0, 0, 60)


# --- Draws ---


def outcomes(adversarial: list[int], margins: list[float]) -> Outcomes:
    count = len(adversarial)
    return Outcomes(
        id=[str(number) for number in range(count)], label=[0] * count, clean=[0] * count, adversarial=adversarial,
        clean_margin=[1.0] * count, adversarial_margin=margins, size=[0.0] * count, gradients=[0] * count,
        forwards=[0] * count,
    )  # fmt: skip


def test_the_usual_answer_is_that_of_most_draws() -> None:
    """With its margin; where as many say one thing as the other, the image stands, since it was not beaten."""
    draws = [[0, 1, 1], [0, 0, 1], [2, 1, 1], [0, 0, 2], [0, 1, 0]]
    margins = [[1.0, -1.0, -5.0], [2.0, 3.0, -1.0], [-1.0, -2.0, -2.0], [4.0, 0.5, -3.0], [3.0, -3.0, 9.0]]
    each = [outcomes(*one) for one in zip(draws, margins, strict=True)]
    usual = each[0].usual(each[1:])
    assert usual.standing.tolist() == [True, False, False]
    for place in range(3):
        said = int(usual.adversarial[place]), float(usual.adversarial_margin[place])
        assert said in [(one.adversarial[place], one.adversarial_margin[place]) for one in each], "of one of the draws"
    assert each[0].usual(each[1:2]).standing.tolist() == [True, True, False], "a tie stands"
    assert each[0].usual(each[1:4]).standing.tolist() == [True, True, False], "two of four"


def test_the_usual_rank_is_the_middle_one() -> None:
    each = [ranks(np.full(180, number)) for number in (0, 9, 2, 0, 5)]
    assert set(each[0].usual(each[1:]).adversarial) == {2}
    assert set(each[0].usual(each[1:4]).adversarial) == {0}, "a tie stands"


def test_draws_are_part_of_the_question_of_random_models_alone() -> None:
    for model, told in ((Toy(), None), (BitDepth(Toy()), None), (BitDepth(GaussianNoise(Toy())), "5")):
        assert question(TASK, model, QUICK, BUDGET, draws=5).get("draws") == told
        assert question(TASK, model, QUICK, BUDGET, draws=1) == question(TASK, model, QUICK, BUDGET)
    assert "draws" not in question(TASK, GaussianNoise(Toy()), None, None, draws=5), "a clean answer is one draw"


def test_several_draws_judge_as_by_hand() -> None:
    model = GaussianNoise(Toy(), 0.06)
    report = evaluate(TASK, model, QUICK, BUDGET, draws=5, batch=7)
    single = evaluate(TASK, model, QUICK, BUDGET)
    assert np.array_equal(report.outcomes.adversarial, single.outcomes.adversarial) and single.drawn is None
    trial, (batch,) = TASK.prepare(model, QUICK, BUDGET, None), TASK.batches(40, range(40))
    seeds = keys(batch.ids, 0)
    images = trial.answer(batch, seeds).images
    right = [
        trial.judge(images, one).argmax(1) == batch.labels
        for one in (seeds, *(fold(seeds, 100 + i) for i in range(1, 5)))
    ]
    most = torch.stack(right).sum(0)
    assert report.drawn is not None and report.drawn.standing.tolist() == (most >= 3).tolist()
    assert bool(((most > 0) & (most < 5)).any()), "some images were told otherwise by other draws"
    assert report.judged is report.drawn and single.judged is single.outcomes


def test_what_stands_by_most_draws_is_asked_about(tmp_path: Path) -> None:
    """And not what stands in the first draw alone: that is what the worst case counts."""
    model, later = GaussianNoise(Toy(), 0.06), QUICK
    first = evaluate(TASK, model, PGD(steps=1, step=0.5, random_start=False), BUDGET, draws=5)
    report = evaluate(TASK, model, later, BUDGET, draws=5, after=[first], out=tmp_path / "a.json", batch=7)
    assert first.drawn is not None and report.drawn is not None and report.asked is not None
    left = first.drawn.correct & first.drawn.standing
    assert report.asked == tuple(np.asarray(first.outcomes.id)[left])
    assert not np.array_equal(left, first.correct & first.standing), "draws differ about some"
    alone = evaluate(TASK, model, later, BUDGET, draws=5)
    assert alone.drawn is not None
    for name in ("adversarial", "adversarial_margin", "gradients"):
        ours, theirs = (np.asarray(getattr(one, name)) for one in (report.drawn, alone.drawn))
        assert np.allclose(ours[left], theirs[left], atol=1e-5), name
    assert np.array_equal(np.asarray(report.drawn.adversarial)[~left], np.asarray(first.drawn.adversarial)[~left])
    assert report.question["after"] == first.key and report.key != alone.key
    read = type(report).load(tmp_path / "a.json")
    assert read.asked == report.asked and np.array_equal(read.broken, report.broken)
    fell = int((left & ~alone.drawn.standing).sum())
    told = f"{left.sum()} of 40 samples, which stood in 1 report before; broke {fell}"
    assert dict(read.lines())["asked about"] == told and fell > 0 and "after" not in dict(read.lines())


def test_what_others_left_is_of_the_same_question(tmp_path: Path) -> None:
    first = evaluate(TASK, Toy(), QUICK, BUDGET, limit=8)
    said = "a report to go on after is of another question"
    for task, model, budget, limit in (
        (ZeroShot(Dots(8)), Toy(), BUDGET, 8), (TASK, Toy(7.0), BUDGET, 8), (TASK, Toy(), Linf(5 / 255), 8),
        (TASK, Toy(), BUDGET, 9),
    ):  # fmt: skip
        with pytest.raises(CrossguardError, match=said):
            evaluate(task, model, QUICK, budget, limit=limit, after=[first])
    with pytest.raises(CrossguardError, match="keep images without after"):
        evaluate(TASK, Toy(), QUICK, BUDGET, limit=8, after=[first], keep=tmp_path / "kept")
    gallery = Retrieval(Captioned(12))
    with pytest.raises(CrossguardError, match="in a retrieval each answer hangs on all samples"):
        evaluate(gallery, Toy(), QUICK, BUDGET, after=[evaluate(gallery, Toy())])


# --- Gates ---


def test_a_report_says_how_often_a_gate_was_open(tmp_path: Path) -> None:
    model = TTC(Toy(), tau=0.02)
    report = evaluate(TASK, model, Blind(QUICK), BUDGET, batch=16, out=tmp_path / "a.json")
    trial, (batch,) = TASK.prepare(model, Blind(QUICK), BUDGET, None), TASK.batches(40, range(40))
    made = trial.answer(batch, keys(batch.ids, 0))
    counts = [sum(gates["tau"][when] for gates in made.columns["gates"]) for when in (0, 1)]
    assert [rate.successes for rate in report.gates["tau"]] == counts and 0 < counts[1] != counts[0] < 40
    assert type(report).load(tmp_path / "a.json").gates == report.gates
    clean, attacked = report.gates["tau"]
    assert dict(report.lines())["gate tau acts on"] == f"{clean} clean, {attacked} under attack"
    assert evaluate(TASK, Toy(), QUICK, BUDGET, limit=8).gates == {}


# --- The price ---


def test_forwards_and_backwards_are_those_of_the_method() -> None:
    """TTC (2 steps): the image, the noisy one twice climbed from, and the answer."""
    task = ZeroShot(Scenes("object", count=24))
    costs = {model: price(task, model) for model in (Tiny(), TTC(Tiny()), BitDepth(Tiny()))}
    assert [(one.forwards, one.backwards) for one in costs.values()] == [(1, 0), (4, 2), (1, 0)]
    assert [one.moves for one in costs.values()] == [False, True, False]
    assert costs[TTC(Tiny())].peak > costs[Tiny()].peak > 4 * 3 * 32 * 32


def test_memory_is_what_is_alive_at_once() -> None:
    weights = torch.ones(1000)
    with _Peak() as memory:
        one = torch.zeros(250)  # 1,000 bytes
        other = torch.cat([one, one])  # 2,000
        del one
        half = other[:250].view(5, 50)  # no memory of its own
        half += 1.0
        turned = weights.view(10, 100).t()  # nor what was there before
        del other
        assert memory.now == 2000, "a view keeps what it is a view of"
        del half
        assert memory.now == 0 and turned.shape == (100, 10)
        torch.zeros(500)
    assert memory.most == 3000 and memory.now == 0


# --- What is refused ---


def call(*changes: str) -> tuple[int, str]:
    given = {
        "--task": "ZeroShot(Scenes('object'))", "--model": "BitDepth(Tiny())", "--budget": "Linf(2/255)",
        "--out": "out", "--limit": "4",
    }  # fmt: skip
    words = [word for pair in (given | dict(zip(changes[::2], changes[1::2], strict=True))).items() for word in pair]
    answer = CliRunner().invoke(app, ["audit", *words])
    return answer.exit_code, " ".join(answer.stderr.split())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--budget", "Words(1)"), "an audit is about pixels, and Words(1) is no budget of those"),
        (("--budget", "Both(Linf(2/255), Words(1))"), "is about pixels"),
        (("--budget", "None"), "None is no budget of those, as 'Linf(4/255)' is"),
        (("--model", "PGD()"), "PGD() is not a model"),
        (("--model", "HuggingFace('nowhere')"), "'nowhere' is neither a folder"),
        (("--attack", "Substitute()"), "Substitute() does not attack images"),
        (("--draws", "0"), "--draws"),
        (("--against", "None"), "None is not a model"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(
    changes: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, told = call(*changes)
    assert code == 2 and said in told and told.count("crossguard: error: ") == 1 and len(told) <= 300


def test_an_audit_without_some_rungs_ends_in_its_ladder_and_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["crossguard.evaluate"]
    answered = module.evaluate

    def failing(task: Any, model: Any, attack: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(attack, Square):
            raise CrossguardError("squares are out of stock")
        return answered(task, model, attack, *rest, **options)

    monkeypatch.setattr(module, "evaluate", failing)
    monkeypatch.chdir(tmp_path)
    words = ["--task", "ZeroShot(Scenes('object'))", "--model", "Tiny()", "--budget", "Linf(2/255)", "--limit", "4"]
    answer = CliRunner().invoke(app, ["audit", *words, "--attack", "PGD(steps=1)", "--queries", "2", "--out", "a"])
    assert answer.exit_code == 2 and "| Tiny() | queries | | | | not answered |" in answer.stdout
    told = " ".join(answer.stderr.split())
    assert "the audit in a: 1 of 7 cells could not be answered: squares are out of stock (queries)" in told


def test_places_and_labels_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, told = call("--out", str(tmp_path / "file"))
    assert code == 2 and "file" in told and (tmp_path / "file").read_text() == ""
    answer = CliRunner().invoke(
        app, ["audit", "--task", "t", "--model", "m", "--budget", "b", "--out", "o", "--against", "a=Tiny()",
              "--against", "a=BitDepth(Tiny())"],
    )  # fmt: skip
    assert answer.exit_code == 2 and "'a' is given twice" in answer.stderr


def test_words_may_be_given_as_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    grids = list[Any]()

    def run(experiment: Any, *_: Any) -> None:
        grids.append([experiment.grid, *experiment.more])
        raise CrossguardError("asked enough")

    monkeypatch.setattr(audit_module.Experiment, "run", run)
    scenes, text = ZeroShot(Scenes("object")), "Scenes('object')"
    for words in (
        (scenes, BitDepth(Tiny()), Linf(1 / 255), PGD(steps=3), BitDepth(Tiny(), bits=2), TinyViT()),
        (text, "BitDepth(Tiny())", "Linf(1/255)", "PGD(steps=3)", "BitDepth(Tiny(), bits=2)", "TinyViT"),
    ):
        task, model, budget, attack, other, source = words
        with pytest.raises(CrossguardError, match="asked enough"):
            audit(
                task, model, budget, tmp_path, attack=attack, against={"coarse": other}, transfer={"vit": source},
                limit=2,
            )  # fmt: skip
    assert grids[0] == grids[1] and len(grids[0]) == 6, "three models, each attacked straight and by transfer"
    with pytest.raises(CrossguardError, match="'Tny'; did you mean 'Tiny'"):
        audit(text, "Tny", "Linf(1/255)", tmp_path)
