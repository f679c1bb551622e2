"""Replacing words: the search finds what enumeration finds, asks little, and leaves alone what it must."""

from __future__ import annotations

import itertools
import json
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks import candidates as candidates_module
from crossguard.attacks.candidates import (
    EMBEDDED,
    STOP_WORDS,
    Candidate,
    CandidateSource,
    MaskedLM,
    Proposals,
    attackable,
    core,
    forget,
    likeliest,
)
from crossguard.attacks.synonyms import AnyOf
from crossguard.attacks.text import Substitute, collisions
from crossguard.budgets import Characters, Words
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.goals import Drift, Untargeted
from crossguard.opening import opening
from crossguard.words import contents

LIKE = {
    "photo": ("picture", "photo", "image", "the"),
    "cat": ("dog", "kitten", "##s", "[UNK]", "two cats"),
    "red": ("blue", "crimson", "of"),
    "circle": ("square", "disc", "circle"),
}


@dataclass(frozen=True)
class Listed(CandidateSource):
    """Stands in for a language model: proposes from a list, and remembers what it was asked to read."""

    name: str = "listed"
    asked: list[str] = field(default_factory=list, compare=False)

    def read(self, texts: Sequence[str], top: int, threshold: float, compat: bool) -> list[Proposals]:
        self.asked.extend(texts)
        return [
            tuple(
                tuple(Candidate(like, 1.0) for like in LIKE.get(core(word)[1].lower(), ())[:top])
                for word in text.split(" ")
            )
            for text in texts
        ]


@dataclass
class BagOfWords:
    """A victim whose embedding is the sum of a random vector for each word."""

    calls: list[int] = field(default_factory=list)
    strings: list[str] = field(default_factory=list)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.calls.append(len(texts))
        self.strings.extend(texts)
        return torch.stack([sum((vector(w) for w in text.lower().split(" ")), torch.zeros(32)) for text in texts])


def vector(word: str) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(crc32(word.encode())))


@pytest.fixture(autouse=True)
def _fresh() -> None:
    candidates_module._remembered.clear()


TEXTS = [
    "a photo of a cat",
    "this is a photo of a red circle",
    "A red cat.",
    "a photo of a cat",
    "a cat on a photo",
]


def drift(text: str, clean: str) -> float:
    both = BagOfWords()([text, clean])
    return 1.0 - float(F.cosine_similarity(both[:1], both[1:]))


def replaced(text: str, place: int, word: str) -> str:
    words = text.split(" ")
    before, _, behind = core(words[place])
    return " ".join([*words[:place], before + word + behind, *words[place + 1 :]])


def admissible_words(word: str) -> list[str]:
    inside = core(word)[1].lower()
    dropped = (*STOP_WORDS, inside, "##s", "[UNK]", "two cats")
    return [like for like in LIKE.get(inside, ()) if like not in dropped]


@pytest.mark.parametrize("text", TEXTS)
def test_one_substitution_is_the_best_for_the_most_important_word(text: str) -> None:
    places = [place for place, word in enumerate(text.split(" ")) if admissible_words(word)]
    unknown = {}
    for place in places:
        words = text.split(" ")
        unknown[place] = drift(" ".join([*words[:place], "[UNK]", *words[place + 1 :]]), text)
    place = max(places, key=lambda at: unknown[at])
    options = [replaced(text, place, word) for word in admissible_words(text.split(" ")[place])]
    expected = max(options, key=lambda option: drift(option, text))
    assert Substitute(Listed())(BagOfWords(), [text]) == [expected]


def test_a_budget_of_two_continues_on_the_text_as_it_became() -> None:
    attack, clean = Substitute(Listed()), TEXTS[1]
    (once,), (twice,) = (attack(BagOfWords(), [clean], budget=Words(count)) for count in (1, 2))
    assert Words(1).size(once, clean) == 1
    assert Words(2).size(twice, clean) == 2
    assert Words(2).size(twice, once) == 1
    assert drift(twice, clean) > drift(once, clean)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("compat", [False, True])
