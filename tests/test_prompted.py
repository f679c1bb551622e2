"""Learned prompts against networks run by hand: what they change, what they leave alone, and what a folder of them
says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from crossguard import (
    TAPT,
    BitDepth,
    HuggingFace,
    Interpolated,
    Prompts,
    PromptTuned,
    build,
    check_model,
    check_wrapper,
    short,
    show,
    token_statistics,
)
from crossguard.checkpoints import fingerprint
from crossguard.errors import CrossguardError
from crossguard.models.alignment import ImageTokens
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.huggingface import TransformersEncoder
from crossguard.models.prompted import (
    ClassFramedEncoder,
    ContextEncoder,
    CoupledEncoder,
    FramedEncoder,
    Place,
    PromptedEncoder,
    TokenEncoder,
    prompts,
    save_prompts,
)
from crossguard.models.tuning import TPT
from crossguard.opening import release
from fixtures import TOWER, floats, pictures, save_clip, save_siglip, save_tokenizer, small

IMAGES = floats(pictures(3, 32, 32))
TEXTS = ["a photo of a red circle", "a photo of a disc", "the blue star", "a photo of a red circle"]
NAMES = ("circle", "red circle", "star")
WORDS = "a photo of a"

Make = Callable[[DualEncoder], PromptedEncoder]
# Every kind, as it begins: zero, or what the words themselves have.
KINDS: dict[str, Make] = {
    "frame": lambda network: FramedEncoder(network, 3, True),
    "addition": lambda network: FramedEncoder(network, None, False, True, 0.1),
    "tokens": lambda network: TokenEncoder(network, 2, 1),
    "deep tokens": lambda network: TokenEncoder(network, 3, 2),
    "context": lambda network: ContextEncoder(network, Place(WORDS, None), 1),
    "deep context": lambda network: ContextEncoder(network, Place(WORDS, 5), 2),
    "contexts": lambda network: ContextEncoder(network, Place(WORDS, None, NAMES), 1),
    "coupled": lambda network: CoupledEncoder(network, Place("a photo", None), 2),
}
FAMILIES = ("clip", "siglip", "vit", "convolutional")
TOKENLESS = ("tokens", "deep tokens", "coupled")  # what a convolutional tower cannot take


def save_vit(folder: Path) -> Path:
    """A VisionTextDualEncoder of a plain vision transformer and a BERT."""
    tokenizer = save_tokenizer(folder)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.ViTConfig(**TOWER, image_size=32, patch_size=8),  # type: ignore[arg-type]
        transformers.BertConfig(**TOWER, vocab_size=len(tokenizer), max_position_embeddings=24),  # type: ignore[arg-type]
        projection_dim=16,
    )
    torch.manual_seed(0)
    transformers.VisionTextDualEncoderModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("prompted")
    save_tokenizer(root / "tokenizer")
    small(root / "tokenizer", size=32).load().save(root / "convolutional")
    save_clip(root / "clip")
    save_siglip(root / "siglip")
    save_vit(root / "vit")
    return {family: HuggingFace(str(root / family)) for family in FAMILIES}


def stirred(network: PromptedEncoder, size: float = 0.1) -> PromptedEncoder:
    """The same with other numbers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.own().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return network


def made(base: Checkpoint, kind: str) -> PromptedEncoder:
    return KINDS[kind](base.load().requires_grad_(False))


def cases() -> list[Any]:
    return [
        pytest.param(family, kind, id=f"{family}-{kind}")
        for family in FAMILIES
        for kind in KINDS
        if not (family == "convolutional" and kind in TOKENLESS)
    ]


def said(network: DualEncoder) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return network.encode_image(IMAGES), network.encode_text(TEXTS)


