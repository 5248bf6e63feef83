"""Learning rates of supervised training."""

from __future__ import annotations

import math


def cosine_schedule(epoch: float, *, warmup: float, total: float, least: float = 0.0) -> float:
    """Learning rate over its peak: linear from 0, then half a cosine, as MAE's fine-tuning and probe have it.

    Args:
        epoch: Epochs done, a fraction inside one.
        warmup: Epochs of warm-up.
        total: Epochs in all.
        least: Value at the end, over the peak.
    """
    if epoch < warmup:
        return epoch / warmup
    done = min(1.0, (epoch - warmup) / max(1e-9, total - warmup))
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done))
