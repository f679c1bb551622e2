"""Learned prompts as what a recipe trains: words of texts, tokens of images, pixels; the base stays as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from crossguard.data import Prompts
from crossguard.defenses.parts import Trainable
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.models.prompted import (
    ClassFramedEncoder,
    ContextEncoder,
    CoupledEncoder,
    FramedEncoder,
    Place,
    PromptedEncoder,
    PromptTuned,
    TokenEncoder,
    prompts,
    save_prompts,
)


@dataclass(frozen=True)
class Prompt(Trainable, ABC):
    """A prompt. What is kept is the prompt alone, and the result is `PromptTuned(base, folder)`."""

    @abstractmethod
    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> PromptedEncoder: ...

    def save(self, network: DualEncoder, folder: Path) -> None:
        save_prompts(prompts(network)[-1:], folder)

    def word(self, base: Checkpoint, folder: Path) -> Checkpoint:
        return PromptTuned(base, str(folder))


@dataclass(frozen=True)
class Context(Prompt):
    """Learned text context: vectors in place of words of every prompt (CoOp, Zhou et al. 2022; AdvPT; APT). They take
    the place of `words`, and stand in front of a text without them.

    Args:
        words: what they stand for.
        tokens: how many there are, which begin at random; as many as the words have tokens, if None, and these begin as
            the words themselves.
        specific: each class of the training has vectors of its own. A text has those of the longest class name in it,
            and one that names no class, as a text may after an attack, has the mean of all.
        depth: before how many layers of the text tower there are new ones; 1 for the first alone, as in CoOp.
    """

    words: str = "a photo of a"
    tokens: int | None = None
    specific: bool = False
    depth: int = 1

    def __post_init__(self) -> None:
        _check_least(self, "tokens", "depth")

    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> PromptedEncoder:
        names = ()
        if self.specific:
            if prompts is None:
                raise CrossguardError(
                    "Context(specific=True) learns vectors for each class, and this training reads no class "
                    "prompts; give specific=False"
                )
            names = prompts.names
        return ContextEncoder(network, Place(self.words, self.tokens, names), self.depth, seed)


@dataclass(frozen=True)
class Deep(Prompt):
    """Learned visual tokens, which the image tower reads behind those of every image (visual prompt tuning, Jia et al.
    2022): new ones before each of the first `depth` layers. It needs a vision transformer.

    Args:
        depth: 1 is the shallow form; all layers, if None.
        start: standard deviation of the tokens before they are learned.
    """

    tokens: int = 2
    depth: int | None = None
    start: float = 0.02

    def __post_init__(self) -> None:
        _check_least(self, "tokens", "depth")
        _check_start(self, self.start)

    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> PromptedEncoder:
        del prompts
        return TokenEncoder(network, self.tokens, self.depth, self.start, seed)


@dataclass(frozen=True)
class Coupled(Prompt):
    """Learned tokens of both towers that hang together by learned linear maps: before the first layer the tokens of
    images follow from the words of texts (MaPLe, Khattak et al. 2023), before the others those of texts follow from
    those of images, as in the released code of FAP (Zhou et al. 2024).

    For deep tokens of both towers that do not hang together, give `Combined((Deep(2, 9), Context(depth=9)))`.

    Args:
        words, tokens: as those of `Context`; images have as many tokens.
        depth: before how many layers of each tower tokens are learned.
    """

    words: str = "a photo"
    tokens: int | None = None
    depth: int = 9

    def __post_init__(self) -> None:
        _check_least(self, "tokens", "depth")

    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> PromptedEncoder:
        del prompts
        return CoupledEncoder(network, Place(self.words, self.tokens), self.depth, seed)


@dataclass(frozen=True)
class Frame(Prompt):
    """A visual prompt on pixels (VP, Bahng et al. 2022): learned pixels that are added to every image at the size that
    the image tower reads, in a frame or all over.

    Args:
        pad: how wide the frame is, in such pixels; all pixels, if None.
        clip: clip what comes out to [0, 1], as C-AVP does.
        normalized: learn in the unit of normalized pixels, as the code of VP and TeCoA does, instead of [0, 1]. With
            the same learning rate, steps in pixels are the square of CLIP's standard deviation, some 0.07, as long.
        start: standard deviation before it is learned, in its unit.
    """

    pad: int | None = 30
    clip: bool = True
    normalized: bool = False
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_least(self, "pad")
        _check_start(self, self.start)

    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> PromptedEncoder:
        del prompts
        return FramedEncoder(network, self.pad, self.clip, self.normalized, self.start, seed)


@dataclass(frozen=True)
class ClassFrames(Prompt):
    """A visual prompt on pixels for each class (C-AVP, Chen et al. 2023): an image is seen with all of them, and its
    logit for a class is the logarithm of the probability that it has with the prompt of this class. An image costs as
    many forwards as there are classes.

    Args:
        pad: how wide the frames are, in pixels of the size that the image tower reads; all pixels, if None. The paper's
            8 are of 32, a quarter of the side.
        clip: clip what comes out to [0, 1].
    """

    pad: int | None = 8
    clip: bool = True

    def __post_init__(self) -> None:
        _check_least(self, "pad")

    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> PromptedEncoder:
        del seed  # they begin at zero
        if prompts is None:
            raise CrossguardError(
                "ClassFrames learns pixels for each class, and this training reads no class prompts; give Frame()"
            )
        return ClassFramedEncoder(network, prompts.names, self.pad, self.clip)


@dataclass(frozen=True)
class Combined(Trainable):
    """Several parts at once, such as `Combined((Frame(), Deep(10, depth=1)))`. Weights of the network itself (`Towers`,
    `LoRA`) come first and at most once."""

    parts: tuple[Trainable, ...]

    def __post_init__(self) -> None:
        late = [part for part in self.parts[1:] if not isinstance(part, Prompt)]
        if not self.parts or late:
            raise CrossguardError(
                "Combined takes prompts, and first of all one part of the weights; "
                f"{f'{type(late[0]).__name__} comes later' if late else 'there is none at all'}"
            )

    def attach(self, network: DualEncoder, prompts: Prompts | None, seed: int) -> DualEncoder:
        for part in self.parts:
            network = part.attach(network, prompts, seed)
        return network

    def doubts(self, network: DualEncoder) -> list[str]:
        return [doubt for part in self.parts for doubt in part.doubts(network)]

    def save(self, network: DualEncoder, folder: Path) -> None:
        listed = prompts(network)
        own = listed[len(listed) - sum(isinstance(part, Prompt) for part in self.parts) :]
        if isinstance(self.parts[0], Prompt):
            save_prompts(own, folder)
            return
        # A base may have learned prompts too, which were trained with its weights: they are all kept together.
        self.parts[0].save(own[0].inner if own else network, folder)
        if own:
            save_prompts(listed, folder, alone=False)

    def word(self, base: Checkpoint, folder: Path) -> Checkpoint:
        if isinstance(self.parts[0], Prompt):
            return PromptTuned(base, str(folder))
        base = self.parts[0].word(base, folder)
        alone = len(self.parts) == 1 or isinstance(base, PromptTuned)
        return base if alone else PromptTuned(base, str(folder))


def _check_least(part: Prompt, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if value is not None and value < 1:
            raise CrossguardError(f"{type(part).__name__}({name}={value}) is not possible; give 1 or more")


def _check_start(part: Prompt, start: float) -> None:
    if not 0.0 <= start < float("inf"):
        raise CrossguardError(f"{type(part).__name__}(start={start}) is no standard deviation; give 0 or more")
