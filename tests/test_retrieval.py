"""Retrieval against loops: ranks, rates and goals restated by hand, and evaluations that nothing but the question
changes."""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import json
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import (
    APGD,
    DLR,
    EOT,
    FAB,
    PGD,
    SCC,
    SGA,
    TTC,
    Adaptive,
    AnyOf,
    AtGate,
    AutoAttack,
    Blind,
    Both,
    Captions,
    CarliniWagner,
    CharacterEdits,
    Charmer,
    CoAttack,
    Concat,
    DeepFool,
    EachTarget,
    GaussianNoise,
    Independent,
    Joint,
    Kept,
    Linf,
    Margin,
    MaskedLM,
    Parquet,
    PredictedLabel,
    Restarts,
    Retrieval,
    RobustCLIP,
    Scenes,
    SepAttack,
    Shards,
    Smooth,
    Square,
    Substitute,
    Synonyms,
    TextFooler,
    Tiny,
    Words,
    Worst,
    ZeroShot,
    evaluate,
    gallery,
)
from crossguard.attacks.base import Attack, ImageVictim, MatchVictim
from crossguard.attacks.candidates import doubts
from crossguard.errors import CrossguardError
from crossguard.gallery import Away, Gallery, image_ranks, text_ranks
from crossguard.goals import Drift, Mismatch
from crossguard.models.base import cosine
from crossguard.models.purification import BitDepth
from crossguard.report import _RANKED, DIRECTIONS, RANKS, Ranks, Report, interval
from crossguard.seeds import keys
from crossguard.table import FORMATS, Answers, render
from fixtures import Blots

TO_TEXT, TO_IMAGE = DIRECTIONS
BOTH = Both(Linf(4 / 255), Words(1))


def dot(images: Tensor, texts: Tensor) -> Tensor:
    return images @ texts.T


def scaled(images: Tensor, texts: Tensor) -> Tensor:
    return 10.0 * cosine(images, texts)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Ranks


def counted(now: Tensor, among: Tensor, right: Callable[[int, int], bool]) -> list[int]:
    """For each row how many wrong columns of `among` are no less than the best right one of `now`."""
    ranks = []
    for row in range(len(now)):
        best = max(float(now[row, column]) for column in range(now.shape[1]) if right(row, column))
        wrong = [column for column in range(among.shape[1]) if not right(row, column)]
        ranks.append(sum(float(among[row, column]) >= best for column in wrong))
    return ranks


def test_a_permutation_is_found_and_a_rotation_is_not() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    images = torch.eye(5)
    assert image_ranks(images, images[order], order, dot).tolist() == [0] * 5
    assert text_ranks(images, images[order], order, dot).tolist() == [0] * 5
    # The right answer has 0, the only other number is 1: all zeros tie with it.
    assert image_ranks(images, images[order], order.roll(1), dot).tolist() == [4] * 5
    assert text_ranks(images, images[order], order.roll(1), dot).tolist() == [4] * 5


def test_who_is_equal_comes_first_and_the_best_caption_counts() -> None:
    #                        captions of 1, 0, 1, 0, 2
    similarity = torch.tensor([[5.0, 5, 1, 2, 0], [3.0, 9, 8, 7, 9], [1.0, 2, 3, 4, 5]])
    owners = torch.tensor([1, 0, 1, 0, 2])
    assert image_ranks(similarity, torch.eye(5), owners, dot).tolist() == [1, 2, 0]
    assert text_ranks(similarity, torch.eye(5), owners, dot).tolist() == [1, 1, 0, 2, 1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("at_once", [1, 40, 2**25])
def test_ranks_are_those_of_loops(seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(0, 7, (12,), generator=generator)
    owners = torch.cat([torch.arange(7), extra])[torch.randperm(19, generator=generator)]
    # Small whole numbers: products are exact, and many are equal.
    images, texts, other_images, other_texts = (
        torch.randint(-1, 2, (count, 3), generator=generator).float() for count in (7, 19, 7, 19)
    )
    now = dot(images, texts)
    for among in (None, other_texts):
        others = dot(images, texts if among is None else among)
        expected = counted(now, others, lambda row, column: int(owners[column]) == row)
        assert image_ranks(images, texts, owners, dot, among).tolist() == expected
    for among in (None, other_images):
        others = dot(images if among is None else among, texts).T
        expected = counted(now.T, others, lambda row, column: int(owners[row]) == column)
        assert text_ranks(images, texts, owners, dot, among).tolist() == expected


@pytest.mark.parametrize("count", [5, 31, 63])
def test_equal_embeddings_tie_whatever_a_product_rounds(count: int) -> None:
    """Matrix products round equal columns differently at their edges, and a tie would be won by position."""
    same = F.normalize(draw(1, 5), dim=1)
    queries, copies = F.normalize(draw(count, 5, seed=1), dim=1), same.expand(count, 5).contiguous()
    owners = torch.arange(count)
    for among in (None, copies):
        assert image_ranks(queries, copies, owners, cosine, among).tolist() == [count - 1] * count
        assert text_ranks(copies, queries, owners, cosine, among).tolist() == [count - 1] * count


def test_a_large_gallery_is_ranked_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "AT_ONCE", 2**18)
    images, owners = draw(1_000, 4), torch.arange(5_000) % 1_000
    texts = images[owners] + 0.01 * draw(5_000, 4, seed=1)
    blocks: list[int] = []

    def watched(images: Tensor, texts: Tensor) -> Tensor:
        blocks.append(len(images) * len(texts))
        return dot(images, texts)

    ranks = image_ranks(images, texts, owners, watched), text_ranks(images, texts, owners, watched)
    assert 2**17 < max(blocks) <= 2**18 and sum(blocks) == 2 * 1_000 * 5_000
    blocks.clear()
    assert torch.equal(image_ranks(images, texts, owners, watched, texts.clone()), ranks[0])
    assert torch.equal(text_ranks(images, texts, owners, watched, images.clone()), ranks[1])
    assert max(blocks) <= 2**18
    logits = dot(images, texts)
    for i in (0, 17, 999):
        mine = owners == i
        assert int(ranks[0][i]) == int((logits[i] >= logits[i][mine].max())[~mine].sum())


def test_more_texts_than_are_held_at_once_are_ranked_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "AT_ONCE", 7)
    images, owners = draw(9, 4), torch.arange(18) % 9
    assert len(image_ranks(images, draw(18, 4), owners, dot)) == 9
    assert len(text_ranks(images, draw(18, 4), owners, dot)) == 18


