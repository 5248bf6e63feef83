"""What does it cost a step to be watched: losses, norms, metrics, sinks, status and watchdog?

    python benchmarks/bench_observability.py --shards '/data/imagenet/train-*.tar'

One run, whose windows of steps alternate, the order drawn for each pair: *watched*, as `cmae pretrain` takes
them with TensorBoard, Prometheus and a record every 20 steps; and *bare*, the same batches through the same
step with nothing noted. Checkpoints, pictures and evaluation are off: they say themselves what they take.
Beside the difference stands the time that the training thread spent noting, by its own clock.

Predictions, written before the first run (2 cores): .1 ms a step and 10 ms a record, .6 ms a step in all:
under 1 % of the 78 ms that `cmae plan` gives ViT-B's step on 32 A100s.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.results import write_result

from cmae.pipeline import Batch
from cmae.train.bench.harness import summarise
from cmae.train.config_parser import load_recipe
from cmae.train.loop.pretrain import join_run, open_run
from cmae.train.loop.training import Training

STEP_MS = 78.0
"""Of ViT-B with 128 images on an A100, by `cmae plan --gpus 32xa100`."""


class Windows:
    """Windows of steps of an open run, watched or bare.

    Args:
        training: The run.
        steps: Length of a window.
    """

    def __init__(self, training: Training, steps: int) -> None:
        self._training = training
        self._steps = steps
        self.noting_s = 0.0
        """Time of the training thread that `watched` has spent noting."""

    def watched(self) -> float:
        """Seconds of a window as the run takes it."""
        training, begun = self._training, time.perf_counter()
        for _ in range(self._steps):
            losses, _ = training.take(batches := self._next())
            noting = time.perf_counter()
            training._note(batches, losses)
            self.noting_s += time.perf_counter() - noting
        return time.perf_counter() - begun

    def bare(self) -> float:
        """Seconds of a window of steps that leave nothing."""
        training, begun = self._training, time.perf_counter()
        ahead = training._run.step_batches.fetch_ahead
        count = training._run.split.accumulation
        for _ in range(self._steps):
            training.train_step(
                self._next(), lr=1e-4, momentum=0.99, meanwhile=lambda: ahead(count)
            )
        return time.perf_counter() - begun

    def _next(self) -> list[Batch]:
        batches = self._training.next_batches()
        assert batches is not None
        return batches


def measure(settings: dict[str, Any], recipe: str, *, pairs: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step of both kinds of windows, and their paired differences."""
    config = load_recipe(recipe, overrides=settings)
    found: dict[str, list[float]] = {"watched": [], "bare": []}
    with join_run(config) as world, open_run(config, world) as training:
        windows = Windows(training, steps)
        kinds: dict[str, Callable[[], float]] = {"watched": windows.watched, "bare": windows.bare}
        for run in kinds.values():
            run()
        windows.noting_s = 0.0
        for _ in range(pairs):
            for name in random.sample(sorted(kinds), 2):
                found[name].append(1e3 * kinds[name]() / steps)
        noting_ms = 1e3 * windows.noting_s / (pairs * steps)
    differences = [one - other for one, other in zip(found["watched"], found["bare"], strict=True)]
    return {
        "watched_ms": summarise(found["watched"]),
        "bare_ms": summarise(found["bare"]),
        "difference_ms": summarise(differences),
        "noting_ms": noting_ms,
    }


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", required=True)
    parser.add_argument("--recipe", default="tiny_imagenet")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--set", nargs="+", default=[], help="more settings, as key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "data.shards": arguments.shards,
            "run.out": Path(folder) / "run",
            "run.progress": "false",
            "run.prometheus_port": 29876,
            "run.log_every": 20,
            "run.checkpoint_every": 10**9,
            "optim.total_steps": 10**6,
            "optim.global_batch_size": 32,
        }
        settings |= dict(word.split("=", 1) for word in arguments.set)
        row = measure(settings, arguments.recipe, pairs=arguments.pairs, steps=arguments.steps)
    row["share_pct"] = 100 * row["noting_ms"] / STEP_MS
    for name in ("watched_ms", "bare_ms", "difference_ms"):
        print(f"{name:<14} {row[name]['median']:8.3f}")
    print(
        f"noting         {row['noting_ms']:8.3f} ms a step, {row['share_pct']:.2f} % of {STEP_MS:g} ms"
    )
    config = {"recipe": arguments.recipe, "pairs": arguments.pairs, "steps": arguments.steps}
    write_result("observability", config=config | {"log_every": 20}, rows=[row])


if __name__ == "__main__":
    main()
