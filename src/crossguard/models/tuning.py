"""Test-time prompt tuning: the words of the class prompts are tuned for each image before it is answered."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crossguard.answer import Answer, Said
from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.kinds import OfViews, Views
from crossguard.models.splicing import Splice
from crossguard.models.views import tpt_views
from crossguard.models.wrapper import Lent, Wrapper
from crossguard.shapes import Context, Embeddings, Images, Logits, PerImage, Spliced, TextEmbeddings

Shares = Float[Tensor, "n v"]  # what each view of an image counts


class Tuner(Wrapper):
    """A defense that looks at views of an image, tunes the words of the class prompts on them, and answers with the
    prompts as tuned.

    All images of a batch are tuned at once, each with words of its own: their views are embedded once, and each step
    reads all pairs of an image and a class (`DualEncoder.splice`). Only a share of the views, of which the untuned
    model is surest, takes part in tuning; the steps are AdamW's.

    Where a prompt holds the words, they are tuned there; otherwise they are put in front of it. What tuning changes in
    the logits is added to what is said inside, so that a defense there keeps its word. Without classes there is nothing
    to tune. Attacks see the tuned words as constants (BPDA), and the views as they are.

    Write `loss`, and `shares` where all views count in the answer. A subclass has these fields:

    Args:
        words: that are tuned.
        views: how many there are, the image itself included.
        mixed: whether AugMix is part of them.
        keep: the share of views that tuning is about.
        steps: of tuning; 0 leaves the prompts as they are.
        lr, decay: the step and the weight decay of AdamW.
    """

    words: str
    views: int
    mixed: bool
    keep: float
    steps: int
    lr: float
    decay: float
    random = True
    masks = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.views < 1:
            raise CrossguardError(f"{name}(views={self.views}) looks at nothing; give 1 (the image itself) or more")
        if not 0.0 < self.keep <= 1.0:
            raise CrossguardError(f"{name}(keep={self.keep}) is no share of the views; give more than 0 and at most 1")
        if self.steps < 0:
            raise CrossguardError(f"{name}(steps={self.steps}) is not possible; give 0 (no tuning) or more")
        if not (0.0 <= self.lr < float("inf") and 0.0 <= self.decay < float("inf")):
            raise CrossguardError(f"{name}(lr={self.lr}, decay={self.decay}) is no step of AdamW; give 0 or more")

    @abstractmethod
    def loss(self, logits: OfViews) -> PerImage:
        """What tuning descends, from the logits of the views that take part."""

    def shares(self, views: OfViews) -> Shares | None:
        """What each view counts in the answer, from their unit embeddings; None: the image itself alone."""
        del views
        return None

    def seen(self, images: Images) -> Views:
        """The views, of which the first is the image itself."""
        return tpt_views(images, self.keys(len(images), "views"), self.views, self.mixed)

    def tune(self, views: OfViews, plain: Tensor, classes: TunedClasses) -> Context:
        """The tuned words of each image, from the unit embeddings of its views.

        Args:
            plain: the logits of the views with the prompts as they are.
        """
        sure = surest(plain + classes.change(views, classes.start), self.keep)[..., None]
        views, plain = (values.gather(1, sure.expand(-1, -1, values.shape[2])) for values in (views, plain))

        def loss(context: Context) -> PerImage:
            return self.loss(plain + classes.change(views, classes.texts(context)))

        return descended(classes.splice.start, len(views), loss, self.steps, self.lr, self.decay)

    def around(self, inner: Answer, live: Lent) -> Answer:
        classes = None
        if self.steps and live.prompts is not None:
            classes = TunedClasses.of(live, live.prompts, self.words)
        elif self.steps and inner.texts is not None:
            raise CrossguardError(
                f"{type(self).__name__} tunes the prompts of classes, and there are none here, as in a retrieval; with "
                "steps=0 it answers without tuning"
            )

        def gather(said: Said, count: int) -> Said:
            def several(values: Tensor) -> Tensor:
                return values.unflatten(0, (count, self.views))

            views = several(F.normalize(said.embeddings, dim=1))
            shares = self.shares(views)

            def pooled(values: Tensor) -> Tensor:
                return values[:, 0] if shares is None else (shares[..., None] * values).sum(1)

            embeddings = pooled(several(said.embeddings) if shares is None else views)
            gates = {name: several(gate).amax(1) for name, gate in said.gates.items()}
            ask = said.read
            if ask is None:
                return Said(embeddings, None, gates)
            logits = several(said.logits)
            changed: Callable[[Tensor], Tensor | float] = lambda _: 0.0  # noqa: E731
            if classes is not None:
                tuned = classes
                with torch.no_grad():
                    texts = tuned.texts(self.tune(views.detach(), logits.detach(), tuned))
                changed = lambda unit: tuned.change(unit, texts)  # noqa: E731

            def read(embeddings: Embeddings) -> Logits:
                each = several(ask(embeddings.repeat_interleave(self.views, 0)))
                return pooled(each + changed(F.normalize(embeddings, dim=1)[:, None]))

            return Said(embeddings, read, gates, lambda: pooled(logits + changed(views)))

        return inner.before(lambda images: self.seen(images).flatten(0, 1), gather=gather)


@dataclass(frozen=True)
class TunedClasses:
    """The classes of a task with words that each image may have of its own.

    Args:
        splice: the distinct prompts.
        place: for each distinct class the numbers of its prompts, one for each template.
        columns: the distinct class that each class is.
        plain: the embeddings of the distinct classes as the model has them.
        start: those with the words where they are not among the prompts, before they are tuned.
        scale: of the logits.
    """

    splice: Splice
    place: Tensor
    columns: Tensor
    plain: TextEmbeddings
    start: TextEmbeddings
    scale: Tensor

    @classmethod
    def of(cls, live: Lent, prompts: Prompts, words: str) -> TunedClasses:
        """Of the prompts of each class."""
        # Classes of the same prompts get the same logits, equal to the bit (see `VisionLanguageModel.answer`).
        classes = {texts: number for number, texts in enumerate(dict.fromkeys(prompts.texts))}
        strings = {text: number for number, text in enumerate(dict.fromkeys(text for one in classes for text in one))}
        splice = live.network.splice(list(strings), words)
        device = splice.start.device
        place = torch.tensor([[strings[text] for text in texts] for texts in classes], device=device)
        columns = torch.tensor([classes[texts] for texts in prompts.texts], device=device)
        plain = live.model.class_embeddings(prompts)[[prompts.texts.index(texts) for texts in classes]]
        with torch.no_grad():
            start = _averaged(splice(splice.start), place)
        return cls(splice, place, columns, plain, start, live.network.scale.detach().float())

    def texts(self, context: Context) -> Spliced:
        """The embedding of each distinct class: the mean over templates of unit embeddings."""
        return _averaged(self.splice(context), self.place)

    def change(self, views: Tensor, texts: Spliced) -> Tensor:
        """What other texts of the classes add to the logits of unit embeddings of images."""
        with torch.autocast(views.device.type, enabled=False):
            texts, plain = F.normalize(texts, dim=-1), F.normalize(self.plain, dim=-1)
            return (self.scale * (views @ texts.mT - views @ plain.mT))[..., self.columns]


def _averaged(texts: Tensor, place: Tensor) -> Tensor:
    return F.normalize(texts, dim=-1)[..., place, :].mean(-2)


def entropy(logits: Tensor) -> Tensor:
    """Of the probabilities along the last axis, in nats."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def surest(logits: OfViews, keep: float) -> Tensor:
    """Which views of each image have the smallest entropies: this share of them, and at least one."""
    return entropy(logits).topk(max(1, int(logits.shape[1] * keep)), 1, largest=False).indices


