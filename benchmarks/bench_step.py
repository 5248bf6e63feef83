"""How fast is the training step by method, size, precision and batch size?

    python benchmarks/bench_step.py              methods x sizes x precisions x batch sizes
    python benchmarks/bench_step.py --levers     one switch at a time against a base

`cmae bench step` measures one recipe; this script draws a matrix. Both measure by cmae.train.bench.step.

Predictions, written before the first run.
CPU (2 cores, ViT-S, CMAE): 3.3 images/s in fp32 for CMAE at 50 GFLOP/s a core, and twice that for MAE.
Levers there: `sdpa: math` 5 % slower, `sdpa: flash` is torch's own choice. Those that need 16 bits are
measured on a GPU alone: a CPU without bf16 instructions multiplies bf16 at 1 GFLOP/s a core, fp32 at 49.
H200, ViT-B, CMAE, fp16, B 128, from `cmae bench` (whose roofline no kernel can beat): eager reaches
35 % of the vendor's rate where the roofline says 55 %; compiled blocks +9 %, 16-bit residual +15 %, both
+20 %; pinned attention 0-3 %; CUDA graphs 3 % at B 128 and nothing at 512; target shadow 0-1 % (its refresh
moves what the casts moved, only launches are saved); fp8 target +8 %. ViT-L and H: 5-10 points nearer to the
ceiling than B.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

from lib.results import write_result

from cmae.model import ModelConfig
from cmae.train.bench.estimate import measure_matmul_tflops
from cmae.train.bench.step import (
    DEVICE,
    DTYPES,
    LEVERS,
    ON_GPU,
    Case,
    Plan,
    levers_here,
    measure_group,
    measure_levers,
    tidy,
)
from cmae.train.config import OptimConfig, SpeedConfig

SIZES = {
    "ti": (192, 12, 3, 16),
    "s": (384, 12, 6, 16),
    "b": (768, 12, 12, 16),
    "l": (1024, 24, 16, 16),
    "h": (1280, 32, 16, 14),
}
PLAIN = SpeedConfig(compile="none", sdpa="torch")


def build_case(
    method: str, size: str, precision: str, batch_size: int, *, img_size: int = 224
) -> Case:
    """CMAE or MAE of a size, without switches."""
    width, depth, heads, patch = SIZES[size]
    model = ModelConfig(
        img_size=img_size, embed_dim=width, depth=depth, num_heads=heads, patch_size=patch
    )
    if method == "mae":
        mae = {"contrastive_loss": "none", "mask_ratio": 0.75, "mask_unit": 1}
        model = replace(model, **mae, pos_embed_order="column")
    optim = OptimConfig(global_batch_size=batch_size, precision=precision)
    return Case(f"ViT-{size.upper()}", model, optim, PLAIN)


def parse_arguments() -> argparse.Namespace:
    """The command line; defaults are small on a CPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--levers", nargs="*", choices=LEVERS, help="compare switches; all by default"
    )
    parser.add_argument("--methods", nargs="+", default=["cmae", "mae"], choices=["cmae", "mae"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["b"] if ON_GPU else ["ti"])
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[128, 256, 512] if ON_GPU else [2]
    )
    parser.add_argument("--steps", type=int, default=10 if ON_GPU else 1, help="timed, per round")
    parser.add_argument("--rounds", type=int, default=5 if ON_GPU else 3)
    precisions = ["fp16", "bf16"] if ON_GPU else ["fp32"]
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=precisions)
    modes = ["none", "blocks"] if ON_GPU else ["none"]
    parser.add_argument("--compile", nargs="+", choices=["none", "blocks", "model"], default=modes)
    parser.add_argument(
        "--budget-s", type=float, default=3600, help="groups after that are left out"
    )
    return parser.parse_args()


def main() -> None:
    """Measure and write the result file."""
    arguments = parse_arguments()
    config = vars(arguments).copy()
    build_until = time.perf_counter() + 0.8 * arguments.budget_s
    plan = Plan(arguments.steps, arguments.rounds, build_until)
    ceilings = {name: measure_matmul_tflops(DEVICE, DTYPES[name]) for name in arguments.precisions}
    rows: list[dict[str, Any]] = []
    name = "step" if arguments.levers is None else "levers"
    chosen = [*arguments.sizes, *(f"b{size}" for size in arguments.batch_sizes)]
    if arguments.levers is not None:
        chosen += [arguments.methods[0], arguments.precisions[0]]
    label = "vit-" + "-".join(chosen)

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        told = f"{row['gain']['median']:.3f} of the base" if "gain" in row else row["error"]
        if "device_ms" in row:
            told += f", {row['kernels']:.0f} kernels of {row['device_ms']:.1f} ms together"
        print(f"{row['name']:<20} B {row['batch_size']:<4} {told}", flush=True)
        write_result(name, label=label, config=config, rows=rows)

    for size in arguments.sizes:
        for batch_size in arguments.batch_sizes:
            if time.perf_counter() > plan.build_until:
                print(f"no time left for ViT-{size.upper()}, {batch_size} images")
                continue
            cases = cases_of(size, batch_size, arguments)
            if arguments.levers is None:
                rows += measure_group(cases, plan, ceilings)
                write_result(name, label=label, config=config, rows=rows)
            else:
                measure_levers(cases, plan, ceilings, note=note)
            tidy()


def cases_of(size: str, batch_size: int, arguments: argparse.Namespace) -> dict[str, Case]:
    """What is compared within one group."""
    if arguments.levers is None:
        return {
            f"{method} {precision} {mode}": build_case(
                method, size, precision, batch_size
            ).switched(speed={"compile": mode})
            for method in arguments.methods
            for precision in arguments.precisions
            for mode in arguments.compile
        }
    base = build_case(arguments.methods[0], size, arguments.precisions[0], batch_size)
    names = arguments.levers or levers_here()
    return {name: base.switched(**LEVERS[name]) for name in dict.fromkeys(["base", *names])}


if __name__ == "__main__":
    main()
