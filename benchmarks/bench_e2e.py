"""How much of the training step's rate is left when real images feed it?

    python benchmarks/bench_e2e.py --shards '/data/imagenet/train-*.tar'

The same step in windows that alternate: batches of the real loader, and one synthetic batch again and again.
Each pair of neighbouring windows gives a ratio, so that drift of the machine meets both alike; the first
steps of a window are not timed, for they drain what the loader has made ahead. On a GPU: ViT-B, 128 images,
fp16; on a CPU: ViT-Ti, 8 images, fp32.

Predictions, written before the first run: 2 CPU cores: the step takes 10 images/s of a loader that makes over
200, so the ratio is the cores that the loader takes from the step: 0.95 and more. One H200 with 16 cores:
0.98 once the loader makes 8k images/s.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_step import SIZES, Case
from lib.data import prepare_shards
from lib.harness import summarise, write_result

from cmae.kernels import color_jitter
from cmae.model import ModelConfig, build_model, draw_mask
from cmae.pipeline import Batch, LoaderConfig, ViewConfig, build_loader, synthetic_batches
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import World, threads_per_rank
from cmae.train.loop.step import TrainStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_window(
    step: TrainStep, batches: Iterator[Batch], *, warmup: int, steps: int
) -> tuple[float, float]:
    """Images/s of `steps` steps, and the share of the time spent in `next`."""
    for _ in range(warmup):
        step([next(batches)], lr=1e-6, momentum=0.996)
    _synchronise()
    start, waited, images = time.perf_counter(), 0.0, 0
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        images += len(batch.online)
        step([batch], lr=1e-6, momentum=0.996)
    _synchronise()
    elapsed = time.perf_counter() - start
    return images / elapsed, waited / elapsed


def _synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(
    shards: list[str], model: ModelConfig, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Rates of every window, and what follows from them."""
    views = ViewConfig(img_size=model.img_size, color=arguments.color)

    def mask(index: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draw_mask(model, index, seed=0, epoch=epoch)

    step = TrainStep(
        build_model(model, seed=0).to(DEVICE),
        OptimConfig(global_batch_size=arguments.batch_size, precision=arguments.precision),
        SpeedConfig(compile=arguments.compile),
        World(0, 1, DEVICE),
    )
    synthetic = synthetic_batches(
        views, batch_size=arguments.batch_size, device=DEVICE, draw_mask=mask, seed=0
    )
    found: dict[str, list[float]] = {"real": [], "synthetic": [], "ratio": [], "wait_share": []}
    data = LoaderConfig(
        shards,
        views=views,
        batch_size=arguments.batch_size,
        num_threads=arguments.threads,
    )
    with build_loader(data, draw_mask=mask, device=DEVICE, color_op=color_jitter) as loader:
        run_window(step, iter(loader), warmup=3, steps=1)  # compiles, fills caches
        for number in range(arguments.rounds):
            size = {"warmup": arguments.warmup, "steps": arguments.steps}
            real, waited = run_window(step, iter(loader), **size)
            ceiling, _ = run_window(step, synthetic, **size)
            for name, value in zip(found, (real, ceiling, real / ceiling, waited), strict=True):
                found[name].append(value)
            print(
                f"round {number + 1}/{arguments.rounds}  real {real:.1f}  synthetic {ceiling:.1f} images/s  "
                f"ratio {real / ceiling:.3f}",
                flush=True,
            )
    return found


def main() -> None:
    """Measure and write the result file."""
    on_gpu = DEVICE.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", help="tars; default: the sample in CMAE_DATA, else photographs")
    parser.add_argument("--size", choices=SIZES, default="b" if on_gpu else "ti")
    parser.add_argument("--batch-size", type=int, default=128 if on_gpu else 8)
    parser.add_argument("--precision", default="fp16" if on_gpu else "fp32")
    parser.add_argument("--compile", default="blocks" if on_gpu else "none")
    parser.add_argument("--color", default="exact")
    parser.add_argument("--threads", type=int, default=threads_per_rank(DEVICE.type))
    parser.add_argument("--steps", type=int, default=40 if on_gpu else 3, help="timed, a window")
    parser.add_argument("--warmup", type=int, default=8 if on_gpu else 3, help="untimed, a window")
    parser.add_argument("--rounds", type=int, default=7 if on_gpu else 5)
    arguments = parser.parse_args()
    model = Case("cmae", arguments.size, arguments.precision, arguments.batch_size).model
    with tempfile.TemporaryDirectory() as folder:
        found_shards = prepare_shards(arguments.shards, Path(folder))
        found = measure(list(found_shards[0]), model, arguments)
    row: dict[str, Any] = {
        "model": f"ViT-{arguments.size.upper()}",
        "images_per_s": summarise(found["real"]),
        "synthetic_images_per_s": summarise(found["synthetic"]),
        "ratio": summarise(found["ratio"]),
        "wait_share": summarise(found["wait_share"]),
    }
    settings = {key: value for key, value in vars(arguments).items() if key != "shards"}
    write_result("e2e", config=settings | {"data": found_shards[1]}, rows=[row])
    print(f"ratio {statistics.median(found['ratio']):.3f}")


if __name__ == "__main__":
    main()
