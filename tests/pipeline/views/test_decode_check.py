"""The choice of the decoder: each fault forced, and real children on the CPU's graph."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cmae import nvjpeg
from cmae.nvjpeg import NvJpeg, find_packaged
from cmae.pipeline.errors import DataError
from cmae.pipeline.views import decode_check
from cmae.pipeline.views.decode_check import (
    WAYS,
    choose_decode,
    compare,
    draw_image,
    draw_windows,
    find_fault,
    try_in_child,
)

NEW = NvJpeg((13, 3, 2), "/x/libnvjpeg.so.13")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(decode_check, "NVJPEG", NEW)
    try_in_child.cache_clear()


@pytest.mark.parametrize("num_broken", [0, 1, 2])
def test_the_first_way_that_works_is_taken_and_the_others_are_named(num_broken):
    broken = WAYS[:num_broken]
    choice = choose_decode(0, try_way=lambda way, index: "wrong pixels" if way in broken else "")
    assert choice.way == WAYS[num_broken]
    assert len(choice.passed_over) == num_broken
    for way, line in zip(broken, choice.passed_over, strict=True):
        assert line == f"data.gpu_decode={way} does not work here: wrong pixels"
    assert "nvJPEG 13.3.2" in choice.describe()


def test_no_way_at_all_is_an_error_that_names_every_reason():
    with pytest.raises(DataError) as caught:
        choose_decode(0, try_way=lambda way, index: f"{way} is broken")
    assert all(f"{way} is broken" in str(caught.value) for way in WAYS)


def test_an_old_nvjpeg_decodes_no_windows(monkeypatch):
    monkeypatch.setattr(decode_check, "NVJPEG", NvJpeg((13, 0, 1), "/usr/local/cuda/libnvjpeg.so"))
    choice = choose_decode(0, try_way=lambda way, index: "")
    assert choice.way == "whole"
    assert "nvJPEG 13.0.1 (/usr/local/cuda/libnvjpeg.so)" in choice.passed_over[0]
    assert "pip install 'nvidia-nvjpeg>=13.3'" in choice.passed_over[0]


def test_without_nvjpeg_the_cpu_decodes(monkeypatch):
    monkeypatch.setattr(decode_check, "NVJPEG", None)
    assert choose_decode(0, try_way=lambda way, index: "").way == "cpu"


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
            "the decoder crashed (SIGSEGV)",
        ),
        ("import time; time.sleep(60)", "it did not end within 2 s"),
        ("raise RuntimeError('status 8')", "exit code 1: RuntimeError: status 8"),
        ('print(\'{"why": "4:2:0: 7 levels off"}\')', "4:2:0: 7 levels off"),
        ('print(\'{"why": ""}\')', ""),
        (
            "import sys; sys.stderr.write('[x] ROI decode with fancy upsampling may\\n');"
            'print(\'{"why": ""}\')',
            "nvImageCodec says: ROI decode with fancy upsampling may",
        ),
    ],
)
def test_whatever_becomes_of_the_child_is_a_reason(monkeypatch, program, why):
    run = subprocess.run
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda command, **options: run([sys.executable, "-c", program], **options),
    )
    found = try_in_child("window", 0, deadline_s=2)
    assert found.endswith(why) if why else found == ""


@pytest.mark.parametrize("way", WAYS)
def test_every_way_makes_the_pixels_on_a_cpu(way):
    assert find_fault(way, -1) == ""


@pytest.mark.slow
def test_a_child_reports_by_itself():
    assert try_in_child("whole", -1) == ""


@pytest.mark.parametrize("place", ["inside", "at the border"])
def test_wrong_pixels_are_found_where_they_are(place):
    full = np.asarray(draw_image(80, 60))
    windows = draw_windows(80, 60)
    made = [full[t : t + h, x : x + w].copy() for t, x, h, w in windows]
    assert compare(full, windows, made) == ""
    for image in made:
        part = image[3:-3, 3:-3] if place == "inside" else image[:1]
        part ^= 64
    assert f"pixels {place} of windows are" in compare(full, windows, made)


def test_the_packaged_library_is_the_one_of_the_process():
    if find_packaged() is None:
        pytest.skip("nvidia-nvjpeg is not installed")
    assert nvjpeg.NVJPEG is not None
    assert nvjpeg.NVJPEG.version[:2] >= nvjpeg.OLDEST_FOR_WINDOWS
    assert nvjpeg.NVJPEG.path == str(find_packaged())


@pytest.mark.parametrize("first", ["cmae", "torchvision"])
def test_torchvisions_older_library_is_not_taken_unless_it_came_first(first):
    if find_packaged() is None:
        pytest.skip("nvidia-nvjpeg is not installed")
    code = (
        f"import {first}; import timm, cmae.nvjpeg as n; "
        "print(*n.load_nvjpeg().version, n.load_nvjpeg().path)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    major, minor, _, path = done.stdout.split()
    if first == "cmae":
        assert (int(major), int(minor)) >= nvjpeg.OLDEST_FOR_WINDOWS
        assert path == str(find_packaged())
    elif (int(major), int(minor)) < (13, 3):
        # A later torchvision may bring a later one.
        assert "torchvision" in path


def test_it_stays_so_where_another_library_comes_first(tmp_path):
    """As in a CUDA image, whose LD_LIBRARY_PATH names the toolkit's own libraries."""
    if find_packaged() is None:
        pytest.skip("nvidia-nvjpeg is not installed")
    # Any other library of that name would do; nvJPEG's own file is not to be copied for it (10 MB).
    (tmp_path / nvjpeg.SONAME).write_bytes(b"not a library")
    code = "from cmae.nvjpeg import NVJPEG; print(NVJPEG.path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LD_LIBRARY_PATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(find_packaged())
