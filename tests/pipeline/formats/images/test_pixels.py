from __future__ import annotations

import io
import subprocess

import numpy as np
import pytest
from PIL import Image
from support.fault_data import noise
from support.pipeline_data import jpeg, photo

from cmae.pipeline.formats.images.jpeg import BadImageError, build_cpu_decoder
from cmae.pipeline.formats.images.pixels import OTHER_FORMATS, decode_any, decode_jpeg


def without_adobe_marker(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]


def cmyk() -> bytes:
    return jpeg(Image.fromarray(photo(64, 80)).convert("CMYK"), subsampling=0)


@pytest.mark.parametrize("has_marker", [True, False])
def test_cmyk_is_read_as_the_loader_reads_it(has_marker: bool) -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    data = cmyk() if has_marker else without_adobe_marker(cmyk())
    loader = np.asarray(build_cpu_decoder().decode(data)).astype(int)
    assert np.abs(np.asarray(decode_jpeg(data)).astype(int) - loader).mean() < 1


def test_without_the_marker_a_cmyk_image_is_the_negative_of_its_ink() -> None:
    one, other = (np.asarray(decode_jpeg(data)) for data in (cmyk(), without_adobe_marker(cmyk())))
    assert one.mean() > other.mean() + 20 or other.mean() > one.mean() + 20


def test_rgb_and_grey_are_pillows() -> None:
    for image in (Image.fromarray(photo()), Image.fromarray(photo()).convert("L")):
        data = jpeg(image)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(decode_jpeg(data)), expected)


def test_no_file_chooses_a_decoder_that_starts_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        subprocess, "check_call", lambda *arguments, **options: pytest.fail("started")
    )
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("started"))
    postscript = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF"
    )
    for decode in (decode_any, decode_jpeg):
        with pytest.raises(BadImageError):
            decode(postscript)
    assert "EPS" not in OTHER_FORMATS


@pytest.mark.parametrize(
    "image_format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "DDS"]
)
def test_damage_in_any_format_is_a_bad_image_and_nothing_else(image_format: str) -> None:
    file = io.BytesIO()
    try:
        Image.open(io.BytesIO(noise(0, 40, 40))).save(file, image_format)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {image_format}")
    whole, rng = file.getvalue(), np.random.default_rng(0)
    if image_format == "DDS":
        with pytest.raises(BadImageError):
            decode_any(whole)
    for _ in range(60):
        data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for at in rng.integers(0, len(data), 8):
            data[at] = rng.integers(0, 256)
        try:
            decode_any(bytes(data))
        except BadImageError:
            continue
