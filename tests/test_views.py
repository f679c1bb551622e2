"""Views of images against Pillow, torch and closed forms."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from crossguard.models import views
from crossguard.seeds import by_position, fold, uniform
from fixtures import floats, pictures

KEYS = by_position(6) + 40

RANDOM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "crop": views.random_resized_crop,
    "flip": views.random_flip,
    "augmix": views.augmix,
    "mac": views.mac_view,
}


def smooth(count: int, height: int, width: int) -> Tensor:
    """8-bit images without hard edges, and not symmetric."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 4, 5, generator=generator)
    return (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image: Image.Image) -> Tensor:
    return floats(torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)).permute(
        2, 0, 1
    )


# --- The contract of a view ---


@pytest.mark.parametrize("name", RANDOM)
def test_a_view_follows_from_its_key_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    view, images = RANDOM[name], floats(pictures(6, 24, 24))
    before = images.clone()
    made = view(images, KEYS)
    assert made.shape == images.shape and made.min() >= 0 and made.max() <= 1 and torch.equal(images, before)
    backwards = view(images.flip(0), KEYS.flip(0)).flip(0)
    alone = torch.cat([view(images[i : i + 1], KEYS[i : i + 1]) for i in range(6)])
    monkeypatch.setattr(views, "_PIXELS", 2 * 3 * images[0].numel())
    in_parts = view(images, KEYS)
    for other in (backwards, alone, in_parts):
        assert torch.allclose(other, made, atol=1e-6)
    same = view(images[:1].expand(64, -1, -1, -1), by_position(64))
    different = len(same.unique(dim=0))
    assert different == 2 if name == "flip" else different > 60
    assert torch.equal(view(images, KEYS), in_parts)


@pytest.mark.parametrize("name", RANDOM)
def test_a_view_passes_gradients_on(name: str) -> None:
    images = (0.2 + 0.6 * floats(pictures(6, 24, 24))).requires_grad_(True)
    (slope,) = torch.autograd.grad(RANDOM[name](images, KEYS).sum(), images)
    assert bool(torch.isfinite(slope).all()) and bool(slope.flatten(1).any(1).all())


def test_repeated_views_have_keys_of_their_own() -> None:
    images = floats(pictures(3, 4, 4))
    many, keys = views.repeated(images, KEYS[:3], 5)
    assert torch.equal(many.view(3, 5, 3, 4, 4), images[:, None].expand(-1, 5, -1, -1, -1))
    assert len(keys.unique()) == 15 and torch.equal(keys.view(3, 5)[:, 1], fold(KEYS[:3], 2))
    assert torch.equal(views.repeated(images[1:2], KEYS[1:2], 5)[1], keys.view(3, 5)[1])


# --- Crops ---


def test_a_crop_is_cut_and_resized_as_by_torch() -> None:
    images = floats(pictures(5, 20, 28))
    boxes = torch.tensor([[0, 0, 20, 28], [3, 5, 10, 14], [7, 1, 6, 27], [19, 0, 1, 1], [2, 4, 17, 3]])
    found = views.crop(images, boxes.float())
    for image, (top, left, height, width), one in zip(images, boxes.tolist(), found, strict=True):
        part = image[None, :, top : top + height, left : left + width]
        expected = F.interpolate(part, (20, 28), mode="bilinear", align_corners=False)[0]
        assert torch.allclose(one, expected, atol=1e-5)
    assert torch.allclose(found[0], images[0], atol=1e-6)


def test_boxes_keep_to_their_bounds() -> None:
    keys = by_position(20000)
    boxes = views.crop_boxes(keys, 40, 40, (0.08, 1.0), (3 / 4, 4 / 3))
    top, left, height, width = boxes.unbind(1)
    assert bool(((top >= 0) & (left >= 0) & (top + height <= 40) & (left + width <= 40)).all())
    area, aspect = height * width / 1600, width / height
    assert float(area.min()) < 0.09 and float(area.max()) == 1.0
    assert float(aspect.min()) > 0.68 and float(aspect.max()) < 1.47  # 3/4 and 4/3, up to rounding of small boxes
    # Given its size, a box lies anywhere with equal probability; and no size leans to one side.
    free = (height < 40) & (width < 40)
    assert float((top / (40 - height))[free].mean()) == pytest.approx(0.5, abs=0.02)
    assert float((left / (40 - width))[free].mean()) == pytest.approx(0.5, abs=0.02)
    assert float(aspect.log().mean()) == pytest.approx(0.0, abs=0.01)
    # Without the boxes that do not fit, small areas are uniform: as many in one tenth as in the next.
    low, next_one = ((area > start) & (area < start + 0.1) for start in (0.1, 0.2))
    assert float(low.sum() / next_one.sum()) == pytest.approx(1.0, abs=0.08)


