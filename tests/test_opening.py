"""A checkpoint is opened once: no file is looked at while it is asked, and nobody can change it in the middle."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from crossguard import PGD, BitDepth, Fresh, HuggingFace, Linf, Untargeted, device, opening
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models.huggingface import TransformersEncoder
from crossguard.opening import evaluating, release
from crossguard.words import contents
from fixtures import floats, pictures, save_clip, save_tokenizer, small

PROMPTS = Prompts.of(("red circle", "blue star"), ("a photo of a {}",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is looked up on the disk from here on."""
    found: list[str] = []
    for name in ("stat", "glob", "open", "iterdir"):
        own = getattr(Path, name)

        def watched(self: Path, *given: Any, own: Any = own, **named: Any) -> Any:
            found.append(str(self))
            return own(self, *given, **named)

        monkeypatch.setattr(Path, name, watched)
    return found


def test_the_same_texts_are_read_once_in_an_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = list[int](), TransformersEncoder.encode_text
    monkeypatch.setattr(
        TransformersEncoder, "encode_text", lambda self, texts: asked.append(len(texts)) or read(self, texts)
    )
    model, same = HuggingFace(str(folder)), HuggingFace(str(folder))
    model.open()  # which tries a text
    asked.clear()
    with evaluating(), torch.no_grad():
        first = model.encode_text(PROMPTS.flat)
        own = first.clone()
        first += 1.0
        again = [one.encode_text(list(PROMPTS.flat)) for one in (model, same, BitDepth(model))]
        assert asked == [2] and all(torch.equal(one, own) for one in again)
        model.encode_text(PROMPTS.flat[::-1])
        with torch.enable_grad():
            model.encode_text(PROMPTS.flat)
        assert asked == [2, 2, 2], "another list, and whoever wants a graph"
    with torch.no_grad():
        model.encode_text(PROMPTS.flat)
        model.encode_text(PROMPTS.flat)
    assert len(asked) == 5, "outside nothing is remembered, since a network may be trained in between"
    monkeypatch.setattr(opening, "_REMEMBERED", 0)
    with evaluating(), torch.no_grad():
        assert torch.equal(model.encode_text(PROMPTS.flat), model.encode_text(PROMPTS.flat)) and len(asked) == 7


@pytest.mark.parametrize("wrap", [lambda base: base, BitDepth])
def test_no_file_is_looked_at_while_images_are_asked_about(folder: Path, looks: list[str], wrap: Any) -> None:
    model = wrap(HuggingFace(str(folder)))
    answer, images = model.classifier(PROMPTS), floats(pictures(2, 32, 32))
    assert str(folder) in looks
    looks.clear()
    PGD(steps=2)(answer, images, Untargeted(torch.tensor([0, 1])), Linf(4 / 255))
    assert looks == []
    with opening.opening():
        model.encode_image(images)
        looks.clear()
        model.encode_image(images)
        model.encode_text(["a"])
        assert model.device == torch.device("cpu") and looks == []


