"""Predicted pixels back to images that can be looked at."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from cmae.kernels.images import Images, normalise_rows, raw_rows
from cmae.model.config import ModelConfig
from cmae.model.encoder import all_ids
from cmae.model.pixels import to_config_normalisation


def to_pixels(
    config: ModelConfig, predicted: Float[Tensor, "B N row"], online: Images
) -> Float[Tensor, "B H W 3"]:
    """Predictions of `CMAE.reconstruct` as RGB images in 0..255 (not clamped).

    With norm_pix_loss the network predicts a patch up to its mean and scale; these are taken from
    the true patch, so that only what was predicted is seen.

    Args:
        config: Configuration of the model that predicted.
        predicted: Rows of all patches in patch order.
        online: Images that were masked.
    """
    mean, std = config.pixel_mean, config.pixel_std
    rows = predicted.float()
    if config.norm_pix_loss:
        images = to_config_normalisation(online, config)
        truth = raw_rows(images, all_ids(online, config.num_patches), config.patch_size).float()
        if online.dtype == torch.uint8:
            truth = normalise_rows(truth, mean, std)
        variance, centre = torch.var_mean(truth, dim=-1, keepdim=True, correction=1)
        rows = rows * (variance + 1e-6).sqrt() + centre
    rows = normalise_rows(
        rows,
        (-mean[0] / std[0], -mean[1] / std[1], -mean[2] / std[2]),
        (1 / std[0], 1 / std[1], 1 / std[2]),
    )
    return unpatchify(rows, config)


def unpatchify(rows: Float[Tensor, "B N row"], config: ModelConfig) -> Float[Tensor, "B H W 3"]:
    """Rows in (py, px, channel) order, all patches, put together to images."""
    size, (grid_h, grid_w) = config.patch_size, config.grid
    blocks = rows.view(-1, grid_h, grid_w, size, size, 3)
    return blocks.transpose(2, 3).reshape(-1, grid_h * size, grid_w * size, 3)
