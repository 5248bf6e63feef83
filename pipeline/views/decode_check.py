"""Which way of decoding works on this GPU: tried in a child process, so that a crash or a hang ends nothing.

The views cut a window out of each JPEG while it is decoded. Libraries have got that wrong on GPUs: wrong
pixels at a window's border (nvJPEG before 13.3, fancy upsampling), failures and crashes (NVIDIA/nvImageCodec
issue 55). Three ways make the same pixels, the fastest first; the first that passes is taken:

    window   the decoder makes the window alone, on the GPU
    whole    the decoder makes the whole image on the GPU, and the window is cut out of it there
    cpu      the CPU makes the window, and the GPU does the rest
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.Image import Exif

from cmae.nvjpeg import NVJPEG, OLDEST_FOR_WINDOWS
from cmae.pipeline.errors import DataError
from cmae.pipeline.views.config import DecodeWay

WAYS: tuple[DecodeWay, ...] = ("window", "whole", "cpu")
"""In the order in which they are tried."""
BORDER = 2
"""Pixels from a window's edge that count as its border."""
MAX_MEAN_ERROR = 1.0
"""Levels; another IDCT and another rounding stay below it, at the border too."""
DEADLINE_S = 120.0
"""Longest time of a child: it imports DALI and makes a CUDA context."""

Window = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""


class DecodeChoice(NamedTuple):
    """The way that is taken, and why none before it."""

    way: DecodeWay
    passed_over: tuple[str, ...] = ()
    """One line for each way that does not work here."""

    def describe(self) -> str:
        """For people; one line a fact."""
        words = {
            "window": "windows on the GPU",
            "whole": "whole images on the GPU, windows cut out of them there",
            "cpu": "windows on the CPU",
        }
        library = NVJPEG.name if NVJPEG else "no nvJPEG"
        return "\n".join([f"JPEGs are decoded as {words[self.way]} ({library})", *self.passed_over])


def choose_decode(
    device_index: int,
    *,
    try_way: Callable[[DecodeWay, int], str] | None = None,
) -> DecodeChoice:
    """Try the ways in turn on a GPU and take the first that works.

    Args:
        device_index: Number of the GPU.
        try_way: Tries one way and says why it fails, '' when it does not; None = in a child process.

    Raises:
        DataError: No way works.
    """
    passed_over: list[str] = []
    for way in WAYS:
        why = _refused(way) or (try_way or try_in_child)(way, device_index)
        if not why:
            return DecodeChoice(way, tuple(passed_over))
        passed_over.append(f"data.gpu_decode={way} does not work here: {why}")
    raise DataError(
        "no way of decoding JPEGs works on this GPU:\n" + "\n".join(passed_over) + "\n"
        "`cmae doctor` looks at the packages; nvidia-dali-cuda130 and nvidia-nvimgcodec-cu13 may have to be "
        "installed again"
    )


def _refused(way: DecodeWay) -> str:
    """Why a way is not even tried."""
    if way == "cpu":
        return ""
    if NVJPEG is None:
        return "there is no nvJPEG; pip install nvidia-nvjpeg"
    if way == "window" and NVJPEG.version[:2] < OLDEST_FOR_WINDOWS:
        oldest = ".".join(map(str, OLDEST_FOR_WINDOWS))
        return (
            f"{NVJPEG.name} ({NVJPEG.path}) draws borders of windows wrongly, or leaves them to the CPU; "
            f"pip install 'nvidia-nvjpeg>={oldest}', and import cmae before torchvision, which brings 13.0"
        )
    return ""


@cache
def try_in_child(way: DecodeWay, device_index: int, *, deadline_s: float = DEADLINE_S) -> str:
    """Check a way in a process of its own, once; says why it fails, '' when it does not.

    Args:
        way: Way of decoding.
        device_index: Number of the GPU; -1 = the CPU's graph, for tests.
        deadline_s: Seconds after which the process is killed.
    """
    command = [sys.executable, "-m", "cmae.pipeline.views.decode_check", way, str(device_index)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=deadline_s
        )
    except subprocess.TimeoutExpired:
        return f"it did not end within {deadline_s:.0f} s"
    warning = next((line for line in done.stderr.splitlines() if "ROI decode" in line), "")
    if warning:  # refused there, and decoded on the CPU without a word from DALI
        return f"nvImageCodec says: {warning.split(']')[-1].strip()[:200]}"
    if done.returncode < 0:
        return f"the decoder crashed ({signal.Signals(-done.returncode).name})"
    try:
        return str(json.loads(done.stdout.splitlines()[-1])["why"])
    except (IndexError, ValueError, KeyError):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return (
            f"the check ended with exit code {done.returncode}: {lines[-1] if lines else 'no word'}"
        )


# ---- in the child ---------------------------------------------------------------------------------


