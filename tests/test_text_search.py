"""Text attacks as settings of one search: what enumeration finds they find, and what a budget or a rule forbids they
leave alone."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import ascii_lowercase
from zlib import crc32

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import crossguard
from crossguard.attacks import candidates as candidates_module
from crossguard.attacks import text as text_module
from crossguard.attacks.base import TextAttack
from crossguard.attacks.candidates import STOP_WORDS, MaskedLM, core
from crossguard.attacks.synonyms import HOMOGLYPHS, LOOKALIKES, AnyOf, CharacterEdits, Synonyms
from crossguard.attacks.text import PWWS, Charmer, Substitute, TextBugger, TextFooler, collisions
from crossguard.budgets import Characters, TextBudget, Words, WordShare
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.goals import Drift, Mismatch
from crossguard.testing import check_attack

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

LIKES = {
    "photo": {"n": ["picture", "image", "snap shot"]},
    "red": {"a": ["crimson", "scarlet", "ruby"], "n": ["redness"]},
    "circle": {"n": ["disc", "ring"], "v": ["orbit"]},
    "blue": {"a": ["azure", "navy"]},
    "square": {"n": ["block"], "a": ["straight"]},
    "cat": {"n": ["kitten", "feline", "dog"]},
    "word": {"n": ["term"]},
    "the": {"n": ["article"]},
}

TEXTS = ["a photo of a red circle", "a blue cat on the red square", "this is a cat", "a photo of a red circle", "red"]

ODD = [
    "", " ", "  ", "cat", "a", "the of and", "🐱", "🐱 cat 🐱", "...", "a photo,  of", "Фото кота", "红色 圆", "é",
    "\t\n", "it's", 'The Big "cat."', "(red)-circle!", "a  double  space", "photo\nred", "x" * 90,
    "photo of red cat " * 19,
]  # fmt: skip


@cache
def vector(word: str) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(crc32(word.encode("utf-8", "surrogatepass"))))


def bag(texts: Sequence[str]) -> Tensor:
    """A victim whose embedding is the sum of a random vector for each word."""
    return torch.stack([torch.stack([vector(word) for word in text.lower().split(" ")]).sum(0) for text in texts])


def drift(texts: Sequence[str], clean: str) -> list[float]:
    outputs = bag([clean, *texts])
    return (1.0 - F.cosine_similarity(outputs[1:], outputs[:1])).tolist()


@pytest.fixture(scope="session")
def thesaurus(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("lists") / "likes.json"
    file.write_text(json.dumps(LIKES))
    return str(file)


def attacks(thesaurus: str) -> list[tuple[TextAttack, tuple[Words | Characters, ...]]]:
    """Every attack on texts in its settings, and the budgets it is held to."""
    listed, edits = Synonyms(thesaurus), CharacterEdits()
    words, characters = (Words(1), Words(2)), (Words(1), Words(2), Characters(1), Characters(3))
    return [
        (Substitute(listed), words),
        (Substitute(AnyOf((listed, edits)), top=500), characters),
        *((Substitute(listed, order=order), words) for order in ("deletion", "gain", "saliency", "given")),
        (Substitute(listed, order="gain", rerank=True), words),
        (Substitute(edits, top=500, order="gain", overlap=0.5), characters),
        (Substitute(listed, protected=("red", "photo")), words),
        (TextFooler(listed), words),
        (PWWS(listed), words),
        (TextBugger(), characters),
        (TextBugger(words=listed, overlap=0.6), characters),
        (Charmer(positions=3, alphabet="ae "), characters),
        (Charmer(positions=0, alphabet="e"), characters),
        (Charmer(positions=2, stop_words=False), characters),
        (Charmer(positions=6, alphabet="ae ", random=True, seed=3), characters),
    ]


NUMBERED = range(len(attacks("")))


# The contract


@pytest.mark.parametrize("number", NUMBERED)
def test_contract(number: int, thesaurus: str) -> None:
    attack, budgets = attacks(thesaurus)[number]
    check_attack(attack, budgets)


def test_every_attack_on_texts_is_held_to_the_contract(thesaurus: str) -> None:
    found = [getattr(crossguard, name) for name in crossguard.VOCABULARY]
    kinds = {
        kind
        for kind in found
        if isinstance(kind, type) and issubclass(kind, TextAttack) and dataclasses.is_dataclass(kind)
    }
    assert kinds == {type(attack) for attack, _ in attacks(thesaurus)}


def test_the_contract_catches_characters_beyond_the_budget() -> None:
    @dataclasses.dataclass(frozen=True)
    class Loud(TextAttack):
        def search(self, victim, clean, goal, budget, rivals):  # type: ignore[no-untyped-def]
            return [text + "!" * 2 * budget.limit(text) for text in clean]

    with pytest.raises(CrossguardError, match="broke its budget"):
        check_attack(Loud(), (Characters(1),))


@pytest.mark.parametrize("number", NUMBERED)
def test_no_string_is_too_odd(number: int, thesaurus: str) -> None:
    attack, budgets = attacks(thesaurus)[number]
    free = isinstance(attack, Charmer) and attack.stop_words
    given = list(ODD)
    for budget in (*budgets, WordShare(0.5)):
        made = attack(bag, ODD, None, budget)
        assert given == ODD
        budget.check(made, ODD)
        for new, old in zip(made, ODD, strict=True):
            if not free and len(new.split(" ")) == len(old.split(" ")):
                for word, before in zip(new.split(" "), old.split(" "), strict=True):
                    assert word == before or core(before)[1].lower() not in STOP_WORDS
            if isinstance(budget, Words | WordShare):
                assert [bool(word) for word in new.split(" ")] == [bool(word) for word in old.split(" ")]


@pytest.mark.parametrize("number", NUMBERED)
def test_the_outcome_depends_on_nothing_but_the_text(
    number: int, thesaurus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, budgets = attacks(thesaurus)[number]
    for budget in (budgets[1], budgets[-1]):
        whole = attack(bag, TEXTS, None, budget)
        assert any(new != old for new, old in zip(whole, TEXTS, strict=True))
        assert whole == attack(bag, TEXTS, None, budget)
        assert whole[::-1] == attack(bag, TEXTS[::-1], None, budget)
        assert whole == [attack(bag, [text], None, budget)[0] for text in TEXTS]
        asked: list[int] = []

        def counted(texts: Sequence[str], asked: list[int] = asked) -> Tensor:
            asked.append(len(texts))
            return bag(texts)

        small = dataclasses.replace(attack, batch=7)  # type: ignore[call-arg]
        with monkeypatch.context() as patch:
            patch.setattr(text_module, "FORWARDS", 2)
            patch.setattr(text_module, "TEXTS", 2)
            assert whole == small(counted, TEXTS, Drift(bag(TEXTS)), budget)
        assert asked and max(asked) <= 7


# Oracles by enumeration


def substitutions(text: str) -> list[str]:
    words = text.split(" ")
    return [
        " ".join([*words[:place], like, *words[place + 1 :]])
        for place, word in enumerate(words)
        if word not in STOP_WORDS
        for likes in LIKES.get(word, {}).values()
        for like in likes
        if " " not in like
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_by_gain_one_substitution_is_the_best_of_all(text: str, thesaurus: str) -> None:
    (found,) = Substitute(Synonyms(thesaurus), order="gain")(bag, [text])
    assert found in substitutions(text)
    assert drift([found], text)[0] == pytest.approx(max(drift(substitutions(text), text)))


def test_by_gain_and_ranked_anew_every_change_is_the_best_there_is(thesaurus: str) -> None:
    words = [word for word in LIKES if word not in STOP_WORDS]
    texts = [" ".join(chosen) for chosen in itertools.combinations(words, 4)]
    attack = Substitute(Synonyms(thesaurus), order="gain", rerank=True)
    found = attack(bag, texts, None, Words(3))
    for text, made in zip(texts, found, strict=True):
        now, loss = text, 0.0
        for count in (1, 2, 3):
            options = [option for option in substitutions(now) if Words().size(option, text) == count]
            losses = drift(options, text)
            if max(losses) > loss + 1e-5:
                now, loss = options[losses.index(max(losses))], max(losses)
        assert drift([made], text)[0] == pytest.approx(loss)
    once = dataclasses.replace(attack, rerank=False)(bag, texts, None, Words(3))
    assert any(drift([a], text)[0] > drift([b], text)[0] for a, b, text in zip(found, once, texts, strict=True))


def planted(texts: Sequence[str]) -> Tensor:
    """A victim that hears one word best, and of that word one synonym worst: every sensible order begins there."""
    loud = {"red": 5.0, "ruby": -20.0}
    heard = [sum(loud.get(word, 0.1 + 0.01 * (crc32(word.encode()) % 7)) for word in text.split(" ")) for text in texts]
    return torch.stack([vector("z") + one * vector("x") for one in heard])


def test_every_greedy_attack_finds_the_best_single_substitution_where_order_cannot_mislead(thesaurus: str) -> None:
    source, text = Synonyms(thesaurus), "a photo of a red circle"
    outputs = planted([text, *substitutions(text)])
    best = substitutions(text)[int(F.cosine_similarity(outputs[1:], outputs[:1]).argmin())]
    assert "ruby" in best
    orders = [Substitute(source, order=order) for order in ("unknown", "deletion", "gain", "saliency")]
    for attack in (*orders, TextFooler(source), PWWS(source), Substitute(AnyOf((CharacterEdits(), source)), top=500)):
        assert attack(planted, [text]) == [best], attack


def test_textfooler_begins_with_the_word_whose_deletion_hurts_most(thesaurus: str) -> None:
    words = [word for word in LIKES if word not in STOP_WORDS]
    for text in [*TEXTS[:3], *(" ".join(chosen) for chosen in itertools.combinations(words, 3))]:
        words = text.split(" ")
        places = [i for i, word in enumerate(words) if word in LIKES and word not in STOP_WORDS]
        without = {i: drift([" ".join([*words[:i], *words[i + 1 :]])], text)[0] for i in places}
        place = max(places, key=lambda i: without[i])
        (found,) = TextFooler(Synonyms(thesaurus))(bag, [text])
        changed = [i for i, (new, old) in enumerate(zip(found.split(" "), words, strict=True)) if new != old]
        assert changed == [place]
        options = [option for option in substitutions(text) if option.split(" ")[place] != words[place]]
        assert drift([found], text)[0] == pytest.approx(max(drift(options, text)))


def test_pwws_begins_with_the_largest_product_of_softmax_of_saliency_and_gain(thesaurus: str) -> None:
    listed = [word for word in LIKES if word not in STOP_WORDS]
    by_gain = 0
    for text in [*TEXTS[:3], *(" ".join(chosen) for chosen in itertools.combinations(listed, 3))]:
        words = text.split(" ")
        places = [i for i, word in enumerate(words) if word in listed]
        unknown = [drift([" ".join([*words[:i], "[UNK]", *words[i + 1 :]])], text)[0] for i in places]
        gains = [max(drift([o for o in substitutions(text) if o.split(" ")[i] != words[i]], text)) for i in places]
        scores = [share * gain for share, gain in zip(torch.tensor(unknown).softmax(0).tolist(), gains, strict=True)]
        (found,) = PWWS(Synonyms(thesaurus))(bag, [text])
        changed = [i for i, (new, old) in enumerate(zip(found.split(" "), words, strict=True)) if new != old]
        assert changed == [places[scores.index(max(scores))]]
        by_gain += changed == [places[gains.index(max(gains))]]
    assert by_gain < 3 + len(list(itertools.combinations(listed, 3)))  # gain alone would choose otherwise


def test_textbugger_takes_the_best_of_all_bugs_of_the_word() -> None:
    for text in ("photograph", "of the watercolors"):
        word = text.split(" ")[-1]
        bugs = [text.replace(word, bug) for bug in words_of(CharacterEdits(), word, 1000)[0]]
        assert len(bugs) > 50
        for budget in (Words(1), Characters(2)):
            options = [bug for bug in bugs if budget.size(bug, text) <= budget.limit(text)]
            (found,) = TextBugger()(bag, [text], None, budget)
            assert drift([found], text)[0] == pytest.approx(max(drift(options, text)), abs=2e-6)
        assert len(options) == len(bugs) and any(" " in bug for bug in bugs)


def test_given_order_is_the_order_of_the_text(thesaurus: str) -> None:
    (found,) = Substitute(Synonyms(thesaurus), order="given")(bag, ["this is a red circle photo"])
    assert found.startswith("this is a ") and found.endswith(" circle photo") and " red " not in found


def single_edits(text: str, alphabet: str) -> set[str]:
    """All strings at Levenshtein distance 1."""
    found = {text[:i] + text[i + 1 :] for i in range(len(text))}
    found |= {text[:i] + letter + text[i:] for i in range(len(text) + 1) for letter in alphabet}
    found |= {text[:i] + letter + text[i + 1 :] for i in range(len(text)) for letter in alphabet}
    return found - {text}


@pytest.mark.parametrize("text", ["a red cat", "", "x", "a  b", "it's 🐱.", "This is a photo"])
def test_charmer_at_all_places_finds_the_best_single_edit(text: str) -> None:
    alphabet = "abe ."
    (found,) = Charmer(positions=0, alphabet=alphabet)(bag, [text], None, Characters(1))
    options = sorted(single_edits(text, alphabet))
    assert found in options
    assert drift([found], text)[0] == pytest.approx(max(drift(options, text)), abs=2e-6)
    inside = [
        option
        for option in options
        if [bool(word) for word in option.split(" ")] == [bool(word) for word in text.split(" ")]
    ]
    (held,) = Charmer(positions=0, alphabet=alphabet)(bag, [text], None, Words(1))
    assert Words(1).size(held, text) <= 1
    if inside:
        assert held in inside and drift([held], text)[0] == pytest.approx(max(drift(inside, text)), abs=2e-6)
    else:
        assert held == text


def test_charmer_continues_on_the_text_as_it_became() -> None:
    attack, text = Charmer(positions=0, alphabet="abe "), "a red cat"
    once, twice = (attack(bag, [text], None, Characters(count))[0] for count in (1, 2))
    options = sorted(single_edits(once, "abe "))
    assert twice in options
    assert drift([twice], text)[0] == pytest.approx(max(drift(options, text)), abs=2e-6)


def test_few_places_are_those_a_space_hurts_most() -> None:
    text, alphabet = "a photo of a red circle", "ab"
    asked: list[str] = []

    def heard(texts: Sequence[str]) -> Tensor:
        asked.extend(texts)
        return bag(texts)

    Charmer(positions=1, alphabet=alphabet)(heard, [text], Drift(bag([text])), Characters(1))
    probes = [text[:i] + " " + text[i:] for i in range(len(text) + 1)]
    probes += [text[:i] + ("" if text[i] == " " else " ") + text[i + 1 :] for i in range(len(text))]
    assert set(probes) <= set(asked)
    losses = drift(probes, text)
    best = max(losses)
    places = [i if i <= len(text) else i - len(text) - 1 for i, loss in enumerate(losses) if loss >= best - 1e-5]
    tried = set(asked) - set(probes) - {text}
    assert 1 <= len(tried) <= len(alphabet) + 1
    assert all(any(option.startswith(text[:i]) and option.endswith(text[i + 1 :]) for i in places) for option in tried)


def test_random_places_are_probed_and_the_best_of_them_tried_with_random_edits() -> None:
    """LEAF's relative: four places, then four edits at the one where a space hurts most."""
    text, alphabet = "a photo of a red circle", "abcdefgh "
    probed, tried = list[str](), list[str]()

    def heard(texts: Sequence[str]) -> Tensor:
        (tried if probed else probed).extend(texts)
        return bag(texts)

    attack = Charmer(positions=4, alphabet=alphabet, random=True)
    goal = Drift(bag([text]))
    (found,) = attack(heard, [text], goal, Characters(1))
    spaces = {text[:i] + " " + text[i:] for i in range(len(text) + 1)}
    spaces |= {text[:i] + ("" if text[i] == " " else " ") + text[i + 1 :] for i in range(len(text))}
    assert text in probed and set(probed) - {text} <= spaces and len(probed) <= 5
    assert 0 < len(tried) <= 4 and set(tried) <= single_edits(text, alphabet)
    assert drift([found], text)[0] == pytest.approx(max(drift(tried, text)), abs=2e-6)
    best = max((one for one in probed if one != text), key=lambda one: drift([one], text)[0])
    assert any(best == probe and set(tried) <= edits for probe, edits in by_place(text, alphabet)), (
        "all are at one place"
    )


