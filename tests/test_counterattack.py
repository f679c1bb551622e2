"""Defenses that attack back, against restatements of what their authors published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import RN, SCC, TTC, Answer, BitDepth, CrossguardError, GaussianNoise, HuggingFace, Tiny
from crossguard.answer import counting
from crossguard.data import Prompts
from crossguard.models.base import VisionLanguageModel
from crossguard.seeds import by_position, drawing, fold, keys, uniform
from crossguard.testing import check_wrapper
from fixtures import save_clip
from toys import Toy, last_asked, middle

PROMPTS = Prompts.of(("red circle", "blue star", "green square"), ("a photo of a {}",))
SEEDS = keys("abcdef")
IMAGES = uniform(by_position(6), (3, 32, 32))


def seen(model: Any, images: Tensor, seeds: Tensor = SEEDS) -> Tensor:
    """The pixels that the model inside is asked about in the end."""
    return last_asked(model, images, seeds, PROMPTS)


def published(encode: Any, images: Tensor, noise: Tensor, model: TTC, judge: Any = None) -> tuple[Tensor, Tensor]:
    """TTC restated from the steps of the authors' code: pixels and tau. Written one image at a time, so that nothing is
    shared with what it tests."""
    made, taus = [], []
    for image, start in zip(images, noise, strict=True):
        x, low, high = image[None], -image[None], 1.0 - image[None]
        delta = torch.max(torch.min(start[None], high), low)
        with torch.no_grad():
            anchor = encode(x)
            one, other = (judge or encode)(x), (judge or encode)(x + delta)
            taus.append((other - one).norm() / one.norm())
        deltas = [delta]
        for _ in range(model.steps):
            moving = deltas[-1].clone().requires_grad_(True)
            loss = (encode(x + moving) - anchor).pow(2).sum()
            (gradient,) = torch.autograd.grad(loss, moving)
            delta = torch.clamp(deltas[-1] + model.step * model.eps * torch.sign(gradient), -model.eps, model.eps)
            deltas.append(torch.max(torch.min(delta, high), low))
        weights = torch.tensor([torch.e ** (model.beta * number) for number in range(len(deltas))])
        weights = weights / weights.sum()
        weighted = torch.stack([w * d for w, d in zip(weights, deltas, strict=True)]).sum(0)
        made.append(x + (weighted if taus[-1] < model.tau else deltas[0]))
    return torch.cat(made), torch.stack(taus)


def between(model: TTC, judge: Any = None) -> TTC:
    """The same with a threshold that half of the images are below."""
    _, taus = published(model.base.encode_image, IMAGES, model.eps * start(model), model, judge)
    return replace(model, tau=float(taus.median()) + 1e-4)


def start(model: Any) -> Tensor:
    with drawing(SEEDS):
        return model.uniform(IMAGES, "start")


@pytest.mark.parametrize("model", [TTC(Tiny()), TTC(Tiny(), eps=8 / 255, step=0.3, steps=4, beta=0.5)], ids=["", "4"])
def test_ttc_is_what_the_authors_published(model: TTC) -> None:
    model = between(model)
    wanted, taus = published(Tiny().encode_image, IMAGES, model.eps * start(model), model)
    found = seen(model, IMAGES)
    assert float((found - wanted).abs().amax((1, 2, 3)).median()) < 1e-6
    assert float(((found - wanted).abs() > 1e-6).float().mean()) < 2e-3, "signs of gradients of rounding alone"
    with drawing(SEEDS), torch.no_grad():
        gates = model.answer(PROMPTS).hard(IMAGES).gates
    assert torch.allclose(gates["tau"], model.tau - taus, atol=1e-4)
    assert 0 < int((gates["tau"] > 0).sum()) < 6, "some are judged attacked, some clean"


def test_the_threshold_may_be_that_of_another_model(tmp_path: Path) -> None:
    other = HuggingFace(str(save_clip(tmp_path / "clip")))
    model = between(TTC(Tiny(), tau_model=other), other.encode_image)
    wanted, taus = published(Tiny().encode_image, IMAGES, model.eps * start(model), model, other.encode_image)
    assert float(((seen(model, IMAGES) - wanted).abs() > 1e-6).float().mean()) < 2e-3
    with drawing(SEEDS), torch.no_grad(), counting() as costs:
        gates = model.answer(PROMPTS).hard(IMAGES).gates
    assert torch.allclose(gates["tau"], model.tau - taus, atol=1e-4)
    assert (costs.forwards, costs.backwards) == (6 * 6, 2 * 6), "two more forwards, of the other model"


def test_images_judged_clean_get_noise_as_published_or_stay() -> None:
    for tau in (0.0, 1.0):
        noisy, quiet = (seen(TTC(Tiny(), tau=tau, noise_on_clean=choice), IMAGES) for choice in (True, False))
        noise = (4 / 255 * start(TTC(Tiny()))).clamp(min=-IMAGES, max=1 - IMAGES)
        assert torch.allclose(quiet, IMAGES) == (tau == 0.0)
        assert torch.allclose(noisy, IMAGES + noise, atol=1e-6) == (tau == 0.0)
        assert torch.equal(noisy, quiet) == (tau == 1.0)


def test_without_steps_it_is_random_noise() -> None:
    assert torch.equal(seen(TTC(Tiny(), steps=0), IMAGES), seen(RN(Tiny()), IMAGES))
    assert torch.equal(seen(TTC(Tiny(), tau=0.0), IMAGES), seen(RN(Tiny()), IMAGES))
    moved = (seen(RN(Tiny(), eps=0.1), IMAGES) - IMAGES).abs()
    assert float(moved.max()) <= 0.1 + 1e-6 and float(moved.mean()) == pytest.approx(0.05, rel=0.1)
    assert not torch.equal(seen(RN(Tiny()), IMAGES), seen(RN(Tiny()), IMAGES, fold(SEEDS, 1)))
    assert RN(Tiny()).answer().gates == {} == TTC(Tiny(), steps=0).answer().gates


@pytest.mark.parametrize(
    ("model", "forwards", "backwards"),
    [(TTC(Toy()), 4, 2), (TTC(Toy(), steps=5), 7, 5), (RN(Toy()), 1, 0), (TTC(TTC(Toy())), 16, 10)],
)
def test_what_an_image_costs_is_counted(model: VisionLanguageModel, forwards: int, backwards: int) -> None:
    answer = model.answer(PROMPTS)
    with counting() as costs, torch.no_grad(), drawing(SEEDS):
        answer(middle(6))
    assert (costs.forwards, costs.backwards) == (6 * forwards, 6 * backwards)


@pytest.mark.parametrize("model", [TTC(Tiny()), TTC(GaussianNoise(BitDepth(Tiny())))], ids=["alone", "around others"])
def test_a_counterattack_meets_the_contract(model: Any) -> None:
    check_wrapper(model)


def test_a_batch_equals_its_singles() -> None:
    model, images = TTC(Toy(), tau=0.05), middle(6)
    whole = seen(model, images)
    singles = torch.cat([seen(model, images[i : i + 1], SEEDS[i : i + 1]) for i in range(6)])
    assert torch.allclose(whole, singles, atol=1e-6)


def test_the_gradient_of_the_smooth_stand_in_is_its_own() -> None:
    """Against differences of its values; that of BPDA is another."""
    answer, images = TTC(Toy(), tau=0.05).answer(PROMPTS), middle(2)
    assert answer.soft is not None

    def value(pixels: Tensor, soft: bool = True) -> Tensor:
        with drawing(SEEDS[:2]):
            said = (answer.soft if soft else answer.hard)(pixels)  # type: ignore[misc]
        return said.embeddings[:, 0].sum()

    pixels = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(value(pixels), pixels)
    (around,) = torch.autograd.grad(value(pixels, soft=False), pixels)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    width = 2e-3
    with torch.enable_grad():
        ends = [value((images + sign * width * direction).requires_grad_(True)).detach() for sign in (1, -1)]
    slope = float((ends[0] - ends[1]) / (2 * width))
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.05)
    assert not torch.allclose(gradient, around, rtol=1e-3)


def test_through_attention_the_smooth_stand_in_has_a_gradient(tmp_path: Path) -> None:
    """The fast kernels of attention cannot be differentiated twice."""
    answer = TTC(HuggingFace(str(save_clip(tmp_path / "clip")))).answer(PROMPTS)
    assert answer.soft is not None
    pixels = IMAGES[:2].clone().requires_grad_(True)
    with drawing(SEEDS[:2]):
        (gradient,) = torch.autograd.grad(answer.soft(pixels).logits[:, 0].sum(), pixels)
    assert bool(gradient.isfinite().all()) and bool(gradient.flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tau": 1.5}, r"TTC\(tau=1.5\) is no threshold.* from 0 to 1"),
        ({"tau": -0.1}, "from 0 to 1"),
        ({"eps": -0.1}, "0 to 1, in pixels"),
        ({"step": 0.0}, "does not climb"),
        ({"steps": -1}, "0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        TTC(Tiny(), **settings)
    with pytest.raises(CrossguardError, match="0 to 1"):
        RN(Tiny(), eps=2.0)


def test_answers_keep_what_is_judged() -> None:
    captions = Tiny().encode_text(["a red circle", "two blue stars"])
    answer = TTC(BitDepth(Tiny())).answer(captions)
    assert isinstance(answer, Answer) and answer(IMAGES).shape == (6, captions.shape[1])
    assert answer.without()(IMAGES).shape == (6, captions.shape[1])


# --- SCC ---


def noise(model: SCC, use: str, count: int = 2) -> Tensor:
    """The noise of the views of each image, shape (6, views, 3, 32, 32)."""
    with drawing(SEEDS):
        return model.normal(IMAGES.repeat_interleave(count, 0), use).unflatten(0, (6, count))


def algorithm(model: SCC) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 restated, one image at a time: the moved image, its logits, and the pseudo-label."""
    encode, moved, logits, labels = Tiny().encode_image, [], [], []
    prompts = F.normalize(Tiny().class_embeddings(PROMPTS), dim=1)
    warm = TTC(Tiny(), model.eps, model.step, model.warmup, model.tau, model.beta)
    warmed, _ = published(encode, IMAGES, model.eps * start(model), warm)
    for number, x in enumerate(IMAGES):

        def seen(image: Tensor, use: str, number: int = number) -> Tensor:
            """Logits of each view: an odd one is mirrored, and the count begins at 1."""
            said = []
            for view in range(1, model.views + 1):
                way = image.flip(2) if view % 2 == 1 else image
                noisy = way + model.sigma * noise(model, use, model.views)[number, view - 1]
                said.append(Tiny().logits(encode(noisy.clamp(0, 1)[None]), prompts)[0])
            return torch.stack(said)

        with torch.no_grad():
            shares = torch.softmax(seen(warmed[number], "label").mean(0) / model.temperature, 0)
            anchor = encode(x[None])[0]
        label, prototype = int(shares.argmax()), sum(p * t for p, t in zip(shares, prompts, strict=True))
        delta, points = torch.zeros_like(x), [torch.zeros_like(x)]
        for _ in range(model.steps):
            at = delta.clone().requires_grad_(True)
            f = encode((x + at)[None])[0]
            others = torch.stack([F.cosine_similarity(f, t, dim=0) for k, t in enumerate(prompts) if k != label])
            climbed = model.weight * (F.cosine_similarity(f, prototype, dim=0) - others.max())
            climbed = climbed + (f - anchor).pow(2).sum()
            (gradient,) = torch.autograd.grad(climbed, at)
            delta = (delta + model.step * model.eps * gradient.sign()).clamp(-model.eps, model.eps)
            delta = (x + delta).clamp(0, 1) - x
            points.append(delta)
        weights = torch.tensor([torch.e ** (model.beta * k) for k in range(len(points))])
        fused = sum(w * d for w, d in zip(weights / weights.sum(), points, strict=True))
        moved.append(x + fused)
        labels.append(label)
        with torch.no_grad():
            logits.append(seen(moved[-1], "answer").mean(0))
    return torch.stack(moved), torch.stack(logits), torch.tensor(labels)


