"""Text towers that share the beginnings of strings, against the stock path."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossguard.models.base import frozen
from crossguard.models.huggingface import HuggingFace, TransformersEncoder
from crossguard.models.packing import Tries
from fixtures import change_config, save_clip, save_metaclip, save_siglip, save_tokenizer, small

CAUSAL = ("clip", "legacy", "metaclip_2")
ENDINGS = ["", "a", "b", "ab", "ba", "the", "then", "z", "box", "boxes"]
TEXTS = [f"a red {ending}" for ending in ENDINGS]
ODD = ["", " ", "a", "aa", "red 🦊 box", "red 🦊", "🦊", "a" * 50, "a" * 49 + "b", "a" * 21 + "b", "a" * 22, "a" * 23]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packing")
    save_tokenizer(root / "tokenizer")
    small(root / "tokenizer", size=32).load().save(root / "dual")
    change_config(save_clip(root / "legacy"), text_config__eos_token_id=2)
    return {
        "clip": save_clip(root / "clip"),
        "legacy": root / "legacy",
        "metaclip_2": save_metaclip(root / "metaclip_2"),
        "siglip": save_siglip(root / "siglip"),
        "dual": root / "dual",
    }


@pytest.fixture(scope="module")
def networks(folders: dict[str, Path]) -> dict[str, TransformersEncoder]:
    return {name: encoder(folder) for name, folder in folders.items()}


def encoder(folder: Path) -> TransformersEncoder:
    network = HuggingFace(str(folder)).load()
    assert isinstance(network, TransformersEncoder)
    return network


def stock(network: TransformersEncoder, texts: Sequence[str]) -> Tensor:
    """What the model's own method answers."""
    tokens = network.tokenizer(
        list(texts), padding=True, truncation=True, max_length=network.length, return_tensors="pt"
    )
    with torch.no_grad():
        output = network.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return output.pooler_output


def read(network: TransformersEncoder, texts: Sequence[str]) -> tuple[Tensor, int]:
    """The features and how many tokens the tower read for them."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        given = watched(network, patch)
        return network.encode_text(texts), sum(named["input_ids"].numel() for named in given)


def watched(network: TransformersEncoder, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the text tower is given from here on; without a hook, since packing keeps away from these."""
    given: list[dict[str, Any]] = []
    tower = network.model.text_model
    own = tower.forward

    def forward(**named: Any) -> Any:
        given.append(named)
        return own(**named)

    patch.setattr(tower, "forward", forward)
    return given


def width(network: TransformersEncoder, texts: Sequence[str]) -> int:
    tokens = network.tokenizer(list(texts), truncation=True, max_length=network.length)["input_ids"]
    return max(map(len, tokens))


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


# --- The same features ---


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[::-1], ODD, [*ODD, *TEXTS], ["a photo of"] * 3])
def test_packed_features_are_the_stock_ones(
    networks: dict[str, TransformersEncoder], name: str, texts: list[str]
) -> None:
    network = networks[name]
    found, _ = read(network, texts)
    close(found, stock(network, texts))
    assert network.packing is not None and network.packing.sound


def test_both_rules_of_pooling_are_met(networks: dict[str, TransformersEncoder]) -> None:
    assert networks["clip"].model.text_model.eos_token_id == 53
    assert networks["legacy"].model.text_model.eos_token_id == 2
    assert networks["metaclip_2"].model.text_model.eos_token_id == 2
    assert networks["metaclip_2"].tokenizer(["a"])["input_ids"] == [[3, 5, 2]]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(CAUSAL),
    st.lists(st.text("ab 🦊", max_size=12), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.text("ab 🦊", max_size=16)), min_size=1, max_size=24),
)
def test_any_strings(
    networks: dict[str, TransformersEncoder], name: str, beginnings: list[str], endings: list[tuple[int, str]]
) -> None:
    texts = [beginnings[number % len(beginnings)] + ending for number, ending in endings]
    found, tokens = read(networks[name], texts)
    close(found, stock(networks[name], texts))
    assert tokens <= len(texts) * width(networks[name], texts)
    for (left, one), (right, other) in itertools.combinations(enumerate(texts), 2):
        assert one != other or torch.equal(found[left], found[right])


def test_features_do_not_depend_on_the_batch(networks: dict[str, TransformersEncoder]) -> None:
    network = networks["clip"]
    whole, _ = read(network, TEXTS)
    for start, stop in ((0, 1), (0, 2), (3, 9)):
        close(read(network, TEXTS[start:stop])[0], whole[start:stop])


def test_strings_of_the_same_tokens_are_equal_to_the_bit(networks: dict[str, TransformersEncoder]) -> None:
    network = networks["clip"]
    for others in (TEXTS, ["unlike", "these other", "strings"]):  # of which the latter do not pack
        found, _ = read(network, ["Box", *others, "box", " box ", "box"])
        assert all(torch.equal(found[0], row) for row in found[-3:])
        close(found, stock(network, ["Box", *others, "box", " box ", "box"]))


def test_with_eager_attention(folders: dict[str, Path]) -> None:
    network = encoder(folders["clip"])
    network.model.set_attn_implementation("eager")
    read(network, TEXTS)  # has tried the probe
    found, tokens = read(network, TEXTS)
    assert tokens < len(TEXTS) * width(network, TEXTS) // 2
    close(found, stock(network, TEXTS))


# --- Less work ---


