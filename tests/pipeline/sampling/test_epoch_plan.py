from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmae.pipeline.sampling.counter_rng import hash_words
from cmae.pipeline.sampling.epoch_plan import EpochPlan

SIZES = st.integers(1, 400)


def walk(plan: EpochPlan, epoch: int, *, world_size: int, batch_size: int, start: int = 0):
    """Per micro-batch, the ranks' samples side by side, as a run of `world_size` ranks reads them."""
    epoch_offset = start
    while True:
        parts = [
            plan.rows(epoch, epoch_offset, rank=r, world_size=world_size, batch_size=batch_size)
            for r in range(world_size)
        ]
        if parts[0] is None:
            assert all(part is None for part in parts)
            return
        yield epoch_offset, np.concatenate(parts)
        epoch_offset += world_size * batch_size


@given(num_samples=SIZES, block=st.integers(1, 50), window=st.integers(1, 500), seed=st.integers())
@settings(max_examples=60, deadline=None)
def test_order_is_a_permutation(num_samples, block, window, seed):
    plan = EpochPlan(num_samples, 1, seed=seed, block_size=block, window_size=window)
    assert sorted(plan.order(3)) == list(range(num_samples))


def defined_order(plan: EpochPlan, epoch: int) -> np.ndarray:
    """The order by its definition: one stable sort by block keys, one by (window, sample key)."""
    words = {
        lane: hash_words(
            plan.seed, epoch, sample_id=np.arange(plan.num_samples), num_draws=1, first_draw=lane
        )[:, 0]
        for lane in (1 << 20, (1 << 20) + 1)
    }
    samples = np.arange(plan.num_samples)
    block_key, sample_key = words.values()
    order = samples[np.argsort(block_key[samples // plan.block_size], kind="stable")]
    window = samples // plan.window_size
    return order[np.lexsort((sample_key[order], window))]


@given(num_samples=SIZES, block=st.integers(1, 50), window=st.integers(1, 500), seed=st.integers())
@settings(max_examples=60, deadline=None)
def test_order_is_the_one_that_is_defined(num_samples, block, window, seed):
    plan = EpochPlan(num_samples, 1, seed=seed, block_size=block, window_size=window)
    np.testing.assert_array_equal(plan.order(5), defined_order(plan, 5))


@given(
    num_samples=st.integers(32, 400), steps=st.integers(1, 4), epoch=st.integers(0, 9), seed=SIZES
)
@settings(max_examples=60, deadline=None)
def test_steps_hold_the_same_samples_for_every_world_size(num_samples, steps, epoch, seed):
    global_batch_size = 8 * steps
    plan = EpochPlan(num_samples, global_batch_size, seed=seed, block_size=4, window_size=32)

    def by_step(world_size, batch_size):
        seen = {}
        for epoch_offset, samples in walk(
            plan, epoch, world_size=world_size, batch_size=batch_size
        ):
            seen.setdefault(epoch_offset // global_batch_size, []).extend(samples)
        return seen

    one = by_step(1, global_batch_size)
    assert one == by_step(1, 8)
    assert one == by_step(2, 4)
    assert one == by_step(4, 2)
    assert len(one) == plan.steps_per_epoch == num_samples // global_batch_size
    every = np.concatenate(list(one.values()))
    assert len(np.unique(every)) == len(every) == plan.samples_per_epoch


@given(num_samples=st.integers(16, 300), done=st.integers(0, 30), worlds=st.permutations([1, 2, 4]))
@settings(max_examples=60, deadline=None)
def test_resume_with_another_world_size_continues_the_same_sequence(num_samples, done, worlds):
    plan = EpochPlan(num_samples, 16, seed=1, block_size=8, window_size=64)
    whole = [s for _, part in walk(plan, 2, world_size=1, batch_size=16) for s in part]
    start = min(done, plan.steps_per_epoch) * 16
    for world_size in worlds:
        rest = [
            s
            for _, part in walk(
                plan, 2, world_size=world_size, batch_size=16 // world_size, start=start
            )
            for s in part
        ]
        assert rest == whole[start:]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [
        EpochPlan(1000, 10, seed=seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_without_shuffle_the_order_is_that_of_the_data():
    assert EpochPlan(100, 10, shuffle=False).order(5).tolist() == list(range(100))


def test_a_small_data_set_is_shuffled_fully():
    order = EpochPlan(2000, 10, block_size=50).order(0)
    distance = np.abs(np.diff(order))
    # Two random places in 0..n-1 are n/3 apart on average.
    assert distance.mean() == pytest.approx(2000 / 3, rel=0.1)


def test_a_window_reads_few_places_on_disk_from_all_over_the_data_set():
    plan = EpochPlan(64 * 1000, 10, block_size=64, window_size=640)
    window = plan.order(0)[:640]
    blocks = np.unique(window // 64)
    assert len(blocks) == 10
    assert blocks.max() - blocks.min() > 500
    assert not (np.diff(window) == 1).mean() > 0.1


def test_order_of_a_large_data_set_is_quick():
    # It is made in a reading thread between two epochs: a second is no problem there, a minute would be.
    start = time.thread_time()
    EpochPlan(1_281_167, 4096).order(0)
    assert time.thread_time() - start < 10


def test_global_batch_larger_than_the_data_names_both_and_the_repair():
    with pytest.raises(ValueError, match=r"global_batch_size=4096 .* num_samples=500.*Lower"):
        EpochPlan(500, 4096)


def test_known_order_stays_the_same():
    order = EpochPlan(12, 4, seed=7, block_size=3, window_size=6).order(1)
    assert order.tolist() == [0, 2, 1, 8, 7, 6, 5, 4, 3, 10, 11, 9]
