"""Pixels of an image by Pillow: which formats may be opened, and how CMYK becomes RGB.

Pillow chooses a decoder by what a file says of itself, and some of them start other programs (PostScript).
So every call names the formats that it takes.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageChops, ImageOps

from cmae.pipeline.formats.images.jpeg import MAX_PIXELS, BadImageError, lacks_adobe_marker

OTHER_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What `decode_any` takes beside JPEG."""


def decode_jpeg(data: bytes, *, draft_px: int | None = None) -> Image.Image:
    """RGB pixels of a JPEG, not turned by EXIF.

    CMYK without a marker of Adobe is taken as it is stored: 0 is no ink, as nvImageCodec and DALI have it.
    (With the marker 0 is full ink. Pillow by itself takes every file so.)

    Args:
        data: The whole file.
        draft_px: Decode at a lower resolution where that is faster: at least this many pixels on each side.

    Raises:
        BadImageError: Pillow cannot decode it, or it is above the pixel limit.
    """
    return _decode(data, formats=("JPEG",), draft_px=draft_px)


def decode_any(data: bytes, *, turn: bool = False) -> Image.Image:
    """RGB pixels of the first frame of a JPEG or one of OTHER_FORMATS; transparency is dropped.

    Args:
        data: The whole file.
        turn: Turn it as its EXIF says.

    Raises:
        BadImageError: Another format, damaged, or above the pixel limit.
    """
    return _decode(data, formats=("JPEG", *OTHER_FORMATS), turn=turn)


def _decode(
    data: bytes, *, formats: tuple[str, ...], draft_px: int | None = None, turn: bool = False
) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Of large images, for which our limit is lower, and with text from the file in them.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=formats) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise BadImageError(f"too large: {opened.width} x {opened.height}")
                if draft_px is not None:
                    opened.draft("RGB", (draft_px, draft_px))
                is_plain_cmyk = opened.mode == "CMYK" and opened.format in ("JPEG", "MPO")
                is_plain_cmyk = is_plain_cmyk and lacks_adobe_marker(data)
                image: Image.Image = ImageOps.exif_transpose(opened) if turn else opened
                return _to_rgb(image, is_plain_cmyk=is_plain_cmyk)
    except BadImageError:
        raise
    # Plug-ins raise whatever their parser trips over: struct.error, KeyError, RuntimeError, SyntaxError, ...
    except Exception as error:
        raise BadImageError(f"Pillow cannot decode it: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image, *, is_plain_cmyk: bool) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return (ImageChops.invert(image) if is_plain_cmyk else image).convert("RGB")
