"""The target view's colour chain for one image on a CPU core: the results of color_batch in less time.

A pixel operation costs a core what its bytes cost, and torch's dispatch as much again. So an image stays in
uint8 planes (150 kB at 224 px, the core's cache), numpy works on them in place, sums and differences of
pixels are int16, and float32 appears where a rounding depends on it.
docs/design/0009-views-on-a-cpu.md has the numbers.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, UInt8

from cmae.pipeline.views.color_math import (
    HUE_CENTRES,
    HUE_SCALE,
    LUMA,
    blur_radius,
    gaussian_taps,
    twist_matrices,
)
from cmae.pipeline.views.params import JITTER_ORDERS, ViewParams

Plane = npt.NDArray[np.float32]

_HUE_SCALE = np.float32(HUE_SCALE)
_BLUR_BLOCK = 8  # outputs of one small matrix product; 8 to 16 cost the same


class ImageColor:
    """Working memory for images of one size; belongs to one thread.

    Args:
        img_size: Height and width of the images in pixels.
    """

    def __init__(self, img_size: int) -> None:
        shape = (img_size, img_size)
        self._planes = np.empty((3, *shape), dtype=np.uint8)
        self._floats = np.empty((3, *shape), dtype=np.float32)
        # The same memory: torch clamps both ends in one pass.
        self._floats_torch = torch.from_numpy(self._floats)
        self._chroma, self._hue_value, self._three_chroma, self._base = np.empty(
            (4, *shape), dtype=np.float32
        )
        # Never needed at the same time as the hue, whose planes are in the cache.
        self._gray_value, self._weighted = self._chroma, self._hue_value
        self._signed = np.empty((3, *shape), dtype=np.int16)
        self._high, self._low, self._high_less_low, self._hue_size, self._hue_sign = np.empty(
            (5, *shape), dtype=np.int16
        )

    def apply(
        self,
        image: UInt8[np.ndarray, "S S 3"],
        params: ViewParams,
        *,
        row: int,
        mode: Literal["exact", "fast", "none"],
        out: UInt8[np.ndarray, "S S 3"],
    ) -> None:
        """Write the chain's result for `image` and row `row` of `params` to `out`."""
        jitter, grayscale = bool(params.jitter[row]), bool(params.grayscale[row])
        sigma = float(params.blur_sigma[row])
        if mode == "none" or not (jitter or grayscale or sigma > 0):
            out[...] = image
            return
        planes = self._planes
        for channel in range(3):
            planes[channel] = image[..., channel]
        if jitter and mode == "exact":
            self._jitter(params.factors[row], JITTER_ORDERS[params.order[row]])
        elif jitter:
            self._twist(params.factors[row])
        if grayscale:
            planes = planes[:1]
            np.copyto(planes[0], self._gray(), casting="unsafe")
        if sigma > 0:
            self._blur(planes, sigma, out=out)
        else:
            for channel in range(3):
                out[..., channel] = planes[channel % len(planes)]

    def _jitter(self, factors: Float32[np.ndarray, " 4"], order: UInt8[np.ndarray, " 4"]) -> None:
        for number in order:
            factor = float(factors[number])
            if number == 3:
                if factor != 0:
                    self._hue(factor)
            elif factor != 1:
                (self._brightness, self._contrast, self._saturation)[number](factor)

    def _brightness(self, factor: float) -> None:
        np.copyto(self._floats, self._planes)
        np.multiply(self._floats, np.float32(factor), out=self._floats)
        self._store(may_leave_range=factor > 1)

    def _contrast(self, factor: float) -> None:
        gray = self._gray()
        mean = np.float32(gray.sum() / gray.size)
        np.multiply(self._floats, np.float32(factor), out=self._floats)
        np.add(self._floats, np.float32(1 - factor) * mean, out=self._floats)
        self._store(may_leave_range=factor > 1)

    def _saturation(self, factor: float) -> None:
        gray = self._gray()
        np.multiply(gray, np.float32(1 - factor), out=gray)
        np.multiply(self._floats, np.float32(factor), out=self._floats)
        np.add(self._floats, gray, out=self._floats)
        self._store(may_leave_range=factor > 1)

    def _gray(self) -> Plane:
        """The image's grey values, rounded down; leaves the image itself in `_floats`."""
        np.copyto(self._floats, self._planes)
        gray, weighted = self._gray_value, self._weighted
        np.multiply(self._floats[0], np.float32(LUMA[0]), out=gray)
        for channel in (1, 2):
            np.multiply(self._floats[channel], np.float32(LUMA[channel]), out=weighted)
            np.add(gray, weighted, out=gray)
        return np.floor(gray, out=gray)

    def _store(self, *, may_leave_range: bool) -> None:
        """Back to uint8: clamp, then drop the fraction, as the cast does."""
        if may_leave_range:
            self._floats_torch.clamp_(0, 255)
        np.copyto(self._planes, self._floats, casting="unsafe")

    def _hue(self, turn: float) -> None:
        """Turn the hue in HSV space without branches, and without dividing by the chroma.

        With M = max, m = min, c = M - m, let H be c times the hue on the circle (-3c, 3c] where red lies at
        0, green at 2c, blue at -2c. In integers, |H| = g + b - r + M - 2m, and H has the sign of g - b.
        A channel that lies k on that circle, k in units of c and the turn taken off, becomes
        max(m, min(M, M - 2c + | |H - k c| - 3c |)).
        """
        red, green, blue = self._signed
        np.copyto(self._signed, self._planes)
        high, low = self._high, self._low
        np.maximum(np.maximum(green, blue, out=high), red, out=high)
        np.minimum(np.minimum(green, blue, out=low), red, out=low)
        self._chroma_and_hue()
        chroma, hue = self._chroma, self._hue_value
        three_chroma, base = self._three_chroma, self._base
        np.multiply(chroma, 3, out=three_chroma)
        np.copyto(base, high)
        np.multiply(base, _HUE_SCALE, out=base)
        np.subtract(base, chroma, out=base)
        np.subtract(base, chroma, out=base)
        for channel, centre in enumerate(HUE_CENTRES):
            # Within half a circle of 0, so that H + shift * c stays within a whole one.
            shift = (6 * turn - centre + 3) % 6 - 3
            turned = self._floats[channel]
            np.multiply(chroma, np.float32(shift), out=turned)
            np.add(turned, hue, out=turned)
            np.abs(turned, out=turned)
            np.subtract(turned, three_chroma, out=turned)
            np.abs(turned, out=turned)
            np.add(turned, base, out=turned)
        np.copyto(self._signed, self._floats, casting="unsafe")
        np.maximum(self._signed, low, out=self._signed)
        np.minimum(self._signed, high, out=self._signed)
        np.copyto(self._planes, self._signed, casting="unsafe")

    def _chroma_and_hue(self) -> None:
        """Chroma and H of `_hue` to `_chroma` and `_hue_value`, scaled; M and m are in `_high` and `_low`."""
        red, green, blue = self._signed
        size, sign, chroma = self._hue_size, self._hue_sign, self._high_less_low
        np.subtract(self._high, self._low, out=chroma)
        np.add(green, blue, out=size)
        np.subtract(size, red, out=size)
        np.add(size, chroma, out=size)
        np.subtract(size, self._low, out=size)
        np.subtract(green, blue, out=sign)
        np.right_shift(sign, 15, out=sign)  # -1 where blue leads, else 0
        np.bitwise_xor(size, sign, out=size)  # with the next line: -size where sign is -1
        np.subtract(size, sign, out=size)
        for source, target in ((chroma, self._chroma), (size, self._hue_value)):
            np.copyto(target, source)
            np.multiply(target, _HUE_SCALE, out=target)

    def _twist(self, factors: Float32[np.ndarray, " 4"]) -> None:
        matrix, offset = map(torch.from_numpy, twist_matrices(factors[None]))
        np.copyto(self._floats, self._planes)
        twisted = torch.addmm(offset[:, None], matrix[0], self._floats_torch.flatten(1))
        twisted.clamp_(0, 255).round_()
        np.copyto(self._planes, twisted.view_as(self._floats_torch).numpy(), casting="unsafe")

    def _blur(
        self, planes: UInt8[np.ndarray, "C S S"], sigma: float, *, out: UInt8[np.ndarray, "S S 3"]
    ) -> None:
        """Separable Gaussian with reflected borders, rounded to integers, as two banded matrix products.

        Each pass turns its last axis into its first: (C, H, W) -> (W, C, H) -> (H, W, C), `out`'s own order.
        """
        size, channels = planes.shape[1], planes.shape[0]
        weights = _BlurWeights(sigma, size)
        np.copyto(self._floats[:channels], planes)
        x = self._floats_torch[:channels].view(channels * size, size)
        x = weights.blur_last_axis(x).view(size * channels, size)
        blurred = weights.blur_last_axis(x).view(size, size, channels).numpy()
        np.rint(blurred, out=blurred)
        if channels == 3:
            np.copyto(out, blurred, casting="unsafe")
        else:
            np.copyto(planes[0], blurred[..., 0], casting="unsafe")
            for channel in range(3):
                out[..., channel] = planes[0]


