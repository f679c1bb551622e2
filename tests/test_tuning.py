"""Prompt tuning at test time against restatements of the published loops, and against the model itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models.huggingface import HuggingFace
from crossguard.models.tuning import RTPT, TPT, TunedClasses, Tuner, entropy_of_mean, mean_entropy, similar
from crossguard.models.views import tpt_views
from crossguard.models.wrapper import Lent
from crossguard.seeds import drawing
from crossguard.testing import check_wrapper
from fixtures import floats, pictures, save_clip, save_siglip, save_tokenizer, small

FAMILIES = ("clip", "siglip", "dual")
PROMPTS = Prompts.of(("red circle", "blue star", "green box", "thing"), ("a photo of a {}", "two {}"))
KEYS = torch.arange(4) + 30
IMAGES = floats(pictures(4, 32, 32))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFace]:
    root = tmp_path_factory.mktemp("tuning")
    save_tokenizer(root / "tokenizer")
    small(root / "tokenizer", size=32).load().save(root / "dual")
    save_clip(root / "clip")
    save_siglip(root / "siglip")
    return {name: HuggingFace(str(root / name)) for name in FAMILIES}


def few(word: Any, base: HuggingFace, **changes: Any) -> Any:
    """The defense with few views, of which half take part."""
    return word(base, **({"views": 6, "keep": 0.5} | changes))


def asked(word: Tuner, rows: slice = slice(4), prompts: Prompts = PROMPTS) -> Tensor:
    answer = word.answer(prompts)
    with drawing(KEYS[rows]), torch.no_grad():
        return answer(IMAGES[rows])


def restated(word: RTPT, image: Tensor, key: Tensor) -> Tensor:
    """The loop of the authors' code for one image, which embeds views and classes each time anew."""
    model = word.base
    assert isinstance(model, HuggingFace)
    network = model.network
    with drawing(key):
        (views,) = tpt_views(image[None], word.keys(1, "views"), word.views, word.mixed)
    splice = network.splice(PROMPTS.flat, word.words)
    context = torch.nn.Parameter(splice.start.clone())

    def answered(images: Tensor) -> Tensor:
        classes = F.normalize(splice(context), dim=1).view(4, 2, -1).mean(1)
        if not word.steps:  # then the prompts stay as they are, and the words are not put in front of any
            classes = model.class_embeddings(PROMPTS)
        return model.logits(model.encode_image(images), classes)

    def surprise(logits: Tensor) -> Tensor:
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)

    chosen = surprise(answered(views)).argsort()[: int(word.views * word.keep)]
    optimizer = torch.optim.AdamW([context], word.lr)
    for _ in range(word.steps):
        logits = answered(views)[chosen]
        loss = surprise(logits.softmax(1).mean(0, keepdim=True).log()) if word.marginal else surprise(logits)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    with torch.no_grad():
        logits, embeddings = answered(views), F.normalize(model.encode_image(views), dim=1)
    if not word.ensemble:
        return logits[0]
    cosines = embeddings @ embeddings.T
    nearest = torch.stack([row[torch.arange(len(row)) != own].topk(3).values.mean() for own, row in enumerate(cosines)])
    return (nearest / word.temperature).softmax(0) @ logits


# --- What the papers' code does ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"steps": 2}, {"ensemble": False}, {"marginal": True, "ensemble": False}, {"steps": 0}, {"words": "two"}],
    ids=str,
)
def test_r_tpt_is_its_loop(models: dict[str, HuggingFace], family: str, changes: dict[str, Any]) -> None:
    word = few(RTPT, models[family], neighbors=3, **changes)
    found = asked(word)
    for image, key, logits in zip(IMAGES, KEYS, found, strict=True):
        assert torch.allclose(logits, restated(word, image, key[None]), atol=2e-3)
    if changes != {"steps": 0}:
        untuned = asked(replace(word, steps=0))
        assert float((found - untuned).abs().max()) > 2e-2  # tuning moves them by more than the loops differ


