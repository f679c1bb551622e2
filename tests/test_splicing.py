"""Learned vectors in place of words, against the texts themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossguard.errors import CrossguardError
from crossguard.models import splicing
from crossguard.models.base import DualEncoder
from crossguard.models.huggingface import HuggingFace, TransformersEncoder
from crossguard.models.splicing import Splice
from fixtures import change_config, save_clip, save_metaclip, save_siglip, save_tokenizer, small

FAMILIES = ("clip", "legacy", "metaclip_2", "siglip", "dual")
CAUSAL = FAMILIES[:3]
# The words begin a text, stand within it, and are missing; one text is there twice, another is empty.
TEXTS = ["a an red box", "a an blue star", "the a an disc", "green square", "a an red box", "", "two a an a an thing"]
FULL = [text if "a an" in text else f"a an {text}" for text in TEXTS]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TransformersEncoder]:
    root = tmp_path_factory.mktemp("splicing")
    save_tokenizer(root / "tokenizer")
    small(root / "tokenizer", size=32).load().save(root / "dual")
    change_config(save_clip(root / "legacy"), text_config__eos_token_id=2)
    save_clip(root / "clip")
    save_metaclip(root / "metaclip_2")
    save_siglip(root / "siglip")
    return {name: encoder(root / name) for name in FAMILIES}


def encoder(folder: Path) -> TransformersEncoder:
    network = HuggingFace(str(folder)).load().requires_grad_(False)
    assert isinstance(network, TransformersEncoder)
    return network


def others(splice: Splice, count: int = 3) -> Tensor:
    """Vectors of several images, each as large as those of the words."""
    generator = torch.Generator().manual_seed(1)
    return splice.start.std() * torch.randn(count, *splice.start.shape, generator=generator)


def gradient(splice: Splice, context: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings, and the gradient of a sum of them that weighs each number otherwise."""
    context = context.clone().requires_grad_(True)
    found = splice(context)
    weights = torch.arange(found[0].numel(), dtype=found.dtype).sin().view(found.shape[1:])
    return found.detach(), torch.autograd.grad((found * weights).sum(), context)[0]


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> None:
    assert left.shape == right.shape
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


