"""How many images a second does the training step take, with data that is always ready?

    python benchmarks/bench_step.py

The step is the one of `cmae pretrain` (TrainStep), fed with synthetic batches. On a GPU: ViT-B, 128 images,
fp16 and bf16, eager and compiled; on a CPU: ViT-S, 8 images, fp32 and bf16.

Predictions, written before the first run (2 CPU cores, ViT-S: CMAE 14.9 G multiply-adds an image forward and
backward): at 50 GFLOP/s a core in fp32, 3.3 images/s for CMAE and about twice that for MAE.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness import Measurement, interleave, summarise, write_result

from cmae.model import ModelConfig, build_model, count_multiply_adds, draw_mask
from cmae.pipeline import Batch, ViewConfig, synthetic_batches
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import Ranks
from cmae.train.step import TrainStep

SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}


def model_config(size: str, method: str) -> ModelConfig:
    """CMAE or MAE of a size."""
    width, depth, heads = SIZES[size]
    config = ModelConfig(embed_dim=width, depth=depth, num_heads=heads)
    if method == "mae":
        config = replace(
            config, contrastive_loss="none", mask_ratio=0.75, mask_cell=1, pos_embed_order="column"
        )
    return config


def build_run(
    config: ModelConfig, *, precision: str, compile: str, batch_size: int, steps: int
) -> Callable[[], Measurement]:
    """A timed stretch of steps; model and optimiser are built once and kept."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = ViewConfig(num_views=2 if config.has_contrast else 1, img_size=config.img_size)
    batch: Batch = next(
        synthetic_batches(
            views,
            batch_size=batch_size,
            device=device,
            draw_mask=lambda index, epoch: draw_mask(config, index, seed=0, epoch=epoch),
            seed=0,
        )
    )
    step = TrainStep(
        build_model(config, seed=0).to(device),
        OptimConfig(global_batch_size=batch_size, precision=precision),
        SpeedConfig(compile=compile),
        Ranks(0, 1, device),
    )
    warm = iter([3 if device.type == "cuda" else 1])

    def run() -> Measurement:
        for _ in range(next(warm, 0)):
            step([batch], lr=1e-6, momentum=0.996)
        _synchronise(device)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step([batch], lr=1e-6, momentum=0.996)
        _synchronise(device)
        return Measurement(
            steps * batch_size, time.perf_counter() - wall, time.process_time() - cpu
        )

    return run


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and write the result file."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="b" if on_gpu else "s")
    parser.add_argument("--batch-size", type=int, default=128 if on_gpu else 8)
    parser.add_argument(
        "--steps", type=int, default=20 if on_gpu else 2, help="timed steps a round"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--precisions", nargs="+", default=["fp16", "bf16"] if on_gpu else ["fp32", "bf16"]
    )
    parser.add_argument("--compile", nargs="+", default=["none", "blocks"] if on_gpu else ["none"])
    arguments = parser.parse_args()
    cases = [
        (method, precision, compile)
        for method in ("cmae", "mae")
        for precision in arguments.precisions
        for compile in arguments.compile
    ]
    contenders = {
        " ".join(case): build_run(
            model_config(arguments.size, case[0]),
            precision=case[1],
            compile=case[2],
            batch_size=arguments.batch_size,
            steps=arguments.steps,
        )
        for case in cases
    }
    measured = interleave(contenders, rounds=arguments.rounds)
    rows: list[dict[str, Any]] = []
    for (method, precision, compile), results in zip(cases, measured.values(), strict=True):
        images_per_s = summarise([m.images_per_s for m in results])
        gmacs = count_multiply_adds(model_config(arguments.size, method))["training_step"] / 1e9
        rows.append(
            {
                "model": f"ViT-{arguments.size.upper()}",
                "batch_size": arguments.batch_size,
                "method": method,
                "precision": precision,
                "compile": compile,
                "images_per_s": images_per_s,
                "gmacs_per_image": gmacs,
                "tflops": 2e-3 * gmacs * images_per_s["median"],
            }
        )
    label = f"vit-{arguments.size}-b{arguments.batch_size}"
    write_result("step", label=label, config=vars(arguments), rows=rows)


if __name__ == "__main__":
    main()