def test_where_no_box_fits_the_middle_is_taken() -> None:
    boxes = views.crop_boxes(by_position(200), 10, 100, (0.9, 1.0), (3 / 4, 4 / 3))
    assert boxes.unique(dim=0).tolist() == [[0, 43, 10, 13]]
    boxes = views.crop_boxes(by_position(200), 100, 10, (0.9, 1.0), (3 / 4, 4 / 3))
    assert boxes.unique(dim=0).tolist() == [[43, 0, 13, 10]]


def test_half_of_the_images_are_mirrored() -> None:
    images = floats(pictures(1, 3, 5)).expand(4000, -1, -1, -1)
    flipped = (views.random_flip(images, by_position(4000)) == images.flip(3)).flatten(1).all(1)
    assert float(flipped.float().mean()) == pytest.approx(0.5, abs=0.03)


def test_a_padded_crop_is_that_of_a_padded_image() -> None:
    images = floats(pictures(3, 6, 5))
    origins = torch.tensor([[2, 2], [0, 4], [3, 1]])
    found = views.padded_crop(images, origins, 2, fill=(0.1, 0.2, 0.3))
    assert torch.allclose(found[0], images[0])
    expected = torch.empty(3, 6, 5)
    expected[:] = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    expected[:, 2:, :3] = images[1, :, :4, 2:]  # two rows and two columns further up and to the right
    assert torch.allclose(found[1], expected)
    expected[:] = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    expected[:, :5, 1:] = images[2, :, 1:, :4]
    assert torch.allclose(found[2], expected)


# --- The operations of AugMix, against Pillow's ---


def test_equalize_posterize_and_solarize_are_pillow_s() -> None:
    images = torch.cat([smooth(3, 31, 37), pictures(2, 31, 37), pictures(1, 31, 37, 9, 9), pictures(1, 31, 37, 3, 4)])
    equalized = views.equalize(floats(images))
    posterized = views.posterize(floats(images), torch.full((7,), 4.0))
    solarized = views.solarize(floats(images), torch.full((7,), 231 / 255))
    for number, image in enumerate(images):
        assert torch.allclose(equalized[number], tensor(ImageOps.equalize(pillow(image))), atol=1e-6)
        assert torch.allclose(posterized[number], tensor(ImageOps.posterize(pillow(image), 4)), atol=1e-6)
        assert torch.allclose(solarized[number], tensor(ImageOps.solarize(pillow(image), 231)), atol=1e-6)


def test_autocontrast_is_pillow_s_without_its_rounding_down() -> None:
    images = torch.cat([smooth(3, 31, 37), pictures(1, 31, 37, 9, 9), pictures(1, 31, 37, 30, 70)])
    found = views.autocontrast(floats(images))
    for number, image in enumerate(images):
        away = found[number] - tensor(ImageOps.autocontrast(pillow(image)))
        assert float(away.min()) > -1e-5 and float(away.max()) < 1 / 255


@pytest.mark.parametrize(("height", "width"), [(31, 37), (24, 24)])
def test_warps_are_pillow_s(height: int, width: int) -> None:
    images = smooth(2, height, width)
    one = torch.ones(2)
    for degrees in (-2, 1, 30):
        found = views.warp(floats(images), views.rotation(degrees * one, height, width))
        for image, made in zip(images, found, strict=True):
            expected = tensor(pillow(image).rotate(degrees, resample=Image.Resampling.BILINEAR))
            assert float((made - expected).abs().max()) < 1.01 / 255
    for data in ((1, 0.03, 0, 0, 1, 0), (1, 0, 0, -0.03, 1, 0), (1, 0, 3, 0, 1, 0), (1, 0, 0, 0, 1, -5)):
        found = views.warp(floats(images), torch.tensor(data).view(1, 2, 3).expand(2, -1, -1).float())
        for image, made in zip(images, found, strict=True):
            size, kind = (width, height), Image.Transform.AFFINE
            expected = tensor(pillow(image).transform(size, kind, data, resample=Image.Resampling.BILINEAR))
            assert float((made - expected).abs().max()) < 1.01 / 255


