"""Estimates with confidence intervals from repeated rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from cmae.train.profiling.analysis.records import Estimate

Rounds = Mapping[str, Sequence[float]]
"""For each phase, its value in each round; all of the same length."""

_NUM_RESAMPLES = 2000


def estimate(values: Sequence[float]) -> Estimate:
    """Median over rounds with a bootstrap interval."""
    return estimates({"": values}, lambda medians: medians)[""]


def estimates(
    rounds: Rounds, combine: Callable[[dict[str, float]], dict[str, float]]
) -> dict[str, Estimate]:
    """Numbers made from the phases' medians over rounds, each with its 95 % interval.

    Rounds are resampled as wholes: what drifts from round to round meets all phases alike, and does not
    widen the interval of a difference. With 3 rounds the interval is the range of what was seen, no more.

    Args:
        rounds: Values by phase and round.
        combine: Function from medians by phase to named numbers.
    """
    count = len(next(iter(rounds.values())))
    table = np.array([rounds[name] for name in rounds])  # (phases, rounds)
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, count, (_NUM_RESAMPLES, count))
    values = combine(_named(rounds, np.median(table, axis=1)))
    resampled = np.median(table[:, chosen], axis=2)  # (phases, resamples)
    drawn = [combine(_named(rounds, column)) for column in resampled.T]
    result = {}
    for name, value in values.items():
        low, high = np.percentile([one[name] for one in drawn], [2.5, 97.5])
        result[name] = Estimate(value, float(low), float(high), n=count)
    return result


def _named(rounds: Rounds, column: npt.NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(rounds, column.tolist(), strict=True))