@contextmanager
def kept(network: TransformersEncoder) -> Iterator[dict[int, int]]:
    """The bytes of each tensor that is kept for a gradient inside, weights aside."""
    weights = {one.untyped_storage().data_ptr() for one in network.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def watched(network: TransformersEncoder, patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the text tower reads in each forward from here on."""
    tower, read = network.model.text_model, list[int]()
    own = tower.forward

    def forward(*args: Any, **named: Any) -> Any:
        read.append(named["input_ids"].numel())
        return own(*args, **named)

    patch.setattr(tower, "forward", forward)
    return read


# --- The right embeddings ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vectors_of_the_words_give_the_plain_embeddings(
    networks: dict[str, TransformersEncoder], family: str
) -> None:
    network = networks[family]
    splice = network.splice(TEXTS, "a an")
    assert (splice.packed is not None) == (family in CAUSAL) and splice.count == len(TEXTS)
    plain = network.encode_text(FULL)
    with torch.no_grad():
        close(splice(splice.start), plain)
        close(splice(splice.start.expand(2, -1, -1)), plain.expand(2, -1, -1))
    assert len(plain.unique(dim=0)) == len(TEXTS) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vectors_of_other_words_give_the_embeddings_of_these(
    networks: dict[str, TransformersEncoder], family: str
) -> None:
    network = networks[family]
    splice, words = network.splice(TEXTS, "a an"), ["o of", "b ad", "a an", "x yz"]
    context = torch.stack([network.splice([two], two).start for two in words])
    expected = torch.stack([network.encode_text([text.replace("a an", two, 1) for text in FULL]) for two in words])
    with torch.no_grad():
        close(splice(context), expected)
        close(splice(context[1]), expected[1])
    if family in CAUSAL[:2]:  # the tokenizers of whole words know neither of the last two
        assert float((expected[1] - expected[3]).abs().min(1).values.max()) > 1e-4
    assert float((expected[0] - expected[2]).abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_images_do_not_see_each_other(networks: dict[str, TransformersEncoder], family: str) -> None:
    splice = networks[family].splice(TEXTS, "a an")
    context = others(splice)
    found, slope = gradient(splice, context)
    for number, one in enumerate(context):
        alone, own = gradient(splice, one[None])
        close(alone[0], found[number])
        close(own[0], slope[number], 1e-4)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


# --- The right gradients ---


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_finite_differences(networks: dict[str, TransformersEncoder], family: str) -> None:
    network = networks[family]
    single = gradient(network.splice(TEXTS, "a an"), others(network.splice(TEXTS, "a an")))[1]
    network.double()
    try:
        splice = network.splice(TEXTS, "a an")
        context = others(splice).double()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "float", lambda tensor: tensor)  # embeddings stay in float64 here
            _, slope = gradient(splice, context)
            close(single.double(), slope, 1e-4)  # which in a causal tower is that of packed rows
            generator = torch.Generator().manual_seed(2)
            direction = torch.randn(context.shape, generator=generator, dtype=torch.float64)
            step = 1e-5 * direction
            weights = torch.arange(splice(context)[0].numel(), dtype=torch.float64).sin().view(splice.count, -1)
            with torch.no_grad():
                rise = ((splice(context + step) - splice(context - step)) * weights).sum() / 2e-5
        assert float(rise) == pytest.approx(float((slope * direction).sum()), rel=1e-6)
        assert float(slope.abs().amax((1, 2)).min()) > 1e-3
    finally:
        network.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind(networks: dict[str, TransformersEncoder], family: str) -> None:
    network = networks[family]
    before = network.encode_text(FULL)
    splice = network.splice(TEXTS, "a an")
    network.requires_grad_(True)
    try:
        found, slope = gradient(splice, others(splice))  # of a tower that is not frozen
        assert all(parameter.grad is None for parameter in network.parameters())
    finally:
        network.requires_grad_(False)
    frozen, same = gradient(splice, others(splice))
    close(frozen, found)
    close(same, slope, 1e-4)
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(CrossguardError):
        splice(splice.start[:1])
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.equal(network.encode_text(FULL), before)


# --- Memory and work ---


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_for_gradients_is_bounded(
    networks: dict[str, TransformersEncoder], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = networks[family]
    splice = network.splice([f"a an {one} {two}" for one in ("red", "blue") for two in ("box", "star", "disc")], "a an")
    context = others(splice, 5)
    rows = splice.plain if splice.packed is None else splice.packed.rows
    whole, slope = gradient(splice, context)
    with kept(network) as found:
        splice(context.clone().requires_grad_(True))
    width = rows.tokens.shape[1]
    most = context[:, 0, 0].numel() * rows.tokens.numel() * splice._cost(width)
    assert 0.4 * most < sum(found.values()) <= most  # the estimate is no less than what is kept, and not far from it
    bound = most // 4
    monkeypatch.setattr(splicing, "_BYTES", bound)
    read = watched(network, monkeypatch)
    again, same = gradient(splice, context)
    close(again, whole)
    close(same, slope, 1e-4)
    assert max(read) * splice._cost(width) <= bound
    parts = len(read) // 2
    assert parts >= 4 and sum(read[:parts]) == sum(read[parts:])  # each once forwards and once more for the gradient
    with torch.no_grad():
        close(splice(context), whole)
    assert len(read) == 3 * parts


def test_a_causal_tower_reads_what_the_texts_begin_with_once(
    networks: dict[str, TransformersEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = networks["clip"]
    splice = network.splice([f"a an {one}" for one in ("box", "boxes", "bee", "star", "box")], "a an")
    assert splice.packed is not None
    read = watched(network, monkeypatch)
    with torch.no_grad():
        splice(others(splice, 4))
    # Begin, a, a, n: 4; b, o: 2; x, end; x, e, s, end; e, e, end; s, t, a, r, end: 14; for each of four images.
    assert read == [4 * (4 + 2 + 14)]


def test_other_precisions_and_hooks_take_the_plain_path(networks: dict[str, TransformersEncoder]) -> None:
    network = networks["clip"]
    splice = network.splice(TEXTS, "a an")
    context = others(splice)
    with torch.no_grad():
        expected = splice(context)
        handle = network.model.text_model.encoder.register_forward_hook(lambda *_: None)
        close(splice(context), expected)
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = splice(context)
    assert rounded.dtype == torch.float32 and 0 < float((rounded - expected).abs().max()) < 0.1


def test_other_threads_read_plain_texts_meanwhile(
    networks: dict[str, TransformersEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = networks["clip"]
    splice, plain = network.splice(TEXTS, "a an"), network.encode_text(FULL)
    found = list[Tensor]()
    tower = network.model.text_model
    own = tower.forward

    def forward(*args: Any, **named: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=lambda: found.append(network.encode_text(FULL)))
            other.start()
            other.join()
        return own(*args, **named)

    monkeypatch.setattr(tower, "forward", forward)
    with torch.no_grad():
        splice(others(splice))
    assert len(found) == 1
    close(found[0], plain)


# --- What cannot be spliced ---


def spliced(network: DualEncoder, texts: Sequence[str], words: str) -> str:
    with pytest.raises(CrossguardError) as raised:
        network.splice(texts, words)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_what_cannot_be_spliced_is_refused(networks: dict[str, TransformersEncoder]) -> None:
    assert "at least one word" in spliced(networks["clip"], TEXTS, " ")
    assert "no texts" in spliced(networks["clip"], [], "a an")
    assert "are not among the 24 tokens" in spliced(networks["clip"], [f"{'long ' * 9}a an"], "of" * 12)
    splice = networks["dual"].splice(TEXTS, "a an")
    for shape in ((2, 1, 32), (3, 32), (2, 31)):
        with pytest.raises(CrossguardError, match="have 2 tokens of 32 numbers"):
            splice(torch.zeros(shape))


def test_words_of_which_an_end_is_cut_go_in_front(networks: dict[str, TransformersEncoder]) -> None:
    network = networks["clip"]
    late = f"{'b' * 21} a an"  # the second word would be cut
    splice = network.splice([late], "a an")
    with torch.no_grad():
        close(splice(splice.start), network.encode_text([f"a an {late}"]))


def test_a_network_of_another_kind_says_so() -> None:
    class Towers(DualEncoder):
        encode_image = encode_text = scale = bias = towers = save = None  # type: ignore[assignment]

    assert "a Towers cannot read learned tokens" in spliced(Towers(), TEXTS, "a an")
