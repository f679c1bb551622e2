"""A model around a model: the seam of test-time and training-free defenses.

A defense writes one function, `around`: from the answer of what it stands around (`Answer`) to its own. What most of
them do has a base class that writes it for them: `Purifier`, `Transform`, `Ensemble`, `Latent`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from crossguard.answer import Answer
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models.base import Checkpoint, DualEncoder, VisionLanguageModel
from crossguard.seeds import drawn, normal, uniform
from crossguard.shapes import Embeddings, Images, Logits, Seeds, TextEmbeddings
from crossguard.words import quoted, within


class Wrapper(VisionLanguageModel):
    """A defended model is a model: whatever a wrapper does not change is its base's.

    `around` is all that it writes. What it is it declares: `random`, if it draws noise; `masks`, if it has steps
    without a gradient. Its noise comes from `normal` and `uniform`.
    """

    base: VisionLanguageModel
    # Of each gate of its own that can be calibrated: its name, the field that is its threshold, and how it moves with
    # that (1, or -1 where a higher threshold opens it for fewer images). Of several gates with one threshold, it is
    # found for the first that the settings leave.
    thresholds: ClassVar[tuple[tuple[str, str, float], ...]] = ()
    draws_as: ClassVar[str] = ""  # whose noise it draws, where it is a special case of another defense; its own, if ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("answer", "classifier", "encode_image"):
            if name in cls.__dict__:
                raise CrossguardError(
                    f"{cls.__name__} writes {name} itself, which nothing around it would ask; a defense writes around("
                    "inner, live), or is a Purifier, a Transform, an Ensemble or a Latent"
                )

    def __post_init__(self) -> None:
        self._check_base()

    @abstractmethod
    def around(self, inner: Answer, live: Lent) -> Answer:
        """The answer of this defense, from that of what it stands around.

        Called once for a model and its classes: what is prepared here stays for all images. `inner.then` adds a last
        step and `inner.before` a first one, so that nothing of what is inside is lost.
        """

    def answer(self, classes: Prompts | TextEmbeddings | None = None) -> Answer:
        self._check_base()
        inner = self.base.answer(classes)
        live = Lent(self, layers(self)[-1], classes if isinstance(classes, Prompts) else None)
        found = self.around(inner, live)
        if not isinstance(found, Answer):
            raise CrossguardError(f"{type(self).__name__}.around returned {quoted(found)} instead of an Answer")
        random, masks = self.random or inner.random, self.masks or inner.masks
        return replace(found, inner=inner, read=None, random=random, masks=masks)

    def encode_image(self, images: Images) -> Embeddings:
        return self.answer().encode(images)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return self.base.encode_text(texts)

    @property
    def forwards(self) -> int:
        return self.base.forwards

    def cut(self, texts: Sequence[str]) -> int:
        return self.base.cut(texts)

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        return self.base.logits(images, texts)

    def class_embeddings(self, prompts: Prompts) -> Embeddings:
        return self.base.class_embeddings(prompts)

    @property
    def device(self) -> torch.device:
        return self.base.device

    # Noise

    def keys(self, count: int, use: str = "") -> Seeds:
        """The keys that this wrapper draws its noise from for `count` images, or several views of each in the order
        (sample, view). They follow from who asks for which sample and from who draws: the name of the defense, how many
        are inside of it, and the use. Who draws for the same use again in one answer gets other noise
        (`seeds.drawn`).

        Args:
            use: tells apart several kinds of noise of one answer.
        """
        return drawn(count, f"{self.draws_as or type(self).__name__} {len(layers(self))} {use}")

    def normal(self, images: Tensor, use: str = "") -> Tensor:
        """Standard normal noise of the shape of the images."""
        return normal(self.keys(len(images), use), images.shape[1:], images.device)

    def uniform(self, images: Tensor, use: str = "") -> Tensor:
        """Noise of the shape of the images, uniform in [-1, 1)."""
        return 2.0 * uniform(self.keys(len(images), use), images.shape[1:], images.device) - 1.0

    def _check_base(self) -> None:
        if not isinstance(self.base, VisionLanguageModel):
            hint = f"HuggingFace({self.base!r})" if isinstance(self.base, str) else "Tiny() or HuggingFace('folder')"
            raise CrossguardError(
                f"{type(self).__name__} stands around a model, and {quoted(self.base)} is none; give one, as {hint}"
            )


@dataclass(frozen=True)
class Lent:
    """What a defense is lent while it makes its answer.

    Args:
        wrapper: the defense.
        model: the innermost model, which is not defended.
        prompts: of the classes; None where there are none, as in a retrieval.
    """

    wrapper: Wrapper
    model: VisionLanguageModel
    prompts: Prompts | None

    @property
    def network(self) -> DualEncoder:
        """The network of the innermost model, for defenses that reach into it."""
        if not isinstance(self.model, Checkpoint):
            raise CrossguardError(
                f"{type(self.wrapper).__name__} reaches into the network of a checkpoint, and "
                f"{type(self.model).__name__} has none; put it around HuggingFace('folder') or the like"
            )
        return self.model.network

    def anchors(self, texts: Sequence[str]) -> TextEmbeddings:
        """The raw embeddings of these texts, without a gradient; computed here, and so once if asked for in
        `around`."""
        with torch.no_grad():
            return self.model.encode_text(texts)

    def texts(self, inner: Answer) -> TextEmbeddings:
        """The class embeddings; raises where there are no classes."""
        if inner.texts is None:
            raise CrossguardError(
                f"{type(self.wrapper).__name__} compares images with the texts of classes, and none were given; ask "
                "model.answer(prompts), as ZeroShot does, or with the embeddings of a retrieval's captions"
            )
        return inner.texts


def is_random(model: VisionLanguageModel) -> bool:
    """Whether a model says that it draws noise, or one inside of it does."""
    return any(one.random for one in within(model, VisionLanguageModel))


def layers(model: VisionLanguageModel) -> list[VisionLanguageModel]:
    """A defended model and what it wraps, from the outside in."""
    found = [model]
    while isinstance(found[-1], Wrapper):
        found.append(found[-1].base)
    return found
