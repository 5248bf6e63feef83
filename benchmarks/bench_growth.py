"""What does more data cost, before the first batch and at every epoch? 10^3 to 10^7 samples, no images.

    python benchmarks/bench_growth.py

Indices are synthetic: sparse tars that hold only their size, with the sidecar index of samples that look like
ImageNet's. Each size runs in a process of its own, so that peak memory is its own. Measured: start-up (all
indices read and checked), the epoch plan, a batch's rows, memory, the state that a checkpoint keeps.

Predictions, written before the first run: everything grows in proportion but the state (< 100 bytes) and a
batch's rows; start-up 10 s and the plan 6 s at 10^7 (its two sorts of 10^7 keys), 42 bytes a sample.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lib.results import write_result

from cmae.pipeline import EpochPlan, LoaderState
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.shard_index import ShardIndex, index_path, save_index, tar_digest
from cmae.train.bench.harness import summarise

SAMPLES_PER_SHARD = 10_000
BATCH_SIZE = 256
T = TypeVar("T")


def write_shards(folder: Path, num_samples: int) -> list[str]:
    """Sparse tars with indices; a shard's bytes are a hole in the file."""
    rng = np.random.default_rng(0)
    paths = []
    for number, first in enumerate(range(0, num_samples, SAMPLES_PER_SHARD)):
        path = folder / f"shard-{number:06d}.tar"
        _write_shard(path, min(SAMPLES_PER_SHARD, num_samples - first), rng)
        paths.append(str(path))
    return paths


def _write_shard(path: Path, n: int, rng: np.random.Generator) -> None:
    sizes = rng.integers(20_000, 200_000, n)
    with path.open("wb") as file:
        file.truncate(int(sizes.sum()) + 1024 * n)
    save_index(
        ShardIndex(
            keys=np.char.mod("n%08d", np.arange(n)),
            byte_offset=np.cumsum(sizes) - sizes,
            size=sizes,
            height=rng.integers(300, 600, n, dtype=np.int32),
            width=rng.integers(300, 600, n, dtype=np.int32),
            kind=np.ones(n, np.uint8),
            orientation=np.ones(n, np.uint8),
            crc32=rng.integers(0, 2**32, n, dtype=np.uint32),
            label=rng.integers(0, 1000, n),
            tar_size=path.stat().st_size,
            tar_digest=tar_digest(path),
        ),
        index_path(path),
    )


def measure(folder: Path) -> dict[str, float]:
    """One run over the shards of a folder; for a process of its own."""
    paths = sorted(map(str, folder.glob("*.tar")))
    before = _peak_mib()
    index, startup_s = _timed(lambda: DatasetIndex.load(paths))
    loaded = _peak_mib()
    plan = EpochPlan(len(index), min(BATCH_SIZE, len(index)))
    _, plan_s = _timed(lambda: plan.order(0))
    steps = np.linspace(0, plan.steps_per_epoch - 1, 200).astype(int) * plan.global_batch_size
    _, rows_s = _timed(lambda: [_rows(plan, index, int(step)) for step in steps])
    state = LoaderState(0, epoch=3, offset=int(steps[-1]), digest=index.digest)
    return {
        "startup_s": startup_s,
        "plan_s": plan_s,
        "positions_us_per_batch": 1e6 * rows_s / len(steps),
        "index_mib": loaded - before,
        "peak_mib": _peak_mib() - before,
        "state_bytes": len(json.dumps(state.to_dict())),
    }


def _rows(plan: EpochPlan, index: DatasetIndex, step: int) -> None:
    rows = plan.rows(0, step, rank=0, world_size=1, batch_size=plan.global_batch_size)
    assert rows is not None
    index.sample_id(rows)


def _timed(function: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()  # CPU seconds: other work on the machine must not count
    result = function()
    return result, time.process_time() - start


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure_apart(folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sizes = [10**power for power in range(3, 8)]
    parser.add_argument("--samples", type=int, nargs="+", default=sizes)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, help="one run over this folder, printed as JSON")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    rows: list[dict[str, Any]] = []
    for num_samples in arguments.samples:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), num_samples)
            runs = [_measure_apart(Path(folder)) for _ in range(arguments.rounds)]
        row = {name: summarise([run[name] for run in runs]) for name in runs[0]}
        rows.append({"samples": num_samples, **row})
        print(f"{num_samples:>9} samples: {runs[-1]}", flush=True)
    config = {"samples_per_shard": SAMPLES_PER_SHARD, "batch_size": BATCH_SIZE}
    write_result("growth", config=config | {"rounds": arguments.rounds}, rows=rows)


if __name__ == "__main__":
    main()