def by_place(text: str, alphabet: str) -> list[tuple[str, set[str]]]:
    """For each gap of a text and each character of it: the text with a space put there (or the space that is there left
    out), and all edits there."""
    gaps = [
        (text[:i] + " " + text[i:], {text[:i] + letter + text[i:] for letter in alphabet})
        for i in range(len(text) + 1)
    ]  # fmt: skip
    characters = [
        (
            text[:i] + ("" if text[i] == " " else " ") + text[i + 1 :],
            {text[:i] + letter + text[i + 1 :] for letter in ("", *alphabet)},
        )
        for i in range(len(text))
    ]
    return [*gaps, *characters]


def test_what_a_random_search_draws_follows_from_the_seed_and_the_text_alone() -> None:
    texts = ["a photo of a red circle", "a blue cat on the red square", "a photo of a green star"]
    attack = Charmer(positions=3, random=True)
    together = attack(bag, texts, None, Characters(1))
    assert together == [attack(bag, [text], None, Characters(1))[0] for text in texts]
    assert attack.redrawn(1) == attack.redrawn(1) and attack.redrawn(1)(bag, texts, None, Characters(1)) != together
    assert Charmer().redrawn(1) == Charmer()
    every = Charmer(positions=10_000, random=True)(bag, texts, None, Characters(1))
    whole = Charmer(positions=1)(bag, texts, None, Characters(1))
    assert every == whole, "with nothing left out it is the search that tries one place in full"


