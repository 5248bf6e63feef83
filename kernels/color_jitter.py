"""The colour chain of a batch of uint8 images: jitter in each image's own order, grayscale, Gaussian blur.

Torchvision's numbers: values are whole levels 0..255, and every operation of the jitter rounds down where
torchvision's uint8 functions do. Three launches: sums of grey for the contrast, which needs the mean of the
image as it stands at the contrast's place in the order; everything that looks at one pixel; the blur.
docs/design/0017-fused-colour.md has the reasons.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor
from torch.nn import functional as F

from cmae.kernels.backend import Backend, jit, on_device, tl, use_triton

Mode = Literal["exact", "fast"]

PARAMS = (
    "jitter",
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "order",
    "grayscale",
    "blur_sigma",
)
"""Columns of `params`."""

MAX_RADIUS = 11  # taps on each side of the blur's centre
_LUMA = (0.2989, 0.587, 0.114)
_HUE_SCALE = (256 - 1e-3) / 255  # torchvision stores the result of its hue by way of [0, 1]
_MAX_PIXELS = (1 << 31) // 255  # a sum of grey is an int32
_BLOCK = 256  # groups of four pixels a program; 49 programs make an image of 224 px
_TILE = 32  # the blur's outputs a side; it reads 64 a side, 16 more than them at each end


def color_jitter(
    images: UInt8[Tensor, "B H W 3"],
    params: Float32[Tensor, "B 8"],
    *,
    mode: Mode = "exact",
    backend: Backend = "auto",
) -> UInt8[Tensor, "B H W 3"]:
    """Jitter, grayscale and blur of every image by its own row of `params`.

    A row holds PARAMS: jitter (0 or 1), the factors of brightness, contrast and saturation, the hue's turn
    in [-0.5, 0.5] of the circle, the order (0..23: place in the lexicographic list of the orders of
    (brightness, contrast, saturation, hue)), grayscale (0 or 1), sigma of the blur in pixels (0 = none).
    These are the last eight columns of the loader's parameter matrix, so `matrix[:, -8:]` of the one copy
    on the device will do: rows may have any stride. The host never reads `params`.

    Args:
        images: Contiguous images, values 0..255.
        params: Parameters of each row, on the device of `images`.
        mode: Kind of jitter: 'exact' is torchvision's; 'fast' is one 3x3 matrix and an offset (contrast
            about mid grey, hue as a rotation in YIQ), whatever the order.
        backend: Implementation; see `cmae.kernels.backend`.

    Returns:
        New images. The blur ends at three sigma, or 11 px, with reflected borders, and rounds to nearest.

    Raises:
        ValueError: Shape, dtype or device of an argument is wrong, or the mode is unknown.
    """
    _check(images, params, mode)
    unsupported = None
    if not images.is_contiguous():
        unsupported = f"images has strides {images.stride()}; use .contiguous() or backend='torch'."
    elif params.stride(1) != 1:
        unsupported = f"params has strides {params.stride()}; the columns must be neighbours."
    elif images.shape[1] * images.shape[2] > _MAX_PIXELS:
        unsupported = (
            f"images has shape {tuple(images.shape)}; at most {_MAX_PIXELS} pixels an image."
        )
    if use_triton("color_jitter", backend, images.device, unsupported=unsupported):
        out: Tensor = torch.ops.cmae.color_jitter(images, params, mode == "exact")
        return out
    return color_jitter_reference(images, params, mode=mode)


def color_jitter_reference(
    images: UInt8[Tensor, "B H W 3"], params: Float32[Tensor, "B 8"], *, mode: Mode = "exact"
) -> UInt8[Tensor, "B H W 3"]:
    """`color_jitter` in plain torch: every operation on every image, then a choice."""
    jitter, *_, order, grayscale, sigma = params[..., None, None, None].unbind(1)  # (B, 1, 1, 1)
    x = images.permute(0, 3, 1, 2).float()
    factors = params[:, 1:5]
    changed = _jitter(x, factors, order.long()) if mode == "exact" else _twist(x, factors)
    x = torch.where(jitter != 0, changed, x)
    x = torch.where(grayscale != 0, _gray(x), x)
    x = torch.where(sigma > 0, _blur(x, sigma.flatten()), x)
    return x.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _jitter(
    x: Float[Tensor, "B 3 H W"], factors: Float32[Tensor, "B 4"], order: Tensor
) -> Float[Tensor, "B 3 H W"]:
    for number in _operations(order.flatten()):
        factor = factors.gather(1, number[:, None])[..., None, None]
        number = number[:, None, None, None]
        gray = _gray(x)
        mean = gray.sum(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
        # By a tensor: a GPU multiplies by the reciprocal of a number.
        mean = mean / torch.full_like(mean, gray[0].numel())
        of_gray, of_mean = (torch.where(number == one, 1 - factor, 0) for one in (2, 1))
        affine = (x * factor + gray * of_gray + mean * of_mean).clamp(0, 255).floor()
        x = torch.where(number == 3, _hue(x, factor), affine)
    return x


def _operations(order: Tensor) -> list[Tensor]:
    """Which operation comes first, second, ...: `order` written in the factorial number system."""
    left = torch.arange(4, device=order.device).expand(len(order), 4)
    found = []
    for places in (6, 2, 1, 1):
        digit = (order // places)[:, None]
        order = order % places
        found.append(left.gather(1, digit)[:, 0])
        kept = torch.arange(left.shape[1] - 1, device=order.device).expand(len(order), -1)
        left = left.gather(1, kept + (kept >= digit))
    return found


def _gray(x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    red, green, blue = x.split(1, dim=1)
    gray: Tensor = red * _LUMA[0]
    return gray.add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).floor_()


def _hue(x: Float[Tensor, "B 3 H W"], turn: Float32[Tensor, "B 1 1 1"]) -> Tensor:
    """The hue times the chroma lies on a circle of 6 chromas: red at 0, green at 2, blue at -2."""
    red, green, blue = x.split(1, dim=1)
    high, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    chroma = high - low
    size = green + blue - red + chroma - low
    hue = torch.copysign(size, green - blue) * _HUE_SCALE
    chroma = chroma * _HUE_SCALE
    base = high * _HUE_SCALE - chroma - chroma
    shifts = [((6 * turn.double() - centre + 3) % 6 - 3).float() for centre in (0, 2, -2)]
    turned = chroma * torch.cat(shifts, dim=1) + hue
    turned = (turned.abs() - chroma * 3).abs() + base
    return torch.minimum(torch.maximum(turned, low), high).floor()


def _twist(x: Float[Tensor, "B 3 H W"], factors: Float32[Tensor, "B 4"]) -> Tensor:
    """Saturation and hue in YIQ (NTSC 1953), contrast about mid grey, brightness."""
    brightness, contrast, saturation, turn = factors[..., None, None, None].unbind(1)
    red, green, blue = x.split(1, dim=1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    in_phase = 0.596 * red - 0.274 * green - 0.321 * blue
    quadrature = 0.211 * red - 0.523 * green + 0.311 * blue
    angle = 2 * torch.pi * turn
    cosine, sine = saturation * angle.cos(), saturation * angle.sin()
    turned = cosine * in_phase + sine * quadrature
    quadrature = cosine * quadrature - sine * in_phase
    mixed = [
        luma * of_luma + turned * of_in_phase + quadrature * of_quadrature
        for of_luma, of_in_phase, of_quadrature in _YIQ_TO_RGB
    ]
    made = torch.cat(mixed, dim=1) * (brightness * contrast) + brightness * (1 - contrast) * 128
    return made.clamp(0, 255).round()


def _blur(x: Float[Tensor, "B 3 H W"], sigma: Float32[Tensor, " B"]) -> Tensor:
    most = min(MAX_RADIUS, x.shape[2] - 1, x.shape[3] - 1)
    sigma = torch.where(sigma > 0, sigma, 1)[:, None].double()
    distance = torch.arange(most + 1, device=x.device)
    taps = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance <= (3 * sigma).ceil())
    taps = (taps / (2 * taps.sum(dim=1, keepdim=True) - taps[:, :1])).float()
    taps = taps[..., None, None, None]
    for axis in (2, 3):
        pads = (0, 0, most, most) if axis == 2 else (most, most, 0, 0)
        padded, size = F.pad(x, pads, mode="reflect"), x.shape[axis]
        x = x * taps[:, 0]
        for away in range(1, most + 1):
            pair = padded.narrow(axis, most - away, size) + padded.narrow(axis, most + away, size)
            x = x + pair * taps[:, away]
    return x.round()


def _check(images: Tensor, params: Tensor, mode: str) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(
            f"images has shape {tuple(images.shape)} and dtype {images.dtype}; expected uint8 "
            "(B, H, W, 3)."
        )
    if params.dtype != torch.float32 or params.shape != (len(images), len(PARAMS)):
        raise ValueError(
            f"params has shape {tuple(params.shape)} and dtype {params.dtype}; expected float32 "
            f"({len(images)}, {len(PARAMS)}), a row an image: {', '.join(PARAMS)}."
        )
    if params.device != images.device:
        raise ValueError(
            f"params is on {params.device} and images on {images.device}; move one of them."
        )
    if mode not in ("exact", "fast"):
        raise ValueError(f"mode={mode!r} is unknown; choose 'exact' or 'fast'.")


_YIQ_TO_RGB = (
    (0.999664321, 0.956541190, 0.620861702),
    (0.999624823, -0.272274503, -0.647451271),
    (1.002812254, -1.106848091, 1.705405678),
)
"""Inverse of the matrix in `_twist`."""


# 2^23 plus a whole number below it has that number in its low bits: conversions without the slow unit.
@jit()
def _to_float(byte):  # type: ignore[no-untyped-def]
    return (byte | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@jit()
def _to_byte(level):  # type: ignore[no-untyped-def]
    """A number in 0..255, rounded to nearest even, as int32."""
    return (level + 8388608.0).to(tl.int32, bitcast=True) & 0xFF


@jit()
def _load_pixels(images, group, num_pixels: tl.constexpr, in_words: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pixels as red + green * 2^8 + blue * 2^16, int32 (groups, 2, 2); pixel 2 i + j of a group at [i, j]."""
    if in_words:
        inside = group * 4 < num_pixels
        word0 = tl.load(images + group * 3, mask=inside, other=0)
        word1 = tl.load(images + group * 3 + 1, mask=inside, other=0)
        word2 = tl.load(images + group * 3 + 2, mask=inside, other=0)
        pixel0 = word0 & 0xFFFFFF
        pixel1 = ((word0 >> 24) & 0xFF) | ((word1 & 0xFFFF) << 8)
        pixel2 = ((word1 >> 16) & 0xFFFF) | ((word2 & 0xFF) << 16)
        pixel3 = (word2 >> 8) & 0xFFFFFF
    else:
        pixel0 = _load_bytes(images, group * 4, num_pixels)
        pixel1 = _load_bytes(images, group * 4 + 1, num_pixels)
        pixel2 = _load_bytes(images, group * 4 + 2, num_pixels)
        pixel3 = _load_bytes(images, group * 4 + 3, num_pixels)
    return tl.join(tl.join(pixel0, pixel2), tl.join(pixel1, pixel3))


