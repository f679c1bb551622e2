"""Where the replacement words of text attacks come from. A source reads strings, never a victim: what may
replace a word of a string is known before the victim is asked anything, and is asked of the source once per
string and process."""

from __future__ import annotations

import heapq
import itertools
import re
import threading
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from cachetools import LRUCache
from torch import Tensor

from crossguard.checkpoints import content, located
from crossguard.errors import CrossguardError
from crossguard.opening import Opens, opening, release
from crossguard.pretrained import pretrained, tokenizing
from crossguard.words import Word, contents, within

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = Path(__file__).parent.parent / "assets" / "masked_lm"

# The sub-word limits of the BERT-Attack code: a word's first 12 pieces, 4 predictions of each, 24
# combinations of them.
PIECES, PER_PIECE, COMBINATIONS = 12, 4, 24

# Co-Attack pads and cuts a string to 30 pieces, [CLS] counted, and looks at no word that starts behind the
# 28th.
COATTACK_LENGTH = 30

# At most so many numbers are held at once as predictions of a language model (256 MB).
LOGITS = 2**26

# So large a share of unknown words is worth a remark.
UNKNOWN = 0.05

# A language model reads at most so many sentences at once: the states of many more fall out of the caches.
SENTENCES = 256

# English function words: replacing or inserting one changes the grammar of a sentence, not what is in the
# picture.
STOP_WORDS = frozenset(
    """a an the this that these those some any no every each either neither both all another other such i me
    my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one someone somebody something anyone anybody
    anything everyone everybody everything nobody nothing none who whom whose which what whoever whatever
    whichever am is are was were be been being do does did doing done have has had having can could may might
    must shall should will would ought cannot s t d ll m re ve isn aren wasn weren don doesn didn hasn haven
    hadn won wouldn shan shouldn couldn mightn mustn needn ain of in on at by to from with without within into
    onto upon about above across after against along amid among amongst around as before behind below beneath
    beside besides between beyond down during except for inside like near off out outside over past per since
    through throughout toward towards under until up via and or but nor so yet if because although though
    while whereas unless than whether not n't only own same too very just also even ever never then there here
    thus hence however therefore where when why how again further once already still almost quite rather more
    most less least few many much several else
    """.split()  # noqa: SIM905
)


class Candidate(NamedTuple):
    """A word that may stand in for another, and how well the source thinks it fits; the scale is the source's
    own."""

    word: str
    score: float


Proposals = tuple[tuple[Candidate, ...], ...]  # for each word of a string, best first


class CandidateSource(Word, ABC):
    """What words may replace each word of a string: a masked language model, a list of synonyms, edits of
    characters.

    A source is a word: a frozen dataclass whose answer depends on nothing but itself and the string.
    `propose` therefore keeps answers for the whole process, so that a text that is attacked at every training
    step is read once; a source that costs next to nothing says `remembered = False`, and memory is saved.
    """

    remembered: ClassVar[bool] = True

    @property
    def edits_characters(self) -> bool:
        """Whether its candidates can fit a budget that counts characters."""
        return False

    def doubts(self, texts: Sequence[str]) -> list[str]:
        """Why it may have little to propose for these strings, each a sentence with its remedy."""
        del texts
        return []

    def admits(self, candidate: str, word: str, compat: bool) -> bool:
        """Whether a candidate may stand for the word at all."""
        return admissible(candidate, word, compat)

    @abstractmethod
    def read(self, texts: Sequence[str], top: int, threshold: float, compat: bool) -> list[Proposals]:
        """For each string and each of its words, what might replace it, best first, not yet filtered.

        Words are what single spaces separate. A candidate replaces the `core` of its word (the word without
        the punctuation around it), or the whole word with `compat`.

        Args:
            top: at most so many candidates for a word of one piece.
            threshold: the least score of a candidate.
            compat: read as the code of Co-Attack does.
        """

    def propose(
        self, texts: Sequence[str], top: int = 10, threshold: float = 0.3, compat: bool = False
    ) -> list[Proposals]:
        """For each string and each of its words, the admissible candidates, best first (see `admissible`)."""
        request = (self, contents(self), top, threshold, compat)
        known: dict[str, Proposals] = {}
        for text in dict.fromkeys(texts):
            with _lock:
                proposals = _remembered.get((request, text)) if self.remembered else None
            if proposals is not None:
                known[text] = proposals
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            for text, raw in zip(new, self.read(new, top, threshold, compat), strict=True):
                words = text.split(" ")
                known[text] = tuple(
                    candidates  # the very same for the same word, if the source gave that
                    if all(fits := [self.admits(candidate.word, word, compat) for candidate in candidates])
                    else tuple(itertools.compress(candidates, fits))
                    for word, candidates in zip(words, raw, strict=True)
                )
                if self.remembered:
                    with _lock:
                        _remembered[request, text] = known[text]
        return [known[text] for text in texts]


