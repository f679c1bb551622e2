"""Defenses that act where they see an attack, against restatements of what their authors published."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import CSR, DOC, RN, TTC, CrossguardError, Gated, GaussianNoise, HedgeDefense, Said, Smoothed, Tiny
from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.models.base import VisionLanguageModel
from crossguard.models.views import gaussian_pass
from crossguard.seeds import among, by_position, drawing, drawn, keys, replay, uniform
from crossguard.testing import check_wrapper
from toys import Toy, last_asked, middle

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",))
SEEDS = keys("abcdef")
IMAGES = middle(6)
PICTURES = uniform(by_position(6), (3, 32, 32))
encode = Toy().encode_image


def told(model: VisionLanguageModel, images: Tensor = IMAGES, rows: slice = slice(None)) -> Said:
    with drawing(SEEDS[rows]), torch.no_grad():
        return model.answer(PROMPTS).hard(images[rows])


def halved(model: Any, name: str, images: Tensor = IMAGES) -> Any:
    """The same with a threshold that half of the images are below."""
    gate = told(model, images).gates[name]
    sign = -1.0 if isinstance(model, Gated) else 1.0
    return replace(model, tau=model.tau - sign * float(gate.sort().values[2:4].mean()))


# --- DOC ---


def doc(image: Tensor, model: DOC, start: Tensor, score: list[Tensor], aside: list[Tensor]) -> tuple[Tensor, float]:
    """One image, restated from the paper's equations 5 to 11."""
    clean = encode(image)
    cosines = [F.cosine_similarity(encode((image + noise).clamp(0, 1)), clean) for noise in score]
    tau = 1.0 - sum(cosines) / len(cosines)
    delta, momentum = start, torch.zeros_like(image)
    for noise in aside:
        moving = delta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad((encode(image + moving) - clean).norm(), moving)
        g = gradient / gradient.norm()
        orthogonal = noise - (noise * g).sum() * g
        d = g + model.aside * orthogonal / orthogonal.norm()
        momentum = model.momentum * momentum + (1 - model.momentum) * d
        delta = (delta + model.step * model.eps * momentum.sign()).clamp(-model.eps, model.eps)
        delta = torch.max(torch.min(delta, 1 - image), -image)
    weight = torch.sigmoid(model.sharpness * (model.tau - tau))
    return (image + weight * delta + (1 - weight) * start).clamp(0, 1), float(tau)


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("images", [IMAGES, IMAGES - 0.4], ids=["middle", "border"])
def test_doc_is_that_of_its_equations(images: Tensor, signs: bool) -> None:
    model = halved(DOC(Toy(), aside=0.5, sharpness=2000.0, signs=signs), "score", images)
    with drawing(SEEDS):
        score = [model.normal(images, "score") if signs else model.uniform(images, "score") for _ in range(5)]
        score = [model.eps * (one.sign() if signs else one) for one in score]
        start = (model.eps * model.uniform(images, "start")).clamp(min=-images, max=1 - images)
        aside = [model.normal(images, "aside") for _ in range(4)]
    wanted = [
        doc(images[i, None], model, start[i, None], [one[i, None] for one in score], [one[i, None] for one in aside])
        for i in range(6)
    ]
    found = last_asked(model, images, SEEDS, PROMPTS)
    assert torch.allclose(found, torch.cat([image for image, _ in wanted]), atol=1e-5)
    gate = told(model, images).gates["score"]
    assert torch.allclose(gate, model.tau - torch.tensor([tau for _, tau in wanted]), atol=1e-6)
    assert int((gate > 0).sum()) == 3


# --- CSR ---


def csr(image: Tensor, model: CSR) -> tuple[Tensor, float]:
    """One image, restated from the authors' code."""

    def features(pixels: Tensor) -> Tensor:
        return F.normalize(encode(pixels), dim=-1)

    target, own = features(gaussian_pass(image, model.radius)), features(image)
    target, own = target.detach(), own.detach()
    cosine = float((target * own).sum())
    if cosine >= model.tau:
        return image, cosine
    current, best, most = image.clone(), image, -float("inf")
    for step in range(model.steps + 1):
        current.requires_grad_(True)
        score = (features(current) * target).sum() - (features(current) * own).sum()
        if float(score.detach()) > most:
            best, most = current.detach(), float(score.detach())
        if step < model.steps:
            (gradient,) = torch.autograd.grad(-score, current)
            moved = current.detach() - model.step * model.eps * gradient.sign()
            current = (image + (moved - image).clamp(-model.eps, model.eps)).clamp(0, 1)
    return best, cosine


