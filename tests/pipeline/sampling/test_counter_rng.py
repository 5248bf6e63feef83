from __future__ import annotations

import numpy as np
import pytest

from cmae.pipeline.sampling.counter_rng import hash_words, uniforms

SAMPLES = np.arange(20_000, dtype=np.int64)


def splitmix64(state: int) -> tuple[int, int]:
    """The published algorithm in plain integers: next state and output."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return state, z ^ (z >> 31)


def test_known_answers_stay_the_same():
    words = hash_words(1, 2, sample_id=np.array([0, 3, (5 << 32) | 7]), num_draws=2, first_draw=0)
    expected = [
        [0x91863F22B6DE8B00, 0xA4ACB8C63AB57A56],
        [0x81B8C67B2BE6AA6F, 0x83F0092FF02FDA2A],
        [0x8F2761F899201DAA, 0x9BF677A97CD0A951],
    ]
    assert words.tolist() == expected


def test_lanes_are_the_outputs_of_splitmix64_started_at_the_samples_state():
    words = hash_words(9, 4, sample_id=np.array([123]), num_draws=5)
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15
    _, seed_word = splitmix64(9)
    _, epoch_word = splitmix64((seed_word + gamma * 4 - gamma) & mask)
    _, sample_word = splitmix64(123)
    _, state = splitmix64(((epoch_word ^ sample_word) - gamma) & mask)
    for lane in range(5):
        state, word = splitmix64(state)
        assert int(words[0, lane]) == word


@pytest.mark.parametrize(
    ("seed", "epoch", "first_draw"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (2**63, 0, 0)]
)
def test_every_argument_changes_the_numbers(seed, epoch, first_draw):
    base = uniforms(0, 0, sample_id=SAMPLES[:8], num_draws=4)
    other = uniforms(seed, epoch, sample_id=SAMPLES[:8], num_draws=4, first_draw=first_draw)
    assert not (base == other).any()


def test_a_row_does_not_depend_on_the_other_rows():
    together = uniforms(3, 1, sample_id=SAMPLES, num_draws=6)
    alone = uniforms(3, 1, sample_id=SAMPLES[77:78], num_draws=2, first_draw=4)
    assert (together[77:78, 4:] == alone).all()


def test_uniforms_fill_the_unit_interval_evenly():
    u = uniforms(0, 0, sample_id=SAMPLES, num_draws=8)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.stack([np.histogram(lane, bins=64, range=(0, 1))[0] for lane in u.T])
    expected = len(SAMPLES) / 64
    chi2 = ((counts - expected) ** 2 / expected).sum(axis=1)
    # 63 degrees of freedom: mean 63, standard deviation 11.2
    assert (np.abs(chi2 - 63) < 5 * 11.2).all()


@pytest.mark.parametrize("axis", ["lane", "sample", "epoch"])
def test_neighbours_are_uncorrelated(axis):
    u = uniforms(0, 0, sample_id=SAMPLES, num_draws=2)
    pairs = {
        "lane": (u[:, 0], u[:, 1]),
        "sample": (u[:-1, 0], u[1:, 0]),
        "epoch": (u[:, 0], uniforms(0, 1, sample_id=SAMPLES, num_draws=1)[:, 0]),
    }
    correlation = np.corrcoef(*pairs[axis])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(len(SAMPLES))


def test_one_input_bit_flips_half_of_the_output_bits():
    base = hash_words(0, 0, sample_id=SAMPLES[:2000], num_draws=1)
    for bit in (0, 1, 31, 32, 47):
        flipped = hash_words(0, 0, sample_id=SAMPLES[:2000] ^ (1 << bit), num_draws=1)
        share = np.bitwise_count(base ^ flipped).mean() / 64
        assert share == pytest.approx(0.5, abs=0.01)
