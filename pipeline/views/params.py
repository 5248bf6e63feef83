"""The two views of a sample: what may be configured, and the parameters drawn for a batch of samples."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from itertools import permutations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8

from cmae.pipeline.sampling.counter_rng import uniforms
from cmae.pipeline.views.config import ViewConfig

JITTER_ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)
"""The 24 orders of (0 brightness, 1 contrast, 2 saturation, 3 hue), lexicographic."""

CROP_TRIES = 10
"""Attempts at a window that fits before the centre is taken; torchvision's number."""

_FIELD_WIDTHS = {"crop": 4, "online_offset": 2, "target_offset": 2, "target_crop": 4, "factors": 4}


class _Draw(IntEnum):
    """Which random number is for what. Frozen: a new number changes every run."""

    CROP = 0  # CROP_TRIES areas, CROP_TRIES aspect ratios, top, left
    TARGET_CROP = CROP + 2 * CROP_TRIES + 2
    FLIP = TARGET_CROP + 2 * CROP_TRIES + 2
    TARGET_FLIP = FLIP + 1
    ONLINE_OFFSET = TARGET_FLIP + 1  # y, x
    TARGET_OFFSET = ONLINE_OFFSET + 2  # y, x
    JITTER = TARGET_OFFSET + 2
    FACTORS = JITTER + 1  # brightness, contrast, saturation, hue
    ORDER = FACTORS + 4
    GRAYSCALE = ORDER + 1
    BLUR = GRAYSCALE + 1
    SIGMA = BLUR + 1
    COUNT = SIGMA + 1


