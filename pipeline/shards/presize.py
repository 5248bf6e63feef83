"""Downscaled images: a large JPEG is downscaled once, so that no epoch decodes its pixels again.

The new file carries a comment that says so. The label travels with the image through every copy and every
new index; images that were not touched keep their bytes and have none. The pixels that this costs are in
docs/design/0014-downscaled-shards.md.
"""

from __future__ import annotations

import io

from PIL import Image

from cmae.errors import CmaeError
from cmae.pipeline.formats.images.jpeg import BadImageError, JpegInfo, JpegKind
from cmae.pipeline.formats.presized import JFIF_BYTES

_ORIENTATION_TAG = 0x0112


def check_downscale(max_size: int | None, quality: int) -> None:
    """Refuse settings that no image can be written with.

    Raises:
        CmaeError: Out of range.
    """
    if max_size is not None and max_size < 16:
        raise CmaeError(
            f"max_size={max_size} must be at least 16 pixels, or null to copy the files as they are"
        )
    if not 1 <= quality <= 100:
        raise CmaeError(f"quality={quality} must be a JPEG quality in 1..100; 95 is the default")


def needs_downscale(info: JpegInfo, max_size: int | None) -> bool:
    """Whether the shorter side exceeds `max_size` pixels.

    CMYK files are left alone: each decoder turns them into RGB in its own way, which resizing would fix.
    """
    is_large = max_size is not None and min(info.height, info.width) > max_size
    return is_large and info.kind != JpegKind.CMYK


def downscale_jpeg(data: bytes, info: JpegInfo, *, max_size: int, quality: int) -> bytes:
    """Downscale a JPEG until its shorter side is `max_size` pixels, and encode it again.

    Antialiased Lanczos and full chroma resolution (4:4:4), which cost the fewest pixels of what was tried.
    Stored rows stay rows: the EXIF orientation is carried over, not applied. So is the ICC profile.

    Raises:
        BadImageError: Pillow cannot decode it.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.load()
    except Exception as error:  # whatever Pillow's parser trips over
        raise BadImageError(f"Pillow cannot decode it, so it cannot be resized: {error}") from error
    ratio = max_size / min(image.size)
    width, height = (round(side * ratio) for side in image.size)
    mark = (
        f"cmae presized {info.width}x{info.height} -> {width}x{height}, "
        f"max_size {max_size}, quality {quality}"
    )
    exif = Image.Exif()
    if info.orientation != 1:
        exif[_ORIENTATION_TAG] = info.orientation
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(
        file,
        "JPEG",
        quality=quality,
        subsampling="4:4:4",
        exif=exif,
        icc_profile=image.info.get("icc_profile"),
    )
    encoded = file.getvalue()
    # Not Pillow's `comment`: that follows the colour profile, and would have to be looked for.
    comment = b"\xff\xfe" + (len(mark) + 2).to_bytes(2) + mark.encode()
    return encoded[:JFIF_BYTES] + comment + encoded[JFIF_BYTES:]
