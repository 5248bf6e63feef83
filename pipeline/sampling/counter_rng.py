"""Counter-based randomness: uniforms that are a pure function of (seed, epoch, sample, draw index).

No state is kept, so a sample gets the same numbers on any rank, in any order and after any resume.
The generator is SplitMix64 (Steele, Lea and Flood 2014): one 64-bit state for each (seed, epoch, sample), one
output for each draw index. Integer arithmetic only, hence the same bits on every machine.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64, Int64, UInt64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function: every input bit flips every output bit with probability 1/2."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def hash_words(
    seed: int,
    epoch: int,
    *,
    sample_id: Int64[np.ndarray, " B"],
    num_draws: int,
    first_draw: int = 0,
) -> UInt64[np.ndarray, "B L"]:
    """64 random bits for each sample and each draw index in [first_draw, first_draw + num_draws)."""
    # Arrays of one element: numpy warns of overflow in scalars, and wrapping is what is wanted here.
    seed_word, epoch_word = np.array([[seed % 2**64], [epoch % 2**64]], dtype=np.uint64)
    state = _mix(_mix(seed_word + _GAMMA) + _GAMMA * epoch_word)
    per_sample = _mix(state ^ _mix(sample_id.astype(np.uint64) + _GAMMA))  # (B,)
    draws = np.arange(first_draw + 1, first_draw + num_draws + 1, dtype=np.uint64) * _GAMMA
    return _mix(per_sample[:, None] + draws)


def uniforms(
    seed: int,
    epoch: int,
    *,
    sample_id: Int64[np.ndarray, " B"],
    num_draws: int,
    first_draw: int = 0,
) -> Float64[np.ndarray, "B L"]:
    """Numbers in [0, 1), multiples of 2**-53, one for each sample and draw index."""
    words = hash_words(seed, epoch, sample_id=sample_id, num_draws=num_draws, first_draw=first_draw)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
