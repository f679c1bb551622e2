"""What a model says to images: made once for a model and its classes, and what a defense is a function of.

An `Answer` is live: it holds encoded prompts and open networks, where a model word holds none. A defense takes the
answer of what it stands around and returns its own (`Wrapper.around`), so that defenses compose as functions do and
none can lose what another does. Attacks know answers too: they see which part of a defense has no gradient, what it
offers in its place, and what is inside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from crossguard.errors import CrossguardError
from crossguard.seeds import replay
from crossguard.shapes import Embeddings, Images, Logits, PerImage, TextEmbeddings

Read = Callable[[Embeddings], Logits]  # what image embeddings are taken for
Gate = Callable[[Images], PerImage]
Gates = Mapping[str, PerImage]
_Of = TypeVar("_Of")

_NOTHING: Mapping[str, Gate] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Said:
    """What is said to a batch of images in one draw of all that is random.

    Args:
        embeddings: of the images, raw, as the defended model sees them.
        read: the logits of embeddings that stand in the place of these; None where no classes are known.
        gates: of each defense that acts only sometimes how far it was from doing nothing: it acted on an image where
            this is positive. Of this very answer, without a gradient.
        vote: the logits, where they are not those of the embeddings (the mean over several views); computed when they
            are first asked for.
    """

    embeddings: Embeddings
    read: Read | None = None
    gates: Gates = field(default_factory=dict)
    vote: Callable[[], Logits] | None = None

    @cached_property
    def logits(self) -> Logits:
        """One for each class."""
        if self.vote is not None:
            return self.vote()
        if self.read is None:
            raise CrossguardError(
                "no classes were given, so an image has an embedding and no logits; ask model.answer(prompts)"
            )
        return self.read(self.embeddings)

    def moved(self, embeddings: Embeddings) -> Said:
        """The same with these embeddings, read as the old ones were."""
        return replace(self, embeddings=embeddings, vote=None)

    def reread(self, change: Callable[[Logits], Logits]) -> Said:
        """The same with other logits of the same embeddings."""
        read, vote = self.read, self.vote
        return replace(
            self,
            read=None if read is None else lambda embeddings: change(read(embeddings)),
            vote=None if vote is None else lambda: change(vote()),
        )


def embeddings_of(said: Said) -> Embeddings:
    """What is judged in a retrieval."""
    return said.embeddings


def logits_of(said: Said) -> Logits:
    """What is judged in a classification."""
    return said.logits


@dataclass(frozen=True)
class Changed:
    """Images that a defense has changed, with what its gates were in the same draw, by their names."""

    images: Tensor
    gates: Gates = field(default_factory=dict)


Change = Callable[[Images], Tensor | Changed]  # of the same images, or of several views of each


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model, defended or not, says to images. Called with images, it gives what the task judges.

    Args:
        hard: what is judged. Where a step has no gradient, its graph goes around it (BPDA).
        soft: a smooth stand-in of the whole, whose gradients are its true ones; None where no defense in it offers one.
        gates: of each defense that acts only sometimes, by name, how far it is from doing nothing: positive where it
            acts, with a gradient. In the same draw (`seeds.replay`) it is what the answer was given by.
        inner: without the outermost defense; None for a model that is not defended.
        texts: the embedding of each class, for defenses that need them; None where there are no classes.
        read: embeddings of any images to logits, for who has embedded them before; None where no classes are known,
            and of a defense, whose logits may hang on more of the image than an embedding.
        random: draws noise, so that the same question may be answered differently.
        masks: has steps without a gradient.
        tell: what of all that is said is judged, `logits_of` or `embeddings_of`.
    """

    hard: Callable[[Images], Said]
    soft: Callable[[Images], Said] | None = None
    gates: Mapping[str, Gate] = field(default_factory=dict)
    inner: Answer | None = None
    texts: TextEmbeddings | None = None
    read: Read | None = None
    random: bool = False
    masks: bool = False
    tell: Callable[[Said], Tensor] = embeddings_of

    def __call__(self, images: Images) -> Tensor:
        return self.tell(self.hard(images))

    def encode(self, images: Images) -> Embeddings:
        """The image embeddings."""
        return self.hard(images).embeddings

    # What defenses are made of

    def then(self, change: Callable[[Said], Said]) -> Answer:
        """This answer with a last step."""
        soft = self.soft
        return replace(
            self,
            hard=lambda images: change(self.hard(images)),
            soft=None if soft is None else lambda images: change(soft(images)),
        )

    def before(
        self,
        change: Change,
        smooth: Change | None = None,
        gates: Mapping[str, Gate] = _NOTHING,
        gather: Callable[[Said, int], Said] | None = None,
    ) -> Answer:
        """What this says to changed images.

        Args:
            change: what is done to them; where it is not differentiable, through `around_gradient`.
            smooth: a smooth stand-in for that.
            gates: how far the change is from being none (`Answer.gates`), of the images as they were.
            gather: one answer to each image, from those to its views, and how many images there are.
        """

        def asked(way: Change, ask: Callable[[Images], Said]) -> Callable[[Images], Said]:
            def answer(images: Images) -> Said:
                made = changed(way(images))
                said = ask(made.images)
                if gather is not None:
                    said = gather(said, len(images))
                return replace(said, gates=joined(made.gates, said.gates)) if made.gates else said

            return answer

        def behind(gate: Gate) -> Gate:
            def measure(images: Images) -> PerImage:
                found = gate(changed(change(images)).images)
                return found.view(len(images), -1).amax(1)  # of several views, whether it acts on any

            return measure

        soft = None
        if smooth is not None or self.soft is not None:
            soft = asked(smooth or change, self.soft or self.hard)
        inside = {name: behind(gate) for name, gate in self.gates.items()}
        return replace(self, hard=asked(change, self.hard), soft=soft, gates=joined(gates, inside))

    # What adversaries know

    def without(self, defenses: int | None = None) -> Answer:
        """What is said without so many defenses, from the outside in; without any of them, if None."""
        answer, left = self, defenses
        while answer.inner is not None and (left is None or left > 0):
            answer, left = answer.inner, None if left is None else left - 1
        return replace(answer, tell=self.tell)

    @property
    def layers(self) -> int:
        """How many defenses there are, one around the other."""
        return 0 if self.inner is None else 1 + self.inner.layers

    @property
    def smooth(self) -> Answer:
        """The smooth stand-in in place of the answer; the answer itself, where nothing in it has one."""
        return self if self.soft is None else replace(self, hard=self.soft)

    @property
    def straight(self) -> Answer:
        """The answer with the gradient of its smooth stand-in: y = soft(x); y + (hard(x) - y) without its gradient. The
        numbers are those of the true defense, in the same draw."""
        soft = self.soft
        if soft is None:
            return self

        def answer(images: Images) -> Said:
            if not torch.is_grad_enabled():
                return self.hard(images)
            again = replay()
            with torch.no_grad():
                true = self.hard(images)
            with again():
                near = soft(images)
            return replace(
                true,
                embeddings=near.embeddings + (true.embeddings - near.embeddings).detach(),
                vote=lambda: near.logits + (true.logits - near.logits).detach(),
            )

        return replace(self, hard=answer)

    def altered(self, change: Callable[[Callable[[Images], Tensor]], Callable[[Images], Tensor]]) -> Answer:
        """What is judged, asked in another way: of every function from images to that which is in here, `change` makes
        another, such as one that computes in bfloat16."""

        def through(ask: Callable[[Images], Said]) -> Callable[[Images], Said]:
            told = change(lambda images: self.tell(ask(images)))
            return lambda images: Said(told(images))

        inner = None if self.inner is None else replace(self.inner, tell=self.tell).altered(change)
        soft = None if self.soft is None else through(self.soft)
        return replace(self, hard=through(self.hard), soft=soft, inner=inner, read=None, tell=embeddings_of)

    # Attacks inside of defenses

    def ascend(self, images: Images, loss: Callable[[Said], PerImage], graph: bool = False) -> tuple[Images, Said]:
        """The gradient of a loss of what is said with respect to the pixels, and what is said, without a graph: a step
        of a defense that attacks. Where no gradient leads to the pixels, it is zero.

        Args:
            graph: keep the graph of both, for the smooth stand-in of such a step (`twice_differentiable`).
        """
        with torch.enable_grad():
            pixels = images if graph and images.requires_grad else images.detach().requires_grad_(True)
            said = self.hard(pixels)
            total = loss(said).sum()
            gradient = torch.zeros_like(images)
            if total.requires_grad:
                (gradient,) = torch.autograd.grad(
                    total, pixels, create_graph=graph, allow_unused=True, materialize_grads=True
                )
        if graph:
            return gradient, said
        embeddings, vote = said.embeddings.detach(), said.vote
        return gradient, replace(said, embeddings=embeddings, vote=None if vote is None else lambda: vote().detach())


