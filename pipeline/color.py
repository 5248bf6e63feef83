"""Colour operations of the target view, on whole batches: jitter in each sample's own order, grayscale, blur.

The same code serves CPU and CUDA. Values are integers 0..255 held in fp32, and every 'exact' operation rounds
where torchvision's uint8 functions round, so that the chain equals theirs and does not drift.
Which samples an operation touches is known on the host: nothing is computed and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from cmae.pipeline.color_host import HostColor
from cmae.pipeline.color_params import LUMA, blur_radius, gaussian_taps, twist_matrices
from cmae.pipeline.views import JITTER_ORDERS, ViewParams


def apply_color(
    images: UInt8[Tensor, "B H W 3"], params: ViewParams, *, mode: Literal["exact", "fast", "none"]
) -> UInt8[Tensor, "B H W 3"]:
    """The target's colour chain on `images`' device; rows of `params` belong to rows of `images`."""
    if mode == "none":
        return images
    if images.is_cuda:
        return color_chain(images, params, mode=mode)
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    host = HostColor(images.shape[1])
    for row, (image, made) in enumerate(zip(images.numpy(), out.numpy(), strict=True)):
        host.apply(image, params, row=row, mode=mode, out=made)
    return out


def color_chain(
    images: UInt8[Tensor, "B H W 3"], params: ViewParams, *, mode: Literal["exact", "fast"]
) -> UInt8[Tensor, "B H W 3"]:
    """The chain with each operation for all the samples at once that it is drawn for."""
    if not (params.jitter | params.grayscale | (params.blur_sigma > 0)).any():
        return images
    x = torch.empty(images.shape[0], 3, *images.shape[1:3], device=images.device)
    x.copy_(images.permute(0, 3, 1, 2))
    x = _jitter_exact(x, params) if mode == "exact" else _jitter_fast(x, params)
    x = _on_rows(
        x, params.grayscale, lambda rows, _: _gray(rows).repeat(1, 3, 1, 1), params.grayscale
    )
    x = _on_rows(x, params.blur_sigma > 0, _blur, params.blur_sigma)
    return _interleave(x)


def _interleave(x: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B H W 3"]:
    planes = x.to(torch.int16).to(torch.uint8)  # by way of int16: float to byte is not vectorised
    if planes.is_cuda:
        return planes.permute(0, 2, 3, 1).contiguous()
    out = torch.empty(x.shape[0], *x.shape[2:], 3, dtype=torch.uint8)
    pixels = out.numpy()  # numpy's strided byte copy is four times as fast as torch's
    for channel in range(3):
        pixels[..., channel] = planes[:, channel].numpy()
    return out


def _on_rows(
    x: Float[Tensor, "B 3 H W"],
    chosen: Bool[np.ndarray, " B"],
    operation: Callable[[Tensor, np.ndarray], Tensor],
    values: Shaped[np.ndarray, "B ..."],
) -> Float[Tensor, "B 3 H W"]:
    """Apply `operation`, which may work in place, to the chosen samples and their rows of `values`."""
    index = np.flatnonzero(chosen)
    if index.size == len(chosen):
        return operation(x, values)
    if index.size:
        rows = torch.from_numpy(index).to(x.device)
        x[rows] = operation(x[rows], values[index])
    return x


def _jitter_exact(x: Float[Tensor, "B 3 H W"], params: ViewParams) -> Float[Tensor, "B 3 H W"]:
    operations = (_brightness, _contrast, _saturation, _hue)
    order = JITTER_ORDERS[params.order]
    for place in range(4):
        for number, operation in enumerate(operations):
            chosen = params.jitter & (order[:, place] == number)
            x = _on_rows(x, chosen, operation, params.factors[:, number])
    return x


def _per_image(values: Float32[np.ndarray, " B"], x: Tensor) -> Float[Tensor, "B 1 1 1"]:
    column: Tensor = torch.from_numpy(values).to(x.device)
    return column[:, None, None, None]


def _to_integers(x: Tensor) -> Tensor:
    """What storing as uint8 does: clamp, then cut the fraction off."""
    return x.clamp_(0, 255).floor_()


def _gray(x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    red, green, blue = x.split(1, dim=1)
    gray: Tensor = red * LUMA[0]
    return gray.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).floor_()


def _brightness(x: Float[Tensor, "B 3 H W"], factors: Float32[np.ndarray, " B"]) -> Tensor:
    return _to_integers(x.mul_(_per_image(factors, x)))


def _contrast(x: Float[Tensor, "B 3 H W"], factors: Float32[np.ndarray, " B"]) -> Tensor:
    factor = _per_image(factors, x)
    mean = _gray(x).mean(dim=(1, 2, 3), keepdim=True)
    return _to_integers(x.mul_(factor).add_((1 - factor) * mean))


def _saturation(x: Float[Tensor, "B 3 H W"], factors: Float32[np.ndarray, " B"]) -> Tensor:
    factor = _per_image(factors, x)
    gray = _gray(x)
    return _to_integers(x.mul_(factor).add_(gray.mul_(1 - factor)))


def _hue(x: Float[Tensor, "B 3 H W"], turns: Float32[np.ndarray, " B"]) -> Tensor:
    """Turn the hue in HSV space, without branches.

    With M = max, c = M - min and the hue h in [0, 1), a channel is M - c * clamp(2 - 6 |h' - 1/2|, 0, 1),
    where h' is the fraction of h + 1, h + 2/3, h + 1/3 for red, green, blue. The hue comes from sorting
    red against the larger of green and blue: each swap reflects the circle, so
    h = |K + (middle - smallest) / 6c|.
    """
    red, green, blue = x.split(1, dim=1)
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)
    largest, middle = torch.maximum(red, larger), torch.minimum(red, larger)
    chroma = largest - torch.minimum(middle, smaller)
    # Comparisons into floats, not torch.where: bool masks are not vectorised on CPUs.
    blue_leads = (blue - green).sign_().clamp_(min=0)
    red_follows = (larger - red).sign_().clamp_(min=0)
    # K = -blue_leads, and -1/3 - K once red was swapped.
    offset = blue_leads.mul_(red_follows * 2 - 1).sub_(red_follows, alpha=1 / 3)
    hue = middle.sub_(smaller).div_(chroma.clamp(min=1).mul_(6)).add_(offset).abs_()
    thirds = torch.tensor([1.0, 2 / 3, 1 / 3], device=x.device)[:, None, None]
    # One more circle keeps the sum positive: frac is then the remainder.
    distance = (hue + (thirds + 1 + _per_image(turns, x))).frac_().sub_(0.5).abs_()
    share = distance.mul_(-6).add_(2).clamp_(0, 1)
    # torchvision goes through [0, 1] and back with the factor 256 - 1e-3.
    scale = (256 - 1e-3) / 255
    return torch.addcmul(largest.mul_(scale), chroma.mul_(-scale), share).floor_()


def _blur(x: Float[Tensor, "B 3 H W"], sigma: Float32[np.ndarray, " B"]) -> Tensor:
    """Separable Gaussian, reflected borders, rounded to integers; taps past three sigma are left out."""
    radius = blur_radius(float(sigma.max()), min(x.shape[2:]))
    taps = gaussian_taps(sigma, radius)
    weights = torch.from_numpy(taps.astype(np.float32)).to(x.device)[:, :, None, None, None]
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


def _jitter_fast(x: Float[Tensor, "B 3 H W"], params: ViewParams) -> Float[Tensor, "B 3 H W"]:
    matrix, offset = twist_matrices(params.factors)

    def apply(rows: Tensor, index: Int64[np.ndarray, " n"]) -> Tensor:
        m = torch.from_numpy(matrix[index]).to(x.device)
        b = torch.from_numpy(offset[index]).to(x.device)
        out = torch.baddbmm(b[:, None, None], m, rows.flatten(2)).view_as(rows)
        return out.clamp_(0, 255).round_()

    return _on_rows(x, params.jitter, apply, np.arange(len(params)))