@pytest.mark.parametrize("name", ["clip", "legacy"])
def test_the_tower_reads_fewer_tokens(networks: dict[str, TransformersEncoder], name: str) -> None:
    network = networks[name]
    read(network, TEXTS)  # has tried the probe
    _, tokens = read(network, TEXTS)
    assert tokens < len(TEXTS) * width(network, TEXTS) // 2
    _, tokens = read(network, [*TEXTS, *TEXTS])
    assert tokens < len(TEXTS) * width(network, TEXTS) // 2


def test_strings_that_share_little_take_the_stock_path(networks: dict[str, TransformersEncoder]) -> None:
    network = networks["clip"]
    texts = ["quick", "brown", "foxes", "jumps"]
    read(network, texts)
    found, tokens = read(network, texts)
    assert tokens == len(texts) * width(network, texts)
    assert torch.equal(found, stock(network, texts))


def test_rows_are_no_longer_than_the_context(networks: dict[str, TransformersEncoder]) -> None:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        given = watched(networks["clip"], patch)
        networks["clip"].encode_text([f"a red {one}{two}" for one in "abcdefgh" for two in "abcdefgh"])
    rows, one, height, across = given[-1]["attention_mask"].shape
    assert one == 1 and rows > 1 and height == across <= 24


def test_tries_share_what_strings_begin_with() -> None:
    strings = torch.tensor([[1, 2, 3, -1], [1, 2, 4, 5], [1, 6, -1, -1], [7, -1, -1, -1]])
    tries = Tries.of(strings, 7)
    tokens, positions, seen = tries.rows(strings)
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7]] and positions.tolist() == [[0, 1, 2, 2, 3, 1, 0]]
    assert tries.last.tolist() == [2, 4, 5, 6] and tries.size == 7
    above = [seen[0, node].nonzero()[:, 0].tolist() for node in range(7)]
    assert above == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 5], [6]]
    split = Tries.of(strings, 4)  # the beginning is there once more in each row
    assert split.row.tolist() == [0, 1, 2, 2] and split.width == 4
    assert split.rows(strings)[0].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [1, 6, 7, 0]]


# --- Only where it is right ---


def test_gradients_flow(folders: dict[str, Path]) -> None:
    network = encoder(folders["clip"])
    features = network.encode_text(TEXTS)
    assert torch.equal(features, stock(network, TEXTS)) and network.packing is not None and not network.packing.sound
    features.square().sum().backward()
    assert all(
        parameter.grad is not None
        for name, parameter in network.towers()["text"].items()
        if "position_embedding" not in name
    )
    with frozen(network):  # nothing asks for a gradient
        close(network.encode_text(TEXTS), stock(network, TEXTS))
    assert network.packing.sound


@pytest.mark.parametrize("name", ["siglip", "dual"])
def test_other_towers_are_left_alone(networks: dict[str, TransformersEncoder], name: str) -> None:
    assert networks[name].packing is None


def no_mask(forward: Callable[..., Any], **named: Any) -> Any:
    """A tower that does not look at masks of four dimensions."""
    if named["attention_mask"].ndim == 4:
        named["attention_mask"] = None
    return forward(**named)


def refuse(forward: Callable[..., Any], **named: Any) -> Any:
    if named["attention_mask"].ndim == 4:
        raise TypeError("no such masks")
    return forward(**named)


@pytest.mark.parametrize("broken", [no_mask, refuse])
def test_a_tower_that_ignores_masks_takes_the_stock_path(
    folders: dict[str, Path], broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = encoder(folders["clip"])
    forward = network.model.text_model.forward
    monkeypatch.setattr(network.model.text_model, "forward", lambda **named: broken(forward, **named))
    with torch.no_grad():
        found = network.encode_text(TEXTS)
    assert torch.equal(found, stock(network, TEXTS))
    assert network.packing is not None and network.packing.sound is False


def test_other_precision_and_training_take_the_stock_path(folders: dict[str, Path]) -> None:
    network = encoder(folders["clip"])
    assert network.packing is not None
    with torch.no_grad():
        assert network.packing.usable() and not copy.deepcopy(network).train().packing.usable()
        with torch.autocast("cpu", torch.bfloat16):
            assert not network.packing.usable()
        half = copy.deepcopy(network).to(torch.bfloat16)
        assert half.packing is not None and half.packing.model is half.model and not half.packing.usable()


def test_strings_pooled_at_padding_take_the_stock_path(folders: dict[str, Path]) -> None:
    network = encoder(folders["legacy"])  # which pools the highest id, so here the padding
    network.tokenizer.pad_token_id = 53
    network.tokenizer.padding_side = "left"
    found, _ = read(network, TEXTS)
    assert torch.equal(found, stock(network, TEXTS))


@pytest.mark.parametrize("place", ["embeddings.token_embedding", "", "encoder.layers.0"])
def test_tokens_that_a_hook_splices_in_take_the_stock_path(folders: dict[str, Path], place: str) -> None:
    """As learned prompts do: the second token of each string becomes another vector, while all weights are frozen."""
    network = encoder(folders["clip"]).requires_grad_(False)
    assert isinstance(network, TransformersEncoder) and network.packing is not None
    learned = torch.randn(32, requires_grad=True)

    def splice(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.cat([output[:, :1], learned.expand(len(output), 1, -1), output[:, 2:]], 1)
        return output

    module = network.model.text_model.get_submodule(place)
    with torch.no_grad():
        before = network.encode_text(TEXTS)
        handle = module.register_forward_hook(splice)
        assert not network.packing.usable()
        together = network.encode_text(TEXTS)
        alone = torch.cat([network.encode_text([text]) for text in TEXTS])
        handle.remove()
        assert network.packing.usable()
    close(together, alone)
    assert torch.allclose(before, together, atol=1e-5) == (place == "")  # the hook there sees no tensor
