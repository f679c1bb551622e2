"""Defenses in the space of embeddings, and the vote of randomized smoothing, against closed forms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import COLA, RN, TTC, CLIPure, CrossguardError, Smoothed, Tiny
from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.models.wrapper import Lent
from crossguard.seeds import by_position, drawing, keys, normal, uniform
from crossguard.testing import check_wrapper
from toys import Toy, middle

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}", "a picture of a {}"))
SEEDS = keys("abcdef")
IMAGES = uniform(by_position(6), (3, 32, 32))


def blank(model: Any) -> Tensor:
    inner = model.base.answer(PROMPTS)
    return model.anchors(inner, Lent(model, model.base, PROMPTS))


def angle(embeddings: Tensor, anchor: Tensor) -> Tensor:
    return F.cosine_similarity(embeddings, anchor).clamp(-1, 1).acos()


def near(count: int, size: int, cosine: float) -> tuple[Tensor, Tensor]:
    """Raw embeddings of different lengths, at a given cosine to a direction."""
    anchor = F.normalize(normal(torch.tensor([99]), (size,)), dim=1)
    other = normal(by_position(count), (size,))
    other = F.normalize(other - (other @ anchor.T) * anchor, dim=1)
    return (cosine * anchor + math.sqrt(1 - cosine**2) * other) * (1.0 + torch.arange(count)[:, None]), anchor


# --- CLIPure ---


def published(embeddings: Tensor, anchor: Tensor, steps: int, step: float) -> Tensor:
    """Restated from the authors' code: the gradient of the cosine, divided by its norm over the whole batch."""
    for _ in range(steps):
        r = embeddings.norm(dim=1, keepdim=True)
        pixels = embeddings.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cosine_similarity(pixels, anchor.expand_as(pixels)).sum(), pixels)
        gradient = r.detach() * gradient
        u = embeddings / r + step * gradient / gradient.norm()
        embeddings = r * u / u.norm(dim=1, keepdim=True)
    return embeddings


@pytest.mark.parametrize("step", [0.1, 30.0])
def test_clipure_is_that_of_its_code(step: float) -> None:
    embeddings, anchor = near(5, 64, 0.2)
    model = CLIPure(Toy(), step=step, steps=3, whole_batch=True)
    assert torch.allclose(model.move(embeddings, anchor), published(embeddings, anchor, 3, step), rtol=1e-4, atol=1e-5)
    alone = torch.cat([published(one[None], anchor, 3, step) for one in embeddings])
    assert torch.allclose(replace(model, whole_batch=False).move(embeddings, anchor), alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.move(embeddings, anchor), alone, rtol=1e-2), "and hangs on the batch"


def test_a_step_of_clipure_turns_by_a_fixed_angle() -> None:
    embeddings, anchor = near(4, 64, 0.2)
    model = CLIPure(Toy(), step=0.5, steps=1)
    before, after = (angle(one, anchor) for one in (embeddings, model.move(embeddings, anchor)))
    assert torch.allclose(before - after, torch.tensor(math.atan(0.5)), atol=1e-4)
    assert torch.allclose(model.move(embeddings, anchor).norm(dim=1), embeddings.norm(dim=1), rtol=1e-5)
    assert bool((angle(CLIPure(Toy(), step=0.02, steps=100).move(embeddings, anchor), anchor) < 0.03).all())


def test_clipure_returns_the_embedding_it_was_given_and_hides_its_gradient() -> None:
    """At the published step and number of steps. Two steps come back, an odd number does not."""
    embeddings, anchor = near(4, 768, 0.2)
    for steps, same in ((2, True), (10, True), (9, False)):
        found = CLIPure(Toy(), steps=steps).move(embeddings, anchor)
        assert torch.allclose(found, embeddings, rtol=1e-3, atol=1e-3) == same

    def slope(model: CLIPure) -> float:
        pixels, along = embeddings.clone().requires_grad_(True), normal(by_position(4) + 7, (768,))
        (gradient,) = torch.autograd.grad((model.move(pixels, anchor) * along).sum(), pixels)
        # The length of an embedding goes through unchanged in both; what is told from it is its direction.
        aside = gradient - (gradient * embeddings).sum(1, keepdim=True) * embeddings / embeddings.square().sum(1, True)
        return float((aside.norm(dim=1) / along.norm(dim=1)).mean())

    assert slope(CLIPure(Toy())) == pytest.approx(1.0, abs=0.02), "the true gradient is that of the identity"
    assert slope(CLIPure(Toy(), constant_steps=True)) < 1e-6, "that of the code is gone"


