"""JPEG header walk: size, kind and orientation of a file in microseconds, without decoding it.

One bad JPEG fails its whole DALI batch, so files are looked at before they are decoded. The walk finds
what a decoder would refuse (another format, a header cut short, a missing end) and what it would
accept to its cost (a header that claims 20000 x 20000 pixels). It cannot see flipped bits inside the
compressed pixels: decoders do not either, and the index keeps a CRC32 for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Literal, NamedTuple

from cmae.errors import CmaeError

Decode = Literal["none", "pil", "nvimgcodec"]
"""Who decodes images for a check: nobody, Pillow, or nvImageCodec on the CPU."""

MAX_PIXELS = 100_000_000
"""Default pixel limit; such an image is 300 MB once decoded."""

MAX_SCANS = 256
"""Scans of one image: a decoder goes over all pixels once for each (encoders write about ten)."""

_SOF_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # DHT, JPG and DAC share the range
_MARKERS_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RST0-7, SOI
_EOI, _SOS, _APP1, _APP14 = 0xD9, 0xDA, 0xE1, 0xEE
_END_OF_IMAGE = b"\xff\xd9"
_START_OF_SCAN = b"\xff\xda"
_ORIENTATION_TAG = 0x0112

_SIGNATURES = (
    (0, b"\x89PNG", "PNG"),
    (0, b"GIF8", "GIF"),
    (8, b"WEBP", "WebP"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (4, b"ftypavi", "AVIF"),
    (4, b"ftyp", "HEIF or MP4"),
    (0, b"\0\0\0\x0cjP", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x1f\x8b", "gzip data"),
    (0, b"PK\x03\x04", "zip archive"),
    (0, b"%PDF", "PDF"),
    (0, b"\0\0\0\0", "zero bytes"),
)


class BadImageError(CmaeError):
    """The bytes are not a JPEG that can be decoded; the message is the reason, without a file name."""


class JpegKind(IntEnum):
    """What a decoder has to do with the file.

    The first that applies: an unusual coding, then the number of colour components, then the scan order (so a
    progressive grey image is GRAYSCALE). The values are stored in index files and never change.
    """

    BASELINE = 0
    """Three components, 8 bits, sequential Huffman coding."""
    PROGRESSIVE = 1
    """Three components, 8 bits, several scans: more work for a decoder, and none for hardware ones."""
    GRAYSCALE = 2
    CMYK = 3
    """Four components, CMYK or YCCK."""
    TWELVE_BIT = 4
    """Any sample precision other than 8 bits."""
    LOSSLESS = 5
    """Lossless or hierarchical coding."""
    ARITHMETIC = 6
    OTHER = 7
    """A number of components other than 1, 3 and 4."""
    BAD = 255
    """Only in index files: the header walk raised BadImageError."""

    @property
    def decodable(self) -> bool:
        """Whether DALI, nvImageCodec and Pillow all decode this kind to RGB."""
        return self <= JpegKind.CMYK


class JpegInfo(NamedTuple):
    """Facts from a JPEG header.

    `height` and `width` are those of the stored pixels, before any turn that `orientation` (EXIF 1..8,
    1 = upright or not stated) asks for.
    """

    height: int
    width: int
    kind: JpegKind
    orientation: int


def inspect_jpeg(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> JpegInfo:
    """Walk the markers to the frame header and check that the file has its end.

    Bytes after the end-of-image marker are tolerated (cameras and converters append some).

    Args:
        data: The whole file.
        max_pixels: Largest height * width accepted.

    Raises:
        BadImageError: Not a JPEG (names what it is instead), truncated, without frame header or pixels,
            too large, or of too many scans.
    """
    if bytes(data[:3]) != b"\xff\xd8\xff":
        raise BadImageError(f"not a JPEG: found {_describe(bytes(data[:512]))}")
    data = bytes(data)  # of bytes, no copy
    try:
        marker, frame, orientation = find_frame(data)
        height = data[frame + 5] << 8 | data[frame + 6]
        width = data[frame + 7] << 8 | data[frame + 8]
        kind = _kind(marker, precision=data[frame + 4], num_components=data[frame + 9])
    except IndexError:
        raise BadImageError(f"truncated: the header does not fit in {len(data)} bytes") from None
    if height * width == 0:
        raise BadImageError(f"no pixels: the header says {width} x {height}")
    if height * width > max_pixels:
        raise BadImageError(
            f"too large: {width} x {height} is {height * width / 1e6:.1f} megapixels, "
            f"the limit is {max_pixels / 1e6:.1f}"
        )
    if not data.endswith(_END_OF_IMAGE) and data.find(_END_OF_IMAGE, frame) < 0:
        # In compressed data 0xFF is always followed by a stuffed 0, so this pair can only be the end.
        raise BadImageError(f"truncated: no end-of-image marker in {len(data)} bytes")
    # A thumbnail or a film behind the image may hold the pair too: only many of them are worth the walk.
    if data.count(_START_OF_SCAN, frame) > MAX_SCANS:
        _check_num_scans(data, frame)
    return JpegInfo(height, width, kind, orientation)


class Segment(NamedTuple):
    """A marker, and the bytes that belong to it."""

    marker: int
    position: int
    """Of the marker's 0xFF."""
    end: int
    """Where the next marker is looked for."""


