"""Which patches the online encoder sees."""

from __future__ import annotations

import torch
from jaxtyping import Int, Int32, Int64
from torch import Tensor

from cmae.kernels.block_mask import block_mask
from cmae.model.config import ModelConfig


def draw_mask(
    config: ModelConfig, sample_id: Int64[Tensor, " B"], *, seed: int, epoch: int
) -> tuple[Int32[Tensor, "B K"], Int32[Tensor, "B M"]]:
    """Ids of visible and of masked patches, a pure function of (seed, epoch, sample).

    Args:
        config: Grid, mask ratio and mask unit.
        sample_id: Sample ids.
        seed: Seed of the run, 0..2^64-1.
        epoch: Epoch, 0..2^32-1.

    Returns:
        ids_keep (K = config.num_keep) and ids_mask, both ascending, where `sample_id` lies.
    """
    return block_mask(
        sample_id,
        grid=config.grid,
        mask_unit=config.mask_unit,
        num_keep_units=config.num_keep_units,
        seed=seed,
        epoch=epoch,
    )


def complement(ids: Int[Tensor, "B K"], num_patches: int) -> Int[Tensor, "B M"]:
    """The patches that `ids` does not name, ascending; ids must be distinct in each row."""
    absent = torch.ones(len(ids), num_patches, dtype=torch.int32, device=ids.device)
    absent = absent.scatter(1, ids.long(), 0)
    order = absent.argsort(dim=1, descending=True, stable=True)
    return order[:, : num_patches - ids.shape[1]]