def test_clipure_moves_towards_a_text_without_a_class() -> None:
    model = CLIPure(Tiny(), step=0.2, steps=1, templates=("a photo of a {}", "a {} in red"))
    texts = F.normalize(Tiny().encode_text(["a photo of a ", "a  in red"]), dim=1).mean(0, keepdim=True)
    assert torch.allclose(blank(model), F.normalize(texts, dim=1), atol=1e-5)
    with torch.no_grad():
        before, after = Tiny().encode_image(IMAGES), model.encode_image(IMAGES)
    assert torch.allclose(
        angle(before, blank(model)) - angle(after, blank(model)), torch.tensor(math.atan(0.2)), atol=1e-3
    )
    assert model.answer().encode(IMAGES).shape == before.shape, "it needs no classes"


# --- COLA ---


def test_cola_keeps_what_the_texts_can_tell_and_nothing_else() -> None:
    model = COLA(Toy(), rank=4)
    inner = model.base.answer(PROMPTS)
    ways = model.anchors(inner, Lent(model, Toy(), PROMPTS))
    embeddings = normal(by_position(5), (16,))
    once = model.move(embeddings, ways)
    assert torch.allclose(model.move(once, ways), once, atol=1e-5), "a projection is idempotent"
    assert torch.allclose((embeddings - once) @ ways.T, torch.zeros(5, 4), atol=1e-5), "and orthogonal"
    texts = F.normalize(Toy().encode_text(PROMPTS.flat), dim=1)
    energy, eigen = (texts @ ways.T).square().sum(), torch.linalg.eigvalsh(texts @ texts.T)
    assert float(energy) == pytest.approx(float(eigen[-4:].sum()), rel=1e-4), "no four directions tell more"


@pytest.mark.parametrize("rank", [256, 6, 1])
def test_the_projection_of_cola_changes_no_answer_unless_it_forgets_texts(rank: int) -> None:
    images = middle(6)
    plain, found = Toy().answer(PROMPTS)(images), COLA(Toy(), rank=rank).answer(PROMPTS)(images)
    ratio = found / plain
    same = torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3)
    assert same == (rank >= 6), "all cosines of an image grow by one factor; 6 prompts have 6 directions"
    assert bool((ratio[:, 0] > 1.0).all()) or rank == 1


def test_cola_takes_the_captions_of_a_retrieval_and_needs_texts() -> None:
    captions = Toy().encode_text(["a red circle", "two blue stars"])
    found = COLA(Toy()).answer(captions)(middle(6))
    assert torch.linalg.matrix_rank(found) == 2
    with pytest.raises(CrossguardError, match="COLA compares images with the texts of classes, and none were given"):
        COLA(Toy()).answer()


# --- Smoothed ---


@dataclass(frozen=True)
class Halves(Toy):
    """Tells the mean of the first color from one half: of two classes, with noise the first has probability
    Phi((mean - 1/2) * pixels^1/2 / std)."""

    def encode_image(self, images: Tensor) -> Tensor:
        side = images[:, 0].mean((1, 2)) - 0.5
        return torch.stack([side, -side], 1)

    def encode_text(self, texts: Any) -> Tensor:
        return torch.eye(2)[[0 if "red" in text else 1 for text in texts]]


def votes(logits: Tensor, draws: int) -> Tensor:
    """Of each class, with a share of one more."""
    return logits.exp() * (draws + 1)