def labels(model: SCC) -> tuple[Tensor, Tensor]:
    """The pseudo-labels of SCC and what they are sure of, of the images after the warm-up."""
    inner = Tiny().answer(PROMPTS)
    assert inner.texts is not None
    texts = F.normalize(inner.texts, dim=1)
    with drawing(SEEDS), torch.no_grad():
        warm = TTC(Tiny(), steps=model.warmup).counter(IMAGES, inner, inner).images if model.warmup else IMAGES
        shares, own = model.label(warm, inner, texts)
    return shares, own


@pytest.mark.parametrize("model", [SCC(Tiny()), SCC(Tiny(), steps=4, warmup=2, weight=1.0, views=3)], ids=["", "other"])
def test_scc_is_algorithm_1(model: SCC) -> None:
    moved, logits, own = algorithm(model)
    views = seen(model, IMAGES).unflatten(0, (6, model.views))
    wanted = torch.stack([moved.flip(3) if view % 2 == 0 else moved for view in range(model.views)], 1)
    wanted = (wanted + model.sigma * noise(model, "answer", model.views)).clamp(0, 1)
    assert float(((views - wanted).abs() > 1e-6).float().mean()) < 5e-3, "signs of gradients of rounding alone"
    with drawing(SEEDS), torch.no_grad():
        said = model.answer(PROMPTS).hard(IMAGES)
    assert torch.allclose(said.logits, logits, atol=0.05)
    assert torch.equal(labels(model)[1], own) and len(own.unique()) > 1


