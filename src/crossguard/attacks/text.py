"""Attacks on strings: which words or characters to change, and into what, so that the embedding goes where the goal
wants it.

There is one greedy search. Its places are the words of a string (`Substitute`, and `TextFooler`, `PWWS` and
`TextBugger`, which are settings of it) or its characters and the gaps between them (`Charmer`). All strings are
searched at once, in large forwards.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import lru_cache
from string import ascii_lowercase, digits, punctuation
from typing import TypeVar

import torch

from crossguard.attacks.base import TextAttack, TextVictim, spelled
from crossguard.attacks.candidates import STOP_WORDS, CandidateSource, MaskedLM, Proposals, core
from crossguard.attacks.synonyms import AnyOf, CharacterEdits, fingerprint, word_list
from crossguard.budgets import Characters, TextBudget, Words, WordShare
from crossguard.data import all_rivals
from crossguard.errors import CrossguardError
from crossguard.goals import Goal
from crossguard.seeds import derive, uniform
from crossguard.telling import tell
from crossguard.words import Reads

# Losses closer than this are a tie, and the first one wins: a forward in other company differs by about 1e-7.
TIE = 1e-6

# So many forwards' worth of strings are held at once, whatever the number of texts.
FORWARDS = 64

# So many texts are searched together where each has thousands of candidates.
TEXTS = 128

_Option = TypeVar("_Option", int, str)  # a place, or a text as it may become

ORDERS = ("unknown", "deletion", "gain", "saliency", "given")


@dataclass(frozen=True)
class Substitute(TextAttack):
    """Replaces the words that matter most by what a masked language model would also say there.

    BERT-Attack (Li et al. 2020) in the form of Co-Attack (Zhang et al. 2022), which MMCoA (Zhou et al. 2024)
    trains against and is measured with: a word's importance is the goal's loss when the word is replaced by
    `unknown`; words are visited by falling importance, and each becomes the candidate with the largest loss,
    if that is larger than the loss of the text as it is, until the budget is spent. The goal is drift of the
    embedding unless another is given; the loss is 1 - cosine, where the reference climbs a Kullback-Leibler
    divergence that ranks alike (see `Drift`).

    All texts are searched at once and every string is asked for once: with `Words(1)` one forward of the
    language model for the strings that are new to it, one of the victim for the importances and one for the
    candidates, each of at most `batch` strings. (A text whose first word has no candidate that climbs needs
    one round more.) The outcome does not depend on `batch`, nor on the other texts.

    A text whose every word is a function word or a sign comes back unchanged.

    Args:
        source: where candidates come from.
        top: how many candidates of a word are tried.
        threshold: the least score of a candidate, for `MaskedLM` a logit.
        unknown: what stands in for a word when its importance is measured.
        coattack_compat: read candidates as the published code does: those of the piece in front of each word,
            a stop list that knows lower case only, no punctuation stripped from words, strings cut to 30
            pieces without [SEP]. The published numbers were presumably made so; the attack is weaker, and
            more rarely turns one class into another.
        collisions: 'report' lets a word become the name of another class, which `collisions` then counts;
            'forbid' never proposes such a word.
        batch: the most strings of one forward of the victim.
        order: which words are visited first: those whose loss is largest when they are `unknown` or left out
            ('deletion'), those with the best candidate ('gain': with `Words(1)` the best single substitution there
            is), those with the largest 'saliency' times gain (PWWS), or as they stand in the text ('given').
        rerank: order the words that are left anew after each change. With 'gain' every change is then the best there
            is; the papers order once.
        protect: 'class' leaves the words alone that tell the classes of the prompts apart, 'template' all others;
            both need the prompts of two classes or more at once, with their rivals (`Prompts.rivals`).
        protected: words that are left alone besides function words.
        overlap: a word keeps at least this share of its characters (1 - distance / length of the longer word). The
            papers bound the change of meaning by an independent sentence encoder instead; the victim's own embedding
            would bound what the attack is after.
    """

    source: CandidateSource = field(default_factory=MaskedLM)
    top: int = 10
    threshold: float = 0.3
    unknown: str = "[UNK]"
    coattack_compat: bool = False
    collisions: str = "report"
    batch: int = 1024
    order: str = "unknown"
    rerank: bool = False
    protect: str = "none"
    protected: tuple[str, ...] = ()
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if self.collisions not in ("report", "forbid"):
            raise CrossguardError(f"Substitute(collisions={self.collisions!r}) is unknown; give 'report' or 'forbid'")
        if self.top < 1 or self.batch < 1:
            raise CrossguardError(f"Substitute(top={self.top}, batch={self.batch}) cannot search; give 1 or more")
        if " " in self.unknown:
            raise CrossguardError(f"Substitute(unknown={self.unknown!r}) is more than one word; try '[UNK]'")
        if self.order not in ORDERS:
            raise CrossguardError(f"Substitute(order={self.order!r}) is unknown; give one of {', '.join(ORDERS)}")
        if not 0.0 <= self.overlap < 1.0:
            raise CrossguardError(f"overlap={self.overlap} leaves no word to try; give 0 or more, below 1")
        _check_protection("Substitute", self.protect, self.protected)

    def search(
        self,
        victim: TextVictim,
        clean: list[str],
        goal: Goal,
        budget: TextBudget,
        rivals: Sequence[AbstractSet[str]],
    ) -> list[str]:
        in_words = isinstance(budget, Words | WordShare)
        if not in_words and not (isinstance(budget, Characters) and self.source.edits_characters):
            raise CrossguardError(
                f"{spelled(self)} replaces whole words, but {budget} counts something else; try 'Words(1)'"
            )
        limits = [budget.limit(text) for text in clean]
        if not any(limits):
            return clean
        alone = _left_alone(self.protect, self.protected, rivals)
        proposals = self.source.propose(clean, self.top, self.threshold, self.coattack_compat)
        texts = [
            _Text(number, text.split(" "), self._options(text, proposed, rivals[number], alone), limit, in_words)
            for number, (text, proposed, limit) in enumerate(zip(clean, proposals, limits, strict=True))
        ]
        open_ = [text for text in texts if text.afford()]
        self._rank(victim, goal, open_)
        while open_:
            tell("{} of {} texts may change further", len(open_), len(texts))
            asked = ((text.number, string) for text in open_ for string in text.variants())
            losses = iter(_losses(victim, goal, asked, self.batch))
            changed = [text for text in open_ if text.take([next(losses) for _ in text.options[text.order[0]]])]
            if self.rerank:
                self._rank(victim, goal, [text for text in changed if text.order])
            open_ = [text for text in open_ if text.order]
        return [" ".join(text.words) for text in texts]

    def _rank(self, victim: TextVictim, goal: Goal, texts: Sequence[_Text]) -> None:
        """Measures each text as it is, and orders the words it can still change."""
        masked, tried = self.order in ("unknown", "deletion", "saliency"), self.order in ("gain", "saliency")
        unknown = None if self.order == "deletion" else self.unknown

        def questions(text: _Text) -> Iterable[str]:
            yield " ".join(text.words)
            if masked:
                yield from (text.replaced(place, unknown) for place in text.options)
            if tried:
                yield from (text.replaced(place, word) for place, words in text.options.items() for word in words)

        asked = ((text.number, string) for text in texts for string in questions(text))
        losses = iter(_losses(victim, goal, asked, self.batch))
        for text in texts:
            text.loss = next(losses)
            importance = {place: next(losses) if masked else 0.0 for place in text.options}
            if tried:
                gains = {place: max(next(losses) for _ in words) - text.loss for place, words in text.options.items()}
                if masked:  # PWWS: a softmax over the words' saliencies, times the gain
                    shares = torch.tensor([*importance.values()], dtype=torch.float64).softmax(0).tolist()
                    gains = {place: share * gain for (place, gain), share in zip(gains.items(), shares, strict=True)}
                importance = gains
            text.order = _ranked(importance)

    def _options(
        self, text: str, proposals: Proposals, rivals: AbstractSet[str], alone: Callable[[str], bool]
    ) -> dict[int, list[str]]:
        """For each word that can be replaced: what it can become, with the punctuation around it glued
        back."""
        words = text.split(" ")
        options: dict[int, list[str]] = {}
        for place, candidates in enumerate(proposals):
            if not candidates or alone(words[place]):
                continue
            before, inside, behind = ("", words[place], "") if self.coattack_compat else core(words[place])
            found = [candidate.word for candidate in candidates]
            if self.collisions == "forbid" and rivals:
                found = [word for word in found if all(core(part)[1].lower() not in rivals for part in word.split(" "))]
            if self.overlap:
                found = [word for word in found if _overlap(word, inside) >= self.overlap]
            if found:
                options[place] = [before + word + behind for word in found]
        return options


class _Setting(TextAttack):
    """A published attack as a setting of `Substitute`; `greedy` shows the expression."""

    @property
    @abstractmethod
    def greedy(self) -> Substitute:
        """The search this is."""

    def search(
        self,
        victim: TextVictim,
        clean: list[str],
        goal: Goal,
        budget: TextBudget,
        rivals: Sequence[AbstractSet[str]],
    ) -> list[str]:
        return self.greedy.search(victim, clean, goal, budget, rivals)


@dataclass(frozen=True)
class TextFooler(_Setting):
    """Replaces words by synonyms, those first whose deletion hurts most (Jin et al. 2020, Algorithm 1; importance as
    in equation 2).

    A reconstruction. The paper takes the 50 nearest neighbors in counter-fitted vectors, of the same part of speech,
    whose sentence is near the original by the Universal Sentence Encoder; no vectors, tagger or encoder come with
    this package. The pairs those vectors were fitted to stand in for them: `TextFooler(Synonyms(
    'counterfit_constraints.json.gz', antonyms='counterfit_constraints.json.gz'))`. The paper stops at the first
    success; here the budget is spent, since what is searched for is the largest loss.
    """

    source: CandidateSource
    top: int = 50
    protect: str = "none"
    collisions: str = "report"
    batch: int = 1024

    def __post_init__(self) -> None:
        _ = self.greedy  # which refuses what cannot be meant

    @property
    def greedy(self) -> Substitute:
        return Substitute(
            self.source, self.top, collisions=self.collisions, batch=self.batch, order="deletion", protect=self.protect
        )


@dataclass(frozen=True)
class PWWS(_Setting):
    """Replaces words by WordNet synonyms in the order of saliency times gain (Ren et al. 2019, Algorithm 1):
    softmax(saliencies) of a word, its saliency being the rise of the loss when it is unknown, times the rise by its
    best synonym.

    A reconstruction: `PWWS(Synonyms('wordnet_synonyms.json.gz'))` takes synonyms of every part of speech (there is no
    tagger) and no named entities (there is no recognizer). The best synonym is chosen anew in the text as it has
    become, where the paper keeps the one chosen in the clean text. Drift is small in absolute terms, so the softmax
    is nearly flat and the gain decides.
    """

    source: CandidateSource
    top: int = 1000
    protect: str = "none"
    collisions: str = "report"
    batch: int = 1024

    def __post_init__(self) -> None:
        _ = self.greedy  # which refuses what cannot be meant

    @property
    def greedy(self) -> Substitute:
        return Substitute(
            self.source, self.top, collisions=self.collisions, batch=self.batch, order="saliency", protect=self.protect
        )


@dataclass(frozen=True)
class TextBugger(_Setting):
    """Misspells the words whose deletion hurts most (Li et al. 2019, Algorithms 2 and 3, black box): a space inside, a
    letter deleted, two swapped, one replaced by its neighbor on the keyboard or a sign that looks alike.

    A reconstruction: every position of a bug is tried where the paper draws one; the fifth bug, a near word, is tried
    only with `words`, a source of candidates (the paper's are the 5 nearest GloVe vectors); the paper's bound on the
    similarity of sentences is the share of characters that a word keeps, `overlap`. Budgets of words drop the
    space. With `Characters(2)` a swap costs 2.
    """

    words: CandidateSource | None = None
    overlap: float = 0.0
    protect: str = "none"
    collisions: str = "report"
    batch: int = 1024

    def __post_init__(self) -> None:
        _ = self.greedy  # which refuses what cannot be meant

    @property
    def greedy(self) -> Substitute:
        bugs = CharacterEdits()
        return Substitute(
            bugs if self.words is None else AnyOf((bugs, self.words)),
            top=1000,
            collisions=self.collisions,
            batch=self.batch,
            order="deletion",
            protect=self.protect,
            overlap=self.overlap,
        )


@dataclass(frozen=True)
class Charmer(TextAttack, Reads):
    """Inserts, deletes or replaces one character at a time, wherever it hurts most (Abad Rocamora et al. 2024,
    Algorithm 1).

    Each character and each gap is a place. All places are probed with a space (a space by its deletion), the
    `positions` with the largest losses are kept, and the text becomes the best of all single edits there; that is
    done once per character of a `Characters` budget. Under a budget of words the edits stay inside words, one edit
    for each word it allows. Deterministic; with `random=True` it is the relative against which LEAF (Abad Rocamora et
    al. 2025) trains: only `positions` places, drawn at random, are probed, and at the best of them as many edits, drawn
    at random, are tried. An edit that climbs less than nothing is not made, where LEAF makes the best in any case.

    The constraints that Charmer adds for large language models are not here.

    Args:
        positions: how many places are tried in full; 0 for all: with `Characters(1)` the best edit there is. If
            `random`, how many places are probed, and how many edits are tried then; 50 in LEAF.
        alphabet: what can be put in, as in LEAF; no capitals, which CLIP does not see.
        stop_words: whether function words may be edited, as in the paper.
        no_new_words: a list of English words (see `CharacterEdits`); an edit that makes one that was not in the text
            is dropped. The code of LEAF asks for more: that the text holds fewer English words than before. None, if
            empty.
        protect: see `Substitute`.
        protected: words that are left alone.
        collisions: 'report' or 'forbid', see `Substitute`.
        batch: the most strings of one forward of the victim.
        random: draw places and edits. What is drawn follows from `seed` and the text alone; a training draws anew in
            each step.
        seed: of what is drawn.
    """

    positions: int = 20
    alphabet: str = ascii_lowercase + " " + digits + punctuation
    stop_words: bool = True
    no_new_words: str = ""
    protect: str = "none"
    protected: tuple[str, ...] = ()
    collisions: str = "report"
    batch: int = 1024
    random: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.collisions not in ("report", "forbid"):
            raise CrossguardError(f"Charmer(collisions={self.collisions!r}) is unknown; give 'report' or 'forbid'")
        if self.positions < 0 or self.batch < 1:
            raise CrossguardError(
                f"Charmer(positions={self.positions}, batch={self.batch}) cannot search; give 0 positions for all"
            )
        if self.seed < 0 or (self.random and not self.positions):
            raise CrossguardError(
                f"Charmer(positions={self.positions}, random={self.random}, seed={self.seed}) cannot draw; give 1 "
                "position or more, and a seed of 0 or more"
            )
        _check_protection("Charmer", self.protect, self.protected)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.no_new_words)

    def redrawn(self, number: int) -> Charmer:
        return replace(self, seed=derive(self.seed, number)) if self.random else self

    def search(
        self,
        victim: TextVictim,
        clean: list[str],
        goal: Goal,
        budget: TextBudget,
        rivals: Sequence[AbstractSet[str]],
    ) -> list[str]:
        if not isinstance(budget, Characters | Words | WordShare):
            raise CrossguardError(
                f"{spelled(self)} edits characters, but {budget} counts something else; try 'Words(1)'"
            )
        stop = frozenset[str]() if self.stop_words else STOP_WORDS
        rules = _Rules(
            _left_alone(self.protect, (*self.protected, *stop), rivals),
            not isinstance(budget, Characters),
            self.alphabet,
            word_list(self.no_new_words) if self.no_new_words else frozenset(),
        )
        texts = [
            _Edited(
                number, text, budget.limit(text), _words(text), named if self.collisions == "forbid" else frozenset()
            )
            for number, (text, named) in enumerate(zip(clean, rivals, strict=True))
        ]
        for start in range(0, len(texts), TEXTS):
            tell("text {} of {}", start + 1, len(texts))
            open_ = [text for text in texts[start : start + TEXTS] if text.left]
            while open_:
                open_ = self._round(victim, goal, open_, rules)
        return [text.text for text in texts]

    def _round(self, victim: TextVictim, goal: Goal, texts: Sequence[_Edited], rules: _Rules) -> list[_Edited]:
        """One edit of each text; the texts that can be edited further."""
        places = [self._some(rules.places(text.text), "places", text) for text in texts]
        asked = (
            (text.number, string)
            for text, open_ in zip(texts, places, strict=True)
            for string in (text.text, *(_probed(text.text, place) for place in open_ if self.positions))
        )
        losses = iter(_losses(victim, goal, asked, self.batch))
        options: list[list[str]] = []
        for text, open_ in zip(texts, places, strict=True):
            text.loss = next(losses)
            chosen = open_
            if self.positions:
                kept = 1 if self.random else self.positions
                chosen = sorted(_ranked({place: next(losses) for place in open_})[:kept])
            options.append(self._some(rules.edits(text, chosen), "edits", text))
        asked = ((text.number, string) for text, strings in zip(texts, options, strict=True) for string in strings)
        losses = iter(_losses(victim, goal, asked, self.batch))
        return [
            text
            for text, strings in zip(texts, options, strict=True)
            if text.take(strings, [next(losses) for _ in strings])
        ]

    def _some(self, options: list[_Option], what: str, text: _Edited) -> list[_Option]:
        """Some of these in their order, drawn for this text; all, where nothing is drawn."""
        if not self.random or len(options) <= self.positions:
            return options
        key = torch.tensor([derive(self.seed, what, text.text)])
        drawn = uniform(key, (len(options),))[0].argsort()[: self.positions]
        return [options[place] for place in drawn.sort().values.tolist()]


def collisions(texts: Sequence[str], clean: Sequence[str], rivals: Sequence[AbstractSet[str]]) -> list[bool]:
    """Which attacked texts now name another class, so that to answer with that class is no mistake of the
    model.

    So it is when a replaced word is a rival (`Prompts.rivals`), or when the text has become the clean text of
    another class. Case and the punctuation around words do not count.
    """
    whole = {text.lower() for text in clean}
    found: list[bool] = []
    for text, before, words in zip(texts, clean, rivals, strict=True):
        if text == before:
            found.append(False)
            continue
        pairs = zip(text.split(" "), before.split(" "), strict=False)
        named = any(new != old and core(new)[1].lower() in words for new, old in pairs)
        found.append(named or (text.lower() != before.lower() and text.lower() in whole))
    return found


@dataclass
class _Text:
    """Where the search of one text stands: what its words are now, what they can become, which are left to visit and
    how much of the budget."""

    number: int
    words: list[str]
    options: dict[int, list[str]]
    left: int
    in_words: bool
    order: list[int] = field(default_factory=list)
    loss: float = 0.0

    def replaced(self, place: int, word: str | None) -> str:
        """The text with another word at this place, or without the word."""
        return " ".join([*self.words[:place], *([] if word is None else [word]), *self.words[place + 1 :]])

    def variants(self) -> list[str]:
        """The text with each candidate of the next word."""
        place = self.order[0]
        return [self.replaced(place, word) for word in self.options[place]]

    def take(self, losses: list[float]) -> bool:
        """Makes the next word its best candidate, if that climbs; whether it did."""
        place = self.order.pop(0)
        words = self.options.pop(place)
        best = _first_best(losses)
        if losses[best] <= self.loss + _tie(self.loss):
            return False
        self.left -= self._cost(place, words[best])
        self.words[place] = words[best]
        self.loss = losses[best]
        self.afford()
        return True

    def afford(self) -> bool:
        """Drops what the rest of the budget does not pay for; whether anything is left."""
        self.options = {
            place: fits
            for place, words in self.options.items()
            if (fits := [word for word in words if self._cost(place, word) <= self.left])
        }
        self.order = [place for place in self.order if place in self.options]
        return bool(self.options)

    def _cost(self, place: int, word: str) -> int:
        """What a candidate spends. Each word is changed once, so the distances of words add up to no less than that
        of the strings; a word that becomes two is more than a budget of words can ever pay."""
        if self.in_words:
            return self.left + 1 if " " in word else 1
        return _distance(word, self.words[place])


@dataclass
class _Edited:
    """Where the search of one text stands that is edited by characters."""

    number: int
    text: str
    left: int
    before: frozenset[str]  # the words it had
    rivals: AbstractSet[str]  # the words it must not get
    loss: float = 0.0

    def take(self, strings: list[str], losses: list[float]) -> bool:
        """Becomes the best of these, if that climbs; whether it did and there is more to spend."""
        if not strings:
            return False
        best = _first_best(losses)
        if losses[best] <= self.loss + _tie(self.loss):
            return False
        self.text, self.loss, self.left = strings[best], losses[best], self.left - 1
        return self.left > 0


@dataclass(frozen=True)
class _Rules:
    """Where characters may be edited, and what they may become.

    Place 2 i + 1 is the character i, place 2 i the gap in front of it.
    """

    alone: Callable[[str], bool]
    in_words: bool  # words stay words: no space comes or goes, and none is emptied or made of nothing
    alphabet: str
    english: frozenset[str]

    def places(self, text: str) -> list[int]:
        closed: set[int] = set()
        start = 0
        for word in text.split(" "):
            end = start + len(word)
            if word and self.alone(word):  # it, the gaps at its ends, and the spaces that keep it apart
                closed.update(range(2 * start - 1, 2 * end + 2))
            if self.in_words:
                closed.add(2 * end + 1)
                if not word:
                    closed.add(2 * start)
            start = end + 1
        return [place for place in range(2 * len(text) + 1) if place not in closed]

    def edits(self, text: _Edited, places: Sequence[int]) -> list[str]:
        """All single edits at these places."""
        letters = self.alphabet.replace(" ", "") if self.in_words else self.alphabet
        found: dict[str, None] = {}
        for place in places:
            at, character = divmod(place, 2)
            before, behind = text.text[:at], text.text[at + character :]
            found.update(dict.fromkeys(before + letter + behind for letter in letters))
            emptied = before[-1:] in ("", " ") and behind[:1] in ("", " ")
            if character and not (self.in_words and emptied):
                found[before + behind] = None
        found.pop(text.text, None)
        if not self.english and not text.rivals:
            return list(found)

        def barred(string: str) -> bool:
            return any(word in self.english or word in text.rivals for word in _words(string) - text.before)

        return [string for string in found if not barred(string)]


def _probed(text: str, place: int) -> str:
    """The text with a space put at this place, or without the space that is there."""
    at, character = divmod(place, 2)
    return text[:at] + ("" if text[at : at + character] == " " else " ") + text[at + character :]


def _words(text: str) -> frozenset[str]:
    return frozenset(core(word)[1].lower() for word in text.split(" "))


def _left_alone(protect: str, protected: Sequence[str], rivals: Sequence[AbstractSet[str]]) -> Callable[[str], bool]:
    """Whether a word of a text must stay as it is."""
    kept = {word.lower() for word in protected}
    classes = all_rivals(rivals) if protect != "none" else frozenset[str]()
    if protect != "none" and all(one == rivals[0] for one in rivals):
        raise CrossguardError(
            f"protect={protect!r} needs to know which words name classes: give the prompts of all classes at once, "
            "with rivals=prompts.rivals(); or list the words in 'protected'"
        )

    def alone(word: str) -> bool:
        low = core(word)[1].lower()
        return low in kept or (protect == "class" and low in classes) or (protect == "template" and low not in classes)

    return alone


def _check_protection(attack: str, protect: str, protected: tuple[str, ...]) -> None:
    if protect not in ("none", "class", "template"):
        raise CrossguardError(f"{attack}(protect={protect!r}) is unknown; give 'none', 'class' or 'template'")
    if isinstance(protected, str):
        raise CrossguardError(f"{attack}(protected={protected!r}) is one string; give a tuple of words")


def _overlap(word: str, other: str) -> float:
    """The share of characters that two words have in common: 1 - distance / length of the longer one."""
    return 1.0 - _distance(word, other) / max(len(word), len(other), 1)


@lru_cache(maxsize=65536)
def _distance(word: str, other: str) -> int:
    return Characters().size(word, other)


def _losses(victim: TextVictim, goal: Goal, asked: Iterable[tuple[int, str]], batch: int) -> list[float]:
    """The goal's loss for each pair of a text's number and a string. In each window of 64 forwards every distinct
    string is encoded once; that bounds the memory, however many strings there are."""
    pairs, found = iter(asked), list[float]()
    while window := list(itertools.islice(pairs, FORWARDS * batch)):
        found += _window(victim, goal, window, batch)
    return found


def _window(victim: TextVictim, goal: Goal, asked: Sequence[tuple[int, str]], batch: int) -> list[float]:
    numbers: dict[str, int] = {}
    strings = torch.tensor([numbers.setdefault(string, len(numbers)) for _, string in asked])
    owners = torch.tensor([owner for owner, _ in asked])
    distinct = list(numbers)
    losses = torch.empty(len(asked))
    for start in range(0, len(distinct), batch):
        outputs = victim(distinct[start : start + batch])
        held = ((strings >= start) & (strings < start + batch)).nonzero()[:, 0]
        for rows in held.split(batch):
            found = goal.at(owners[rows]).loss(outputs[(strings[rows] - start).to(outputs.device)])
            losses[rows] = found.detach().float().cpu()
    if not bool(torch.isfinite(losses).all()):
        raise CrossguardError("the victim answered with numbers that are not finite (NaN or infinity)")
    return losses.tolist()


def _ranked(losses: dict[int, float]) -> list[int]:
    """Places by falling loss; of those that tie, the first in the text first."""
    left = sorted(losses, key=lambda place: -losses[place])
    order: list[int] = []
    while left:
        least = losses[left[0]] - _tie(losses[left[0]])
        tied = itertools.takewhile(lambda place, least=least: losses[place] >= least, left)
        order.append(min(tied))
        left.remove(order[-1])
    return order


def _first_best(losses: list[float]) -> int:
    """The first of the largest losses; what differs by rounding only is as large."""
    most = max(losses)
    return next(i for i, loss in enumerate(losses) if loss >= most - _tie(most))


def _tie(loss: float) -> float:
    return TIE * max(1.0, abs(loss))
