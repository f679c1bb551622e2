"""Defenses that look at several views of an image and put what they see together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from crossguard.answer import Answer, Changed, Said, around_gradient, joined, twice_differentiable
from crossguard.errors import CrossguardError
from crossguard.models import views
from crossguard.models.base import VisionLanguageModel
from crossguard.models.counterattack import check_counter, climb, drift, moved
from crossguard.models.kinds import Ensemble, OfViews, Views, combined
from crossguard.models.noise import start
from crossguard.models.tuning import entropy
from crossguard.models.views import mac_view, padded_crop, repeated, tpt_views
from crossguard.models.wrapper import Lent, Wrapper
from crossguard.seeds import derive, fold, normal, uniform
from crossguard.shapes import Embeddings, Images, PerImage


@dataclass(frozen=True)
class TTE(Ensemble):
    """Test-time transformation ensembling (Pérez et al. 2021): the mean of the logits of the image, its mirror image
    and some crops of the padded image, each mirrored too. Nothing is random: the places of the crops follow from the
    seed, and are those of all images.

    The defaults are the largest setting of the paper, 10 views, an image of 32 pixels padded by 4. In the public code,
    which draws the places from torch's generator's like, a crop never begins at the last of the places; so it is here.
    It pads normalized images by zero, that is by the mean color, here CLIP's.

    Args:
        crops: how many.
        flip: the mirror image as well.
        flip_crops: and those of the crops.
        pad: as a share of the shorter side.
        one_crop: all crops are the last one, as in the public code, which makes them in a loop that all share.
        fill: the color of the padding.
    """

    base: VisionLanguageModel
    crops: int = 4
    flip: bool = True
    flip_crops: bool = True
    pad: float = 1 / 8
    one_crop: bool = False
    fill: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops < 0:
            raise CrossguardError(f"TTE(crops={self.crops}) is not possible; give 0 or more")
        if not 0.0 <= self.pad <= 1.0:
            raise CrossguardError(f"TTE(pad={self.pad}) is no share of the shorter side; give 0 to 1")
        if len(self.fill) != 3 or not all(0.0 <= color <= 1.0 for color in self.fill):
            raise CrossguardError(f"TTE(fill={self.fill}) is no color; give three numbers of [0, 1]")

    def views(self, images: Images) -> Views:
        pad = round(self.pad * min(images.shape[-2:]))
        found = [images, images.flip(3)] if self.flip else [images]
        keys = fold(torch.full((self.crops,), derive("TTE", self.seed)), torch.arange(self.crops))
        places = (uniform(keys, (2,)) * (2 * pad)).long()
        if self.one_crop:
            places = places[-1:].expand(self.crops, -1)
        crops = [padded_crop(images, place.expand(len(images), -1), pad, self.fill) for place in places]
        if self.flip and self.flip_crops:
            # Mirrored first and then cropped, as in the public code.
            other = images.flip(3)
            crops += [padded_crop(other, place.expand(len(images), -1), pad, self.fill) for place in places]
        return torch.stack(found + crops, 1)


@dataclass(frozen=True)
class MTA(Wrapper):
    """Mean-shift for test-time augmentation (Zanella and Ben Ayed 2024): the embeddings of 64 views have a mode, in
    which each view counts by how well it fits; the image is answered as if its embedding were that mode.

    In turns, the weights of the views maximize their density at the mode, the agreement of views that answer alike and
    their own entropy; and the mode is shifted by a Gaussian kernel whose width is, for each view, its mean distance
    from the nearest three tenths of the others. The numbers, and how often each turn is taken, are those of the
    authors' code. It makes views of 224 pixels by random resized crops and mirroring.

    Args:
        views: how many there are, the image itself included.
        agreement: the weight of answering alike (lambda_q).
        spread: the weight of the entropy of the weights (lambda_y).
        nearest: the share of the other views that the width of the kernel is about.
    """

    base: VisionLanguageModel
    views: int = 64
    agreement: float = 4.0
    spread: float = 0.2
    nearest: float = 0.3
    random = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0.0 < self.nearest <= 1.0 and self.agreement >= 0.0 and self.spread > 0.0):
            raise CrossguardError(
                f"MTA(agreement={self.agreement}, spread={self.spread}, nearest={self.nearest}) is not possible; give "
                "an agreement of 0 or more, a positive spread and a share of at most 1"
            )
        if self.views < 2 or int(self.nearest * (min(self.views, 2**31) - 1)) < 1:
            raise CrossguardError(
                f"MTA(views={self.views}, nearest={self.nearest}) compares a view with no other; give more of either"
            )

    def around(self, inner: Answer, live: Lent) -> Answer:
        live.texts(inner)

        def flat(images: Images) -> Tensor:
            return tpt_views(images, self.keys(len(images), "views"), self.views, mixed=False).flatten(0, 1)

        def gather(said: Said, count: int) -> Said:
            unit = F.normalize(said.embeddings, dim=1).unflatten(0, (count, self.views))
            logits = said.logits.unflatten(0, (count, self.views))
            return _as_one(said, self.mode(unit, logits), self.views)

        return inner.before(flat, gather=gather)

    def mode(self, views: OfViews, logits: Float[Tensor, "n v classes"]) -> Embeddings:
        """The mode of the unit embeddings of the views of each image."""
        count, _, _ = views.shape
        gaps = (2.0 - 2.0 * views @ views.mT).clamp(min=0.0)  # squared distances
        near = gaps.sort(2).values[:, :, 1 : 1 + int(self.nearest * (self.views - 1))]
        width = near.mean(2).clamp(min=_NEAR)  # twice the squared width of the kernel
        alike = logits.softmax(2)
        alike = alike @ alike.mT
        weights = torch.full_like(width, 1.0 / self.views)
        mode = views[:, 0]

        def density(mode: Embeddings) -> Tensor:
            return torch.exp(-(views - mode[:, None]).square().sum(2) / width)

        for _ in range(_TURNS):
            at, going = density(mode), torch.ones(count, 1, dtype=torch.bool, device=views.device)
            for _ in range(_TURNS):
                fit = at + self.agreement * (alike * weights[:, None]).sum(2)
                new = torch.softmax(fit / self.spread, 1)
                moved = (new - weights).norm(dim=1, keepdim=True)
                weights, going = torch.where(going, new, weights), going & (moved >= _STILL)
            going = torch.ones_like(going)
            for _ in range(_TURNS):
                shares = density(mode) * weights
                new = F.normalize((shares[..., None] * views).sum(1), dim=1)
                new = torch.where(shares.any(1, keepdim=True), new, mode)  # nothing is near enough to pull
                moved = (new - mode).norm(dim=1, keepdim=True)
                mode, going = torch.where(going, new, mode), going & (moved >= _STILL)
        return mode


_TURNS, _STILL = 5, 1e-6  # of MTA: rounds of each loop at most, and the change that ends the inner ones
_NEAR = 1e-6  # a squared distance that is that of copies, whose kernel would have no width (ours)


@dataclass(frozen=True)
class DBD(Wrapper):
    """Directional bias-guided defense (Liu et al. 2026): what an attack moves an embedding by, most views move back.
    The embedding is moved by the mean displacement of the 16 surest of 31 views, 2.5 times as far where they move it in
    much the same direction.

    The views and numbers are those of the authors' code: 16 crops of at least half of the area, mirrored or not; 3 bits
    rounded down, to the nearest, and up; JPEG of quality 50, 60 and 75; noise of standard deviation 0.1, six times; the
    median, the mean and a Gaussian (standard deviation 1.1) of squares of 5 pixels. In its images of 3 bits white turns
    black, since 256 does not fit into 8 bits (`wraps`). Its views have 224 pixels, here those of the image; its prompts
    are of a language model (CuPL), here those of the task.

    Published are 64.1 % clean and 91.3 % under attack: the attack knows the label, and what undoes it points to it. An
    attack with the model's own label (`PredictedLabel`) leaves 66.8 %.

    Args:
        keep: how many of the surest views.
        tau: the threshold of the mean cosine of their displacements with the mean of these.
        factor: of the displacement above the threshold; below it is 1.
        wraps: as the code's 3-bit images do.
    """

    base: VisionLanguageModel
    keep: int = 16
    tau: float = 0.8
    factor: float = 2.5
    wraps: bool = True
    random = True
    masks = True
    thresholds = (("agreement", "tau", -1.0),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.keep <= 31:
            raise CrossguardError(f"DBD(keep={self.keep}) is not possible; give 1 to 31 views")
        if not -1.0 <= self.tau <= 1.0:
            raise CrossguardError(f"DBD(tau={self.tau}) is no threshold of a cosine; give -1 to 1")

    def seen(self, images: Images) -> Views:
        """The image and its 31 views."""
        many, keys = repeated(images, self.keys(len(images), "crops"), 16)
        crops = views.random_flip(views.random_resized_crop(many, fold(keys, 1), scale=(0.5, 1.0)), fold(keys, 2))
        levels = (images.detach() * 255.0).round() / 32.0
        coarse = torch.stack([levels.floor(), levels.round(), levels.ceil()], 1) * 32.0
        coarse = (coarse % 256.0 if self.wraps else coarse.clamp(max=255.0)) / 255.0
        coarse = coarse + (images - images.detach())[:, None]
        written = torch.stack([views.jpeg(images, quality) for quality in (50, 60, 75)], 1)
        noise = normal(self.keys(6 * len(images), "noise"), images.shape[1:], images.device)
        noisy = (images[:, None] + 0.1 * noise.unflatten(0, (len(images), 6))).clamp(0.0, 1.0)
        std = torch.full((len(images),), 1.1, device=images.device)
        smooth = torch.stack(
            [views.median(images, 5), views.box_blur(images, 5), views.gaussian_blur(images, std, 5)], 1
        )
        return torch.cat([images[:, None], crops.unflatten(0, (len(images), 16)), coarse, written, noisy, smooth], 1)

    def around(self, inner: Answer, live: Lent) -> Answer:
        live.texts(inner)

        def flat(images: Images) -> Tensor:
            return self.seen(images).flatten(0, 1)

        def moved_back(said: Said, count: int) -> tuple[Embeddings, Embeddings, PerImage]:
            unit = F.normalize(said.embeddings, dim=1).unflatten(0, (count, 32))
            sure = entropy(said.logits.unflatten(0, (count, 32))[:, 1:]).topk(self.keep, 1, largest=False).indices
            away = unit[:, 1:].gather(1, sure[..., None].expand(-1, -1, unit.shape[2])) - unit[:, :1]
            mean = away.mean(1)
            return unit[:, 0], mean, F.cosine_similarity(away, mean[:, None], dim=2).mean(1) - self.tau

        def gather(said: Said, count: int) -> Said:
            unit, mean, agreement = moved_back(said, count)
            far = torch.where(agreement > 0.0, self.factor, 1.0)
            return _as_one(said, unit + far[:, None] * mean, 32, {"agreement": agreement})

        def gate(images: Images) -> PerImage:
            return moved_back(inner.hard(flat(images)), len(images))[2]

        return inner.before(flat, gates={"agreement": gate}, gather=gather)


@dataclass(frozen=True)
class MAC(Wrapper):
    """Multi-view guided counterattack (Kim 2026): the mean of the logits of the image and of a view of it, each after
    a counterattack like TTC's, which is the weaker the less the embedding is moved by another change of view.

    The numbers are those of the authors' code: a start uniform in 8/255, four signed steps of a quarter of that up the
    squared distance from the embedding of the view as it was, and a weight of sigmoid((d - 0.7) / 0.01), where d is the
    relative move of the embedding under one more such change. An image costs 14 forwards and 8 backwards. The smooth
    stand-in is that of `TTC`.

    Args:
        eps: in pixels of [0, 1].
        step: as a fraction of eps.
        tau, temperature: of the weight.
        number: of views, the image itself included.
    """

    base: VisionLanguageModel
    eps: float = 8 / 255
    step: float = 0.25
    steps: int = 4
    tau: float = 0.7
    temperature: float = 0.01
    number: int = 2
    random = True
    masks = True
    thresholds = (("corruption", "tau", -1.0),)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counter(self, self.eps, self.step, self.steps, self.tau)
        if self.number < 1:
            raise CrossguardError(f"MAC(number={self.number}) looks at nothing; give 1 (the image itself) or more")
        if not self.temperature > 0.0:
            raise CrossguardError(f"MAC(temperature={self.temperature}) is not possible; give a positive number")

    def around(self, inner: Answer, live: Lent) -> Answer:
        del live

        def corrupted(images: Images, clean: Embeddings, ask: Answer) -> PerImage:
            return moved(clean, ask.encode(mac_view(images, self.keys(len(images), "corruption")))) - self.tau

        def counter(images: Images, ask: Answer, smooth: bool) -> Changed:
            clean = ask.encode(images)
            gate = corrupted(images, clean, ask)
            first = start(self, images, self.eps)
            change = first
            if self.steps:
                found, _ = climb(
                    images,
                    ask,
                    first,
                    lambda said: drift(said, clean),
                    self.eps,
                    self.step * self.eps,
                    self.steps,
                    smooth,
                )
                change = found[-1]
            weight = torch.sigmoid(gate / self.temperature)[:, None, None, None]
            return Changed((images + weight * change).clamp(0.0, 1.0), {"corruption": gate})

        def gate(images: Images) -> PerImage:
            return corrupted(images, inner.encode(images), inner)

        def seen(images: Images) -> Views:
            many, keys = repeated(images, self.keys(len(images), "views"), self.number - 1)
            made = mac_view(many, keys).unflatten(0, (len(images), self.number - 1))
            return torch.cat([images[:, None], made], 1)

        def smooth(images: Images) -> Changed:
            with twice_differentiable():
                return counter(images, inner.smooth, True)

        purified = inner.before(
            around_gradient(lambda images: counter(images, inner, False)), smooth, {"corruption": gate}
        )
        return combined(purified, seen, lambda logits: logits.mean(1))


def _as_one(said: Said, embeddings: Embeddings, per: int, gates: Mapping[str, PerImage] | None = None) -> Said:
    """What is said to these embeddings in place of those of so many views of each image."""
    ask = said.read
    assert ask is not None
    inside = {name: gate.unflatten(0, (len(embeddings), per)).amax(1) for name, gate in said.gates.items()}
    return Said(
        embeddings,
        lambda other: ask(other.repeat_interleave(per, 0))[::per],
        joined(gates or {}, inside),
    )