def iter_segments(data: bytes, position: int = 2) -> Iterator[Segment]:
    """Markers from `position` on, up to the end of the image; scans are passed over, other garbage too.

    Raises:
        IndexError: The file ends inside a segment.
        BadImageError: No marker follows.
    """
    while True:
        if data[position] != 0xFF:  # garbage between segments: decoders skip it, so it is no error
            position = _next_marker(data, position)
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == _EOI:
            yield Segment(marker, position, position + 2)
            return
        end = position + 2
        if marker not in _MARKERS_WITHOUT_LENGTH:
            end += max(data[position + 2] << 8 | data[position + 3], 2)
        yield Segment(marker, position, end)
        position = scan_end(data, end) if marker == _SOS else end


_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def scan_end(data: bytes, start: int) -> int:
    """Where the marker after a scan's compressed data lies; the end of the file where there is none."""
    found = _AFTER_SCAN.search(data, start)
    return len(data) if found is None else found.start()


def find_frame(data: bytes) -> tuple[int, int, int]:
    """Marker and position of the frame header, and the EXIF orientation met before it.

    Raises:
        IndexError: The file ends before.
        BadImageError: Image data or the end come first.
    """
    orientation = 1
    for marker, position, end in iter_segments(data):
        if marker in _SOF_MARKERS:
            return marker, position, orientation
        if marker in (_SOS, _EOI):
            break
        if marker == _APP1 and orientation == 1:
            orientation = _exif_orientation(data[position + 4 : end])
    raise BadImageError("no frame header before the image data")


def lacks_adobe_marker(data: bytes) -> bool:
    """Whether no APP14 of Adobe stands before the frame, which in a CMYK file says that ink is inverted."""
    for marker, position, end in iter_segments(data):
        if marker in _SOF_MARKERS:
            return True
        if marker == _APP14 and data[position + 4 : end].startswith(b"Adobe"):
            return False
    return True


def _check_num_scans(data: bytes, frame: int) -> None:
    num_scans = 0
    for segment in iter_segments(data, frame):
        num_scans += segment.marker == _SOS
        if num_scans > MAX_SCANS:
            raise BadImageError(
                f"more than {MAX_SCANS} scans: each costs a decoder the whole image"
            )


def _next_marker(data: bytes, position: int) -> int:
    found = data.find(b"\xff", position)
    if found < 0:
        raise BadImageError(f"truncated or overwritten: no marker after byte {position}")
    return found


def _kind(marker: int, *, precision: int, num_components: int) -> JpegKind:
    if marker >= 0xC9:
        return JpegKind.ARITHMETIC
    if marker not in (0xC0, 0xC1, 0xC2):
        return JpegKind.LOSSLESS
    if precision != 8:
        return JpegKind.TWELVE_BIT
    if num_components == 3:
        return JpegKind.PROGRESSIVE if marker == 0xC2 else JpegKind.BASELINE
    return {1: JpegKind.GRAYSCALE, 4: JpegKind.CMYK}.get(num_components, JpegKind.OTHER)


def _exif_orientation(segment: bytes) -> int:
    """Orientation tag of an APP1 payload: TIFF 6.0, first image file directory; 1 when absent or broken."""
    if segment[:6] != b"Exif\0\0":
        return 1
    tiff = segment[6:]
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"

    def number(start: int, size: int) -> int:
        return int.from_bytes(tiff[start : start + size], order)

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if entry + 12 > len(tiff):
            break
        if number(entry, 2) == _ORIENTATION_TAG:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def _describe(head: bytes) -> str:
    """Name of the format that these first bytes belong to."""
    if not head:
        return "an empty file"
    for offset, signature, name in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return name
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a failed download?)"
    if text.startswith((b"<?xml", b"<svg")):
        return "XML or SVG"
    if head[:16].isascii() and head[:16].decode("ascii").isprintable():
        return f"text {head[:16].decode('ascii')!r}"
    return f"bytes {head[:8].hex(' ')}"


def inspect_decodable(data: bytes) -> JpegInfo:
    """Header of a JPEG that the decoders accept.

    Raises:
        BadImageError: No JPEG, or of a kind that GPU decoders refuse.
    """
    info = inspect_jpeg(data)
    if not info.kind.decodable:
        raise BadImageError(f"a {info.kind.name.lower()} JPEG, which GPU decoders refuse")
    return info


def build_cpu_decoder(*, options: str = "") -> Any:
    """NvImageCodec's decoder on one thread of the CPU; slow to make, and for one thread at a time."""
    import nvidia.nvimgcodec as nvimgcodec  # here, so that only those who decode load it

    return nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
        options=options,
    )