@jit()
def _load_bytes(images, pixel, num_pixels: tl.constexpr):  # type: ignore[no-untyped-def]
    inside = pixel < num_pixels
    red = tl.load(images + pixel * 3, mask=inside, other=0).to(tl.int32)
    green = tl.load(images + pixel * 3 + 1, mask=inside, other=0).to(tl.int32)
    blue = tl.load(images + pixel * 3 + 2, mask=inside, other=0).to(tl.int32)
    return red | (green << 8) | (blue << 16)


@jit()
def _split_group(x):  # type: ignore[no-untyped-def]
    """The four pixels of each group."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@jit()
def _store_words(out, places, pixels, inside):  # type: ignore[no-untyped-def]
    """Groups of four packed pixels as three words each."""
    pixel0, pixel1, pixel2, pixel3 = _split_group(pixels)
    tl.store(out + places, pixel0 | (pixel1 << 24), mask=inside)
    tl.store(out + places + 1, (pixel1 >> 8) | (pixel2 << 16), mask=inside)
    tl.store(out + places + 2, (pixel2 >> 16) | (pixel3 << 8), mask=inside)


@jit()
def _channels(pixels):  # type: ignore[no-untyped-def]
    red = _to_float(pixels & 0xFF)
    green = _to_float((pixels >> 8) & 0xFF)
    return red, green, _to_float(pixels >> 16)


@jit()
def _luma(red, green, blue):  # type: ignore[no-untyped-def]
    # torch adds with fused products here, and one colour in 800 000 depends on it.
    return tl.floor(tl.fma(blue, 0.114, tl.fma(green, 0.587, red * 0.2989)))


@jit()
def _to_level(x):  # type: ignore[no-untyped-def]
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0))


@jit()
def _turn_channel(chroma, hue, base, low, high, shift):  # type: ignore[no-untyped-def]
    turned = tl.abs(tl.abs(chroma * shift + hue) - chroma * 3.0) + base
    return tl.floor(tl.minimum(tl.maximum(turned, low), high))


@jit()
def _turn_hue(red, green, blue, turn, hue_scale: tl.constexpr):  # type: ignore[no-untyped-def]
    high = tl.maximum(tl.maximum(green, blue), red)
    low = tl.minimum(tl.minimum(green, blue), red)
    chroma = high - low
    size = green + blue - red + chroma - low
    hue = tl.where(green < blue, -size, size) * hue_scale
    chroma = chroma * hue_scale
    base = high * hue_scale - chroma - chroma
    # In float64, so that each shift is rounded once; in [-3, 3), so that the sum stays on the circle.
    at = turn.to(tl.float64) * 6.0
    of_red = tl.where(at >= 3.0, at - 6.0, at).to(tl.float32)
    of_green = tl.where(at < -1.0, at + 4.0, at - 2.0).to(tl.float32)
    of_blue = tl.where(at >= 1.0, at - 4.0, at + 2.0).to(tl.float32)
    red = _turn_channel(chroma, hue, base, low, high, of_red)
    green = _turn_channel(chroma, hue, base, low, high, of_green)
    blue = _turn_channel(chroma, hue, base, low, high, of_blue)
    return red, green, blue


@jit()
def _apply_jitter(  # type: ignore[no-untyped-def]
    red, green, blue, row, mean, hue_scale: tl.constexpr, to_contrast: tl.constexpr
):
    """Four operations in the row's order, or those before its contrast.

    The order is a number in the factorial system: each digit picks one of the operations that are left,
    which are the hexadecimal digits of `left`.
    """
    rank = tl.load(row + 5).to(tl.int32)
    places = rank * 0 + 6
    left = rank * 0 + 0x3210
    active = rank * 0 + 1
    for _ in range(4):
        shift = rank // places * 4
        rank = rank % places
        places = tl.maximum(places // 3, 1)  # 6, 2, 1, 1
        operation = (left >> shift) & 0xF
        before = (1 << shift) - 1
        left = (left & before) | ((left >> 4) & (-1 - before))
        factor = tl.load(row + 1 + operation)
        if to_contrast and operation == 1:
            active = active * 0
        if active != 0:
            if operation == 3:
                if factor != 0.0:
                    red, green, blue = _turn_hue(red, green, blue, factor, hue_scale)
            elif factor != 1.0:
                if operation == 0:
                    red = _to_level(red * factor)
                    green = _to_level(green * factor)
                    blue = _to_level(blue * factor)
                elif operation == 1:
                    offset = (1.0 - factor) * mean
                    red = _to_level(red * factor + offset)
                    green = _to_level(green * factor + offset)
                    blue = _to_level(blue * factor + offset)
                else:
                    part = _luma(red, green, blue) * (1.0 - factor)
                    red = _to_level(red * factor + part)
                    green = _to_level(green * factor + part)
                    blue = _to_level(blue * factor + part)
    return red, green, blue


@jit()
def _sine_and_cosine(turn):  # type: ignore[no-untyped-def]
    """Of a turn in [-0.5, 0.5] of the circle: series of half of it. The library's take local memory."""
    half = turn * 3.141592653589793
    sq = half * half
    sine = 1.0 - sq / 42.0 * (1.0 - sq / 72.0 * (1.0 - sq / 110.0))
    sine = half * (1.0 - sq / 6.0 * (1.0 - sq / 20.0 * sine))
    cosine = 1.0 - sq / 56.0 * (1.0 - sq / 90.0 * (1.0 - sq / 132.0))
    cosine = 1.0 - sq / 2.0 * (1.0 - sq / 12.0 * (1.0 - sq / 30.0 * cosine))
    return 2.0 * sine * cosine, cosine * cosine - sine * sine