def test_without_both_modules_scc_is_ttc_to_the_bit() -> None:
    for settings in ({}, {"steps": 5, "tau": 0.1, "beta": 1.0, "eps": 8 / 255, "step": 0.5}, {"steps": 0}):
        for base in (Tiny(), BitDepth(GaussianNoise(Tiny()))):
            scc = SCC(base, semantic=False, spatial=False, **settings).answer(PROMPTS)  # type: ignore[arg-type]
            ttc = TTC(base, **settings).answer(PROMPTS)  # type: ignore[arg-type]
            pixels = IMAGES.clone().requires_grad_(True)
            found = []
            for answer in (scc, ttc):
                with drawing(SEEDS):
                    said = answer.hard(pixels)
                    (gradient,) = torch.autograd.grad(said.logits[:, 0].sum(), pixels)
                found.append((said.logits.detach(), gradient, *said.gates.values()))
            assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
            assert list(scc.gates) == list(ttc.gates)


def test_each_module_of_scc_is_usable_alone() -> None:
    """The semantic one steers what TTC does blindly, and its answer is that of one image; the spatial one is the vote
    of views behind TTC."""
    alone, ttc = SCC(Tiny(), semantic=False), TTC(Tiny())
    moved, mirrored = seen(ttc, IMAGES), seen(alone, IMAGES).unflatten(0, (6, 2))
    views = torch.stack([moved.flip(3), moved], 1) + 6 / 255 * noise(alone, "answer")
    assert torch.allclose(mirrored, views.clamp(0, 1), atol=1e-6)
    with drawing(SEEDS), torch.no_grad():
        logits = alone.answer(PROMPTS)(IMAGES)
    assert torch.allclose(
        logits, Tiny().answer(PROMPTS)(mirrored.flatten(0, 1)).unflatten(0, (6, 2)).mean(1), atol=1e-4
    )
    semantic = seen(SCC(Tiny(), spatial=False), IMAGES)
    assert semantic.shape == IMAGES.shape and not torch.allclose(semantic, moved, atol=1e-4)
    turned = seen(SCC(Tiny(), semantic=False, flip_first=False), IMAGES).unflatten(0, (6, 2))
    views = torch.stack([moved, moved.flip(3)], 1) + 6 / 255 * noise(alone, "answer")
    assert torch.allclose(turned, views.clamp(0, 1), atol=1e-6)
    with pytest.raises(CrossguardError, match="SCC compares images with the texts of classes"):
        SCC(Tiny()).encode_image(IMAGES)
    assert alone.encode_image(IMAGES).shape == Tiny().encode_image(IMAGES).shape, "which needs no classes"