@pytest.mark.parametrize(("family", "kind"), cases())
def test_every_prompt_reaches_its_tower_alone_and_its_gradient_is_that_of_differences(
    bases: dict[str, Checkpoint], family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases[family].load().requires_grad_(False)
    network = stirred(KINDS[kind](base))
    for tower, own, plain in zip(("image", "text"), said(network), said(base), strict=True):
        assert torch.equal(own, plain) == (tower not in network.moves()), tower
    network.double()
    images = (0.3 + 0.4 * IMAGES.double()).requires_grad_(True)  # far from where pixels are clipped

    monkeypatch.setattr(Tensor, "float", lambda tensor: tensor)  # embeddings stay in float64 here

    def value() -> Tensor:
        found = [network.encode_image(images), network.encode_text(TEXTS)]
        return sum((one.sin() * torch.arange(1, one.numel() + 1).view_as(one).cos()).sum() for one in found)  # type: ignore[return-value]

    gradients = torch.autograd.grad(value(), [images, *network.own().values()])
    assert all(bool(one.isfinite().all()) for one in gradients)
    assert bool(gradients[0].flatten(1).any(1).all())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.parameters())
    generator = torch.Generator().manual_seed(5)
    for parameter, gradient in zip([images, *network.own().values()], gradients, strict=True):
        direction, step = torch.randn(parameter.shape, generator=generator, dtype=torch.double), 1e-5
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                parameter.add_(sign * step * direction)
                ends.append(float(value()))
                parameter.sub_(sign * step * direction)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_answers_as_the_base(bases: dict[str, Checkpoint], family: str) -> None:
    base = bases[family].load().requires_grad_(False)
    images, _ = said(base)
    assert torch.equal(said(FramedEncoder(base, 3, True))[0], images)
    for place in (Place(WORDS, None), Place(WORDS, None, NAMES)):
        network = ContextEncoder(base, place, 1)
        texts = [text if WORDS in text else f"{WORDS} {text}" for text in TEXTS]
        with torch.no_grad():
            plain = base.encode_text(texts)
        if family == "clip":  # texts that begin alike are read together in another order
            torch.testing.assert_close(said(network)[1], plain, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(said(network)[1], plain) or place.names
            torch.testing.assert_close(said(network)[1], plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("family", "kind"), cases())
def test_the_saved_word_answers_as_the_network(
    bases: dict[str, Checkpoint], family: str, kind: str, tmp_path: Path
) -> None:
    network = stirred(made(bases[family], kind))
    save_prompts(prompts(network), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"prompts.json", "prompts.safetensors"}
    word = PromptTuned(bases[family], str(tmp_path))
    for own, again in zip(said(network), said(word.network), strict=True):
        assert torch.equal(own, again)


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("clip", kind) for kind in KINDS), ("siglip", "coupled"), ("vit", "coupled"), ("convolutional", "contexts")],
)
def test_the_word_is_a_model_that_can_be_attacked_and_defended(
    bases: dict[str, Checkpoint], family: str, kind: str, tmp_path: Path
) -> None:
    save_prompts(prompts(stirred(made(bases[family], kind))), tmp_path)
    word = PromptTuned(bases[family], str(tmp_path))
    check_model(word)
    if kind in ("frame", "coupled"):
        check_wrapper(BitDepth(word))