# Rates


def ranks(
    image: list[int], text: list[int], clean: list[int], adversarial: list[int] | None = None, size: float = 1.0
) -> Ranks:
    n = len(image)
    after = clean if adversarial is None else adversarial
    return Ranks([f"q{i}" for i in range(n)], image, text, clean, after, [size] * n, [2] * n, [3] * n)


HAND = ranks(
    image=[0, 1, 2, 0, 0, 1, 2, 2],
    text=[0, 0, 0, 1, 1, 1, 1, 1],
    clean=[0, 0, 3, 0, 4, 0, 7, 12],
    adversarial=[0, 5, 0, 0, 6, 1, 4, 20],
)


@pytest.mark.parametrize(
    ("direction", "k", "clean", "adversarial", "robust", "conditional"),
    [
        (TO_TEXT, 1, (2, 3), (2, 3), (1, 3), (1, 2)),
        (TO_TEXT, 5, (3, 3), (2, 3), (2, 3), (1, 3)),
        (TO_TEXT, 10, (3, 3), (3, 3), (3, 3), (0, 3)),
        (TO_IMAGE, 1, (2, 5), (1, 5), (1, 5), (1, 2)),
        (TO_IMAGE, 5, (3, 5), (3, 5), (2, 5), (1, 3)),
        (TO_IMAGE, 10, (4, 5), (4, 5), (4, 5), (0, 4)),
    ],
)
def test_rates_by_hand(direction, k, clean, adversarial, robust, conditional) -> None:
    for when, expected in (("clean", clean), ("adversarial", adversarial), ("robust", robust)):
        rate = HAND.recall(k, direction, when)
        assert (rate.successes, rate.n) == expected
    lost = HAND.success(k, direction, "conditional")
    assert (lost.successes, lost.n) == conditional
    apart = HAND.success(k, direction)
    assert (apart.successes, apart.n) == (clean[0] - adversarial[0], clean[1])


def test_the_headline_is_recall_at_one_from_images() -> None:
    report = Report({"task": "T"}, HAND)
    assert (report.clean_accuracy, report.robust_accuracy, report.adversarial.value) == (2 / 3, 1 / 3, 2 / 3)
    assert [name for name, *_ in report.parts] == ["image to text R@1", "text to image R@1"]
    assert [(clean.successes, robust.successes) for _, clean, robust in report.parts] == [(2, 1), (2, 1)]
    assert dict(report.lines())["n"] == "3 images, 5 captions"
    with pytest.raises(CrossguardError, match="not of a retrieval"):
        _ = evaluate(ZeroShot(Scenes("color", count=4)), Tiny()).ranks


def test_an_attack_that_helps_counts_against_itself() -> None:
    helped = ranks([0, 1], [0, 0], clean=[3, 3], adversarial=[0, 0])
    apart = helped.success()
    assert (apart.successes, apart.n) == (-2, 2)
    assert apart.interval == (-1.0, -interval(2, 2)[0]), "Wilson's, mirrored"
    assert helped.success(kind="conditional").n == 0 and helped.success(kind="conditional").interval == (0.0, 1.0)


def clustered(together: bool, images: int = 60, captions: int = 5) -> Ranks:
    """Half of all captions are found: those of every second image, or about half of each image's."""
    hit = [(i % 2 if together else (i + c) % 2) == 0 for i in range(images) for c in range(captions)]
    owners = [i for i in range(images) for _ in range(captions)]
    clean = [0] * images + [0 if one else 9 for one in hit]
    return ranks([*range(images), *owners], [0] * images + [1] * len(owners), clean)


def test_the_interval_knows_that_captions_of_an_image_fall_together() -> None:
    widths = []
    for together in (True, False):
        rate = clustered(together).recall(1, TO_IMAGE)
        low, high = rate.interval
        assert rate.value == 0.5 and low < 0.5 < high
        widths.append(high - low)
    assert widths[0] > 3 * widths[1], "the bootstrap draws captions, not images"
    one = clustered(True, images=100, captions=1).recall(1, TO_IMAGE)
    assert one.interval == pytest.approx(interval(50, 100), abs=0.02), "with one caption each it is a plain sample"


@pytest.mark.parametrize("k", RANKS)
def test_intervals_hold_their_values(k: int) -> None:
    generator = np.random.default_rng(k)
    owners = [*range(30), *generator.integers(0, 30, 100)]
    text = [0] * 30 + [1] * 100
    clean, after = (generator.integers(0, high, 130).tolist() for high in (12, 20))
    held = ranks([int(owner) for owner in owners], text, clean, after)
    for direction in DIRECTIONS:
        rates = [held.recall(k, direction, when) for when in ("clean", "adversarial", "robust")]
        for rate in [*rates, *(held.success(k, direction, kind) for kind in ("difference", "conditional"))]:
            low, high = rate.interval
            assert low <= rate.value <= high and low < high


def test_where_a_bootstrap_has_no_width_it_is_wilsons() -> None:
    images = [*range(40), *(i for i in range(40) for _ in range(5))]
    text = [0] * 40 + [1] * 200
    none, every = ranks(images, text, [0] * 240, [9] * 240), ranks(images, text, [0] * 240)
    for direction in DIRECTIONS:
        assert none.recall(1, direction).interval == interval(40, 40)
        assert none.recall(1, direction, "robust").interval == interval(0, 40), "captions of an image are one sample"
        assert none.success(1, direction, "conditional").interval == interval(40, 40)
        assert every.success(1, direction, "conditional").interval == interval(0, 40)
    alike = ranks([0, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 9, 0, 9]).recall(1, TO_IMAGE)
    assert alike.interval == interval(1, 2), "that each image has one caption of two found is no certainty"


def test_a_conditional_rate_knows_of_how_few_it_is() -> None:
    one = ranks(list(range(100)), [0] * 100, [0] + [9] * 99, [9] * 100).success(kind="conditional")
    assert (one.successes, one.n) == (1, 1)
    assert one.interval == interval(1, 1), "the other 99 images were wrong anyway and say nothing"


