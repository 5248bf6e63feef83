"""Random masks of square cells of patches, a pure function of (seed, epoch, sample).

Every cell gets a 32-bit random number from the counter-based generator Philox4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); the cells with the smallest numbers
are kept. No generator state exists, so the mask of a sample does not depend on batch, rank or
resume.
"""

from __future__ import annotations

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from cmae.kernels.backend import Backend, check_backend

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MAX_CELLS = 1 << 16


def block_mask(
    sample_index: Int64[Tensor, " B"],
    *,
    grid: tuple[int, int],
    cell: int,
    num_keep_cells: int,
    seed: int,
    epoch: int,
    backend: Backend = "auto",
) -> tuple[Int32[Tensor, "B K"], Int32[Tensor, "B M"]]:
    """Patches to keep and patches to mask, each ascending, for every sample.

    Args:
        sample_index: sample ids; with `seed` and `epoch` they decide the mask.
        grid: patches per column and per row of the image.
        cell: patches per side of a cell; cells are kept or masked whole.
        num_keep_cells: cells kept, uniformly without replacement.
        seed: 0..2^64-1.
        epoch: 0..2^32-1.
        backend: which implementation; see `cmae.kernels.backend`.

    Returns:
        ids_keep with K = num_keep_cells * cell^2 columns and ids_mask with the others, on the
        device of `sample_index`.

    Raises:
        ValueError: an argument is out of range or has the wrong shape or dtype.
    """
    check_backend("block_mask", backend)
    _check(sample_index, grid, cell, num_keep_cells, seed, epoch)
    return block_mask_reference(
        sample_index,
        grid=grid,
        cell=cell,
        num_keep_cells=num_keep_cells,
        seed=seed,
        epoch=epoch,
    )


def block_mask_reference(
    sample_index: Int64[Tensor, " B"],
    *,
    grid: tuple[int, int],
    cell: int,
    num_keep_cells: int,
    seed: int,
    epoch: int,
) -> tuple[Int32[Tensor, "B K"], Int32[Tensor, "B M"]]:
    """`block_mask` in plain torch."""
    rows, columns = grid[0] // cell, grid[1] // cell
    num_cells, num_patches = rows * columns, grid[0] * grid[1]
    words = _random_words(sample_index, num_cells, seed, epoch)
    cells = torch.arange(num_cells, device=sample_index.device)
    # The cell number in the low bits makes the keys distinct, so the order is the same everywhere.
    order = (words * _MAX_CELLS + cells).argsort(dim=1)
    masked = torch.ones_like(words, dtype=torch.bool)
    masked = masked.scatter(1, order[:, :num_keep_cells], False)
    masked = masked.view(-1, rows, 1, columns, 1).expand(-1, -1, cell, -1, cell)
    masked = masked.reshape(-1, num_patches)
    ids = torch.arange(num_patches, device=sample_index.device) + num_patches * masked
    ids = (ids.sort(dim=1).values % num_patches).int()  # kept ones first, both parts ascending
    num_keep = num_keep_cells * cell * cell
    return ids[:, :num_keep].contiguous(), ids[:, num_keep:].contiguous()


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words.

    Equal to Random123's philox4x32-10, whose published test vectors the tests check.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The signed product wraps to the right 64 bits; the mask removes the copied sign.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _WORD, product0 & _WORD
        high1, low1 = (product1 >> 32) & _WORD, product1 & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _random_words(
    sample_index: Int64[Tensor, " B"], num_words: int, seed: int, epoch: int
) -> Int64[Tensor, "B words"]:
    """Words 0..num_words-1 of each sample; counter = (lane, epoch, sample low, sample high)."""
    lanes = torch.arange((num_words + 3) // 4, device=sample_index.device)
    sample = sample_index[:, None].expand(-1, len(lanes))
    counter = (
        lanes.expand_as(sample),
        torch.full_like(sample, epoch),
        sample & _WORD,
        (sample >> 32) & _WORD,
    )
    words = philox4x32(counter, (seed & _WORD, seed >> 32))
    return torch.stack(words, dim=2).flatten(1)[:, :num_words]


def _check(
    sample_index: Tensor,
    grid: tuple[int, int],
    cell: int,
    num_keep_cells: int,
    seed: int,
    epoch: int,
) -> None:
    if sample_index.ndim != 1 or sample_index.dtype != torch.int64:
        raise ValueError(
            f"sample_index has shape {tuple(sample_index.shape)} and dtype {sample_index.dtype}; "
            "expected int64 (B,)."
        )
    if cell < 1 or grid[0] < 1 or grid[1] < 1 or grid[0] % cell or grid[1] % cell:
        raise ValueError(f"cell={cell} does not divide grid={grid}; choose a common divisor.")
    num_cells = (grid[0] // cell) * (grid[1] // cell)
    if num_cells > _MAX_CELLS:
        raise ValueError(f"grid={grid} has {num_cells} cells; at most {_MAX_CELLS} are supported.")
    if not 0 <= num_keep_cells <= num_cells:
        raise ValueError(f"num_keep_cells={num_keep_cells} is not in 0..{num_cells}.")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} is not in 0..2^64-1.")
    if not 0 <= epoch <= _WORD:
        raise ValueError(f"epoch={epoch} is not in 0..2^32-1.")
