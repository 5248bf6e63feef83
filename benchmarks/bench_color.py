"""What does the colour chain of a batch cost the device?

    python benchmarks/bench_color.py

The target's chain on 128 and 256 images of 224 px, exact and fast: milliseconds of the device (the queue is
filled first, so that the host's pace does not count), of the host, and launches. What makes the same pixels
in another way is added to `contenders`.

Predictions, written before the first run, for 128 images, exact, 145 launches: the chain moves 9.0 GB by
counting its operators' bytes, so 3.2 ms on an H100 and 2.3 ms on an H200; fast half of that. The host takes
2.1 ms. The fused kernels: 65 us (docs/design/0017-fused-colour.md).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from lib.results import write_result
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cmae.kernels import color_jitter
from cmae.pipeline import ViewConfig, draw_view_params
from cmae.pipeline.views.color_batch import apply_color, color_chain
from cmae.pipeline.views.params import ViewParams
from cmae.train.bench.harness import summarise
from cmae.train.bench.kernels import time_us

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
Colour = Callable[[Tensor, ViewParams], Tensor]


def contenders() -> dict[str, Colour]:
    """Ways of colouring a batch, by name."""

    def chain(mode: Literal["exact", "fast"]) -> Colour:
        return lambda images, params: color_chain(images, params, mode=mode)

    def fused(mode: Literal["exact", "fast"]) -> Colour:
        return lambda images, params: apply_color(images, params, mode=mode, op=color_jitter)

    runs = {"exact": chain("exact"), "fast": chain("fast")}
    if ON_GPU:
        runs |= {"fused exact": fused("exact"), "fused fast": fused("fast")}
    return runs


def draw_batch(batch_size: int, *, seed: int) -> tuple[Tensor, ViewParams]:
    """Images of noise, and parameters of the recipe."""
    sizes = np.full(batch_size, 300)
    params = draw_view_params(
        ViewConfig(),
        seed=seed,
        epoch=0,
        sample_id=np.arange(batch_size),
        height=sizes,
        width=sizes,
    )
    pixels = torch.randint(0, 256, (batch_size, 224, 224, 3), dtype=torch.uint8, device=DEVICE)
    return pixels, params


def measure(batch_size: int, *, rounds: int) -> list[dict[str, Any]]:
    """Rows of all contenders on one batch size; every round draws other parameters."""
    runs = contenders()
    device_ms: dict[str, list[float]] = {name: [] for name in runs}
    host_ms: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        images, params = draw_batch(batch_size, seed=index)
        for name, run in runs.items():
            started = time.perf_counter()
            run(images, params)
            host = time.perf_counter() - started
            us = time_us(lambda run=run, i=images, p=params: run(i, p), DEVICE)
            if index >= 2:
                host_ms[name].append(1e3 * host)
                device_ms[name].append(us / 1e3)
    images, params = draw_batch(batch_size, seed=0)
    rows = []
    for name, run in runs.items():
        row = {"contender": name, "batch_size": batch_size, "device_ms": summarise(device_ms[name])}
        row |= {"host_ms": summarise(host_ms[name])}
        if ON_GPU:
            row |= count_launches(run, images, params)
        rows.append(row)
        print(
            f"B {batch_size:<4} {name:<10} {row['device_ms']['median']:7.3f} ms on the device, "
            f"{row['host_ms']['median']:6.2f} ms on the host, {row.get('launches')} launches",
            flush=True,
        )
    return rows


def count_launches(run: Colour, images: Tensor, params: ViewParams) -> dict[str, Any]:
    """Kernels of one call, and the milliseconds of each in their order of cost."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run(images, params)
        torch.cuda.synchronize()
    kernels = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    total: dict[str, float] = {}
    for kernel in kernels:
        total[kernel.name] = total.get(kernel.name, 0.0) + kernel.device_time_total / 1e3
    dearest = sorted(total.items(), key=lambda item: -item[1])[:10]
    return {
        "launches": len(kernels),
        "kernels_ms": sum(total.values()),
        "dearest_ms": dict(dearest),
    }


def main() -> None:
    """Measure; the file is written after every batch size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[128, 256] if ON_GPU else [2])
    parser.add_argument("--rounds", type=int, default=30 if ON_GPU else 2)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for batch_size in arguments.batch_sizes:
        rows += measure(batch_size, rounds=arguments.rounds)
        if ON_GPU:
            write_result("color", config=vars(arguments), rows=rows)


if __name__ == "__main__":
    main()