@dataclass(frozen=True)
class ViewParams:
    """Parameters of B samples' views, one array each. Windows are (top, left, height, width) in pixels."""

    crop: Int32[np.ndarray, "B 4"]
    """Window of the stored image that becomes the source crop."""
    flip: Bool[np.ndarray, " B"]
    online_offset: Int32[np.ndarray, "B 2"]
    """(y, x) of the online view in the flipped source crop."""
    target_offset: Int32[np.ndarray, "B 2"]
    """(y, x) of the target view in the flipped source crop; (0, 0) for target_crop='random_resized'."""
    target_crop: Int32[np.ndarray, "B 4"]
    """Window of the stored image for target_crop='random_resized', else equal to `crop`."""
    target_flip: Bool[np.ndarray, " B"]
    """The target's own flip for target_crop='random_resized', else equal to `flip`."""
    jitter: Bool[np.ndarray, " B"]
    factors: Float32[np.ndarray, "B 4"]
    """Brightness, contrast, saturation factors and hue turn; 1, 1, 1, 0 without jitter."""
    order: UInt8[np.ndarray, " B"]
    """Row of JITTER_ORDERS."""
    grayscale: Bool[np.ndarray, " B"]
    blur_sigma: Float32[np.ndarray, " B"]
    """Standard deviation in pixels; 0 = no blur."""

    def __len__(self) -> int:
        return len(self.flip)

    def rows(self, index: slice | Int64[np.ndarray, " n"]) -> ViewParams:
        """The parameters of some of the samples."""
        return ViewParams(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def columns(cls) -> dict[str, int]:
        """First column of each field in `matrix()`."""
        names = [f.name for f in fields(cls)]
        starts = np.cumsum([0] + [_FIELD_WIDTHS.get(name, 1) for name in names])
        return dict(zip(names, starts.tolist(), strict=False))

    def matrix(self) -> Float32[np.ndarray, "B 22"]:
        """All parameters side by side, in the order of the fields: one tensor to feed instead of eleven."""
        columns = [getattr(self, f.name).reshape(len(self), -1) for f in fields(self)]
        return np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe")


def draw_view_params(
    views: ViewConfig,
    *,
    seed: int,
    epoch: int,
    sample_id: Int64[np.ndarray, " B"],
    height: Int32[np.ndarray, " B"],
    width: Int32[np.ndarray, " B"],
) -> ViewParams:
    """Draw the views of B samples; each row depends on its own sample, size, the seed and the epoch only.

    Heights and widths are those of the stored images, EXIF orientation ignored.
    """
    u = uniforms(seed, epoch, sample_id=sample_id, num_draws=_Draw.COUNT)
    crop = _random_resized_crop(views, u[:, _Draw.CROP : _Draw.TARGET_CROP], height, width)
    flip = u[:, _Draw.FLIP] < views.hflip_prob
    target_crop, target_flip, target_shift = crop, flip, views.target_shift
    if views.has_own_target_crop:
        target_crop = _random_resized_crop(
            views, u[:, _Draw.TARGET_CROP : _Draw.FLIP], height, width
        )
        target_flip = u[:, _Draw.TARGET_FLIP] < views.hflip_prob
        target_shift = 0
    jitter = u[:, _Draw.JITTER] < views.jitter_prob
    blur = u[:, _Draw.BLUR] < views.blur_prob
    sigma = _between(u[:, _Draw.SIGMA], views.blur_sigma_min, views.blur_sigma_max)
    return ViewParams(
        crop=crop,
        flip=flip,
        online_offset=_offsets(u[:, _Draw.ONLINE_OFFSET : _Draw.TARGET_OFFSET], views.online_shift),
        target_offset=_offsets(u[:, _Draw.TARGET_OFFSET : _Draw.JITTER], target_shift),
        target_crop=target_crop,
        target_flip=target_flip,
        jitter=jitter,
        factors=_jitter_factors(views, u[:, _Draw.FACTORS : _Draw.ORDER], jitter),
        order=(u[:, _Draw.ORDER] * len(JITTER_ORDERS)).astype(np.uint8),
        grayscale=u[:, _Draw.GRAYSCALE] < views.grayscale_prob,
        blur_sigma=np.where(blur, sigma, 0).astype(np.float32),
    )


def _random_resized_crop(
    views: ViewConfig,
    u: Float[np.ndarray, "B 22"],
    height: Int32[np.ndarray, " B"],
    width: Int32[np.ndarray, " B"],
) -> Int32[np.ndarray, "B 4"]:
    """RandomResizedCrop.get_params for a batch: all tries at once, the first that fits counts."""
    if views.window == "centre":
        return _centre_square(views, height, width)
    area = (
        _between(u[:, :CROP_TRIES], views.min_area, views.max_area)
        * (height * width.astype(np.int64))[:, None]
    )
    log_aspect = _between(
        u[:, CROP_TRIES : 2 * CROP_TRIES], np.log(views.min_aspect), np.log(views.max_aspect)
    )
    aspect = np.exp(log_aspect)
    w = np.round(np.sqrt(area * aspect)).astype(np.int64)  # to even at .5, like Python's round
    h = np.round(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first, row = fits.argmax(axis=1), np.arange(len(u))
    h, w = h[row, first], w[row, first]
    top = np.floor(u[:, -2] * (height - h + 1)).astype(np.int64)
    left = np.floor(u[:, -1] * (width - w + 1)).astype(np.int64)
    drawn = np.stack([top, left, h, w], axis=1)
    centre = _centre_crop(views, height, width)
    return np.where(fits.any(axis=1)[:, None], drawn, centre).astype(np.int32)


def _centre_square(
    views: ViewConfig, height: Int32[np.ndarray, " B"], width: Int32[np.ndarray, " B"]
) -> Int32[np.ndarray, "B 4"]:
    """The window of evaluation: a centred square, its side a share of the shorter one."""
    side = np.maximum(1, np.round(views.centre_share * np.minimum(height, width))).astype(np.int64)
    return np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1).astype(
        np.int32
    )


def _centre_crop(
    views: ViewConfig, height: Int32[np.ndarray, " B"], width: Int32[np.ndarray, " B"]
) -> Int64[np.ndarray, "B 4"]:
    """The largest centred window whose aspect is allowed."""
    aspect = width / height
    h = np.where(aspect < views.min_aspect, np.round(width / views.min_aspect), height).astype(
        np.int64
    )
    w = np.where(aspect > views.max_aspect, np.round(height * views.max_aspect), width).astype(
        np.int64
    )
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


def _jitter_factors(
    views: ViewConfig, u: Float[np.ndarray, "B 4"], jitter: Bool[np.ndarray, " B"]
) -> Float32[np.ndarray, "B 4"]:
    strength = np.array([views.brightness, views.contrast, views.saturation])
    blend = _between(u[:, :3], np.maximum(0, 1 - strength), 1 + strength)
    hue = _between(u[:, 3:], -views.hue, views.hue)
    neutral = np.array([1.0, 1.0, 1.0, 0.0])
    return np.where(jitter[:, None], np.concatenate([blend, hue], axis=1), neutral).astype(
        np.float32
    )


def _between(
    u: Float[np.ndarray, ...], low: float | np.ndarray, high: float | np.ndarray
) -> Float[np.ndarray, ...]:
    return low + u * (high - low)


def _offsets(u: Float[np.ndarray, "B 2"], shift: int) -> Int32[np.ndarray, "B 2"]:
    return (u * (shift + 1)).astype(np.int32)
