"""Defenses that look first whether an image was attacked, and act where they think so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.answer import Answer, Changed, Gate, Said, around_gradient, joined, twice_differentiable
from crossguard.budgets import per_image
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.confidence import unit
from crossguard.models.counterattack import WIDTH, check_counter, direction, drift
from crossguard.models.noise import start, within
from crossguard.models.views import gaussian_pass
from crossguard.models.wrapper import Lent, Wrapper
from crossguard.seeds import among
from crossguard.shapes import Embeddings, Images, Logits, Mask, PerImage


@dataclass(frozen=True)
class DOC(Wrapper):
    """Directional orthogonal counterattack (Jiang et al., AAAI 2026): a test-time counterattack (TTC) whose steps look
    aside, for those of a gradient alone all go one way.

    From uniform noise d0 each step goes along the sign of a momentum m = momentum * m + (1 - momentum) * (g + aside *
    r), where g is the gradient of the drift |f(x + d) - f(x)| at length 1 and r is Gaussian noise, made orthogonal to
    g, at length 1. The image is then moved by w * d + (1 - w) * d0, w = sigmoid(sharpness * (tau - score)): the score
    is 1 minus the mean cosine of the embedding with those of `draws` noisy copies, small where noise hardly turns it.
    The gate is open where w is above one half.

    Formulas, eps, step and steps are those of the paper; `aside`, `momentum`, `tau`, `sharpness` and `draws` stand only
    in a supplement that is not to be had, and are those of a re-implementation by others: a reconstruction in these.
    Equation 10 has noise of plus or minus eps in each pixel, Algorithm 1 uniform noise; the first is the default. An
    image costs 11 forwards and 4 backwards, whether it is moved or not.

    The smooth stand-in is ours: each sign a tanh of the momentum over its mean size; w is smooth as published.

    Args:
        eps: in pixels of [0, 1].
        step: as a fraction of eps.
        aside: the length of the part that is orthogonal to the gradient.
        tau: the threshold of the score.
        draws: of noise, for the score.
        signs: noise of plus or minus eps for the score; False: uniform.
    """

    base: VisionLanguageModel
    eps: float = 4 / 255
    step: float = 0.75
    steps: int = 4
    aside: float = 0.05
    momentum: float = 0.75
    tau: float = 0.3
    sharpness: float = 20.0
    draws: int = 5
    signs: bool = True
    random = True
    masks = True
    thresholds = (("score", "tau", 1.0),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counter(self, self.eps, self.step, self.steps, self.tau)
        if not 0.0 <= self.momentum < 1.0:
            raise CrossguardError(f"DOC(momentum={self.momentum}) is not possible; give 0 or more, below 1")
        if not self.aside >= 0.0 or not self.sharpness > 0.0:
            raise CrossguardError(f"DOC(aside={self.aside}, sharpness={self.sharpness}) is not possible; give positive")
        _check_draws(self, self.draws)

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live

        def smooth(images: Images) -> Changed:
            with twice_differentiable():
                return self.counter(images, inner.smooth, smooth=True)

        return inner.before(
            around_gradient(lambda images: self.counter(images, inner)),
            smooth,
            {"score": lambda images: self.tau - self._score(images, inner)[0]},
        )

    def counter(self, images: Images, inner: Answer, smooth: bool = False) -> Changed:
        """The images after the counterattack, and its gate."""
        score, clean = self._score(images, inner)
        first = start(self, images, self.eps)
        change, way = first, torch.zeros_like(images)
        for _ in range(self.steps):
            gradient, _ = inner.ascend(images + change, lambda said: drift(said, clean), graph=smooth)
            straight = unit(gradient)
            noise = self.normal(images, "aside")
            noise = unit(noise - per_image((noise * straight).flatten(1).sum(1)) * straight)
            way = self.momentum * way + (1.0 - self.momentum) * (straight + self.aside * noise)
            change = within(change + self.step * self.eps * direction(way, smooth), images, self.eps)
        share = torch.sigmoid(self.sharpness * (self.tau - score))
        return Changed(
            (images + torch.lerp(first, change, per_image(share))).clamp(0.0, 1.0), {"score": self.tau - score}
        )

    def _score(self, images: Images, inner: Answer) -> tuple[PerImage, Embeddings]:
        """How far noise turns the embeddings, and the embeddings."""
        clean = inner.encode(images)

        def noise(images: Images) -> Tensor:
            return self.eps * (self.normal(images, "score").sign() if self.signs else self.uniform(images, "score"))

        return turned(images, clean, inner, noise, self.draws), clean


@dataclass(frozen=True)
class CSR(Wrapper):
    """Contrastive spectral rectification (CSR, ICML 2026): an image is taken for attacked if its low waves look
    different to the model, and is then driven from its own embedding to that of its low waves.

    Acts where the cosine of f(x) with f(low(x)) is below tau. There it takes signed steps up cos(f(z), f(low(x))) -
    cos(f(z), f(x)) within eps of x, and keeps the best of all points on the way, x included.

    Filter and numbers are those of the authors' code, found at 224 pixels a side: the filter multiplies a wave of k
    cycles a side by exp(-k^2 / 2 r^2), r = 40, which is 40/112 of the shortest wave that 224 pixels hold. Their radius
    is in cycles; here it is that share, so that it means the same at all sizes. An image costs 3 forwards, and one that
    is taken for attacked 4 forwards and 3 backwards more. (The code computes f(x) once more for these.)

    The smooth stand-in is ours: each sign a tanh of the gradient over its mean size, the threshold a sigmoid.

    Args:
        eps: in pixels of [0, 1].
        step: as a fraction of eps.
        tau: the threshold of the cosine.
        radius: of the filter, as a share of the highest frequency.
    """

    base: VisionLanguageModel
    eps: float = 4 / 255
    step: float = 0.5
    steps: int = 3
    tau: float = 0.85
    radius: float = 40 / 112
    masks = True
    thresholds = (("cosine", "tau", 1.0),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counter(self, self.eps, self.step, self.steps, self.tau)
        if not self.radius > 0.0:
            raise CrossguardError(f"CSR(radius={self.radius}) leaves nothing; give a share of the highest frequency")

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live

        def purify(images: Images) -> Changed:
            own, low = self._seen(images, inner)
            gate = self.tau - _cosine(own, low)
            attacked = gate > 0.0
            made = images.clone()
            with among(attacked, "CSR"):
                if bool(attacked.any()):
                    made[attacked] = self._rectified(images[attacked], own[attacked], low[attacked], inner)
            return Changed(made, {"cosine": gate})

        def smooth(images: Images) -> Changed:
            with twice_differentiable():
                own, low = self._seen(images, inner.smooth)
                gate = self.tau - _cosine(own, low)
                with among(torch.ones_like(gate, dtype=torch.bool), "CSR"):
                    made = self._rectified(images, own, low, inner.smooth, smooth=True)
            return Changed(torch.lerp(images, made, per_image(torch.sigmoid(gate / WIDTH))), {"cosine": gate})

        def gate(images: Images) -> PerImage:
            return self.tau - _cosine(*self._seen(images, inner))

        return inner.before(around_gradient(purify), smooth, {"cosine": gate})

    def _seen(self, images: Images, inner: Answer) -> tuple[Embeddings, Embeddings]:
        """The embeddings of images and of their low waves."""
        return inner.encode(images), inner.encode(gaussian_pass(images, self.radius))

    def _rectified(
        self, images: Images, own: Embeddings, low: Embeddings, inner: Answer, smooth: bool = False
    ) -> Images:
        def score(said: Said) -> PerImage:
            return _cosine(said.embeddings, low) - _cosine(said.embeddings, own)

        found, best, most = images, images, torch.full_like(own[:, 0], -torch.inf)
        for number in range(self.steps + 1):
            if number < self.steps:
                gradient, said = inner.ascend(found, score, graph=smooth)
            else:
                gradient, said = torch.zeros_like(images), inner.hard(found)
            now = score(said)
            better = now > most
            best, most = torch.where(per_image(better), found, best), torch.where(better, now, most)
            change = found - images + self.step * self.eps * direction(gradient, smooth)
            found = (images + within(change, images, self.eps)).clamp(0.0, 1.0)
        return best


@dataclass(frozen=True)
class Gated(Wrapper):
    """A gate before a defense, after Malik et al. (2026): it acts only where strong noise turns the embedding far.

    The embedding of an attacked image moves less than that of a clean one under weak noise, which defenses such as TTC
    look for, and more under strong noise, which the paper finds to tell them apart better. The drift is 1 minus the
    cosine of the undefended model's embeddings of the image and of its noisy copies (their mean). Where it is above
    `tau` the defense answers, elsewhere the model without it, so that a clean image costs `draws` + 1 forwards beside
    its own: the defense is not even asked.

    A reconstruction from the abstract: how strong the noise is, what kind, how the drift is measured and the threshold
    are ours, found on one model at 224 pixels, and mean little on another until they are calibrated (`crossguard
    calibrate`). On adversarially trained models there is, the paper says, nothing to tell. Around a model without a
    defense it changes nothing.

    The smooth stand-in is ours: answers of both, mixed by a sigmoid of the gate.

    Args:
        base: a defended model; of several defenses, the outermost is what the gate is for.
        eps: uniform noise in [-eps, eps], in pixels of [0, 1].
        tau: the threshold of the drift; 0 opens the gate for all images.
        draws: of noise.
    """

    base: VisionLanguageModel
    eps: float = 32 / 255
    tau: float = 0.3
    draws: int = 1
    random = True
    masks = True
    thresholds = (("drift", "tau", -1.0),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.eps <= 1.0:
            raise CrossguardError(f"Gated(eps={self.eps}) is not possible; give 0 to 1, in pixels of [0, 1]")
        if not 0.0 <= self.tau <= 1.0:
            raise CrossguardError(f"Gated(tau={self.tau}) is no threshold of a drift; give one from 0 to 1")
        _check_draws(self, self.draws)

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live
        bare, seen = inner.inner or inner, inner.without()
        # A wrapper tells its own gates before those inside of it, so these are the last, whatever they are called here.
        names = list(inner.gates)
        below = dict(zip(names[len(names) - len(bare.gates) :], bare.gates, strict=True))

        def noise(images: Images) -> Tensor:
            return self.eps * self.uniform(images)

        def gate(images: Images) -> PerImage:
            return turned(images, seen.encode(images), seen, noise, self.draws) - self.tau

        def hard(images: Images) -> Said:
            with torch.no_grad():
                found = gate(images)
            parts = list[tuple[Mask, Said]]()
            told = dict.fromkeys(names, found)
            for which, answer, name in ((found > 0.0, inner, "open"), (found <= 0.0, bare, "shut")):
                with among(which, name):
                    if not bool(which.any()):
                        continue
                    said = answer.hard(images[which])
                parts.append((which, said))
                for known in names:
                    value = said.gates.get(known if answer is inner else below.get(known, ""))
                    if value is not None:
                        told[known] = told[known].masked_scatter(which, value)
            return _merged(parts, joined({"drift": found}, told))

        def soft(images: Images) -> Said:
            found = gate(images)
            share, every = torch.sigmoid(found / WIDTH)[:, None], torch.ones_like(found, dtype=torch.bool)
            with among(every, "open"):
                defended = inner.smooth.hard(images)
            with among(every, "shut"):
                plain = bare.smooth.hard(images)
            return Said(
                torch.lerp(plain.embeddings, defended.embeddings, share),
                None
                if plain.read is None
                else lambda embeddings: torch.lerp(_read(plain, embeddings), _read(defended, embeddings), share),
                {"drift": found},
                None if plain.read is None else lambda: torch.lerp(plain.logits, defended.logits, share),
            )

        def inside(name: str) -> Gate:
            def measure(images: Images) -> PerImage:
                found = gate(images)
                measured = found
                shut = bare.gates.get(below.get(name, ""))
                for which, asked, use in ((found > 0.0, inner.gates[name], "open"), (found <= 0.0, shut, "shut")):
                    with among(which, use):
                        if asked is not None and bool(which.any()):
                            measured = measured.masked_scatter(which, asked(images[which]))
                return measured

            return measure

        gates = joined({"drift": gate}, {name: inside(name) for name in names})
        return replace(inner, hard=hard, soft=soft, gates=gates)


def turned(images: Images, clean: Embeddings, inner: Answer, noise: Callable[[Images], Tensor], draws: int) -> PerImage:
    """1 minus the mean cosine of embeddings with those of noisy copies of the images."""
    found = images.new_zeros(len(images))
    for _ in range(draws):
        found = found + _cosine(inner.encode((images + noise(images)).clamp(0.0, 1.0)), clean)
    return 1.0 - found / draws


def _merged(parts: Sequence[tuple[Mask, Said]], gates: Mapping[str, PerImage]) -> Said:
    """What is said to a batch, from what is said to its parts."""

    def whole(values: Callable[[Mask, Said], Tensor]) -> Tensor:
        found = [(which, values(which, said)) for which, said in parts]
        made = found[0][1]
        if len(found) > 1:
            made = made.new_zeros(len(found[0][0]), *made.shape[1:])
            for which, part in found:
                made = made.index_put((which,), part)
        return made

    known = all(said.read is not None for _, said in parts)
    return Said(
        whole(lambda _, said: said.embeddings),
        (lambda embeddings: whole(lambda which, said: _read(said, embeddings[which]))) if known else None,
        gates,
        (lambda: whole(lambda _, said: said.logits)) if known else None,
    )


def _read(said: Said, embeddings: Embeddings) -> Logits:
    assert said.read is not None
    return said.read(embeddings)


def _cosine(one: Embeddings, other: Embeddings) -> PerImage:
    return F.cosine_similarity(one, other, dim=1)


def _check_draws(defense: Wrapper, draws: int) -> None:
    if draws < 1:
        raise CrossguardError(f"{type(defense).__name__}(draws={draws}) looks at nothing; give 1 or more")
