"""What does the shuffle's block size cost and give? Distance from uniform against the cost of reading.

    python benchmarks/bench_shuffle.py

Quality is computed from the epoch plan itself, for a data set of ImageNet's size whose shards are sorted by
class (the worst case). Throughput is measured on a file that is read past the page cache.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lib.results import ROOT, write_result
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cmae.pipeline import EpochPlan
from cmae.train.bench.harness import Measurement, interleave, summarise

NUM_SAMPLES, NUM_CLASSES, SHARD = 1_281_167, 1000, 1000
IMAGE_BYTES = 110_000
GLOBAL_BATCH = 4096
READ_AHEAD = 4 * 128
"""Samples that one rank of 32 reads at a time: four batches of 128."""
BLOCKS = (1, 4, 16, 64, 256, 1024)
WINDOWS = (4096, 16384, 65536, NUM_SAMPLES)
PAGE = 4096


def quality(order: np.ndarray) -> dict[str, float]:
    """Distance from a uniform shuffle; each number is 1 for a uniform one."""
    steps = NUM_SAMPLES // GLOBAL_BATCH
    batch = np.empty(NUM_SAMPLES, np.int64)
    batch[order] = np.arange(NUM_SAMPLES) // GLOBAL_BATCH
    together = np.mean(batch[1:] == batch[:-1])
    expected = (GLOBAL_BATCH - 1) / (NUM_SAMPLES - 1)
    used = order[: steps * GLOBAL_BATCH]
    label = used * NUM_CLASSES // NUM_SAMPLES
    cell = np.arange(used.size) // GLOBAL_BATCH * NUM_CLASSES + label
    counts = np.bincount(cell, minlength=steps * NUM_CLASSES).reshape(steps, NUM_CLASSES)
    mean = GLOBAL_BATCH / NUM_CLASSES
    return {
        "displacement": float(3 * np.abs(order - np.arange(NUM_SAMPLES)).mean() / NUM_SAMPLES),
        "neighbours_in_a_batch": float(together / expected),
        "class_mix": float(((counts - mean) ** 2 / mean).sum(1).mean() / (NUM_CLASSES - 1)),
    }


def reading(order: np.ndarray, window: int) -> dict[str, float]:
    """Requests of one rank of 32 that would join neighbours in its read-ahead, and shards in use."""
    runs = [
        np.count_nonzero(np.diff(np.sort(order[start : start + READ_AHEAD])) != 1) + 1
        for start in range(0, NUM_SAMPLES - READ_AHEAD, NUM_SAMPLES // 64)
    ]
    requests = float(np.mean(runs)) / READ_AHEAD
    return {
        "requests_per_sample_if_joined": requests,
        "kilobytes_per_request_if_joined": IMAGE_BYTES / requests / 1000,
        "shards_in_a_window": float(np.unique(order[:window] // SHARD).size),
        "shards_in_a_batch": float(np.unique(order[:GLOBAL_BATCH] // SHARD).size),
    }


def measure_orders() -> list[dict[str, Any]]:
    rows = []
    for window in WINDOWS:
        for block in BLOCKS if window < NUM_SAMPLES else (1,):
            plan = EpochPlan(NUM_SAMPLES, GLOBAL_BATCH, block_size=block, window_size=window)
            start = time.process_time()
            order = plan.order(0)
            row = {"block_size": block, "window_size": window}
            row |= {"order_cpu_s": time.process_time() - start}
            row |= quality(order) | reading(order, window)
            print({key: round(value, 3) for key, value in row.items()}, flush=True)
            rows.append(row)
    return rows


# --- reading ------------------------------------------------------------------------------------------------


def read_direct(path: Path, order: np.ndarray) -> Measurement:
    """Past the page cache: whole pages around each sample, as the disk sees them."""
    buffer = mmap.mmap(-1, -(-IMAGE_BYTES // PAGE) * PAGE + PAGE)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    start, cpu = time.perf_counter(), time.process_time()
    try:
        for number in order.tolist():
            os.preadv(handle, [buffer], number * IMAGE_BYTES // PAGE * PAGE)
    finally:
        os.close(handle)
    return Measurement(len(order), time.perf_counter() - start, time.process_time() - cpu)


def read_dropped(path: Path, order: np.ndarray) -> Measurement:
    """Through the page cache and its read-ahead, after the file's pages were given up."""
    buffer = bytearray(IMAGE_BYTES)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        start, cpu = time.perf_counter(), time.process_time()
        for number in order.tolist():
            os.preadv(handle, [buffer], number * IMAGE_BYTES)
        return Measurement(len(order), time.perf_counter() - start, time.process_time() - cpu)
    finally:
        os.close(handle)


