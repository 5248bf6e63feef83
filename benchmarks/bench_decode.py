"""Which ways of decoding a window of a JPEG work on this GPU, how exact are they, and how fast?

    python benchmarks/bench_decode.py --shards '/data/imagenet/train-*.tar'
    python benchmarks/bench_decode.py --device cpu        what needs no GPU, to test this script

The views' graph (pipeline/views/dali.py) asks for a window on the device with fancy upsampling. Two reports
say that this pair fails: NVIDIA/nvImageCodec#55 (window decode of 0.9.0 on A100, GB200, H100, B200), and
nvJPEG before 13.3 (wrong pixels at the window's borders). So every way decodes windows of drawn JPEGs of
every kind and is held against Pillow's full decode. A way runs in a process of its own; a crash or a hang
becomes the row of the kind that it met, and the way goes on with the next kind. The border is
the outer two pixels of a window, shown apart from its interior, since that is where the known fault shows.

Predictions, written before the first run on a GPU: whole decode is exact to .5 LSB of mean (another IDCT)
with any share of the JPEG unit; windows either fail or are as exact, the border too; plain upsampling is
1-2 LSB off at 4:2:0. Rates at 128 ImageNet images and 16 threads: windows mixed 6-8k images/s, whole 10 %
less, CPU 2.5-3k.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import queue
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lib.results import write_result
from PIL import Image

from cmae.pipeline.views.decode_check import (
    BORDER,
    MAX_MEAN_ERROR,
    draw_image,
    draw_jpegs,
    draw_windows,
    encode,
    reference,
)
from cmae.train.bench.harness import summarise

START_S = 40.0
"""Longest wait for a process's first row: packages, a context, the decoder's first use."""


class Way(NamedTuple):
    """One way of decoding a window."""

    decoder: str
    """'window' and 'whole' are DALI's; 'codec' is nvImageCodec alone, with a region."""
    device: str
    """DALI's device, or nvImageCodec's backend."""
    hw_load: float | None = None
    fancy: bool = True

    @property
    def name(self) -> str:
        """As printed."""
        words = [self.decoder, self.device]
        words += [] if self.hw_load is None else [f"unit {self.hw_load:g}"]
        return " ".join([*words, *([] if self.fancy else ["plain"])])


def find_ways(device: str) -> list[Way]:
    """What can be tried on a device, in the order of what one wants to know."""
    if device == "cpu":
        return [Way("window", "cpu"), Way("whole", "cpu"), Way("codec", "CPU_ONLY")]
    loads = (0.65, 0.0, 1.0)
    windows = [Way("window", "mixed", load) for load in loads]
    whole = [Way("whole", "mixed", load) for load in loads]
    plain = [Way("window", "mixed", load, fancy=False) for load in loads]
    codec = [Way("codec", name) for name in ("HYBRID_CPU_GPU", "GPU_ONLY", "HW_GPU_ONLY")]
    return [*windows, *whole, *plain, *codec, Way("window", "cpu")]


def draw_all() -> dict[str, bytes]:
    """The kinds that a run checks at its start, and a large one."""
    return draw_jpegs() | {"large": encode(draw_image(3000, 2000), subsampling=2)}


# ---- the ways -------------------------------------------------------------------------------------


def decode(way: Way, jpegs: Sequence[bytes], windows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """One window of each JPEG, as pixels on the host."""
    if way.decoder == "codec":
        return _decode_by_codec(way, jpegs, windows)
    pipeline = build_pipeline(way, batch_size=len(jpegs), num_threads=4)
    load_inputs(pipeline, jpegs, windows)
    (images,) = pipeline.run()
    images = images.as_cpu() if way.device == "mixed" else images
    return [np.array(images.at(row)) for row in range(len(jpegs))]


def build_pipeline(way: Way, *, batch_size: int, num_threads: int, depth: int = 1) -> Any:
    """DALI's decoder alone, as pipeline/views/dali.py asks for it, or of the whole image and then a slice."""
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    device_id = 0 if way.device == "mixed" else None
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=depth,
    )
    options = {"device": way.device, "jpeg_fancy_upsampling": way.fancy}
    options |= {} if way.hw_load is None else {"hw_decoder_load": way.hw_load}
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.DALIDataType.UINT8, ndim=1)
        window = fn.external_source(name="window", dtype=types.DALIDataType.INT32, ndim=1)
        region = {"start": window[0:2], "shape": window[2:4], "axes": [0, 1]}
        if way.decoder == "window":
            image = fn.decoders.image_slice(encoded, adjust_orientation=False, **region, **options)
        else:
            whole = fn.decoders.image(encoded, adjust_orientation=False, **options)
            image = fn.slice(whole, **region)
        pipeline.set_outputs(image)
    pipeline.build()
    return pipeline


def load_inputs(pipeline: Any, jpegs: Sequence[bytes], windows: Sequence[Sequence[int]]) -> None:
    """The inputs of one batch."""
    pipeline.feed_input("encoded", [np.frombuffer(jpeg, np.uint8) for jpeg in jpegs])
    pipeline.feed_input("window", [np.array(window, np.int32) for window in windows])


