"""Device memory of a training step, and the traffic of what follows it, without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cmae.model.analysis.flops import count_parameters
from cmae.model.analysis.operations import FULL, HALF, Precision, operations
from cmae.model.config import ModelConfig


@dataclass(frozen=True)
class Memory:
    """Device memory of a step, bytes."""

    weights: int
    """float32 weights of both branches, and the target copy."""
    gradients: int
    optimizer: int
    cast_weights: int
    """16-bit weights of the online branch, which autocast keeps until the backward pass is over."""
    activations_per_image: float
    snapshot: int
    """Copy of weights and AdamW that a checkpoint is written from, beside the steps that follow."""

    @property
    def fixed(self) -> int:
        """Whatever the batch size."""
        return self.weights + self.gradients + self.optimizer + self.cast_weights

    def total(self, batch_size: int) -> float:
        """For one micro-batch."""
        return self.fixed + batch_size * self.activations_per_image

    def largest_batch(self, usable_bytes: float) -> int:
        """Images of the largest micro-batch that fits beside a checkpoint's copy; 0 where none does."""
        left = usable_bytes - self.fixed - self.snapshot
        return max(0, math.floor(left / self.activations_per_image))


def count_memory(config: ModelConfig, precision: Precision, *, num_keys: int) -> Memory:
    """Memory of weights, gradients, AdamW and of what the backward pass needs.

    The allocator's fragments, cuBLAS's workspace and the CUDA context (about 1 GB) come on top.
    """
    counts = count_parameters(config)
    online, target = counts["online"], counts["target"]
    images = 3 * config.img_size**2 * (2 if config.has_contrast else 1)
    saved = sum(op.saved_bytes for op in operations(config, precision, num_keys=num_keys))
    return Memory(
        weights=FULL * (online + target) + (HALF * target if precision.target_copy else 0),
        gradients=FULL * online,
        optimizer=2 * FULL * online,
        cast_weights=HALF * online,
        activations_per_image=saved + images,
        snapshot=FULL * (3 * online + target),
    )


def optimizer_bytes(config: ModelConfig) -> int:
    """Traffic of the unscaling pass (8 bytes a parameter) and of fused AdamW (28)."""
    return 36 * count_parameters(config)["online"]


def ema_bytes(config: ModelConfig, precision: Precision) -> int:
    """Traffic of the moving average (12 bytes a parameter) and of the target copy's refresh (6)."""
    return (18 if precision.target_copy else 12) * count_parameters(config)["target"]
