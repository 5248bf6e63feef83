"""Random masks of mask units (squares of patches), a pure function of (seed, epoch, sample).

Every unit gets a 32-bit random number from the counter-based generator Philox4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); the units with the smallest numbers
are kept. No generator state exists, so the mask of a sample does not depend on batch, rank or
resume.
"""

from __future__ import annotations

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from cmae.kernels.backend import Backend, jit, on_device, tl, use_triton

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MAX_UNITS = 1 << 16
_MAX_KERNEL_PATCHES = 1 << 10  # one program holds all patches of an image


def block_mask(
    sample_id: Int64[Tensor, " B"],
    *,
    grid: tuple[int, int],
    mask_unit: int,
    num_keep_units: int,
    seed: int,
    epoch: int,
    backend: Backend = "auto",
) -> tuple[Int32[Tensor, "B K"], Int32[Tensor, "B M"]]:
    """Patches to keep and patches to mask, each ascending, for every sample.

    Args:
        sample_id: Sample ids; with `seed` and `epoch` they decide the mask.
        grid: Patches per column and per row of the image.
        mask_unit: Patches per side of a mask unit; units are kept or masked whole.
        num_keep_units: Units kept, uniformly without replacement.
        seed: Seed of the run, 0..2^64-1.
        epoch: Epoch, 0..2^32-1.
        backend: Implementation; see `cmae.kernels.backend`.

    Returns:
        ids_keep with K = num_keep_units * mask_unit^2 columns and ids_mask with the others, on the
        device of `sample_id`.

    Raises:
        ValueError: An argument is out of range or has the wrong shape or dtype.
    """
    _check(sample_id, grid, mask_unit, num_keep_units, seed, epoch)
    unsupported = None
    if grid[0] * grid[1] > _MAX_KERNEL_PATCHES:
        unsupported = (
            f"grid={grid} has more than {_MAX_KERNEL_PATCHES} patches; use backend='torch'."
        )
    if use_triton("block_mask", backend, sample_id.device, unsupported=unsupported):
        ids_keep, ids_mask = torch.ops.cmae.block_mask(
            sample_id,
            *grid,
            mask_unit,
            num_keep_units,
            _signed(seed),
            _signed(seed >> 32),
            _signed(epoch),
        )
        return ids_keep, ids_mask
    return block_mask_reference(
        sample_id,
        grid=grid,
        mask_unit=mask_unit,
        num_keep_units=num_keep_units,
        seed=seed,
        epoch=epoch,
    )


def block_mask_reference(
    sample_id: Int64[Tensor, " B"],
    *,
    grid: tuple[int, int],
    mask_unit: int,
    num_keep_units: int,
    seed: int,
    epoch: int,
) -> tuple[Int32[Tensor, "B K"], Int32[Tensor, "B M"]]:
    """`block_mask` in plain torch."""
    rows, columns = grid[0] // mask_unit, grid[1] // mask_unit
    num_units, num_patches = rows * columns, grid[0] * grid[1]
    words = _random_words(sample_id, num_units, seed, epoch)
    units = torch.arange(num_units, device=sample_id.device)
    # The unit's number in the low bits makes the keys distinct, so the order is the same everywhere.
    order = (words * _MAX_UNITS + units).argsort(dim=1)
    masked = torch.ones_like(words, dtype=torch.bool)
    masked = masked.scatter(1, order[:, :num_keep_units], False)
    masked = masked.view(-1, rows, 1, columns, 1).expand(-1, -1, mask_unit, -1, mask_unit)
    masked = masked.reshape(-1, num_patches)
    ids = torch.arange(num_patches, device=sample_id.device) + num_patches * masked
    ids = (ids.sort(dim=1).values % num_patches).int()  # kept ones first, both parts ascending
    num_keep = num_keep_units * mask_unit * mask_unit
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
    sample_id: Int64[Tensor, " B"], num_words: int, seed: int, epoch: int
) -> Int64[Tensor, "B words"]:
    """Words 0..num_words-1 of each sample; counter = (draw index, epoch, sample low, sample high)."""
    draws = torch.arange((num_words + 3) // 4, device=sample_id.device)
    sample = sample_id[:, None].expand(-1, len(draws))
    counter = (
        draws.expand_as(sample),
        torch.full_like(sample, epoch),
        sample & _WORD,
        (sample >> 32) & _WORD,
    )
    words = philox4x32(counter, (seed & _WORD, seed >> 32))
    return torch.stack(words, dim=2).flatten(1)[:, :num_words]


def _check(
    sample_id: Tensor,
    grid: tuple[int, int],
    mask_unit: int,
    num_keep_units: int,
    seed: int,
    epoch: int,
) -> None:
    if sample_id.ndim != 1 or sample_id.dtype != torch.int64:
        raise ValueError(
            f"sample_id has shape {tuple(sample_id.shape)} and dtype {sample_id.dtype}; "
            "expected int64 (B,)."
        )
    if mask_unit < 1 or grid[0] < 1 or grid[1] < 1 or grid[0] % mask_unit or grid[1] % mask_unit:
        raise ValueError(
            f"mask_unit={mask_unit} does not divide grid={grid}; choose a common divisor."
        )
    num_units = (grid[0] // mask_unit) * (grid[1] // mask_unit)
    if num_units > _MAX_UNITS:
        raise ValueError(f"grid={grid} has {num_units} units; at most {_MAX_UNITS} are supported.")
    if not 0 <= num_keep_units <= num_units:
        raise ValueError(f"num_keep_units={num_keep_units} is not in 0..{num_units}.")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed={seed} is not in 0..2^64-1.")
    if not 0 <= epoch <= _WORD:
        raise ValueError(f"epoch={epoch} is not in 0..2^32-1.")


@jit()
def _random_word(draw, sample, seed, epoch, seed_high):  # type: ignore[no-untyped-def]
    """Word number `draw` of a sample; two's complement arguments, unsigned answer."""
    counter0 = (draw // 4).to(tl.uint32)
    zero = counter0 * 0
    w0, w1, w2, w3 = tl.random.philox_impl(
        counter0,
        zero + epoch.to(tl.uint32),
        zero + (sample & 0xFFFFFFFF).to(tl.uint32),
        zero + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32),
        zero + seed.to(tl.uint32),
        zero + seed_high.to(tl.uint32),
        10,
    )
    place = draw % 4
    return tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))