def around_gradient(change: Change) -> Change:
    """A change of images that attacks see through by BPDA (Athalye et al. 2018): the forward is the changed image, the
    backward treats the change as the identity. It is carried out without gradients, so a long chain of steps costs no
    memory; one that needs some for steps of its own turns them on for pixels of its own (`Answer.ascend`)."""

    def around(images: Images) -> Changed:
        with torch.no_grad():
            made = changed(change(images.detach()))
        if not (torch.is_grad_enabled() and images.requires_grad):
            return made
        return Changed(made.images + (images - images.detach()), made.gates)  # plus zero, exactly

    return around


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, attention is computed in a way whose gradient has a gradient, as a step of a defense that attacks needs
    when it is differentiated in turn. The faster kernels have none."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def changed(images: Tensor | Changed) -> Changed:
    """What a change gave, with its gates."""
    return images if isinstance(images, Changed) else Changed(images)


def joined(outer: Mapping[str, _Of], inner: Mapping[str, _Of]) -> Mapping[str, _Of]:
    """The gates of both; one inside that has the name of another is called 'inner ...'."""
    found = dict(outer)
    for name, gate in inner.items():
        while name in found:
            name = f"inner {name}"
        found[name] = gate
    return MappingProxyType(found)


# What an answer costs


@dataclass
class Costs:
    """How many images went through an image tower forwards, and how many gradients came back."""

    forwards: int = 0
    backwards: int = 0


_counting: ContextVar[Costs | None] = ContextVar("crossguard_costs", default=None)


@contextmanager
def counting() -> Iterator[Costs]:
    """Counts what goes through image towers inside, whoever asks: the price of a defense is `counting()` around one
    answer, divided by the images."""
    costs, outer = Costs(), _counting.get()
    token = _counting.set(costs)
    try:
        yield costs
    finally:
        _counting.reset(token)
        if outer is not None:
            outer.forwards += costs.forwards
            outer.backwards += costs.backwards


def counted(embeddings: Embeddings, forwards: int = 1) -> Embeddings:
    """The embeddings that a tower gave, counted, and counted again when a gradient comes back through them.

    Args:
        forwards: that each of them took.
    """
    costs = _counting.get()
    if costs is not None:
        count = len(embeddings) * forwards
        costs.forwards += count
        if embeddings.requires_grad:

            def back(gradient: Tensor) -> None:
                del gradient
                costs.backwards += count

            embeddings.register_hook(back)
    return embeddings