def doubts(attack: object, texts: Sequence[str]) -> list[str]:
    """What the sources of an attack's words have to say against its strength on these strings."""
    sources = list(within(attack, CandidateSource))
    inner = {id(part) for source in sources for part in within(source, CandidateSource) if part is not source}
    return [doubt for source in sources if id(source) not in inner for doubt in source.doubts(texts)]


@lru_cache(maxsize=65536)
def core(word: str) -> tuple[str, str, str]:
    """A word as what is glued in front of it, itself, and what is glued behind: `'"cat."'` is `'"'`, `cat`,
    `."`.

    Emoji, punctuation and other signs are no words: their core is empty.
    """
    if word.isalnum():
        return "", word, ""
    inside = [place for place, sign in enumerate(word) if unicodedata.category(sign)[0] in "LNM"]
    if not inside or not any(sign.isalnum() for sign in word):
        return word, "", ""
    first, last = inside[0], inside[-1] + 1
    return word[:first], word[first:last], word[last:]


@lru_cache(maxsize=65536)
def attackable(word: str, compat: bool = False) -> bool:
    """Whether a word may be replaced at all: it has a core, and is no function word.

    The stop list is compared in lower case; the code of Co-Attack compares the word as it stands, so that
    "This" at the start of a prompt is open to attack there, and so is "it.".
    """
    inside = core(word)[1]
    return bool(inside) and (word if compat else inside.lower()) not in STOP_WORDS


@lru_cache(maxsize=65536)
def admissible(candidate: str, word: str, compat: bool = False) -> bool:
    """Whether a candidate is one whole content word other than the one it replaces.

    Dropped are the word itself, pieces (`##`), function words, punctuation, and whatever holds a space: a
    string whose words are counted cannot let one of them become two. (Co-Attack's code lets them; that is the
    one point where compatibility yields to the budget.)
    """
    if "##" in candidate or not attackable(word, compat) or not attackable(candidate, compat):
        return False
    if len(candidate.split()) != 1 or " " in candidate:
        return False
    if compat:
        return candidate != word
    inside = core(candidate)[1]
    return inside == candidate and inside.lower() != core(word)[1].lower()


