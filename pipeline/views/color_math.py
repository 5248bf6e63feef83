"""Numbers behind the colour operations, worked out on the CPU for both of their implementations."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Float64, Shaped

LUMA = (0.2989, 0.587, 0.114)
"""torchvision's weights of red, green and blue; ITU-R 601-2 rounded to four digits."""

HUE_SCALE = (256 - 1e-3) / 255
"""torchvision stores the result of its hue by way of [0, 1] and the factor 256 - 1e-3."""

HUE_CENTRES = (0.0, 2.0, -2.0)
"""Where red, green and blue lie on the circle of hues, which is 6 long."""

BLUR_MAX_RADIUS = 11
"""A kernel of 23 taps, as torchvision users set it for 224 px images."""

# One matrix for the whole jitter, as NVIDIA DALI's color_twist computes it: saturation and hue in YIQ
# (NTSC 1953), then contrast about mid grey, then brightness.
_RGB_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
_MID_GREY = 128.0


def blur_radius(sigma: float, size: int) -> int:
    """Taps on each side of the centre: to three sigma, and no more than an image of `size` px can reflect."""
    return min(BLUR_MAX_RADIUS, int(np.ceil(3 * sigma)), size - 1)


def gaussian_taps(
    sigma: Shaped[np.ndarray, " B"], radius: int
) -> Float64[np.ndarray, "B {radius+1}"]:
    """Weights of a Gaussian from its centre outwards; both sides together sum to 1."""
    distance = np.arange(radius + 1)
    taps = np.exp(-0.5 * (distance / sigma[:, None].astype(np.float64)) ** 2)
    return np.asarray(taps / (taps[:, :1] + 2 * taps[:, 1:].sum(axis=1, keepdims=True)))


def twist_matrices(
    factors: Float32[np.ndarray, "B 4"],
) -> tuple[Float32[np.ndarray, "B 3 3"], Float32[np.ndarray, " B"]]:
    """Matrix and offset of the 'fast' jitter: new pixel = matrix @ pixel + offset."""
    brightness, contrast, saturation, turn = factors.astype(np.float64).T
    angle = 2 * np.pi * turn
    twist = np.zeros((len(factors), 3, 3))
    twist[:, 0, 0] = 1
    twist[:, 1, 1] = twist[:, 2, 2] = saturation * np.cos(angle)
    twist[:, 1, 2] = saturation * np.sin(angle)
    twist[:, 2, 1] = -twist[:, 1, 2]
    gain = (brightness * contrast)[:, None, None]
    matrix = gain * (np.linalg.inv(_RGB_TO_YIQ) @ twist @ _RGB_TO_YIQ)
    offset = brightness * (1 - contrast) * _MID_GREY
    return matrix.astype(np.float32), offset.astype(np.float32)
