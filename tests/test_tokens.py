"""Ids straight from the tokenizers' backend, against what `transformers` makes of the same strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from crossguard import Tiny
from crossguard.models.huggingface import HuggingFace
from crossguard.models.tokens import Tokens
from fixtures import save_siglip, save_tokenizer

TEXTS = ["a photo of a cat", "", " ", "A  Photo,of it", "naïve 🦊", "[SEP] [MASK]", "a " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    save_tokenizer(folder)
    return folder


def read(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def stock(tokenizer: Any, texts: list[str], length: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = tokenizer(
        texts, padding="max_length" if padded else True, truncation=True, max_length=length, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1], TEXTS[1:2]])
def test_the_ids_and_the_mask_are_the_stock_ones(folder: Path, texts: list[str], padded: bool) -> None:
    tokens = Tokens(read(folder), 16, padded)
    found, expected = tokens(texts), stock(read(folder), texts, 16, padded)
    assert tokens.direct
    assert torch.equal(found[0], expected[0]) and found[0].dtype == expected[0].dtype
    assert torch.equal(found[1], expected[1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_any_strings_are_read_as_the_stock_tokenizer_reads_them(texts: list[str]) -> None:
    network: Any = Tiny().network
    expected = stock(network.tokenizer, texts, network.length, False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(network.tokens(texts), expected, strict=True))


def test_what_the_tokenizer_was_asked_in_between_does_not_change_the_ids(folder: Path) -> None:
    tokenizer = read(folder)
    tokens = Tokens(tokenizer, 16, False)
    before = tokens(TEXTS)
    tokenizer(TEXTS, truncation=False)
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=5)
    assert torch.equal(tokens(TEXTS)[0], before[0])


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself(folder: Path) -> None:
    class Prompting:
        """Puts a word in front of every string before its backend sees it, as some do in Python."""

        is_fast = True

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return self.inner(["the " + text for text in texts], **options)

    tokens = Tokens(Prompting(read(folder)), 16, False)
    found = tokens(["a cat"])
    assert tokens.direct is False
    assert torch.equal(found[0], stock(read(folder), ["the a cat"], 16, False)[0])


def test_a_tokenizer_without_a_backend_is_asked_itself(folder: Path) -> None:
    inner = read(folder)

    def slow(texts: list[str], **options: Any) -> Any:
        return inner(texts, **options)

    tokens = Tokens(slow, 16, False)
    assert torch.equal(tokens(TEXTS)[0], stock(inner, TEXTS, 16, False)[0])
    assert tokens.direct is False


def test_hundreds_of_strings_of_all_lengths_get_the_embeddings_that_they_get_alone() -> None:
    texts = [" ".join(["a photo of a red circle on wood and grass"] * (1 + i % 3))[: 5 + i % 70] for i in range(600)]
    with torch.no_grad():
        found = Tiny().network.encode_text(texts)
        alone = torch.cat([Tiny().network.encode_text([text]) for text in texts[:40]])
    assert found.shape[0] == 600
    assert torch.allclose(found[:40], alone, atol=1e-5)
    assert texts[210:] == texts[:390]
    assert torch.allclose(found[210:], found[:390], atol=1e-5)


def test_texts_padded_on_the_left_keep_their_order_and_their_padding(folder: Path) -> None:
    network: Any = Tiny().load()
    short, long = "a red circle", "a photo of a green star on wood"
    texts = [short] * 300 + [long]  # one batch is of short ones alone
    network.tokenizer.padding_side = "left"
    with torch.no_grad():
        found = network.encode_text(texts)
        tokens = network.tokenizer(texts, padding=True, return_tensors="pt")
        expected = network.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
    assert torch.allclose(found, expected, atol=1e-6)


def test_strings_of_a_model_padded_to_its_context_are_padded_so_in_any_number(tmp_path: Path) -> None:
    network: Any = HuggingFace(str(save_siglip(tmp_path))).network
    texts = [f"a {word} box" for word in ("red", "green", "small red", "")] * 70
    with torch.no_grad():
        found = network.encode_text(texts)
        alone = torch.cat([network.encode_text([text]) for text in texts[:4]])
    assert torch.allclose(found[:4], alone, atol=1e-5)
    assert torch.equal(network.tokens(texts)[0][:4], stock(network.tokenizer, texts[:4], network.length, True)[0])