def _decode_by_codec(
    way: Way, jpegs: Sequence[bytes], windows: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    from nvidia import nvimgcodec as codec

    device_id = codec.NVIMGCODEC_DEVICE_CPU_ONLY if way.device == "CPU_ONLY" else 0
    decoder = codec.Decoder(
        device_id=device_id,
        backends=[codec.Backend(getattr(codec.BackendKind, way.device))],
        options=f":fancy_upsampling={int(way.fancy)}",
    )
    streams = []
    for jpeg, (top, left, height, width) in zip(jpegs, windows, strict=True):
        region = codec.Region(top, left, top + height, left + width)
        streams.append(codec.CodeStream(jpeg).get_sub_code_stream(region=region))
    params = codec.DecodeParams(apply_exif_orientation=False)
    images = decoder.decode(streams, params=params)
    if any(image is None for image in images):
        raise RuntimeError(f"{sum(image is None for image in images)} windows were not decoded")
    return [np.array(image.cpu()) for image in images]


# ---- in a process of its own ----------------------------------------------------------------------


def check_kinds(way: Way, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for each kind of JPEG."""
    jpegs = draw_all()
    for kind in kinds:
        started = time.perf_counter()
        try:
            row = check_kind(way, jpegs[kind])
        except Exception as error:
            row = {"error": _short(str(error))}
        yield {"kind": kind, "seconds": round(time.perf_counter() - started, 2), **row}


def check_kind(way: Way, jpeg: bytes) -> dict[str, Any]:
    """Errors against Pillow in levels; windows one by one where they fail together."""
    full = reference(jpeg)
    windows = draw_windows(full.shape[1], full.shape[0])
    try:
        made = decode(way, [jpeg] * len(windows), windows)
    except RuntimeError as error:
        failed = [window for window in windows if _fails(way, jpeg, window)]
        return {"error": _short(str(error)), "failed_windows": failed, "windows": len(windows)}
    inner, border = [], []
    for image, (top, left, height, width) in zip(made, windows, strict=True):
        expected = full[top : top + height, left : left + width]
        if image.shape != expected.shape:
            return {"error": f"shape {image.shape}, not {expected.shape}"}
        error = np.abs(image.astype(int) - expected).max(axis=2)
        is_inner = np.zeros(error.shape, bool)
        is_inner[BORDER:-BORDER, BORDER:-BORDER] = True
        inner.append(error[is_inner])
        border.append(error[~is_inner])
    return {
        "interior_mean": float(np.concatenate(inner).mean()),
        "interior_max": int(np.concatenate(inner).max()),
        "border_mean": float(np.concatenate(border).mean()),
        "border_max": int(np.concatenate(border).max()),
    }


def _fails(way: Way, jpeg: bytes, window: Sequence[int]) -> bool:
    try:
        decode(way, [jpeg], [window])
    except RuntimeError:
        return True
    return False


def _short(message: str) -> str:
    lines = [line for line in message.splitlines() if line.strip()]
    return " | ".join(lines)[:600]


def measure_rate(way: Way, shards: str, *, batch_size: int, num_threads: int) -> dict[str, Any]:
    """Images/s of a decoder on real images; every run decodes a window of the views' crop size."""
    jpegs = read_jpegs(shards, 4 * batch_size)
    rng = np.random.default_rng(0)
    windows = []
    for jpeg in jpegs:
        width, height = Image.open(io.BytesIO(jpeg)).size
        share = np.sqrt(rng.uniform(0.2, 1))  # of the area: 'random resized crop'
        h, w = max(1, int(share * height)), max(1, int(share * width))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        windows.append((top, left, h, w))
    pipeline = build_pipeline(way, batch_size=batch_size, num_threads=num_threads, depth=2)
    load_inputs(pipeline, jpegs[:batch_size], windows[:batch_size])  # the first run starts two
    rates = []
    until = time.perf_counter() + 4
    for number in range(60):
        first = number * batch_size % len(jpegs)
        chosen = slice(first, first + batch_size)
        started = time.perf_counter()
        load_inputs(pipeline, jpegs[chosen], windows[chosen])
        (images,) = pipeline.run()
        if way.device == "mixed":
            images.at(0).as_cpu()  # waits for the batch
        if number >= 6:  # buffers grow in the first ones
            rates.append(len(jpegs[chosen]) / (time.perf_counter() - started))
        if time.perf_counter() > until and len(rates) >= 3:
            break
    return {"images_per_s": summarise(rates), "batch_size": batch_size, "threads": num_threads}


def read_jpegs(pattern: str, count: int) -> list[bytes]:
    """The first images of some tars, again and again if there are fewer."""
    found: list[bytes] = []
    for path in sorted(glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.lower().endswith((".jpg", ".jpeg")):
                    found.append(file.read())
                if len(found) == count:
                    return found
    if not found:
        raise FileNotFoundError(f"no .jpg in {pattern!r}")
    return [found[number % len(found)] for number in range(count)]


# ---- the parent -----------------------------------------------------------------------------------


def watch(job: dict[str, Any], *, deadline_s: float) -> list[dict[str, Any]]:
    """Rows of a way over all its kinds, whatever crashes or hangs on the way."""
    kinds, rows = list(job["kinds"]), []
    while kinds:
        came, end = _run_child(job | {"kinds": kinds}, deadline_s=deadline_s)
        rows += came
        kinds = kinds[len(came) :]
        if kinds:  # it stopped before its end: that is this kind's row
            rows.append({"kind": kinds.pop(0), "error": end})
    return rows


def _run_child(job: dict[str, Any], *, deadline_s: float) -> tuple[list[dict[str, Any]], str]:
    """Rows that came, and how the process ended."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
    rows: list[dict[str, Any]] = []
    last, wait_until = "", time.perf_counter() + max(START_S, deadline_s)
    while True:
        try:
            line = lines.get(timeout=max(0.0, wait_until - time.perf_counter()))
        except queue.Empty:
            process.kill()
            process.wait()
            return (
                rows,
                f"hangs: killed after {max(START_S, deadline_s) if not rows else deadline_s:g} s",
            )
        if line is None:
            return rows, f"process died with exit code {process.wait()}: {last}"[:600]
        if line.startswith("ROW "):
            rows.append(json.loads(line[4:]))
            wait_until = time.perf_counter() + deadline_s
        elif line.strip():
            last = line.strip()


def _pass_on(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def run_child(job: dict[str, Any]) -> None:
    """What a process of its own does: rows on its output."""
    way = Way(**job["way"])
    rows = check_kinds(way, job["kinds"])
    if job["shards"] is not None:
        size = {"batch_size": job["batch_size"], "num_threads": job["threads"]}
        rows = iter([{"kind": "rate", **measure_rate(way, job["shards"], **size)}])
    for row in rows:
        print("ROW " + json.dumps(row), flush=True)
    sys.stdout.flush()
    os._exit(0)  # a driver that was upset may hang in its destructors; the rows are out


def is_good(row: dict[str, Any]) -> bool:
    """Whether a kind was decoded within the tolerance, at the border too."""
    if "error" in row:
        return False
    return max(row["interior_mean"], row["border_mean"]) < MAX_MEAN_ERROR


def print_way(name: str, rows: list[dict[str, Any]]) -> None:
    """A line for the way, and one for each kind that is not good."""
    good = sum(map(is_good, rows))
    print(f"{name:<28} {good}/{len(rows)} kinds as Pillow's", flush=True)
    for row in rows:
        if not is_good(row):
            outcome = row.get("error") or (
                f"interior {row['interior_mean']:.2f} (max {row['interior_max']}), "
                f"border {row['border_mean']:.2f} (max {row['border_max']})"
            )
            print(f"    {row['kind']:<22} {outcome[:200]}", flush=True)


def describe_libraries() -> dict[str, str | None]:
    """Versions of what decodes."""
    names = ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg", "pillow")
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--kinds", nargs="+", choices=list(draw_all()))
    parser.add_argument("--ways", nargs="+", help="only those whose name begins so")
    parser.add_argument("--shards", help="tars with real images, for the rates; none: no rates")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--jobs", type=int, default=4, help="ways that are checked at once")
    parser.add_argument("--deadline-s", type=float, default=20, help="for one kind by one way")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check every way, then measure those that work; the file is written after every row."""
    arguments = parse_arguments()
    if arguments.child is not None:
        run_child(json.loads(arguments.child))
    ways = [
        way
        for way in find_ways(arguments.device)
        if not arguments.ways or way.name.startswith(tuple(arguments.ways))
    ]
    kinds = arguments.kinds or list(draw_all())
    config = {
        key: value for key, value in vars(arguments).items() if key not in ("child", "shards")
    }
    config |= {"device": arguments.device, "libraries": describe_libraries()}
    rows: list[dict[str, Any]] = []

    def note(way: Way, new: list[dict[str, Any]]) -> None:
        rows.extend({"way": way.name, **way._asdict(), **row} for row in new)
        write_result("decode", config=config, rows=rows)

    def job(way: Way, **what: Any) -> dict[str, Any]:
        size = {"batch_size": arguments.batch_size, "threads": arguments.threads}
        return {"way": way._asdict(), "shards": None, **size, **what}

    def check(way: Way) -> list[dict[str, Any]]:
        return watch(job(way, kinds=kinds), deadline_s=arguments.deadline_s)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for way, new in zip(ways, pool.map(check, ways), strict=True):
            print_way(way.name, new)
            note(way, new)
    timed = [way for way in ways if way.decoder != "codec" and way.fancy]
    for way in timed if arguments.shards else []:
        (row,) = watch(
            job(way, kinds=["rate"], shards=arguments.shards), deadline_s=arguments.deadline_s
        )
        outcome = row.get("error") or f"{row['images_per_s']['median']:.0f} images/s"
        print(f"{way.name:<28} {outcome}", flush=True)
        note(way, [row])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
