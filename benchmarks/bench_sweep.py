"""How do the rates move with batch size, image size, decoding threads and the share of the JPEG unit?

    python benchmarks/bench_sweep.py                     every sweep that fits the machine
    python benchmarks/bench_sweep.py --sweeps threads    one of them

batch_size, img_size: the training step on synthetic batches, as in bench_step.py; on a GPU with peak memory.
threads: the loader, each run in a process of its own that may use that many cores, so that nothing decodes
beside them. hw_decoder_load (GPU): the loader with that share of the JPEGs on the JPEG unit.

Predictions, written before the first run: on a CPU the step's rate hardly moves with the batch size and falls
a little faster than the number of patches; decoding scales to 2 cores by 1.9.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_step import SIZES, build_case
from lib.data import prepare_shards
from lib.results import write_result

from cmae.kernels import color_jitter
from cmae.model import ModelConfig, draw_mask
from cmae.pipeline import LoaderConfig, ViewConfig, build_loader
from cmae.train.bench.harness import Measurement, interleave, summarise, time_batches
from cmae.train.bench.step import build

ON_GPU = torch.cuda.is_available()
CORES = sorted(os.sched_getaffinity(0))


def sweep_step(
    name: str, values: Sequence[int], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of a sweep of the training step.

    The values follow one another: a model is compiled once, and its peak memory is its own.
    """
    rows: list[dict[str, Any]] = []
    for value in values:
        case = build_case(
            "cmae",
            arguments.size,
            "fp16" if ON_GPU else "fp32",
            value if name == "batch_size" else arguments.batch_size,
            img_size=value if name == "img_size" else 224,
        ).switched(speed={"compile": "blocks" if ON_GPU else "none"})
        contender = build(case, steps=arguments.steps)
        if isinstance(contender, str):
            rows.append({name: value, "error": contender})
            continue
        results = interleave({f"{name} {value}": contender}, rounds=arguments.rounds)
        rates = [one.images_per_s for one in results[f"{name} {value}"]]
        rows.append({name: value, "images_per_s": summarise(rates)})
        if ON_GPU:
            rows[-1]["peak_gib"] = contender.peak_bytes / 2**30
            del contender
            torch.cuda.empty_cache()
    return rows


def sweep_loader(
    name: str, values: Sequence[float], shards: list[str], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of a sweep of the loader: `threads`, with as many cores, or `hw_decoder_load`."""

    def run(value: float) -> Measurement:
        threads = int(value) if name == "threads" else len(CORES)
        load = value if name == "hw_decoder_load" else 0.0
        job = {"shards": shards, "threads": threads, "hw_decoder_load": load}
        job |= {"color": arguments.color, "batches": arguments.batches}
        done = subprocess.run(
            [sys.executable, __file__, "--run", json.dumps(job)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return Measurement(**json.loads(done.stdout.splitlines()[-1]))

    measured = interleave(
        {f"{value:g}": partial(run, value) for value in values}, rounds=arguments.rounds
    )
    return [
        {
            name: float(value),
            "images_per_s": summarise([one.images_per_s for one in results]),
            "cpu_s_per_1000_images": summarise([one.cpu_s_per_1000 for one in results]),
        }
        for value, results in measured.items()
    ]


def run_loader(job: dict[str, Any]) -> Measurement:
    """One window of the loader, in a process that may use only as many cores as it has threads."""
    os.sched_setaffinity(0, CORES[: job["threads"]])
    torch.set_num_threads(1)
    config = LoaderConfig(
        job["shards"],
        views=ViewConfig(color=job["color"]),
        batch_size=64,
        num_threads=job["threads"],
        hw_decoder_load=job["hw_decoder_load"],
    )
    with build_loader(
        config,
        draw_mask=lambda index, epoch: draw_mask(ModelConfig(), index, seed=0, epoch=epoch),
        device="cuda" if ON_GPU else "cpu",
        color_op=color_jitter,
    ) as loader:
        sizes = (len(batch.online) for batch in loader)
        return time_batches(sizes, warmup=3, count=job["batches"])


def thread_counts() -> list[int]:
    """1, 2, 4, ... and all cores."""
    powers = [2**power for power in range(len(CORES).bit_length())]
    return sorted({*[count for count in powers if count < len(CORES)], len(CORES)})


def main() -> None:
    """Measure and write a result file for each sweep."""
    values: dict[str, list[Any]] = {
        "batch_size": [32, 64, 128, 256] if ON_GPU else [2, 4, 8, 16],
        "img_size": [160, 192, 224, 288] if ON_GPU else [128, 160, 224],
        "threads": thread_counts(),
        "hw_decoder_load": [0.0, 0.25, 0.5, 0.65, 0.8, 1.0],
    }
    usual = [name for name in values if ON_GPU or name != "hw_decoder_load"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sweeps", nargs="+", choices=usual, default=usual)
    parser.add_argument("--shards", help="tars; default: the sample in CMAE_DATA, else photographs")
    parser.add_argument("--size", choices=SIZES, default="b" if ON_GPU else "ti")
    parser.add_argument("--batch-size", type=int, default=128 if ON_GPU else 4, help="of img_size")
    parser.add_argument("--steps", type=int, default=10 if ON_GPU else 1, help="timed, a round")
    parser.add_argument("--color", default="exact", help="of the loader's sweeps")
    parser.add_argument("--batches", type=int, default=20 if ON_GPU else 5, help="timed, a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(vars(run_loader(json.loads(arguments.run)))))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = prepare_shards(arguments.shards, Path(folder))
        config = {
            key: value for key, value in vars(arguments).items() if key not in ("shards", "run")
        }
        for name in arguments.sweeps:
            if name in ("batch_size", "img_size"):
                rows, data = sweep_step(name, values[name], arguments), {}
            else:
                rows = sweep_loader(name, values[name], list(found[0]), arguments)
                data = {"data": found[1]}
            write_result("sweep", label=name.replace("_", "-"), config=config | data, rows=rows)


if __name__ == "__main__":
    main()
