"""Does an fp8 target encoder change what is learnt? Loss curves of two runs that differ in nothing else.

    python benchmarks/fp8_curve.py --steps 300 --precision fp16        on a GPU (compute capability 8.9)
    python benchmarks/fp8_curve.py --steps 60 --precision bf16         on a CPU, where fp8 is emulated

The runs are the demo's (`cmae demo`, tiles of photographs). Writes a picture beside them and a result file.

Prediction, written before the first run: the curves lie within the noise of one step, and the mean difference
of the last quarter is below 2 % of the loss. Keys lose about 4 % of their length to rounding noise, which
InfoNCE at a temperature of .07 sees as a little more temperature.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
from harness import ROOT, write_result

from cmae.train.commands.demo_data import write_demo_shards
from cmae.train.config_parser import build_config_parser, read_config
from cmae.train.loop.pretrain import pretrain
from cmae.train.monitor.metrics import read_metrics

mpl.use("Agg")
import matplotlib.pyplot as plt

CURVES = ("total", "reconstruction", "info_nce")


def train(
    out: Path, shards: Path, arguments: argparse.Namespace, *, fp8: bool
) -> list[dict[str, Any]]:
    """Metrics of one run."""
    words = [
        *("--recipe", "demo", "--data.shards", str(shards), "--run.out", str(out)),
        *("--run.log_every", "1", "--run.resume", "never", "--run.progress", "false"),
        *("--optim.total_steps", str(arguments.steps), "--optim.precision", arguments.precision),
        *("--optim.target_fp8", str(fp8).lower(), "--seed", str(arguments.seed)),
    ]
    pretrain(read_config(build_config_parser("fp8_curve", ""), words))
    return read_metrics(out / "metrics.jsonl")


def draw(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Both runs, one panel a loss."""
    figure, panels = plt.subplots(1, len(CURVES), figsize=(12, 3.5))
    for panel, loss in zip(panels, CURVES, strict=True):
        for name, records in curves.items():
            steps = [record["step"] for record in records]
            panel.plot(steps, [record[loss] for record in records], label=name, linewidth=1)
        panel.set(title=loss, xlabel="step")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train twice, compare, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--precision", choices=["fp16", "bf16"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fp8")
    arguments = parser.parse_args()
    write_demo_shards(arguments.out)
    shards = arguments.out / "shards" / "train"
    curves = {
        name: train(arguments.out / name, shards, arguments, fp8=fp8)
        for name, fp8 in ((arguments.precision, False), ("fp8 target", True))
    }
    draw(curves, arguments.out / "fp8_curve.png")
    tail = max(1, arguments.steps // 4)
    rows = [
        {
            "name": name,
            **{loss: mean(record[loss] for record in records[-tail:]) for loss in CURVES},
        }
        for name, records in curves.items()
    ]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    config = {key: str(value) for key, value in vars(arguments).items()}
    write_result("fp8", config=config | {"mean_of_last_steps": tail}, rows=rows)


if __name__ == "__main__":
    main()