@dataclass(frozen=True)
class MaskedLM(CandidateSource, Opens):
    """What a masked language model predicts at a word's place when it reads the sentence unmasked
    (BERT-Attack, Li et al. 2020).

    Reading the word unmasked is what keeps the predictions near its meaning. A word of several pieces gets
    combinations of the predictions for its pieces. Here the 24 likeliest combinations that spell one word are
    found without building the others; with `compat` they are what the code of Co-Attack takes: the first 24
    rows of the full product, in the order of their pseudo-perplexity without the sentence (Co-Attack, Zhang
    et al. 2022, as used by MMCoA, Zhou et al. 2024).

    Args:
        path: 'embedded' for the small model of the package, which knows the words of the generated scenes
            only; else a folder, or a name on the Hugging Face hub such as 'bert-base-uncased', with
            safetensors weights and a WordPiece vocabulary.
    """

    path: str = "embedded"

    def content(self) -> str:
        return content(str(EMBEDDED) if self.path == "embedded" else self.path)

    @property
    def _network(self) -> _Network:
        with opening() as held:
            return held.network(self, lambda choice: _load(self.path).to(choice.device), lambda found: found.model)

    def doubts(self, texts: Sequence[str]) -> list[str]:
        words = [*dict.fromkeys(core(word)[1] for text in texts for word in text.split(" ") if attackable(word))]
        if not words:
            return []
        tokenizer = self._network.tokenizer
        with tokenizing(words):
            pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
        unknown = tokenizer.unk_token_id
        # a word that it can only spell, in pieces of one or two letters, it has hardly ever seen
        strange = [
            word
            for word, ids in zip(words, pieces, strict=True)
            if unknown in ids or len(ids) > max(2, len(word) / 2)  # type: ignore[operator, arg-type]
        ]
        if len(strange) <= UNKNOWN * len(words):
            return []
        made = "is made for the generated scenes and " if self.path == "embedded" else ""
        return [
            f"the language model {self.path!r} {made}does not know {len(strange)} of the {len(words)} words that could "
            f"change ({', '.join(map(repr, strange[:3]))}), so the attack on texts is weak; give MaskedLM the path of "
            "one that does, such as bert-base-uncased, or Synonyms(...)"
        ]

    def read(self, texts: Sequence[str], top: int, threshold: float, compat: bool) -> list[Proposals]:
        network = self._network
        found: list[Proposals] = [()] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths waste no padding
        sentences = network.encode([texts[i] for i in order], compat)
        start = 0
        while start < len(order):
            fitting = LOGITS // (max(len(s.ids) for s in sentences[start : start + SENTENCES]) * len(network.pieces))
            stop = start + min(SENTENCES, max(1, fitting))
            proposals = network.read(sentences[start:stop], top, threshold, compat)
            for i, proposed in zip(order[start:stop], proposals, strict=True):
                found[i] = proposed
            start = stop
        return found


@dataclass(frozen=True)
class _Sentence:
    """A string as the language model reads it; `spans` are the rows of the logits to read for each word, none
    for some."""

    ids: list[int]
    spans: list[range]