def test_more_places_are_never_weaker_and_all_edits_within_words_agree_with_the_list_of_edits() -> None:
    texts = ["photo red circle", "a blue cat on the red square"]
    goal = Drift(bag(texts))
    reached = [
        goal.loss(bag(Charmer(positions=n, alphabet="abcd")(bag, texts, None, Characters(1)))) for n in (1, 4, 16, 0)
    ]
    assert all(bool((more >= fewer - 1e-6).all()) for fewer, more in itertools.pairwise(reached))
    edits = CharacterEdits(("insert", "delete", "substitute"), alphabet="abcd", ends=True)
    listed = Substitute(edits, top=10_000, order="gain")(bag, texts)
    charmed = Charmer(positions=0, alphabet="abcd", stop_words=False)(bag, texts, None, Words(1))
    assert goal.loss(bag(listed)).tolist() == pytest.approx(goal.loss(bag(charmed)).tolist(), abs=2e-6)


def test_several_words_are_scored_in_the_text_as_it_became(thesaurus: str) -> None:
    for attack in (TextFooler(Synonyms(thesaurus)), PWWS(Synonyms(thesaurus)), TextBugger()):
        for text in TEXTS[:2]:
            runs = [attack(bag, [text], None, Words(count))[0] for count in (1, 2, 3)]
            assert [Words().size(run, text) for run in runs] == [1, 2, 3]
            assert [Words().size(new, old) for new, old in zip(runs[1:], runs, strict=False)] == [1, 1]
            losses = drift(runs, text)
            assert losses[0] < losses[1] < losses[2]


