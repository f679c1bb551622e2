"""Defenses that attack back: they move an image, by an attack without labels, to where it is told better what it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.answer import Answer, Changed, Gate, Said, around_gradient, twice_differentiable
from crossguard.budgets import per_image
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel, cosine
from crossguard.models.kinds import OfViews, Views, combined
from crossguard.models.noise import start, within
from crossguard.models.wrapper import Lent, Wrapper, layers
from crossguard.seeds import among
from crossguard.shapes import Embeddings, Images, Labels, Logits, PerImage, TextEmbeddings

SLOPE = 1.0  # of tanh(slope * gradient / its mean size), which stands in for a sign; ours
WIDTH = 0.05  # of the sigmoid that stands in for a threshold, in units of tau; ours


@dataclass(frozen=True)
class TTC(Wrapper):
    """Test-time counterattack (Xing et al., CVPR 2025): an image that noise hardly moves in embedding space is taken
    for attacked, and is driven away from its own embedding.

    From uniform noise d0 in [-eps, eps] it takes `steps` signed steps up the squared distance of f(x + d) from f(x),
    the raw embeddings. Where tau = |f(x + d0) - f(x)| / |f(x)| is below the threshold, the image is moved by the mean
    of d0..dN with weights proportional to exp(beta * number); elsewhere by d0 alone. No label and no text takes part.

    The numbers are those of the authors' code for ViT-B/32; the threshold may never be passed, or always, on another
    model. An image costs 4 forwards and 2 backwards, whether it is moved or not. With `tau_model` it costs 2 forwards
    of that in addition. Published numbers are of attacks on the base alone (`Blind`).

    The smooth stand-in is ours: each sign a tanh of the gradient over its mean size, the threshold a sigmoid.

    Args:
        eps: in pixels of [0, 1].
        step: as a fraction of eps.
        tau: the threshold; 1 moves nearly all images, 0 none.
        noise_on_clean: images judged clean get d0, as published; False leaves them as they are, which the authors call
            equally sensible.
        tau_model: whose embeddings the threshold is about; the model itself, if None. Around an adversarially
            fine-tuned model the paper takes the original CLIP.
    """

    base: VisionLanguageModel
    eps: float = 4 / 255
    step: float = 0.25
    steps: int = 2
    tau: float = 0.2
    beta: float = 2.0
    noise_on_clean: bool = True
    tau_model: VisionLanguageModel | None = None
    random = True
    masks = True
    thresholds = (("tau", "tau", 1.0),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counter(self, self.eps, self.step, self.steps, self.tau)

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live
        return self.in_front_of(inner, inner)

    def in_front_of(self, seen: Answer, inner: Answer) -> Answer:
        """What is said to images after the counterattack.

        Args:
            seen: says it.
            inner: is asked by the counterattack.
        """
        if self.steps == 0:
            return seen.before(lambda images: (images + start(self, images, self.eps)).clamp(0.0, 1.0))
        judge = inner if self.tau_model is None else self.tau_model.answer()

        def purify(images: Images) -> Changed:
            return self.counter(images, inner, judge)

        def smooth(images: Images) -> Changed:
            near = inner.smooth
            with twice_differentiable():
                return self.counter(images, near, near if judge is inner else judge.smooth, smooth=True)

        return seen.before(around_gradient(purify), smooth, {"tau": lambda images: self.gate(images, judge)})

    def gate(self, images: Images, judge: Answer) -> PerImage:
        """How far tau is below the threshold: an image is moved where this is positive."""
        return self.tau - moved(judge.encode(images), judge.encode(images + start(self, images, self.eps)))

    def counter(
        self,
        images: Images,
        inner: Answer,
        judge: Answer,
        clean: Embeddings | None = None,
        smooth: bool = False,
    ) -> Changed:
        """The images after the counterattack, and its gate.

        Args:
            judge: whose embeddings the threshold is about.
            clean: the embeddings of the images, where they are known.
            smooth: by the smooth stand-in.
        """
        at = inner.encode(images) if clean is None else clean
        first = start(self, images, self.eps)
        found, said = climb(
            images, inner, first, lambda said: drift(said, at), self.eps, self.step * self.eps, self.steps, smooth
        )
        if judge is inner:
            tau = moved(at, said.embeddings)
        else:
            tau = moved(judge.encode(images), judge.encode(images + first))
        share = opened(self.tau - tau, smooth)
        made = torch.lerp(first if self.noise_on_clean else torch.zeros_like(first), fused(found, self.beta), share)
        return Changed((images + made).clamp(0.0, 1.0), {"tau": self.tau - tau})


@dataclass(frozen=True)
class SCC(Wrapper):
    """Self-calibrated consistency (Liu et al. 2025, Algorithm 1): a counterattack that a pseudo-label steers, and the
    vote of several views.

    1. Warm-up: TTC with `warmup` steps gives x_w. 2. Pseudo-label: the mean logits of several views of x_w, divided by
    `temperature`, give probabilities p, the class y = argmax p and the prototype t = sum of p_k t_k over the class
    texts. 3. Counterattack: from no change at all, `steps` signed steps up

        weight * (cos(f, t) - max over k != y of cos(f, t_k)) + |f - f(x)|^2

    on the image itself, and the mean of all points on the way with the weights of TTC. 4. Answer: the mean logits of
    several views of the moved image. A view is the image, mirrored if its number (from 1) is odd, plus Gaussian noise,
    cut to [0, 1] (the paper does not say).

    The authors' code is not public. Numbers are those of the paper's section 4.1 and appendix A. Where text, equations
    and Algorithm 1 contradict each other, the algorithm is followed, and the other reading is a switch. It leaves open
    which logits the temperature divides (here those of the model, with its own scale) and which embeddings drift (here
    the raw ones, as in TTC). Its warm-up starts at the image itself, where the drift has no gradient and nothing would
    move; here it starts as TTC does. In step 3 the same start leaves TTC's tau at zero, so all images are moved.

    `SCC(spatial=False)` is the semantic module alone, `SCC(semantic=False)` the spatial one: TTC in front of views.
    Without both it is TTC. An image costs 12 forwards and 7 backwards. The smooth stand-in is that of TTC (ours).

    In a retrieval the classes are the captions of the gallery, each by itself, as they are when nobody attacks, and
    the answer is the mean of the views' unit embeddings. The paper describes classes of a prompt alone, so this is
    ours. The captions stay the clean ones where an attack rewrites them: the adversary brings queries, and whoever
    defends has the gallery. With `Retrieval(gallery='adversarial')` that is kind to the defense.

    Args:
        eps: in pixels of [0, 1].
        step: as a fraction of eps.
        steps: the paper takes 5 where the adversary has 4/255.
        sigma: of the noise of a view, in pixels of [0, 1].
        weight: of the first term; 1 to 5 make little difference in the paper.
        power: average probabilities of views and sharpen them by the power 1 / temperature (equation 6).
        label_of_views: False takes y from x_w itself (equation 5).
        cosines: the temperature divides cosines, which makes p nearly uniform; with the scale of a CLIP it is nearly
            one class.
        unit: the drift is that of unit embeddings; with the raw ones of a ViT-B/32 the first term is next to nothing.
        confident: the first term weighs as much as p is sure of y, as section 3.4 has it; it gives no formula, so this
            one (p_y) is ours.
        random_start: step 3 starts as TTC does, and its tau decides.
        flip_first: of the mirrored views; False mirrors those of even numbers.
    """

    base: VisionLanguageModel
    eps: float = 4 / 255
    step: float = 0.25
    steps: int = 2
    tau: float = 0.2
    beta: float = 2.0
    warmup: int = 5
    weight: float = 4.0
    temperature: float = 0.5
    views: int = 2
    sigma: float = 6 / 255
    semantic: bool = True
    spatial: bool = True
    power: bool = False
    label_of_views: bool = True
    cosines: bool = False
    unit: bool = False
    confident: bool = False
    random_start: bool = False
    flip_first: bool = True
    random = True
    masks = True
    thresholds = (("warm-up", "tau", 1.0), ("tau", "tau", 1.0))
    draws_as = "TTC"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counter(self, self.eps, self.step, self.steps, self.tau)
        if self.warmup < 0:
            raise CrossguardError(f"SCC(warmup={self.warmup}) is not possible; give 0 or more steps")
        if self.views < 1:
            raise CrossguardError(f"SCC(views={self.views}) looks at nothing; give 1 or more")
        if not self.temperature > 0.0:
            raise CrossguardError(f"SCC(temperature={self.temperature}) is not possible; give more than 0, such as 0.5")
        if self.semantic and self.steps < 1:
            raise CrossguardError("SCC(steps=0) leaves nothing to steer; give 1 or more steps, or semantic=False")
        if not self.sigma >= 0.0:
            raise CrossguardError(f"SCC(sigma={self.sigma}) is not possible; give 0 or more, in pixels of [0, 1]")

    def around(self, inner: Answer, live: Lent) -> Answer:
        seen = combined(inner, lambda images: self.seen(images, "answer"), _mean) if self.spatial else inner
        if not self.semantic:
            return self._ttc(self.steps).in_front_of(seen, inner)
        texts = F.normalize(live.texts(inner), dim=1)
        gates: dict[str, Gate] = {}
        if self.warmup:
            gates["warm-up"] = lambda images: self._ttc(self.warmup).gate(images, inner)
        if self.random_start:
            gates["tau"] = lambda images: self.gate(images, inner)

        def purify(images: Images) -> Changed:
            return self.counter(images, inner, texts)

        def smooth(images: Images) -> Changed:
            with twice_differentiable():
                return self.counter(images, inner.smooth, texts, smooth=True)

        return seen.before(around_gradient(purify), smooth, gates)

    def seen(self, images: Images, use: str) -> Views:
        """The views of each image, with noise for this use."""
        mirrored = [number % 2 == int(self.flip_first) for number in range(1, self.views + 1)]
        views = torch.stack([images.flip(3) if one else images for one in mirrored], 1).flatten(0, 1)
        noisy = (views + self.sigma * self.normal(views, use)).clamp(0.0, 1.0)
        return noisy.unflatten(0, (len(images), self.views))

    def counter(self, images: Images, inner: Answer, texts: TextEmbeddings, smooth: bool = False) -> Changed:
        """The images after warm-up and counterattack (steps 1 to 3), and the gates.

        Args:
            texts: unit embeddings of the classes.
            smooth: by the smooth stand-in.
        """
        clean, warm, gates = inner.encode(images), images, dict[str, PerImage]()
        if self.warmup:
            made = self._ttc(self.warmup).counter(images, inner, inner, clean, smooth)
            warm, gates = made.images, {"warm-up": made.gates["tau"]}
        shares, own = self.label(warm, inner, texts)
        prototype, sure = shares @ texts, shares.gather(1, own[:, None])[:, 0]
        goal = F.normalize(clean, dim=1) if self.unit else clean

        def loss(said: Said) -> PerImage:
            rival = cosine(said.embeddings, texts).scatter(1, own[:, None], -torch.inf).amax(1)
            gain = F.cosine_similarity(said.embeddings, prototype, dim=1) - rival
            gain = sure * gain if self.confident else gain
            here = said.moved(F.normalize(said.embeddings, dim=1)) if self.unit else said
            return self.weight * gain + drift(here, goal)

        first = start(self, images, self.eps, "second start") if self.random_start else torch.zeros_like(images)
        with self._apart(images) if self.random_start else nullcontext():
            found, said = climb(images, inner, first, loss, self.eps, self.step * self.eps, self.steps, smooth)
        change = fused(found, self.beta)
        if self.random_start:
            gates["tau"] = self.tau - moved(clean, said.embeddings)
            change = torch.lerp(first, change, opened(gates["tau"], smooth))
        return Changed((images + change).clamp(0.0, 1.0), gates)

    def gate(self, images: Images, inner: Answer) -> PerImage:
        """How far tau of step 3 is below the threshold, where it starts at random."""
        first, clean = start(self, images, self.eps, "second start"), inner.encode(images)
        with self._apart(images):
            return self.tau - moved(clean, inner.encode(images + first))

    def _apart(self, images: Images) -> AbstractContextManager[None]:
        """Inside, the noise of a random base is that of step 3, whatever it was asked before: the gate asks less."""
        return among(torch.ones(len(images), dtype=torch.bool), f"SCC {len(layers(self))} step 3")

    def label(self, images: Images, inner: Answer, texts: TextEmbeddings) -> tuple[Logits, Labels]:
        """The probabilities of the classes, and the pseudo-label (step 2)."""

        def scores(images: Images) -> Logits:
            said = inner.hard(images)
            return cosine(said.embeddings, texts) if self.cosines else said.logits

        if self.spatial:
            views = self.seen(images, "label")
            each = scores(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        else:
            each = scores(images)[:, None]
        level = each.softmax(2).mean(1).log() if self.power else each.mean(1)
        shares = (level / self.temperature).softmax(1)
        return shares, (shares if self.label_of_views else scores(images)).argmax(1)

    def _ttc(self, steps: int) -> TTC:
        """The counterattack of TTC with the same settings, and the same noise."""
        return TTC(self.base, self.eps, self.step, steps, self.tau, self.beta)


def _mean(logits: OfViews) -> Logits:
    return logits.mean(1)


def drift(said: Said, clean: Embeddings) -> PerImage:
    """The squared distance of raw embeddings."""
    return (said.embeddings - clean).square().sum(1)


def moved(clean: Embeddings, new: Embeddings) -> PerImage:
    """How far embeddings have moved, as a share of their length."""
    return (new - clean).norm(dim=1) / clean.norm(dim=1)


def climb(
    images: Images,
    inner: Answer,
    first: Tensor,
    loss: Callable[[Said], PerImage],
    eps: float,
    length: float,
    steps: int,
    smooth: bool = False,
) -> tuple[list[Tensor], Said]:
    """The changes that signed steps up a loss go through, the first one included, and what is said at the first."""
    found, said = [first], None
    for _ in range(steps):
        gradient, here = inner.ascend(images + found[-1], loss, graph=smooth)
        said = said or here
        found.append(within(found[-1] + length * direction(gradient, smooth), images, eps))
    assert said is not None
    return found, said


def fused(found: list[Tensor], beta: float) -> Tensor:
    """The mean of the changes, the n-th with a weight proportional to exp(beta * n)."""
    weights = torch.softmax(beta * torch.arange(len(found), device=found[0].device), 0)
    return torch.stack([weight * one for weight, one in zip(weights, found, strict=True)]).sum(0)


def opened(gate: PerImage, smooth: bool) -> Tensor:
    """1 where a gate is open and 0 elsewhere, in a shape that multiplies images; or in between, smoothly."""
    return per_image(torch.sigmoid(gate / WIDTH) if smooth else (gate > 0.0).to(gate.dtype))


def direction(gradient: Tensor, smooth: bool) -> Tensor:
    """The sign of a gradient, or its smooth stand-in."""
    if not smooth:
        return gradient.sign()
    size = gradient.abs().flatten(1).mean(1) + torch.finfo(gradient.dtype).tiny
    return torch.tanh(SLOPE * gradient / per_image(size))


def check_counter(defense: Wrapper, eps: float, step: float, steps: int, tau: float) -> None:
    """Refuses settings of a counterattack that mean nothing."""
    name = type(defense).__name__
    if not 0.0 <= eps <= 1.0:
        raise CrossguardError(f"{name}(eps={eps}) is not possible; give 0 to 1, in pixels of [0, 1], such as 4/255")
    if not 0.0 < step < float("inf"):
        raise CrossguardError(f"{name}(step={step}) does not climb; give a positive fraction of eps, such as 0.25")
    if steps < 0:
        raise CrossguardError(f"{name}(steps={steps}) is not possible; give 0 or more")
    if not 0.0 <= tau <= 1.0:
        raise CrossguardError(f"{name}(tau={tau}) is no threshold of a relative change; give one from 0 to 1")
