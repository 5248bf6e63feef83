"""RandAugment on a batch of uint8 images on the device: timm's 'increasing' operations, per image.

Source: Cubuk et al., arXiv 1909.13719, with the ranges of timm's `rand-m9-mstd0.5-inc1`, which MAE's
fine-tuning uses. Operations, magnitudes and order are drawn alike; the pixels differ from Pillow's in this:

- rotations, shears and translations resample bilinearly (timm: bicubic), so edges are a little softer;
- colour operations round once to a level (Pillow truncates in places): at most 1 level.

Each image draws its own operations; images of one operation are computed together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from cmae.errors import require

MAX_LEVEL = 10.0

_Pixels = Float[Tensor, "B 3 H W"]
"""Levels 0..255."""


@dataclass(frozen=True)
class RandAugment:
    """How strongly, how often.

    A call takes images (B, H, W, 3) and a generator of numpy, and returns new ones.
    """

    num_ops: int = 2
    """Operations drawn for each image, with replacement."""
    magnitude: float = 9.0
    """Mean level, 0..10."""
    magnitude_std: float = 0.5
    """Deviation of the level."""
    prob: float = 0.5
    """With which each of them is applied."""
    fill: tuple[int, int, int] = (124, 116, 104)
    """Colour of what comes from outside the image."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        require(self.num_ops >= 0, "num_ops", self.num_ops, ">= 0")
        require(0 <= self.magnitude <= MAX_LEVEL, "magnitude", self.magnitude, "in 0..10")
        require(0 <= self.prob <= 1, "prob", self.prob, "in 0..1")

    def __call__(
        self, images: UInt8[Tensor, "B H W 3"], rng: np.random.Generator
    ) -> UInt8[Tensor, "B H W 3"]:
        """Augment a batch; nothing is read from the device."""
        pixels = images.permute(0, 3, 1, 2).float()
        names = list(OPERATIONS)
        for _ in range(self.num_ops):
            chosen = rng.integers(len(names), size=len(pixels))
            applied = rng.random(len(pixels)) < self.prob
            levels = rng.normal(self.magnitude, self.magnitude_std, size=len(pixels))
            levels = levels.clip(0, MAX_LEVEL)
            signs = np.where(rng.random(len(pixels)) < 0.5, -1.0, 1.0)
            for number, name in enumerate(names):
                rows = np.flatnonzero((chosen == number) & applied)
                if len(rows):
                    values = to_argument(name, levels[rows], signs[rows])
                    where = torch.from_numpy(rows).to(pixels.device)
                    pixels[where] = apply(name, pixels[where], values, fill=self.fill)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_argument(name: str, levels: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """What the operation takes, from levels 0..10 and signs, in timm's ranges.

    Degrees, shear and shift as a share, bits to keep, threshold, addition, or factor of an enhancement.
    """
    share: np.ndarray = levels / MAX_LEVEL
    argument = np.zeros_like(levels)
    if name == "rotate":
        argument = signs * 30.0 * share
    elif name.startswith("shear"):
        argument = signs * 0.3 * share
    elif name.startswith("translate"):
        argument = signs * 0.45 * share
    elif name == "posterize":
        argument = np.maximum(1, 4 - np.floor(4 * share))  # Pillow refuses to keep none
    elif name == "solarize":
        argument = 256 - np.minimum(256, np.floor(256 * share))
    elif name == "solarize_add":
        argument = np.minimum(128, np.floor(110 * share))
    elif name in ("color", "contrast", "brightness", "sharpness"):
        argument = np.maximum(0.1, 1 + 0.9 * share * signs)
    return argument


def apply(name: str, pixels: _Pixels, values: np.ndarray, *, fill: tuple[int, int, int]) -> _Pixels:
    """One operation on images, each with a value of its own from `to_argument`; whole levels."""
    on_device = torch.from_numpy(values.astype(np.float32)).to(pixels.device)
    result = OPERATIONS[name](pixels, on_device.view(-1, 1, 1, 1), fill)
    return result.round().clamp_(0, 255)


Fill = tuple[int, int, int]


def _auto_contrast(x: Tensor, value: Tensor, fill: Fill) -> Tensor:
    low, high = (getattr(x.flatten(2), end)(2)[:, :, None, None] for end in ("amin", "amax"))
    scale = 255 / (high - low).clamp_min(1)
    return torch.where(high > low, ((x - low) * scale).floor(), x)


def _equalize(x: Tensor, value: Tensor, fill: Fill) -> Tensor:
    flat = x.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, device=x.device, dtype=torch.long)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    last = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    table = (step // 2 + before) // step.clamp_min(1)
    mapped = table.clamp(0, 255).gather(2, flat).view_as(x).float()
    return torch.where((step > 0)[..., None], mapped, x)


def _invert(x: Tensor, value: Tensor, fill: Fill) -> Tensor:
    return 255 - x


def _posterize(x: Tensor, bits: Tensor, fill: Fill) -> Tensor:
    quantum = torch.pow(2.0, 8 - bits)
    return torch.where(bits < 8, (x / quantum).floor() * quantum, x)


def _solarize(x: Tensor, threshold: Tensor, fill: Fill) -> Tensor:
    return torch.where(x < threshold, x, 255 - x)


def _solarize_add(x: Tensor, addition: Tensor, fill: Fill) -> Tensor:
    return torch.where(x < 128, (x + addition).clamp_max(255), x)


def _gray(x: Tensor) -> Tensor:
    """Luma in whole levels, Pillow's weights."""
    red, green, blue = x.unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) / 65536).floor()[:, None]