def test_nothing_is_sent_to_the_device_anew_in_a_forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means, scales and a missing bias lie where the network is."""
    answer, images = HuggingFace(str(folder)).classifier(PROMPTS), floats(pictures(2, 32, 32))
    expected, made = answer(images), list[str]()
    for name in ("tensor", "as_tensor", "zeros", "ones", "full"):
        own = getattr(torch, name)

        def watched(*given: Any, own: Any = own, name: str = name, **named: Any) -> Any:
            made.append(name)
            return own(*given, **named)

        monkeypatch.setattr(torch, name, watched)
    assert torch.equal(answer(images), expected) and made == []


def test_the_device_is_known_without_opening_anything(tmp_path: Path, looks: list[str]) -> None:
    assert HuggingFace(str(tmp_path / "missing")).device == device.chosen().device
    assert looks == []


def test_another_process_that_saves_into_the_folder_changes_nothing_inside(folder: Path) -> None:
    model, images = HuggingFace(str(folder)), floats(pictures(1, 32, 32))
    with evaluating(), torch.no_grad():
        answer, before, said = model.classifier(PROMPTS), model.encode_image(images), contents(BitDepth(model))
        logits = answer(images)
        save_clip(folder, seed=1)
        assert torch.equal(model.encode_image(images), before)
        assert torch.equal(model.classifier(PROMPTS)(images), logits)
        assert contents(BitDepth(model)) == said
    assert torch.equal(answer(images), logits)  # a classifier holds what it was made of
    assert not torch.equal(model.encode_image(images), before)
    assert contents(model) != said
    assert not torch.equal(model.open().encode_image(images), before)


def test_files_that_change_between_the_question_and_the_opening_are_noticed(folder: Path) -> None:
    model = HuggingFace(str(folder))
    with evaluating():
        asked = model.fingerprint
        save_clip(folder, seed=1)
        with pytest.raises(CrossguardError, match="have changed while they were opened"):
            model.classifier(PROMPTS)
    assert model.fingerprint != asked
    assert model.network is model.network


def test_the_fingerprint_is_of_all_that_is_read(tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "one")
    model = HuggingFace(str(folder))
    seen = {model.fingerprint}
    assert HuggingFace(str(save_clip(tmp_path / "same"))).fingerprint in seen
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        seen.add(model.fingerprint)
        (folder / name).write_bytes(content)
    assert len(seen) == 5 and all(len(one) == 12 for one in seen)
    assert model.fingerprint in seen
    save_tokenizer(tmp_path / "words")
    fresh = small(tmp_path / "words")
    before = fresh.fingerprint
    assert len(before) == 12 and Fresh().fingerprint not in ("", before)
    (tmp_path / "words/tokenizer.json").write_text((tmp_path / "words/tokenizer.json").read_text() + " ")
    assert fresh.fingerprint != before
    assert HuggingFace("nobody/nothing").fingerprint == ""


def test_the_fingerprint_of_a_hub_id_is_the_revision_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--some--clip"
    (cache / "snapshots/0123456789abcdef0123").mkdir(parents=True)
    (cache / "snapshots/0123456789abcdef0123/config.json").write_text("{}")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("0123456789abcdef0123")
    assert HuggingFace("some/clip").fingerprint == "0123456789ab"


def test_threads_that_ask_at_once_wait_for_one_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release()
    loaded, own = list[str](), HuggingFace.load

    def load(self: HuggingFace) -> Any:
        loaded.append(self.path)
        return own(self)

    monkeypatch.setattr(HuggingFace, "load", load)
    found: list[Any] = []
    texts = ["a photo of a red circle", "box", "a" * 50] * 3
    expected = HuggingFace(str(folder)).encode_text(texts)
    loaded.clear()
    release()

    def ask() -> None:
        model = HuggingFace(str(folder))
        with torch.no_grad():
            good = all(torch.allclose(model.encode_text(texts), expected, atol=1e-5) for _ in range(5))
        found.append((model.network, good, model.cut(texts)))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1 and len(found) == 4
    assert len({id(network) for network, _, _ in found}) == 1
    assert all(good and cut == 3 for _, good, cut in found)


def test_networks_are_released_by_bytes_but_not_while_they_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release()
    models = [HuggingFace(str(save_clip(tmp_path / str(seed), seed=seed))) for seed in range(3)]
    size = 4 * sum(parameter.numel() for parameter in models[0].load().parameters())
    monkeypatch.setattr(opening, "memory", lambda device: int(2.5 * size / opening._SHARE))
    first, second = models[0].network, models[1].network
    assert models[0].network is first  # asked last, so it stays
    third = models[2].network
    assert models[0].network is first and models[2].network is third
    assert models[1].network is not second
    with opening.opening():
        held = models[0].network
        release()
        assert models[0].network is held
    release()
    monkeypatch.setattr(opening, "memory", lambda device: 10)  # less than any network: kept alone
    assert models[0].network is models[0].network
    release()


def test_a_network_in_bfloat16_answers_in_float32_with_its_exact_scale(folder: Path) -> None:
    images, model = floats(pictures(3, 32, 32)), HuggingFace(str(folder))
    with torch.no_grad():
        full = model.encode_image(images), model.encode_text(["red", "a blue box"])
        scale, logits = model.network.scale, model.classifier(PROMPTS)(images)
    assert device.precision() == "" and device.describe() == "cpu"
    with device.choosing(dtype="bfloat16"), torch.no_grad():
        assert device.precision() == "bfloat16" and device.describe() == "cpu, bfloat16"
        network = model.network
        assert isinstance(network, TransformersEncoder)
        towers = network.towers()
        assert all(p.dtype == torch.bfloat16 for name in ("image", "text") for p in towers[name].values())
        assert torch.equal(network.scale, scale) and scale.dtype == torch.float32
        half = model.encode_image(images), model.encode_text(["red", "a blue box"])
        for exact, rounded in zip(full, half, strict=True):
            assert rounded.dtype == torch.float32
            assert 1e-5 < float((exact - rounded).norm() / exact.norm()) < 0.03
        again = model.classifier(PROMPTS)(images)
        assert again.dtype == torch.float32 and 0 < float((again - logits).abs().max()) < 0.5
    assert model.network is not network
    assert torch.equal(model.classifier(PROMPTS)(images), logits)