def test_where_the_paper_contradicts_itself_there_is_a_switch() -> None:
    plain = SCC(Tiny(), temperature=20.0)
    shares, own = labels(plain)
    warm = seen(TTC(Tiny(), steps=5), IMAGES)
    views = torch.stack([warm.flip(3), warm], 1) + 6 / 255 * noise(plain, "label")
    logits = Tiny().answer(PROMPTS)(views.clamp(0, 1).flatten(0, 1)).unflatten(0, (6, 2))
    assert torch.allclose(shares, (logits.mean(1) / 20).softmax(1), atol=1e-3)
    sharp = logits.softmax(2).mean(1) ** (1 / 20)
    assert torch.allclose(labels(replace(plain, power=True))[0], sharp / sharp.sum(1, keepdim=True), atol=1e-3)
    single = labels(replace(plain, label_of_views=False))
    assert torch.equal(single[1], Tiny().answer(PROMPTS)(warm).argmax(1)) and torch.allclose(single[0], shares)
    flat = labels(replace(plain, cosines=True, temperature=0.5))[0]
    assert torch.equal(flat.argmax(1), own) and float(flat.std()) < 0.2, "cosines are nearly uniform"
    assert float(labels(SCC(Tiny()))[0].amax(1).median()) > 0.9, "and logits nearly one class"
    moved = seen(SCC(Tiny()), IMAGES)
    for switch in ({"unit": True}, {"confident": True}, {"random_start": True}, {"flip_first": False}, {"power": True}):
        other = SCC(Tiny(), temperature=20.0, **switch)  # type: ignore[arg-type]
        assert not torch.equal(seen(other, IMAGES), seen(SCC(Tiny(), temperature=20.0), IMAGES)), switch
    check_wrapper(SCC(Tiny(), unit=True, confident=True, random_start=True, power=True, label_of_views=False))
    check_wrapper(SCC(GaussianNoise(Toy()), random_start=True))
    assert moved.shape == (12, 3, 32, 32)
    assert list(SCC(Tiny(), random_start=True).answer(PROMPTS).gates) == ["warm-up", "tau"]
    assert list(SCC(Tiny(), warmup=0).answer(PROMPTS).gates) == []