@dataclass(frozen=True)
class _Network:
    """A masked language model in memory, frozen, with what its tokenizer says about its pieces."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pieces: list[str]
    special: frozenset[int]  # which pieces are no text

    def to(self, device: torch.device) -> _Network:
        """The same network on the device."""
        return replace(self, model=self.model.to(device))  # type: ignore[arg-type]

    def encode(self, texts: Sequence[str], compat: bool) -> list[_Sentence]:
        """The ids of each string, and where to read the predictions for each of its words.

        Co-Attack's code counts the pieces of a word from 0 while [CLS] is row 0 of its logits: every word is
        read one piece too early, so that "cat" gets the predictions for the "a" in front of it. With `compat`
        so it is here.
        """
        parts = [[("", word, "") if compat else core(word) for word in text.split(" ")] for text in texts]
        distinct = list(dict.fromkeys(part for words in parts for word in words for part in word if part))
        with tokenizing(distinct):
            encoded = self.tokenizer(distinct, add_special_tokens=False)["input_ids"] if distinct else []
        pieces: dict[str, list[int]] = dict(zip(distinct, encoded, strict=True)) | {"": []}  # type: ignore[arg-type]
        return [self._sentence(text, words, pieces, compat) for text, words in zip(texts, parts, strict=True)]

    def _sentence(
        self, text: str, words: list[tuple[str, str, str]], pieces: dict[str, list[int]], compat: bool
    ) -> _Sentence:
        ids: list[int] = [_id(self.tokenizer.cls_token_id)]
        spans: list[range] = []
        for whole, (before, inside, behind) in zip(text.split(" "), words, strict=True):
            ids += pieces[before]
            spans.append(range(len(ids), len(ids) + (len(pieces[inside]) if attackable(whole, compat) else 0)))
            ids += pieces[inside] + pieces[behind]
        if compat:
            late = [range(span.start - 1, min(span.stop - 1, COATTACK_LENGTH)) for span in spans]
            return _Sentence(
                ids[:COATTACK_LENGTH],
                [span if span.start <= COATTACK_LENGTH - 2 else range(0) for span in late],
            )
        longest = self.model.config.max_position_embeddings - 1
        sep = _id(self.tokenizer.sep_token_id)
        return _Sentence([*ids[:longest], sep], [span if span.stop <= longest else range(0) for span in spans])

    def read(self, sentences: Sequence[_Sentence], top: int, threshold: float, compat: bool) -> list[Proposals]:
        """The candidates for each word of each sentence, from one forward."""
        device = self.model.device
        longest = max(len(sentence.ids) for sentence in sentences)
        ids, mask = torch.zeros(2, len(sentences), longest, dtype=torch.int64)
        for i, sentence in enumerate(sentences):
            ids[i, : len(sentence.ids)] = torch.tensor(sentence.ids)
            mask[i, : len(sentence.ids)] = 1
        rows = [(i, row) for i, sentence in enumerate(sentences) for span in sentence.spans for row in span]
        if not rows:
            return [((),) * len(sentence.spans) for sentence in sentences]
        with torch.no_grad():
            logits: Tensor = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        wanted = torch.tensor(rows, device=device)
        logits = logits[wanted[:, 0], wanted[:, 1]].float().cpu()
        if not compat:
            logits[:, list(self.special)] = -torch.inf
        # whole words and continuations share the predictions for a piece, so more are looked at than will be
        # used
        width = min(max(top, PER_PIECE) if compat else max(top, 4 * PER_PIECE), len(self.pieces))
        best = logits.topk(width, dim=-1)
        values: Iterator[list[float]] = iter(best.values.tolist())
        indices: Iterator[list[int]] = iter(best.indices.tolist())
        return [
            tuple(
                self.replace([next(values) for _ in span], [next(indices) for _ in span], top, threshold, compat)
                for span in sentence.spans
            )
            for sentence in sentences
        ]

    def replace(
        self, values: list[list[float]], indices: list[list[int]], top: int, threshold: float, compat: bool
    ) -> tuple[Candidate, ...]:
        """The candidates of one word from the best predictions for each of its pieces."""
        if not indices:
            return ()
        if len(indices) == 1:
            best = zip(indices[0][:top], values[0][:top], strict=True)
            likely = itertools.takewhile(lambda pair: threshold == 0.0 or pair[1] >= threshold, best)
            return tuple(Candidate(self.pieces[i], value) for i, value in likely if i not in self.special)
        if compat:
            return self.as_coattack(indices)
        options: list[list[tuple[float, int]]] = []
        for place, (value, index) in enumerate(zip(values[:PIECES], indices[:PIECES], strict=True)):
            fits = [(v, i) for v, i in zip(value, index, strict=True) if self.pieces[i].startswith("##") == (place > 0)]
            options.append([(v, i) for v, i in fits if v > -torch.inf][:PER_PIECE])
        return tuple(
            Candidate("".join(self.pieces[i].removeprefix("##") for i in ids), total / len(ids))
            for total, ids in likeliest(options, COMBINATIONS)
        )

    def as_coattack(self, indices: list[list[int]]) -> tuple[Candidate, ...]:
        """The first rows of the product of the pieces' predictions, by rising pseudo-perplexity (the score is
        its negative)."""
        options = [index[:PER_PIECE] for index in indices[:PIECES]]
        rows = list(itertools.islice(itertools.product(*options), COMBINATIONS))
        ids = torch.tensor(rows)
        with torch.no_grad():
            logits = self.model(input_ids=ids.to(self.model.device)).logits.float().cpu()
        perplexity = (
            F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape).mean(1).exp()
        )
        found: list[Candidate] = []
        for i in perplexity.sort(stable=True).indices.tolist():
            if not self.special.isdisjoint(rows[i]):
                continue
            word = " ".join(self.pieces[piece] for piece in rows[i]).replace(" ##", "").strip()
            # "cat." is two pieces, joined as "cat ."; glued back it is the one word that it was
            found.append(Candidate(re.sub(r" (?=[^\w\s])", "", word), -float(perplexity[i])))
        return tuple(found)


def likeliest(options: Sequence[Sequence[tuple[float, int]]], count: int) -> list[tuple[float, tuple[int, ...]]]:
    """The `count` choices of one option per place with the largest sums, best first, without building the
    whole product.

    Each list of options is sorted, best first; a heap walks from the best choice to its neighbors (Lawler
    1972).
    """
    if not options or not all(options):
        return []
    start: tuple[int, ...] = (0,) * len(options)
    heap: list[tuple[float, tuple[int, ...]]] = [(-sum(place[0][0] for place in options), start)]
    seen: set[tuple[int, ...]] = {start}
    found: list[tuple[float, tuple[int, ...]]] = []
    while heap and len(found) < count:
        cost, choice = heapq.heappop(heap)
        found.append((-cost, tuple(place[k][1] for place, k in zip(options, choice, strict=True))))
        for at, place in enumerate(options):
            k = choice[at] + 1
            neighbor = (*choice[:at], k, *choice[at + 1 :])
            if k < len(place) and neighbor not in seen:
                seen.add(neighbor)
                heapq.heappush(heap, (cost + place[k - 1][0] - place[k][0], neighbor))
    return found


_remembered: LRUCache[object, Proposals] = LRUCache(50_000)  # for the strings asked about last; about 2 KB each
_lock = threading.Lock()


def forget() -> None:
    """Empties the memory of proposals and closes the language models, for measurements."""
    with _lock:
        _remembered.clear()
    release()


def _load(path: str) -> _Network:
    """A masked language model from a folder or the hub, on the CPU; everything that can be wrong with it is said in
    one sentence."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    where, shown = _place(path)
    with pretrained(where, path) as source:
        config = source.config()
        if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
            name = (config.architectures or [config.model_type])[0]
            raise CrossguardError(
                f"{shown} holds a {name}, not a masked language model; try 'bert-base-uncased' or 'embedded'"
            )
        model, info = source.model(config, masked=True)
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        unexpected = sorted(key for key in info["unexpected_keys"] if not re.search("pooler|seq_relationship", key))
        if missing or unexpected:
            first = f"{missing[0]!r} is missing or has a wrong shape" if missing else f"{unexpected[0]!r} has no place"
            raise CrossguardError(
                f"the weights in {shown} do not fit its config.json: {first} ({len(missing)} missing, "
                f"{len(unexpected)} unexpected); save the model again with save_pretrained"
            )
        tokenizer = source.tokenizer(config)
        with source.naming("tokenizer"):
            network = _network(model, config, tokenizer, shown)
            sentences = network.encode(["a photo of a cat", "\N{SNOWMAN} \N{GRINNING FACE}"], False)
        with source.naming("network"):
            network.read(sentences, 1, 0.0, False)
    return network