def _blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (degenerate + factor * (x - degenerate)).clamp(0, 255).floor()


def _color(x: Tensor, factor: Tensor, fill: Fill) -> Tensor:
    return _blend(_gray(x), x, factor)


def _contrast(x: Tensor, factor: Tensor, fill: Fill) -> Tensor:
    return _blend((_gray(x).mean((2, 3), keepdim=True) + 0.5).floor(), x, factor)


def _brightness(x: Tensor, factor: Tensor, fill: Fill) -> Tensor:
    return _blend(torch.zeros_like(x), x, factor)


def _sharpness(x: Tensor, factor: Tensor, fill: Fill) -> Tensor:
    kernel = x.new_tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = x.clone()
    inner = F.conv2d(x, kernel.expand(3, 1, 3, 3), groups=3)
    smooth[:, :, 1:-1, 1:-1] = (inner + 0.5).floor()  # Pillow leaves the border as it is
    return _blend(smooth, x, factor)


def _warp(x: Tensor, matrix: Tensor, fill: Fill) -> Tensor:
    """Sample at `matrix` (B, 2, 3) times (x, y, 1) of pixel centres from the image's centre."""
    height, width = x.shape[2:]
    device = x.device
    ys = torch.arange(height, device=device) + 0.5 - height / 2
    xs = torch.arange(width, device=device) + 0.5 - width / 2
    grid = torch.stack(
        [xs.expand(height, width), ys[:, None].expand(height, width), x.new_ones(height, width)], -1
    )
    places = torch.einsum("hwk,bjk->bhwj", grid, matrix)
    places = places * places.new_tensor([2 / width, 2 / height])
    colour = x.new_tensor(fill).view(1, 3, 1, 1)
    moved = F.grid_sample(x - colour, places, mode="bilinear", align_corners=False)
    return moved + colour


def _affine(rows: Callable[[Tensor, int, int], list[list[Tensor]]]) -> Callable[..., Tensor]:
    def operation(x: Tensor, value: Tensor, fill: Fill) -> Tensor:
        flat = value.view(-1)
        parts = rows(flat, x.shape[2], x.shape[3])
        matrix = torch.stack([torch.stack(row, -1) for row in parts], 1)
        return _warp(x, matrix, fill)

    return operation


def _one(v: Tensor) -> Tensor:
    return torch.ones_like(v)


def _none(v: Tensor) -> Tensor:
    return torch.zeros_like(v)


def _rotation(v: Tensor, height: int, width: int) -> list[list[Tensor]]:
    cos, sin = (v * (math.pi / 180)).cos(), (v * (math.pi / 180)).sin()
    # Pillow turns counter-clockwise: the output's pixel lies clockwise of its source.
    return [[cos, -sin, _none(v)], [sin, cos, _none(v)]]


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Fill], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _affine(_rotation),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    # Pillow shears about the corner (0, 0): seen from the centre, a shift comes with it.
    "shear_x": _affine(lambda v, h, w: [[_one(v), v, v * h / 2], [_none(v), _one(v), _none(v)]]),
    "shear_y": _affine(lambda v, h, w: [[_one(v), _none(v), _none(v)], [v, _one(v), v * w / 2]]),
    "translate_x": _affine(
        lambda v, h, w: [[_one(v), _none(v), v * w], [_none(v), _one(v), _none(v)]]
    ),
    "translate_y": _affine(
        lambda v, h, w: [[_one(v), _none(v), _none(v)], [_none(v), _one(v), v * h]]
    ),
}
"""By name; timm's are AutoContrast, Equalize, Invert, Rotate, PosterizeIncreasing and so on."""
