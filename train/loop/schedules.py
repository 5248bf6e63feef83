"""How fast the target follows the online model."""

from __future__ import annotations

import math
from collections.abc import Callable

from cmae.model.config import ModelConfig
from cmae.train.config import OptimConfig


def ema_momentum(config: ModelConfig, step: int, total_steps: int) -> float:
    """Share of the old target that the update after optimiser step `step` keeps.

    Args:
        config: momentum and its schedule.
        step: 0..total_steps.
        total_steps: optimiser steps of the run, >= 1.

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


Schedule = Callable[[int], float]


def build_schedule(
    config: OptimConfig, *, total_steps: int, steps_per_epoch: int | None
) -> Schedule:
    """Learning rate by optimiser step: linear warmup, then half a cosine, both per iteration.

    Args:
        config: rates for 256 images; they are scaled by global_batch_size / 256.
        total_steps: length of the schedule.
        steps_per_epoch: unit of `warmup_epochs`; None takes total_steps / epochs.
    """
    scale = config.global_batch_size / 256
    peak, floor = config.lr_per_256 * scale, config.min_lr * scale
    epoch = total_steps / config.epochs if steps_per_epoch is None else steps_per_epoch
    warmup = min(round(config.warmup_epochs * epoch), total_steps)

    def rate(step: int) -> float:
        if step < warmup:
            start = config.warmup_start
            return peak * (start + (1 - start) * step / warmup)
        done = (step - warmup) / max(1, total_steps - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return rate
