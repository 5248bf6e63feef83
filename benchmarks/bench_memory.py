"""Does a loader's memory stay flat? 10,000 batches, with resident memory, open files and threads on the way.

    python benchmarks/bench_memory.py

Without --shards it makes 4000 small images. Writes the result file and docs/images/loader_memory.png.
"""

from __future__ import annotations

import argparse
import gc
import io
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset as wds
from lib.results import ROOT, write_result
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from cmae.kernels import color_jitter
from cmae.model import ModelConfig, draw_mask
from cmae.pipeline import LoaderConfig, ViewConfig, build_loader
from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.sources.expand import expand_shards

MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """The process after a number of batches."""

    batches: int
    rss_mib: float
    device_mib: float
    """Allocated by torch on the GPU; 0 on a CPU."""
    open_files: int
    threads: int
    seconds: float


def measure(batches: int, start: float) -> Sample:
    process = psutil.Process()
    device = torch.cuda.memory_allocated() / MIB if torch.cuda.is_available() else 0.0
    return Sample(
        batches,
        rss_mib=process.memory_info().rss / MIB,
        device_mib=device,
        open_files=process.num_fds(),
        threads=process.num_threads(),
        seconds=time.perf_counter() - start,
    )


def run(shards: list[str], backend: str, arguments: argparse.Namespace) -> list[Sample]:
    """Samples before opening, on the way, and after closing."""
    model = ModelConfig(img_size=32, patch_size=8)
    views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
    gc.collect()
    start = time.perf_counter()
    samples = [measure(0, start)]
    config = LoaderConfig(
        shards,
        views=views,
        batch_size=arguments.batch_size,
        view_backend=backend,
        source=arguments.source,
    )
    with build_loader(
        config,
        draw_mask=lambda index, epoch: draw_mask(model, index, seed=0, epoch=epoch),
        device="cuda" if torch.cuda.is_available() and backend == "dali" else "cpu",
        color_op=color_jitter,
    ) as loader:
        for number in range(1, arguments.batches + 1):
            next(loader)
            if number % arguments.every == 0 or number == 20:
                samples.append(measure(number, start))
                last = samples[-1]
                print(
                    f"{backend} {number:6d} batches  {last.rss_mib:7.1f} MiB  {last.open_files} files  "
                    f"{last.threads} threads  {number / last.seconds:.0f} batches/s",
                    flush=True,
                )
    gc.collect()
    samples.append(measure(arguments.batches, start))
    return samples


def growth_per_1000(samples: list[Sample]) -> float:
    """Slope of resident memory over the second half, in MiB for 1000 batches."""
    half = samples[len(samples) // 2 : -1]  # the last one is from after closing
    numbers = np.array([sample.batches for sample in half])
    return float(1000 * np.polyfit(numbers, [sample.rss_mib for sample in half], 1)[0])


def write_images(folder: Path, *, count: int = 4000, per_shard: int = 500) -> list[str]:
    """Shards of smooth 64 x 64 px images."""
    rng = np.random.default_rng(0)
    for shard in range(count // per_shard):
        path = folder / f"small-{shard:06d}.tar"
        with wds.TarWriter(str(path)) as tar:
            for number in range(per_shard):
                coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
                file = io.BytesIO()
                coarse.resize((64, 64), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
                key = f"{shard:06d}_{number:06d}"
                tar.write({"__key__": key, "jpg": file.getvalue(), "cls": str(number % 10)})
    paths = expand_shards(folder)
    build_indices(paths)
    return paths


def draw(measured: dict[str, list[Sample]], path: Path) -> None:
    """Resident memory, open files and threads over batches."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("rss_mib", "resident memory, MiB"),
        ("open_files", "open files"),
        ("threads", "threads"),
    )
    for axes, (name, title) in zip(figure.subplots(1, 3), panels, strict=True):
        for (backend, samples), colour in zip(
            measured.items(), ("#1f5fa8", "#d9822b"), strict=False
        ):
            inside = samples[1:-1]
            numbers = [sample.batches for sample in inside]
            values = [getattr(sample, name) for sample in inside]
            axes.plot(numbers, values, color=colour, linewidth=1.8, label=backend)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("batches", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", help="indexed tars; default: small images made for the purpose")
    parser.add_argument("--batches", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=250, help="batches between two measurements")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--backends", nargs="+", default=["cpu", "dali"])
    parser.add_argument("--source", default="auto")
    parser.add_argument("--image", type=Path, help="plot; default: docs/images, of 10000 batches")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = expand_shards(arguments.shards) if arguments.shards else write_images(Path(folder))
        measured = {backend: run(shards, backend, arguments) for backend in arguments.backends}
    rows: list[dict[str, Any]] = [
        {
            "backend": backend,
            "growth_mib_per_1000_batches": growth_per_1000(samples),
            "files_before_and_after": [samples[0].open_files, samples[-1].open_files],
            "threads_before_and_after": [samples[0].threads, samples[-1].threads],
            "samples": [asdict(sample) for sample in samples],
        }
        for backend, samples in measured.items()
    ]
    config = {
        key: value for key, value in vars(arguments).items() if key not in ("shards", "image")
    }
    is_whole = arguments.batches >= 10_000
    label = "" if is_whole else f"{arguments.batches}-batches"
    write_result("memory", label=label, config=config, rows=rows)
    image = arguments.image or (
        ROOT / "docs" / "images" / "loader_memory.png" if is_whole else None
    )
    if image is not None:
        draw(measured, image)


if __name__ == "__main__":
    main()
