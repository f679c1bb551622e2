"""Learned tokens of an image tower against the tower run by hand, and the tuning of them against its loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from crossguard import TAPT, BitDepth, HuggingFace, Prompts, Tiny, token_statistics
from crossguard.errors import CrossguardError
from crossguard.models.alignment import ImageTokens
from crossguard.models.tuning import entropy_of_mean
from crossguard.models.views import tpt_views
from crossguard.seeds import drawing
from crossguard.testing import check_wrapper
from fixtures import floats, pictures, save_clip, save_siglip

PROMPTS = Prompts.of(("red", "blue", "green"), ("a photo of a {}",))
KEYS = torch.arange(3) + 20
IMAGES = floats(pictures(3, 32, 32))
CLEAN = [floats(pictures(5, 32, 32, seed=1)), floats(pictures(2, 32, 32, seed=2))]
ATTACKED = [(batch + 0.1).clamp(0, 1) for batch in CLEAN]
FEW: dict[str, Any] = {"views": 6, "keep": 0.5, "layers": 2, "lr": 0.05}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HuggingFace:
    return HuggingFace(str(save_clip(tmp_path_factory.mktemp("alignment") / "clip")))


@pytest.fixture(scope="module")
def statistics(model: HuggingFace, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("statistics") / "statistics.safetensors"
    return str(token_statistics(model, CLEAN, ATTACKED, out))


def by_hand(model: HuggingFace, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings, and the states of the image's own tokens by layer, with these tokens behind them."""
    network: Any = model.network
    tower = network.model.vision_model
    states = tower.embeddings(network.preprocess(images))
    places = states.shape[1]
    states = tower.pre_layrnorm(torch.cat([states, tokens.expand(len(images), -1, -1)], 1))
    found = list[Tensor]()
    for layer in tower.encoder.layers:
        states = layer(states, None)
        found.append(states[:, :places])
    return network.model.visual_projection(tower.post_layernorm(states[:, 0])), torch.stack(found)


def start(model: HuggingFace) -> Tensor:
    return ImageTokens.of(model.network, 2, 0).start


def asked(word: TAPT | BitDepth, rows: slice = slice(3)) -> Tensor:
    answer = word.answer(PROMPTS)
    with drawing(KEYS[rows]), torch.no_grad():
        return answer(IMAGES[rows])


def test_the_statistics_are_means_and_variances_over_images(model: HuggingFace, statistics: str) -> None:
    found = load_file(statistics)
    assert float(start(model).std()) == pytest.approx(0.02, abs=5e-3)
    for name, batches in (("clean", CLEAN), ("attacked", ATTACKED)):
        with torch.no_grad():
            _, states = by_hand(model, torch.cat(batches), start(model))
        assert found[f"{name}_mean"].shape == (2, 17, 32)
        assert torch.allclose(found[f"{name}_mean"], states.mean(1), atol=1e-5)
        assert torch.allclose(found[f"{name}_var"], states.var(1), atol=1e-5)
    assert float((found["clean_mean"] - found["attacked_mean"]).abs().max()) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"steps": 3}, {"layers": 1, "attacked": 1.0}, {"steps": 0}], ids=str)
def test_tapt_is_its_loop(model: HuggingFace, statistics: str, changes: dict[str, Any]) -> None:
    word = TAPT(model, statistics, **(FEW | changes))
    known, found = load_file(statistics), asked(word)
    texts = model.class_embeddings(PROMPTS)
    for image, key, logits in zip(IMAGES, KEYS, found, strict=True):
        with drawing(key[None]):
            (views,) = tpt_views(image[None], word.keys(1, "views"), 6)
        tokens = torch.nn.Parameter(start(model).clone())
        optimizer = torch.optim.AdamW([tokens], word.lr)
        with torch.no_grad():
            first = model.logits(by_hand(model, views, tokens)[0], texts)
        chosen = (-(first.softmax(1) * first.log_softmax(1)).sum(1)).argsort()[:3]
        for _ in range(word.steps):
            embeddings, states = by_hand(model, views[chosen], tokens)
            loss = entropy_of_mean(model.logits(embeddings, texts)[None])[0]
            mean, spread = states.mean(1), states.var(1, correction=0)
            for layer in range(word.layers):
                for kind, share in (("attacked", word.attacked), ("clean", 1 - word.attacked)):
                    far = F.l1_loss(mean[layer], known[f"{kind}_mean"][layer])
                    far = 0.5 * far + 0.5 * F.l1_loss(spread[layer], known[f"{kind}_var"][layer])
                    loss = loss + 100 / word.layers * share * far
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            assert torch.allclose(logits, model.logits(by_hand(model, image[None], tokens)[0], texts)[0], atol=2e-3)
    if word.steps:
        assert float((found - asked(replace(word, steps=0))).abs().max()) > 0.05


