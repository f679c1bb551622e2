"""Sources of replacement words that need no language model: lists of synonyms, edits of characters, and several
sources as one."""

from __future__ import annotations

import gzip
import io
import itertools
import string
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Final

from crossguard import reading
from crossguard.attacks.candidates import Candidate, CandidateSource, Proposals, attackable, core
from crossguard.errors import CrossguardError
from crossguard.files import hashed
from crossguard.limits import FILE, shortly
from crossguard.words import Reads

SHAPES: Final = (
    "{word: [synonyms]}, {word: {part of speech: [synonyms]}}, or {'synonym_pairs': [[word, synonym]]}"  # as JSON
)

_ROWS: Final = ("qwertyuiop", "asdfghjkl", "zxcvbnm")

LOOKALIKES: Final = {
    "a": "@", "b": "8", "e": "3", "g": "9", "i": "1", "l": "1", "o": "0", "s": "5", "t": "7", "z": "2",
}  # fmt: skip
HOMOGLYPHS: Final = {
    "a": "а", "c": "с", "e": "е", "i": "і", "j": "ј", "o": "о", "p": "р", "s": "ѕ", "x": "х", "y": "у",
}  # fmt: skip

KINDS: Final = ("space", "insert", "delete", "swap", "keyboard", "lookalike", "homoglyph", "substitute")


@dataclass(frozen=True)
class Synonyms(CandidateSource, Reads):
    """What a list of synonyms says, in the order of the list, with the case of the word it replaces.

    A list knows no context: with parts of speech, those of every part in `parts` are proposed, for there is no tagger
    here (PWWS and TextFooler ask for the same part of speech).

    Args:
        path: a JSON file (.json or .json.gz): {word: [synonyms]}, {word: {part of speech: [synonyms]}} as in
            WordNet, or {"synonym_pairs": [[word, synonym]]} as the lists behind counter-fitted vectors (Mrkšić et al.
            2016).
        antonyms: a JSON file of the same shapes (with "antonym_pairs"): what it names as a word's opposite is not
            proposed for it; none, if empty.
        parts: which parts of speech, where the file tells them apart, the first first.
    """

    path: str
    antonyms: str = ""
    parts: tuple[str, ...] = ("n", "a", "v", "r")

    remembered: ClassVar[bool] = False

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.path, self.antonyms)

    def read(self, texts: Sequence[str], top: int, threshold: float, compat: bool) -> list[Proposals]:
        del threshold  # a list has no scores
        known = _thesaurus(self.path, "synonym_pairs", _dated(self.path))
        opposites = _thesaurus(self.antonyms, "antonym_pairs", _dated(self.antonyms)) if self.antonyms else {}

        def likes(word: str) -> tuple[Candidate, ...]:
            inside = word if compat else core(word)[1]
            if not attackable(word, compat):
                return ()
            low = inside.lower()
            found = dict.fromkeys(_of(known, low, self.parts))
            opposed = {*_of(opposites, low, self.parts)}
            fits = (like for like in found if like not in opposed and low not in _of(opposites, like, self.parts))
            return tuple(Candidate(_cased(like, inside), 1.0) for like in fits)[:top]

        return [tuple(likes(word) for word in text.split(" ")) for text in texts]