def find_fault(way: DecodeWay, device_index: int) -> str:
    """Decode windows of JPEGs of every kind and compare them with Pillow's; '' when all agree."""
    jpegs = draw_jpegs()
    most = max(len(draw_windows(*Image.open(io.BytesIO(jpeg)).size)) for jpeg in jpegs.values())
    pipeline = _build(way, device_index, batch_size=most)
    for kind, jpeg in jpegs.items():
        full = reference(jpeg)
        windows = draw_windows(full.shape[1], full.shape[0])
        try:
            made = _decode(pipeline, jpeg, windows)
        except RuntimeError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            return f"{kind}: {' | '.join(lines)[:300]}"
        if why := compare(full, windows, made):
            return f"{kind}: {why}"
    return ""


def compare(
    full: UInt8[np.ndarray, "H W 3"], windows: Sequence[Window], made: Sequence[np.ndarray]
) -> str:
    """Where decoded windows differ from the image, inside or at their borders; '' when nowhere."""
    inner, border = [], []
    for image, (top, left, height, width) in zip(made, windows, strict=True):
        expected = full[top : top + height, left : left + width]
        if image.shape != expected.shape:
            return f"a window has shape {image.shape}, not {expected.shape}"
        error = np.abs(image.astype(int) - expected).max(axis=2)
        is_inner = np.zeros(error.shape, bool)
        is_inner[BORDER:-BORDER, BORDER:-BORDER] = True
        inner.append(error[is_inner])
        border.append(error[~is_inner])
    for name, errors in (("inside", inner), ("at the border", border)):
        mean = float(np.concatenate(errors).mean())
        if mean > MAX_MEAN_ERROR:
            return f"pixels {name} of windows are {mean:.1f} levels off on average"
    return ""


def _build(way: DecodeWay, device_index: int, *, batch_size: int) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    from cmae.pipeline.views.dali import Decode

    on_gpu = device_index >= 0
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=2,
        device_id=device_index if on_gpu else None,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        window = fn.external_source(name="window", dtype=types.DALIDataType.INT32, ndim=1)
        decode = Decode(way, is_gpu=on_gpu, hw_decoder_load=0.65)
        pipeline.set_outputs(decode.window(encoded, window[0:2], window[2:4]))
    pipeline.build()
    return pipeline


def _decode(pipeline: Any, jpeg: bytes, windows: Sequence[Window]) -> list[np.ndarray]:
    pipeline.feed_input("encoded", [np.frombuffer(jpeg, np.uint8)] * len(windows))
    pipeline.feed_input("window", [np.array(window, np.int32) for window in windows])
    images = pipeline.run()[0].as_cpu()
    return [np.array(images.at(row)) for row in range(len(windows))]


def draw_jpegs() -> dict[str, bytes]:
    """JPEGs of every kind that ImageNet holds, or nearly."""
    image = draw_image(500, 375)
    turned = Exif()
    turned[0x0112] = 6  # orientation: a quarter turn; the views ignore it
    progressive = {"progressive": True, "subsampling": 2}
    return {
        "4:2:0": encode(image, subsampling=2),
        "4:2:2": encode(image, subsampling=1),
        "4:4:4": encode(image, subsampling=0),
        "4:2:0 odd size": encode(draw_image(333, 251), subsampling=2),
        "4:2:2 odd size": encode(draw_image(333, 251), subsampling=1),
        "4:2:0 restart": encode(image, subsampling=2, restart_marker_blocks=5),
        "4:2:0 EXIF-turned": encode(image, subsampling=2, exif=turned),
        "gray": encode(image.convert("L")),
        "progressive": encode(image, **progressive),
        "progressive odd size": encode(draw_image(333, 251), **progressive),
        "tiny": encode(draw_image(40, 36), subsampling=2),
        "CMYK": encode(image.convert("CMYK")),
    }


def draw_image(width: int, height: int) -> Image.Image:
    """Slow waves of all colours with some grain, so that every block has luma and chroma of its own."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [np.sin(x / (7 + 4 * c) + c) + np.cos(y / (9 - 2 * c)) for c in range(3)]
    grain = np.random.default_rng(0).normal(0, 6, (height, width, 1))
    pixels = 128 + 55 * np.stack(waves, axis=2) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, **options: Any) -> bytes:
    """A JPEG of quality 90."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def draw_windows(width: int, height: int) -> list[Window]:
    """Windows inside, at every border, at odd places, and the whole image."""
    h, w = height // 2, width // 2
    corners = [(0, 0), (0, width - w), (height - h, 0), (height - h, width - w)]
    inside = [(h // 2, w // 2), (h // 2 + 1, w // 2 + 3), (16, 16), (17, 9)]
    places = [(top, left, h, w) for top, left in [*corners, *inside]]
    odd = [(5, 3, h - 1, w - 3), (7, 11, min(29, height - 7), min(25, width - 11))]
    return [*places, *odd, (0, 0, height, width)]


def reference(jpeg: bytes) -> UInt8[np.ndarray, "H W 3"]:
    """Pillow's pixels, not turned."""
    return np.asarray(Image.open(io.BytesIO(jpeg), formats=["JPEG"]).convert("RGB"))


def main() -> None:
    """Check one way and print one line of JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("device_index", type=int)
    arguments = parser.parse_args()
    print(json.dumps({"why": find_fault(arguments.way, arguments.device_index)}), flush=True)


if __name__ == "__main__":
    main()
