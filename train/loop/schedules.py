"""How fast the target follows the online model."""

from __future__ import annotations

import math

from cmae.model.config import ModelConfig


def momentum_at(config: ModelConfig, step: int, total_steps: int) -> float:
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
