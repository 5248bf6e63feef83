"""Colour operations of the target view: jitter in each sample's own order, grayscale, blur.

On a GPU the chain runs on the whole batch. What decides there is the number of launches, and that the CPU
never waits: which samples an operation touches is known there, samples are sorted so that each
operation works on a slice, and all parameters go up in one copy. On a CPU images go one by one
(cmae.pipeline.views.color_image).

Values are integers 0..255 held in fp32, and every 'exact' operation rounds where torchvision's uint8
functions round, so that the chain equals theirs and does not drift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from cmae.pipeline.batch import upload
from cmae.pipeline.views.color_image import ImageColor
from cmae.pipeline.views.color_math import (
    HUE_CENTRES,
    HUE_SCALE,
    LUMA,
    blur_radius,
    gaussian_taps,
    twist_matrices,
)
from cmae.pipeline.views.params import JITTER_ORDERS, ViewParams

_CONTRAST, _SATURATION, _HUE = 1, 2, 3  # numbers in JITTER_ORDERS


class ColorOp(Protocol):
    """The chain of a batch as one operation on the device, such as `cmae.kernels.color_jitter`."""

    def __call__(
        self,
        images: UInt8[Tensor, "B H W 3"],
        params: Float32[Tensor, "B 8"],
        /,
        *,
        mode: Literal["exact", "fast"],
    ) -> UInt8[Tensor, "B H W 3"]:
        """New images; `params` are the columns of `ViewParams.matrix()` from 'jitter' on."""


def apply_color(
    images: UInt8[Tensor, "B H W 3"],
    params: ViewParams,
    *,
    mode: Literal["exact", "fast", "none"],
    op: ColorOp | None = None,
) -> UInt8[Tensor, "B H W 3"]:
    """The target's colour chain on `images`' device.

    Args:
        images: Target views before their colours.
        params: Their parameters, row by row.
        mode: Kind of jitter.
        op: What colours a batch on a GPU; None = the chain of torch operators. Without effect on a CPU.
    """
    if mode == "none":
        return images
    if images.is_cuda and op is not None:
        columns = params.matrix()[:, ViewParams.columns()["jitter"] :]
        return op(images, upload(torch.from_numpy(columns), images.device), mode=mode)
    if images.is_cuda:
        return color_chain(images, params, mode=mode)
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    color = ImageColor(images.shape[1])
    for row, (image, made) in enumerate(zip(images.numpy(), out.numpy(), strict=True)):
        color.apply(image, params, row=row, mode=mode, out=made)
    return out


def color_chain(
    images: UInt8[Tensor, "B H W 3"], params: ViewParams, *, mode: Literal["exact", "fast"]
) -> UInt8[Tensor, "B H W 3"]:
    """The chain on a whole batch, on any device."""
    if not (params.jitter | params.grayscale | (params.blur_sigma > 0)).any():
        return images
    order = _sorted_for_jitter(params)
    params = params.rows(order)
    on_device = _upload_columns(
        {
            "order": order,
            "back": np.argsort(order),
            "jitter": _jitter_columns(params) if mode == "exact" else _twist_columns(params),
            "gray_rows": _first(params.grayscale),
            "blur_rows": _first(params.blur_sigma > 0),
            "taps": _tap_columns(params, size=min(images.shape[1:3])),
        },
        images.device,
    )
    sorted_images = images.index_select(0, on_device["order"].flatten().long())
    x = torch.empty(len(params), 3, *images.shape[1:3], device=images.device)
    x.copy_(sorted_images.permute(0, 3, 1, 2))
    num_jittered = int(params.jitter.sum())
    if num_jittered:
        jitter = _jitter_exact if mode == "exact" else _jitter_fast
        jitter(x[:num_jittered], params, on_device["jitter"][:num_jittered])
    if num_gray := int(params.grayscale.sum()):
        rows = on_device["gray_rows"][:num_gray, 0].long()
        x.index_copy_(0, rows, _gray(x.index_select(0, rows)).repeat(1, 3, 1, 1))
    if num_blurred := int((params.blur_sigma > 0).sum()):
        rows = on_device["blur_rows"][:num_blurred, 0].long()
        taps = on_device["taps"].index_select(0, rows)
        x.index_copy_(0, rows, _blur(x.index_select(0, rows), taps))
    pixels = x.to(torch.uint8).index_select(0, on_device["back"].flatten().long())
    return pixels.permute(0, 2, 3, 1).contiguous()


def _upload_columns(
    arrays: Mapping[str, Shaped[np.ndarray, "B ..."]], device: torch.device
) -> dict[str, Float32[Tensor, "B w"]]:
    """Put columns side by side, copy them to the device at once, and hand out views of the copy.

    Row numbers travel as fp32, which holds them exactly up to 2**24.
    """
    columns = [array.reshape(len(array), -1) for array in arrays.values()]
    packed = np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe")
    copied = upload(torch.from_numpy(packed), device)
    widths = [column.shape[1] for column in columns]
    return dict(zip(arrays, copied.split(widths, dim=1), strict=True))


def _first(chosen: Shaped[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
    """Numbers of the chosen rows, then of the others."""
    return np.argsort(~chosen, kind="stable")


def _place_of_hue(params: ViewParams) -> Int64[np.ndarray, " B"]:
    return np.asarray(np.argmax(JITTER_ORDERS[params.order] == _HUE, axis=1))


def _sorted_for_jitter(params: ViewParams) -> Int64[np.ndarray, " B"]:
    """Jittered samples first, those with the most operations before their hue at the very front."""
    return np.argsort(np.where(params.jitter, 3 - _place_of_hue(params), 4), kind="stable")


def _jitter_columns(params: ViewParams) -> Float32[np.ndarray, "B 21"]:
    """Coefficients of up to three operations before the hue and three after it, then the hue's shifts.

    Brightness, contrast and saturation are gain * pixel + of_gray * its grey + of_mean * the mean grey.
    """
    operations = JITTER_ORDERS[params.order].astype(np.int64)  # (B, 4)
    hue_at = _place_of_hue(params)[:, None]
    places = np.concatenate([np.arange(3) + 0 * hue_at, hue_at + 1 + np.arange(3)], axis=1)
    places = np.minimum(places, 3)  # past the end: never used
    number = np.take_along_axis(operations, places, axis=1)  # (B, 6)
    gain = np.take_along_axis(params.factors, number, axis=1)
    of_gray, of_mean = (np.where(number == one, 1 - gain, 0) for one in (_SATURATION, _CONTRAST))
    shifts = (6 * params.factors[:, 3:].astype(np.float64) - np.array(HUE_CENTRES) + 3) % 6 - 3
    affine = np.stack([gain, of_gray, of_mean], axis=2).reshape(len(params), -1)
    return np.concatenate([affine, shifts], axis=1, dtype=np.float32, casting="unsafe")


def _jitter_exact(
    x: Float[Tensor, "B 3 H W"], params: ViewParams, columns: Float32[Tensor, "B 21"]
) -> None:
    """In place, for jittered samples sorted by `_sorted_for_jitter`."""
    before = _place_of_hue(params)[: len(x)]
    coefficients = columns[:, :18].view(len(x), 6, 3, 1, 1, 1)
    for number in range(3):
        if stop := int((before > number).sum()):
            _affine(x[:stop], coefficients[:stop, number])
    _hue(x, columns[:, 18:, None, None])
    for number in range(3):
        start = int((3 - before <= number).sum())
        if start < len(x):
            _affine(x[start:], coefficients[start:, 3 + number])


def _affine(x: Float[Tensor, "B 3 H W"], coefficients: Float[Tensor, "B 3 1 1 1"]) -> None:
    gain, of_gray, of_mean = coefficients.unbind(1)
    gray = _gray(x)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    x.mul_(gain).add_(gray.mul_(of_gray)).add_(mean.mul_(of_mean))
    x.clamp_(0, 255).floor_()


def _gray(x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    red, green, blue = x.split(1, dim=1)
    gray: Tensor = red * LUMA[0]
    return gray.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).floor_()


def _hue(x: Float[Tensor, "B 3 H W"], shifts: Float[Tensor, "B 3 1 1"]) -> None:
    """In place; the formula and its order of operations are those of `ImageColor._hue`."""
    red, green, blue = x.split(1, dim=1)
    high = torch.maximum(torch.maximum(green, blue), red)
    low = torch.minimum(torch.minimum(green, blue), red)
    chroma = high - low
    size = (green + blue).sub_(red).add_(chroma).sub_(low)
    hue = torch.copysign(size, green - blue).mul_(HUE_SCALE)
    chroma.mul_(HUE_SCALE)
    base = (high * HUE_SCALE).sub_(chroma).sub_(chroma)
    three_chroma = chroma * 3
    turned = (chroma * shifts).add_(hue).abs_().sub_(three_chroma).abs_().add_(base)
    torch.clamp(turned, low, high, out=x)
    x.floor_()


def _tap_columns(params: ViewParams, *, size: int) -> Float32[np.ndarray, "B R"]:
    """Taps of every sample to the radius of the widest; of no use, but finite, where there is no blur."""
    sigma = params.blur_sigma
    radius = blur_radius(float(sigma.max()), size)
    return gaussian_taps(np.where(sigma > 0, sigma, 1), radius).astype(np.float32)


def _blur(x: Float[Tensor, "B 3 H W"], taps: Float[Tensor, "B R"]) -> Tensor:
    """Separable Gaussian, reflected borders, rounded to integers; taps past three sigma are left out."""
    weights = taps[:, :, None, None, None]
    for axis in (2, 3):
        x = _convolve(x, weights, axis=axis)
    return x.round_()


def _convolve(
    x: Float[Tensor, "B 3 H W"], weights: Float[Tensor, "B R 1 1 1"], *, axis: int
) -> Tensor:
    radius, size = weights.shape[1] - 1, x.shape[axis]
    padded = F.pad(
        x, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), mode="reflect"
    )
    out = x * weights[:, 0]
    pair = torch.empty_like(x)
    for distance in range(1, radius + 1):
        before = padded.narrow(axis, radius - distance, size)
        after = padded.narrow(axis, radius + distance, size)
        out.addcmul_(torch.add(before, after, out=pair), weights[:, distance])
    return out


def _twist_columns(params: ViewParams) -> Float32[np.ndarray, "B 10"]:
    matrix, offset = twist_matrices(params.factors)
    return np.concatenate([matrix.reshape(len(params), 9), offset[:, None]], axis=1)


def _jitter_fast(
    x: Float[Tensor, "B 3 H W"], params: ViewParams, columns: Float32[Tensor, "B 10"]
) -> None:
    """In place: one 3x3 matrix and an offset for each sample."""
    matrix = columns[:, :9].reshape(-1, 3, 3)
    twisted = torch.baddbmm(columns[:, 9:, None], matrix, x.flatten(2))
    x.copy_(twisted.view_as(x)).clamp_(0, 255).round_()