def test_budget_and_stop_words_hold(count: int, compat: bool) -> None:
    found = Substitute(Listed(), coattack_compat=compat)(BagOfWords(), TEXTS, budget=Words(count))
    Words(count).check(found, TEXTS)
    for text, clean in zip(found, TEXTS, strict=True):
        for new, old in zip(text.split(" "), clean.split(" "), strict=True):
            assert new == old or attackable(old, compat)
    if count == 0:
        assert found == TEXTS


def test_the_outcome_depends_on_nothing_but_the_text() -> None:
    whole = Substitute(Listed())(BagOfWords(), TEXTS, budget=Words(2))
    assert whole == Substitute(Listed())(BagOfWords(), TEXTS, budget=Words(2))
    assert whole == Substitute(Listed(), batch=2)(BagOfWords(), TEXTS, budget=Words(2))
    assert whole == [Substitute(Listed())(BagOfWords(), [text], budget=Words(2))[0] for text in TEXTS]
    assert whole[::-1] == Substitute(Listed())(BagOfWords(), TEXTS[::-1], budget=Words(2))


def test_one_word_costs_three_forwards_and_no_string_is_asked_for_twice_in_one() -> None:
    victim = BagOfWords()
    Substitute(Listed())(victim, [*TEXTS * 20])
    assert len(victim.calls) == 3
    start = victim.calls[0]  # behind the clean texts of the goal
    for count in victim.calls[1:]:
        assert len(set(victim.strings[start : start + count])) == count
        start += count
    small = BagOfWords()
    Substitute(Listed(), batch=4)(small, [*TEXTS * 20])
    assert max(small.calls[1:]) <= 4


def test_a_string_is_read_once_per_process() -> None:
    source = Listed()
    first = Substitute(source)(BagOfWords(), TEXTS)
    assert sorted(source.asked) == sorted(set(TEXTS))
    assert Substitute(source)(BagOfWords(), TEXTS[::-1]) == first[::-1]
    assert len(source.asked) == len(set(TEXTS))
    Substitute(source, top=1)(BagOfWords(), TEXTS)  # another question, another answer
    assert len(source.asked) == 2 * len(set(TEXTS))


def test_a_candidate_that_does_not_climb_gives_way_to_the_next_word() -> None:
    def blind(texts: Sequence[str]) -> Tensor:  # sees no difference between a picture and an image
        return BagOfWords()([t.replace("picture", "photo").replace("image", "photo") * 1 for t in texts])

    text = "photo photo cat"
    (found,) = Substitute(Listed())(blind, [text])
    assert found.split(" ")[:2] == ["photo", "photo"]
    assert found.split(" ")[2] in ("dog", "kitten")
    assert Substitute(Listed())(lambda texts: torch.ones(len(texts), 4), TEXTS) == TEXTS


def test_other_goals_climb_their_own_loss() -> None:
    axis = torch.stack([vector("crimson"), vector("blue"), vector("photo")])

    def logits(texts: Sequence[str]) -> Tensor:
        return BagOfWords()(texts) @ axis.T

    clean, labels = ["red circle", "red circle"], torch.tensor([1, 0])
    goal = Untargeted(labels)
    found = Substitute(Listed())(logits, clean, goal=goal)
    assert bool((goal.loss(logits(found)) > goal.loss(logits(clean))).all())
    assert found == [Substitute(Listed())(logits, [c], Untargeted(labels[i : i + 1]))[0] for i, c in enumerate(clean)]


