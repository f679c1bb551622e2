"""Certificates of randomized smoothing, against closed forms and against attacks that try to refute them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crossguard.certify as certify_module
from crossguard import (
    APGD,
    L2,
    RN,
    TTC,
    CrossguardError,
    Retrieval,
    Scenes,
    Smoothed,
    Tiny,
    ZeroShot,
    evaluate,
)
from crossguard.answer import counting
from crossguard.certify import (
    DRAWS,
    PICTURE,
    TEXT,
    Certificate,
    Certified,
    certify,
    counted_votes,
    lines,
    lower_bound,
    picture,
    radius_of,
)
from crossguard.cli import main
from crossguard.data import Dataset
from toys import Dots, Toy

# --- The bound ---


@pytest.mark.parametrize("n", [1, 7, 100, 100_000])
@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.9])
def test_the_bound_has_its_closed_forms(n: int, alpha: float) -> None:
    assert lower_bound(n, n, alpha) == pytest.approx(alpha ** (1 / n), rel=1e-12)
    assert lower_bound(0, n, alpha) == 0.0
    if n > 1:
        assert lower_bound(1, n, alpha) == pytest.approx(-math.expm1(math.log1p(-alpha) / n), rel=1e-9)


@pytest.mark.parametrize(("k", "n"), [(2, 3), (5, 9), (17, 20), (60, 100)])
def test_at_the_bound_so_many_come_up_with_probability_alpha(k: int, n: int) -> None:
    """Summed in whole fractions."""
    bound = Fraction(lower_bound(k, n, 0.001))
    tail = sum(math.comb(n, j) * bound**j * (1 - bound) ** (n - j) for j in range(k, n + 1))
    assert float(tail) == pytest.approx(0.001, rel=1e-9)


@pytest.mark.parametrize(("k", "n"), [(51, 100), (990, 1_000), (99_999, 100_000), (50_300, 100_000)])
def test_the_bound_is_that_of_the_beta_distribution(k: int, n: int) -> None:
    beta = pytest.importorskip("scipy.stats").beta
    assert lower_bound(k, n, 0.001) == pytest.approx(float(beta.ppf(0.001, k, n - k + 1)), rel=1e-9)


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Over all outcomes of 40 draws at several true probabilities, exactly: it is above the truth with probability
    alpha at most, and nearly so often at some."""
    worst = 0.0
    for truth in (0.5, 0.51, 0.7, 0.9, 0.99):
        chance = (math.comb(40, k) * truth**k * (1 - truth) ** (40 - k) for k in range(41))
        wrong = sum(p for k, p in enumerate(chance) if lower_bound(k, 40, 0.05) > truth)
        assert wrong <= 0.05
        worst = max(worst, wrong)
    assert worst > 0.03, "a bound of zero would hold as well"


# --- The vote ---


def test_who_guesses_does_not_count() -> None:
    classes = torch.tensor([2, 2, 1, 1, 1, 1, 0, 2])
    assert counted_votes(classes, 3, 4) == (2, 1, 1), "guessed 2, most for 1, and one draw for the guess"
    assert counted_votes(torch.tensor([3, 1, 0, 3, 1]), 2, 4) == (1, 0, 1), "of a tie the first, in both"


def test_half_of_the_draws_certify_nothing() -> None:
    assert radius_of(0.5, 0.25) == 0.0 and radius_of(0.5 + 1e-9, 0.25) > 0.0
    assert radius_of(lower_bound(500, 1000, 0.001), 1.0) == 0.0
    assert radius_of(0.8413447460685429, 0.25) == pytest.approx(0.25, rel=1e-9), "of the normal distribution at 1"


# --- Against closed forms and attacks ---


@dataclass(frozen=True)
class Halves(Toy):
    """Tells the mean of the first color from one half. An image at a mean of 1/2 + s is at the distance 6 |s| from the
    boundary in L2 (36 pixels, a slope of 1/36 in each), and that is the radius of its vote at any noise."""

    def encode_image(self, images: Tensor) -> Tensor:
        side = images[:, 0].mean((1, 2)) - 0.5
        return torch.stack([side, -side, torch.full_like(side, 0.1)], 1)  # the last one lets the cosines have a slope

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return torch.eye(3)[[0 if "red" in text else 1 for text in texts]]


