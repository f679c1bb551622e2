"""Attacks on strings: which words to replace, and by what, so that the embedding goes where the goal wants
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from crossguard.attacks.base import TextAttack, TextVictim, spelled
from crossguard.attacks.candidates import CandidateSource, MaskedLM, Proposals, core
from crossguard.budgets import TextBudget, Words
from crossguard.errors import CrossguardError
from crossguard.goals import Goal

# Losses closer than this are a tie, and the first one wins: a forward in other company differs by about 1e-7.
TIE = 1e-6


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
    """

    source: CandidateSource = field(default_factory=MaskedLM)
    top: int = 10
    threshold: float = 0.3
    unknown: str = "[UNK]"
    coattack_compat: bool = False
    collisions: str = "report"
    batch: int = 1024

    def __post_init__(self) -> None:
        if self.collisions not in ("report", "forbid"):
            raise CrossguardError(f"Substitute(collisions={self.collisions!r}) is unknown; give 'report' or 'forbid'")
        if self.top < 1 or self.batch < 1:
            raise CrossguardError(f"Substitute(top={self.top}, batch={self.batch}) cannot search; give 1 or more")
        if " " in self.unknown:
            raise CrossguardError(f"Substitute(unknown={self.unknown!r}) is more than one word; try '[UNK]'")

    def search(
        self,
        victim: TextVictim,
        clean: list[str],
        goal: Goal,
        budget: TextBudget,
        rivals: Sequence[frozenset[str]],
    ) -> list[str]:
        if not isinstance(budget, Words):
            raise CrossguardError(
                f"{spelled(self)} replaces whole words, but {budget} counts something else; try 'Words(1)'"
            )
        if budget.count == 0:
            return clean
        proposals = self.source.propose(clean, self.top, self.threshold, self.coattack_compat)
        texts = [
            _Text(number, text.split(" "), self._options(text, proposed, rivals[number]))
            for number, (text, proposed) in enumerate(zip(clean, proposals, strict=True))
        ]
        open_ = [text for text in texts if text.options]
        asked = [(text.number, string) for text in open_ for string in text.masked(self.unknown)]
        losses = iter(self._losses(victim, goal, asked))
        for text in open_:
            text.loss = next(losses)
            text.order = _ranked({place: next(losses) for place in text.options})
        while open_:
            asked = [(text.number, string) for text in open_ for string in text.variants()]
            losses = iter(self._losses(victim, goal, asked))
            for text in open_:
                text.take([next(losses) for _ in text.options[text.order[0]]])
            open_ = [text for text in open_ if text.order and text.changes < budget.count]
        return [" ".join(text.words) for text in texts]

    def _options(self, text: str, proposals: Proposals, rivals: frozenset[str]) -> dict[int, list[str]]:
        """For each word that can be replaced: what it can become, with the punctuation around it glued
        back."""
        words = text.split(" ")
        options: dict[int, list[str]] = {}
        for place, candidates in enumerate(proposals):
            if not candidates:
                continue
            before, _, behind = ("", "", "") if self.coattack_compat else core(words[place])
            found = [candidate.word for candidate in candidates]
            if self.collisions == "forbid" and rivals:
                found = [word for word in found if core(word)[1].lower() not in rivals]
            if found:
                options[place] = [before + word + behind for word in found]
        return options

    def _losses(self, victim: TextVictim, goal: Goal, asked: Sequence[tuple[int, str]]) -> list[float]:
        """The goal's loss for each pair of a text's number and a string; every distinct string is encoded
        once."""
        numbers: dict[str, int] = {}
        strings = torch.tensor([numbers.setdefault(string, len(numbers)) for _, string in asked])
        owners = torch.tensor([owner for owner, _ in asked])
        distinct = list(numbers)
        losses = torch.empty(len(asked))
        for start in range(0, len(distinct), self.batch):
            outputs = victim(distinct[start : start + self.batch])
            held = ((strings >= start) & (strings < start + self.batch)).nonzero()[:, 0]
            for rows in held.split(self.batch):
                found = goal.at(owners[rows]).loss(outputs[(strings[rows] - start).to(outputs.device)])
                losses[rows] = found.detach().float().cpu()
        if not bool(torch.isfinite(losses).all()):
            raise CrossguardError("the victim answered with numbers that are not finite (NaN or infinity)")
        return losses.tolist()


def collisions(texts: Sequence[str], clean: Sequence[str], rivals: Sequence[frozenset[str]]) -> list[bool]:
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
    """Where the search of one text stands: what its words are now, what is left to visit, what was won."""

    number: int
    words: list[str]
    options: dict[int, list[str]]
    order: list[int] = field(default_factory=list)
    loss: float = 0.0
    changes: int = 0

    def masked(self, unknown: str) -> list[str]:
        """The text as it is, and with each word that can be replaced unknown."""
        return [" ".join(self.words), *(self._with(place, unknown) for place in self.options)]

    def variants(self) -> list[str]:
        """The text with each candidate of the next word."""
        place = self.order[0]
        return [self._with(place, word) for word in self.options[place]]

    def take(self, losses: list[float]) -> None:
        """Makes the next word its best candidate, if that climbs."""
        place = self.order.pop(0)
        best = _first_best(losses)
        if losses[best] > self.loss + _tie(self.loss):
            self.words[place] = self.options[place][best]
            self.loss = losses[best]
            self.changes += 1

    def _with(self, place: int, word: str) -> str:
        return " ".join([*self.words[:place], word, *self.words[place + 1 :]])


def _ranked(losses: dict[int, float]) -> list[int]:
    """Places by falling loss; of those that tie, the first in the text first."""
    left = dict(losses)
    order: list[int] = []
    while left:
        places = list(left)
        place = places[_first_best(list(left.values()))]
        order.append(place)
        del left[place]
    return order


def _first_best(losses: list[float]) -> int:
    """The first of the largest losses; what differs by rounding only is as large."""
    most = max(losses)
    return next(i for i, loss in enumerate(losses) if loss >= most - _tie(most))


def _tie(loss: float) -> float:
    return TIE * max(1.0, abs(loss))