def descended(
    start: Tensor, count: int, loss: Callable[[Context], PerImage], steps: int, lr: float, decay: float
) -> Context:
    """Vectors that begin alike for each of `count` images and go down a loss of each by steps of AdamW.

    Args:
        start: of one image.
        lr, decay: the step and the weight decay.
    """
    context = start.expand(count, -1, -1).clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([context], lr, weight_decay=decay)
    with torch.enable_grad():
        for _ in range(steps):
            (context.grad,) = torch.autograd.grad(loss(context).sum(), context)
            optimizer.step()
    return context.detach()


def mean_entropy(logits: OfViews) -> PerImage:
    """The mean of the entropies of the views: each alone shall be sure."""
    return entropy(logits).mean(1)


def entropy_of_mean(logits: OfViews) -> PerImage:
    """The entropy of the mean of the views' probabilities: they shall be sure of the same."""
    mean = logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])
    return -(mean.exp() * mean).sum(-1)


@dataclass(frozen=True)
class TPT(Tuner):
    """Test-time prompt tuning (Shu et al. 2022): the four words 'a photo of a' are tuned for each image by one step, so
    that the entropy of the mean of the surest tenth of 64 views becomes smaller; then the image itself is answered.

    The numbers are those of the authors' code, whose AdamW has torch's weight decay of 0.01. It tunes prompts of its
    own; here those of the task are tuned where they hold the words. The code makes views of 224 pixels from 8-bit
    images, and mixes them by AugMix on fine-grained sets only (`mixed`). An image costs 64 forwards of the image tower,
    and the classes are read twice forwards and once backwards.
    """

    base: VisionLanguageModel
    words: str = "a photo of a"
    views: int = 64
    mixed: bool = True
    keep: float = 0.1
    steps: int = 1
    lr: float = 5e-3
    decay: float = 0.01

    def loss(self, logits: OfViews) -> PerImage:
        return entropy_of_mean(logits)


