"""Executable definition of the views, one image at a time: Pillow for geometry, torchvision for colour.

Slow and simple on purpose. The fast paths are held to it by tests; where they differ, this is right.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torchvision.transforms import functional as tv

from cmae.pipeline.formats.images.pixels import decode_jpeg
from cmae.pipeline.views.config import ViewConfig
from cmae.pipeline.views.params import JITTER_ORDERS, ViewParams


def reference_views(
    jpeg: bytes, params: ViewParams, *, views: ViewConfig, row: int = 0
) -> tuple[UInt8[np.ndarray, "S S 3"], UInt8[np.ndarray, "S S 3"] | None]:
    """Online and target view of one JPEG, by row `row` of `params`; target is None for num_views=1.

    EXIF orientation is ignored; grey and CMYK files become RGB.
    """
    image = decode_jpeg(jpeg)
    source = _window(
        image, params.crop[row], size=views.source_crop_size, flip=bool(params.flip[row])
    )
    online = _crop(source, params.online_offset[row], size=views.img_size)
    if not views.has_target:
        return np.asarray(online), None
    if views.has_own_target_crop:
        flip = bool(params.target_flip[row])
        target = _window(image, params.target_crop[row], size=views.img_size, flip=flip)
    else:
        target = _crop(source, params.target_offset[row], size=views.img_size)
    pixels = np.asarray(target)
    if views.has_color:
        pixels = reference_color(pixels, params, row=row)
    return np.asarray(online), pixels


def reference_color(
    pixels: UInt8[np.ndarray, "S S 3"], params: ViewParams, *, row: int = 0
) -> UInt8[np.ndarray, "S S 3"]:
    """The 'exact' colour operations: jitter in the drawn order, grayscale, Gaussian blur."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    if params.jitter[row]:
        for number in JITTER_ORDERS[params.order[row]]:
            image = adjust[number](image, float(params.factors[row, number]))
    if params.grayscale[row]:
        image = tv.rgb_to_grayscale(image, num_output_channels=3)
    if params.blur_sigma[row] > 0:
        image = tv.gaussian_blur(image, kernel_size=23, sigma=float(params.blur_sigma[row]))
    return image.permute(1, 2, 0).numpy()


def _window(image: Image.Image, crop: np.ndarray, *, size: int, flip: bool) -> Image.Image:
    """Crop first, then resize: pixels outside the window have no say in it."""
    top, left, height, width = map(int, crop)
    window = image.crop((left, top, left + width, top + height))
    resized = window.resize((size, size), Image.Resampling.BICUBIC)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized


def _crop(source: Image.Image, offset: np.ndarray, *, size: int) -> Image.Image:
    top, left = map(int, offset)
    return source.crop((left, top, left + size, top + size))
