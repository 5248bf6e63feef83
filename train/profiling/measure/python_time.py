"""How much of a step's time is Python in the training thread."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class StepTimes:
    """One step under torch's profiler."""

    operators_ms: float
    """Time of the training thread inside torch operators, waiting for the device included."""
    kernels_ms: float
    """Time in which the GPU ran something; 0 without a GPU."""
    gaps_ms: float = math.inf
    """Time of the training thread between operators: Python, and the profiler's own."""


def time_one_step(step: Callable[[], object], device: torch.device) -> StepTimes:
    """Run one step under torch's profiler."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints about itself
    with profile(activities=activities) as profiler:
        begun = time.perf_counter()
        step()
        wall_ms = 1000 * (time.perf_counter() - begun)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = list(profiler.events() or [])
    on_cpu = [event for event in events if event.device_type.name == "CPU"]
    # A GPU's backward pass has a thread of its own, for which the training thread waits.
    mine = on_cpu[0].thread if on_cpu else None
    operators = [
        event for event in on_cpu if event.name.startswith("aten::") and event.thread == mine
    ]
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    operators_ms = _union_ms(operators)
    return StepTimes(operators_ms, _union_ms(kernels), max(0.0, wall_ms - operators_ms))


def _union_ms(events: Sequence[Any]) -> float:
    """Time covered by at least one of the events."""
    covered_us, end_us = 0.0, -1.0
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        covered_us += max(0.0, end - max(start, end_us))
        end_us = max(end_us, end)
    return covered_us / 1000


def python_ms(cpu_ms: float, step_ms: float, one_step: StepTimes) -> float:
    """Python's part of a step: CPU time of the training thread outside operators, where nothing hides it.

    It is no more than the gaps between operators in the step that was looked at, which may have run while the
    core was faster. On a GPU, what the training thread does while kernels run costs nothing.
    """
    outside = min(max(0.0, cpu_ms - one_step.operators_ms), one_step.gaps_ms)
    return min(outside, max(0.0, step_ms - one_step.kernels_ms))