def test_a_batch_is_its_images_one_at_a_time(model: HuggingFace, statistics: str) -> None:
    word = TAPT(model, statistics, **FEW)
    alone = torch.cat([asked(word, slice(i, i + 1)) for i in range(3)])
    assert torch.allclose(asked(word), alone, atol=2e-3)


def test_nothing_is_left_behind(model: HuggingFace, statistics: str) -> None:
    before = model.encode_image(IMAGES)
    asked(TAPT(model, statistics, **FEW))
    assert torch.equal(model.encode_image(IMAGES), before)
    assert not any(module._forward_hooks for module in model.network.modules())
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_the_contract_of_a_defense(model: HuggingFace, statistics: str) -> None:
    check_wrapper(TAPT(model, statistics, **FEW))
    inside = TAPT(BitDepth(model, bits=1), statistics, **FEW)
    check_wrapper(inside)
    assert not torch.allclose(asked(inside), asked(TAPT(model, statistics, **FEW)), atol=1e-3)
    assert not torch.allclose(asked(BitDepth(TAPT(model, statistics, **FEW), bits=1)), asked(BitDepth(model, bits=1)))


def test_a_word_of_other_statistics_is_another_question(model: HuggingFace, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    word = TAPT(model, str(out))
    assert word.fingerprint == ""
    token_statistics(model, CLEAN, ATTACKED, out)
    first = word.fingerprint
    token_statistics(model, ATTACKED, CLEAN, out)
    assert first and word.fingerprint not in ("", first)


def test_what_cannot_be_aligned_is_refused(model: HuggingFace, statistics: str, tmp_path: Path) -> None:
    with pytest.raises(CrossguardError, match="there is no file '' of statistics"):
        TAPT(model).answer(PROMPTS)
    (tmp_path / "odd").write_text("no tensors")
    with pytest.raises(CrossguardError, match="holds no statistics of tokens"):
        TAPT(model, str(tmp_path / "odd")).answer(PROMPTS)
    with pytest.raises(CrossguardError, match="make them for this model"):
        TAPT(model, statistics, seed=1).answer(PROMPTS)
    other = HuggingFace(str(save_clip(tmp_path / "deep", num_hidden_layers=3)))
    with pytest.raises(CrossguardError, match="3 layers of width 32"):
        TAPT(other, statistics).answer(PROMPTS)
    with pytest.raises(CrossguardError, match="the tower of this model has none"):
        TAPT(Tiny(), statistics).answer(PROMPTS)
    with pytest.raises(CrossguardError, match="compares images with the texts of classes"):
        TAPT(model, statistics).answer()
    with pytest.raises(CrossguardError, match="at least two attacked images, and there are 0"):
        token_statistics(model, CLEAN, [], tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


def test_a_siglip_has_tokens_too(tmp_path: Path) -> None:
    model = HuggingFace(str(save_siglip(tmp_path / "siglip")))
    out = token_statistics(model, CLEAN, ATTACKED, tmp_path / "s.safetensors")
    check_wrapper(TAPT(model, str(out), **FEW))


@pytest.mark.parametrize(
    "changes", [{"tokens": 0}, {"views": 0}, {"keep": 1.5}, {"attacked": -0.1}, {"align": -1.0}, {"layers": 0}], ids=str
)
def test_settings_that_mean_nothing(model: HuggingFace, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(CrossguardError, match=f"{name}="):
        TAPT(model, **changes)