SIDES = torch.tensor([-0.060, -0.045, -0.030, -0.015, -0.001, 0.0, 0.002, 0.010, 0.022, 0.035, 0.055, 0.070])


@dataclass(frozen=True)
class Sided(Dataset):
    """Images of one color each, on both sides of what `Halves` looks at; the last one has the wrong label."""

    names = ("red", "blue")

    def __len__(self) -> int:
        return len(SIDES)

    def id(self, index: int) -> str:
        return f"side {index}"

    def image(self, index: int) -> Tensor:
        return (255 * self.stored(index)).round().to(torch.uint8)

    def stored(self, index: int) -> Tensor:
        return torch.full((3, 6, 6), 0.5) + torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1) * SIDES[index]

    def labels(self) -> Tensor:
        right = (SIDES < 0).long()
        right[-1] = 1
        return right


HALVES, SIDED = Smoothed(Halves(), std=0.1, draws=150), ZeroShot(Sided())


def test_a_radius_is_at_most_the_distance_to_the_boundary_and_near_it() -> None:
    made = certify(SIDED, HALVES, samples=4_000)
    near = 0
    for one, side in zip(made.images, SIDES.tolist(), strict=True):
        distance = 6 * abs(side)
        assert one.radius < distance or one.radius == distance == 0.0
        if one.top is not None:
            assert one.top == int(side < 0)
            near += one.radius > 0.8 * min(distance, made.reach)
        assert (one.top is None) == (one.radius == 0.0) == (one.lower <= 0.5)
    assert near >= 8
    few = certify(SIDED, HALVES, samples=100)
    assert all(more.radius >= less.radius for more, less in zip(made.images, few.images, strict=True))
    assert sum(one.radius for one in few.images) < 0.8 * sum(one.radius for one in made.images)
    assert made.abstained.successes >= 1
    assert made.images[-1].radius > 0.25 and made.at(0.25).successes == 2, (
        "certain of the wrong class counts for nothing"
    )


def attacked(task: ZeroShot, model: Smoothed, radius: float, limit: int | None = None) -> list[bool]:
    """Who withstands an attack on the vote of this norm, as most of three fresh draws of the vote say."""
    report = evaluate(task, model, APGD(steps=4), L2(radius), limit=limit, draws=3)
    return report.judged.standing.tolist()


def sure(made: Certified, radius: float, times: float = 1.0) -> list[bool]:
    """Of whom the right class is certified; with radii so many times as large."""
    return [one.top == one.label and times * one.radius > radius for one in made.images]


def test_no_attack_inside_a_radius_changes_the_vote_and_one_a_little_outside_does() -> None:
    """Certified accuracy is at most that of the same smoothed model under attack, image by image. The attack reaches
    what it can, all that is nearer to the boundary; radii that were a quarter larger would be refuted."""
    made = certify(SIDED, HALVES, samples=4_000)
    for radius in (0.1, 0.2):
        standing = attacked(SIDED, HALVES, radius)
        assert standing[:-1] == [bool(6 * side.abs() > radius) for side in SIDES[:-1]]
        certain = sure(made, radius)
        assert all(stands for stands, one in zip(standing, certain, strict=True) if one)
        assert 0 < made.at(radius).successes == sum(certain) <= sum(standing) < len(SIDES)
        assert any(one and not stands for stands, one in zip(standing, sure(made, radius, 1.25), strict=True))


def test_no_attack_inside_a_radius_changes_the_vote_of_a_network() -> None:
    task, model = ZeroShot(Scenes("color")), Smoothed(Tiny(), std=0.1, draws=9)
    made = certify(task, model, samples=250, limit=6)
    inside, outside = attacked(task, model, 0.18, 6), attacked(task, model, 1.0, 6)
    certain = sure(made, 0.18)
    assert all(stands for stands, one in zip(inside, certain, strict=True) if one)
    assert 3 <= sum(certain) <= sum(inside)
    assert any(one and not stands for stands, one in zip(outside, certain, strict=True)), "it can win"