# Rules


def test_a_swap_costs_two_characters_and_a_space_no_word() -> None:
    swaps = Substitute(CharacterEdits(("swap",)), top=100)
    assert swaps(bag, ["circle"], None, Characters(1)) == ["circle"]
    assert Characters().size(swaps(bag, ["circle"], None, Characters(2))[0], "circle") == 2
    text = "circle square photo"
    made = [swaps(bag, [text], None, Characters(count))[0] for count in range(1, 7)]
    assert [Words().size(found, text) for found in made] == [0, 1, 1, 2, 2, 3]
    spaces = Substitute(CharacterEdits(("space",)), top=100)
    assert spaces(bag, ["red circle"], None, Words(2)) == ["red circle"]
    (found,) = spaces(bag, ["red circle"], None, Characters(1))
    assert found.count(" ") == 2 and found.replace(" ", "") == "redcircle"
    (found,) = spaces(bag, ["red circle"], None, Characters(2))
    assert found.count(" ") == 3


def test_characters_are_counted_over_the_whole_string(thesaurus: str) -> None:
    attack = Substitute(AnyOf((CharacterEdits(), Synonyms(thesaurus))), top=500)
    for count in range(6):
        made = attack(bag, TEXTS, None, Characters(count))
        sizes = Characters(count).check(made, TEXTS)
        assert (max(sizes) > 0) == (count > 0)
    with pytest.raises(CrossguardError, match=r"Words\(1\)"):
        TextFooler(Synonyms(thesaurus))(bag, TEXTS, None, Characters(1))