def test_reports_come_back_as_they_were(tmp_path: Path) -> None:
    report = Report({"task": "T", "attack": "PGD()"}, HAND, ("a doubt",))
    report.save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.question == report.question and again.notes == report.notes
    assert isinstance(again.outcomes, Ranks) and again.outcomes.id == HAND.id
    for name in _RANKED:
        assert np.array_equal(getattr(again.outcomes, name), getattr(HAND, name))
    assert again.intervals == report.intervals
    summary = json.loads((tmp_path / "report.json").read_text())["summary"]
    assert summary["text to image R@5 robust"]["successes"] == 2
    assert summary["image to text R@1 attack success (conditional)"]["value"] == 0.5


def test_the_worst_of_several_is_the_last_rank_of_each_query() -> None:
    one = ranks([0, 1, 0, 1], [0, 0, 1, 1], [0, 2, 0, 0], [4, 0, 1, 0], size=1.0)
    other = ranks([0, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0], [2, 7, 1, 3], size=2.0)
    worst = one.worst([one, other])
    assert worst.adversarial.tolist() == [4, 7, 1, 3] and worst.clean.tolist() == [0, 2, 0, 0]  # type: ignore[union-attr]
    assert worst.size.tolist() == [1.0, 2.0, 1.0, 2.0]  # type: ignore[union-attr]
    assert worst.gradients.tolist() == [4] * 4 and worst.forwards.tolist() == [6] * 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text": [0, 2]}, "0 or 1"),
        ({"clean": [0, -1]}, "negative"),
        ({"image": [-1, 0]}, "negative"),
        ({"clean": [0]}, "shape"),
        ({"clean": np.array([0.5, 1.0])}, "whole numbers"),
        ({"id": []}, "at least one"),
    ],
)
def test_ranks_are_checked(change, sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        replace(ranks([0, 1], [0, 1], [0, 0]), **change)


@pytest.mark.parametrize("wrong", [{"k": 3}, {"direction": "sideways"}, {"when": "never"}])
def test_what_is_not_reported_is_refused(wrong) -> None:
    with pytest.raises(CrossguardError, match="give one of"):
        HAND.recall(**wrong)
    with pytest.raises(CrossguardError, match="give one of"):
        HAND.success(kind="relative")


# Goals


@pytest.fixture
def world() -> tuple[Gallery, Tensor, Tensor]:
    """A gallery with ragged captions in no order, the images of a batch in it, and the owners of their captions."""
    owners = torch.tensor([4, 1, 0, 2, 3, 1, 5, 0, 1, 3, 2])
    return Gallery(draw(6, 7), draw(11, 7, seed=1), owners, scaled), torch.tensor([3, 1, 0]), torch.tensor([0, 2, 1])


def lost_by_hand(held: Gallery, row: int, image: Tensor, captions: Tensor) -> tuple[float, bool, bool]:
    """The loss of one image with these captions, whether it is lost, and whether its captions are as well."""
    foreign = [scaled(image[None], held.texts[[t]]).item() for t in range(11) if held.owners[t] != row]
    own = [scaled(image[None], caption[None]).item() for caption in captions]
    by_image = np.log(np.exp([*foreign, *own]).sum()) - np.log(np.exp(own).sum())
    by_text, beaten = [], []
    for caption, logit in zip(captions, own, strict=True):
        others = [scaled(held.images[[i]], caption[None]).item() for i in range(6) if i != row]
        by_text.append(np.log(np.exp([*others, logit]).sum()) - logit)
        beaten.append(max(others) >= logit)
    lost = max(foreign) >= max(own)
    return float(by_image + np.mean(by_text)), lost, lost and all(beaten)


def test_lost_images_against_loops(world) -> None:
    held, rows, _ = world
    won = 0
    for seed in range(20):
        owners = torch.tensor([2, 0, 1, 2, 0, 2])  # three of the image at 0, two of that at 3, one of that at 1
        captions = held.images[rows[owners]] + draw(6, 7, seed=seed)
        outputs = held.images[rows] + draw(3, 7, seed=100 + seed)
        goal = held.lost_images(rows, captions, owners)
        expected = [lost_by_hand(held, row, outputs[i], captions[owners == i]) for i, row in enumerate(rows.tolist())]
        assert goal.loss(outputs).tolist() == pytest.approx([loss for loss, _, _ in expected], rel=1e-4)
        assert goal.image_lost(outputs).tolist() == [lost for _, lost, _ in expected]
        assert goal.won(outputs).tolist() == [every for _, _, every in expected]
        won += sum(every for _, _, every in expected)
        keep = torch.tensor([2, 0])
        assert goal.at(keep).counts() == (2, 2)
        assert goal.at(keep).loss(outputs[keep]).tolist() == pytest.approx(goal.loss(outputs)[keep].tolist(), rel=1e-4)
        mask = torch.tensor([False, True, True])
        assert torch.equal(goal.at(mask).won(outputs[mask]), goal.won(outputs)[mask])
    assert 0 < won < 60, "the oracle needs both kinds"


def test_lost_texts_against_loops(world) -> None:
    held, _, _ = world
    rows = torch.tensor([3, 0, 3, 5])  # two captions of one image
    won = 0
    for seed in range(20):
        own = held.images[rows] + draw(6, 7, seed=seed)[rows]
        outputs = own + draw(4, 7, seed=50 + seed)
        goal = held.lost_texts(rows, own)
        losses, reached = [], []
        for number, row in enumerate(rows.tolist()):
            logit = scaled(own[[number]], outputs[[number]]).item()
            others = [scaled(held.images[[i]], outputs[[number]]).item() for i in range(6) if i != row]
            losses.append(np.log(np.exp([*others, logit]).sum()) - logit)
            reached.append(max(others) >= logit)
        assert goal.loss(outputs).tolist() == pytest.approx(losses, rel=1e-4)
        assert goal.won(outputs).tolist() == reached
        keep = torch.tensor([1, 3, 1])
        assert goal.at(keep).counts() == (3, 3)
        assert goal.at(keep).loss(outputs[keep]).tolist() == pytest.approx(goal.loss(outputs)[keep].tolist(), rel=1e-4)
        won += sum(reached)
    assert 0 < won < 80


def test_a_gradient_leads_away_from_an_image_that_is_far_ahead() -> None:
    """Where the right answer leads by 30 logits a difference of two sums is 0, and its loss would rank nothing."""
    held = Gallery(torch.eye(4), torch.eye(4), torch.arange(4), lambda images, texts: 30.0 * cosine(images, texts))
    outputs = (torch.eye(4) + 0.01 * draw(4, 4)).requires_grad_(True)
    goal = held.lost_images(torch.arange(4), torch.eye(4), torch.arange(4))
    losses = goal.loss(outputs)
    (gradient,) = torch.autograd.grad(losses.sum(), outputs)
    logits = 30.0 * F.normalize(outputs.detach().double(), dim=1)
    own = logits.diagonal()
    others = logits.masked_fill(torch.eye(4).bool(), -torch.inf)
    by_image = (others.logsumexp(1) - own).exp()
    by_text = 3 * (-own).exp()
    assert torch.allclose(losses.double(), by_image + by_text, rtol=1e-3, atol=0.0)
    assert bool(gradient.abs().amax(1).gt(0).all())
    lost = held.lost_texts(torch.arange(4), torch.eye(4))
    (gradient,) = torch.autograd.grad(lost.loss(outputs).sum(), outputs)
    assert bool(gradient.abs().amax(1).gt(0).all())


@pytest.mark.parametrize("divergence", [False, True])
def test_away_against_loops(divergence: bool) -> None:
    targets, outputs = draw(3, 4, 7), draw(3, 2 * 7, seed=1)  # two views of each sample
    weights = torch.tensor([[1.0, 3.0, 0.0, 0.0], [1.0, 1.5, 1.5, 0.0], [0.0, 1.0, 1.0, 1.0]])
    expected = torch.zeros(3)
    for n in range(3):
        for view in outputs[n].split(7):
            for k in range(4):
                one, other = F.normalize(targets[n, k], dim=0), F.normalize(view, dim=0)
                apart = 1.0 - one @ other
                if divergence:
                    apart = (one.softmax(0) * (one.softmax(0) / other.softmax(0)).log()).sum()
                expected[n] += weights[n, k] * apart
    goal = Away(targets, weights, divergence)
    assert torch.allclose(goal.loss(outputs), expected, atol=1e-6)
    assert not bool(goal.won(outputs).any())
    keep = torch.tensor([2, 0])
    assert torch.allclose(goal.at(keep).loss(outputs[keep]), expected[keep], atol=1e-6)
    assert goal.counts() == (3, 3) and goal.at(torch.tensor([True, False, False])).counts() == (1, 1)


def test_alone_away_is_drift_and_the_divergence_ranks_like_the_cosine() -> None:
    clean, outputs = draw(200, 512)[:1].expand(200, 512), draw(200, 512)
    outputs = clean + torch.linspace(0.1, 3.0, 200)[:, None] * outputs
    target, one = clean[:, None], torch.ones(200, 1)
    cosines, divergences = (Away(target, one, divergence).loss(outputs.double()) for divergence in (False, True))
    assert torch.allclose(cosines.float(), Drift(clean).loss(outputs), atol=1e-5)
    order = torch.corrcoef(torch.stack([cosines.argsort().argsort(), divergences.argsort().argsort()]).float())
    assert float(order[0, 1]) > 0.999
    big = cosines > 0.05
    assert torch.allclose(divergences[big] * 512, cosines[big], rtol=0.02)


def test_what_a_match_climbs(world) -> None:
    held, rows, _ = world
    places = torch.tensor([2, 7, 4, 9, 1])  # the captions of 0 twice, of 3 twice, one of 1
    owners = torch.tensor([2, 2, 0, 0, 1])
    victim = MatchVictim(ImageVictim(torch.clone), lambda texts: held.texts, held, rows, places, owners)
    assert torch.equal(victim.clean_images, held.images[rows]) and torch.equal(victim.clean_texts, held.texts[places])
    outputs = draw(3, 7, seed=9)
    goal = victim.against_images(victim.clean_texts)
    expected = held.lost_images(rows, held.texts[places], victim.owners)
    assert not goal.ends and torch.equal(goal.loss(outputs), expected.loss(outputs))
    assert torch.equal(goal.won(outputs), expected.won(outputs)) and torch.equal(
        goal.merit(outputs), goal.loss(outputs)
    )
    texts = draw(5, 7, seed=10)
    mine = victim.against_texts(outputs).loss(texts)
    assert torch.allclose(mine, held.lost_texts(torch.tensor([0, 0, 3, 3, 1]), outputs[[2, 2, 0, 0, 1]]).loss(texts))
    drift = replace(victim, goal="drift")
    assert torch.equal(drift.against_texts(outputs).loss(texts), Drift(held.texts[places]).loss(texts))
    assert torch.equal(drift.against_images(texts).loss(outputs), Drift(held.images[rows]).loss(outputs))


# Evaluations


@dataclass(frozen=True)
class Ragged(Scenes):
    """Scenes of one to four captions.

    Args:
        order: the samples in this order.
    """

    order: tuple[int, ...] = ()

    def id(self, index: int) -> str:
        return super().id(self.order[index] if self.order else index)

    def image(self, index: int) -> Tensor:
        return super().image(self.order[index] if self.order else index)

    def captions(self, index: int) -> tuple[str, ...]:
        place = self.order[index] if self.order else index
        return super().captions(place)[: 1 + 3 * place % 4]


@dataclass(frozen=True)
class Doubles(Ragged):
    """Images more than once, under ids of their own."""

    def __len__(self) -> int:
        return len(self.order)

    def id(self, index: int) -> str:
        return str(index)


@dataclass(frozen=True)
class Strange(Ragged):
    """Captions of words that no scene has."""

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(f"a zeppelin hovers above {text}" for text in super().captions(index))


DATA = Ragged("object", count=14)
TASK = Retrieval(DATA)


def same(one: Report, other: Report) -> None:
    assert one.question == other.question and one.outcomes.id == other.outcomes.id and one.notes == other.notes
    for name in _RANKED:
        assert np.allclose(getattr(one.outcomes, name), getattr(other.outcomes, name), atol=1e-5), name


def test_a_clean_report_ranks_the_cosines() -> None:
    report = evaluate(TASK, Tiny(), batch=5)
    captions = [DATA.captions(i) for i in range(14)]
    owners = [i for i, texts in enumerate(captions) for _ in texts]
    with torch.no_grad():
        images = Tiny().encode_image(torch.stack([DATA.image(i) for i in range(14)]) / 255.0)
        logits = cosine(images, Tiny().encode_text([text for texts in captions for text in texts])).cpu()
    expected = counted(logits, logits, lambda row, column: owners[column] == row)
    expected += counted(logits.T, logits.T, lambda row, column: owners[row] == column)
    assert report.ranks.clean.tolist() == report.ranks.adversarial.tolist() == expected  # type: ignore[union-attr]
    assert report.ranks.image.tolist() == [*range(14), *owners]  # type: ignore[union-attr]
    assert report.ranks.id[14:17] == (f"{DATA.id(0)}#0", f"{DATA.id(1)}#0", f"{DATA.id(1)}#1")
    assert not np.any(report.ranks.size) and not np.any(report.ranks.gradients)


ATTACKS = [
    PGD(steps=3),
    APGD(steps=3),
    Square(queries=40),
    Substitute(),
    SepAttack(PGD(steps=3)),
    CoAttack(PGD(steps=3)),
    SGA(PGD(steps=2)),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda one: type(one).__name__)
def test_attacks_hurt_whatever_the_size_of_the_batch(attack) -> None:
    reports = [evaluate(TASK, Tiny(), attack, Both(Linf(12 / 255), Words(1)), batch=size) for size in (64, 7)]
    same(*reports)
    held = reports[0].ranks
    assert held.adversarial.mean() > held.clean.mean()  # type: ignore[union-attr]
    on_images = np.asarray(held.size)[np.asarray(held.text) == 0]
    assert (on_images > 0).all() if "image" in attack.on else not on_images.any()
    assert float(on_images.max()) <= 12 / 255 + 1e-6
    words = set(np.asarray(held.size)[np.asarray(held.text) == 1].tolist())
    assert words <= {0.0, 1.0} and (1.0 in words) == ("text" in attack.on)


@pytest.mark.parametrize("kind", ["adversarial", "clean"])
def test_the_order_of_the_samples_changes_nothing(kind: str) -> None:
    attack = CoAttack(PGD(steps=3))
    forth = evaluate(Retrieval(DATA, gallery=kind), Tiny(), attack, BOTH)
    order = (5, 3, 13, 0, 7, 9, 2, 11, 1, 12, 4, 10, 8, 6)
    turned = evaluate(Retrieval(replace(DATA, order=order), gallery=kind), Tiny(), attack, BOTH, batch=6)
    found = dict(zip(turned.ranks.id, zip(turned.ranks.clean, turned.ranks.adversarial, strict=True), strict=True))
    assert found == dict(zip(forth.ranks.id, zip(forth.ranks.clean, forth.ranks.adversarial, strict=True), strict=True))


def test_in_a_clean_gallery_others_are_as_they_were() -> None:
    attack = Independent(PGD(steps=3))
    task = Retrieval(DATA, gallery="clean")
    trial = task.prepare(Tiny(), attack, BOTH, None)
    rows, before, right = [], [], []
    for batch in task.batches(6, range(14)):
        answers = trial.answer(batch, keys(batch.ids, 0))
        before, right = before + answers.right[0], right + answers.right[1]
        rows += [
            {"id": one} | {name: column[i] for name, column in answers.columns.items()}
            for i, one in enumerate(batch.ids)
        ]
    ranked = trial.score(rows)
    assert isinstance(ranked, Ranks)
    assert before == (np.asarray(ranked.clean)[:14] == 0).tolist()
    assert right == (np.asarray(ranked.adversarial)[:14] == 0).tolist()
    with torch.no_grad():
        made = Tiny().encode_text([text for row in rows for text in row["texts"]])
        clean = Tiny().encode_text([text for row in rows for text in row["clean_texts"]])
        images = Tiny().encode_image(torch.stack([DATA.image(i) for i in range(14)]) / 255.0)
    seen = torch.from_numpy(np.stack([np.frombuffer(b64decode(row["embedding"]), "<f4") for row in rows]).copy())
    owners = [i for i, row in enumerate(rows) for _ in row["texts"]]
    seen = seen.to(images.device)
    expected = counted(cosine(seen, made), cosine(seen, clean), lambda row, column: owners[column] == row)
    expected += counted(cosine(seen, made).T, cosine(images, made).T, lambda row, column: owners[row] == column)
    assert ranked.adversarial.tolist() == expected  # type: ignore[union-attr]


class Killed(Exception):
    pass


def killed(done: int, total: int) -> None:
    if done:
        raise Killed


def test_a_killed_retrieval_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    attack = SepAttack(PGD(steps=2))
    with pytest.raises(Killed):
        evaluate(TASK, Tiny(), attack, BOTH, batch=6, partial=tmp_path / "part", progress=killed)
    assert (tmp_path / "part.0").exists()
    after = evaluate(TASK, Tiny(), attack, BOTH, batch=3, partial=tmp_path / "part")
    same(after, evaluate(TASK, Tiny(), attack, BOTH, batch=14))
    assert not list(tmp_path.iterdir())


def test_what_was_kept_has_the_ranks_it_had(tmp_path: Path) -> None:
    made = evaluate(TASK, Tiny(), SGA(PGD(steps=3)), BOTH, batch=6, keep=tmp_path)
    again = evaluate(Retrieval(Kept(str(tmp_path))), Tiny())
    assert again.ranks.id == made.ranks.id
    assert np.array_equal(again.ranks.clean, made.ranks.adversarial)
    assert not np.array_equal(again.ranks.clean, made.ranks.clean)
    clean = Retrieval(Kept(str(tmp_path), rewritten=False))
    assert [clean.texts(i) for i in range(14)] == [DATA.captions(i) for i in range(14)]


def test_transfer_is_judged_by_the_other_and_stops_for_nobody() -> None:
    task = Retrieval(DATA, gallery="clean")
    defended = BitDepth(Tiny(), bits=3)
    gray = evaluate(task, defended, PGD(steps=3), Linf(4 / 255), surrogate=Tiny())
    assert gray.question["knowledge"] == "gray box"
    assert gray.ranks.gradients[:14].tolist() == [3] * 14  # type: ignore[union-attr]
    assert np.array_equal(gray.ranks.clean, evaluate(task, defended).ranks.clean)
    # The images are those of the surrogate, whoever judges.
    batch = next(task.batches(14, range(14)))
    seeds = keys(batch.ids, 0)
    trials = [task.prepare(model, PGD(steps=3), Linf(4 / 255), Tiny()) for model in (defended, GaussianNoise(Tiny()))]
    one, other = (trial.answer(batch, seeds).images for trial in trials)
    assert torch.equal(one, other)


@pytest.mark.parametrize("unknown", [None, 1])
def test_a_blind_attack_sees_the_gallery_of_the_undefended_model(unknown: int | None) -> None:
    """It makes what is made on that model as a surrogate, and counts the questions."""
    task, budget, defended = Retrieval(DATA), Linf(4 / 255), TTC(BitDepth(Tiny(), bits=3))
    batch = next(task.batches(14, range(14)))
    inside = BitDepth(Tiny(), bits=3) if unknown else Tiny()
    found, expected = (
        task.prepare(defended, attack, budget, surrogate).answer(batch, keys(batch.ids, 0))
        for attack, surrogate in ((Blind(PGD(steps=3), unknown), None), (PGD(steps=3), inside))
    )
    assert torch.equal(found.images, expected.images) and found.columns == expected.columns


def test_inside_of_sga_an_attack_is_as_blind() -> None:
    """All the other sizes of an image are seen by the undefended model too."""
    batch, budget = next(Retrieval(DATA).batches(14, range(14))), Both(Linf(4 / 255), Words(1))
    seeds = keys(batch.ids)
    texts, answer = batch.texts, BitDepth(Tiny(), bits=1).answer()
    with torch.no_grad():
        gallery = Gallery(answer(batch.images), Tiny().encode_text(texts), batch.owners, Tiny().logits)
    rows = torch.arange(14)
    victim = MatchVictim(ImageVictim(answer), Tiny().encode_text, gallery, rows, torch.arange(len(texts)), batch.owners)
    bare = replace(victim, encode=ImageVictim(Tiny().answer()))
    blind, _ = SGA(Blind(PGD(steps=2))).match(victim, batch.images, texts, budget, seeds)
    seeing, _ = SGA(PGD(steps=2)).match(victim, batch.images, texts, budget, seeds)
    expected, _ = SGA(PGD(steps=2)).match(bare, batch.images, texts, budget, seeds)
    assert torch.equal(blind, expected) and not torch.equal(blind, seeing)


def test_attacks_through_a_defense_are_for_retrievals_too() -> None:
    task, defended = Retrieval(DATA), TTC(Tiny(), tau=0.5)
    batch = next(task.batches(6, range(6)))
    made = [
        task.prepare(defended, attack, Linf(4 / 255), None).answer(batch, keys(batch.ids, 0)).images
        for attack in (PGD(steps=2), Smooth(PGD(steps=2)), AtGate(PGD(steps=2), gate="tau"))
    ]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(made, 2))
    quick = SCC(BitDepth(Tiny()), warmup=1, steps=1)
    adaptive = evaluate(task, quick, Adaptive(PGD(steps=1, step=1.0), samples=1, queries=2), Linf(8 / 255), limit=6)
    assert adaptive.question["knowledge"] == "white box, adaptive"
    assert adaptive.ranks.adversarial.mean() > adaptive.ranks.clean.mean()  # type: ignore[union-attr]