def test_the_vote_is_that_of_the_normal_distribution() -> None:
    prompts = Prompts.of(("red", "blue"), ("a {}",))
    model = Smoothed(Halves(), std=0.1, draws=400)
    side = torch.tensor([-0.02, 0.0, 0.01, 0.03])
    images = (0.5 + side).view(4, 1, 1, 1).expand(4, 3, 6, 6)
    with drawing(keys("abcd")):
        found = votes(model.answer(prompts)(images), 400)
    assert torch.allclose(found.sum(1), torch.tensor(401.0), atol=1e-2)
    wanted = torch.distributions.Normal(0.0, 1.0).cdf(side * 6 / 0.1)
    assert torch.allclose(found[:, 0] / 400, wanted, atol=0.08)  # three standard deviations of 400 votes


def test_a_vote_has_the_gradient_of_the_mean_probability() -> None:
    answer, pixels = Smoothed(Toy(), std=0.1, draws=5).answer(PROMPTS), middle(6).requires_grad_(True)
    assert answer.soft is not None and answer.masks and answer.random
    slopes = []
    for way in (answer.hard, answer.soft):
        with drawing(SEEDS):
            said = way(pixels)
        slopes.append(torch.autograd.grad(said.logits[:, 0].sum(), pixels)[0])
    assert torch.allclose(*slopes, atol=1e-6) and bool(slopes[0].any())
    with drawing(SEEDS):
        keep = Smoothed(Toy(), std=0.1, draws=5)
        noisy = [(pixels + 0.1 * keep.normal(pixels)).clamp(0, 1) for _ in range(5)]
        mean = torch.stack([Toy().answer(PROMPTS)(one).softmax(1) for one in noisy]).mean(0)
    assert torch.allclose(said.logits.exp(), mean, atol=1e-5)


def test_without_noise_all_votes_are_for_one_class() -> None:
    images = middle(6)
    found = votes(Smoothed(Toy(), std=0.0, draws=7).answer(PROMPTS)(images), 7)
    plain = Toy().answer(PROMPTS)(images)
    assert torch.allclose(found, 7.0 * F.one_hot(plain.argmax(1), 3) + plain.softmax(1), atol=1e-3)


def test_classes_of_equally_many_votes_are_told_apart() -> None:
    """Attacks take classes of equal logits for one class with two names."""
    answer, images = Smoothed(Toy(), std=0.3, draws=2).answer(PROMPTS), middle(64)
    with drawing(keys(map(str, range(64)))):
        first, second, _ = votes(answer(images), 2).topk(3).values.unbind(1)
    tied = (first > 1.0) & (first < 2.0)
    assert int(tied.sum()) > 10 and bool((first > second)[tied].all())


@pytest.mark.parametrize(
    ("model", "forwards"),
    [(CLIPure(Toy()), 1), (COLA(Toy()), 1), (Smoothed(Toy()), 100), (Smoothed(TTC(Toy()), draws=3), 12)],
)
def test_what_an_image_costs_is_counted(model: Any, forwards: int) -> None:
    with counting() as costs, torch.no_grad(), drawing(SEEDS):
        model.answer(PROMPTS)(middle(6))
    assert costs.forwards == 6 * forwards


@pytest.mark.parametrize("model", [CLIPure(RN(Tiny())), COLA(Tiny()), Smoothed(TTC(Tiny()), draws=3, std=0.05)])
def test_they_meet_the_contract(model: Any) -> None:
    check_wrapper(model)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CLIPure(Toy(), step=0.0), "does not climb; give a positive number"),
        (lambda: CLIPure(Toy(), steps=0), "does nothing; give 1 or more"),
        (lambda: CLIPure(Toy(), templates=()), "makes no blank text"),
        (lambda: CLIPure(Toy(), templates=("a photo",)), "makes no blank text"),
        (lambda: COLA(Toy(), rank=0), "leaves nothing of an embedding; give 1 or more"),
        (lambda: Smoothed(Toy(), draws=0), r"Smoothed\(draws=0\) asks nobody; give 1 or more"),
        (lambda: Smoothed(Toy(), std=-0.1), "give 0 or more, in pixels"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        make()