def measure_reading(gib: float, rounds: int) -> list[dict[str, Any]]:
    """MB/s of 110 kB samples in several orders from one file, a thousand of them at a time."""
    count = int(gib * 2**30) // IMAGE_BYTES - 1
    with tempfile.NamedTemporaryFile(dir=ROOT) as file:
        chunk = os.urandom(1 << 24)
        for _ in range(int(gib * 64)):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
        path = Path(file.name)
        contenders: dict[str, Callable[[], Measurement]] = {}
        for name, block, window in (
            ("in order", 0, 0),
            ("block 64, window 1024", 64, 1024),
            ("block 16, window 1024", 16, 1024),
            ("uniform", 1, count),
        ):
            order = np.arange(count)
            if block:
                order = EpochPlan(count, 1, block_size=block, window_size=window).order(0)
            for how, read in (("O_DIRECT", read_direct), ("fadvise", read_dropped)):
                contenders[f"{how}: {name}"] = lambda read=read, order=order: read(
                    path, order[:1024]
                )
        measured = interleave(contenders, rounds=rounds)
    return [
        {
            "order": name,
            "mb_per_s": summarise([one.images_per_s * IMAGE_BYTES / 1e6 for one in results]),
            "cpu_s_per_1000": summarise([one.cpu_s_per_1000 for one in results]),
        }
        for name, results in measured.items()
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        (
            "class_mix",
            "class mix of a batch, sorted shards\n(chi-square / degrees of freedom; uniform = 1)",
        ),
        ("neighbours_in_a_batch", "neighbours on disk in one batch\n(times the uniform chance)"),
        (
            "requests_per_sample_if_joined",
            "requests a sample of a reader that\njoins neighbours (ours: always 1)",
        ),
        ("shards_in_a_window", "shards in use at a time\n(of 1282)"),
    )
    colours = ("#1f5fa8", "#d9822b", "#4a9a5b")
    for axes, (name, title) in zip(figure.subplots(1, 4), panels, strict=True):
        for window, colour in zip(WINDOWS, colours, strict=False):
            chosen = [row for row in rows if row["window_size"] == window]
            blocks = [row["block_size"] for row in chosen]
            values = [row[name] for row in chosen]
            axes.plot(blocks, values, "o-", color=colour, markersize=4, label=f"window {window}")
        axes.set_xscale("log", base=2)
        if name.startswith("requests"):
            axes.set_ylim(0, 1.1)
        else:
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("block size, samples", fontsize=9)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main() -> None:
    """Compute, measure, write the result file and docs/images/shuffle.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0, help="size of the file that is read")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "shuffle.png")
    arguments = parser.parse_args()
    rows = measure_orders()
    rows += measure_reading(arguments.gib, arguments.rounds)
    config = {
        "num_samples": NUM_SAMPLES,
        "num_classes": NUM_CLASSES,
        "samples_per_shard": SHARD,
        "image_bytes": IMAGE_BYTES,
        "global_batch_size": GLOBAL_BATCH,
        "read_ahead": READ_AHEAD,
        "gib": arguments.gib,
        "rounds": arguments.rounds,
    }
    write_result("shuffle", config=config, rows=rows)
    draw([row for row in rows if "block_size" in row], arguments.image)


if __name__ == "__main__":
    main()