@pytest.mark.parametrize("model", [GaussianNoise(Tiny()), BitDepth(GaussianNoise(Tiny()))], ids=["outside", "inside"])
def test_random_models_are_judged_on_another_draw(model) -> None:
    """So no attack may stop at the first draw that it wins, not even in a clean gallery."""
    task = Retrieval(DATA, gallery="clean")
    one, other = (evaluate(task, model, PGD(steps=4), Linf(0.2), batch=size) for size in (64, 5))
    same(one, other)
    assert one.ranks.gradients[:14].tolist() == [4] * 14  # type: ignore[union-attr]
    seeds = [evaluate(task, model, seed=seed).ranks.clean.tolist() for seed in (0, 0)]  # type: ignore[union-attr]
    assert seeds[0] == seeds[1]


def test_doubts_about_a_retrieval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("crossguard.diagnose"), "_QUERIES", 20)
    report = evaluate(TASK, GaussianNoise(Tiny()), PGD(steps=1), Linf(1 / 255), doubt=6)
    assert any("random model: 6 of 6 images" in note for note in report.notes)
    assert not any("zero gradients" in note for note in report.notes)


NEED_CLASSES = [
    FAB(),
    DeepFool(),
    CarliniWagner(),
    EachTarget(PGD(steps=2)),
    PredictedLabel(),
    AutoAttack(),
    AutoAttack("rand"),
    RobustCLIP(),
    Worst((PGD(), Restarts(EachTarget()))),
    SGA(FAB()),
    PGD(loss=Margin()),
    EOT(APGD(loss=DLR())),
]