@dataclass(frozen=True)
class RTPT(Tuner):
    """R-TPT (Sheng et al. 2025), made against adversarial images: as TPT, but each of the surest views shall be sure by
    itself, and all 64 views count in the answer, those more that resemble many others.

    The numbers are those of the authors' code, as with `TPT`. The code rounds an attacked image to 8 bits before it is
    viewed, and embeds the views four times; here it is not rounded, and embedded once. `steps=0` is the ensemble
    without tuning, which is most of the published gain; `ensemble=False` is tuning alone; with `marginal=True` as well
    it is `TPT`. Published numbers are of attacks on the base alone (`Blind`).

    Args:
        neighbors: how many of the most similar other views a view is compared with.
        temperature: of the softmax over the mean cosines, from which the weights come.
        ensemble: False answers with the image itself.
        marginal: descend the entropy of the mean of the views instead.
    """

    base: VisionLanguageModel
    words: str = "a photo of a"
    views: int = 64
    mixed: bool = True
    keep: float = 0.1
    steps: int = 1
    lr: float = 5e-3
    decay: float = 0.01
    neighbors: int = 20
    temperature: float = 0.01
    ensemble: bool = True
    marginal: bool = False
    draws_as = "TPT"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbors < 1:
            raise CrossguardError(f"RTPT(neighbors={self.neighbors}) is not possible; give 1 or more")
        if not self.temperature > 0.0:
            raise CrossguardError(f"RTPT(temperature={self.temperature}) is not possible; give a positive number")

    def loss(self, logits: OfViews) -> PerImage:
        return entropy_of_mean(logits) if self.marginal else mean_entropy(logits)

    def shares(self, views: OfViews) -> Shares | None:
        if not self.ensemble:
            return None
        return similar(views, self.neighbors, self.temperature)


def similar(views: OfViews, neighbors: int, temperature: float) -> Shares:
    """What each view counts: a softmax over its mean cosine with the most similar others.

    The authors' code takes cosines of 1 or more for those of a view with itself, and so may leave out copies as well,
    or by rounding not itself; here it is the view itself that is left out.
    """
    count = views.shape[1]
    if count == 1:
        return torch.ones_like(views[..., 0])
    itself = torch.eye(count, dtype=torch.bool, device=views.device)
    cosines = (views @ views.mT).masked_fill(itself, -torch.inf)
    return (cosines.topk(min(neighbors, count - 1), 2).values.mean(2) / temperature).softmax(1)