def test_each_operation_is_drawn_alike_and_at_its_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    height, width = 8, 300
    counts, bits, thresholds = dict[str, int](), set[int](), set[int]()
    maps = list[Tensor]()

    def counted(name: str, *_: object) -> Callable[..., Tensor]:
        def operation(images: Tensor, strength: Tensor | None = None) -> Tensor:
            counts[name] = counts.get(name, 0) + len(images)
            if name == "posterize" and strength is not None:
                bits.update(strength.int().tolist())
            if name == "solarize" and strength is not None:
                thresholds.update((strength * 255).round().int().tolist())
            return images

        return operation

    for name in ("autocontrast", "equalize", "posterize", "solarize"):
        monkeypatch.setattr(views, name, counted(name))
    monkeypatch.setattr(views, "warp", lambda images, given: maps.append(given) or images)
    views._operate(torch.zeros(9000, 3, height, width), torch.arange(9000), by_position(9000), 1.0)
    assert all(abs(count - 1000) < 130 for count in counts.values()) and len(counts) == 4
    assert bits == {4} and thresholds == set(range(231, 255))  # 256 - int(25.6 * level), for levels from 0.1
    (matrix,) = maps
    plain = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    entries = (matrix - plain).abs() > 1e-7
    turned = entries[:, 0, 1] & entries[:, 1, 0]
    degrees = matrix[turned][:, 1, 0].asin() * 180 / math.pi
    assert degrees.abs().round().unique().tolist() == [1, 2]  # those of 0 degrees move nothing
    sheared = entries[:, 0, 1] & ~entries[:, 1, 0]
    assert float(matrix[sheared][:, 0, 1].abs().min()) >= 0.003 and float(matrix[sheared][:, 0, 1].abs().max()) < 0.03
    shifted = ~turned & ~entries[:, :, :2].flatten(1).any(1)
    assert matrix[shifted][:, 0, 2].abs().unique().tolist() == list(range(10))  # of 100 pixels a tenth, rounded down
    assert matrix[shifted][:, 1, 2].abs().unique().tolist() == [0]  # the image is 8 pixels high
    assert abs(int((matrix[shifted][:, 0, 2] > 0).sum()) - int((matrix[shifted][:, 0, 2] < 0).sum())) < 150


def test_augmix_of_operations_that_do_nothing_is_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = floats(pictures(40, 8, 8))
    used = list[Tensor]()
    monkeypatch.setattr(views, "_operate", lambda images, here, keys, severity: used.append(keys))
    assert torch.allclose(views.augmix(images, by_position(40)), images, atol=1e-6)
    assert len(used[0]) == 40 * 3 and 20 < len(used[2]) < len(used[1]) < 40 * 3  # about a third stops at each
    assert len(torch.cat(used).unique()) == sum(map(len, used))  # each step of each chain of each image draws its own