@pytest.mark.parametrize("attack", NEED_CLASSES, ids=str)
def test_attacks_on_classes_are_refused_before_anything_is_embedded(
    attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tiny, "encode_image", lambda *_: pytest.fail("an image was embedded"))
    with pytest.raises(CrossguardError, match=r"(classification|loss of logits), and Retrieval has no classes"):
        evaluate(TASK, Tiny(), attack, BOTH)


@pytest.mark.parametrize(
    "attack", [Substitute(collisions="forbid"), SGA(text=Substitute(protect="class")), Charmer(collisions="forbid")]
)
def test_settings_that_need_names_of_classes_are_refused(attack: Attack) -> None:
    with pytest.raises(CrossguardError, match="is about the names of classes, and Retrieval has none; leave it out"):
        evaluate(TASK, Tiny(), attack, BOTH)


def test_square_brings_its_own_loss_for_classes_only() -> None:
    report = evaluate(TASK, Tiny(), Square(queries=5), Linf(4 / 255))
    assert int(np.asarray(report.ranks.forwards).sum()) > 0


@pytest.mark.parametrize("attack", [PGD(steps=4), APGD(steps=4), Joint(PGD(steps=4))], ids=str)
def test_in_a_clean_gallery_no_attack_ends_at_the_first_place(attack: Attack) -> None:
    """Recall at 5 and 10 would be that of images that were let go when another came first."""
    task = Retrieval(DATA, gallery="clean")
    part = getattr(attack, "image", attack)
    on = replace(part, stop=False)
    going = replace(attack, image=on) if isinstance(attack, Joint) else on
    found, expected = (evaluate(task, Tiny(), one, Both(Linf(8 / 255), Words(1))).ranks for one in (attack, going))
    assert np.array_equal(found.adversarial, expected.adversarial)
    assert float(np.asarray(found.adversarial).max()) > 1