def test_scc_costs_what_it_says() -> None:
    for model, forwards, backwards in (
        (SCC(Toy()), 12, 7),
        (SCC(Toy(), spatial=False), 10, 7),
        (SCC(Toy(), semantic=False), 5, 2),
        (SCC(Toy(), steps=5, views=4, warmup=0), 1 + 4 + 5 + 4, 5),
    ):
        answer = model.answer(PROMPTS)
        with counting() as costs, torch.no_grad(), drawing(SEEDS):
            answer(middle(6))
        assert (costs.forwards, costs.backwards) == (6 * forwards, 6 * backwards)


def test_scc_takes_the_captions_of_a_gallery_for_its_classes() -> None:
    """So its embeddings are the mean of the views' unit ones, of images that are moved towards a caption."""
    captions = Tiny().encode_text([f"a photo of a {name}" for name in PROMPTS.names])
    with drawing(SEEDS), torch.no_grad():
        found = SCC(Tiny()).answer(captions)(IMAGES)
        again = SCC(Tiny()).answer(captions).hard
    views = seen(SCC(Tiny()), IMAGES)
    mean = F.normalize(Tiny().encode_image(views), dim=1).unflatten(0, (6, 2)).mean(1)
    assert torch.allclose(found, mean, atol=1e-4)
    with drawing(SEEDS), torch.no_grad():
        assert torch.equal(found, again(IMAGES).embeddings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"views": 0}, r"SCC\(views=0\) looks at nothing"),
        ({"tau": 1.5}, "from 0 to 1"),
        ({"temperature": 0.0}, "more than 0"),
        ({"sigma": -1.0}, "0 or more"),
        ({"warmup": -1}, "0 or more"),
        ({"steps": 0}, "nothing to steer"),
    ],
)
def test_settings_of_scc_that_mean_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CrossguardError, match=sentence):
        SCC(Tiny(), **settings)
