"""How much of the training step's rate is left when real images feed it?

The same step in windows that alternate: batches of the real loader, and one synthetic batch again and again.
Each pair of neighbouring windows gives a ratio, so that drift of the machine meets both alike; the first
steps of a window are not timed, for they drain what the loader has made ahead.

Predictions, written before the first run: 2 CPU cores: the step takes 10 images/s of a loader that makes over
200, so the ratio is the cores that the loader takes from the step: 0.95 and more. One H200 with 16 cores:
0.98 once the loader makes 8k images/s.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cmae.errors import require
from cmae.kernels import color_jitter
from cmae.model import build_model, draw_mask
from cmae.pipeline import Batch, LoaderConfig, build_loader, expand_shards, synthetic_batches
from cmae.train.bench.config import BenchConfig
from cmae.train.bench.harness import Report, summarise
from cmae.train.bench.images import with_indices
from cmae.train.bench.step import DEVICE, Case, Plan, synchronise
from cmae.train.config import Config
from cmae.train.distributed import World, threads_per_rank
from cmae.train.loop.step import TrainStep


def run_window(
    step: TrainStep, batches: Iterator[Batch], *, warmup: int, steps: int
) -> tuple[float, float]:
    """Images/s of `steps` steps, and the share of the time spent in `next`."""
    for _ in range(warmup):
        step([next(batches)], lr=1e-6, momentum=0.996)
    synchronise()
    start, waited, images = time.perf_counter(), 0.0, 0
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        images += len(batch.online)
        step([batch], lr=1e-6, momentum=0.996)
    synchronise()
    elapsed = time.perf_counter() - start
    return images / elapsed, waited / elapsed


def bench_e2e(config: Config, bench: BenchConfig, case: Case) -> Report:
    """The recipe's step in windows that alternate: fed by its loader, and by one synthetic batch.

    Args:
        config: The recipe, with its shards.
        bench: How often and how long.
        case: The recipe's step on this device.

    Raises:
        CmaeError: There are no shards.
    """
    require(bool(config.data.shards), "data.shards", config.data.shards, "tars to read")
    on_gpu = DEVICE.type == "cuda"
    plan = Plan(bench.steps or (40 if on_gpu else 3), bench.rounds or (7 if on_gpu else 5))
    with tempfile.TemporaryDirectory() as folder:
        data = with_indices(expand_shards(config.data.shards), Path(folder))
        found = measure(data.shards, config, case, plan, warmup=8 if on_gpu else 3)
    row: dict[str, Any] = {
        "model": case.name,
        "images_per_s": summarise(found["real"]),
        "synthetic_images_per_s": summarise(found["synthetic"]),
        "ratio": summarise(found["ratio"]),
        "wait_share": summarise(found["wait_share"]),
    }
    settings: dict[str, Any] = {"batch_size": case.batch_size, "precision": case.optim.precision}
    settings |= {"compile": case.speed.compile, "color": config.data.views.color}
    settings |= {"steps": plan.steps, "rounds": plan.rounds, "data": data.description}
    return Report("e2e", "", settings, [row])


def measure(
    shards: list[str], config: Config, case: Case, plan: Plan, *, warmup: int
) -> dict[str, list[float]]:
    """Rates of every window, and what follows from them.

    Args:
        shards: Tars with their indices.
        config: The recipe, for the views and the loader's threads.
        case: The step.
        plan: Timed steps of a window, and rounds.
        warmup: Untimed steps of a window, which drain what the loader has made ahead.
    """
    views, model = config.data.views, case.model

    def mask(index: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return draw_mask(model, index, seed=0, epoch=epoch)

    step = TrainStep(
        build_model(model, seed=0).to(DEVICE), case.optim, case.speed, World(0, 1, DEVICE)
    )
    batch_size = case.batch_size
    synthetic = synthetic_batches(
        views, batch_size=batch_size, device=DEVICE, draw_mask=mask, seed=0
    )
    found: dict[str, list[float]] = {"real": [], "synthetic": [], "ratio": [], "wait_share": []}
    threads = config.data.num_threads or threads_per_rank(DEVICE.type)
    data = LoaderConfig(shards, views=views, batch_size=batch_size, num_threads=threads)
    with build_loader(data, draw_mask=mask, device=DEVICE, color_op=color_jitter) as loader:
        run_window(step, iter(loader), warmup=3, steps=1)  # compiles, fills caches
        for number in range(plan.rounds):
            real, waited = run_window(step, iter(loader), warmup=warmup, steps=plan.steps)
            ceiling, _ = run_window(step, synthetic, warmup=warmup, steps=plan.steps)
            for name, value in zip(found, (real, ceiling, real / ceiling, waited), strict=True):
                found[name].append(value)
            print(
                f"round {number + 1}/{plan.rounds}  real {real:.1f}  synthetic {ceiling:.1f} images/s  "
                f"ratio {real / ceiling:.3f}",
                file=sys.stderr,
            )
    return found
