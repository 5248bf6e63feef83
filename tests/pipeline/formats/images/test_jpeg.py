from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmae.pipeline.formats.images.jpeg import BadImageError, JpegInfo, JpegKind, inspect_jpeg
from cmae.pipeline.formats.tar import iter_records


def encode(mode: str = "RGB", size: tuple[int, int] = (31, 17), **options: object) -> bytes:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def frame_position(data: bytes, marker: int = 0xC0) -> int:
    return data.index(bytes([0xFF, marker]))


def with_frame(data: bytes, *, at: int, value: bytes) -> bytes:
    start = frame_position(data) + at
    return data[:start] + value + data[start + len(value) :]


def real_images(shards: list[Path]) -> Iterator[bytes]:
    for shard in shards:
        with open(shard, "rb") as file:
            for record in iter_records(file, name=shard.name):
                yield record.image


@pytest.mark.parametrize(
    ("mode", "options", "kind"),
    [
        ("RGB", {}, JpegKind.BASELINE),
        ("RGB", {"progressive": True}, JpegKind.PROGRESSIVE),
        ("RGB", {"subsampling": 0, "optimize": True}, JpegKind.BASELINE),
        ("L", {}, JpegKind.GRAYSCALE),
        ("L", {"progressive": True}, JpegKind.GRAYSCALE),
        ("CMYK", {}, JpegKind.CMYK),
    ],
)
def test_size_and_kind_are_those_that_were_encoded(
    mode: str, options: dict[str, object], kind: JpegKind
) -> None:
    data = encode(mode, (31, 17), **options)
    assert inspect_jpeg(data) == JpegInfo(height=17, width=31, kind=kind, orientation=1)
    assert inspect_jpeg(memoryview(data)) == inspect_jpeg(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("endian", ["<", ">"])
def test_orientation_is_read_in_both_byte_orders(orientation: int, endian: str) -> None:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010F] = "a camera"
    exif[0x0112] = orientation
    assert inspect_jpeg(encode(exif=exif.tobytes())).orientation == orientation


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_an_orientation_outside_the_standard_counts_as_upright(orientation: int) -> None:
    tiff = b"II*\0" + struct.pack("<IHHHII", 8, 1, 0x0112, 3, 1, orientation)
    assert inspect_jpeg(encode(exif=b"Exif\0\0" + tiff)).orientation == 1


def test_a_broken_exif_directory_is_no_error() -> None:
    assert inspect_jpeg(encode(exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).orientation == 1
    assert inspect_jpeg(encode(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")).orientation == 1


@pytest.mark.parametrize(
    ("marker", "precision", "components", "kind"),
    [
        (0xC1, 8, 3, JpegKind.BASELINE),
        (0xC1, 12, 3, JpegKind.TWELVE_BIT),
        (0xC3, 8, 3, JpegKind.LOSSLESS),
        (0xC5, 8, 3, JpegKind.LOSSLESS),
        (0xC9, 8, 3, JpegKind.ARITHMETIC),
        (0xCA, 8, 3, JpegKind.ARITHMETIC),
        (0xC0, 8, 2, JpegKind.OTHER),
    ],
)
def test_rare_codings_are_told_apart_and_are_not_decodable(
    marker: int, precision: int, components: int, kind: JpegKind
) -> None:
    data = with_frame(encode(), at=9, value=bytes([components]))
    data = with_frame(data, at=4, value=bytes([precision]))
    data = with_frame(data, at=1, value=bytes([marker]))
    assert inspect_jpeg(data).kind is kind
    assert kind.decodable == (kind is JpegKind.BASELINE)


@pytest.mark.parametrize("tail", [b"\0", b"\r\n", b"junk" * 50_000])
def test_bytes_after_the_end_are_tolerated(tail: bytes) -> None:
    assert inspect_jpeg(encode() + tail) == inspect_jpeg(encode())


def test_fill_bytes_and_garbage_between_segments_are_tolerated_as_decoders_do() -> None:
    data = encode()
    start = frame_position(data)
    for inserted in (b"\xff\xff\xff", b"\x00\x12\x34"):
        assert inspect_jpeg(data[:start] + inserted + data[start:]) == inspect_jpeg(data)


def test_every_truncation_is_found() -> None:
    data = encode(size=(64, 48))
    for length in range(3, len(data)):
        with pytest.raises(BadImageError, match=r"truncated|no frame header"):
            inspect_jpeg(data[:length])


def test_a_truncation_is_found_behind_a_thumbnail_with_its_own_end_marker() -> None:
    data = encode(size=(200, 150), exif=b"Exif\0\0II*\0" + encode(size=(16, 16)))
    assert inspect_jpeg(data).width == 200
    with pytest.raises(BadImageError, match="no end-of-image marker"):
        inspect_jpeg(data[:-20])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n....", "PNG"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "WebP"),
        (b"GIF89a....", "GIF"),
        (b"\0\0\0\x20ftypavif", "AVIF"),
        (b"\n <!DOCTYPE html><html>", "HTML"),
        (b"\0" * 600, "zero bytes"),
        (b"404: Not Found...", "text '404: Not Found..'"),
        (b"\x01\x02\x03\x04", "bytes 01 02 03 04"),
    ],
)
def test_another_format_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=f"not a JPEG: found .*{reason}"):
        inspect_jpeg(data)


def test_formats_that_pillow_writes_are_named() -> None:
    for name in ("PNG", "GIF", "BMP", "TIFF", "WebP"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, name)
        with pytest.raises(BadImageError, match=f"found {name}"):
            inspect_jpeg(buffer.getvalue())


def test_the_pixel_limit_is_inclusive_and_named() -> None:
    huge = with_frame(encode(), at=5, value=struct.pack(">HH", 20_000, 20_000))
    with pytest.raises(BadImageError, match=r"20000 x 20000 is 400\.0 megapixels"):
        inspect_jpeg(huge)
    assert inspect_jpeg(huge, max_pixels=400_000_000).height == 20_000
    with pytest.raises(BadImageError, match="too large"):
        inspect_jpeg(huge, max_pixels=399_999_999)


def test_a_header_without_pixels_is_refused() -> None:
    with pytest.raises(BadImageError, match="no pixels"):
        inspect_jpeg(with_frame(encode(), at=5, value=b"\0\0"))


def test_all_real_jpegs_pass_and_agree_with_pillow(imagenet_sample: list[Path]) -> None:
    count = 0
    for data in real_images(imagenet_sample):
        info = inspect_jpeg(data)
        with Image.open(io.BytesIO(data)) as image:
            assert (info.width, info.height) == image.size
            assert (info.kind is JpegKind.GRAYSCALE) == (image.mode == "L")
            assert (info.kind is JpegKind.PROGRESSIVE) == ("progressive" in image.info)
            assert info.orientation == (image.getexif().get(0x0112) or 1)  # some say 0
        count += 1
    assert count == 500
