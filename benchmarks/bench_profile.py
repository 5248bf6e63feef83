"""How right are the profiler's predictions? Every action that is a setting is applied and measured.

    python benchmarks/bench_profile.py

The data path is held back on purpose, so that there is something to predict: on a GPU a quarter of the
cores' threads and no JPEG unit before ViT-B; on a CPU one decoding thread before a step that sleeps, as a
host does that waits for an accelerator. No setting that is applied was used to fit the model, but for trials,
which know their setting's cost.

Predictions, written before the first run: errors within 10 %; the components sum to the step within 5 %.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lib.data import prepare_shards
from lib.results import write_result

from cmae.pipeline import LoaderConfig
from cmae.train.config import Config, OptimConfig, SpeedConfig
from cmae.train.distributed import World
from cmae.train.profiling.analysis.records import Action, Profile
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.measure.subject import open_subject
from cmae.train.profiling.profiler import measure, profile
from cmae.train.profiling.report.terminal import prediction_error

ON_GPU = torch.cuda.is_available()
STEP_S = 0.02
"""For 16 images; more than a CPU's loader makes."""


def build_config(shards: list[str], *, batch_size: int) -> Config:
    """A run whose data path is slower than its step."""
    speed = SpeedConfig(compile="blocks" if ON_GPU else "none")
    threads = max(1, len(os.sched_getaffinity(0)) // 4)
    data = LoaderConfig(shards, num_threads=threads, hw_decoder_load=0.0 if ON_GPU else 0.65)
    return Config(
        speed=speed,
        data=data,
        optim=OptimConfig(global_batch_size=batch_size, precision="fp16" if ON_GPU else "fp32"),
    )


def run(config: Config, options: ProfileConfig) -> Profile:
    """Profile it, on a CPU with a step that sleeps."""
    if ON_GPU:
        return profile(config, options)
    world = World(0, 1, torch.device("cpu"))
    with open_subject(config, world, lambda batches: time.sleep(STEP_S)) as subject:
        return measure(subject, options, config, log=print)


def what_if(action: Action, base: float) -> dict[str, Any]:
    """A row: what was predicted for an action and what came."""
    assert action.measured_images_per_s is not None
    measured = action.measured_images_per_s
    return {
        "action": action.what,
        "overrides": action.overrides,
        "images_per_s_before": base,
        "predicted_images_per_s": action.predicted_images_per_s,
        "measured_images_per_s": {
            "median": measured.value,
            "min": measured.low,
            "max": measured.high,
            "n": measured.n,
        },
        "error": prediction_error(action),
    }


def summary_row(found: Profile) -> dict[str, Any]:
    """A row: the breakdown and the diagnosis."""
    return {
        "sentence": found.diagnosis.sentence,
        "step_ms": found.step_ms.value,
        "breakdown_ms": {one.name: one.ms.value for one in found.breakdown},
        "operations_cpu_ms": {one.name: one.cpu_ms.value for one in found.operations},
        "notes": list(found.notes),
    }


def main() -> None:
    """Profile, apply what it proposes, write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", help="tars; default: the sample in CMAE_DATA, else photographs")
    parser.add_argument("--batch-size", type=int, default=128 if ON_GPU else 16)
    parser.add_argument("--budget-s", type=float, default=90, help="for the rounds and the trials")
    parser.add_argument("--verify", type=int, default=3, help="actions to apply")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_shards(arguments.shards, Path(folder))
        config = build_config(list(data.shards), batch_size=arguments.batch_size)
        options = ProfileConfig(budget_s=arguments.budget_s, verify=arguments.verify)
        found = run(config, options)
    base = next(one.images_per_s.value for one in found.phases if one.name == "full")
    rows = [what_if(one, base) for one in found.actions if one.measured_images_per_s is not None]
    for row in rows:
        print(
            f"{row['action']:<50} {base:8.1f} images/s before, "
            f"{row['predicted_images_per_s']:8.1f} predicted, "
            f"{row['measured_images_per_s']['median']:8.1f} measured, {row['error']:+.1%}"
        )
    print(found.diagnosis.sentence)
    settings = {key: value for key, value in vars(arguments).items() if key != "shards"}
    write_result(
        "profile",
        config=settings | {"data": data.description, "breakdown": summary_row(found)},
        rows=rows,
    )


if __name__ == "__main__":
    main()