@pytest.mark.parametrize(
    "model", [CSR(Toy(), radius=0.4), CSR(Toy(), radius=0.2, eps=0.3, step=1.0, steps=4)], ids=["", "overshooting"]
)
@pytest.mark.parametrize("images", [IMAGES, IMAGES - 0.4], ids=["middle", "border"])
def test_csr_is_that_of_its_code(model: CSR, images: Tensor) -> None:
    model = halved(model, "cosine", images)
    wanted = [csr(image[None], model) for image in images]
    found = last_asked(model, images, SEEDS, PROMPTS)
    apart = (found - torch.cat([image for image, _ in wanted])).abs() > 1e-5
    assert float(apart.float().mean()) < 5e-3, "signs of gradients of rounding alone"
    gate = told(model, images).gates["cosine"]
    assert torch.allclose(gate, model.tau - torch.tensor([cosine for _, cosine in wanted]), atol=1e-5)
    assert int((gate > 0).sum()) == 3
    assert torch.equal(found[gate <= 0], images[gate <= 0]), "what is taken for clean stays to the bit"


def test_an_image_that_is_taken_for_clean_by_csr_costs_less() -> None:
    model = halved(CSR(Toy(), radius=0.4), "cosine")
    for tau, forwards, backwards in ((0.0, 3 * 6, 0), (1.0, 7 * 6, 3 * 6), (model.tau, 3 * 6 + 4 * 3, 3 * 3)):
        with counting() as costs:
            told(replace(model, tau=tau))
        assert (costs.forwards, costs.backwards) == (forwards, backwards)


def test_the_filter_of_csr_is_that_of_its_code_at_224_pixels() -> None:
    """There a Gaussian of 40 cycles a side."""
    place = torch.arange(224)
    for cycles in (10, 40, 80):
        wave = torch.cos(2 * torch.pi * cycles * place / 224).expand(1, 3, 224, 224)
        kept = (gaussian_pass(0.5 + 0.4 * wave, CSR(Toy()).radius) - 0.5) / 0.4
        wanted = torch.exp(torch.tensor(-(cycles**2) / (2 * 40**2)))
        assert torch.allclose(kept, wanted * wave, atol=1e-4)


# --- Gated ---


def test_a_gate_lets_the_defense_answer_or_the_model_without_it() -> None:
    model = halved(Gated(HedgeDefense(Toy(), steps=3), draws=2), "drift")
    said, defended, plain = told(model), told(model.base), told(Toy())
    opened = said.gates["drift"] > 0
    assert int(opened.sum()) == 3
    assert torch.allclose(said.logits[opened], defended.logits[opened], atol=1e-4)
    assert torch.allclose(said.logits[~opened], plain.logits[~opened], atol=1e-4)
    assert torch.allclose(said.embeddings[opened], defended.embeddings[opened], atol=1e-5)
    assert said.read is not None and torch.allclose(said.read(said.embeddings), said.logits, atol=1e-4)
    with drawing(SEEDS):
        noisy = [(IMAGES + model.eps * model.uniform(IMAGES)).clamp(0, 1) for _ in range(2)]
    cosines = [F.cosine_similarity(encode(one), encode(IMAGES)) for one in noisy]
    assert torch.allclose(said.gates["drift"], 1 - sum(cosines) / 2 - model.tau, atol=1e-5)


def test_who_passes_the_gate_of_no_defense_pays_little() -> None:
    model = halved(Gated(HedgeDefense(Toy(), steps=3)), "drift")
    for tau, forwards, backwards in ((1.0, 3 * 6, 0), (0.0, 6 * 6, 3 * 6), (model.tau, 3 * 3 + 6 * 3, 3 * 3)):
        with counting() as costs:
            told(replace(model, tau=tau))
        assert (costs.forwards, costs.backwards) == (forwards, backwards)


