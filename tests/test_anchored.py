"""Trainings that the model as it was holds in place: losses and gradients against formulas written out, and the
contract of every recipe."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import ClassFrames, Combined, Deep
from crossguard.attacks.text import Charmer
from crossguard.budgets import Characters
from crossguard.defenses.anchored import AGFT, LEAF, TGAZSR, AdvFLYP, Attention, RobustHead
from crossguard.defenses.optimizers import SGD
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.step import Inputs
from crossguard.defenses.terms import CLEAN, START, Need
from crossguard.models.fresh import Fresh, FreshViT
from crossguard.models.huggingface import HuggingFace
from crossguard.testing import check_recipe
from fixtures import Blots, save_clip
from formulas import BUDGET, INNER, PARTS, PROMPTS, check_formula, kl, logits, moved, refused, started


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return HuggingFace(str(save_clip(tmp_path_factory.mktemp("clip"))))


# --- AGFT ---


def test_agft_is_the_cross_entropy_with_a_softened_answer(base: Fresh, tmp_path: Path) -> None:
    """But for the entropy of the teacher, which has no gradient: 30 and 0.5 times 30 as factors on cosines."""

    def formula(student: Any, start: Any, other: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
        del other, labels
        with torch.no_grad():
            soft = logits(start, clean, 15.0).softmax(1)
        entropy = -(soft * soft.log()).sum(1).mean()
        return F.cross_entropy(logits(student, bad, 30.0), soft) - entropy

    check_formula(AGFT(scale=30.0, softened=0.5), formula, base, base, tmp_path)


# --- TGA-ZSR ---


def enlarged(side: int, size: int) -> Tensor:
    """The bilinear enlargement of a row of so many pixels, as a matrix: pixel centers at half numbers, borders held."""
    found = torch.zeros(size, side)
    for row in range(size):
        place = min(max((row + 0.5) * side / size - 0.5, 0.0), side - 1.0)
        left = min(int(place), side - 2)
        found[row, left], found[row, left + 1] = 1.0 - (place - left), place - left
    return found


def attention(network: Any, images: Tensor, texts: Tensor, size: int, over_tokens: bool) -> Tensor:
    """Written out from the layers of a stock CLIP."""
    vision = network.stock.vision_model
    layers = vision(pixel_values=network.preprocess(images)).last_hidden_state
    tokens = network.stock.visual_projection(vision.post_layernorm(layers))
    tokens = tokens / tokens.norm(dim=1 if over_tokens else 2, keepdim=True)
    near = torch.stack([one[1:] @ text for one, text in zip(tokens, texts, strict=True)])
    near = torch.stack([(one - one.min()) / (one.max() - one.min()) for one in near])
    stretch = enlarged(4, size)
    return torch.stack([stretch @ one.view(4, 4) @ stretch.T for one in near]).flatten(1)


@pytest.mark.parametrize("over_tokens", [False, True])
def test_tgazsr_is_the_formula_of_its_paper(clip: HuggingFace, tmp_path: Path, over_tokens: bool) -> None:
    def formula(student: Any, start: Any, other: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
        del other
        texts = F.normalize(student.encode_text(PROMPTS), dim=1)[labels].detach()
        with torch.no_grad():
            there = attention(start, clean, texts, 10, over_tokens)
        moved, mine = (attention(student, images, texts, 10, over_tokens) for images in (bad, clean))
        near = 0.08 * (moved - there).norm(dim=1) + 0.05 * (mine - there).norm(dim=1)
        return F.cross_entropy(logits(student, bad), labels) + near.mean()

    check_formula(TGAZSR(size=10, over_tokens=over_tokens), formula, clip, clip, tmp_path)


def test_the_map_of_the_model_as_it_was_is_made_once_a_step(
    clip: HuggingFace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = list[Tensor](), Attention._map

    def counted(self: Attention, patches: Tensor, image: Tensor, texts: Tensor) -> Tensor:
        made.append(patches)
        return make(self, patches, image, texts)

    monkeypatch.setattr(Attention, "_map", counted)
    learner = started(TGAZSR(steps=1, batch=8, image_attack=INNER), clip, tmp_path).learner
    inputs = learner.views(0)
    learner.loss(0, inputs)
    assert len(made) == 3  # of the adversarial images, of the clean ones, and of these as it was
    _, seen = learner.loss(0, inputs)
    other = seen.replaced({Need("patches", CLEAN, START): seen.patches(CLEAN, START).flip(0)})
    before, after = (Attention(size=224).each(one) for one in (seen, other))
    assert len(made) == 3 + 3 + 1 + 2 and not torch.allclose(before, after)  # another view has a map of its own


def test_tgazsr_without_patches_is_refused(base: Fresh, tmp_path: Path) -> None:
    run = started(TGAZSR(steps=1, batch=8, image_attack=INNER), base, tmp_path)
    assert "has no patch tokens" in refused(lambda: run.learner.take(0))


def test_patches_of_a_vit_are_pooled_as_its_class_token(base: Fresh) -> None:
    """The pooled embedding is that of the class token, written out; so are the patches."""
    word = FreshViT(tokenizer=base.tokenizer, size=16, patch=4, width=32, depth=2, dimensions=12)
    network, images = word.load(), torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    stock: Any = network.stock
    with torch.no_grad():
        embeddings, tokens = network.patches(images)
        layers = stock.vision_model(pixel_values=network.preprocess(images)).last_hidden_state  # type: ignore[operator]
        pooler = stock.vision_model.pooler
        every = stock.visual_projection(torch.tanh(layers @ pooler.dense.weight.T + pooler.dense.bias))
    assert torch.allclose(embeddings, network.encode_image(images), atol=1e-6)
    assert torch.allclose(every[:, 0], embeddings, atol=1e-5) and torch.allclose(every[:, 1:], tokens, atol=1e-5)


@pytest.mark.parametrize("part", ["context", "deep tokens", "both sides", "frame", "several", "two kinds of tokens"])
def test_patches_of_a_model_with_prompts_are_those_of_its_images(clip: HuggingFace, part: str) -> None:
    """Learned tokens are read behind the class token and the sixteen patches, and are no patches."""
    word = PARTS.get(part, Combined((Deep(2), Deep(3, depth=1))))
    network: Any = word.attach(clip.load(), Blots().prompts(), 0)
    tokens = {"deep tokens": 2, "several": 2, "two kinds of tokens": 5}.get(part, 0)
    tokens = len(network.context) if part == "both sides" else tokens
    images, layers = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), list[Tensor]()
    network.stock.vision_model.encoder.register_forward_hook(lambda _, __, said: layers.append(said.last_hidden_state))
    with torch.no_grad():
        embeddings, found = network.patches(images)
        expected = network.stock.visual_projection(network.stock.vision_model.post_layernorm(layers[0][:, 1:17]))
        assert torch.allclose(embeddings, network.encode_image(images), atol=1e-6)
    assert layers[0].shape[1] == 1 + 16 + tokens and torch.allclose(found, expected, atol=1e-6)


def test_pixels_of_each_class_have_no_patches_of_an_image(clip: HuggingFace) -> None:
    network = ClassFrames(4).attach(clip.load(), Blots().prompts(), 0)
    assert "no patch tokens of an image alone" in refused(lambda: network.patches(torch.zeros(1, 3, 16, 16)))


# --- AdvFLYP ---


def both_ways(found: Tensor) -> Tensor:
    """CLIP's loss without the half: of pairs, in a square of logits whose diagonal belongs together."""
    own = torch.arange(len(found))
    return F.cross_entropy(found, own) + F.cross_entropy(found.T, own)


