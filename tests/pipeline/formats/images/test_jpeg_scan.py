from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image
from support.fault_data import noise, saved_as, zeroed_block
from support.pipeline_data import jpeg, photo

from cmae.pipeline.formats.images.jpeg import (
    BadImageError,
    find_frame,
    inspect_jpeg,
    lacks_adobe_marker,
)
from cmae.pipeline.formats.images.jpeg_scan import find_zero_block

OPTIONS: list[dict[str, object]] = [
    {},
    {"optimize": True},
    {"subsampling": 0, "optimize": True},
    {"subsampling": 2, "quality": 30},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 7, "optimize": True},
]


def blank(mode: str = "RGB", side: int = 4000, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (side, side)).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_a_lost_block_is_told_by_the_code_that_follows_it(
    options: dict[str, object], seed: int
) -> None:
    data = saved_as("JPEG", **options)(noise(seed, 300, 250))
    assert find_zero_block(data) is None
    found = find_zero_block(zeroed_block(data))
    assert found is not None
    assert found.fault


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_blank_image_that_holds_as_many_zeros_is_not_called_damaged(mode: str) -> None:
    data = blank(mode, optimize=True)
    assert bytes(4096) in data
    found = find_zero_block(data)
    assert found is not None
    assert found.fault == ""


def test_zeros_outside_the_compressed_pixels_are_no_sign_of_anything() -> None:
    data = jpeg(photo())
    assert find_zero_block(data + bytes(10000)) is None
    assert find_zero_block(data[:-2] + bytes(2000) + data[-2:]) is None
    segment = b"\xff\xef" + (9002).to_bytes(2) + bytes(9000)
    assert find_zero_block(data[:2] + segment + data[2:]) is None


def test_zeros_that_pad_a_scan_are_suspected_and_not_condemned() -> None:
    data = noise(0, 100, 100)
    found = find_zero_block(data[:-2] + bytes(5000) + data[-2:])
    assert found is not None
    assert found.fault == ""


def test_a_progressive_scan_cannot_be_followed_and_is_only_suspected() -> None:
    data = zeroed_block(saved_as("JPEG", progressive=True)(noise(0, 300, 300)))
    found = find_zero_block(data)
    assert found is not None
    assert found.fault == ""


@pytest.mark.parametrize(
    "unit", [b"\xff\x01\x00", b"\x00", b"\xff\xfe\x00\x02", b"\xff", b"\xff\x01"]
)
def test_the_header_walk_takes_time_in_proportion_to_the_file(unit: bytes) -> None:
    def seconds(num_bytes: int) -> float:
        data = b"\xff\xd8\xff" + unit * (num_bytes // len(unit))
        best = 1e9
        for _ in range(3):
            start = time.perf_counter()
            with pytest.raises(BadImageError):
                inspect_jpeg(data)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(800_000) < 10 * seconds(200_000) + 0.005


def test_a_file_of_thousands_of_scans_is_refused() -> None:
    data = saved_as("JPEG", progressive=True)(jpeg(photo()))
    scan = data.rindex(b"\xff\xda")
    many = data[:scan] + data[scan:-2] * 3000 + data[-2:]
    with pytest.raises(BadImageError, match="more than 256 scans"):
        inspect_jpeg(many)
    # Behind the end of the image the same bytes mean nothing.
    inspect_jpeg(data + b"\xff\xda" * 3000)


def test_the_adobe_marker_is_seen() -> None:
    data = jpeg(Image.fromarray(photo()).convert("CMYK"))
    assert not lacks_adobe_marker(data)
    start = data.index(b"\xff\xee")
    length = int.from_bytes(data[start + 2 : start + 4])
    without = data[:start] + data[start + 2 + length :]
    assert lacks_adobe_marker(without)
    assert find_frame(without)[1] == find_frame(data)[1] - 2 - length


def test_random_damage_raises_nothing() -> None:
    rng = np.random.default_rng(0)
    whole = zeroed_block(noise(1, 200, 200))
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(3, len(data), 20):
            data[at] = rng.integers(0, 256)
        with_cut = bytes(data[: rng.integers(4, len(data))])
        for one in (bytes(data), with_cut):
            try:
                inspect_jpeg(one)
            except BadImageError:
                continue
            find_zero_block(one)
