"""Device memory of a training step, and the traffic of what follows it, without a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cmae.model.analysis.flops import count_parameters
from cmae.model.analysis.operations import FULL, HALF, Precision, operations
from cmae.model.blocks import Block
from cmae.model.cmae import CMAE
from cmae.model.config import ModelConfig


@dataclass(frozen=True)
class Shards:
    """Numbers of ranks that share out what one of them would hold."""

    weights: int = 1
    """Weights, target and gradients: FSDP2."""
    moments: int = 1
    """What AdamW keeps: FSDP2, ZeRO-1."""


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
    """Copy of weights and AdamW that a checkpoint is written from, beside the steps that follow. What lies in
    shards is gathered in host memory."""
    gathered: int = 0
    """What of other ranks' shards is here at once."""

    @property
    def fixed(self) -> int:
        """Whatever the batch size."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.cast_weights + self.gathered

    def total(self, batch_size: int) -> float:
        """For one micro-batch."""
        return self.fixed + batch_size * self.activations_per_image

    def largest_batch(self, usable_bytes: float) -> int:
        """Images of the largest micro-batch that fits beside a checkpoint's copy; 0 where none does."""
        left = usable_bytes - self.fixed - self.snapshot
        return max(0, math.floor(left / self.activations_per_image))


def count_memory(
    config: ModelConfig, precision: Precision, *, num_keys: int, shards: Shards | None = None
) -> Memory:
    """Memory of weights, gradients, AdamW and of what the backward pass needs.

    The allocator's fragments, cuBLAS's workspace and the CUDA context (about 1 GB) come on top.

    Args:
        config: Model.
        precision: Number formats.
        num_keys: Keys of the contrastive bank.
        shards: Ranks that share the fixed part; None: each has all of it.
    """
    shards = shards or Shards()
    counts = count_parameters(config)
    online, target = counts["online"], counts["target"]
    images = 3 * config.img_size**2 * (2 if config.has_contrast else 1)
    saved = sum(op.saved_bytes for op in operations(config, precision, num_keys=num_keys))
    return Memory(
        weights=FULL * (online + target) // shards.weights
        + (HALF * target if precision.target_copy else 0),
        gradients=FULL * online // shards.weights,
        optimizer=2 * FULL * online // shards.moments,
        cast_weights=HALF * online,
        activations_per_image=saved + images,
        snapshot=FULL * (3 * online + target) if shards.moments == 1 else 0,
        gathered=_gathered(config, online, shards),
    )


def _gathered(config: ModelConfig, online: int, shards: Shards) -> int:
    """FSDP2: two blocks and what lies outside of blocks, with gradients; ZeRO-1: a rank's message."""
    if shards.weights == 1:
        return FULL * online // shards.moments if shards.moments > 1 else 0
    with torch.device("meta"):
        model = CMAE(config)
    blocks = [
        sum(one.numel() for one in part.parameters())
        for part in model.modules()
        if isinstance(part, Block)
    ]
    outside = sum(one.numel() for one in model.parameters()) - sum(blocks)
    return FULL * (4 * max(blocks) + 2 * outside)


def optimizer_bytes(config: ModelConfig) -> int:
    """Traffic of the unscaling pass (8 bytes a parameter) and of fused AdamW (28)."""
    return 36 * count_parameters(config)["online"]


def ema_bytes(config: ModelConfig, precision: Precision) -> int:
    """Traffic of the moving average (12 bytes a parameter) and of the target copy's refresh (6)."""
    return (18 if precision.target_copy else 12) * count_parameters(config)["target"]
