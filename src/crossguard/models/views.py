"""Views of images, for ensembles and for tuning at test time: pure functions of the images and of one key for each.

All randomness of a view follows from its key, so neither its batch nor its place in it changes anything. Of images in
[0, 1] all make images in [0, 1] of the same size, and pass a gradient on; where a published step has none (rounding to
a few levels, equalizing), it is that of the identity.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from crossguard.seeds import fold, uniform
from crossguard.seeds import normal as normal_noise
from crossguard.shapes import Images, Mask, PerImage, Seeds

Affine = Float[Tensor, "n 2 3"]  # where a pixel of the new image is taken from: (x, y) = A (x', y', 1), in pixels
OfImage = Float[Tensor, "n v 3 h w"]  # several views of each image
Views = Float[Tensor, "views 3 h w"]  # the same in one row
ViewKeys = Int[Tensor, " views"]
Boxes = Float[Tensor, "n 4"]  # top, left, height, width, in pixels

_PIXELS = 2**24  # that are changed at once: bounds the memory of making many views of large images
_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in gray (ITU-R 601-2)


def repeated(images: Images, keys: Seeds, count: int) -> tuple[Views, ViewKeys]:
    """Each image so many times, with a key for each view, in the order (image, view)."""
    views = torch.arange(count, device=keys.device).repeat(len(keys)) + 1
    return images.repeat_interleave(count, 0), fold(keys.repeat_interleave(count), views)


def tpt_views(images: Images, keys: Seeds, count: int, mixed: bool = True) -> OfImage:
    """The views of test-time prompt tuning (TPT, Shu et al. 2022): the image itself, and the others a random resized
    crop, mirrored or not, mixed by AugMix.

    The public code makes them at 224 pixels; here they have the size of the image.

    Args:
        count: of views, the image included.
        mixed: by AugMix, as the public code does on fine-grained sets; not, as on ImageNet and its variants.
    """
    many, own = repeated(images, keys, count - 1)
    many = random_flip(random_resized_crop(many, fold(own, 1)), fold(own, 2))
    if mixed:
        many = augmix(many, fold(own, 3))
    return torch.cat([images[:, None], many.unflatten(0, (len(images), count - 1))], 1)


# --- Crops and flips ---


def random_resized_crop(
    images: Images, keys: Seeds, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Images:
    """A box of each image, resized to the size of the image (Szegedy et al. 2015), with the defaults and the rules of
    torchvision's `RandomResizedCrop`: ten tries to find one that fits, then the largest in the middle.

    Args:
        scale: bounds of the box's share of the area.
        ratio: bounds of its width over its height, uniform on a logarithmic scale.
    """
    return crop(images, crop_boxes(keys.to(images.device), images.shape[-2], images.shape[-1], scale, ratio))


def crop_boxes(keys: Seeds, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Boxes:
    """The boxes of `random_resized_crop`."""
    area, shape, down, right = uniform(keys, (4, 10)).double().unbind(1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = (math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape).exp()
    wide, high = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (wide >= 1) & (wide <= width) & (high >= 1) & (high <= height)
    first = fits.int().argmax(1, keepdim=True)
    wide, high, down, right = (tries.gather(1, first)[:, 0] for tries in (wide, high, down, right))
    top, left = (down * (height - high + 1)).floor(), (right * (width - wide + 1)).floor()
    most = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))  # width, height
    middle = torch.tensor([(height - most[1]) // 2, (width - most[0]) // 2, most[1], most[0]], device=keys.device)
    boxes = torch.stack([top, left, high, wide], 1)
    return boxes.where(fits.any(1, keepdim=True), middle.double()).float()


def crop(images: Images, boxes: Boxes) -> Images:
    """The boxes, bilinearly resized to the size of the images."""
    height, width = images.shape[-2:]
    boxes = boxes.to(images.device)

    def cropped(part: Images, box: Tensor) -> Images:
        rows, columns = _resampling(box[:, 0], box[:, 2], height), _resampling(box[:, 1], box[:, 3], width)
        return (rows[:, None] @ part @ columns[:, None].mT).clamp(0.0, 1.0)

    return _in_parts(cropped, images, boxes)


def _resampling(start: PerImage, length: PerImage, size: int) -> Float[Tensor, "n size size"]:
    """For each image the share that each pixel of an axis has in each of the new ones, which divide the given part of
    it."""
    place = torch.arange(size, device=start.device) + 0.5
    center = start[:, None] + (length / size)[:, None] * place
    inside = (place > start[:, None]) & (place < (start + length)[:, None])
    shares = (1.0 - (place - center[..., None]).abs()).clamp(min=0.0) * inside[:, None]
    return shares / shares.sum(2, keepdim=True)


def random_flip(images: Images, keys: Seeds) -> Images:
    """Half of the images, mirrored from left to right."""
    return flip(images, uniform(keys, (), images.device) < 0.5)


def flip(images: Images, which: Mask) -> Images:
    """The marked images, mirrored from left to right."""
    return torch.where(which.to(images.device)[:, None, None, None], images.flip(3), images)


def padded_crop(
    images: Images,
    origins: Int[Tensor, "n 2"],
    pad: int,
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Images:
    """Each image, padded on all sides, from this row and column on.

    Args:
        origins: of the crop in the padded image, 0 to 2 * pad; (pad, pad) is the image itself.
        fill: the color of the padding.
    """
    height, width = images.shape[-2:]
    color = torch.tensor(fill, device=images.device).view(1, 3, 1, 1)
    wide = F.pad(images - color, (pad,) * 4) + color
    down, right = (origins.to(images.device)[:, axis, None] for axis in (0, 1))
    rows, columns = (
        start + torch.arange(size, device=images.device) for start, size in ((down, height), (right, width))
    )
    wide = wide.gather(2, rows[:, None, :, None].expand(-1, 3, -1, wide.shape[3]))
    return wide.gather(3, columns[:, None, None].expand(-1, 3, height, -1))


# --- AugMix ---


def augmix(images: Images, keys: Seeds, severity: float = 1.0) -> Images:
    """Each image mixed with what three chains of one to three operations make of it (Hendrycks et al. 2020), as in the
    public code of TPT and R-TPT: nine operations, weights from Dirichlet(1, 1, 1), the image's own share from
    Beta(1, 1), that is uniform.

    On images of 8 bits the operations are Pillow's, up to rounding; images in between are not rounded first (only
    equalizing and posterizing look at levels of 8 bits). Translations are shares of the image's own size, which the
    public code fixes at 224 pixels.

    Args:
        severity: of at most 10; 1 in the public code, where posterizing always leaves 4 bits and rotations are of
            whole degrees below 3.
    """
    keys = keys.to(images.device)

    def mixed(part: Images, own: Seeds) -> Images:
        weights = -torch.log1p(-uniform(fold(own, 1), (3,)))
        share = uniform(fold(own, 2), (1, 1, 1))
        depth = 1 + (3 * uniform(fold(own, 3), (3,))).long().flatten()
        chains, chain_keys = repeated(part, fold(own, 4), 3)
        for step in range(3):
            here = (depth > step).nonzero()[:, 0]
            _operate(chains, here, fold(chain_keys[here], step), severity)
        weights = weights / weights.sum(1, keepdim=True)
        chain = torch.einsum("nk,nkp->np", weights, chains.unflatten(0, (len(part), 3)).flatten(2)).view_as(part)
        return share * part + (1.0 - share) * chain

    return _in_parts(mixed, images, keys, copies=3)


def _operate(images: Images, here: Int[Tensor, " some"], keys: Int[Tensor, " some"], severity: float) -> None:
    """Changes each of the images at these places by one of the nine operations of AugMix."""
    which, level, sign = uniform(keys, (3,)).unbind(1)
    which = (9 * which).long()
    level = (0.1 + (severity - 0.1) * level) / 10.0  # of the greatest strength of each operation
    sign = torch.where(sign < 0.5, -1.0, 1.0)
    height, width = images.shape[-2:]
    whole: Sequence[Callable[[Tensor, Tensor], Tensor]] = (
        lambda part, _: autocontrast(part),
        lambda part, _: equalize(part),
        lambda part, strength: posterize(part, 4 - (4 * strength).floor()),
        lambda part, strength: solarize(part, (256 - (256 * strength).floor()) / 255.0),
    )
    for number, operation in enumerate(whole):
        drawn = (which == number).nonzero()[:, 0]
        if len(drawn):
            images[here[drawn]] = operation(images[here[drawn]], level[drawn])
    drawn = (which >= len(whole)).nonzero()[:, 0]
    if len(drawn):
        kind, level, sign = which[drawn] - len(whole), level[drawn], sign[drawn]
        zero = torch.zeros_like(level)
        maps = torch.stack(
            [
                rotation((30 * level).floor() * sign, height, width),
                _affine(1 + zero, 0.3 * level * sign, zero, zero, 1 + zero, zero),
                _affine(1 + zero, zero, zero, 0.3 * level * sign, 1 + zero, zero),
                _affine(1 + zero, zero, (width / 3 * level).floor() * sign, zero, 1 + zero, zero),
                _affine(1 + zero, zero, zero, zero, 1 + zero, (height / 3 * level).floor() * sign),
            ],
            1,
        )
        chosen = maps[torch.arange(len(drawn), device=kind.device), kind]
        images[here[drawn]] = warp(images[here[drawn]], chosen)


def autocontrast(images: Images) -> Images:
    """Each color stretched to the full range."""
    flat = images.detach().flatten(2)
    low, high = flat.amin(2)[..., None, None], flat.amax(2)[..., None, None]
    return torch.where(high > low, (images - low) / (high - low).where(high > low, 1.0), images)


def equalize(images: Images) -> Images:
    """Each color spread so that all of its 256 levels are about equally frequent, by Pillow's rule. Its gradient is
    that of the identity."""
    levels = (images.detach() * 255.0).round().long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=images.device)
    counts = counts.scatter_add(2, levels, torch.ones_like(levels))
    top = levels.amax(2, keepdim=True)
    step = (levels.shape[2] - counts.gather(2, top)) // 255
    below = counts.cumsum(2) - counts
    table = (step // 2 + below) // step.clamp(min=1)
    found = table.gather(2, levels).clamp(max=255).view_as(images) / 255.0
    hard = torch.where((step > 0)[..., None], found, images.detach())
    return hard + (images - images.detach())  # plus zero, exactly


def posterize(images: Images, bits: PerImage) -> Images:
    """Each pixel with only its highest bits of 8. Its gradient is that of the identity."""
    size = 2.0 ** (8 - bits).view(-1, 1, 1, 1)
    hard = ((images.detach() * 255.0).round() / size).floor() * size / 255.0
    return hard + (images - images.detach())  # plus zero, exactly


def solarize(images: Images, threshold: PerImage) -> Images:
    """Pixels from a threshold on are turned into their negative."""
    return torch.where(images < threshold.view(-1, 1, 1, 1) - 1e-6, images, 1.0 - images)


# --- Warps ---


def rotation(degrees: PerImage, height: int, width: int) -> Affine:
    """Rotates counterclockwise about the middle."""
    angle = degrees * (math.pi / 180.0)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return _affine(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _affine(*entries: PerImage) -> Affine:
    return torch.stack(entries, 1).view(-1, 2, 3)


def warp(images: Images, maps: Affine) -> Images:
    """Each pixel from where its map says, bilinear; black where that is outside of the image (as Pillow does it)."""
    height, width = images.shape[-2:]
    y, x = (torch.arange(size, device=images.device) + 0.5 for size in (height, width))
    pixels = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width), x.new_ones(height, width)], 2)
    scale = 2.0 / torch.tensor([[width], [height]], device=images.device)
    grid = (pixels.view(-1, 3) @ (maps * scale).mT - 1.0).view(-1, height, width, 2)  # from -1 to 1 in the image
    found = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1.0) & (grid < 1.0)).all(3)
    return (found * inside[:, None]).clamp(0.0, 1.0)


# --- Affine, color, blur and noise, as MAC draws them ---


def mac_view(images: Images, keys: Seeds) -> Images:
    """A view of MAC (Kim 2026): a small affine map, and each with a probability of one half a change of color, a blur
    and noise; the numbers are those of its public code.

    Args:
        keys: of the views.
    """
    keys = keys.to(images.device)
    happens = uniform(fold(keys, 1), (3,)) < 0.5

    def view(part: Images, own: Seeds, happen: Tensor) -> Images:
        part = random_affine(part, fold(own, 2), degrees=5.0, shift=0.04, zoom=0.08)
        for number, change in enumerate((_jittered, _blurred, _noisy)):
            part = torch.where(happen[:, number, None, None, None], change(part, fold(own, 3 + number)), part)
        return part

    return _in_parts(view, images, keys, happens)


def random_affine(images: Images, keys: Seeds, degrees: float, shift: float, zoom: float) -> Images:
    """Each image rotated about its middle, shifted by whole pixels and zoomed, each uniformly up to a bound; black
    where nothing is left.

    Args:
        shift: as a share of the sides.
        zoom: the greatest change of the scale 1.
    """
    height, width = images.shape[-2:]
    turn, right, down, scale = (2.0 * uniform(keys, (4,), images.device) - 1.0).unbind(1)
    maps = rotation(degrees * turn, height, width)
    right, down = (right * (shift * width)).round(), (down * (shift * height)).round()
    middle = torch.tensor([width / 2, height / 2], device=images.device)
    linear = maps[:, :, :2] / (1.0 + zoom * scale)[:, None, None]
    offset = middle - (linear @ (middle + torch.stack([right, down], 1))[..., None])[..., 0]
    return warp(images, torch.cat([linear, offset[..., None]], 2))


def _jittered(images: Images, keys: Seeds) -> Images:
    return color_jitter(images, keys, brightness=0.08, contrast=0.08, saturation=0.08, hue=0.02)


def _blurred(images: Images, keys: Seeds) -> Images:
    return gaussian_blur(images, 0.5 + 0.7 * uniform(keys, ()), 5)


def _noisy(images: Images, keys: Seeds) -> Images:
    std = 0.02 * uniform(fold(keys, 1), (1, 1, 1))
    return (images + std * normal_noise(fold(keys, 2), images.shape[1:])).clamp(0.0, 1.0)


def color_jitter(
    images: Images, keys: Seeds, brightness: float, contrast: float, saturation: float, hue: float
) -> Images:
    """Brightness, contrast, saturation and hue changed in an order of each image's own, each by a factor uniform about
    1 up to the given change (hue: a share of the circle of colors)."""
    keys = keys.to(images.device)
    factors = 2.0 * uniform(fold(keys, 1), (4,)) - 1.0
    order = uniform(fold(keys, 2), (4,)).argsort(1)
    changes: Sequence[Callable[[Images, Tensor], Images]] = (
        lambda part, by: (part * (1.0 + brightness * by)).clamp(0.0, 1.0),
        lambda part, by: _blended(part, gray(part).mean((2, 3), keepdim=True), 1.0 + contrast * by),
        lambda part, by: _blended(part, gray(part), 1.0 + saturation * by),
        lambda part, by: shift_hue(part, hue * by[:, 0, 0, 0]),
    )
    for step in range(4):
        changed = images
        for number, change in enumerate(changes):
            here = (order[:, step] == number).nonzero()[:, 0]
            if len(here):
                made = change(images[here], factors[here, number, None, None, None])
                changed = changed.index_copy(0, here, made)
        images = changed
    return images


def gray(images: Images) -> Float[Tensor, "n 1 h w"]:
    """The luma of each pixel."""
    return (images * torch.tensor(_LUMA, device=images.device).view(3, 1, 1)).sum(1, keepdim=True)


def _blended(images: Images, other: Tensor, share: Tensor) -> Images:
    return (share * images + (1.0 - share) * other).clamp(0.0, 1.0)


def shift_hue(images: Images, turn: PerImage) -> Images:
    """The hue of each image turned by a share of the circle of colors; what is gray stays as it is."""
    top, low = images.amax(1), images.amin(1)
    span = top - low
    safe = span.where(span > 0, 1.0)
    red, green, blue = images.unbind(1)
    hue = torch.where(
        red == top,
        (green - blue) / safe,
        torch.where(green == top, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    hue = hue + 6.0 * turn[:, None, None]
    place = (torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1) + hue[:, None]) % 6.0
    return top[:, None] - span[:, None] * torch.minimum(place, 4.0 - place).clamp(0.0, 1.0)


def gaussian_blur(images: Images, std: PerImage, size: int) -> Images:
    """Each image blurred by a Gaussian of its own standard deviation (in pixels), cut at so many taps and normalized;
    the border is mirrored."""
    half = size // 2
    offsets = torch.arange(-half, half + 1, device=images.device)
    taps = torch.exp(-0.5 * (offsets / std.to(images.device)[:, None]) ** 2)
    taps = taps / taps.sum(1, keepdim=True)
    images = F.pad(images, (half,) * 4, mode="reflect")
    for axis in (2, 3):
        parts = images.unfold(axis, size, 1)  # the taps come last
        images = (parts * taps[:, None, None, None]).sum(-1)
    return images


def box_blur(images: Images, size: int) -> Images:
    """Each pixel the mean of a square about it; the border is mirrored."""
    return F.avg_pool2d(F.pad(images, (size // 2,) * 4, mode="reflect"), size, stride=1)


def median(images: Images, size: int) -> Images:
    """Each pixel the median of a square about it; the border is repeated."""
    wide = F.pad(images, (size // 2,) * 4, mode="replicate")
    return wide.unfold(2, size, 1).unfold(3, size, 1).flatten(4).median(4).values


def jpeg(images: Images, quality: int) -> Images:
    """Each image written as JPEG by Pillow and read again, through 8 bits. Its gradient is that of the identity."""
    levels = (images.detach() * 255.0).round().clamp(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    read = list[Tensor]()
    for pixels in levels:
        with io.BytesIO() as file:
            Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
            with Image.open(file) as image:
                read.append(torch.from_numpy(np.array(image)))
    hard = torch.stack(read).permute(0, 3, 1, 2).to(images.device, images.dtype) / 255.0
    return hard + (images - images.detach())  # plus zero, exactly


def low_pass(images: Images, radius: float) -> Images:
    """Only the waves of at most `radius` cycles per image side, counted along its direction."""
    height, width = images.shape[-2:]
    down = torch.fft.fftfreq(height, 1.0 / height, device=images.device)
    across = torch.fft.rfftfreq(width, 1.0 / width, device=images.device)
    kept = (down[:, None] ** 2 + across**2) <= radius**2
    return torch.fft.irfft2(torch.fft.rfft2(images) * kept, s=(height, width)).clamp(0.0, 1.0)


def gaussian_pass(images: Images, radius: float) -> Images:
    """Each wave times exp(-f^2 / 2 radius^2), f its frequency as a share of the highest that the side holds: fewer and
    fewer of the short waves."""
    height, width = images.shape[-2:]
    down = torch.fft.fftfreq(height, 0.5, device=images.device)
    across = torch.fft.rfftfreq(width, 0.5, device=images.device)
    kept = torch.exp(-(down[:, None] ** 2 + across**2) / (2.0 * radius**2))
    return torch.fft.irfft2(torch.fft.rfft2(images) * kept, s=(height, width)).clamp(0.0, 1.0)


def _in_parts(change: Callable[..., Images], images: Images, *given: Tensor, copies: int = 1) -> Images:
    """What is made of the images, so many of them at once that the memory stays bounded."""
    step = max(1, _PIXELS // (copies * math.prod(images.shape[1:])))
    if len(images) <= step:
        return change(images, *given)
    parts = zip(images.split(step), *(one.split(step) for one in given), strict=True)
    return torch.cat([change(*part) for part in parts])