def test_kinds_stand_around_each_other(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    network: DualEncoder = bases["clip"].load().requires_grad_(False)
    for kind in ("deep tokens", "tokens", "deep context", "frame"):
        network = stirred(KINDS[kind](network))
    assert isinstance(network, PromptedEncoder)
    assert [one.kind for one in prompts(network)] == ["image tokens", "image tokens", "context", "frame"]
    save_prompts(prompts(network), tmp_path)
    word = PromptTuned(bases["clip"], str(tmp_path))
    for own, again in zip(said(network), said(word.network), strict=True):
        assert torch.equal(own, again)
    named = network.towers()
    own = {name for tower in named.values() for name in tower if name.startswith("prompt")}
    assert own == {"prompt0.vectors", "prompt1.vectors", "prompt2.vectors", "prompt3.pixels"}
    assert {name for name in named["text"] if name.startswith("prompt")} == {"prompt2.vectors"}
    assert sum(len(tower) for tower in named.values()) == len(list(network.parameters()))


def test_deep_tokens_are_those_of_a_tower_run_by_hand(bases: dict[str, Checkpoint]) -> None:
    network = stirred(made(bases["clip"], "deep tokens"), 1.0)
    inner: Any = network.inner
    tower, vectors = inner.model.vision_model, network.own()["vectors"]
    assert vectors.shape == (2, 3, 32)
    with torch.no_grad():
        states = tower.embeddings(inner.preprocess(IMAGES))
        count = states.shape[1]
        states = tower.pre_layrnorm(torch.cat([states, vectors[0].expand(3, -1, -1)], 1))
        states = tower.encoder.layers[0](states, None)
        states = tower.encoder.layers[1](torch.cat([states[:, :count], vectors[1].expand(3, -1, -1)], 1), None)
        expected = inner.model.visual_projection(tower.post_layernorm(states[:, 0]))
    torch.testing.assert_close(said(network)[0], expected, rtol=1e-5, atol=1e-6)


def test_deep_words_are_those_of_a_tower_run_by_hand(bases: dict[str, Checkpoint]) -> None:
    network = stirred(made(bases["clip"], "deep context"), 1.0)
    inner: Any = network.inner
    tower, vectors = inner.model.text_model, network.own()["vectors"][0]
    for text, name in ((TEXTS[0], "red circle"), ("the star", "the star")):  # class at end, and words in front
        ids, mask = inner.tokens([f"x x x x x {name}"])
        with torch.no_grad():
            states = tower.embeddings.token_embedding(ids)
            states[0, 1:6] = vectors[0]
            states = states + tower.embeddings.position_embedding.weight[: ids.shape[1]]
            causal = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
            states = tower.encoder.layers[0](states, causal)
            states[0, 1:6] = vectors[1]
            states = tower.final_layer_norm(tower.encoder.layers[1](states, causal))
            expected = inner.model.text_projection(states[0, int(mask.sum()) - 1])
            found = network.encode_text([text, TEXTS[1]])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_frame_is_added_at_the_size_of_the_tower(bases: dict[str, Checkpoint]) -> None:
    network = stirred(made(bases["clip"], "frame"), 1.0)
    inner: Any = network.inner
    frame = network.own()["pixels"].detach().clone()
    frame[:, 3:-3, 3:-3] = 0.0
    large = floats(pictures(2, 48, 40))
    with torch.no_grad():
        resized = inner.preprocess.fitted(large)
        expected = inner.encode_image((resized + frame).clamp(0, 1))
        assert torch.equal(network.encode_image(large), expected)
        assert not torch.allclose(expected, inner.encode_image(large), atol=1e-3)
        whole = stirred(made(bases["clip"], "addition"))
        pixels = inner.preprocess(large) + whole.own()["pixels"]
        torch.testing.assert_close(
            whole.encode_image(large), inner.model.get_image_features(pixels).pooler_output, rtol=1e-4, atol=1e-5
        )


def test_each_class_has_the_context_of_the_longest_name_in_the_text(bases: dict[str, Checkpoint]) -> None:
    place = Place(WORDS, None, NAMES)
    texts = ["a photo of a RED CIRCLE", "circles", "a circle", "two stars", "a star, red circle", "starfish"]
    assert place.lists(texts) == [1, 3, 0, 3, 1, 3]
    network = stirred(made(bases["vit"], "contexts"), 1.0)
    own = network.own()["vectors"].detach()
    assert own.shape == (3, 1, 4, 32)
    for text, vectors in (("a photo of a star", own[2, 0]), ("a photo of a disc", own[:, 0].mean(0))):
        with torch.no_grad():
            expected = network.inner.splice([text], WORDS)(vectors)
            found = network.encode_text([text, "a photo of a circle"])[:1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_texts_of_other_lists_are_read_together_in_a_packed_tower(bases: dict[str, Checkpoint]) -> None:
    network = bases["clip"].load().requires_grad_(False)
    texts, lists = ["a photo of a disc", "a photo of a disc", "a photo of a dish", "a photo of a star"], [0, 1, 0, 1]
    together = network.splice(texts, WORDS, lists)
    assert together.packed is not None and len(together.start) == 2 * len(network.splice(texts, WORDS).start)
    vectors = torch.randn(together.start.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = together(vectors)
        for text, number, embedding in zip(texts, lists, found, strict=True):
            own = vectors.unflatten(0, (2, -1))[number]
            torch.testing.assert_close(network.splice([text], WORDS)(own)[0], embedding, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_tokens_are_tuned_beside_learned_ones(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    network = stirred(made(bases["clip"], "deep tokens"), 1.0)
    save_prompts(prompts(network), tmp_path)
    classes = Prompts.of(("disc", "star"), ("a photo of a {}",))
    word, statistics = PromptTuned(bases["clip"], str(tmp_path)), tmp_path / "statistics.safetensors"
    token_statistics(word, [IMAGES], [1.0 - IMAGES], statistics)
    with torch.no_grad():
        found = TAPT(word, str(statistics), views=1, steps=0, layers=2).answer(classes).encode(IMAGES)
        inner: Any = network.inner
        tower, vectors = inner.model.vision_model, network.own()["vectors"]
        start = ImageTokens.of(inner, 2, 0).start.expand(3, -1, -1)
        states = tower.embeddings(inner.preprocess(IMAGES))
        count = states.shape[1]
        states = tower.pre_layrnorm(torch.cat([states, vectors[0].expand(3, -1, -1), start], 1))
        states = tower.encoder.layers[0](states, None)
        states = torch.cat([states[:, :count], vectors[1].expand(3, -1, -1), states[:, count + 3 :]], 1)
        states = tower.encoder.layers[1](states, None)
        expected = inner.model.visual_projection(tower.post_layernorm(states[:, 0]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_learned_words_are_tuned_further(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    classes = Prompts.of(("disc", "star"), ("a photo of a {}",))
    save_prompts(prompts(stirred(made(bases["clip"], "context"))), tmp_path / "context")
    word = PromptTuned(bases["clip"], str(tmp_path / "context"))
    still = TPT(word, words=WORDS, views=2, steps=0).answer(classes)(IMAGES)
    torch.testing.assert_close(still, word.answer(classes)(IMAGES), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    assert not torch.allclose(TPT(word, words=WORDS, views=2, keep=1.0, lr=0.1).answer(classes)(IMAGES), still)
    with pytest.raises(CrossguardError, match="cannot be tuned"):
        TPT(word, words="a picture", views=2).answer(classes)


def test_each_class_is_seen_with_pixels_of_its_own(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    base = bases["clip"].load().requires_grad_(False)
    network = stirred(ClassFramedEncoder(base, NAMES, 3, True), 1.0)
    save_prompts(prompts(network), tmp_path)
    word = PromptTuned(bases["clip"], str(tmp_path))
    frames = network.own()["pixels"].detach().clone()
    frames[:, :, 3:-3, 3:-3] = 0.0
    order = (2, 0, 1)
    classes = Prompts.of(tuple(NAMES[number] for number in order), ("a photo of a {}", "the {}"))
    texts = bases["clip"].class_embeddings(classes)
    with torch.no_grad():
        rows = [base.logits(base.encode_image((IMAGES + one).clamp(0, 1)), texts).log_softmax(1) for one in frames]
    expected = torch.stack([rows[number][:, column] for column, number in enumerate(order)], 1)
    torch.testing.assert_close(word.answer(classes)(IMAGES), expected, rtol=1e-4, atol=1e-4)
    other = Prompts.of((*classes.names[:2], "disc"), ("a photo of a {}", "the {}"))  # no class of the training
    texts = bases["clip"].class_embeddings(other)
    with torch.no_grad():
        rows = [base.logits(base.encode_image((IMAGES + one).clamp(0, 1)), texts).log_softmax(1) for one in frames]
    mean = torch.stack(rows).mean(0)[:, 2]
    torch.testing.assert_close(word.answer(other)(IMAGES)[:, 2], mean, rtol=1e-4, atol=1e-4)
    check_model(word)
    check_wrapper(BitDepth(word))


# --- The folder ---


def test_the_word_knows_its_files(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    word = PromptTuned(bases["clip"], str(tmp_path))
    assert word.fingerprint == ""
    save_prompts(prompts(stirred(made(bases["clip"], "frame"))), tmp_path)
    first = word.fingerprint
    answer = word.encode_image(IMAGES)
    save_prompts(prompts(stirred(made(bases["clip"], "frame"), 0.5)), tmp_path)
    assert word.fingerprint not in ("", first)
    assert not torch.equal(word.encode_image(IMAGES), answer)
    release()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "prompts.safetensors").unlink(), "there is no prompts.safetensors"),
        (lambda folder: (folder / "prompts.safetensors").write_bytes(b"PK\x03\x04"), "cannot be read as safetensors"),
        (lambda folder: (folder / "prompts.json").write_text("{}"), "is broken"),
        (lambda folder: told(folder, kind="magic"), "no prompts are of the kind 'magic'"),
        (lambda folder: told(folder, kind="frame"), "do not fit"),
        (lambda folder: told(folder, tokens=10**12), "give 1 to 1000"),
        (lambda folder: told(folder, tokens=4), "learned for"),
        (lambda folder: told(folder, depth=9), "before 9 layers are not possible: the image tower has 2"),
    ],
    ids=["missing", "pickle", "empty", "kind", "settings", "huge", "shape", "depth"],
)
def test_a_broken_folder_is_refused_in_a_sentence(
    bases: dict[str, Checkpoint], tmp_path: Path, damage: Callable[[Path], object], says: str
) -> None:
    save_prompts(prompts(made(bases["clip"], "deep tokens")), tmp_path)
    damage(tmp_path)
    with pytest.raises(CrossguardError, match=says):
        PromptTuned(bases["clip"], str(tmp_path)).load()


def told(folder: Path, **changes: Any) -> None:
    """Changes what the record says of the only prompt."""
    record = json.loads((folder / "prompts.json").read_text())
    entry = record["prompts"][0]
    for name, value in changes.items():
        (entry if name == "kind" else entry["settings"])[name] = value
    (folder / "prompts.json").write_text(json.dumps(record))


def test_a_folder_of_prompts_alone_is_no_model(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    save_prompts(prompts(made(bases["clip"], "frame")), tmp_path)
    with pytest.raises(CrossguardError, match="holds prompts and not the model that they were learned for"):
        short.model(str(tmp_path))


def test_a_folder_of_prompts_and_weights_is_both(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    network = stirred(made(bases["clip"], "frame"))
    network.save(tmp_path)
    path = str(tmp_path)
    assert short.model(path) == f"PromptTuned(HuggingFace({path!r}), {path!r})"
    for own, again in zip(said(network), said(PromptTuned(HuggingFace(path), path).network), strict=True):
        assert torch.equal(own, again)


def test_a_base_that_was_trained_once_more_is_refused(tmp_path: Path) -> None:
    """Whose files are where they were. The same weights elsewhere are the same base."""
    base, again = (HuggingFace(str(save_clip(tmp_path / name, 1))) for name in ("base", "again"))
    save_prompts(prompts(stirred(made(base, "context"))), tmp_path / "learned")
    tuned = PromptTuned(base, str(tmp_path / "learned"))
    before = said(tuned.load())
    for own, other in zip(before, said(PromptTuned(again, tuned.folder).load()), strict=True):
        assert torch.equal(own, other)
    network = base.load()
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-3
    network.save(tmp_path / "base")
    with pytest.raises(CrossguardError, match="learned for other weights"):
        tuned.load()
    record = json.loads((tmp_path / "learned" / "prompts.json").read_text())
    assert record["base"] == fingerprint(again.load()) != fingerprint(base.load())


def test_prompts_of_another_base_are_refused(bases: dict[str, Checkpoint], tmp_path: Path) -> None:
    save_prompts(prompts(made(bases["clip"], "frame")), tmp_path / "frame")
    save_prompts(prompts(made(bases["clip"], "tokens")), tmp_path / "tokens")
    other = HuggingFace(str(save_clip(tmp_path / "other", size=40)))
    with pytest.raises(CrossguardError, match="images of 32 x 32 pixels, and this base reads 40 x 40"):
        PromptTuned(other, str(tmp_path / "frame")).load()
    with pytest.raises(CrossguardError, match="has none that are known here"):
        PromptTuned(bases["convolutional"], str(tmp_path / "tokens")).load()
    for word in ("PromptTuned(BitDepth({0}), 'tokens')", "Interpolated({0}, BitDepth({0}))"):
        with pytest.raises(CrossguardError, match="the network of a checkpoint"):
            build(word.format(show(other)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda network: FramedEncoder(network, 16, True),
            "a frame of 16 pixels leaves nothing of an image of 32 x 32",
        ),
        (lambda network: FramedEncoder(network, 0, True), "give 1 to 15"),
        (lambda network: TokenEncoder(network, 0, 1), "0 learned tokens"),
        (lambda network: TokenEncoder(network, 1, 3), "before 3 layers are not possible: the image tower has 2"),
        (lambda network: ContextEncoder(network, Place(WORDS, 40), 1), "context of 40 tokens is longer than the text"),
        (lambda network: ContextEncoder(network, Place("a " * 40, None), 1), "context of 40 words is longer"),
        (lambda network: ContextEncoder(network, Place("", None), 1), "no tokens to be replaced"),
        (lambda network: ContextEncoder(network, Place(WORDS, 2), 3), "not possible: the text tower has 2"),
        (lambda network: CoupledEncoder(network, Place(WORDS, 2), 0), "before 0 layers"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(bases: dict[str, Checkpoint], make: Make, says: str) -> None:
    with pytest.raises(CrossguardError, match=says):
        make(bases["clip"].load())


# --- Between two models ---


def test_between_two_models(tmp_path: Path, bases: dict[str, Checkpoint]) -> None:
    a, b = (HuggingFace(str(save_clip(tmp_path / str(seed), seed))) for seed in (1, 2))
    left, right = a.load().state_dict(), b.load().state_dict()
    for alpha, expected in ((0.0, left), (1.0, right)):
        found = Interpolated(a, b, alpha).load().state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    found = Interpolated(a, b, 0.25).load().state_dict()
    assert "model.logit_scale" in found
    for name, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, left[name] + 0.25 * (right[name] - left[name]))
    check_model(Interpolated(a, b))
    with pytest.raises(CrossguardError, match="other architectures"):
        Interpolated(a, bases["siglip"]).load()
    with pytest.raises(CrossguardError, match="other architectures"):
        Interpolated(a, HuggingFace(str(save_clip(tmp_path / "deep", num_hidden_layers=3)))).load()
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(CrossguardError, match="give 0"):
            Interpolated(a, b, alpha)


def test_models_of_other_tokenizers_have_nothing_between_them(tmp_path: Path) -> None:
    a, b = (save_clip(tmp_path / name) for name in ("a", "b"))
    vocabulary = json.loads((b / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    words["a</w>"], words["b</w>"] = words["b</w>"], words["a</w>"]
    (b / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CrossguardError, match="tokenizers or image processors differ"):
        Interpolated(HuggingFace(str(a)), HuggingFace(str(b))).load()


def test_the_tower_is_found_by_its_family(bases: dict[str, Checkpoint]) -> None:
    network = bases["vit"].load()
    assert isinstance(network, TransformersEncoder) and network.stock is network.model