def test_tpt_is_a_setting_of_r_tpt(models: dict[str, HuggingFace]) -> None:
    base = models["clip"]
    assert torch.equal(asked(few(TPT, base)), asked(few(RTPT, base, marginal=True, ensemble=False)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_its_images_one_at_a_time(models: dict[str, HuggingFace], family: str) -> None:
    word = few(RTPT, models[family])
    together, backwards = asked(word), asked(word, slice(4))
    alone = torch.cat([asked(word, slice(i, i + 1)) for i in range(4)])
    assert torch.equal(together, backwards)
    assert torch.allclose(together, alone, atol=2e-3)


# --- What must come out ---


@pytest.mark.parametrize("family", FAMILIES)
def test_without_tuning_and_views_it_is_the_model(models: dict[str, HuggingFace], family: str) -> None:
    base = models[family]
    plain = base.answer(PROMPTS)(IMAGES).detach()
    assert torch.allclose(asked(TPT(base, views=5, steps=0)), plain, atol=1e-4)
    assert torch.allclose(asked(RTPT(base, views=1, steps=0)), plain, atol=1e-4)
    still = asked(few(TPT, base, lr=0.0), prompts=Prompts.of(PROMPTS.names, ("a photo of a {}",)))
    assert torch.allclose(still, base.answer(Prompts.of(PROMPTS.names, ("a photo of a {}",)))(IMAGES), atol=1e-4)


def test_tuning_descends_its_loss(models: dict[str, HuggingFace]) -> None:
    for word in (few(TPT, models["dual"], steps=20), few(RTPT, models["dual"], steps=20)):
        base = models["dual"]
        classes = TunedClasses.of(Lent(word, base, PROMPTS), PROMPTS, word.words)
        with torch.no_grad():
            embeddings = base.encode_image(tpt_views(IMAGES, KEYS, 6).flatten(0, 1))
            views = F.normalize(embeddings, dim=1).unflatten(0, (4, 6))
            plain = base.logits(embeddings, base.class_embeddings(PROMPTS)).unflatten(0, (4, 6))
            context = replace(word, keep=1.0).tune(views, plain, classes)
            before, after = (
                word.loss(plain + classes.change(views, texts)) for texts in (classes.start, classes.texts(context))
            )
        assert bool((after < before - 1e-3).all())


def test_the_losses() -> None:
    sure, unsure = 100.0 * torch.eye(4)[:2], torch.zeros(2, 4)
    logits = torch.stack([sure, unsure])
    assert torch.allclose(mean_entropy(logits), torch.tensor([0.0, math.log(4)]), atol=1e-5)
    assert torch.allclose(entropy_of_mean(logits), torch.tensor([math.log(2), math.log(4)]), atol=1e-5)


def test_views_that_resemble_many_count_more() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    views = torch.stack([east, east, east, north])[None]
    (shares,) = similar(views, 2, 0.5)  # mean cosines with the two nearest others are 1, 1, 1 and 0
    expected = torch.tensor([2.0, 2.0, 2.0, 0.0]).softmax(0)
    assert torch.allclose(shares, expected)
    assert torch.equal(similar(views[:, :1], 2, 0.5), torch.ones(1, 1))


def test_classes_of_the_same_prompts_are_equal_to_the_bit(models: dict[str, HuggingFace]) -> None:
    prompts = Prompts(("a", "b", "c", "d"), (("red box",), ("blue star",), ("red box",), ("box",)))
    for family in FAMILIES:
        logits = asked(few(RTPT, models[family]), prompts=prompts)
        assert torch.equal(logits[:, 0], logits[:, 2]) and not torch.equal(logits[:, 0], logits[:, 3])


def test_attacks_see_the_tuned_words_as_constants(models: dict[str, HuggingFace]) -> None:
    base = models["dual"]
    word = few(RTPT, base, ensemble=False, mixed=False)
    pixels = IMAGES.clone().requires_grad_(True)
    with drawing(KEYS):
        said = word.answer(PROMPTS).hard(pixels)
    (slope,) = torch.autograd.grad(said.logits[:, 1].sum(), pixels)
    assert said.read is not None
    (same,) = torch.autograd.grad(said.read(base.encode_image(pixels))[:, 1].sum(), pixels)
    assert torch.allclose(slope, same, atol=1e-4 * float(same.abs().max()))
    assert word.masks and all(parameter.grad is None for parameter in base.network.parameters())


def test_what_it_costs(models: dict[str, HuggingFace], monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = models["clip"].network
    word = few(RTPT, models["clip"], steps=2)
    answer = word.answer(PROMPTS)
    read = list[int]()
    tower = network.model.text_model
    own = tower.forward
    monkeypatch.setattr(tower, "forward", lambda **named: read.append(len(named["input_ids"])) or own(**named))
    with counting() as costs, torch.no_grad(), drawing(KEYS):
        answer(IMAGES)
    assert (costs.forwards, costs.backwards) == (4 * 6, 0)
    assert len(read) == 3  # once in each step, and once for the answer


@pytest.mark.parametrize("word", [TPT, RTPT])
def test_the_contract_of_a_defense(models: dict[str, HuggingFace], word: Any) -> None:
    check_wrapper(few(word, models["dual"]))
    check_wrapper(few(word, models["clip"]))


def test_the_numbers_of_the_authors_are_the_defaults() -> None:
    assert int(64 * TPT(HuggingFace("x")).keep) == 6
    for word in (TPT(HuggingFace("x")), RTPT(HuggingFace("x"))):
        assert (word.words, word.views, word.steps, word.lr, word.decay) == ("a photo of a", 64, 1, 5e-3, 0.01)
    assert (RTPT(HuggingFace("x")).neighbors, RTPT(HuggingFace("x")).temperature) == (20, 0.01)


# --- What is refused ---


def test_a_retrieval_has_no_prompts_to_tune(models: dict[str, HuggingFace]) -> None:
    base = models["dual"]
    captions = base.encode_text(PROMPTS.flat)
    with pytest.raises(CrossguardError, match="TPT tunes the prompts of classes, and there are none here"):
        few(TPT, base).answer(captions)
    word = few(RTPT, base, steps=0)
    with drawing(KEYS), torch.no_grad():
        found = word.answer(captions)(IMAGES)
    views = F.normalize(base.encode_image(tpt_views(IMAGES, _keys(word), 6).flatten(0, 1)), dim=1).view(4, 6, -1)
    expected = (similar(views, 20, 0.01)[..., None] * views).sum(1)
    assert torch.allclose(found, expected, atol=1e-4)
    with drawing(KEYS), torch.no_grad():
        assert torch.allclose(few(RTPT, base).encode_image(IMAGES), found, atol=1e-5)  # without classes as well


def _keys(word: Tuner) -> Tensor:
    with drawing(KEYS):
        return word.keys(4, "views")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": 0}, "views=0"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"steps": -1}, "steps=-1"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"decay": math.inf}, "decay=inf"),
        ({"neighbors": 0}, "neighbors=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CrossguardError, match=message):
        RTPT(HuggingFace("x"), **changes)


def test_words_without_a_token(models: dict[str, HuggingFace]) -> None:
    with pytest.raises(CrossguardError, match="no tokens to be replaced"):
        few(TPT, models["dual"], words=" ").answer(PROMPTS)