@dataclass(frozen=True)
class CharacterEdits(CandidateSource, Reads):
    """The word with one edit of its characters, at every position where the edit is possible.

    By default the character bugs of TextBugger (Li et al. 2019, section III-B): a space inside, a letter deleted, two
    neighbors swapped (the first and the last letter stay), a letter replaced by its neighbor on the keyboard or by a
    sign that looks alike. The paper draws one position for each bug; here all are proposed, which is stronger and has
    no noise. 'insert', 'delete' and 'substitute' are the edits of Charmer (Abad Rocamora et al. 2024) and of LEAF
    (2025) within a word. A bug with a space makes two words of one, so budgets of words drop it. No edit is likelier
    than another: all are tried, whatever the `top` of the attack.

    Args:
        kinds: which edits: space, insert, delete, swap, keyboard, lookalike (ASCII signs), homoglyph (Cyrillic
            letters), substitute.
        alphabet: the letters that 'insert' and 'substitute' put in.
        ends: whether 'delete' and 'swap' may touch the first and the last letter.
        no_new_words: a list of English words (.txt with one a line, or JSON: a list, or an object whose keys are the
            words; .gz too); an edit that makes one of them is dropped, after the constraint of LEAF. None, if empty.
    """

    kinds: tuple[str, ...] = ("space", "delete", "swap", "keyboard", "lookalike")
    alphabet: str = string.ascii_lowercase
    ends: bool = False
    no_new_words: str = ""

    remembered: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str) or not self.kinds or not set(self.kinds) <= set(KINDS):
            raise CrossguardError(
                f"CharacterEdits(kinds={self.kinds!r}) is unknown; give a tuple of {', '.join(KINDS)}"
            )
        if " " in self.alphabet:
            raise CrossguardError("the alphabet of CharacterEdits holds a space; that edit is the kind 'space'")

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.no_new_words)

    @property
    def edits_characters(self) -> bool:
        return True

    def admits(self, candidate: str, word: str, compat: bool) -> bool:
        return attackable(word, compat) and candidate != (word if compat else core(word)[1])

    def read(self, texts: Sequence[str], top: int, threshold: float, compat: bool) -> list[Proposals]:
        del top, threshold  # edits have no scores
        english = word_list(self.no_new_words) if self.no_new_words else frozenset[str]()

        @cache  # hundreds of edits for each word, and the same words in many strings
        def edited(word: str) -> tuple[Candidate, ...]:
            if not attackable(word, compat):
                return ()
            inside = word if compat else core(word)[1]
            found = dict.fromkeys(edit for kind in self.kinds for edit in self._edits(kind, inside))
            fits = (edit for edit in found if english.isdisjoint(edit.lower().split(" ")))
            return tuple(Candidate(edit, 1.0) for edit in fits)

        return [tuple(edited(word) for word in text.split(" ")) for text in texts]

    def _edits(self, kind: str, word: str) -> Iterator[str]:
        first, last = (0, len(word)) if self.ends else (1, len(word) - 1)
        if kind == "space":
            yield from (f"{word[:i]} {word[i:]}" for i in range(1, len(word)))
        elif kind == "insert":
            yield from (word[:i] + letter + word[i:] for i in range(len(word) + 1) for letter in self.alphabet)
        elif kind == "delete":
            yield from (word[:i] + word[i + 1 :] for i in range(first, last) if len(word) > 1)
        elif kind == "swap":
            yield from (word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(first, last - 1))
        else:
            for i, letter in enumerate(word):
                low = letter.lower()
                others = {
                    "keyboard": _neighbors().get(low, ""),
                    "lookalike": LOOKALIKES.get(low, ""),
                    "homoglyph": HOMOGLYPHS.get(low, ""),
                    "substitute": self.alphabet,
                }[kind]
                yield from (word[:i] + other + word[i + 1 :] for other in others if other != letter)


@dataclass(frozen=True)
class AnyOf(CandidateSource):
    """The candidates of several sources, those of the first one first; `top` is for each source."""

    sources: tuple[CandidateSource, ...]

    remembered: ClassVar[bool] = False  # its sources remember

    def __post_init__(self) -> None:
        if isinstance(self.sources, CandidateSource) or not self.sources:
            raise CrossguardError("AnyOf needs a tuple of sources, such as AnyOf((MaskedLM(), CharacterEdits()))")

    @property
    def edits_characters(self) -> bool:
        return any(source.edits_characters for source in self.sources)

    def doubts(self, texts: Sequence[str]) -> list[str]:
        found = [source.doubts(texts) for source in self.sources]
        return [doubt for doubts in found for doubt in doubts] if all(found) else []  # one that has none is enough

    def propose(
        self, texts: Sequence[str], top: int = 10, threshold: float = 0.3, compat: bool = False
    ) -> list[Proposals]:
        return _joined([source.propose(texts, top, threshold, compat) for source in self.sources])

    def read(self, texts: Sequence[str], top: int, threshold: float, compat: bool) -> list[Proposals]:
        return _joined([source.read(texts, top, threshold, compat) for source in self.sources])


def _joined(answers: Sequence[list[Proposals]]) -> list[Proposals]:
    """The candidates of each word of each string, from all answers, each word once."""

    def merged(parts: Sequence[tuple[Candidate, ...]]) -> tuple[Candidate, ...]:
        once: dict[str, Candidate] = {}
        for candidate in itertools.chain(*parts):
            once.setdefault(candidate.word, candidate)
        return tuple(once.values())

    return [tuple(merged(parts) for parts in zip(*text, strict=True)) for text in zip(*answers, strict=True)]