@pytest.mark.parametrize(("features", "answers"), [(1.0, 1.0), (0.0, 2.0), (0.5, 0.0)])
def test_advflyp_is_the_formula_of_its_code(base: Fresh, tmp_path: Path, features: float, answers: float) -> None:
    def formula(
        student: Any, start: Any, other: Any, clean: Tensor, bad: Tensor, own: Tensor, captions: list[str]
    ) -> Tensor:
        del other
        assert len(captions) < len(own), "some images share a caption"
        loss = 0.5 * both_ways(logits(student, bad, texts=[captions[row] for row in own]))
        unit, there, near = (
            F.normalize(network.encode_image(images), dim=1)
            for network, images in ((student, bad), (start, bad), (student, clean))
        )
        loss = loss + features * ((unit - there.detach()).norm(dim=1) + (unit - near).norm(dim=1)).mean()
        mine = logits(student, bad, texts=captions)
        others = logits(start, bad, texts=captions).detach(), logits(student, clean, texts=captions)
        return loss + answers * sum(kl(mine, one) for one in others).mean()

    check_formula(AdvFLYP(features=features, answers=answers), formula, base, base, tmp_path)


# --- LEAF ---


def test_leaf_is_the_formula_of_its_paper(clip: HuggingFace, tmp_path: Path) -> None:
    """Value and gradient at the texts that the step itself made, of a text tower that has moved already; the edits are
    of one character, climb the distance, and are drawn anew in each step."""
    learner = started(LEAF(steps=2, batch=8, warmup=0), clip, tmp_path).learner
    other, start = moved(clip, tmp_path / "moved").load(), clip.load()
    learner.put({name: dict(other.named_parameters())[name.removeprefix("network.")] for name in learner.trained})
    before: Any = copy.deepcopy(learner.network)
    inputs = learner.views(0)
    clean, bad = inputs.texts["clean", "classes"], inputs.texts["adversarial", "classes"]
    edits = [Characters().size(one, old) for one, old in zip(bad, clean, strict=True)]
    assert set(edits) <= {0, 1} and sum(edits) > len(clean) / 2  # where no edit climbs, none is made

    def far(texts: list[str]) -> Tensor:
        return (before.encode_text(texts) - start.encode_text(clean).detach()).square().sum(1)

    assert bool((far(bad) > far(clean))[torch.tensor(edits) > 0].all())
    value, _ = learner.loss(0, inputs)
    assert float(value.detach()) == pytest.approx(float(far(bad).mean().detach()), rel=1e-4)
    names = [name.removeprefix("network.") for name in learner.trained]
    assert all(name.startswith(("model.text_model", "model.text_projection")) for name in names)
    left = torch.autograd.grad(value, list(learner.trained.values()))
    right = torch.autograd.grad(far(bad).mean(), [dict(before.named_parameters())[name] for name in names])
    assert all(torch.allclose(one, two, rtol=1e-3, atol=1e-5) for one, two in zip(left, right, strict=True))
    assert max(float(one.abs().max()) for one in left) > 1e-4
    same = Inputs(inputs.batches, inputs.images, {("clean", "classes"): clean})
    adversary = learner.stages[0].adversaries[0]
    later = [learner._attacked_texts(adversary, same, "classes", step) for step in (0, 1)]
    assert later[0] == bad and later[1] != bad