class _BlurWeights:
    """A Gaussian with reflected borders on an axis of `size`, as three small matrices.

    Outputs whose taps all lie inside come in blocks that share one band matrix: a batch of products. The
    others, at the two ends, have a matrix each.
    """

    def __init__(self, sigma: float, size: int) -> None:
        self.radius = blur_radius(sigma, size)
        half = gaussian_taps(np.array([sigma]), self.radius)[0]
        taps = np.concatenate([half[:0:-1], half]).astype(np.float32)
        self.blocks = max(size - 2 * self.radius, 0) // _BLUR_BLOCK
        if not self.blocks:
            self.head = torch.from_numpy(_whole_axis(taps, size))
            return
        tail = size - self.radius - self.blocks * _BLUR_BLOCK
        self.band = torch.from_numpy(_band(taps, _BLUR_BLOCK)).expand(self.blocks, -1, -1)
        self.head = torch.from_numpy(_border(taps, self.radius))
        self.tail = torch.from_numpy(_border(taps, tail)[::-1, ::-1].copy())

    def blur_last_axis(self, x: torch.Tensor) -> torch.Tensor:
        """(N, size) -> (size, N)."""
        count, size = x.shape
        out = torch.empty(size, count)
        head = self.head.shape[0]
        torch.mm(self.head, x[:, : self.head.shape[1]].t(), out=out[:head])
        if self.blocks:
            tail, reach = self.tail.shape
            shape = (self.blocks, self.band.shape[2], count)
            windows = x.as_strided(shape, (_BLUR_BLOCK, 1, size))
            middle = out[head : size - tail].view(self.blocks, _BLUR_BLOCK, count)
            torch.bmm(self.band, windows, out=middle)
            torch.mm(self.tail, x[:, size - reach :].t(), out=out[size - tail :])
        return out


def _band(taps: Plane, count: int) -> Plane:
    """(count, count + len(taps) - 1): the taps, one place further to the right in each row."""
    width = count + len(taps) - 1
    rows = np.zeros((count, width + 1), dtype=np.float32)
    rows[:, : len(taps)] = taps
    # One column less: each row moves by one.
    return rows.ravel()[: count * width].reshape(count, width)


def _border(taps: Plane, count: int) -> Plane:
    """(count, inputs in reach) of the first `count` outputs, what lies before the first input reflected."""
    radius = len(taps) // 2
    band = _band(taps, count)
    border = band[:, radius:].copy()
    border[:, 1 : radius + 1] += band[:, :radius][:, ::-1]
    return border


def _whole_axis(taps: Plane, size: int) -> Plane:
    """(size, size) for an axis too short for a block."""
    rows, distance = np.arange(size)[:, None], np.arange(len(taps)) - len(taps) // 2
    source = size - 1 - np.abs(size - 1 - np.abs(rows + distance))
    matrix = np.zeros((size, size), dtype=np.float32)
    np.add.at(matrix, (rows, source), taps)
    return matrix