@jit()
def _apply_twist(red, green, blue, row):  # type: ignore[no-untyped-def]
    brightness = tl.load(row + 1)
    contrast = tl.load(row + 2)
    saturation = tl.load(row + 3)
    sine, cosine = _sine_and_cosine(tl.load(row + 4))
    sine, cosine = saturation * sine, saturation * cosine
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    in_phase = 0.596 * red - 0.274 * green - 0.321 * blue
    quadrature = 0.211 * red - 0.523 * green + 0.311 * blue
    turned = cosine * in_phase + sine * quadrature
    quadrature = cosine * quadrature - sine * in_phase
    gain, offset = brightness * contrast, brightness * (1.0 - contrast) * 128.0
    red = 0.999664321 * luma + 0.956541190 * turned + 0.620861702 * quadrature
    green = 0.999624823 * luma - 0.272274503 * turned - 0.647451271 * quadrature
    blue = 1.002812254 * luma - 1.106848091 * turned + 1.705405678 * quadrature
    return (
        _to_nearest(red * gain + offset),
        _to_nearest(green * gain + offset),
        _to_nearest(blue * gain + offset),
    )


@jit()
def _to_nearest(x):  # type: ignore[no-untyped-def]
    return (tl.minimum(tl.maximum(x, 0.0), 255.0) + 8388608.0) - 8388608.0


