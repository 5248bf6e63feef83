"""Every kind of bad or unusual record that shards meet, made from one good image."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from support.pipeline_data import jpeg, photo

Fault = Callable[[bytes], bytes]


def noise(number: int, height: int = 110, width: int = 120) -> bytes:
    """Noise compresses badly: the middle of a shard is then far from the ends that the digest covers."""
    rng = np.random.default_rng(number)
    return jpeg(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def bit_flip(data: bytes) -> bytes:
    """In the compressed pixels: even of a tiny image they are the last quarter."""
    changed = bytearray(data)
    changed[3 * len(data) // 4] ^= 0x10
    return bytes(changed)


def zeroed_block(data: bytes) -> bytes:
    """A page of zeros in the compressed pixels; header and end stay."""
    middle = len(data) // 2
    return data[:middle] + bytes(4096) + data[middle + 4096 :]


def all_zeros(data: bytes) -> bytes:
    return bytes(len(data))


def without_huffman_table(data: bytes) -> bytes:
    """Header and end are in order; only a decoder finds out."""
    table = data.index(b"\xff\xc4")
    return data[: table + 5] + b"\xff" * 16 + data[table + 21 :]


def saved_as(image_format: str, **options: object) -> Fault:
    def save(data: bytes) -> bytes:
        file = io.BytesIO()
        Image.open(io.BytesIO(data)).save(file, image_format, **options)
        return file.getvalue()

    return save


def in_mode(mode: str) -> Fault:
    def convert(data: bytes) -> bytes:
        return jpeg(Image.open(io.BytesIO(data)).convert(mode))

    return convert


def _frame(data: bytes) -> int:
    return data.index(b"\xff\xc0")


def twelve_bit(data: bytes) -> bytes:
    frame = _frame(data)
    return data[: frame + 4] + b"\x0c" + data[frame + 5 :]


def bomb(data: bytes) -> bytes:
    """A header that claims 20000 x 20000 pixels."""
    frame, side = _frame(data), (20000).to_bytes(2)
    return data[: frame + 5] + side + side + data[frame + 9 :]


def one_pixel(data: bytes) -> bytes:
    return jpeg(photo(1, 1))


def exif_turned(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data))
    exif = image.getexif()
    exif[0x0112] = 6
    return jpeg(image, exif=exif.tobytes())


def empty(data: bytes) -> bytes:
    return b""


def html(data: bytes) -> bytes:
    return b"<!DOCTYPE html><html><body>404 not found</body></html>"


SEEN_BY_THE_HEADER_WALK: dict[str, tuple[Fault, str]] = {
    "truncated JPEG": (truncated, "truncated: no end-of-image marker"),
    "all zeros": (all_zeros, "found zero bytes"),
    "PNG named .jpg": (saved_as("PNG"), "found PNG"),
    "WebP named .jpg": (saved_as("WEBP"), "found WebP"),
    "12-bit JPEG": (twelve_bit, "TWELVE_BIT"),
    "20000 x 20000 header": (bomb, "too large: 20000 x 20000"),
    "empty file": (empty, "an empty file"),
    "HTML page": (html, "an HTML page"),
}
"""Fault -> how to make it, and what the ledger says of it in a stream."""

HARMLESS: dict[str, Fault] = {
    "CMYK": in_mode("CMYK"),
    "grayscale": in_mode("L"),
    "1 x 1": one_pixel,
    "EXIF turn": exif_turned,
    "progressive": saved_as("JPEG", progressive=True),
}
"""Unusual images that are used like all others."""