# Seed and epoch must not be specialised: Triton would compile again when an epoch is 1 or divisible by 16.
@jit(do_not_specialize=["seed", "seed_high", "epoch"])
def _mask_kernel(  # type: ignore[no-untyped-def]
    sample_id,
    ids_keep,
    ids_mask,
    index_stride,
    seed,
    seed_high,
    epoch,
    rows: tl.constexpr,
    columns: tl.constexpr,
    mask_unit: tl.constexpr,
    num_keep_units: tl.constexpr,
    block_patches: tl.constexpr,
    block_units: tl.constexpr,
):
    """One program draws the mask of one image.

    A patch ranks its unit by counting the units whose (word, number) is smaller; words are made again
    where they are needed, which is cheaper than moving them between threads.
    """
    num_patches: tl.constexpr = rows * columns
    num_units: tl.constexpr = num_patches // (mask_unit * mask_unit)
    num_keep: tl.constexpr = num_keep_units * mask_unit * mask_unit
    image = tl.program_id(0).to(tl.int64)
    sample = tl.load(sample_id + image * index_stride)
    patch = tl.arange(0, block_patches)
    own = patch // columns // mask_unit * (columns // mask_unit) + patch % columns // mask_unit
    own_word = _random_word(own, sample, seed, epoch, seed_high)
    rank = tl.zeros((block_patches,), tl.int32)
    for start in range(0, num_units, block_units):
        other = start + tl.arange(0, block_units)[None, :]
        word = _random_word(other, sample, seed, epoch, seed_high)
        is_smaller = word < own_word[:, None]
        is_tie = (word == own_word[:, None]) & (other < own[:, None])
        before = (is_smaller | is_tie) & (other < num_units)
        rank += tl.sum(before.to(tl.int32), axis=1)
    is_patch = patch < num_patches
    kept = (rank < num_keep_units) & is_patch
    num_before = tl.cumsum(kept.to(tl.int32), axis=0) - kept.to(tl.int32)
    tl.store(ids_keep + image * num_keep + num_before, patch, mask=kept)
    places = ids_mask + image * (num_patches - num_keep) + patch - num_before
    tl.store(places, patch, mask=is_patch & (rank >= num_keep_units))


def _launch(
    sample_id: Tensor,
    rows: int,
    columns: int,
    mask_unit: int,
    num_keep_units: int,
    seed: int,
    seed_high: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    ids_keep, ids_mask = _empty_ids(
        sample_id, rows, columns, mask_unit, num_keep_units, seed, seed_high, epoch
    )
    if len(sample_id) == 0:
        return ids_keep, ids_mask
    block_patches = max(16, 1 << (rows * columns - 1).bit_length())
    with on_device(sample_id):
        _mask_kernel[(len(sample_id),)](
            sample_id,
            ids_keep,
            ids_mask,
            sample_id.stride(0),
            seed,
            seed_high,
            epoch,
            rows=rows,
            columns=columns,
            mask_unit=mask_unit,
            num_keep_units=num_keep_units,
            block_patches=block_patches,
            block_units=min(16, 4096 // block_patches),  # 32 comparisons a thread
            num_warps=4,
        )
    return ids_keep, ids_mask


def _empty_ids(
    sample_id: Tensor,
    rows: int,
    columns: int,
    mask_unit: int,
    num_keep_units: int,
    seed: int,
    seed_high: int,
    epoch: int,
) -> tuple[Tensor, Tensor]:
    num_keep, batch = num_keep_units * mask_unit * mask_unit, len(sample_id)
    ids_keep = sample_id.new_empty((batch, num_keep), dtype=torch.int32)
    return ids_keep, ids_keep.new_empty((batch, rows * columns - num_keep))


def _signed(word: int) -> int:
    """The low 32 bits as two's complement, which every kernel argument of 32 bits can hold."""
    word &= _WORD
    return word - (1 << 32) if word >> 31 else word


torch.library.define(
    "cmae::block_mask",
    "(Tensor sample_id, int rows, int columns, int mask_unit, int num_keep_units, int seed, int seed_high, "
    "int epoch) -> (Tensor, Tensor)",
)
torch.library.impl("cmae::block_mask", ("cpu", "cuda"), _launch)
torch.library.register_fake("cmae::block_mask", _empty_ids)