@jit()
def _gray_kernel(  # type: ignore[no-untyped-def]
    images,
    rows_of_params,
    sums,
    rows_stride,
    image_stride: tl.constexpr,
    num_pixels: tl.constexpr,
    num_blocks: tl.constexpr,
    block: tl.constexpr,
    in_words: tl.constexpr,
    hue_scale: tl.constexpr,
):
    """One program sums the grey of a part of an image as it stands before its contrast; whole numbers."""
    image = tl.program_id(0) // num_blocks
    row = rows_of_params + image.to(tl.int64) * rows_stride
    if (tl.load(row) != 0.0) & (tl.load(row + 2) != 1.0):
        group = tl.program_id(0) % num_blocks * block + tl.arange(0, block)
        pixels = _load_pixels(
            images + image.to(tl.int64) * image_stride, group, num_pixels, in_words
        )
        red, green, blue = _channels(pixels)
        red, green, blue = _apply_jitter(red, green, blue, row, 0.0, hue_scale, True)
        # Pixels past the end are black, and no operation changes that.
        gray = _to_byte(_luma(red, green, blue))
        tl.store(sums + tl.program_id(0), tl.sum(tl.sum(tl.sum(gray, axis=2), axis=1), axis=0))


@jit()
def _pixel_kernel(  # type: ignore[no-untyped-def]
    images,
    rows_of_params,
    sums,
    out,
    planes,
    rows_stride,
    image_stride: tl.constexpr,
    num_pixels: tl.constexpr,
    num_blocks: tl.constexpr,
    block: tl.constexpr,
    sums_block: tl.constexpr,
    in_words: tl.constexpr,
    exact: tl.constexpr,
    hue_scale: tl.constexpr,
):
    """One program applies jitter and grayscale to a part of an image.

    It writes to `out`, or to `planes` (B, 3, pixels) where the image will be blurred.
    """
    image = tl.program_id(0) // num_blocks
    row = rows_of_params + image.to(tl.int64) * rows_stride
    is_jittered = tl.load(row) != 0.0
    is_gray = tl.load(row + 6) != 0.0
    is_blurred = tl.load(row + 7) > 0.0
    start = image.to(tl.int64) * image_stride
    group = tl.program_id(0) % num_blocks * block + tl.arange(0, block)
    pixels = _load_pixels(images + start, group, num_pixels, in_words)
    if is_jittered | is_gray:
        red, green, blue = _channels(pixels)
        if is_jittered:
            if exact:
                mean = tl.full((), 0.0, tl.float32)
                if tl.load(row + 2) != 1.0:
                    part = tl.arange(0, sums_block)
                    parts = tl.load(
                        sums + image * num_blocks + part, mask=part < num_blocks, other=0
                    )
                    count = tl.full((), num_pixels, tl.float32)
                    mean = tl.div_rn(tl.sum(parts, axis=0).to(tl.float32), count)
                red, green, blue = _apply_jitter(red, green, blue, row, mean, hue_scale, False)
            else:
                red, green, blue = _apply_twist(red, green, blue, row)
        if is_gray:
            red = _luma(red, green, blue)
            green = red
            blue = red
        pixels = _to_byte(red) | (_to_byte(green) << 8) | (_to_byte(blue) << 16)
    if in_words:
        inside = group * 4 < num_pixels
        if is_blurred:
            place = planes + image.to(tl.int64) * image_stride + group
            plane: tl.constexpr = num_pixels // 4
            tl.store(place, _word_of_channel(pixels, 0), mask=inside)
            tl.store(place + plane, _word_of_channel(pixels, 8), mask=inside)
            tl.store(place + 2 * plane, _word_of_channel(pixels, 16), mask=inside)
        else:
            _store_words(out + start, group * 3, pixels, inside)
    else:
        corner = (2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :])[None, :, :]
        place = group[:, None, None] * 4 + corner
        inside = place < num_pixels
        if is_blurred:
            _store_channels(planes + start, place, num_pixels, pixels, inside)
        else:
            _store_channels(out + start, place * 3, 1, pixels, inside)