def _network(model: PreTrainedModel, config: Any, tokenizer: Any, shown: str) -> _Network:
    vocabulary = tokenizer.get_vocab()
    needed = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id)
    if None in needed or not any(piece.startswith("##") for piece in vocabulary):
        raise CrossguardError(
            f"the tokenizer in {shown} has no WordPiece vocabulary ([CLS], [SEP], [UNK], pieces with '##'), "
            f"which replacing words needs; try a model of the BERT family such as 'bert-base-uncased'"
        )
    size = max(vocabulary.values()) + 1
    if size > config.vocab_size:
        raise CrossguardError(
            f"the tokenizer in {shown} has {size} pieces and the model only {config.vocab_size}; they do not "
            f"belong together"
        )
    pieces = [""] * config.vocab_size
    for piece, number in vocabulary.items():
        pieces[number] = piece
    unused = [number for number, piece in enumerate(pieces) if not piece or piece.startswith("[unused")]
    special = frozenset([*unused, *tokenizer.all_special_ids])
    return _Network(model.eval().requires_grad_(False), tokenizer, pieces, special)


def _place(path: str) -> tuple[str, str]:
    """Where to load from, and how to call it in an error."""
    if path == "embedded":
        if not (EMBEDDED / "config.json").is_file():
            raise CrossguardError("the masked language model of the package is missing; install crossguard again")
        return str(EMBEDDED), "the embedded masked language model"
    folder = Path(located(path))
    if path and folder.is_dir():
        return str(folder), f"the folder {path!r}"
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path):
        raise CrossguardError(f"there is no folder {path!r} with a masked language model; try MaskedLM('embedded')")
    return path, repr(path)


def _id(number: object) -> int:
    assert isinstance(number, int)  # checked when the model was loaded
    return number
