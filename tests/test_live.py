"""Models in memory: they answer as they would from a folder, are known by their weights, and are given back trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from crossguard import PGD, SGD, Linf, Live, TeCoA, ZeroShot, build, evaluate
from crossguard.errors import CrossguardError
from crossguard.models.huggingface import HuggingFace
from crossguard.words import given, show
from fixtures import Blots, floats, pictures, save_clip

IMAGES, TEXTS = floats(pictures(3, 40, 36)), ("a red circle", "two squares")
RECIPE = TeCoA(steps=2, batch=8, optimizer=SGD(lr=0.1), warmup=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("live") / "clip")


def held(folder: Path) -> tuple[Any, Any, Any]:
    """Model, image processor and tokenizer of a folder, as users of transformers hold them."""
    return (
        transformers.AutoModel.from_pretrained(folder),
        transformers.AutoImageProcessor.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def refused(ask: Callable[[], Any]) -> str:
    with pytest.raises(CrossguardError) as told:
        ask()
    assert len(str(told.value)) <= 320 and "\n" not in str(told.value)
    return str(told.value)


class Small(nn.Module):
    """Both towers in one module, with methods like those of many scripts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.visual, self.words = nn.Linear(3 * 16, 8), nn.EmbeddingBag(128, 8)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self.words(torch.tensor([[ord(sign) % 128 for sign in text or " "]]))[0] for text in texts])


def test_an_object_of_transformers_answers_as_its_folder(folder: Path) -> None:
    model, processor, tokenizer = held(folder)
    live, stored = Live(model, processor, tokenizer), HuggingFace(str(folder))
    assert torch.equal(live.encode_image(IMAGES), stored.encode_image(IMAGES))
    assert torch.equal(live.encode_text(TEXTS), stored.encode_text(TEXTS))
    report = evaluate(ZeroShot(Blots(12, 32)), live, PGD(steps=2), Linf(4 / 255))
    other = evaluate(ZeroShot(Blots(12, 32)), stored, PGD(steps=2), Linf(4 / 255))
    assert float(report.robust) == float(other.robust) and float(report.clean) == float(other.clean)
    assert report.question["model"] == f"Live(weights='{live.weights}')" == show(live)


def test_a_processor_may_hold_the_tokenizer(folder: Path) -> None:
    model, image, tokenizer = held(folder)
    assert Live(model, transformers.CLIPProcessor(image, tokenizer)) == Live(model, image, tokenizer)


def test_it_is_known_by_its_weights_and_by_how_it_reads(folder: Path, tmp_path: Path) -> None:
    model, processor, tokenizer = held(folder)
    live = Live(model, processor, tokenizer)
    assert Live(*held(folder)) == live and hash(Live(*held(folder))) == hash(live)
    processor.image_mean = [0.1, 0.2, 0.3]
    assert Live(model, processor, tokenizer) != live
    other = save_clip(tmp_path / "other", seed=1)
    assert Live(*held(other)) != live


def test_the_object_is_left_alone_and_must_stay_as_it_was(folder: Path) -> None:
    model, processor, tokenizer = held(folder)
    model.train().half()
    strides = [parameter.stride() for parameter in model.parameters()]
    live = Live(model, processor, tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    live.encode_image(IMAGES), live.encode_text(TEXTS)
    assert model.training and all(parameter.dtype == torch.half for parameter in model.parameters())
    assert [parameter.stride() for parameter in model.parameters()] == strides
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.logit_scale += 1.0
    assert "has changed since Live(...) was made of it" in refused(live.load)
    assert Live(model, processor, tokenizer).weights != live.weights


def test_it_is_trained_and_given_back(folder: Path, tmp_path: Path) -> None:
    model, processor, tokenizer = held(folder)
    live = Live(model, processor, tokenizer)
    trained = RECIPE.fit(live, Blots(16, 32), tmp_path / "out")
    assert isinstance(trained, Live) and isinstance(trained.model, transformers.CLIPModel) and trained != live
    assert torch.equal(trained.encode_image(IMAGES), HuggingFace(str(tmp_path / "out")).encode_image(IMAGES))
    moved = {
        name for name, value in trained.model.state_dict().items() if not torch.equal(value, model.state_dict()[name])
    }
    assert moved and all(name.startswith("vis") for name in moved)
    assert RECIPE.fit(live, Blots(16, 32), tmp_path / "out") == trained  # finished: read again


@pytest.mark.parametrize("whole", [True, False])
def test_two_functions(whole: bool, tmp_path: Path) -> None:
    """Methods of one module, or modules and functions of their own."""
    small = Small()
    live = Live(images=small.encode_image, texts=small.encode_text, scale=50.0)
    if not whole:
        tower, other = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), small.visual), Small()
        live = Live(images=tower, texts=lambda texts: other.encode_text(texts), scale=50.0)
    expected = small.encode_image(IMAGES)
    assert torch.allclose(live.encode_image(IMAGES), expected) and float(live.network.scale) == 50.0
    cosines = nn.functional.normalize(expected, dim=1) @ nn.functional.normalize(small.encode_text(TEXTS), dim=1).T
    assert torch.allclose(live.logits(live.encode_image(IMAGES), live.encode_text(TEXTS)), 50.0 * cosines, atol=1e-4)
    clean = evaluate(ZeroShot(Blots(12, 16)), live, PGD(steps=2), Linf(8 / 255))
    assert float(clean.robust) <= float(clean.clean)
    before = small.visual.weight.clone()
    trained = RECIPE.fit(live, Blots(16, 16), tmp_path / "out")
    assert isinstance(trained, Live) and trained != live and torch.equal(small.visual.weight, before)
    images, _ = trained.model
    assert not torch.allclose(images(IMAGES), expected, atol=1e-3)
    assert torch.allclose(trained.encode_image(IMAGES), images(IMAGES))


def test_functions_without_weights_are_known_by_their_answers() -> None:
    ways = torch.randn(48, 8, generator=torch.Generator().manual_seed(0))

    def images(pixels: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1) @ ways

    def texts(strings: Sequence[str]) -> Tensor:
        return torch.tensor([[float(ord(sign)) for sign in f"{text:<8.8}"] for text in strings])

    live = Live(images=images, texts=texts)
    assert Live(images=lambda pixels: images(pixels), texts=texts) == live
    assert Live(images=lambda pixels: 2 * images(pixels), texts=texts) != live
    assert Live(images=images, texts=texts, scale=10.0) != live


def test_no_text_makes_one(folder: Path) -> None:
    live = Live(*held(folder))
    told = refused(lambda: build(show(live)))
    assert f"Live(weights='{live.weights}') is a model that lives in the memory of a Python program" in told
    assert "save it, and give HuggingFace('folder')" in told


def test_what_is_no_model(folder: Path) -> None:
    model, processor, tokenizer = held(folder)
    assert "give Live(model, processor, tokenizer)" in refused(lambda: given("model", model))
    assert "needs its image processor and its tokenizer" in refused(lambda: Live(model))
    assert "needs its image processor and its tokenizer" in refused(lambda: Live(model, processor))
    assert "Live cannot read a Linear" in refused(lambda: Live(nn.Linear(1, 1), processor, tokenizer))
    assert "or of two functions" in refused(lambda: Live(model, processor, tokenizer, images=len, texts=len))
    assert "or of two functions" in refused(lambda: Live(images=len))
    alike = Small()
    with torch.no_grad():
        alike.words.weight.zero_().add_(1.0)
    assert "gives all texts the same embedding" in refused(
        lambda: Live(images=alike.encode_image, texts=alike.encode_text)
    )
