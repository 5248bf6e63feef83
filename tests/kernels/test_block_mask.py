"""Masks: known answers of Philox, an independent twin in numpy, counts and uniformity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmae.kernels.block_mask import block_mask, block_mask_reference, philox4x32

RECIPE = {"grid": (14, 14), "mask_unit": 2, "num_keep_units": 17, "seed": 0, "epoch": 0}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x00000000, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_gives_random123s_known_answers(word, expected):
    counter = (torch.tensor([word]),) * 4
    words = philox4x32(counter, (word, word))
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_philox_gives_random123s_known_answer_for_digits_of_pi():
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    words = philox4x32(tuple(torch.tensor([w]) for w in pi), (0xA4093822, 0x299F31D0))
    assert [int(w) for w in words] == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def numpy_philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = [np.uint64(x) for x in counter], [np.uint64(x) for x in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ k[0],
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ k[1],
            p0 & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return [int(x) for x in c]


def numpy_ids_keep(
    sample: int, grid: tuple[int, int], mask_unit: int, num_keep: int, seed: int, epoch: int
) -> list[int]:
    """Visible patches of one sample, by sorting (word, mask_unit) pairs."""
    rows, columns = grid[0] // mask_unit, grid[1] // mask_unit
    words: list[int] = []
    for draw in range(-(-rows * columns // 4)):
        counter = [draw, epoch, sample & 0xFFFFFFFF, sample >> 32]
        words += numpy_philox(counter, [seed & 0xFFFFFFFF, seed >> 32])
    pairs = sorted((words[i], i) for i in range(rows * columns))
    kept = {i for _, i in pairs[:num_keep]}
    return [
        y * grid[1] + x
        for y in range(grid[0])
        for x in range(grid[1])
        if (y // mask_unit) * columns + x // mask_unit in kept
    ]


@pytest.mark.parametrize(
    ("grid", "mask_unit", "num_keep", "seed", "epoch"),
    [
        ((14, 14), 2, 17, 0, 0),
        ((14, 14), 1, 49, 2**63 + 12345, 799),
        ((4, 6), 2, 2, 7, 2**32 - 1),
        ((3, 3), 1, 0, 1, 1),
        ((3, 3), 3, 1, 1, 1),
    ],
)
def test_mask_equals_the_numpy_twin(grid, mask_unit, num_keep, seed, epoch):
    samples = [0, 1, (5 << 32) | 77, 2**62 + 3]
    ids_keep, ids_mask = block_mask(
        torch.tensor(samples),
        grid=grid,
        mask_unit=mask_unit,
        num_keep_units=num_keep,
        seed=seed,
        epoch=epoch,
    )
    for row, sample in enumerate(samples):
        expected = numpy_ids_keep(sample, grid, mask_unit, num_keep, seed, epoch)
        assert ids_keep[row].tolist() == expected
        assert ids_mask[row].tolist() == sorted(set(range(grid[0] * grid[1])) - set(expected))


def test_keep_and_mask_are_int32_ascending_and_make_up_the_image():
    ids_keep, ids_mask = block_mask(torch.arange(50), **RECIPE)
    assert ids_keep.shape == (50, 68)
    assert ids_mask.shape == (50, 128)
    assert ids_keep.dtype == ids_mask.dtype == torch.int32
    assert (ids_keep.diff(dim=1) > 0).all()
    assert (ids_mask.diff(dim=1) > 0).all()
    both = torch.cat([ids_keep, ids_mask], dim=1).sort(dim=1).values
    assert (both == torch.arange(196)).all()


def test_mask_of_a_sample_does_not_depend_on_its_batch():
    samples = torch.randint(0, 2**62, (64,), generator=torch.Generator().manual_seed(0))
    whole, _ = block_mask(samples, **RECIPE)
    parts = [block_mask(part, **RECIPE)[0] for part in samples.split(7)]
    assert torch.equal(whole, torch.cat(parts))
    shuffle = torch.randperm(64)
    assert torch.equal(block_mask(samples[shuffle], **RECIPE)[0], whole[shuffle])


@pytest.mark.parametrize("change", [{"seed": 1}, {"seed": 2**32}, {"epoch": 1}])
def test_mask_changes_with_seed_and_epoch(change):
    samples = torch.arange(100)
    first, second = block_mask(samples, **RECIPE)[0], block_mask(samples, **RECIPE | change)[0]
    assert (first != second).any(dim=1).all()


def test_samples_that_differ_in_the_shard_alone_get_different_masks():
    samples = (torch.arange(100) << 32) | 5
    ids_keep, _ = block_mask(samples, **RECIPE)
    assert len(ids_keep.unique(dim=0)) == 100


def test_every_unit_and_every_pair_of_units_is_kept_equally_often():
    draws, units, keep = 20_000, 9, 3
    ids_keep, _ = block_mask(
        torch.arange(draws), grid=(3, 3), mask_unit=1, num_keep_units=keep, seed=0, epoch=0
    )
    kept = torch.zeros(draws, units).scatter(1, ids_keep.long(), 1.0)
    together = kept.T @ kept / draws
    single, pair = keep / units, keep * (keep - 1) / (units * (units - 1))
    five_sigma = 5 * (0.25 / draws) ** 0.5
    assert (together.diagonal() - single).abs().max() < five_sigma
    assert (together[~torch.eye(units, dtype=torch.bool)] - pair).abs().max() < five_sigma


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"grid": (14, 15)}, "mask_unit=2"),
        ({"num_keep_units": 50}, "num_keep_units=50"),
        ({"seed": -1}, "seed=-1"),
        ({"epoch": 2**32}, "epoch=4294967296"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_bad_arguments_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        block_mask(torch.arange(2), **RECIPE | change)


@pytest.mark.parametrize("samples", [torch.arange(4).int(), torch.zeros(2, 2, dtype=torch.int64)])
def test_a_bad_sample_id_is_named(samples):
    with pytest.raises(ValueError, match="sample_id"):
        block_mask(samples, **RECIPE)


def test_auto_is_the_reference():
    samples = torch.arange(8)
    for mine, reference in zip(
        block_mask(samples, **RECIPE), block_mask_reference(samples, **RECIPE), strict=True
    ):
        assert torch.equal(mine, reference)
