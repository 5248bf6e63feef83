"""Predicted rate against one setting, the others as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cmae.train.profiling.analysis.bottleneck_model import Costs, solve
from cmae.train.profiling.analysis.records import Curve
from cmae.train.profiling.analysis.verdict import Facts

_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


def predict_curves(facts: Facts) -> tuple[Curve, ...]:
    """Rate over all ranks against cores, threads, readers and share of the data in the page cache."""
    costs = facts.costs
    per_core = costs.threads / costs.cores

    def curve(
        title: str, label: str, x: Sequence[float], now: float, change: Callable[[float], Costs]
    ) -> Curve:
        rates = tuple(solve(change(value)).images_per_s * facts.world_size for value in x)
        return Curve(title, label, tuple(x), rates, now)

    return (
        curve(
            "CPU cores a rank, decoding threads in proportion",
            "cores",
            _COUNTS,
            costs.cores,
            lambda cores: replace(costs, cores=cores, threads=max(1.0, cores * per_core)),
        ),
        curve(
            "decoding threads, cores as they are",
            "threads",
            _COUNTS,
            costs.threads,
            lambda threads: replace(costs, threads=threads),
        ),
        curve(
            "batches read at a time",
            "readers",
            _COUNTS,
            costs.readers,
            lambda readers: replace(costs, readers=readers),
        ),
        curve(
            "share of reads that miss the page cache",
            "share",
            [float(share) for share in np.linspace(0, 1, 11)],
            costs.cold_share,
            lambda share: replace(costs, cold_share=share),
        ),
    )
