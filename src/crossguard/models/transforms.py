"""Defenses that change every image in a way that they hope an attack does not survive."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.answer import Answer
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel, constant
from crossguard.models.kinds import Ensemble, Purifier, Transform, Views
from crossguard.models.views import crop, gaussian_pass, jpeg, low_pass, repeated
from crossguard.seeds import uniform
from crossguard.shapes import Images, Resized


@dataclass(frozen=True)
class LowPass(Transform):
    """Only the long waves of each image: the simplest filter, differentiable, and a baseline that a test-time defense
    should beat ("LPF", Ziyadinov and Tereshonok 2023, whose kernel we do not know: a reconstruction).

    Args:
        radius: where the filter ends, as a share of the highest frequency; 40/112 is that of CSR's code.
        ideal: cut off sharply there; False: a Gaussian, exp(-f^2 / 2 radius^2), as CSR takes.
    """

    base: VisionLanguageModel
    radius: float = 40 / 112
    ideal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.radius > 0.0:
            raise CrossguardError(
                f"LowPass(radius={self.radius}) leaves nothing; give a share of the highest frequency"
            )

    def transform(self, images: Images) -> Images:
        if self.ideal:
            return low_pass(images, self.radius * min(images.shape[-2:]) / 2)
        return gaussian_pass(images, self.radius)


@dataclass(frozen=True)
class ResizePad(Transform):
    """Random resizing and padding (Xie et al., ICLR 2018): each image, anew at each question, gets a random size by
    taking the nearest pixels, and a random place on a larger black canvas. Differentiable; Athalye et al. (2018) took
    all of its gain away by averaging gradients over its draws (`EOT`).

    The numbers are those of the authors' code, from 299 pixels to 310 up to 330 on a canvas of 331, as shares of the
    side; 32 pixels become 33 or 34 on 35, and the model inside resizes what it gets to its own size.

    Args:
        low: the smallest size, in sides of the image.
        high: the size of the canvas, in sides; the image stays smaller, where there is a whole pixel between.
        fill: the color of the canvas. The code that attacked it has 0.5.
    """

    base: VisionLanguageModel
    low: float = 310 / 299
    high: float = 331 / 299
    fill: float = 0.0
    random = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.low <= self.high < float("inf"):
            raise CrossguardError(
                f"ResizePad(low={self.low}, high={self.high}) is not possible; give two sizes in sides of the image, "
                "the smaller one first, such as 1.04 and 1.1"
            )
        if not 0.0 <= self.fill <= 1.0:
            raise CrossguardError(f"ResizePad(fill={self.fill}) is no color; give one from 0 to 1")

    def transform(self, images: Images) -> Resized:
        chance = uniform(self.keys(len(images)), (3,), images.device)
        gathered, inside = images, images.new_ones(len(images), 1, 1, 1)
        for axis, place in ((2, chance[:, 1]), (3, chance[:, 2])):
            side = images.shape[axis]
            canvas, least = round(self.high * side), max(1, round(self.low * side))
            size = (least + (chance[:, 0] * max(1, canvas - least)).floor()).clamp(max=canvas)
            start = (place * (canvas - size + 1)).floor()
            where = torch.arange(canvas, device=images.device) - start[:, None]
            held = (where >= 0) & (where < size[:, None])
            taken = ((where + 0.5) * side / size[:, None]).floor().long().clamp(0, side - 1)
            shape = [len(images), 1, 1, 1]
            shape[axis] = canvas
            wide = list(gathered.shape)
            wide[axis] = canvas
            gathered, inside = gathered.gather(axis, taken.view(shape).expand(wide)), inside * held.view(shape)
        return gathered * inside + self.fill * (1.0 - inside)


@dataclass(frozen=True)
class Crops(Ensemble):
    """Random crops at the size of the image, their logits averaged (Guo et al., ICLR 2018): 30 of 90 pixels out of 224,
    as in the authors' code and that of Athalye et al. (2018), who broke it. An image costs 30 forwards.

    Args:
        share: the side of a crop, as a share of that of the image.
    """

    base: VisionLanguageModel
    crops: int = 30
    share: float = 90 / 224
    random = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops < 1:
            raise CrossguardError(f"Crops(crops={self.crops}) looks at nothing; give 1 or more")
        if not 0.0 < self.share <= 1.0:
            raise CrossguardError(f"Crops(share={self.share}) is not possible; give more than 0, at most 1")

    def views(self, images: Images) -> Views:
        many, keys = repeated(images, self.keys(len(images)), self.crops)
        height, width = images.shape[-2:]
        high, wide = max(1, round(self.share * height)), max(1, round(self.share * width))
        chance = uniform(keys, (2,), images.device)
        top, left = (chance[:, 0] * (height - high + 1)).floor(), (chance[:, 1] * (width - wide + 1)).floor()
        boxes = torch.stack([top, left, torch.full_like(top, high), torch.full_like(top, wide)], 1)
        return crop(many, boxes).unflatten(0, (len(images), self.crops))


@dataclass(frozen=True)
class TotalVariation(Purifier):
    """Total variance minimization (Guo et al., ICLR 2018): most of each image is forgotten, and what comes back is the
    smoothest image that agrees with the rest. Random, and broken by Athalye et al. (2018) through BPDA and EOT.

    Minimizes |mask * (z - x)|^2 + weight * TV(z) over z, where the mask keeps each pixel with probability `keep` anew
    at each question, and TV is the sum over pixels and colors of the length of the gradient. Keep and weight are those
    of the authors' code. It minimizes by split Bregman; here it is the primal-dual method of Chambolle and Pock (2011)
    for `steps` steps: a reconstruction in what the solver leaves undone. The smooth stand-in is its first 20 steps with
    their gradient: more of them led attacks no further, and cost more.

    Args:
        keep: the share of pixels that stay.
        weight: of the total variation, for pixels in [0, 1].
        steps: of the solver.
    """

    base: VisionLanguageModel
    keep: float = 0.5
    weight: float = 0.03
    steps: int = 100
    random = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.keep <= 1.0:
            raise CrossguardError(f"TotalVariation(keep={self.keep}) is not possible; give more than 0, at most 1")
        if not 0.0 <= self.weight < float("inf"):
            raise CrossguardError(f"TotalVariation(weight={self.weight}) is not possible; give 0 or more")
        if self.steps < 1:
            raise CrossguardError(f"TotalVariation(steps={self.steps}) does nothing; give 1 or more")

    def purify(self, images: Images, inner: Answer) -> Images:
        del inner
        return self._restored(images, self.steps)

    def smoothed(self, images: Images, inner: Answer) -> Images:
        del inner
        return self._restored(images, min(self.steps, _SOLVED))

    def _restored(self, images: Images, steps: int) -> Images:
        # One mask for all colors of a pixel; the keys are asked for even where all is kept.
        kept = uniform(self.keys(len(images)), (1, *images.shape[-2:]), images.device) < self.keep
        return smoothest(images, kept.to(images.dtype), self.weight, steps).clamp(0.0, 1.0)


_SOLVED = 20  # steps of the solver that the stand-in of TotalVariation takes


def smoothest(images: Images, mask: Tensor, weight: float, steps: int) -> Images:
    """About the minimum over z of |mask * (z - x)|^2 + weight * TV(z) (`TotalVariation`), differentiable."""
    length = 1.0 / math.sqrt(8.0)  # of both kinds of steps: the gradient's norm is at most the root of 8
    blank = images.detach().mean((2, 3), keepdim=True)  # the minimum has no start, so this one has no gradient
    found = ahead = images * mask + (1.0 - mask) * blank
    down, across = torch.zeros_like(images), torch.zeros_like(images)
    for _ in range(steps):
        down = down + length * F.pad(ahead[:, :, 1:] - ahead[:, :, :-1], (0, 0, 0, 1))
        across = across + length * F.pad(ahead[..., 1:] - ahead[..., :-1], (0, 1))
        # The root of nothing has no slope, and what is as small as this is inside of the bound anyway.
        long = (down.square() + across.square()).clamp_min(torch.finfo(images.dtype).tiny).sqrt()
        size = long / weight if weight else torch.full_like(down, torch.inf)
        down, across = down / size.clamp_min(1.0), across / size.clamp_min(1.0)
        inward = F.pad(down, (0, 0, 1, 0))[:, :, :-1] - down + F.pad(across, (1, 0))[..., :-1] - across
        new = (found - length * inward + 2.0 * length * mask * images) / (1.0 + 2.0 * length * mask)
        found, ahead = new, 2.0 * new - found
    return found


@dataclass(frozen=True)
class JPEG(Purifier):
    """Each image written as JPEG and read again, through the codec (Das et al. 2017; Guo et al. 2018, who take quality
    75).

    The smooth stand-in is the same computation with rounding that has a slope (Shin and Song 2017): YCbCr, color at
    half the size, blocks of 8 by 8, the cosine transform, the quantization tables of the standard, r(x) = round(x) +
    (x - round(x))^3, and back.

    Args:
        quality: 1 to 95, as libjpeg has it.
    """

    base: VisionLanguageModel
    quality: int = 75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.quality <= 95:
            raise CrossguardError(f"JPEG(quality={self.quality}) is not possible; give 1 to 95")

    def purify(self, images: Images, inner: Answer) -> Images:
        del inner
        return jpeg(images, self.quality)

    def smoothed(self, images: Images, inner: Answer) -> Images:
        del inner
        return smooth_jpeg(images, self.quality)


_COLORS = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # JFIF: Y, Cb, Cr
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip  # ITU-T T.81, table K.1
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32,
)  # fmt: skip  # table K.2


def smooth_jpeg(images: Images, quality: int) -> Images:
    """JPEG with rounding that has a slope (`JPEG`)."""
    height, width = images.shape[-2:]
    wide = F.pad(255.0 * images, (0, -width % 16, 0, -height % 16), mode="replicate")
    colors = constant(tuple(one for row in _COLORS for one in row), images.device, images.dtype).view(3, 3)
    shifted = (
        torch.einsum("ck,nkhw->nchw", colors, wide)
        - constant((128.0, 0.0, 0.0), wide.device, wide.dtype)[:, None, None]
    )
    luma = _coded(shifted[:, :1], _LUMA, quality)
    chroma = _coded(F.avg_pool2d(shifted[:, 1:], 2), _CHROMA, quality)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    back = torch.einsum("kc,nchw->nkhw", torch.linalg.inv(colors), torch.cat([luma + 128.0, chroma], 1))
    return (back[..., :height, :width] / 255.0).clamp(0.0, 1.0)


def _coded(planes: Tensor, table: tuple[int, ...], quality: int) -> Tensor:
    """Planes of multiples of 8 pixels through the cosine transform and quantization, and back."""
    factor = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = tuple(float(min(max((one * factor + 50) // 100, 1), 255)) for one in table)
    cosines = _cosines(planes)
    blocks = planes.unfold(2, 8, 8).unfold(3, 8, 8)
    scale = constant(steps, planes.device, planes.dtype).view(8, 8)
    waves = cosines @ blocks @ cosines.T / scale
    nearest = waves.detach().round()
    found = cosines.T @ ((nearest + (waves - nearest) ** 3) * scale) @ cosines
    return found.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _cosines(like: Tensor) -> Tensor:
    """The orthonormal cosine transform of 8 samples."""
    place = torch.arange(8, device=like.device, dtype=like.dtype)
    waves = torch.cos(math.pi / 8.0 * place[:, None] * (place + 0.5)) / 2.0
    return torch.cat([waves[:1] / math.sqrt(2.0), waves[1:]])