@jit()
def _word_of_channel(pixels, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    """One channel of the four pixels of each group."""
    byte0, byte1, byte2, byte3 = _split_group((pixels >> shift) & 0xFF)
    return byte0 | (byte1 << 8) | (byte2 << 16) | (byte3 << 24)


@jit()
def _store_channels(out, places, channel_stride: tl.constexpr, pixels, inside):  # type: ignore[no-untyped-def]
    tl.store(out + places, (pixels & 0xFF).to(tl.uint8), mask=inside)
    tl.store(out + places + channel_stride, ((pixels >> 8) & 0xFF).to(tl.uint8), mask=inside)
    tl.store(out + places + 2 * channel_stride, (pixels >> 16).to(tl.uint8), mask=inside)


@jit()
def _tap(distance, sharpness, radius):  # type: ignore[no-untyped-def]
    ratio = distance * sharpness
    return tl.where(tl.abs(distance) <= radius, tl.exp2(-ratio * ratio), 0.0)


@jit()
def _band(  # type: ignore[no-untyped-def]
    target, source, first, sharpness, radius, size: tl.constexpr, tile: tl.constexpr
):
    """Weight of each source in each target on an axis of `size`, as two fp16 parts; borders reflect.

    Targets are 0 to `tile` and sources `-tile / 2` to `3 tile / 2`, counted from `first`; all float32.
    Sources past the axis are zeros, whatever their weight.
    """
    weight = _tap(target - source, sharpness, radius)
    if first <= radius:
        mirrored = _tap(target + source + 2.0 * first, sharpness, radius)
        weight += tl.where(source + first > 0.0, mirrored, 0.0)
    last = size - 1.0 - first
    if tile + radius > last:
        mirrored = _tap(2.0 * last - source - target, sharpness, radius)
        weight += tl.where(source < last, mirrored, 0.0)
    half = tl.sum(_tap(_to_float(tl.arange(0, 16)), sharpness, radius), axis=0)
    return _halves(weight * (1.0 / (2.0 * half - 1.0)))


@jit()
def _halves(x):  # type: ignore[no-untyped-def]
    """Float32 values as the sum of two in fp16."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@jit()
def _blur_kernel(  # type: ignore[no-untyped-def]
    planes,
    rows_of_params,
    out,
    rows_stride,
    height: tl.constexpr,
    width: tl.constexpr,
    tile: tl.constexpr,
    max_radius: tl.constexpr,
    in_words: tl.constexpr,
):
    """One program blurs a tile of one image: two products with band matrices, a channel at a time.

    Levels are exact in fp16; weights and the values between the products are two fp16 numbers each.
    """
    tiles_x: tl.constexpr = (width + tile - 1) // tile
    tiles_y: tl.constexpr = (height + tile - 1) // tile
    num_pixels: tl.constexpr = height * width
    image = (tl.program_id(0) // (tiles_x * tiles_y)).to(tl.int64)
    sigma = tl.load(rows_of_params + image * rows_stride + 7)
    if sigma > 0.0:
        radius = tl.minimum(tl.ceil(3.0 * sigma), max_radius + 0.0)
        sharpness = 0.8493218002880191 / sigma  # exp2(-(distance * it)^2) is the Gaussian
        top = tl.program_id(0) // tiles_x % tiles_y * tile
        left = tl.program_id(0) % tiles_x * tile
        y_out, x_out = top + tl.arange(0, tile), left + tl.arange(0, tile)
        y_in = top - tile // 2 + tl.arange(0, 2 * tile)
        x_in = left - tile // 2 + tl.arange(0, 2 * tile)
        target = _to_float(tl.arange(0, tile))
        source = _to_float(tl.arange(0, 2 * tile)) - tile / 2
        down, down_low = _band(
            target[:, None], source[None, :], top.to(tl.float32), sharpness, radius, height, tile
        )
        across, across_low = _band(
            target[None, :], source[:, None], left.to(tl.float32), sharpness, radius, width, tile
        )
        reach = radius.to(tl.int32)
        first_row, end_row = tl.maximum(top - reach, 0), tl.minimum(top + tile + reach, height)
        rows = (y_in >= first_row) & (y_in < end_row)
        columns = (x_in >= 0) & (x_in < width)
        places = planes + image * 3 * num_pixels + y_in[:, None] * width + x_in[None, :]
        pixels = tl.zeros((tile, tile), tl.int32)
        for channel in range(3):
            byte = tl.load(
                places + channel * num_pixels, mask=rows[:, None] & columns[None, :], other=0
            )
            # 2^10 plus a byte has that byte in its low bits: a conversion without the slow unit.
            level = (byte.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0
            between = tl.dot(level, across, tl.dot(level, across_low))
            high, low = _halves(between)
            blurred = tl.dot(down, high, tl.dot(down_low, high, tl.dot(down, low)))
            pixels |= _to_byte(blurred) << (8 * channel)
        if in_words:
            groups = tl.reshape(pixels, (tile, tile // 4, 2, 2))
            x_group = left // 4 + tl.arange(0, tile // 4)
            inside = (y_out < height)[:, None] & (x_group < width // 4)[None, :]
            corner = out + image * (num_pixels // 4 * 3)
            place = y_out[:, None] * (width // 4 * 3) + x_group[None, :] * 3
            _store_words(corner, place, groups, inside)
        else:
            inside = (y_out < height)[:, None] & (x_out < width)[None, :]
            place = (y_out[:, None] * width + x_out[None, :]) * 3
            _store_channels(out + image * 3 * num_pixels, place, 1, pixels, inside)


def _launch(images: Tensor, params: Tensor, exact: bool) -> Tensor:
    out = _empty_images(images, params, exact)
    if out.numel() == 0:
        return out
    batch, height, width, _ = images.shape
    num_pixels = height * width
    num_blocks = -(-num_pixels // (4 * _BLOCK))
    planes = images.new_empty((batch, 3, height, width))
    sums = params.new_empty((batch, num_blocks), dtype=torch.int32)
    whole = _as_words(num_pixels % 4 == 0, images, out, planes)
    in_words = whole[0].dtype == torch.int32
    geometry = {
        "image_stride": num_pixels * 3 // 4 if in_words else num_pixels * 3,
        "num_pixels": num_pixels,
        "num_blocks": num_blocks,
        "block": _BLOCK,
        "in_words": in_words,
        "hue_scale": _HUE_SCALE,
        # Fused products would round otherwise than torch's operations: grey + 0 * grey loses a level.
        "enable_fp_fusion": not exact,
        "num_warps": 4,
    }
    tiles = -(-height // _TILE) * -(-width // _TILE)
    (lines,) = _as_words(width % 4 == 0, out)
    with on_device(images):
        if exact:
            _gray_kernel[(batch * num_blocks,)](
                whole[0], params, sums, params.stride(0), **geometry
            )
        _pixel_kernel[(batch * num_blocks,)](
            whole[0],
            params,
            sums,
            whole[1],
            whole[2],
            params.stride(0),
            sums_block=1 << (num_blocks - 1).bit_length(),
            exact=exact,
            **geometry,
        )
        _blur_kernel[(batch * tiles,)](
            planes,
            params,
            lines,
            params.stride(0),
            height=height,
            width=width,
            tile=_TILE,
            max_radius=min(MAX_RADIUS, height - 1, width - 1),
            in_words=lines.dtype == torch.int32,
            num_warps=4,
            num_stages=1,
        )
    return out


def _as_words(fits: bool, *tensors: Tensor) -> list[Tensor]:
    """The tensors as flat int32, or as they are where four bytes would straddle images or lines."""
    if not fits or any(tensor.data_ptr() % 4 for tensor in tensors):
        return list(tensors)
    return [tensor.view(-1).view(torch.int32) for tensor in tensors]


def _empty_images(images: Tensor, params: Tensor, exact: bool) -> Tensor:
    return images.new_empty(images.shape)


torch.library.define("cmae::color_jitter", "(Tensor images, Tensor params, bool exact) -> Tensor")
torch.library.impl("cmae::color_jitter", ("cpu", "cuda"), _launch)
torch.library.register_fake("cmae::color_jitter", _empty_images)