def test_what_a_text_attack_left_alone_is_said(tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    words.write_text('{"zebra": ["quagga"]}')
    report = evaluate(TASK, Tiny(), TextFooler(Synonyms(str(words))), Words(1))
    count = int((np.asarray(report.ranks.text) == 1).sum())
    assert any(f"{count} of {count} captions stayed as they were" in note for note in report.notes)
    assert not any("stayed" in note for note in evaluate(TASK, Tiny(), PGD(steps=1), Linf(1 / 255)).notes)


def test_words_that_the_language_model_does_not_know_are_said() -> None:
    notes = evaluate(Retrieval(Strange("object", count=6)), Tiny(), SGA(PGD(steps=1)), BOTH).notes
    (note,) = [note for note in notes if "does not know" in note]
    assert "'zeppelin'" in note and "bert-base-uncased" in note
    assert not any("does not know" in note for note in evaluate(TASK, Tiny(), Substitute(), Words(1)).notes)
    texts = Strange("object", count=1).captions(0)
    assert len(doubts(Substitute(AnyOf((MaskedLM(), MaskedLM()))), texts)) == 2
    assert not doubts(Substitute(AnyOf((MaskedLM(), CharacterEdits()))), texts), "another source proposes enough"


def test_equal_images_tie_in_whatever_batches_they_are_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two are copies of the first, and are embedded apart: neither of a pair comes first by rounding."""
    twins = Doubles("object", order=(*range(130), 0, 1))
    real = Tiny.encode_image

    def rounding(self: Tiny, images: Tensor) -> Tensor:
        """Otherwise in another batch, as some processors compute."""
        return real(self, images) * (1.0 + 1e-6 * len(images))

    monkeypatch.setattr(Tiny, "encode_image", rounding)
    ranks = evaluate(Retrieval(twins), Tiny()).ranks
    texts = np.asarray(ranks.text) == 1
    for image in (0, 1, 130, 131):
        assert (np.asarray(ranks.clean)[texts & (np.asarray(ranks.image) == image)] >= 1).all()


def test_the_note_on_rounding_is_about_the_number_of_the_report(tmp_path: Path) -> None:
    report = evaluate(TASK, Tiny(), PGD(steps=3), Linf(5.4 / 255), keep=tmp_path / "kept")
    (note,) = [note for note in report.notes if "rounded to 8 bits" in note]
    for name, _, robust in report.parts:
        assert f"instead of {100 * robust.value:.1f} % {name}" in note
    again = evaluate(TASK, Tiny(), Substitute(), Words(1), keep=tmp_path / "texts")
    assert not any("8 bits" in note for note in again.notes)


def test_copies_of_an_image_are_said() -> None:
    copied = Concat((Blots(count=5), Blots(count=2)))
    (note,) = [one for one in evaluate(Retrieval(copied), Tiny()).notes if "same pixels" in one]
    assert note.startswith("4 of the 7 images have the same pixels as another one")
    assert not any("same pixels" in one for one in evaluate(Retrieval(Blots(count=5)), Tiny()).notes)


def test_captions_that_two_images_share_are_noted_and_not_found() -> None:
    data = Blots(count=6)
    report = evaluate(Retrieval(data), Tiny())
    shared = 12 - 2 * len(set(data.labels().tolist()))
    assert any(f"{shared} of 12 captions are word for word another one" in note for note in report.notes)
    labels = data.labels().tolist()
    lone = [labels.count(label) == 1 for label in labels]
    found = np.asarray(report.ranks.clean)[:6] == 0
    assert not found[~np.asarray(lone)].any(), "who shares all captions with another image cannot come first"


def test_captions_that_stay_are_embedded_as_before() -> None:
    """Equal to the bit, in whatever company: a tie with the same caption of another image is not won by rounding."""
    trial = TASK.prepare(Tiny(), None, None, None)
    clean = [text for i in range(14) for text in DATA.captions(i)]
    made = ["one very long sentence about nothing at all that is", *clean[:0:-1]]
    embedded = trial._embedded(made)  # type: ignore[attr-defined]
    assert torch.equal(embedded[1:].flip(0), trial.clean.texts[1:])  # type: ignore[attr-defined]
    assert not torch.allclose(embedded[0], trial.clean.texts[0])  # type: ignore[attr-defined]


def test_a_caption_that_becomes_that_of_another_image_is_counted() -> None:
    trial = TASK.prepare(Tiny(), None, None, None)
    made = [text for i in range(14) for text in DATA.captions(i)]
    assert trial._collisions(made) == []  # type: ignore[attr-defined]
    struck = [made[1].upper(), *made[1:]]
    assert "1 of" in trial._collisions(struck)[0]  # type: ignore[attr-defined]


def test_fewer_captions_are_the_first_ones() -> None:
    task = Retrieval(DATA, captions=2)
    assert [task.texts(i) for i in range(4)] == [DATA.captions(i)[:2] for i in range(4)]
    assert evaluate(task, Tiny(), limit=5).n == 5 + sum(len(task.texts(i)) for i in task.chosen(5))


def test_the_goal_drift_needs_no_rival() -> None:
    report = evaluate(Retrieval(DATA, goal="drift"), Tiny(), Independent(PGD(steps=3)), BOTH)
    assert report.ranks.gradients[:14].tolist() == [3] * 14  # type: ignore[union-attr]
    assert report.ranks.adversarial.mean() > report.ranks.clean.mean()  # type: ignore[union-attr]


def test_tables_have_a_part_for_each_direction(tmp_path: Path) -> None:
    for number, (attack, budget) in enumerate([(None, None), (PGD(steps=2), Linf(4 / 255)), (Substitute(), Words(1))]):
        evaluate(TASK, Tiny(), attack, budget).save(tmp_path / f"{number}.json")
    evaluate(ZeroShot(Scenes("color", count=4)), Tiny()).save(tmp_path / "classes.json")
    answers = Answers.load(tmp_path)
    tables = [table for table in answers.tables() if "score" in table.header]
    assert [table.header["score"] for table in tables] == ["image to text R@1", "text to image R@1"]
    assert [table.header["n"] for table in tables] == ["14", str(sum(len(DATA.captions(i)) for i in range(14)))]
    assert all(len(table.columns) == 3 for table in tables)
    said = {form: render(answers, form) for form in FORMATS}
    assert said["markdown"].count("text to image R@1") == 1 and "by bootstrap" in said["markdown"]
    assert said["latex"].count("\\begin{tabular}") == 3
    records = list(csv.DictReader(io.StringIO(said["csv"])))
    assert len(records) == 4 and {record["text to image R@10 clean"] for record in records if "R@" in str(record)}
    held = Report.load(tmp_path / "1.json").ranks
    (row,) = [record for record in records if record["attack"].startswith("PGD")]
    assert float(row["image to text R@5 adversarial"]) == pytest.approx(
        held.recall(5, when="adversarial").value, abs=1e-6
    )
    assert row["n"] == str(len(held))
    assert len(json.loads(said["json"])["reports"]) == 4
    pooled = answers.pooled()
    assert {type(report.outcomes) for report in pooled.reports} >= {Ranks}


# Prompts that lose the images of their class


def test_prompts_that_climb_mismatch_lose_more_than_those_that_drift() -> None:
    left = {"drift": 0, "mismatch": 0}
    for count in (30, 40, 50):
        for goal in left:
            task = ZeroShot(Scenes("color", count=count), text_goal=goal)
            left[goal] += int(evaluate(task, Tiny(), Substitute(), Words(1)).standing.sum())
    assert left["mismatch"] <= left["drift"]


def test_a_mismatch_is_made_of_the_images_that_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Mismatch] = []
    of: Callable[..., Mismatch] = Mismatch.of
    monkeypatch.setattr(Mismatch, "of", staticmethod(lambda *parts: made.append(of(*parts)) or made[-1]))
    data = Scenes("color", count=30)
    evaluate(ZeroShot(data, text_goal="mismatch"), Tiny(), Substitute(), Words(1), limit=10)
    assert len(made) == 1 and made[0].owners.tolist() == data.labels()[data.chosen(10)].tolist()
    evaluate(ZeroShot(data, text_goal="mismatch"), Tiny(), PGD(steps=1), Linf(0.01), limit=10)
    assert len(made) == 1, "who leaves the prompts alone needs no goal for them"


def test_a_mismatch_of_several_templates_is_refused() -> None:
    task = ZeroShot(Scenes("color", count=8), ("a {} thing", "one {} thing"), text_goal="mismatch")
    with pytest.raises(CrossguardError, match="needs one template, and there are 2"):
        evaluate(task, Tiny(), Substitute(), Words(1))
    assert evaluate(task, Tiny(), PGD(steps=1), Linf(0.01)).n == 8


# Bad input


@dataclass(frozen=True)
class Mute(Blots):
    """Blots of which one has these captions."""

    of_two: tuple[str, ...] = ()

    def captions(self, index: int) -> tuple[str, ...]:
        return self.of_two if self.place(index) == 2 else super().captions(index)


@dataclass(frozen=True)
class Twins(Blots):
    def id(self, index: int) -> str:
        return "blot"


@dataclass(frozen=True)
class Classes(Blots):
    def captions(self, index: int) -> tuple[str, ...]:
        return ()


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: evaluate(Retrieval(Classes()), Tiny()), "has no caption, and Retrieval needs one each"),
        (lambda: evaluate(Retrieval(Mute(count=4)), Tiny()), "'blot-2' has no caption"),
        (lambda: evaluate(Retrieval(Mute(count=4, of_two=("a", " "))), Tiny()), "'blot-2' has an empty caption"),
        (lambda: evaluate(Retrieval(Blots(count=1)), Tiny()), "among 1 image has nothing to find"),
        (lambda: evaluate(TASK, Tiny(), limit=1), "among 1 image has nothing to find"),
        (lambda: evaluate(Retrieval(Twins(count=3)), Tiny()), "the same id"),
        (lambda: evaluate(TASK, Tiny(), PGD()), "needs a budget"),
        (lambda: evaluate(TASK, Tiny(), SGA(), Linf(0.1)), "allows no change of texts"),
        (lambda: evaluate(TASK, Tiny(), SGA(), Words(1)), "allows no change of pixels"),
        (lambda: evaluate(TASK, Tiny(), Substitute(), Linf(0.1)), "allows no change of texts"),
        (lambda: Retrieval(DATA, captions=0), "give 1 or more"),
        (lambda: Retrieval(DATA, goal="away"), "give 'rank' or 'drift'"),
        (lambda: Retrieval(DATA, gallery="open"), "give 'adversarial' or 'clean'"),
        (lambda: ZeroShot(DATA, text_goal="rank"), "give 'drift' or 'mismatch'"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(ask: Callable[[], object], sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence) as caught:
        ask()
    assert "\n" not in str(caught.value)


def test_whatever_holds_the_captions_the_report_is_the_same(tmp_path: Path) -> None:
    """The same pictures and captions in a Parquet file, in a folder with COCO's JSON, and in shards."""
    import io
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    scenes, encoded, captions = Scenes("object", count=6), list[bytes](), list[list[str]]()
    for index in range(6):
        held = io.BytesIO()
        Image.fromarray(scenes.image(index).permute(1, 2, 0).numpy()).save(held, "PNG")
        encoded.append(held.getvalue())
        captions.append(list(scenes.captions(index))[: 1 + index % 3])
    pq.write_table(pa.table({"image": encoded, "captions": captions}), tmp_path / "scenes.parquet")
    (tmp_path / "images").mkdir()
    listed = {"images": [], "annotations": []}
    (tmp_path / "shards/test").mkdir(parents=True)
    (tmp_path / "shards/dataset_type.txt").write_text("retrieval")
    with tarfile.open(tmp_path / "shards/test/0.tar", "w") as tar:
        for number, (picture, texts) in enumerate(zip(encoded, captions, strict=True)):
            (tmp_path / f"images/{number}.png").write_bytes(picture)
            listed["images"].append({"id": number, "file_name": f"{number}.png"})
            listed["annotations"] += [{"image_id": number, "caption": text} for text in texts]
            for name, data in ((f"{number}.png", picture), (f"{number}.txt", "\n".join(texts).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    attack = CoAttack(PGD(steps=2, random_start=False))
    reports = [
        evaluate(Retrieval(data), Tiny(), attack, Both(Linf(4 / 255), Words(1)))
        for data in (
            Parquet(str(tmp_path / "scenes.parquet")),
            Captions(str(tmp_path / "images"), str(tmp_path / "captions.json")),
            Shards(str(tmp_path / "shards")),
        )
    ]
    for report in reports:
        assert len(report.ranks) == 6 + sum(map(len, captions))
        for column in ("image", "text", "clean", "adversarial"):
            assert np.array_equal(getattr(report.ranks, column), getattr(reports[0].ranks, column)), column
