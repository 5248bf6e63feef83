"""The decode self-test: ways against Pillow, and processes that crash or hang."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_decode
from bench_decode import Way


def test_windows_touch_every_border_and_lie_in_the_image() -> None:
    for width, height in [(500, 375), (333, 251), (40, 36)]:
        windows = bench_decode.draw_windows(width, height)
        assert all(
            min(window) >= 0 and h > 4 and w > 4 for *_, h, w in windows for window in windows
        )
        assert all(top + h <= height and left + w <= width for top, left, h, w in windows)
        assert {
            (top == 0, left == 0, top + h == height, left + w == width)
            for top, left, h, w in windows
        } >= {
            (True, True, False, False),
            (False, False, False, False),
            (True, True, True, True),
        }


@pytest.mark.parametrize("way", bench_decode.find_ways("cpu"), ids=lambda way: way.name)
def test_cpu_decoders_give_pillows_pixels(way: Way) -> None:
    jpeg = bench_decode.draw_jpegs()["4:2:0 odd size"]
    assert bench_decode.is_good(bench_decode.check_kind(way, jpeg))


def test_a_fault_at_a_windows_border_is_told_from_one_inside(monkeypatch: Any) -> None:
    jpeg = bench_decode.draw_jpegs()["4:2:0"]
    full = bench_decode.reference(jpeg)

    def decode(way: Way, jpegs: Any, windows: Any) -> list[np.ndarray]:
        made = [full[t : t + h, left : left + w].copy() for t, left, h, w in windows]
        for image in made:
            image[:, -1] ^= 64
        return made

    monkeypatch.setattr(bench_decode, "decode", decode)
    row = bench_decode.check_kind(Way("window", "mixed"), jpeg)
    assert (row["interior_max"], row["border_max"]) == (0, 64)
    assert not bench_decode.is_good(row)


@pytest.mark.parametrize(
    ("end", "told"),
    [("os.kill(os.getpid(), 11)", "exit code -11"), ("time.sleep(60)", "hangs")],
)
def test_a_process_that_dies_or_hangs_is_one_row(
    end: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import json, os, sys, time\n"
        "for kind in json.loads(sys.argv[2])['kinds']:\n"
        f"    if kind == 'b': {end}\n"
        "    print('ROW ' + json.dumps({'kind': kind}), flush=True)\n"
    )
    monkeypatch.setattr(bench_decode, "__file__", str(child))
    monkeypatch.setattr(bench_decode, "START_S", 3)
    rows = bench_decode.watch({"kinds": ["a", "b", "c"]}, deadline_s=1)
    assert [row["kind"] for row in rows] == ["a", "b", "c"]
    assert told in rows[1]["error"]
    assert "error" not in rows[0] | rows[2]


def test_the_turned_jpeg_is_turned_and_the_others_are_what_they_say() -> None:
    images = {
        kind: Image.open(io.BytesIO(jpeg)) for kind, jpeg in bench_decode.draw_jpegs().items()
    }
    assert images["4:2:0 EXIF-turned"].getexif()[0x0112] == 6
    assert images["progressive"].info.get("progressive")
    assert (images["gray"].mode, images["CMYK"].mode) == ("L", "CMYK")
