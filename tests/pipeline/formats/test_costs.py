"""What anybody's file costs grows with its size and no faster: ratios of 1x and 4x, and stated limits."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pipeline_data import jpeg

from cmae.errors import CmaeError
from cmae.pipeline.formats.images.jpeg import (
    MAX_SCANS,
    BadImageError,
    inspect_jpeg,
    lacks_adobe_marker,
)
from cmae.pipeline.formats.images.jpeg_scan import find_zero_block
from cmae.pipeline.formats.members.file_names import is_side_file, split_name
from cmae.pipeline.formats.members.labels import read_label
from cmae.pipeline.formats.shard_index import build_index
from cmae.pipeline.formats.tar import _pax_records, iter_records
from cmae.pipeline.remote.schemes import identity, redact
from cmae.pipeline.sources.expand import _num_expanded, expand_shards
from cmae.printable import printable, printable_lines

PHOTO = jpeg(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
BODY, END = PHOTO[:-2], PHOTO[-2:]


def tar_of_one_key(count: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(count):
            tar.addfile(tarfile.TarInfo(f"a.{number}.cls"))
    return file.getvalue()


def exif(count: int) -> bytes:
    """Segments of EXIF whose directories claim 65535 entries."""
    head = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    return (b"\xff\xe1\xff\xff" + head + bytes(65533 - len(head))) * count


CASES: dict[str, tuple[Callable[[Any], object], Callable[[int], Any], int]] = {
    "jpeg: numbers between markers": (inspect_jpeg, lambda n: BODY[:2] + b"\xff\x01\0" * n, 40_000),
    "jpeg: fill bytes": (inspect_jpeg, lambda n: BODY[:2] + b"\xff" * n, 200_000),
    "jpeg: empty segments": (inspect_jpeg, lambda n: BODY[:2] + b"\xff\xe0\0\x02" * n, 40_000),
    "jpeg: exif": (inspect_jpeg, lambda n: BODY[:2] + exif(n), 12),
    "jpeg: adobe": (
        lacks_adobe_marker,
        lambda n: BODY[:2] + b"\xff\xee\0\x02" * n + BODY[2:],
        40_000,
    ),
    "jpeg: a run of zeros, tables": (
        find_zero_block,
        lambda n: BODY[:2] + (b"\xff\xc4\0\x13" + bytes(17)) * n + BODY[2:] + bytes(8192) + END,
        100,
    ),
    "jpeg: a run of zeros, restarts": (
        find_zero_block,
        lambda n: BODY + bytes(8192) + b"\xff\xd0" * n + END,
        200_000,
    ),
    "tar: one key": (
        lambda data: list(iter_records(io.BytesIO(data), name="x")),
        tar_of_one_key,
        1000,
    ),
    "tar: pax lines": (_pax_records, lambda n: b"8 a=bcd\n" * n, 20_000),
    "name: folders": (split_name, lambda n: "a/" * n + "x.jpg", 400_000),
    "name: dots": (split_name, lambda n: "a." * n + "jpg", 400_000),
    "name: hidden folders": (is_side_file, lambda n: "._a/" * n, 200_000),
    "label: digits": (lambda data: read_label("cls", data), lambda n: b"9" * n, 4_000_000),
    "label: spaces": (
        lambda data: read_label("cls", data),
        lambda n: b" " * n + b"x" + b" " * n,
        4_000_000,
    ),
    "label: json": (
        lambda data: read_label("json", data),
        lambda n: b'{"label": 1, "x": "' + b"\\u0041" * n + b'"}',
        400_000,
    ),
    "url: schemes": (redact, lambda n: "a://" * n, 20_000),
    "url: users": (redact, lambda n: "http://" + "a:b@" * n, 40_000),
    "url: query": (identity, lambda n: "http://h/x?" + "a=b&" * n, 20_000),
    "braces: open": (_num_expanded, lambda n: "{" * n, 200_000),
    "braces: commas": (_num_expanded, lambda n: "{a," * n, 100_000),
    "printable": (lambda text: printable(text, limit=len(text)), lambda n: "\x1b" * n, 20_000),
    "printable lines": (printable_lines, lambda n: "\n" * n, 40_000),
}


def seconds(function: Callable[[Any], object], data: Any) -> float:
    """CPU time of this thread; the least of three."""
    costs = []
    for _ in range(3):
        started = time.thread_time()
        with suppress(CmaeError):
            function(data)
        costs.append(time.thread_time() - started)
    return min(costs)


@pytest.mark.parametrize("name", CASES)
def test_four_times_the_input_costs_about_four_times(name: str) -> None:
    function, build, count = CASES[name]
    one, four = build(count), build(4 * count)
    # 16 where the cost is quadratic. A loaded machine may spoil a measurement, but not three of them.
    ratios = [seconds(function, four) / max(seconds(function, one), 1e-5) for _ in range(1)]
    while min(ratios) > 8 and len(ratios) < 3:
        ratios.append(seconds(function, four) / max(seconds(function, one), 1e-5))
    assert min(ratios) <= 8


def test_an_image_of_too_many_scans_is_refused() -> None:
    scan = BODY[BODY.index(b"\xff\xda") :]
    header = BODY[: BODY.index(b"\xff\xda")]
    assert inspect_jpeg(header + scan * MAX_SCANS + END).height == 48
    with pytest.raises(BadImageError, match="more than 256 scans"):
        inspect_jpeg(header + scan * (MAX_SCANS + 1) + END)


@pytest.mark.parametrize(
    "pattern",
    [
        "x-{0..999999999}.tar",
        "x-{0..9999}-{0..9999}.tar",
        "{a,b}" * 60,
        "{1..1}" * 2000,
        "{0..9" + "9" * 5000 + "}.tar",
    ],
    ids=lambda pattern: pattern[:20],
)
def test_braces_that_name_too_much_are_refused_before_anything_is_made(pattern: str) -> None:
    with pytest.raises(CmaeError, match=r"names more than 1000000 files"):
        expand_shards(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{a,b}" * 19 + ".tar", "10000 of 10000 files are missing"),
        ("{a,b}" * 19 + "?.tar", "10000 of 10000 files are missing"),
        ("{.,.}{/,/}" * 9 + "*.tar", "more than 10000 folders or globs"),
    ],
    ids=["names", "globs that find nothing", "globs that find the same"],
)
def test_braces_that_are_looked_up_in_vain_end_soon(
    pattern: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.tar").touch()
    started = time.thread_time()
    with pytest.raises(CmaeError, match=message):
        expand_shards(pattern)
    assert time.thread_time() - started < 5


def test_a_name_without_end_is_left_out_of_the_index(tmp_path: Path) -> None:
    """Of one such key the index of 10000 samples would have a gigabyte: numpy makes all as long."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.jpg", "b" * 200_000 + ".jpg", "c.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(PHOTO)
            tar.addfile(member, io.BytesIO(PHOTO))
    index = build_index(tmp_path / "a.tar")
    assert index.keys.tolist() == ["a", "c"]
    assert "file with a name of more than" in "".join(index.members.lost_lines())