def _of(thesaurus: dict[str, Any], word: str, parts: Sequence[str]) -> tuple[str, ...]:
    found = thesaurus.get(word, ())
    if isinstance(found, dict):
        return tuple(like for part in parts for like in found.get(part, ()))
    return tuple(found)


def _cased(like: str, word: str) -> str:
    """The word `like`, written in capitals or with one where `word` is."""
    if len(word) > 1 and word.isupper():
        return like.upper()
    return like[:1].upper() + like[1:] if word[:1].isupper() else like


@lru_cache(maxsize=1)
def _neighbors() -> dict[str, str]:
    """The letters around each letter of an English keyboard."""
    places = {letter: (row, column) for row, keys in enumerate(_ROWS) for column, letter in enumerate(keys)}
    near = ((0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0))
    at = {place: letter for letter, place in places.items()}
    return {
        letter: "".join(at[row + down, column + right] for down, right in near if (row + down, column + right) in at)
        for letter, (row, column) in places.items()
    }


@lru_cache(maxsize=8)
def _thesaurus(path: str, pairs: str, dated: tuple[int, int]) -> dict[str, Any]:
    """A list of synonyms or antonyms by lower-case word; read again when its date changes."""
    del dated
    content = _json(path)
    if isinstance(content, dict) and isinstance(content.get(pairs), list):
        listed: dict[str, list[str]] = {}
        if not content[pairs]:
            raise CrossguardError(f"the list {pairs} of {path!r} is empty")
        for pair in content[pairs]:
            if not _strings(pair) or len(pair) != 2:
                raise CrossguardError(f"{pairs} of {path!r} holds {shortly(pair)}; each must be a pair of words")
            listed.setdefault(pair[0].lower(), []).append(pair[1])
        return listed
    if not isinstance(content, dict) or not content:
        raise CrossguardError(f"{path!r} is no list of synonyms; give {SHAPES.replace('synonym_pairs', pairs)}")
    for word, likes in content.items():
        if not (_strings(likes) or (isinstance(likes, dict) and all(_strings(part) for part in likes.values()))):
            raise CrossguardError(
                f"{path!r} is no list of synonyms: {shortly(word)} stands for {shortly(likes)}; "
                f"give {SHAPES.replace('synonym_pairs', pairs)}"
            )
    return {word.lower(): likes for word, likes in content.items()}


def word_list(path: str) -> frozenset[str]:
    """The lower-case words of a file: one a line, or JSON (a list, or the keys of an object)."""
    return _word_list(path, _dated(path))


@lru_cache(maxsize=8)
def _word_list(path: str, dated: tuple[int, int]) -> frozenset[str]:
    del dated
    if path.removesuffix(".gz").endswith(".json"):
        content = _json(path)
        if not isinstance(content, dict) and not _strings(content):
            raise CrossguardError(
                f"{path!r} is no list of words; give a list of strings or an object with words as keys"
            )
        found = frozenset(word.lower() for word in content)
    else:
        found = frozenset(word.lower() for word in reading.lines(_text(path)) if word)
    if not found:
        raise CrossguardError(f"the list of words {path!r} is empty")
    return found


def _strings(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(item, str) and reading.is_text(item) for item in found)


def _json(path: str) -> Any:
    return reading.parse_json(_text(path), Any, repr(path), "give a list of words")


def _dated(path: str) -> tuple[int, int]:
    """The date and the size of a list of words."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise CrossguardError(f"there is no file {path!r}; give the path of a list of words")
    noted = file.stat()
    return noted.st_mtime_ns, noted.st_size


def _text(path: str) -> str:
    file, give = Path(path).expanduser(), "give a list of words in UTF-8"
    content = reading.content(file, give)
    if file.suffix == ".gz":
        try:
            with gzip.open(io.BytesIO(content)) as packed:
                content = packed.read(FILE.most + 1)
        except (OSError, EOFError, zlib.error) as problem:
            raise CrossguardError(f"{path!r} cannot be read: {problem}") from problem
        FILE.check(len(content), repr(path))
    return reading.decoded(content, repr(path), give)


def fingerprint(*paths: str) -> str:
    """Says what the lists at these paths hold; those without a path are left out, and so is what does not exist: who
    reads it says so."""
    found = [Path(path).expanduser() for path in paths if path]
    return reading.fingerprint(hashed(file) for file in found if file.is_file()) if found else ""
