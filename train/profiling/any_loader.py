"""Profiles of other loaders: any iterable of batches, with any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable
from itertools import cycle
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cmae.errors import CmaeError, require
from cmae.train.distributed import World
from cmae.train.machine import describe_machine, usable_cores
from cmae.train.profiling.analysis.bootstrap import estimate
from cmae.train.profiling.analysis.breakdown import Readings, break_down
from cmae.train.profiling.analysis.costs import median_rate, others_cores, worker_costs
from cmae.train.profiling.analysis.notes import note_residual
from cmae.train.profiling.analysis.records import Component, Profile, Reading
from cmae.train.profiling.analysis.verdict import Facts, diagnose, rank_actions
from cmae.train.profiling.measure.python_time import python_ms, time_one_step
from cmae.train.profiling.measure.rounds import phase_records, plan_steps, run_rounds
from cmae.train.profiling.measure.timing import background_consumer, measure_window, synchronise

BatchT = TypeVar("BatchT")

WHAT = {
    "full": "the loader and the step together",
    "replay": "the step on batches that were kept, on the device where there is one",
    "replay_h2d": "the same batches as the loader gave them: the step copies them",
    "interference": "the step on kept batches, while the loader works beside it for nobody",
    "loader_full": "the loader alone",
}


def profile_loader(
    loader: Iterable[BatchT],
    step: Callable[[BatchT], object],
    *,
    batch_size: int | None = None,
    rounds: int = 5,
    steps: int | None = None,
    stock: int | None = None,
    device: str | torch.device | None = None,
) -> Profile:
    """Say whether training waits for a loader, and why.

    Runs the step alone on kept batches, the loader alone, both together, and the step beside a loader whose
    batches nobody uses; in turn, several times.

    Args:
        loader: Iterable of batches; begun again when it ends. Its `num_workers` and `prefetch_factor` are
            looked at where it has them.
        step: Function that trains on one batch, copies to the device included. It runs a few hundred times.
        batch_size: Images in a batch; None = the length of the first tensor or array in it.
        rounds: Repetitions behind each number.
        steps: Timed steps in a measurement window; None = about a second of them.
        stock: Batches that the loader may have ready; None = what its attributes say, at least 2.
        device: Device to wait for at the end of a window; None = the current GPU where torch uses one.

    Raises:
        ValueError: The loader is empty, or the size of a batch cannot be seen.
    """
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    require(batch_size is None or batch_size >= 1, "batch_size", batch_size, ">= 1, or None")
    runner = _LoaderRunner(loader, step, batch_size=batch_size, stock=stock, device=device)
    workers = _workers(loader)
    world = World(0, 1, runner.device)
    runner.steps = plan_steps(
        runner, steps=steps, num_readers=max(1, workers), deadline=math.inf, world=world
    )
    one_step = time_one_step(lambda: step(runner.kept[0]), runner.device)
    readings = run_rounds(runner, rounds)
    runner.close()
    from_host = readings.get("replay_h2d", readings["replay"])
    python = [python_ms(one.step_cpu_ms, one.step_ms, one_step) for one in from_host]
    breakdown = break_down(readings, python_ms=python)
    facts = _facts(readings, breakdown, runner.device, workers)
    return Profile(
        created=created,
        machine=describe_machine(runner.device),
        config={"loader": type(loader).__name__, "num_workers": workers},
        global_batch_size=runner.batch_size,
        world_size=1,
        phases=phase_records(readings, WHAT, world_size=1),
        step_ms=estimate([one.step_ms for one in readings["full"]]),
        breakdown=breakdown,
        diagnosis=diagnose(facts),
        actions=rank_actions(facts),
        notes=tuple(note_residual(breakdown)),
    )


def _facts(
    readings: Readings, breakdown: tuple[Component, ...], device: torch.device, workers: int
) -> Facts:
    details = {"loader": f"{workers} worker{'' if workers == 1 else 's'}"}
    in_next_ms = estimate([one.next_cpu_ms for one in readings["full"]]).value
    python = next(one.ms.value for one in breakdown if one.name == "python")
    if in_next_ms > 0.3 * python:
        details["python"] = "the loader works in the training thread"
    return Facts(
        breakdown=breakdown,
        costs=worker_costs(readings, cores=usable_cores(), workers=workers),
        measured_images_per_s=median_rate(readings["full"]),
        world_size=1,
        device=device.type,
        others_cores=others_cores(readings),
        waiting_for_cores=0.0,
        details=details,
    )


class _LoaderRunner(Generic[BatchT]):
    """Runs the phases of a loader and a step that are not this project's. A `PhaseRunner`."""

    def __init__(
        self,
        loader: Iterable[BatchT],
        step: Callable[[BatchT], object],
        *,
        batch_size: int | None,
        stock: int | None,
        device: str | torch.device | None,
    ) -> None:
        self._batches = _endless(loader)
        self._step = step
        ready = _workers(loader) * int(getattr(loader, "prefetch_factor", None) or 1)
        self._stock = max(2, ready) if stock is None else stock
        self.device = _device(device)
        self.kept = [next(self._batches) for _ in range(3)]
        self.batch_size = _size_of(self.kept[0]) if batch_size is None else batch_size
        self.steps = 2
        self.warm_up = True
        self._on_device = [_to(self.device, batch) for batch in self.kept]

    def close(self) -> None:
        """End the loader's workers."""
        self._batches.close()

    def phases(self) -> list[str]:
        """Phases that can be run here."""
        names = ["full", "replay", "interference", "loader_full"]
        return [*names, "replay_h2d"] if self.device.type == "cuda" else names

    def run(self, phase: str) -> Reading:
        """One measurement window of a phase."""
        if phase in ("replay", "replay_h2d"):
            kept = cycle(self._on_device if phase == "replay" else self.kept)
            return self._timed(phase, lambda: next(kept), self._step)
        for _ in range(self._stock):
            # Made while the phase before ran.
            next(self._batches)
        if phase == "loader_full":
            return self._timed(phase, lambda: next(self._batches), None)
        if phase == "full":
            return self._timed(phase, lambda: next(self._batches), self._step)
        return self._interference()

    def _interference(self) -> Reading:
        kept = cycle(self.kept)
        with background_consumer(lambda: next(self._batches)) as release:

            def draw() -> BatchT:
                release()
                return next(kept)

            return self._timed("interference", draw, self._step)

    def _timed(
        self,
        phase: str,
        draw: Callable[[], BatchT],
        step: Callable[[BatchT], object] | None,
    ) -> Reading:
        if step is not None and self.warm_up:
            step(draw())
        return measure_window(
            phase,
            draw,
            step or _no_step,
            count=self.steps,
            images_per_step=self.batch_size,
            synchronise=lambda: synchronise(self.device),
        )


def _no_step(batch: object) -> None:
    """The loader alone."""


def _to(device: torch.device, batch: BatchT) -> BatchT:
    if device.type == "cpu":
        return batch
    moved: BatchT = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
    return moved


def _endless(loader: Iterable[BatchT]) -> Generator[BatchT, None, None]:
    seen = 0
    while True:
        before = seen
        for batch in loader:
            seen += 1
            yield batch
        if seen == before:
            raise CmaeError(
                f"the loader is used up after {seen} batches and cannot begin again; give an iterable that "
                "can, such as a DataLoader or a list"
                if seen
                else "the loader is empty: it must give at least one batch"
            )


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _size_of(batch: Any) -> int:
    for leaf in tree_leaves(batch):
        shape = getattr(leaf, "shape", None)
        if shape:
            return int(shape[0])
    raise CmaeError(
        f"batch_size is None, and a batch of type {type(batch).__name__} holds no tensor or array whose "
        "length it could be; give batch_size"
    )


def _workers(loader: Any) -> int:
    return int(getattr(loader, "num_workers", 0) or 0)
