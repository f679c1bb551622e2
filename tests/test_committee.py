"""Several models that answer as one: the mean of their logits or probabilities, in every task, attack and training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import (
    HPTGPD,
    PGD,
    BitDepth,
    ClassFrames,
    Committee,
    Linf,
    Scenes,
    Subset,
    TeCoA,
    Tiny,
    TinyViT,
    ZeroShot,
    evaluate,
)
from crossguard.answer import Costs, counting
from crossguard.attacks.base import ImageVictim
from crossguard.data import Prompts
from crossguard.defenses.feed import Feed
from crossguard.defenses.step import Learner
from crossguard.errors import CrossguardError
from crossguard.goals import Untargeted
from crossguard.models.base import VisionLanguageModel
from crossguard.processes import ALONE
from crossguard.seeds import by_position, uniform
from crossguard.testing import check_model
from crossguard.words import build

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}", "a {}"))
IMAGES = uniform(by_position(3), (3, 32, 32))
BOTH = (Tiny(), TinyViT())
LABELS = torch.tensor([0, 1, 2])


def answers(model: VisionLanguageModel) -> Tensor:
    with torch.no_grad():
        return model.classifier(PROMPTS)(IMAGES)


@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_a_committee_is_a_model(mean: str) -> None:
    check_model(Committee(BOTH, mean))


def test_the_answer_is_the_mean_of_those_of_the_members() -> None:
    each = torch.stack([answers(member) for member in BOTH])
    torch.testing.assert_close(answers(Committee(BOTH)), each.mean(0))
    likely = each.softmax(2).mean(0).log()
    torch.testing.assert_close(answers(Committee(BOTH, "probabilities")), likely)


def test_cosines_are_the_mean_of_those_of_the_members() -> None:
    """What a retrieval compares, and what a text that drifts is measured by."""

    def cosines(model: VisionLanguageModel) -> Tensor:
        with torch.no_grad():
            images, texts = model.encode_image(IMAGES), model.encode_text(PROMPTS.flat)
        return F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T

    torch.testing.assert_close(cosines(Committee(BOTH)), torch.stack([cosines(one) for one in BOTH]).mean(0))


@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_the_adversary_climbs_all_members_at_once(mean: str) -> None:
    """The gradient of the log-odds of the mean, by the chain rule from the gradients of each member's logits."""
    goal = Untargeted(LABELS)
    found, losses, _ = ImageVictim(Committee(BOTH, mean).classifier(PROMPTS)).ascend(IMAGES, goal)
    pixels = IMAGES.clone().requires_grad_(True)
    logits = torch.stack([member.classifier(PROMPTS)(pixels) for member in BOTH])
    if mean == "logits":
        wrong = F.cross_entropy(logits.mean(0), LABELS, reduction="none")
    else:
        wrong = -logits.softmax(2).mean(0).gather(1, LABELS[:, None])[:, 0].log()
    odds = (wrong.exp() - 1.0).log()  # of being wrong, which is what `CrossEntropy` climbs
    torch.testing.assert_close(losses, odds.detach(), rtol=1e-3, atol=1e-3)
    expected = torch.autograd.grad(odds.sum(), pixels)[0]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


def test_who_is_fooled_counts_no_more_in_the_mean_of_probabilities() -> None:
    """Of two members one is wrong by far: the mean of logits is wrong with it, the mean of probabilities is not."""

    class Sure(Tiny):
        def __init__(self, factor: float) -> None:
            object.__setattr__(self, "factor", factor)

        def logits(self, images: Tensor, texts: Tensor) -> Tensor:
            del images, texts
            return self.factor * torch.tensor([[1.0, -1.0]])  # type: ignore[attr-defined]

    members = Sure(2.0), Sure(-30.0)
    width = Tiny().encode_text(["a"]).shape[1]
    images, texts = torch.zeros(1, 2 * width), torch.zeros(2, 2 * width)
    assert Committee(members).logits(images, texts).argmax(1).item() == 1
    likely = Committee(members, "probabilities").logits(images, texts).exp()[0]
    right = 1.0 / (1.0 + math.exp(-4.0))
    torch.testing.assert_close(likely, torch.tensor([right / 2, 1.0 - right / 2]))


def test_what_is_crafted_on_a_committee_fools_the_members() -> None:
    task, attack, budget = ZeroShot(Scenes("object", "test")), PGD(steps=5), Linf(8 / 255)
    fooled = [evaluate(task, one, attack, budget, Committee(BOTH), limit=8, batch=8).judged for one in BOTH]
    alone = [evaluate(task, one, attack, budget, BOTH[1 - n], limit=8, batch=8).judged for n, one in enumerate(BOTH)]
    for both, transferred in zip(fooled, alone, strict=True):
        assert both.parts[0][2].value < transferred.parts[0][2].value


def test_a_committee_teaches(tmp_path: Path) -> None:
    """As a proxy, a committee of equals says what one of them says."""
    losses = list[float]()
    for proxy in (TinyViT(), Committee((TinyViT(), TinyViT()))):
        recipe = HPTGPD(proxy=proxy, steps=1, warmup=0, batch=4)
        data = Subset(Scenes("object", "train"), 8)
        feed = Feed(recipe, data, ALONE, torch.device("cpu"), {"classes"}, labelled=True)
        learner = Learner(recipe, Tiny(), {"": feed}, ALONE)
        losses.append(learner.loss(0, learner.views(0))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0.0


def test_a_member_may_have_pixels_for_each_class(tmp_path: Path) -> None:
    """Its embeddings are those under the pixels of every class, side by side."""
    framed = TeCoA(steps=1, batch=4, trains=ClassFrames(pad=4)).fit(
        Tiny(), Subset(Scenes("color", "train"), 8), tmp_path / "framed"
    )
    prompts = Prompts.of(Scenes("color", "train").names, ("a photo of a {}",))
    with torch.no_grad():
        each = [one.classifier(prompts)(IMAGES) for one in (framed, TinyViT())]
        with counting() as costs:
            both = Committee((framed, TinyViT())).classifier(prompts)(IMAGES)
    torch.testing.assert_close(both, torch.stack(each).mean(0))
    assert costs == Costs(forwards=len(IMAGES) * (len(prompts.names) + 1))


def test_an_answer_costs_what_those_of_all_members_cost() -> None:
    pixels = IMAGES.clone().requires_grad_(True)
    with counting() as costs:
        BitDepth(Committee((Committee(BOTH), Tiny()))).classifier(PROMPTS)(pixels).sum().backward()
    assert costs == Costs(3 * len(IMAGES), 3 * len(IMAGES))


def test_what_is_no_committee_is_refused() -> None:
    with pytest.raises(CrossguardError, match="of 1 models is none; give two or more"):
        Committee((Tiny(),))
    with pytest.raises(CrossguardError, match="members must be a tuple of VisionLanguageModel"):
        build("Committee(Tiny())")
    with pytest.raises(CrossguardError, match="put the defense around the Committee"):
        Committee((Tiny(), BitDepth(TinyViT())))
    with pytest.raises(CrossguardError, match="give 'logits' or 'probabilities'"):
        Committee(BOTH, "votes")
