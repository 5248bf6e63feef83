"""Fixed two-dimensional sine-cosine position embeddings (MoCo v3, MAE)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


def sincos_pos_embed(
    dim: int, grid: tuple[int, int], *, order: Literal["row", "column"], num_prefix_tokens: int = 1
) -> Float[Tensor, "1 N D"]:
    """Position embedding of every patch, after zeros for the prefix tokens.

    Args:
        dim: Channels, a multiple of 4: sine and cosine of each axis take a quarter.
        grid: Patches per column and per row.
        order: Axis that the first half of the channels encodes; 'row' in CMAE's code,
            'column' in MAE's.
        num_prefix_tokens: Rows of zeros in front, 1 for a cls token.
    """
    rows = torch.arange(grid[0], dtype=torch.float64).repeat_interleave(grid[1])
    columns = torch.arange(grid[1], dtype=torch.float64).repeat(grid[0])
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    axes = (rows, columns) if order == "row" else (columns, rows)
    angles = [axis[:, None] * frequencies for axis in axes]
    parts = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    prefix = torch.zeros(num_prefix_tokens, dim, dtype=torch.float64)
    return torch.cat([prefix, torch.cat(parts, dim=1)])[None].float()
