"""Attacks on images and captions together: published formulas restated in loops, and the contract of all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cache
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crossguard
from crossguard import (
    PGD,
    SGA,
    Alternating,
    Both,
    CoAttack,
    CrossguardError,
    Independent,
    Joint,
    Linf,
    Retrieval,
    Scenes,
    SepAttack,
    Square,
    Substitute,
    Synonyms,
    Targeted,
    Tiny,
    Untargeted,
    Words,
    Worst,
    ZeroShot,
    evaluate,
)
from crossguard.attacks import joint as joint_module
from crossguard.attacks.base import ImageVictim, MatchVictim, PairVictim, Queries
from crossguard.attacks.joint import JointAttack
from crossguard.budgets import L1, L2
from crossguard.gallery import Gallery
from crossguard.models.base import cosine
from crossguard.seeds import by_position, uniform
from crossguard.words import build, is_word, names, show

LIKES = {
    "red": ["crimson", "scarlet"], "blue": ["azure", "navy", "teal"], "cat": ["kitten", "feline"],
    "dog": ["hound", "puppy"], "photo": ["picture", "image"], "big": ["large", "huge"],
}  # fmt: skip
CAPTIONS = [
    "a big red cat", "a blue dog", "photo of a dog", "a red cat", "big blue cat", "the cat", "a photo", "red dog photo",
    "a blue photo", "dog and cat",
]  # fmt: skip
OWNERS = [2, 0, 1, 2, 3, 0, 1, 2, 4, 3]  # ragged and in no order; image 4 has one
BUDGET = Both(Linf(0.06), Words(1))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Substitute:
    """An attack on texts that finds the best single substitution."""
    file = tmp_path_factory.mktemp("lists") / "likes.json"
    file.write_text(json.dumps(LIKES))
    return Substitute(Synonyms(str(file)), order="gain")


@cache
def vector(word: str) -> Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(crc32(word.encode())))


def bag(texts: Sequence[str]) -> Tensor:
    return torch.stack([torch.stack([vector(word) for word in text.split(" ")]).sum(0) for text in texts])


def encode(images: Tensor) -> Tensor:
    """Linear in the pixels, and rounded alike in every batch."""
    weight = torch.randn(8, 3 * 36, generator=torch.Generator().manual_seed(7))
    return ((images - 0.5).flatten(1)[:, None] * weight).sum(2)


def scaled(images: Tensor, texts: Tensor) -> Tensor:
    return 5.0 * cosine(images, texts)


def pictures(count: int = 5) -> Tensor:
    return 0.2 + 0.6 * uniform(by_position(count), (3, 6, 6))


GALLERY = Gallery(encode(pictures()), bag(CAPTIONS), torch.tensor(OWNERS), scaled)


def match(rows: Sequence[int], **options) -> tuple[MatchVictim, Tensor, list[str], Tensor]:
    """The victim for some of the images, the images, their captions in the order of the gallery, and their seeds."""
    places = [place for place, owner in enumerate(OWNERS) if owner in rows]
    owners = torch.tensor([list(rows).index(OWNERS[place]) for place in places])
    queries = Queries.none(len(rows))
    seeds = torch.tensor(rows) + 100
    victim = MatchVictim(
        ImageVictim(encode, queries, seeds + 50),
        bag,
        GALLERY,
        torch.tensor(rows),
        torch.tensor(places),
        owners,
        **options,
    )
    return victim, pictures()[list(rows)], [CAPTIONS[place] for place in places], seeds


EVERY = range(5)


# Published formulas


def tried(text: str) -> list[str]:
    words = text.split(" ")
    return [text] + [
        " ".join([*words[:place], like, *words[place + 1 :]])
        for place, word in enumerate(words)
        for like in LIKES.get(word, ())
    ]


def farthest(text: str, target: Tensor) -> str:
    """The caption, with at most one word replaced, of the least cosine with the target."""
    return min(tried(text), key=lambda one: float(F.cosine_similarity(bag([one])[0], target, dim=0)))


def unit(embedding: Tensor) -> Tensor:
    return embedding / embedding.norm()


def climbed(clean: Tensor, losses, steps: int, step: float, eps: float = 0.06, start: Tensor | None = None) -> Tensor:
    """One image after so many steps of signs, the last one."""
    image = clean if start is None else start
    for _ in range(steps):
        pixels = image.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(losses(pixels), pixels)
        image = image + step * eps * gradient.sign()
        image = torch.minimum(torch.maximum(image, clean - eps), clean + eps).clamp(0.0, 1.0)
    return image


def plain(steps: int, step: float) -> PGD:
    return PGD(steps=steps, step=step, random_start=False, best=False, stop=False)


@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("last_caption", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_co_attack_is_its_formula(divergence: bool, last_caption: bool, steps: int, text: Substitute) -> None:
    victim, images, texts, seeds = match(EVERY)
    attack = CoAttack(plain(steps, 0.3), text, 3.0, divergence, last_caption)
    made, captions = attack.match(victim, images, texts, BUDGET, seeds)
    assert captions == [farthest(caption, bag([caption])[0]) for caption in texts] != texts

    def apart(target: Tensor, new: Tensor) -> Tensor:
        if not divergence:
            return 1.0 - target @ new
        share = target.softmax(0)
        return (share * (share.log() - new.log_softmax(0))).sum()

    for i in EVERY:
        own = [unit(bag([caption])[0]) for caption, owner in zip(captions, OWNERS, strict=True) if owner == i]
        own = own[-1:] if last_caption else own
        clean = unit(encode(images[[i]])[0])

        def loss(pixels: Tensor, own: list[Tensor] = own, clean: Tensor = clean) -> Tensor:
            new = unit(encode(pixels[None])[0])
            return apart(clean, new) + 3.0 * torch.stack([apart(target, new) for target in own]).mean()

        assert torch.allclose(made[i], climbed(images[i], loss, steps, 0.3), atol=1e-6), f"image {i}"


def test_the_quirks_of_co_attack_matter(text: Substitute) -> None:
    victim, images, texts, seeds = match(EVERY)
    one, other = (
        CoAttack(plain(4, 0.3), text, last_caption=last).match(victim, images, texts, BUDGET, seeds)[0]
        for last in (False, True)
    )
    apart = (one - other).flatten(1).abs().amax(1) > 1e-3
    assert apart.tolist() == [True, True, True, True, False], "with one caption the last is all"
    without = CoAttack(plain(4, 0.3), text, alpha=0.0).match(victim, images, texts, BUDGET, seeds)[0]
    assert not torch.equal(without, one)


@pytest.mark.parametrize("budget", [Linf(0.06), L2(0.5), L1(2.0)], ids=str)
def test_a_nonnegative_start_darkens_nothing(budget) -> None:
    images, still = pictures(), PGD(steps=1, step=1e-6, best=False, stop=False)
    made = dataclasses.replace(still, nonnegative_start=True)(encode, images, crossguard.Drift(encode(images)), budget)
    usual = still(encode, images, crossguard.Drift(encode(images)), budget)
    delta = made - images
    assert float(delta.min()) > -1e-5 and torch.allclose(delta, (usual - images).abs(), atol=1e-5)
    assert float((usual - images).min()) < -1e-4
    budget.check(made, images)


def test_co_attack_starts_like_the_released_code(text: Substitute) -> None:
    victim, images, texts, seeds = match(EVERY)
    still = PGD(steps=1, step=1e-6, best=False, stop=False)
    made, _ = CoAttack(still, text, nonnegative_start=True).match(victim, images, texts, BUDGET, seeds)
    assert torch.allclose(made - images, (2 * uniform(seeds, (3, 6, 6)) - 1).abs() * 0.06, atol=1e-5)
    made, _ = CoAttack(still, text).match(victim, images, texts, BUDGET, seeds)
    assert torch.allclose(made - images, (2 * uniform(seeds, (3, 6, 6)) - 1) * 0.06, atol=1e-5)


def resized(image: Tensor, scale: float) -> Tensor:
    small = F.interpolate(image[None], [int(scale * 6), int(scale * 6)], mode="bicubic", align_corners=False)
    return F.interpolate(small.clamp(0, 1), [6, 6], mode="bicubic", align_corners=False).clamp(0, 1)[0]


@pytest.mark.parametrize("scales", [(), (0.5, 1.5), (0.75, 1.25, 2.0)])
@pytest.mark.parametrize("steps", [1, 3])
def test_sga_is_its_formula(scales: tuple[float, ...], steps: int, text: Substitute) -> None:
    victim, images, texts, seeds = match(EVERY)
    made, captions = SGA(plain(steps, 0.25), text, scales, 0.0).match(victim, images, texts, BUDGET, seeds)
    clean = encode(images)
    first = [farthest(caption, clean[owner]) for caption, owner in zip(texts, OWNERS, strict=True)]
    for i in EVERY:
        own = [unit(bag([caption])[0]) for caption, owner in zip(first, OWNERS, strict=True) if owner == i]

        def loss(pixels: Tensor, own: list[Tensor] = own) -> Tensor:
            views = [pixels, *(resized(pixels, scale) for scale in scales)]
            return -torch.stack([unit(encode(view[None])[0]) @ target for view in views for target in own]).sum()

        assert torch.allclose(made[i], climbed(images[i], loss, steps, 0.25), atol=1e-6), f"image {i}"
    after = encode(made)
    assert captions == [farthest(caption, after[owner]) for caption, owner in zip(texts, OWNERS, strict=True)]
    assert first != texts


def test_the_views_of_sga_have_noise_of_their_own_in_every_step(monkeypatch: pytest.MonkeyPatch, text) -> None:
    drawn: list[Tensor] = []
    real = joint_module.normal

    def noted(seeds: Tensor, *rest) -> Tensor:
        drawn.append(seeds)
        return real(seeds, *rest)

    monkeypatch.setattr(joint_module, "normal", noted)
    victim, images, texts, seeds = match(EVERY)
    made, _ = SGA(PGD(steps=4), text).match(victim, images, texts, BUDGET, seeds)
    keys = torch.cat(drawn)
    assert len(drawn) == 4 * 5 and len(keys.unique()) == len(keys), "four views in four steps and the last look"
    assert victim.encode.queries is not None and bool(victim.encode.queries.drew)
    assert victim.encode.queries.gradients.tolist() == [4] * 5, "no image may leave as going in circles"
    again = match(EVERY)
    assert not torch.equal(made, SGA(PGD(steps=4), text, noise=0.2).match(again[0], images, texts, BUDGET, seeds)[0])


def test_sep_attack_drifts_each_side_from_its_own_embedding(text: Substitute) -> None:
    victim, images, texts, seeds = match(EVERY)
    attack = PGD(steps=3)
    made, captions = SepAttack(attack, text).match(victim, images, texts, BUDGET, seeds)
    assert captions == [farthest(caption, bag([caption])[0]) for caption in texts]
    assert torch.equal(made, attack(encode, images, crossguard.Drift(encode(images)), BUDGET.pixels, seeds))


def test_class_prompts_are_the_captions_of_their_images() -> None:
    """Under class prompts the set of an image is the rewritten prompt of its class."""
    classes = bag(["a red cat", "a blue dog", "photo of a dog"])
    labels = torch.tensor([2, 0, 1, 1, 2])
    images, seeds = pictures(), by_position(5)
    logits = ImageVictim(lambda images: scaled(encode(images), classes))
    pair = PairVictim(logits, logits, ImageVictim(encode), lambda: classes)
    made = {
        "co": CoAttack(plain(3, 0.3)).perturb(pair, images, Untargeted(labels), BUDGET, seeds),
        "sga": SGA(plain(3, 0.3), noise=0.0).perturb(pair, images, Untargeted(labels), BUDGET, seeds),
    }
    for i in EVERY:
        target, clean = unit(classes[labels[i]]), unit(encode(images[[i]])[0])

        def co(pixels: Tensor, target: Tensor = target, clean: Tensor = clean) -> Tensor:
            return -(unit(encode(pixels[None])[0]) @ (clean + 3.0 * target))

        def sga(pixels: Tensor, target: Tensor = target) -> Tensor:
            views = [pixels, *(resized(pixels, scale) for scale in (0.5, 0.75, 1.25, 1.5))]
            return -torch.stack([unit(encode(view[None])[0]) @ target for view in views]).sum()

        assert torch.allclose(made["co"][i], climbed(images[i], co, 3, 0.3), atol=1e-6)
        assert torch.allclose(made["sga"][i], climbed(images[i], sga, 3, 0.3), atol=1e-6)
    for attack in (CoAttack(), SGA()):
        with pytest.raises(CrossguardError, match="has none"):
            attack.perturb(dataclasses.replace(pair, classes=None), images, Untargeted(labels), BUDGET, seeds)
        with pytest.raises(CrossguardError, match="needs labels"):
            attack.perturb(pair, images, Targeted(labels), BUDGET, seeds)


# Ours


def strength(victim: MatchVictim, made: tuple[Tensor, list[str]]) -> Tensor:
    """The loss of each image together with its captions."""
    return victim.against_images(bag(made[1])).loss(encode(made[0]))


def test_joint_and_alternating_are_never_weaker_than_what_they_begin_with(text: Substitute) -> None:
    victim, images, texts, seeds = match(EVERY)
    parts = PGD(steps=4), text
    found = {
        kind: strength(victim, kind(*parts).match(victim, images, texts, BUDGET, seeds))
        for kind in (Independent, Joint, Alternating)
    }
    assert bool((found[Joint] >= found[Independent] - 1e-6).all())
    assert bool((found[Alternating] >= found[Joint] - 0.05).all())
    one, three = (
        strength(victim, Alternating(*parts, rounds=rounds).match(victim, images, texts, BUDGET, seeds))
        for rounds in (1, 3)
    )
    assert bool((three >= one - 1e-6).all()), "a later round lost what an earlier one had found"


def test_alternating_returns_the_pair_that_it_measured(text: Substitute) -> None:
    """Image and captions must come from one round: the answer is as strong as the strongest pair that was offered."""
    victim, images, texts, seeds = match(EVERY)
    offered: list[Tensor] = []
    real = joint_module.Found.offer

    def noting(self, rows: Tensor, images: Tensor, won: Tensor, merit: Tensor) -> Tensor:
        offered.append(torch.full((5,), -torch.inf).scatter(0, rows, merit + 1000.0 * won))
        return real(self, rows, images, won, merit)

    attack = PGD(steps=3, best=False, stop=False)  # which offers nothing of its own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_module.Found, "offer", noting)
        made = Alternating(attack, text).match(victim, images, texts, BUDGET, seeds)
    goal, outputs = victim.against_images(bag(made[1])), encode(made[0])
    assert torch.allclose(goal.merit(outputs) + 1000.0 * goal.won(outputs), torch.stack(offered).amax(0), atol=1e-4)


def test_who_has_lost_the_first_place_is_attacked_on() -> None:
    victim, images, texts, seeds = match(EVERY)
    PGD(steps=6).match(victim, images, texts, Linf(0.5), seeds)
    assert victim.encode.queries is not None and victim.encode.queries.gradients.tolist() == [6] * 5


def test_joint_takes_no_second_look_where_the_captions_do_not_matter(text: Substitute) -> None:
    asked = {}
    for goal in ("drift", "rank"):
        victim, images, texts, seeds = match(EVERY, goal=goal)
        Joint(PGD(steps=6), text).match(victim, images, texts, BUDGET, seeds)
        assert victim.encode.queries is not None
        asked[goal] = victim.encode.queries.gradients.tolist()
    assert asked == {"drift": [6] * 5, "rank": [12] * 5}


def test_a_part_of_a_match_is_the_match_of_the_part() -> None:
    whole, part = match(EVERY)[0], match([3, 0, 2])[0]
    kept = whole.at(torch.tensor([3, 0, 2]))
    assert torch.equal(kept.rows, part.rows) and torch.equal(kept.captions, part.captions)
    assert torch.equal(kept.owners, part.owners) and torch.equal(kept.clean_texts, part.clean_texts)
    twice = whole.at(torch.tensor([1, 2, 3])).at(torch.tensor([2, 0]))
    assert twice.rows.tolist() == [3, 1] and twice.captions.tolist() == [2, 4, 6, 9]
    assert twice.owners.tolist() == [1, 0, 1, 0] and twice.encode.rows is not None
    assert twice.encode.rows.tolist() == [3, 1]


# The contract


def kinds() -> list[type]:
    """Every joint attack that the vocabulary offers: a new one is tested the day it is exported."""
    found = [getattr(crossguard, name) for name in names()]
    return [kind for kind in found if is_word(kind) and issubclass(kind, JointAttack)]


def variants(text: Substitute) -> list[JointAttack]:
    quick = PGD(steps=3)
    return [
        *(kind(quick, text) for kind in kinds()),
        CoAttack(
            PGD(steps=3, best=False, stop=False), text, divergence=True, last_caption=True, nonnegative_start=True
        ),
        SGA(quick, text, scales=()),
        Alternating(PGD(steps=3, restarts=2), text, rounds=2),
        Joint(Worst((quick, Square(queries=5))), text),
    ]


NUMBERED = range(len(kinds()) + 4)


def test_all_are_here() -> None:
    assert set(kinds()) == {Independent, Joint, SepAttack, CoAttack, SGA, Alternating}


@pytest.mark.parametrize("goal", ["rank", "drift"])
@pytest.mark.parametrize("number", NUMBERED)
def test_contract_where_images_have_captions(number: int, goal: str, text: Substitute) -> None:
    attack = variants(text)[number]
    assert build(show(attack)) == attack
    victim, images, texts, seeds = match(EVERY, goal=goal)
    before = images.clone(), list(texts)
    made, captions = attack.match(victim, images, texts, BUDGET, seeds)
    assert torch.equal(images, before[0]) and texts == before[1], "the attack changed its input"
    assert not made.requires_grad and made.shape == images.shape
    sizes = BUDGET.pixels.check(made, images)
    assert bool((sizes > 0).all())
    assert set(BUDGET.words.check(captions, texts)) <= {0, 1} and captions != texts
    again = attack.match(match(EVERY, goal=goal)[0], images, texts, BUDGET, seeds)
    assert torch.equal(made, again[0]) and captions == again[1], "the same seeds gave another answer"
    other = attack.match(match(EVERY, goal=goal)[0], images, texts, BUDGET, seeds + 1)
    assert not torch.equal(made, other[0])
    assert victim.encode.queries is not None
    for rows in ([0], [1], [2], [3], [4], [3, 1]):
        alone, *given = match(rows, goal=goal)
        image, own = attack.match(alone, *given[:2], BUDGET, given[2])
        assert torch.allclose(image, made[rows], atol=1e-6), f"image {rows} depends on its batch"
        assert own == [captions[place] for place in alone.captions], f"the captions of {rows} depend on their batch"
        assert alone.encode.queries is not None
        for what in ("gradients", "forwards"):
            asked, one = getattr(victim.encode.queries, what), getattr(alone.encode.queries, what)
            assert torch.equal(asked[rows], one), f"how often {rows} was asked about depends on its batch"


@pytest.mark.parametrize("number", NUMBERED)
def test_a_budget_of_nothing_changes_nothing(number: int, text: Substitute) -> None:
    attack = variants(text)[number]
    victim, images, texts, seeds = match(EVERY)
    for pixels, words in ((0.0, 0), (0.06, 0), (0.0, 1)):
        made, captions = attack.match(victim, images, texts, Both(Linf(pixels), Words(words)), seeds)
        assert torch.equal(made, images) == (pixels == 0.0)
        assert (captions == texts) == (words == 0)


@pytest.mark.parametrize("number", NUMBERED)
def test_contract_where_classes_have_prompts(number: int, text: Substitute) -> None:
    attack = variants(text)[number]
    prompts = ["a red cat", "a blue dog", "photo of a dog"]
    rivals = [frozenset[str]()] * 3
    rewritten = attack.rewrite(bag, prompts, BUDGET, rivals)
    BUDGET.words.check(rewritten, prompts)
    assert rewritten == [farthest(prompt, bag([prompt])[0]) for prompt in prompts]
    before, after = bag(prompts), bag(rewritten)
    images, labels, seeds = pictures(), torch.tensor([2, 0, 1, 1, 2]), by_position(5) + 9

    def crafted(rows: list[int], eps: float = 0.06, seeds: Tensor = seeds) -> Tensor:
        noise = seeds[rows] + 30
        queries = Queries.none(len(rows))
        victims = [
            ImageVictim(answer, queries, noise)
            for answer in (lambda x: scaled(encode(x), before), lambda x: scaled(encode(x), after), encode)
        ]
        pair = PairVictim(*victims, lambda: after)
        return attack.perturb(pair, images[rows], Untargeted(labels[rows]), Both(Linf(eps), Words(1)), seeds[rows])

    clean = images.clone()
    made = crafted([0, 1, 2, 3, 4])
    assert torch.equal(images, clean) and not made.requires_grad
    BUDGET.pixels.check(made, images)
    assert torch.equal(made, crafted([0, 1, 2, 3, 4])) and not torch.equal(
        made, crafted([0, 1, 2, 3, 4], seeds=seeds + 1)
    )
    singles = torch.cat([crafted([i]) for i in EVERY])
    assert torch.allclose(made, singles, atol=1e-6)
    assert torch.equal(crafted([0, 1, 2, 3, 4], eps=0.0), images)
    with pytest.raises(CrossguardError, match="allows no change of texts"):
        attack.spends(Linf(0.1))
    with pytest.raises(CrossguardError, match="allows no change of pixels"):
        attack.spends(Words(1))


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("task", [Retrieval(Scenes("object", count=9)), ZeroShot(Scenes("color", count=9))], ids=str)
def test_no_attack_leaves_a_gradient_or_depends_on_the_batch(kind: type, task) -> None:
    budget = Both(Linf(3 / 255), Words(1))
    one, other = (evaluate(task, Tiny(), kind(PGD(steps=2)), budget, batch=size) for size in (9, 4))
    for name in ("clean", "adversarial", "gradients", "forwards"):
        assert np.array_equal(getattr(one.outcomes, name), getattr(other.outcomes, name)), name
    assert one.question == other.question
    assert one.adversarial.successes < one.clean.successes, "nobody was hurt"
    parameters = list(Tiny().network.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_nothing_spent_leaves_the_report_clean(kind: type) -> None:
    task = Retrieval(Scenes("object", count=9))
    report = evaluate(task, Tiny(), kind(PGD(steps=2)), Both(Linf(0.0), Words(0)), batch=4)
    assert np.array_equal(report.ranks.clean, report.ranks.adversarial) and not np.any(report.ranks.size)


# What cannot be


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CoAttack(alpha=-1.0), "give 0 or more"),
        (lambda: CoAttack(alpha=float("inf")), "give 0 or more"),
        (lambda: CoAttack(alpha=float("nan")), "give 0 or more"),
        (lambda: CoAttack(Square(), nonnegative_start=True), "give image=PGD"),
        (lambda: SGA(scales=(0.5, 0.0)), "give factors"),
        (lambda: SGA(scales=(-1.0,)), "give factors"),
        (lambda: SGA(noise=-0.1), "give 0 to 1"),
        (lambda: SGA(noise=float("nan")), "give 0 to 1"),
        (lambda: Alternating(rounds=0), "give 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(make, sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        make()


def test_words_of_joint_attacks_are_what_they_say() -> None:
    quirky = (
        "CoAttack(PGD(steps=10, step=0.125, best=False, stop=False), Substitute(coattack_compat=True), "
        "divergence=True, last_caption=True, nonnegative_start=True)"
    )
    assert show(build(quirky), short=True).startswith("CoAttack(")
    assert quirky in " ".join((CoAttack.__doc__ or "").split()), "the docstring names this very attack"
    assert build("SGA(PGD(best=False, stop=False), Substitute(coattack_compat=True))").image == PGD(
        best=False, stop=False
    )