def test_the_weights_of_augmix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation adds one to black, so that a view is (1 - share) times the mean depth by the weights."""

    def one_more(images: Tensor, here: Tensor, keys: Tensor, severity: float) -> None:
        images[here] += 1.0

    monkeypatch.setattr(views, "_operate", one_more)
    made = views.augmix(torch.zeros(20000, 3, 1, 1), by_position(20000))[:, 0, 0, 0]
    assert float(made.min()) >= 0.0 and float(made.max()) <= 3.0
    assert float(made.mean()) == pytest.approx(0.5 * 2.0, abs=0.01)
    # E (1-m)^2 = 1/3; E (sum w d)^2 = 4 + E sum w^2 * Var d = 4 + 1/2 * 2/3.
    assert float((made**2).mean()) == pytest.approx((4 + 1 / 3) / 3, abs=0.03)


# --- Color, blur, noise, waves ---


def test_hue_turns_colors_and_leaves_gray() -> None:
    red, yellow, green = (torch.tensor(color).view(1, 3, 1, 1) for color in ([1.0, 0, 0], [1.0, 1, 0], [0.0, 1, 0]))
    third = torch.tensor([1 / 3])
    assert torch.allclose(views.shift_hue(red, third), green, atol=1e-5)
    assert torch.allclose(views.shift_hue(red, third / 2), yellow, atol=1e-5)
    assert torch.allclose(views.shift_hue(green, -third), red, atol=1e-5)
    images = floats(pictures(4, 5, 5))
    assert torch.allclose(views.shift_hue(images, torch.zeros(4)), images, atol=1e-5)
    turned = views.shift_hue(views.shift_hue(images, torch.full((4,), 0.2)), torch.full((4,), -0.2))
    assert torch.allclose(turned, images, atol=1e-5)
    flat = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(views.shift_hue(flat, torch.full((4,), 0.3)), flat)


def test_color_changes_are_the_named_ones() -> None:
    images = floats(pictures(50, 6, 6, 80, 160))
    keys = by_position(50)
    factors = 2.0 * uniform(fold(keys, 1), (4,))[:, :, None, None, None] - 1.0
    brighter = views.color_jitter(images, keys, 0.5, 0.0, 0.0, 0.0)
    assert torch.allclose(brighter, (images * (1 + 0.5 * factors[:, 0])).clamp(0, 1), atol=1e-6)
    mean = views.gray(images).mean((1, 2, 3)).view(-1, 1, 1, 1)
    contrast = views.color_jitter(images, keys, 0.0, 0.5, 0.0, 0.0)
    assert torch.allclose(contrast, (mean + (1 + 0.5 * factors[:, 1]) * (images - mean)).clamp(0, 1), atol=1e-5)
    saturated = views.color_jitter(images, keys, 0.0, 0.0, 0.5, 0.0)
    assert torch.allclose(views.gray(saturated), views.gray(images), atol=1e-5)  # luma stays, colors move away from it
    ratio = (saturated - views.gray(saturated)) / (images - views.gray(images))
    assert torch.allclose(ratio.median(), 1 + (0.5 * factors[:, 2]).median(), atol=0.1)
    assert torch.allclose(views.color_jitter(images, keys, 0.0, 0.0, 0.0, 0.0), images, atol=1e-5)


def test_a_blur_of_a_point_is_the_kernel() -> None:
    images = torch.zeros(2, 3, 9, 9)
    images[:, :, 4, 4] = 1.0
    std = torch.tensor([0.5, 1.2])
    found = views.gaussian_blur(images, std, 5)
    x = torch.arange(-2.0, 3.0)
    for one, width in zip(found, std, strict=True):
        taps = torch.exp(-0.5 * (x / width) ** 2)
        taps /= taps.sum()
        assert torch.allclose(one[1, 2:7, 2:7], taps[:, None] * taps, atol=1e-6)
        assert float(one.sum()) == pytest.approx(3.0, abs=1e-5)
    flat = torch.full((1, 3, 5, 5), 0.3)
    assert torch.allclose(views.gaussian_blur(flat, std[:1], 5), flat)


def test_an_affine_map_moves_the_middle_by_its_shift() -> None:
    """A linear ramp shows where each pixel is taken from."""
    height = width = 41
    ramp = (torch.arange(width) / width).expand(1, 3, height, -1)
    keys = by_position(30)
    turn, right, _, scale = (2.0 * uniform(keys, (4,)) - 1.0).unbind(1)
    made = views.random_affine(ramp.expand(30, -1, -1, -1), keys, degrees=5.0, shift=0.1, zoom=0.08)
    middle = (20 - (right * 4.1).round()) / width  # at shift s the middle shows what was s pixels to its left
    slope = made[:, 0, 20, 21] - made[:, 0, 20, 20]  # along a row the ramp rises by cos(turn) / scale
    expected = (turn * 5.0 * math.pi / 180).cos() / (1 + 0.08 * scale) / width
    assert torch.allclose(slope, expected, atol=1e-4)
    center = made[:, 0, 20, 20]
    near = (center - middle).abs() * width
    assert float(near.max()) < 0.1 * 4.1 + 0.6  # rotating and zooming are about the middle of the shifted image
    still = views.random_affine(ramp, KEYS[:1], degrees=0.0, shift=0.0, zoom=0.0)
    assert torch.allclose(still, ramp, atol=1e-6)


def test_half_of_mac_s_views_have_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.full((2000, 3, 5, 5), 0.5)
    monkeypatch.setattr(views, "random_affine", lambda images, keys, **_: images)
    made = views.mac_view(flat, by_position(2000))
    jittered = (made.mean((2, 3)) - 0.5).abs().amax(1) > 5e-3
    noisy = made.std((2, 3)).amax(1) > 1e-6
    assert float(noisy.float().mean()) == pytest.approx(0.5, abs=0.04)
    assert 0.35 < float(jittered[~noisy].float().mean()) < 0.5  # some factors are close to 1
    assert float(made.std((2, 3)).max()) < 0.03


def test_filters_are_pillow_s_within_and_torch_s_at_the_border() -> None:
    images = pictures(2, 12, 9)
    found = views.median(floats(images), 5)
    for image, one in zip(images, found, strict=True):
        assert torch.allclose(one, tensor(pillow(image).filter(ImageFilter.MedianFilter(5))), atol=1e-6)
    boxed = views.box_blur(floats(images), 5)
    mean = floats(images)[:, :, 3:8, 2:7].mean((2, 3))
    assert torch.allclose(boxed[:, :, 5, 4], mean, atol=1e-6)
    corner = F.pad(floats(images), (2,) * 4, mode="reflect")[:, :, :5, :5].mean((2, 3))
    assert torch.allclose(boxed[:, :, 0, 0], corner, atol=1e-6)


def test_jpeg_is_the_codec_s_with_the_gradient_of_the_identity() -> None:
    images = smooth(3, 24, 32)
    pixels = floats(images).requires_grad_(True)
    found = views.jpeg(pixels, 75)
    for image, one in zip(images, found, strict=True):
        with io.BytesIO() as file:
            pillow(image).save(file, format="JPEG", quality=75)
            assert torch.equal(one.detach(), tensor(Image.open(file)))
    near, far = ((views.jpeg(pixels, quality) - pixels).detach().square().mean() for quality in (75, 10))
    assert 0.0 < float(near) < 0.5 * float(far)
    (slope,) = torch.autograd.grad(found.sum(), pixels)
    assert torch.equal(slope, torch.ones_like(pixels))


def test_tpt_s_views_are_the_image_and_crops_of_it() -> None:
    images = floats(pictures(3, 16, 16))
    found = views.tpt_views(images, KEYS[:3], 4, mixed=False)
    assert found.shape == (3, 4, 3, 16, 16) and torch.equal(found[:, 0], images)
    many, own = views.repeated(images, KEYS[:3], 3)
    expected = views.random_flip(views.random_resized_crop(many, fold(own, 1)), fold(own, 2))
    assert torch.equal(found[:, 1:].flatten(0, 1), expected)
    mixed = views.tpt_views(images, KEYS[:3], 4)[:, 1:].flatten(0, 1)
    assert torch.equal(mixed, views.augmix(expected, fold(own, 3)))
    assert torch.equal(views.tpt_views(images, KEYS[:3], 1)[:, 0], images)


def test_low_pass_keeps_slow_waves_alone() -> None:
    x, y = torch.arange(32) / 32, torch.arange(32)[:, None] / 32
    slow = 0.5 + 0.1 * torch.cos(2 * math.pi * (3 * x + 4 * y)).expand(1, 3, -1, -1)  # five cycles along its direction
    fast = 0.1 * torch.cos(2 * math.pi * (4 * x + 4 * y)).expand(1, 3, -1, -1)
    assert torch.allclose(views.low_pass(slow + fast, 5.0), slow, atol=1e-5)
    assert torch.allclose(views.low_pass(slow, 4.9), torch.full_like(slow, 0.5), atol=1e-5)
    images = floats(pictures(2, 15, 20))
    assert torch.allclose(views.low_pass(images, 100.0), images, atol=1e-5)
