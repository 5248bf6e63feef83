"""What changes from step to step: the target's momentum and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from cmae.model import ModelConfig
from cmae.train.config import OptimConfig


def ema_momentum(config: ModelConfig, step: int, total_steps: int) -> float:
    """Share of the old target that the update after optimiser step `step` keeps.

    Args:
        config: Momentum and its schedule.
        step: Optimiser steps taken before it, 0..total_steps.
        total_steps: Optimiser steps of the run, >= 1.

    Returns:
        `momentum` when constant; else 1 - (1 - momentum) * (cos(pi * step / total_steps) + 1) / 2
        (BYOL), which is `momentum` at step 0 and 1 at the end.

    Raises:
        ValueError: `step` is not in 0..total_steps.
    """
    if total_steps < 1 or not 0 <= step <= total_steps:
        raise ValueError(
            f"step={step} is not in 0..total_steps={total_steps} with at least 1 step."
        )
    if config.momentum_schedule == "constant":
        return config.momentum
    return 1 - (1 - config.momentum) * (math.cos(math.pi * step / total_steps) + 1) / 2


WARMUP_START = 1e-4
"""Learning rate at step 0 as a fraction of the peak, as in the authors' recipe."""

Schedule = Callable[[int], float]


def build_schedule(
    config: OptimConfig, *, total_steps: int, steps_per_epoch: int | None
) -> Schedule:
    """Learning rate by optimiser step: linear warmup, then half a cosine, both per iteration.

    Args:
        config: Peak rate for 256 images, which is scaled by global_batch_size / 256.
        total_steps: Length of the schedule.
        steps_per_epoch: Unit of `warmup_epochs`; None takes total_steps / epochs.
    """
    peak = config.lr_per_256 * (config.global_batch_size / 256)
    epoch = total_steps / config.epochs if steps_per_epoch is None else steps_per_epoch
    warmup = min(round(config.warmup_epochs * epoch), total_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (WARMUP_START + (1 - WARMUP_START) * step / warmup)
        done = (step - warmup) / max(1, total_steps - warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return rate