def test_around_a_model_without_a_defense_a_gate_changes_nothing() -> None:
    assert torch.allclose(told(Gated(Toy())).logits, told(Toy()).logits, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        Gated(TTC(Toy(), tau=0.03)),
        Gated(TTC(CSR(Toy(), tau=0.99), tau=0.03)),
        Gated(Gated(RN(Toy()))),
        Gated(TTC(TTC(GaussianNoise(Toy(), 2 / 255), tau=0.05), tau=0.05)),
        CSR(TTC(Toy(), tau=0.04), tau=0.98, radius=0.3),
    ],
    ids=["ttc", "ttc-csr", "gated", "ttc-ttc", "csr-ttc"],
)
def test_gates_around_and_inside_say_in_one_draw_what_was_done(model: Any) -> None:
    """Whoever else is in the batch, and also when it is asked once more."""
    model = halved(model, "drift" if isinstance(model, Gated) else "cosine")
    answer = model.answer(PROMPTS)
    with torch.no_grad(), drawing(SEEDS):
        values = list[Tensor]()
        for _ in range(2):
            again, said = replay(), answer.hard(IMAGES)
            assert set(said.gates) == set(answer.gates)
            for name, gate in answer.gates.items():
                with again():
                    assert torch.allclose(gate(IMAGES), said.gates[name], atol=1e-5), name
            values.append(said.logits)
    singles = [told(model, rows=slice(i, i + 1)) for i in range(6)]
    assert torch.allclose(values[0], torch.cat([one.logits for one in singles]), atol=1e-3)
    for name in answer.gates:
        whole = torch.cat([one.gates[name] for one in singles])
        assert torch.allclose(told(model).gates[name], whole, atol=1e-4)
    assert 0 < int((said.gates[next(iter(answer.gates))] > 0).sum()) < 6
    assert not torch.equal(*values), "another answer has another draw"


def test_the_smooth_gate_lies_between_both_answers() -> None:
    model = Gated(HedgeDefense(Toy(), steps=3))
    answer = model.answer(PROMPTS)
    assert answer.soft is not None
    for tau in (0.0, 0.02):
        answer = replace(model, tau=tau).answer(PROMPTS)
        assert answer.soft is not None
        with drawing(SEEDS):
            soft = answer.soft(IMAGES.clone().requires_grad_(True))
        gate = told(replace(model, tau=tau)).gates["drift"]
        share = torch.sigmoid(gate / 0.05)[:, None]
        defended, plain = model.base.answer(PROMPTS).smooth.hard(IMAGES), told(Toy())
        assert torch.allclose(soft.logits, share * defended.logits + (1 - share) * plain.logits, atol=1e-3)
        assert soft.read is not None and soft.read(soft.embeddings).shape == (6, 3)


# --- Noise of a part of a batch ---


def test_a_part_of_a_batch_draws_what_it_draws_in_any_company() -> None:
    def draws(which: Tensor, seeds: Tensor = SEEDS, count: int = 6) -> list[Tensor]:
        with drawing(seeds):
            found = list[Tensor]()
            for _ in range(2):
                with among(which, "part"):
                    found.append(drawn(int(which.sum()), "inside"))
            return [*found, drawn(count, "outside")]

    every, some = torch.ones(6, dtype=torch.bool), torch.tensor([True, False, False, True, True, False])
    whole, part, none = draws(every), draws(some), draws(~every)
    for one, other in zip(whole[:2], part[:2], strict=True):
        assert torch.equal(one[some], other)
    assert not torch.equal(whole[0], whole[1]), "another time it draws anew"
    assert torch.equal(whole[2], part[2]) and torch.equal(whole[2], none[2])
    views = draws(every, SEEDS[:3])
    assert torch.equal(draws(some, SEEDS[:3])[0], views[0][some]) and len(set(views[0].tolist())) == 6
    with among(some, "nobody lends"):
        assert len(drawn(3)) == 3


# --- All of them ---


@pytest.mark.parametrize(
    "model", [DOC(RN(Tiny())), CSR(RN(Tiny())), Gated(TTC(Tiny())), Smoothed(Gated(TTC(Tiny())), 0.1, 2)]
)
def test_they_meet_the_contract(model: Any) -> None:
    check_wrapper(model)


def test_what_doc_costs_is_counted() -> None:
    with counting() as costs:
        told(DOC(Toy()))
    assert (costs.forwards, costs.backwards) == (6 * 11, 6 * 4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: DOC(Toy(), tau=1.5), r"DOC\(tau=1.5\) is no threshold.* from 0 to 1"),
        (lambda: DOC(Toy(), momentum=1.0), "give 0 or more, below 1"),
        (lambda: DOC(Toy(), aside=-1.0), "is not possible"),
        (lambda: DOC(Toy(), draws=0), r"DOC\(draws=0\) looks at nothing; give 1 or more"),
        (lambda: CSR(Toy(), tau=-0.1), "from 0 to 1"),
        (lambda: CSR(Toy(), radius=0.0), "leaves nothing"),
        (lambda: CSR(Toy(), steps=-1), "give 0 or more"),
        (lambda: Gated(Toy(), tau=1.5), r"Gated\(tau=1.5\) is no threshold of a drift; give one from 0 to 1"),
        (lambda: Gated(Toy(), eps=-0.1), "give 0 to 1, in pixels"),
        (lambda: Gated(Toy(), draws=0), "looks at nothing"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        make()