def test_the_distance_of_strings_is_that_of_levenshtein() -> None:
    def slowly(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        same = slowly(one[1:], other[1:]) + (one[0] != other[0])
        return min(same, slowly(one[1:], other) + 1, slowly(one, other[1:]) + 1)

    strings = ["", "a", "b", "ab", "ba", "aab", "aba", "abab", "baab", "bbaab", "abbab"]
    for one, other in itertools.product(strings, strings):
        assert Characters().size(one, other) == slowly(one, other)


def test_a_share_of_words_depends_on_the_text() -> None:
    assert [WordShare(0.4).limit(text) for text in ("", "a b", "a b c", "a b c d e", "a b c d e f")] == [0, 0, 1, 2, 2]
    assert 0.29 * 100 < 29 == WordShare(0.29).limit(" ".join(["word"] * 100))  # the product of floats is a little less
    assert WordShare(1.0).limit("a b c") == 3
    made = TextBugger()(bag, ["red", "blue cat sits", "blue cat sits near dogs"], None, WordShare(0.4))
    assert WordShare(0.4).check(made, ["red", "blue cat sits", "blue cat sits near dogs"]) == [0, 1, 2]
    assert crossguard.build(crossguard.show(WordShare(0.25))) == WordShare(0.25)
    with pytest.raises(CrossguardError, match="broke its budget"):
        WordShare(0.4).check(["x b"], ["a b"])
    with pytest.raises(CrossguardError, match="share"):
        WordShare(4.0)


def prompts() -> Prompts:
    return Prompts.of(("red cat", "blue dog", "blue cat"), ("a photo of a {}.",), {"cat": ("kitten",)})


@pytest.mark.parametrize("attack", [Substitute(CharacterEdits(), top=500), TextBugger(), Charmer(positions=4)], ids=str)
def test_class_words_or_template_words_are_left_alone(attack: TextAttack) -> None:
    clean, rivals = prompts().flat, prompts().rivals()
    for protect, classes in (("class", False), ("template", True)):
        kind = dataclasses.replace(attack, protect=protect)  # type: ignore[call-arg]
        for budget in (Words(1), Words(3), Characters(1)):
            made = kind(bag, clean, None, budget, rivals)
            for new, old in zip(made, clean, strict=True):
                assert new != old
                if classes:  # "a photo of a" stays
                    assert new.startswith("a photo of a ")
                else:
                    assert new.split(" ")[-2:] == old.split(" ")[-2:]
        with pytest.raises(CrossguardError, match=r"prompts.rivals\(\)"):
            kind(bag, clean)
        with pytest.raises(CrossguardError, match=r"prompts.rivals\(\)"):
            kind(bag, clean[:1], None, Words(1), rivals[:1])


def test_protected_words_stay_and_nothing_touches_them() -> None:
    text = "a photo of a red circle"
    for count in (1, 2, 4):
        attack = Charmer(positions=0, alphabet="ab ", protected=("Photo", "red", "a", "of"))
        (found,) = attack(bag, [text], None, Characters(count))
        assert found != text and found.startswith("a photo of a red ")
    (found,) = Charmer(positions=0, alphabet="ab ", stop_words=False)(bag, ["this is a cat"], None, Characters(3))
    assert found != "this is a cat" and found.startswith("this is a ")
    (found,) = Substitute(CharacterEdits(), top=99, protected=("RED", "circle"))(bag, [text], None, Words(9))
    assert found.endswith(" red circle") and found.split(" ")[1] != "photo"
    assert Substitute(CharacterEdits(), protected=("photo", "red", "circle"))(bag, [text]) == [text]


def test_a_word_keeps_its_share_of_characters(thesaurus: str) -> None:
    source = AnyOf((Synonyms(thesaurus), CharacterEdits()))
    loose, tight = (Substitute(source, top=99, order="gain", overlap=share)(bag, TEXTS) for share in (0.0, 0.7))
    apart = 0
    for new, old in zip(tight, TEXTS, strict=True):
        for word, before in zip(new.split(" "), old.split(" "), strict=True):
            assert 1 - Characters().size(word, before) / max(len(word), len(before)) >= 0.7 or word == before
    apart = sum(a != b for a, b in zip(loose, tight, strict=True))
    assert apart > 0


@pytest.mark.parametrize(
    "attack",
    [
        Charmer(positions=0, alphabet="abcdhort"),
        Substitute(CharacterEdits(("insert", "delete", "substitute"), ends=True), top=999, order="gain"),
    ],
    ids=["Charmer", "Substitute"],
)
def test_no_edit_names_another_class_if_that_is_forbidden(attack: TextAttack) -> None:
    classes = Prompts.of(("cat", "bat", "hat", "rat", "cot"), ("a {}",))
    clean, rivals = classes.flat, classes.rivals()

    def catlike(texts: Sequence[str]) -> Tensor:  # nothing moves it as far as the name of another class
        return bag(texts) + 50 * torch.stack([vector(t) if t in clean[1:] else 0 * vector("") for t in texts])

    loose = attack(catlike, clean, None, Words(1), rivals)
    assert any(collisions(loose, clean, rivals))
    strict = dataclasses.replace(attack, collisions="forbid")(catlike, clean, None, Words(1), rivals)  # type: ignore
    assert not any(collisions(strict, clean, rivals)) and all(a != b for a, b in zip(strict, clean, strict=True))


def test_no_edit_makes_another_english_word(tmp_path: Path) -> None:
    english = ["red", "rod", "rid", "bed", "cat", "at", "ca", "Cut", "a"]
    (tmp_path / "words.txt").write_text("\n".join(english) + "\n\n")
    (tmp_path / "words.json").write_text(json.dumps(english))
    (tmp_path / "keys.json").write_text(json.dumps({word: {} for word in english}))
    with gzip.open(tmp_path / "words.txt.gz", "wt") as file:
        file.write("\n".join(english))
    kinds = ("insert", "delete", "substitute", "space")
    free = [c.word for c in CharacterEdits(kinds, ends=True).propose(["red cat"], 10_000)[0][1]]
    assert {"at", "cut", "ca t"} <= set(free)
    for name in ("words.txt", "words.json", "keys.json", "words.txt.gz"):
        source = CharacterEdits(kinds, ends=True, no_new_words=str(tmp_path / name))
        held = [c.word for c in source.propose(["red cat"], 10_000)[0][1]]
        made = {"at", "ca", "cut", "c at", "ca t"}
        assert set(held) == set(free) - made
        assert held[:5] == [word for word in free if word not in made][:5]

    def drawn(texts: Sequence[str]) -> Tensor:  # nothing moves it as far as another word does
        known = {word.lower() for word in english} - {"red", "cat"}
        loud = [sum((vector(word) for word in text.split(" ") if word in known), 0 * vector("")) for text in texts]
        return vector("still") + 0.01 * bag(texts) + 5 * torch.stack(loud)

    loose = Charmer(positions=0, alphabet=ascii_lowercase)(drawn, ["red cat"], None, Characters(1))
    rule = Charmer(positions=0, alphabet=ascii_lowercase, no_new_words=str(tmp_path / "words.json"))
    (held,) = rule(drawn, ["red cat"], None, Characters(1))
    assert (set(loose[0].split(" ")) - {"red", "cat"}) & {word.lower() for word in english}
    assert held != "red cat" and not (set(held.split(" ")) - {"red", "cat"}) & {word.lower() for word in english}


# Sources


def words_of(source: Synonyms | CharacterEdits | AnyOf, text: str, top: int = 100) -> list[list[str]]:
    return [[candidate.word for candidate in found] for found in source.propose([text], top)[0]]


def test_synonyms_keep_case_and_order_and_leave_out_what_is_no_word(thesaurus: str) -> None:
    source = Synonyms(thesaurus)
    assert words_of(source, 'the Red CIRCLE "photo," xyz') == [
        [],
        ["Redness", "Crimson", "Scarlet", "Ruby"],
        ["DISC", "RING", "ORBIT"],
        ["picture", "image"],
        [],
    ]
    assert words_of(source, "red", 2) == [["redness", "crimson"]]
    assert words_of(Synonyms(thesaurus, parts=("a",)), "red circle") == [["crimson", "scarlet", "ruby"], []]
    (found,) = Substitute(source)(bag, ['A "Photo".'])
    assert found in ('A "Picture".', 'A "Image".')


def test_antonyms_are_no_synonyms_in_either_direction(tmp_path: Path) -> None:
    likes, pairs = tmp_path / "likes.json", tmp_path / "pairs.json.gz"
    likes.write_text(json.dumps({"Hot": ["warm", "cold", "cool", "Hot"]}))
    with gzip.open(pairs, "wt") as file:
        json.dump({"antonym_pairs": [["hot", "cold"], ["cool", "hot"]], "synonym_pairs": [["hot", "fiery"]]}, file)
    assert words_of(Synonyms(str(likes)), "hot") == [["warm", "cold", "cool"]]
    assert words_of(Synonyms(str(likes), str(pairs)), "hot") == [["warm"]]
    assert words_of(Synonyms(str(pairs)), "Hot") == [["Fiery"]]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.json", b"[1, 2]", "no list of synonyms"),
        ("a.json", b"{}", "no list of synonyms"),
        ("a.json", b'{"red": "crimson"}', "'red' stands for 'crimson'"),
        ("a.json", b'{"red": {"a": "crimson"}}', "'red' stands for"),
        ("a.json", b'{"red": ["crimson", 3]}', "'red' stands for"),
        ("a.json", b'{"synonym_pairs": [["red"]]}', "pair of words"),
        ("a.json", b"{", "not whole JSON"),
        ("a.json", b"\xff\xfe\xff", "cannot be read"),
        ("a.json.gz", b'{"red": ["crimson"]}', "cannot be read"),
        ("a.json.gz", gzip.compress(b'{"red": ["crimson"]}', mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_file_of_another_shape_is_refused_in_one_sentence(
    name: str, content: bytes, match: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CrossguardError, match=match) as error:
        Synonyms(str(tmp_path / name)).propose(["red"])
    assert "\n" not in str(error.value)
    with pytest.raises(CrossguardError, match="no file"):
        Synonyms(str(tmp_path / "absent.json")).propose(["red"])
    (tmp_path / "list.json").write_text("3")
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(CrossguardError, match="no list of words"):
        CharacterEdits(no_new_words=str(tmp_path / "list.json")).propose(["red"])
    with pytest.raises(CrossguardError, match="is empty"):
        CharacterEdits(no_new_words=str(tmp_path / "none.txt")).propose(["red"])


def test_edits_are_those_of_textbugger() -> None:
    def edits(kind: str, word: str, ends: bool = False) -> set[str]:
        return set(words_of(CharacterEdits((kind,), alphabet="xy", ends=ends), word)[0])

    assert edits("space", "blue") == {"b lue", "bl ue", "blu e"}
    assert edits("delete", "blue") == {"bue", "ble"}
    assert edits("delete", "blue", True) == {"bue", "ble", "lue", "blu"}
    assert edits("swap", "blue") == {"bule"}
    assert edits("swap", "blue", True) == {"lbue", "bule", "bleu"}
    assert edits("lookalike", "Log") == {"1og", "L0g", "Lo9"}
    assert edits("homoglyph", "pod") == {"рod", "pоd"}
    assert edits("insert", "ab") == {"xab", "yab", "axb", "ayb", "abx", "aby"}
    assert edits("substitute", "xb") == {"yb", "xx", "xy"}
    near = edits("keyboard", "gg")
    assert {word[0] for word in near if word[1] == "g"} == set("tyhbvf")
    assert words_of(CharacterEdits(), "the Фото 🐱 x")[0] == []
    assert all(len(sign) == 1 for table in (LOOKALIKES, HOMOGLYPHS) for sign in table.values())
    assert all(not other.isascii() for other in HOMOGLYPHS.values())
    # punctuation around the word stays where it is
    (found,) = Substitute(CharacterEdits(("delete",)))(bag, ['see "cat".'])
    assert found in ('see "ct".', 'se "cat".')


def test_several_sources_are_one(thesaurus: str) -> None:
    both = AnyOf((Synonyms(thesaurus), Synonyms(thesaurus, parts=("a",)), CharacterEdits(("delete",))))
    assert words_of(both, "the red") == [[], ["redness", "crimson", "scarlet", "ruby", "rd"]]
    assert both.edits_characters and not AnyOf((Synonyms(thesaurus),)).edits_characters
    assert crossguard.build(crossguard.show(TextBugger(words=both))) == TextBugger(words=both)


def test_what_costs_nothing_is_not_remembered(thesaurus: str) -> None:
    candidates_module.forget()
    for source in (Synonyms(thesaurus), CharacterEdits(), AnyOf((Synonyms(thesaurus),))):
        source.propose(["red cat"])
    assert not candidates_module._remembered
    if (candidates_module.EMBEDDED / "config.json").is_file():
        AnyOf((MaskedLM(),)).propose(["red cat"])
        assert len(candidates_module._remembered) == 1


def test_what_cannot_be_meant_is_refused(thesaurus: str) -> None:
    source = Synonyms(thesaurus)
    for make, match in (
        (lambda: Substitute(source, order="best"), "unknown, deletion, gain"),
        (lambda: Substitute(source, protect="noun"), "'class' or 'template'"),
        (lambda: crossguard.build("Substitute(protected='red')"), "tuple"),
        (lambda: Substitute(source, overlap=1.0), "below 1"),
        (lambda: TextFooler(source, top=0), "1 or more"),
        (lambda: PWWS(source, collisions="no"), "'forbid'"),
        (lambda: TextBugger(overlap=-0.5), "below 1"),
        (lambda: Charmer(positions=-1), "0 positions for all"),
        (lambda: Charmer(positions=0, random=True), "cannot draw; give 1 position or more"),
        (lambda: Charmer(collisions="no"), "'forbid'"),
        (lambda: CharacterEdits(("typo",)), "keyboard"),
        (lambda: CharacterEdits(()), "keyboard"),
        (lambda: crossguard.build("CharacterEdits('swap')"), "tuple"),
        (lambda: CharacterEdits(alphabet="a b"), "'space'"),
        (lambda: AnyOf(()), "tuple of sources"),
    ):
        with pytest.raises(CrossguardError, match=match):
            make()

    @dataclasses.dataclass(frozen=True)
    class Syllables(TextBudget):
        def limit(self, clean: str) -> int:
            return 1

        def size(self, text: str, clean: str) -> int:
            return 0

    for attack in (Substitute(source), TextBugger(), Charmer()):
        with pytest.raises(CrossguardError, match=r"try 'Words\(1\)'"):
            attack(bag, TEXTS, None, Syllables())
        with pytest.raises(CrossguardError, match="not finite"):
            attack(lambda texts: torch.full((len(texts), 4), torch.nan), TEXTS)


# A goal that counts lost images


def test_mismatch_counts_the_images_a_text_loses() -> None:
    images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8], [3.0, 0.0]])
    owners, texts = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]])
    goal = Mismatch.of(images, owners, texts)
    assert goal.bars.tolist() == pytest.approx([0.0, 0.6, 0.0, 0.6, 0.0])
    clean = goal.loss(texts)
    assert not bool(goal.won(texts).any())
    assert clean[0] == pytest.approx(((0 - 1) + (0.6 - 0.8) + (0 - 1)) / 3 / 13, abs=1e-6)
    assert clean[2] == 0.0  # it has no image to lose
    moved = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    loss = goal.loss(moved)
    assert loss[0] == pytest.approx(0.0 / 3 + ((0 - 0) + (0.6 - 0.6) + 0) / 3 / 13, abs=1e-6)
    assert goal.won(torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]])).tolist() == [True, True, False]
    away = goal.loss(torch.tensor([[-1.0, 0.5], [1.0, -1.0], [1.0, 1.0]]))
    assert away[0] > 1.0 and away[1] > 1.0 and away[2] == 0.0
    # any number of strings for the same text, in any order
    rows = torch.tensor([1, 0, 1, 0])
    several = goal.at(rows).loss(torch.stack([moved[1], moved[0], texts[1], texts[0]]))
    assert several.tolist() == pytest.approx([float(x) for x in (loss[1], loss[0], clean[1], clean[0])])
    for wrong in (torch.tensor([0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, -1])):
        with pytest.raises(CrossguardError, match="owners are 0 to 2"):
            Mismatch.of(images, wrong, texts)
    with pytest.raises(CrossguardError, match="only one"):
        Mismatch.of(images, owners, texts[:1])


