"""The kinds of test-time defenses, each a base class with one method to write: what it does to pixels, views, logits or
embeddings. They compose in any order, and attacks know what each of them masks, draws and offers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crossguard.answer import Answer, Change, Changed, Gate, Said, around_gradient
from crossguard.models.wrapper import Lent, Wrapper
from crossguard.seeds import replay, some_draw
from crossguard.shapes import Embeddings, Images, Logits, PerImage, Resized, TextEmbeddings

Views = Float[Tensor, "n v 3 _ _"]
OfViews = Float[Tensor, "n v k"]  # logits or embeddings of the views of each image


class Purifier(Wrapper):
    """A defense that cleans the pixels first. Attacks see through it by BPDA (Athalye et al. 2018): the forward uses
    the purified image, the backward treats purifying as the identity.

    Write `purify`. It runs without gradients; a step that needs one asks `inner.ascend(images, loss)`, whose noise and
    costs are counted like those of any other question. Where there is a smooth stand-in, write `smoothed`; where it
    acts only sometimes, `gates`.
    """

    masks = True

    @abstractmethod
    def purify(self, images: Images, inner: Answer) -> Tensor | Changed:
        """Cleaner images, same shape, in [0, 1].

        Args:
            inner: what stands inside: `inner.encode(images)` are embeddings, `inner.hard(images).logits` logits,
                `inner.texts` the class embeddings.

        Returns:
            The images; or `Changed(images, {"name": gate})`, which spares asking the gates again.
        """

    def smoothed(self, images: Images, inner: Answer) -> Tensor | Changed:
        """`purify` without its hard steps, differentiable. Not written, there is no smooth stand-in."""
        raise NotImplementedError

    def gates(self) -> Mapping[str, Callable[[Images, Answer], PerImage]]:
        """For each gate a function of (images, inner), differentiable: how far the defense is from doing nothing;
        positive where it acts. It draws its noise under the same uses as `purify`, from which it has the same."""
        return {}

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live
        gates = {name: _asking(gate, inner) for name, gate in self.gates().items()}
        smooth = inner.smooth
        return inner.before(
            around_gradient(telling(lambda images: self.purify(images, inner), gates)),
            None if type(self).smoothed is Purifier.smoothed else lambda images: self.smoothed(images, smooth),
            gates,
        )


class Transform(Wrapper):
    """A defense that changes the pixels by a differentiable step, to any size."""

    @abstractmethod
    def transform(self, images: Images) -> Resized:
        """The changed images, in [0, 1], with a gradient."""

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live
        return inner.before(self.transform)


class Ensemble(Wrapper):
    """A defense that looks at several views of an image and puts the answers together.

    Where embeddings are asked for instead of logits (a retrieval, or a defense around this one), it is the mean of the
    views' unit embeddings, whose logits are the mean of theirs up to a factor for each image.
    """

    @abstractmethod
    def views(self, images: Images) -> Views:
        """Views of each image in [0, 1], shape (n, views, 3, h, w)."""

    def combine(self, logits: OfViews) -> Logits:
        """One answer of those to the views, shape (n, views, classes): their mean."""
        return logits.mean(1)

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live
        return combined(inner, self.views, self.combine)


class Latent(Wrapper):
    """A defense that moves the image embedding."""

    @abstractmethod
    def move(self, embeddings: Embeddings, anchors: TextEmbeddings) -> Embeddings:
        """The embeddings after the move, differentiable."""

    def anchors(self, inner: Answer, live: Lent) -> TextEmbeddings:
        """The embeddings of texts that it moves by, made once: those of the classes, unless another are named
        (`live.anchors`)."""
        return live.texts(inner)

    def around(self, inner: Answer, live: Lent) -> Answer:
        anchors = self.anchors(inner, live)
        return inner.then(lambda said: said.moved(self.move(said.embeddings, anchors)))


def combined(inner: Answer, views: Callable[[Images], Views], combine: Callable[[OfViews], Logits]) -> Answer:
    """One answer of those to several views (`Ensemble`)."""

    def flat(images: Images) -> Tensor:
        return views(images).flatten(0, 1)

    def gather(said: Said, count: int) -> Said:
        per = len(said.embeddings) // count

        def several(values: Tensor) -> Tensor:
            return values.unflatten(0, (count, per))

        read = said.read

        def again(embeddings: Embeddings) -> Logits:
            assert read is not None
            return combine(several(read(embeddings.repeat_interleave(per, 0))))

        return Said(
            several(F.normalize(said.embeddings, dim=1)).mean(1),
            None if read is None else again,
            {name: several(gate).amax(1) for name, gate in said.gates.items()},
            None if read is None else lambda: combine(several(said.logits)),
        )

    return inner.before(flat, gather=gather)


def _asking(gate: Callable[[Images, Answer], PerImage], inner: Answer) -> Gate:
    return lambda images: gate(images, inner)


def telling(purify: Change, gates: Mapping[str, Gate]) -> Change:
    """Purified images that say what the gates were in the same draw, whether `purify` says so itself or not."""

    def told(images: Images) -> Tensor | Changed:
        with some_draw(len(images)):
            again, made = replay(), purify(images)
            if isinstance(made, Changed):
                return made
            values = dict[str, PerImage]()
            for name, gate in gates.items():
                with again():
                    values[name] = gate(images)
        return Changed(made, values)

    return told if gates else purify
