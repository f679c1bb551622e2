"""Networks in memory: each is opened once for an evaluation, shared by equal words, and released by bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from cachetools import LRUCache
from torch import Tensor, nn

from crossguard.device import Choice, chosen, exact, keep_memory, memory
from crossguard.errors import CrossguardError
from crossguard.words import Reads, contents

Network = TypeVar("Network")

_REMEMBERED = 2**25  # bytes of answers of one evaluation: 16,000 texts in 512 dimensions
_SHARE = 0.5  # networks that nobody holds stay as long as all together fill at most this part of the memory


class Opens(Reads):
    """A word with a network behind it: a model, or a language model that an attack asks."""

    def content(self) -> str:
        """What the files that are loaded hold now, in a short text; empty where there are none."""
        return ""

    @property
    def fingerprint(self) -> str:
        """What the files of this word hold; inside `opening()`, what they held when it was first asked."""
        held = opened()
        return self.content() if held is None else held.fingerprint(self)


class Opened:
    """The networks that one evaluation holds, and what was in their files when it first looked.

    A word is looked up on the disk once. Whoever writes into its folder afterwards changes nothing here, and who does
    so between the question and the opening is noticed.
    """

    def __init__(self) -> None:
        self.choice = chosen()
        self._fingerprints: dict[Opens, str] = {}
        self._networks: dict[Opens, Any] = {}
        self._remembered = LRUCache[Hashable, Tensor](_REMEMBERED, lambda found: found.nbytes)

    def fingerprint(self, word: Opens) -> str:
        """What the files of a word hold, looked at once."""
        if word not in self._fingerprints:
            self._fingerprints[word] = word.content()
        return self._fingerprints[word]

    def network(
        self, word: Opens, load: Callable[[Choice], Network], modules: Callable[[Network], nn.Module]
    ) -> Network:
        """The network of a word, opened when it is first asked for.

        Args:
            load: reads it, to the device and in the precision that are chosen.
            modules: where its weights are.
        """
        if word not in self._networks:
            network = _shared(word, contents(word), self.choice, load, modules)
            before = word.fingerprint
            if before and word.content() != before:
                release()
                raise CrossguardError(
                    f"the files of {word} have changed while they were opened; ask again when nobody writes to them"
                )
            self._networks[word] = network
        return self._networks[word]

    def remembered(self, question: Hashable, answer: Callable[[], Tensor]) -> Tensor:
        """What the networks say to a question, such as the embeddings of all class prompts, which every adversary of an
        audit asks for anew. Only of the last questions, and of none with a large answer."""
        found = self._remembered.get(question)
        if found is None:
            found = answer()
            if found.nbytes <= _REMEMBERED:
                self._remembered[question] = found
        return found.clone()  # which whoever asked may change

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Inside, words mean the networks that are held here."""
        token = _opened.set(self)
        try:
            yield
        finally:
            _opened.reset(token)


_opened: ContextVar[Opened | None] = ContextVar("crossguard_opened", default=None)


def opened() -> Opened | None:
    """What is held open here, if anything is."""
    return _opened.get()


@contextmanager
def opening() -> Iterator[Opened]:
    """Inside, every network is opened once, and its files are looked at no more; one inside another shares what the
    outer one holds."""
    held = _opened.get()
    if held is not None:
        yield held
        return
    held = Opened()
    with held.inside():
        yield held


@contextmanager
def evaluating() -> Iterator[Opened]:
    """What every evaluation runs in: `opening`, with float32 computed as float32. Also a decorator, `@evaluating()`."""
    with opening() as held, exact():
        yield held


def release() -> None:
    """Forgets all networks, so that those that nobody holds leave the memory."""
    with _lock:
        _kept.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Entry(NamedTuple):
    network: Any
    size: int  # in bytes


_kept: dict[torch.device, LRUCache[object, _Entry]] = {}
_lock = threading.Lock()
_loading: dict[object, threading.RLock] = {}


def _shared(
    word: Opens,
    content: str,
    choice: Choice,
    load: Callable[[Choice], Network],
    modules: Callable[[Network], nn.Module],
) -> Network:
    """The network that all equal words of equal content share; two threads that ask at once wait for one loading."""
    key = (word, content, choice)
    with _lock:
        mine = _loading.setdefault(key, threading.RLock())
    with mine:
        with _lock:
            kept = _kept.get(choice.device)
            if kept is not None and key in kept:
                return kept[key].network
        if choice.device.type == "cpu":
            keep_memory()
        network = load(choice)
        limit = int(_SHARE * memory(choice.device))
        # One that is larger than the limit is kept alone, and not read again at each question.
        entry = _Entry(network, min(_bytes(modules(network)), limit))
        with _lock:
            _kept.setdefault(choice.device, LRUCache(limit, lambda entry: entry.size))[key] = entry
            _loading.pop(key, None)
    return network


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