def test_divergence_of_the_reference_ranks_as_the_cosine_does() -> None:
    torch.manual_seed(0)
    clean = F.normalize(torch.randn(1, 512, dtype=torch.float64), dim=1)
    others = torch.randn(20, 512, dtype=torch.float64)
    others = F.normalize(others - (others @ clean.T) * clean, dim=1)
    cosine = 1.0 - torch.linspace(0.05, 1.0, 20, dtype=torch.float64)[torch.randperm(20), None]
    others = cosine * clean + (1.0 - cosine**2).sqrt() * others
    divergence = F.kl_div(others.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    loss = Drift(clean.expand(20, -1)).loss(others)
    assert torch.equal(divergence.argsort(), loss.argsort())
    torch.testing.assert_close(divergence.float() * 512, loss, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  ",
        "cat",
        "a",
        "the of and",
        "🐱",
        "🐱 cat 🐱",
        "...",
        "a photo,  of",
        "Фото кота",
        "红色 圆",
        "é",
        "\t\n",
        "it's",
    ],
)
@pytest.mark.parametrize("compat", [False, True])
def test_no_string_is_too_odd(text: str, compat: bool, tiny_lm: MaskedLM) -> None:
    for source in (Listed(), tiny_lm):
        (found,) = Substitute(source, coattack_compat=compat)(BagOfWords(), [text])
        assert Words(1).size(found, text) <= 1
        if not any(attackable(word, compat) for word in text.split(" ")):
            assert found == text


def test_punctuation_and_case_of_the_other_words_stay() -> None:
    (found,) = Substitute(Listed())(BagOfWords(), ['The Big "cat."'])
    assert found in ('The Big "dog."', 'The Big "kitten."')
    assert [core(word) for word in ("cat.", "(cat)", "cat", "...", "")] == [
        ("", "cat", "."),
        ("(", "cat", ")"),
        ("", "cat", ""),
        ("...", "", ""),
        ("", "", ""),
    ]


def test_collisions_are_counted_or_forbidden() -> None:
    prompts = Prompts.of(("red cat", "blue dog"), ("a {}.",), {"cat": ("kitten",)})
    rivals, clean = prompts.rivals(), prompts.flat
    attacked = ["a blue cat.", "a blue dog."]
    assert collisions(attacked, clean, rivals) == [True, False]
    assert collisions(["a red kitten.", "a RED cat."], clean, rivals) == [False, True]
    assert collisions(["a crimson cat.", "a red cat."], clean, [frozenset(), frozenset()]) == [False, True]
    found = Substitute(Listed(), collisions="forbid")(BagOfWords(), clean, rivals=rivals)
    assert collisions(found, clean, rivals) == [False, False]
    assert found[0] in ("a crimson cat.", "a red kitten.")
    loose = Substitute(Listed())(BagOfWords(), clean, rivals=rivals, budget=Words(2))
    assert any(collisions(loose, clean, rivals))


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(CrossguardError, match=r"Words\(1\)"):
        Substitute(Listed())(BagOfWords(), TEXTS, budget=Characters(1))
    with pytest.raises(CrossguardError, match="forbid"):
        Substitute(collisions="maybe")
    with pytest.raises(CrossguardError, match="1 or more"):
        Substitute(top=0)
    with pytest.raises(CrossguardError, match="not finite"):
        Substitute(Listed())(lambda texts: torch.full((len(texts), 4), torch.nan), TEXTS)
    assert Substitute(Listed())(BagOfWords(), []) == []


def test_combinations_come_best_first_and_only_as_many_as_asked_for() -> None:
    generator = torch.Generator().manual_seed(1)
    options = [
        [(float(v), i) for i, v in enumerate(torch.rand(4, generator=generator).sort(descending=True).values)]
        for _ in range(5)
    ]
    every = sorted((-sum(v for v, _ in row), tuple(i for _, i in row)) for row in itertools.product(*options))
    found = likeliest(options, 24)
    assert [ids for _, ids in found] == [ids for _, ids in every[:24]]
    assert [total for total, _ in found] == pytest.approx([-cost for cost, _ in every[:24]])
    started = time.perf_counter()
    assert len(likeliest(options * 20, 24)) == 24  # of 4**100
    assert time.perf_counter() - started < 0.5
    assert likeliest([*options, []], 24) == []


# A language model small enough to make in a test: random weights; words, letters and continuations as vocabulary.