# --- What it costs, and what it hangs on ---


@dataclass(frozen=True)
class Kinds(Dots):
    """Images of which nobody is asked for the label."""

    def labels(self) -> Tensor:
        return torch.arange(self.count)


@dataclass(frozen=True)
class Sorts(Kinds):
    """The same images with other classes."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"sort {number}" for number in range(20))


TASK, VOTE = ZeroShot(Kinds(5)), Smoothed(Toy(), std=0.05)


def test_another_class_list_asks_no_image_tower(tmp_path: Path) -> None:
    with counting() as first:
        made = certify(TASK, VOTE, samples=50, out=tmp_path)
    assert first.forwards == made.asked == 5 * 150
    with counting() as second:
        others = certify(ZeroShot(Sorts(5)), VOTE, samples=50, out=tmp_path)
    assert second.forwards == others.asked == 0
    assert others.images == certify(ZeroShot(Sorts(5)), VOTE, samples=50).images
    assert [one.count for one in others.images] != [one.count for one in made.images]
    with counting() as third:
        again = certify(TASK, VOTE, samples=50, out=tmp_path)
    assert third.forwards == 0 and again == replace(made, asked=0), "read from its file"


def test_more_draws_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    certify(TASK, VOTE, samples=50, out=tmp_path)
    with counting() as costs:
        more = certify(TASK, VOTE, samples=90, out=tmp_path)
    assert costs.forwards == 5 * 40
    assert more.images == certify(TASK, VOTE, samples=90).images
    fewer = certify(TASK, VOTE, samples=20, guesses=30, out=tmp_path)
    assert fewer.asked == 0 and fewer.images == certify(TASK, VOTE, samples=20, guesses=30).images


@dataclass(frozen=True)
class Backwards(Kinds):
    """The same samples in the other order."""

    def id(self, index: int) -> str:
        return super().id(self.count - 1 - index)

    def image(self, index: int) -> Tensor:
        return super().image(self.count - 1 - index)

    def labels(self) -> Tensor:
        return super().labels().flip(0)


def test_neither_batches_nor_order_nor_the_limit_change_a_certificate() -> None:
    made = certify(TASK, VOTE, samples=60)
    assert certify(TASK, VOTE, samples=60, batch=7).images == made.images
    assert certify(ZeroShot(Backwards(5)), VOTE, samples=60).images == made.images[::-1]
    assert set(certify(TASK, VOTE, samples=60, limit=2).images) < set(made.images)
    assert certify(TASK, VOTE, samples=60, seed=1).images != made.images
    assert len({one.count for one in made.images}) > 1


@pytest.mark.parametrize(
    "model", [Smoothed(RN(Toy(), eps=0.3), 0.05), Smoothed(TTC(Toy()), 0.05), Smoothed(VOTE, 0.05)]
)
def test_around_another_defense_the_class_of_each_draw_is_kept(tmp_path: Path, model: Smoothed) -> None:
    """Whose noise is that of the copy, whatever the batch."""
    if isinstance(model.base, Smoothed):
        model = replace(model, base=replace(model.base, draws=2))
    task, other = ZeroShot(Kinds(2)), ZeroShot(Sorts(2))
    made = certify(task, model, samples=30, guesses=8, out=tmp_path)
    assert certify(task, model, samples=30, guesses=8, batch=3).images == made.images
    assert certify(task, model, samples=10, guesses=8, out=tmp_path).asked == 0
    found = certify(other, model, samples=30, guesses=8, out=tmp_path)
    assert found.asked == made.asked > 0, "an answer may hang on the classes"
    assert found.images == certify(other, model, samples=30, guesses=8).images


def test_classes_may_be_kept_in_place_of_embeddings(tmp_path: Path) -> None:
    made = certify(TASK, VOTE, samples=50, out=tmp_path, embeddings=False)
    assert made.images == certify(TASK, VOTE, samples=50).images
    (tmp_path / f"{certify_module.key(made.question)}.json").unlink()
    assert certify(TASK, VOTE, samples=50, out=tmp_path, embeddings=False).asked == 0
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) < 5 * (150 * 4 + 5000)


@pytest.mark.parametrize("after", [1, 3])
def test_who_was_stopped_goes_on_behind_the_last_image(tmp_path: Path, after: int) -> None:
    def stop(done: int, total: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify(TASK, VOTE, samples=50, out=tmp_path, progress=stop)
    seen = list[tuple[int, int]]()
    made = certify(TASK, VOTE, samples=50, out=tmp_path, progress=lambda *one: seen.append(one))
    assert made.asked == (5 - after) * 150 and seen == [(done, 5) for done in range(6)]
    assert made.images == certify(TASK, VOTE, samples=50).images


def test_what_is_damaged_is_asked_again(tmp_path: Path) -> None:
    made = certify(TASK, VOTE, samples=50, out=tmp_path)
    first, second, *_ = sorted(tmp_path.rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    whole = bytearray(second.read_bytes())
    whole[-1] ^= 1
    second.write_bytes(whole)
    (result,) = tmp_path.glob("*.json")
    result.unlink()
    again = certify(TASK, VOTE, samples=50, out=tmp_path)
    assert again.asked == 2 * 150 and again.images == made.images
    result.write_text(result.read_text().replace('"alpha"', '"beta"'))
    with pytest.raises(CrossguardError, match=r"has no 'alpha'; remove .* and certify again"):
        certify(TASK, VOTE, samples=50, out=tmp_path)


# --- Bad input ---


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"model": Tiny()},
            r"Tiny\(\) has no certificate; put it into a vote over noise: Smoothed\(Tiny\(\), std=0.25\)",
        ),
        ({"model": RN(VOTE)}, "the vote is inside of another defense; put Smoothed outermost"),
        ({"model": Smoothed(Toy(), std=0.0)}, r"draws no noise, so nothing is certain; give a std above 0"),
        ({"task": Retrieval(Scenes())}, r"Retrieval\(Scenes\(\)\) has no classes; give ZeroShot\(data\)"),
        ({"samples": 0}, "samples must be a whole number of at least 1, not 0"),
        ({"guesses": 0}, "guesses must be a whole number of at least 1, not 0"),
        ({"alpha": 0.0}, "0.0 is no probability between 0 and 1; the paper takes 0.001"),
        ({"alpha": 1.0}, "1.0 is no probability"),
        ({"alpha": math.nan}, "nan is no probability"),
        ({"limit": 0}, "a limit of samples must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_certified_is_refused(options: dict[str, Any], sentence: str) -> None:
    asked: dict[str, Any] = {"task": TASK, "model": VOTE} | options
    with pytest.raises(CrossguardError, match=sentence):
        certify(**asked)


def test_too_few_draws_are_told_of() -> None:
    (note,) = (one for one in certify(TASK, VOTE, samples=9).notes if "draws" in one)
    assert note == "9 draws certify nothing at alpha=0.001, even where all agree; take 10 or more"
    assert certify(TASK, VOTE, samples=9).abstained.successes == 5
    assert not any("draws" in one for one in certify(TASK, VOTE, samples=10).notes)


# --- What people see ---


def made_of(rows: Sequence[tuple[int | None, float]], std: float = 0.25, pixels: int | None = 3072) -> Certified:
    """Images of label 1, certified as these."""
    images = tuple(Certificate(f"{place}", 1, 1, top, 9, 0.9, at) for place, (top, at) in enumerate(rows))
    return Certified({"task": "ZeroShot(Scenes())"}, ("a", "b"), images, std, 1000, 100, 0.001, pixels, 3.0)


def test_a_table_counts_who_is_right_and_certain() -> None:
    made = made_of([(1, 0.3), (1, 0.1), (0, 0.5), (None, 0.0)])
    assert [made.at(radius).successes for radius in (0.0, 0.1, 0.2, 0.3)] == [2, 1, 1, 0]
    assert made.abstained.successes == 1 and made.clean.successes == 4
    falls, rates = made.curve()
    assert falls == [0.0, 0.1, 0.3] and [rate.successes for rate in rates] == [2, 1, 0]
    text = lines({"a|b": made}, (0.0, 0.2))
    assert text[0].count("|") == text[2].count("|") - 1 == 9
    assert r"| a\|b | 4 | 100.0 % [51.0, 100.0] | 50.0 % [15.0, 85.0] | 25.0 % [4.6, 69.9] | 25.0 %" in text[2]
    told = "\n".join(text)
    assert "noise of 0.25 is 63.8 levels of 255; 1,000 draws that all agree certify a radius of 0.616" in told
    assert "the 100,000 of the paper 0.953" in told and "with a confidence of 99.9 %" in told
    assert "a radius r holds against changes of r / 55.4: 0.2 against 0.92/255 in each" in told
    shown = str(replace(made, question={"model": "Smoothed(base=Tiny(), std=0.25, draws=100)"}))
    assert shown.splitlines()[2].startswith("| Smoothed(Tiny()) | 4 |")
    assert "Linf" not in "\n".join(lines({"a": made_of([(1, 0.3)], pixels=None)}))
    assert "L2 0.5 |" in lines({"a": made})[0] and "L2 1 |" not in lines({"a": made})[0], "within reach"
    assert picture({"a": made, "$b$": made_of([(None, 0.0)])}).startswith(b"\x89PNG")


def test_the_command_says_what_is_certain_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = list[Any]()
    monkeypatch.setattr(certify_module, "picture", lambda one: drawn.append(one) or b"a picture")
    given = [
        "certify", "--model", "Smoothed(Tiny(), 0.1)", "--model", "weak=Smoothed(Tiny(), 0.05)", "--samples", "30",
        "--guesses", "10", "--limit", "3", "--radius", "0.05", "--out", str(tmp_path),
    ]  # fmt: skip
    for task, asked in (("ZeroShot(Scenes('object'))", 2 * 3 * 40), ("ZeroShot(Scenes('object'))", 0)):
        with pytest.raises(SystemExit) as ended:
            main([*given, "--task", task])
        said = capsys.readouterr()
        assert ended.value.code == 0 and f"{asked} images went through an image tower now" in said.err
    assert "| model | n | vote right | certified, L2 0.05 | abstained | draws | seconds |" in said.out
    assert "| weak | 3 |" in said.out and f"as a picture: {tmp_path / PICTURE}" in said.out
    assert (tmp_path / PICTURE).read_bytes() == b"a picture" and list(drawn[0]) == ["Smoothed(Tiny(), 0.1)", "weak"]
    assert (tmp_path / TEXT).read_text() in said.out
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(results) == 2 and len(list((tmp_path / DRAWS).rglob("*.safetensors"))) == 2 * 3


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    given = ["certify", "--model", "Smoothed(Tiny(), 0.1)", "--task", "ZeroShot(Scenes('color'))", "--limit", "7"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "crossguard"]
    shared = [*command, *given, "--samples", "30", "--out", str(tmp_path)]
    done = subprocess.run(shared, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0 and done.stdout.count("| Smoothed(Tiny(), 0.1) | 7 |") == 1
    assert done.stderr.count("910 images went through an image tower now") == 1
    (result,) = tmp_path.glob("*.json")
    alone = certify("ZeroShot(Scenes('color'))", "Smoothed(Tiny(), 0.1)", samples=30, limit=7)
    assert Certified.load(result).images == alone.images


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--model", "Tiny()"), "put it into a vote over noise: Smoothed(Tiny(), std=0.25)"),
        (("--model", "Smoothed(Tiny(), -1)"), "give 0 or more, in pixels of [0, 1]"),
        (("--model", "Smoothed(Tiny())", "--alpha", "1"), "1.0 is no probability between 0 and 1"),
        (("--model", "Smoothed(Tiny())", "--samples", "0"), "--samples must be a whole number of at least 1"),
        (("--model", "Smoothed(Tiny())", "--radius", "-0.5"), "a radius of -0.5 is not possible"),
        (("--model", "Smoothd(Tiny())"), "did you mean 'Smoothed'"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Sequence[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["certify", *given, "--task", "ZeroShot(Scenes())", "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert ended.value.code == 2 and sentence in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
