"""Defenses that attack back: they move an image, by an attack without labels, to where it is told better what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crossguard.answer import Answer, Changed, Said, around_gradient, twice_differentiable
from crossguard.budgets import per_image
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.noise import start, within
from crossguard.models.wrapper import Live, Wrapper
from crossguard.shapes import Embeddings, Images, PerImage

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counter(self, self.eps, self.step, self.steps, self.tau)

    def around(self, inner: Answer, live: Live) -> Answer:
        del live
        if self.steps == 0:
            return inner.before(lambda images: (images + start(self, images, self.eps)).clamp(0.0, 1.0))
        judge = inner if self.tau_model is None else self.tau_model.answer()

        def purify(images: Images) -> Changed:
            return self.counter(images, inner, judge)

        def smooth(images: Images) -> Changed:
            with twice_differentiable():
                return self.counter(images, inner.smooth, judge.smooth, smooth=True)

        def gate(images: Images) -> PerImage:
            first = start(self, images, self.eps)
            return self.tau - moved(judge.encode(images), judge.encode(images + first))

        return inner.before(around_gradient(purify), smooth, {"tau": gate})

    def counter(self, images: Images, inner: Answer, judge: Answer, smooth: bool = False) -> Changed:
        """The images after the counterattack, and its gate.

        Args:
            judge: whose embeddings the threshold is about.
            smooth: by the smooth stand-in.
        """
        clean = inner.encode(images)
        first = start(self, images, self.eps)
        found, said = climb(
            images, inner, first, lambda said: drift(said, clean), self.eps, self.step * self.eps, self.steps, smooth
        )
        if judge is inner:
            tau = moved(clean, said.embeddings)
        else:
            tau = moved(judge.encode(images), judge.encode(images + first))
        return fused(images, found, self.beta, self.tau - tau, first if self.noise_on_clean else None, "tau", smooth)


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
        found.append(within(found[-1] + length * _direction(gradient, smooth), images, eps))
    assert said is not None
    return found, said


def fused(
    images: Images, found: list[Tensor], beta: float, gate: PerImage, else_: Tensor | None, name: str, smooth: bool
) -> Changed:
    """The images moved by the weighted mean of the changes where the gate is open, and elsewhere by another one.

    Args:
        beta: the weight of the n-th change is proportional to exp(beta * n).
        else_: the change where the gate is shut; none, if None.
        name: of the gate.
    """
    weights = torch.softmax(beta * torch.arange(len(found), device=images.device), 0)
    change = torch.stack([weight * one for weight, one in zip(weights, found, strict=True)]).sum(0)
    other = torch.zeros_like(images) if else_ is None else else_
    share = torch.sigmoid(gate / WIDTH) if smooth else (gate > 0.0).to(images.dtype)
    made = torch.lerp(other, change, per_image(share))
    return Changed((images + made).clamp(0.0, 1.0), {name: gate})


def _direction(gradient: Tensor, smooth: bool) -> Tensor:
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