def test_one_lost_image_outweighs_any_margin() -> None:
    torch.manual_seed(0)
    images = F.normalize(torch.randn(7, 5), dim=1)
    goal = Mismatch.of(images, torch.zeros(7, dtype=torch.int64), torch.randn(3, 5))
    outputs = torch.randn(300, 5)
    losses = goal.at(torch.zeros(300, dtype=torch.int64)).loss(outputs)
    gaps = goal.bars - F.normalize(outputs, dim=1) @ images.T
    keys = [(int(lost), float(mean)) for lost, mean in zip((gaps > 0).sum(1), gaps.mean(1), strict=True)]
    assert sorted(range(300), key=lambda i: keys[i]) == losses.argsort().tolist()


@pytest.mark.parametrize("kind", ["gain", "Charmer"])
def test_the_search_loses_as_many_images_as_any_single_change_can(kind: str, thesaurus: str) -> None:
    classes = Prompts.of(("red circle", "blue square", "cat photo"), ("a {}",))
    clean = bag(classes.flat)
    torch.manual_seed(1)
    owners = torch.arange(30) % 3
    images = clean[owners] + 4 * torch.randn(30, 32)
    goal = Mismatch.of(images, owners, clean)
    charm = Charmer(positions=0, alphabet="abc")
    attack: TextAttack = charm if kind == "Charmer" else Substitute(Synonyms(thesaurus), order="gain")
    budget = Characters(1) if kind == "Charmer" else Words(1)
    made = attack(bag, classes.flat, goal, budget)
    lost = [0, 0]
    for number, (text, found) in enumerate(zip(classes.flat, made, strict=True)):
        options = sorted(single_edits(text, "abc")) if kind == "Charmer" else substitutions(text)
        own = F.normalize(images[owners == number], dim=1)
        gaps = goal.bars[owners == number] - F.normalize(bag([*options, found]), dim=1) @ own.T
        counts = (gaps > 0).sum(1)
        assert int(counts[-1]) == int(counts[:-1].max())
        drifted = attack(bag, [text], None, budget)
        lost[0] += int(counts[-1])
        lost[1] += int((goal.bars[owners == number] - F.normalize(bag(drifted), dim=1) @ own.T > 0).sum())
    assert lost[0] > lost[1]  # than the search for drift