def make_lm(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertTokenizer

    torch.manual_seed(0)
    words = [
        "a",
        "photo",
        "of",
        "this",
        "is",
        "cat",
        "dog",
        "red",
        "blue",
        "circle",
        "square",
        "picture",
        ".",
        ",",
    ]
    letters = [*string.ascii_lowercase[1:], *("##" + letter for letter in string.ascii_lowercase)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    config = BertConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        initializer_range=1.0,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_lm")
    make_lm(folder)
    return folder


@pytest.fixture
def tiny_lm(tiny_folder: Path) -> MaskedLM:
    return MaskedLM(str(tiny_folder))


def predictions(folder: Path, ids: Sequence[int]) -> Tensor:
    from transformers import AutoModelForMaskedLM

    with torch.no_grad():
        return AutoModelForMaskedLM.from_pretrained(folder).eval()(input_ids=torch.tensor([list(ids)])).logits[0]


@pytest.mark.parametrize("compat", [False, True])
def test_candidates_stand_at_the_place_of_the_word_or_one_before_it(tiny_folder: Path, compat: bool) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    text = "this is a photo of a red circle"
    ids = tokenizer(text)["input_ids"]
    logits = predictions(tiny_folder, ids[:-1] if compat else ids)  # Co-Attack gives no [SEP]
    source = MaskedLM(str(tiny_folder))
    (read,) = source.read([text], 10, 0.3, compat)
    for place, word in enumerate(text.split(" ")):
        row = logits[place] if compat else logits[place + 1]
        if not compat:
            row[tokenizer.all_special_ids] = -torch.inf
        best = [names[i] for i in row.topk(10).indices.tolist() if row[i] >= 0.3]
        expected = [name for name in best if not name.startswith("[")] if attackable(word, compat) else []
        assert [candidate.word for candidate in read[place]] == expected
    (wide,) = source.propose([text], 60, 0.0, compat)
    for word, found in zip(text.split(" "), wide, strict=True):
        for candidate in found:
            assert attackable(candidate.word, compat) and candidate.word != word
            assert "##" not in candidate.word


def test_compat_takes_the_first_rows_of_the_product_by_pseudo_perplexity(tiny_folder: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = AutoModelForMaskedLM.from_pretrained(tiny_folder).eval()
    ids = tokenizer("photo bed")["input_ids"][:-1]  # [CLS] photo b ##e ##d
    assert len(ids) == 5
    logits = predictions(tiny_folder, ids)[1:4].topk(4, dim=-1).indices.tolist()  # one piece too early
    rows = torch.tensor(list(itertools.product(*logits)))[:24]
    with torch.no_grad():
        losses = F.cross_entropy(model(input_ids=rows).logits.flatten(0, 1), rows.flatten(), reduction="none")
    order = losses.view(rows.shape).mean(1).sort(stable=True).indices.tolist()
    expected = [
        tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(rows[i].tolist()))
        for i in order
        if not set(rows[i].tolist()) & set(tokenizer.all_special_ids)
    ]
    (read,) = MaskedLM(str(tiny_folder)).read(["photo bed"], 10, 0.3, True)
    assert [candidate.word.replace(".", " .").strip() for candidate in read[1]] == [
        word.replace(".", " .").replace("  ", " ").strip() for word in expected
    ]


def test_a_word_of_many_pieces_takes_no_time(tiny_lm: MaskedLM) -> None:
    long = "bdefghjkmnbdefghjkmn"
    tiny_lm.propose(["photo"])
    for compat in (False, True):
        started = time.perf_counter()
        (found,) = tiny_lm.propose([f"a photo of a {long[:10]} {long}"], compat=compat)
        assert time.perf_counter() - started < 0.5
        assert all(len(candidates) <= 24 for candidates in found)


def test_long_strings_are_cut_not_refused(tiny_lm: MaskedLM) -> None:
    text = " ".join(["cat"] * 100)
    for compat, seen in ((False, 62), (True, 29)):
        (found,) = tiny_lm.propose([text], 60, 0.0, compat=compat)
        assert len(found) == 100
        assert all(found[:seen]) and not any(found[seen:])


def test_reading_in_company_changes_nothing(tiny_lm: MaskedLM) -> None:
    texts = [*TEXTS, "cat " * 20 + "photo", "red"]
    together = tiny_lm.propose(texts)
    forget()
    alone = [tiny_lm.propose([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        assert [[c.word for c in word] for word in one] == [[c.word for c in word] for word in other]


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    good = tmp_path / "good"
    make_lm(good)
    weights, file = load_file(good / "model.safetensors"), good / "model.safetensors"
    first = next(name for name in weights if weights[name].ndim == 2)

    def refused(match: str) -> None:
        with pytest.raises(CrossguardError, match=match) as error:
            MaskedLM(str(good)).propose(["a photo"])
        assert "\n" not in str(error.value)
        forget()

    forget()
    save_file({**weights, first: weights[first] * torch.nan}, file, {"format": "pt"})
    refused("NaN or infinite")
    save_file({name: weight for name, weight in weights.items() if name != first}, file, {"format": "pt"})
    refused("missing")
    save_file({**weights, first: weights[first][:, :-1].clone()}, file, {"format": "pt"})
    refused("shape")
    save_file({**weights, "surplus.weight": torch.ones(2)}, file, {"format": "pt"})
    refused("no place")
    file.write_bytes(b"not safetensors at all")
    refused("model.safetensors cannot be read")
    file.unlink()
    torch.save(weights, good / "pytorch_model.bin")
    refused("a pickle file")
    save_file(weights, file, {"format": "pt"})
    config = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps({**config, "model_type": "clip", "architectures": ["CLIPModel"]}))
    refused("CLIPModel")
    (good / "config.json").unlink()
    refused("no config.json")
    for path in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", ""):
        with pytest.raises(CrossguardError, match="no folder"):
            MaskedLM(path).propose(["a photo"])


def test_a_language_model_that_was_trained_again_is_read_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_lm(tmp_path)
    source, file = MaskedLM(str(tmp_path)), tmp_path / "model.safetensors"
    before, held = source.propose(TEXTS, 60, 0.0), contents(AnyOf((source,)))
    assert len(source.fingerprint) == 12 and source.fingerprint in held
    weights = load_file(file)
    save_file({name: weight.flip(0) for name, weight in weights.items()}, file, {"format": "pt"})
    assert contents(AnyOf((source,))) != held
    assert source.propose(TEXTS, 60, 0.0) != before
    save_file(weights, file, {"format": "pt"})
    assert contents(AnyOf((source,))) == held and source.propose(TEXTS, 60, 0.0) == before
    with opening():
        source.propose(["a red cat"], 60, 0.0)
        file.unlink()
        assert source.propose(["a blue cat"], 60, 0.0)  # held open, whatever becomes of the file
    with pytest.raises(CrossguardError, match="holds no weights"):
        source.propose(["a blue circle"])
    assert MaskedLM().fingerprint


def test_a_name_that_the_hub_does_not_give_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CrossguardError, match="hf download nobody/no-such-model"):
        MaskedLM("nobody/no-such-model").propose(["a photo"])


@pytest.mark.skipif(not (EMBEDDED / "config.json").is_file(), reason="the embedded language model is not installed")
def test_the_embedded_model_knows_synonyms() -> None:
    (found,) = MaskedLM().propose(["a photo of a red circle"])
    photo, red, circle = ({candidate.word for candidate in found[place]} for place in (1, 4, 5))
    assert photo & {"picture", "image", "snapshot"}
    assert red >= {"crimson", "scarlet"}
    assert red & {"yellow", "green", "blue", "purple", "gray"}
    assert circle & {"disc", "disk"}
    assert circle & {"square", "triangle", "cross", "drop", "ring", "star"}
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 3e6