# --- A head alone ---


def of_classes(student: Any, start: Any, other: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits(student, bad), labels)


def of_distances(student: Any, start: Any, other: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
    return (student.encode_image(bad) - start.encode_image(clean).detach()).square().sum(1).mean()


def of_pairs(student: Any, start: Any, other: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
    return both_ways(logits(student, bad, texts=[PROMPTS[label] for label in labels]))


HEADS = {"cross-entropy": of_classes, "distance": of_distances, "contrastive": of_pairs}


@pytest.mark.parametrize("loss", HEADS)
def test_a_head_descends_its_loss_and_is_all_that_is_trained(base: Fresh, tmp_path: Path, loss: str) -> None:
    recipe = RobustHead(loss=loss)
    check_formula(recipe, HEADS[loss], base, base, tmp_path / "formula")
    run = started(replace(recipe, steps=1, batch=8), base, tmp_path / "run")
    assert list(run.learner.trained) == ["network.model.visual_projection.weight"]


# --- The contract ---

SGDS = SGD(lr=0.05)
RECIPES: dict[str, Recipe] = {
    "AGFT": AGFT(optimizer=SGDS, image_attack=INNER, budget=BUDGET),
    "TGAZSR": TGAZSR(optimizer=SGDS, image_attack=INNER, budget=BUDGET, size=16),
    "AdvFLYP": AdvFLYP(optimizer=SGDS, image_attack=INNER, budget=BUDGET),
    "LEAF": LEAF(optimizer=SGDS, text_attack=Charmer(positions=5, random=True)),
    "RobustHead": RobustHead(loss="contrastive", image_attack=INNER, budget=BUDGET),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "AGFT": (lambda: AGFT(softened=0.0), "AGFT(scale=180.0, softened=0.0) teaches nothing"),
    "TGAZSR": (lambda: TGAZSR(size=0), "TGAZSR(size=0)"),
    "RobustHead": (lambda: RobustHead(loss="none"), "give one of cross-entropy, distance, contrastive"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_contract(base: Fresh, clip: HuggingFace, name: str) -> None:
    check_recipe(RECIPES[name], clip if name == "TGAZSR" else base, Blots(count=8))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["AGFT", "TGAZSR", "AdvFLYP", "LEAF"])
def test_every_part_has_the_gradient_of_its_loss(clip: HuggingFace, tmp_path: Path, name: str, part: str) -> None:
    """A small step against the gradient lowers the loss at the same views by its squared length times the rate."""
    recipe = replace(RECIPES[name], steps=2, batch=8, warmup=0, trains=PARTS[part])
    if name in ("AdvFLYP", "LEAF") and part == "contexts":  # they learn from captions
        assert "reads no class prompts" in refused(lambda: started(recipe, clip, tmp_path))
        return
    learner = started(recipe, clip, tmp_path).learner
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # where the student is the model as it was, some distances have no gradient
        for one in learner.trained.values():
            one.add_(0.05 * torch.randn(one.shape, generator=generator))
    if name == "LEAF" and part in ("deep tokens", "frame"):  # it sees texts alone
        assert "LEAF trains nothing" in refused(lambda: learner.take(0))
        return
    inputs = learner.views(0)
    loss, _ = learner.loss(0, inputs)
    loss.backward()
    square = sum(float(one.grad.square().sum()) for one in learner.trained.values() if one.grad is not None)
    drop = 3e-4 * float(loss.detach())
    with torch.no_grad():
        for one in learner.trained.values():
            if one.grad is not None:
                one.sub_(one.grad, alpha=drop / square)
        less, _ = learner.loss(0, inputs)
    assert float(loss.detach() - less) == pytest.approx(drop, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_take_the_steps_of_one(base: Fresh, clip: HuggingFace, name: str) -> None:
    check_recipe(RECIPES[name], clip if name == "TGAZSR" else base, Blots(count=8), processes=True)


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_teach_nothing_are_refused(name: str) -> None:
    attempt, said = REFUSED[name]
    assert said in refused(attempt)
