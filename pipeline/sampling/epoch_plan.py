"""Epoch plan: which sample belongs to which step, rank and micro-batch, from (seed, epoch, sizes) alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Int64

from cmae.errors import CmaeError
from cmae.pipeline.sampling.counter_rng import hash_words

# Far from the draws of the views: a sample's place in the epoch must say nothing about its crop.
_BLOCK_DRAW, _SAMPLE_DRAW = 1 << 20, (1 << 20) + 1


@dataclass(frozen=True)
class EpochPlan:
    """A permutation of the data set for every epoch, divided into global batches.

    Blocks of `block_size` consecutive samples are permuted, then samples are shuffled inside windows
    of `window_size`. With blocks of 1 the shuffle is uniform. Larger ones let a window touch only
    window_size / block_size places of the data set, for readers to whom places are dear; the price is in
    docs/design/0012-shuffle.md. A data set no larger than a window is shuffled fully whatever the block.
    With last_batch='drop' the last num_samples % global_batch_size places of an epoch are left out, other
    samples each time. With 'pad' every sample is used, and the epoch's first samples fill the last global
    batch up: `padding` names them. They come again with the views and masks of their first turn.

    Nothing here depends on rank or world size: rank r of W takes the places
    epoch_offset + r * B ... + B of the permuted epoch, and epoch_offset moves on by W * B.

    Raises:
        CmaeError: The global batch is larger than the data set, or a size is not positive.
    """

    num_samples: int
    global_batch_size: int
    seed: int = 0
    shuffle: bool = True
    block_size: int = 1
    window_size: int = 16384
    last_batch: Literal["drop", "pad"] = "drop"

    def __post_init__(self) -> None:
        for name in ("num_samples", "global_batch_size", "block_size", "window_size"):
            if getattr(self, name) < 1:
                raise CmaeError(f"{name}={getattr(self, name)} must be at least 1")
        if self.last_batch not in ("drop", "pad"):
            raise CmaeError(f"last_batch={self.last_batch!r} must be drop or pad")
        if self.global_batch_size > self.num_samples:
            raise CmaeError(
                f"global_batch_size={self.global_batch_size} is larger than the data set of "
                f"num_samples={self.num_samples}: an epoch would have no step. Lower the global batch size "
                "(with a smaller batch size or fewer accumulation steps) or add data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch; equal on every rank by construction."""
        spare = self.global_batch_size - 1 if self.last_batch == "pad" else 0
        return (self.num_samples + spare) // self.global_batch_size

    @property
    def samples_per_epoch(self) -> int:
        """Places in an epoch: whole global batches only."""
        return self.steps_per_epoch * self.global_batch_size

    def padding(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """Samples that an epoch takes a second time to fill its last global batch; empty with 'drop'."""
        return self.order(epoch)[: max(0, self.samples_per_epoch - self.num_samples)]

    def order(self, epoch: int) -> Int64[np.ndarray, " N"]:
        """Permuted data set rows of an epoch (read only: the last two are cached)."""
        return _order(self, epoch)

    def rows(
        self, epoch: int, epoch_offset: int, *, rank: int, world_size: int, batch_size: int
    ) -> Int64[np.ndarray, " B"] | None:
        """Data set rows of a rank's micro-batch at `epoch_offset`; None when the epoch is used up."""
        if epoch_offset + world_size * batch_size > self.samples_per_epoch:
            return None
        start = epoch_offset + rank * batch_size
        places = np.arange(start, start + batch_size)
        return np.take(self.order(epoch), places, mode="wrap")  # past the end only with 'pad'


@lru_cache(maxsize=2)  # this epoch and the next: at ten million samples each takes 80 MB
def _order(plan: EpochPlan, epoch: int) -> Int64[np.ndarray, " N"]:
    if plan.shuffle:
        order = _shuffle_blocks(plan, epoch)
        _shuffle_windows(plan, order, epoch)
    else:
        order = np.arange(plan.num_samples, dtype=np.int64)
    order.flags.writeable = False
    return order


def _shuffle_blocks(plan: EpochPlan, epoch: int) -> Int64[np.ndarray, " N"]:
    """Permute blocks of consecutive samples; the last block may be short and moves like the others."""
    num_blocks = -(-plan.num_samples // plan.block_size)
    keys = hash_words(
        plan.seed,
        epoch,
        sample_id=np.arange(num_blocks),
        num_draws=1,
        first_draw=_BLOCK_DRAW,
    )[:, 0]
    first = np.argsort(keys, kind="stable") * plan.block_size
    order = (first[:, None] + np.arange(plan.block_size)).reshape(-1)
    return order[order < plan.num_samples]


def _shuffle_windows(plan: EpochPlan, order: Int64[np.ndarray, " N"], epoch: int) -> None:
    """Shuffle in place, window by window: what is sorted stays in the core's cache."""
    for start in range(0, order.size, plan.window_size):
        window = order[start : start + plan.window_size]
        keys = hash_words(plan.seed, epoch, sample_id=window, num_draws=1, first_draw=_SAMPLE_DRAW)[
            :, 0
        ]
        window[:] = window[np.argsort(keys, kind="stable")]