# Speed and real data


def test_thousands_of_candidates_take_large_forwards_only() -> None:
    calls: list[int] = []

    def counted(texts: Sequence[str]) -> Tensor:
        calls.append(len(texts))
        return torch.ones(len(texts), 4)

    Charmer(positions=0)(counted, ["a photo of a red circle"] * 3 + ["a photo of a blue square"], None, Characters(1))
    assert sum(size < 1024 for size in calls) <= 3  # the clean texts, and the ends of two rounds of questions
    started = time.process_time()
    texts = [f"a photo of a {'circumstantial' * 10}{i}" for i in range(5)]
    made = TextBugger()(lambda found: torch.ones(len(found), 4), texts, None, Characters(2))
    assert made == texts and time.process_time() - started < 5.0


@pytest.mark.skipif(not (SHARED / "wordnet_synonyms.json.gz").is_file(), reason="the shared lists are not here")
def test_the_lists_of_wordnet_and_of_counter_fitting() -> None:
    wordnet, pairs = (str(SHARED / name) for name in ("wordnet_synonyms.json.gz", "counterfit_constraints.json.gz"))
    photo, red = words_of(Synonyms(wordnet), "Photo red")
    assert {"Picture", "Photograph"} <= set(photo) and {"crimson", "scarlet"} <= set(red)
    assert words_of(Synonyms(pairs, antonyms=pairs), "abandon")[0]
    both = Synonyms(pairs, antonyms=pairs)
    content = json.loads(gzip.decompress(Path(pairs).read_bytes()))
    opposites = {tuple(pair) for pair in content["antonym_pairs"]}
    for word in ("hot", "big", "happy", "abandon", "increase"):
        assert not {(word, like) for like in words_of(both, word)[0]} & opposites
    source = CharacterEdits(("insert", "delete", "substitute"), ends=True, no_new_words=wordnet)
    assert "cot" not in words_of(source, "cat", 10_000)[0] and "cxt" in words_of(source, "cat", 10_000)[0]
    texts = ["a photo of a red car", "a small dog runs"]
    for attack in (PWWS(Synonyms(wordnet)), TextFooler(Synonyms(wordnet, antonyms=pairs))):
        made = attack(bag, texts, None, WordShare(0.4))
        assert WordShare(0.4).check(made, texts) == [2, 1]


def test_edits_are_all_tried_whatever_the_top() -> None:
    """None is likelier than another; cut off after ten, a long word had nothing but splits, which no budget of words
    pays for."""
    texts = ["a photo of a wheelbarrow"]
    few, many = (CharacterEdits().propose(texts, top) for top in (1, 1000))
    assert few == many and len(few[0][4]) > 50
    attacks = [Substitute(CharacterEdits(), top=top) for top in (1, 10, 1000)]
    victim = crossguard.Tiny().encode_text
    found = [attack(victim, texts, budget=Words(1)) for attack in attacks]
    assert found[0] == found[1] == found[2] != [texts]


def test_an_empty_list_of_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text('{"synonym_pairs": []}')
    with pytest.raises(CrossguardError, match=r"the list synonym_pairs of .* is empty"):
        Synonyms(str(tmp_path / "pairs.json")).propose(["a cat"])
