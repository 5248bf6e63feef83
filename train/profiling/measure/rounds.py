"""Rounds of phases: each phase once a round, in turn, so that drift of the machine meets all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cmae.train.distributed import World, from_main
from cmae.train.profiling.analysis.bootstrap import estimate
from cmae.train.profiling.analysis.records import Phase, Reading
from cmae.train.profiling.analysis.stages import sum_windows

_SLOW_STEP_S = 1.0
"""A step that takes longer is worth no second one to warm up."""


class PhaseRunner(Protocol):
    """Runs the phases of one loader and one step, whoever made them."""

    steps: int
    """Timed steps in a measurement window."""
    warm_up: bool
    """Take a step that is not timed in front of each window."""

    def phases(self) -> list[str]:
        """Phases that can be run here, `full` first: the others may use what it leaves."""

    def run(self, phase: str) -> Reading:
        """One measurement window of a phase."""


def run_rounds(
    runner: PhaseRunner,
    count: int,
    *,
    is_over: Callable[[int], bool] = lambda number: False,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Reading]]:
    """Run every phase once a round; the readings of each, by round.

    Args:
        runner: Phases to run.
        count: Rounds at most.
        is_over: Whether to stop before the round of this number.
        log: Function that takes a line about the progress.
    """
    names = runner.phases()
    readings: dict[str, list[Reading]] = {name: [] for name in names}
    for number in range(count):
        if is_over(number):
            break
        for name in _order(names, number):
            log(f"round {number + 1} of at most {count}: {name}")
            readings[name].append(runner.run(name))
    return readings


def _order(phases: Sequence[str], number: int) -> list[str]:
    """`full` first; the rest begins elsewhere in every round."""
    first, rest = phases[0], list(phases[1:])
    shift = (number * 3) % len(rest)
    return [first, *rest[shift:], *rest[:shift]]


def plan_steps(
    runner: PhaseRunner,
    *,
    steps: int | None,
    num_readers: int,
    deadline: float,
    world: World,
) -> int:
    """Timed steps of a window, the same on every rank: about a second, and three rounds should fit.

    Args:
        runner: Phases to run; it is warm afterwards.
        steps: Number that is asked for; None = as many as seem right.
        num_readers: Batches that are read at the same time.
        deadline: Moment of `time.monotonic` at which the rounds should be over.
        world: This process among all.
    """
    begun = time.monotonic()
    runner.run("full")
    slow_s = time.monotonic() - begun  # with compilation, allocations and empty caches
    begun = time.monotonic()
    step_s = runner.run("full").wall_s / runner.steps
    overhead_s = time.monotonic() - begun - runner.steps * step_s
    if from_main(step_s > _SLOW_STEP_S, world):
        runner.warm_up = False
        overhead_s -= step_s
    chosen = steps or whole_bursts(min(200, math.ceil(1 / step_s)), num_readers)
    left = max(0.0, deadline - time.monotonic() - min(slow_s, 30.0))
    num_phases = len(runner.phases())
    if steps is None and num_phases * (overhead_s + chosen * step_s) * 3 > left:
        chosen = max(1, math.floor((left / 3 / num_phases - overhead_s) / step_s))
    return int(from_main(chosen, world))


def whole_bursts(steps: int, num_readers: int) -> int:
    """At least so many: readers that begin together bring batches in bursts, and only whole ones count."""
    return num_readers * math.ceil(steps / num_readers)


def phase_records(
    readings: Mapping[str, Sequence[Reading]], what: Mapping[str, str], *, world_size: int
) -> tuple[Phase, ...]:
    """The record of each phase from its readings.

    Args:
        readings: Readings by phase and round.
        what: Line for the reader about each phase.
        world_size: Number of ranks, over which rates are summed.
    """
    return tuple(
        Phase(
            name=name,
            what=what[name],
            step_ms=estimate([one.step_ms for one in each]),
            images_per_s=estimate([world_size * one.images_per_s for one in each]),
            loader=_loader(each),
            step_times_ms=tuple(value for one in each for value in one.step_times_ms),
        )
        for name, each in readings.items()
    )


def _loader(readings: Sequence[Reading]) -> dict[str, Any] | None:
    windows = [one.loader for one in readings if one.loader is not None]
    return sum_windows(windows).to_dict() if windows else None
