"""A model of what limits the rate: a linear programme over measured costs of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog

RESOURCES = ("model", "cores", "decode", "feed", "readers", "storage")


@dataclass(frozen=True)
class Costs:
    """What an image takes of everything, and how much of everything there is. For one rank."""

    model_s: float
    """Step time / images: the training thread and the device, data at hand."""
    step_cpu_s: float
    """CPU seconds of the step, all threads."""
    loader_cpu_s: float
    """CPU seconds of the loader, all threads."""
    decode_s: float
    """Busy seconds of the decoding threads."""
    feed_s: float
    """Busy seconds of the feed thread, which is one."""
    read_warm_s: float
    """Busy seconds of a reader for a file in the page cache."""
    read_cold_s: float
    """The same for a file that is not: latency and transfer."""
    num_bytes: float
    cold_share: float
    """Share of the files that miss the page cache."""
    cores: float
    """CPU cores that this rank can have."""
    threads: float
    """Decoding threads."""
    readers: float
    """Files that are read at the same time (Little's law: rate = readers / latency)."""
    bandwidth_warm: float = math.inf
    """Bytes per second of reads that hit the page cache, for one rank; infinite where it was not reached."""
    bandwidth_cold: float = math.inf
    """The same of reads that miss it."""
    efficiency: float = 1.0
    """Measured rate of the loader alone over what this model says of it: hand-overs, the interpreter lock. It
    costs the cores something only when it was measured on busy ones: threads that wait take no core."""
    core_efficiency: float = 0.9
    """The same of the cores. Where nothing was measured on busy ones: decoding threads that fill all cores,
    beside the loader's other threads, got 0.8 to 0.95 of them in runs on two cores (docs/design/0015)."""


@dataclass(frozen=True)
class Rate:
    """Answer of the model."""

    images_per_s: float
    binds: str
    next_binds: str
    """What limits when `binds` does not."""
    headroom: float
    """Rate without the limit that binds, over the rate."""


def solve(costs: Costs) -> Rate:
    """Largest rate that no resource forbids, and which one does."""
    rate, binds = _maximise(costs, without=())
    freed, next_binds = _maximise(costs, without=(binds,))
    return Rate(rate, binds, next_binds, freed / rate)


def loader_rate(costs: Costs) -> float:
    """Rate of the loader alone: no step, and its cores to itself."""
    return loader_limit(costs)[0]


def loader_limit(costs: Costs) -> tuple[float, str]:
    """That rate, and what binds then."""
    return _maximise(replace(costs, step_cpu_s=0.0), without=("model",))


def _maximise(costs: Costs, *, without: Sequence[str]) -> tuple[float, str]:
    """Maximise warm + cold images per second under every resource but those in `without`."""
    both = lambda cost: (cost, cost)  # noqa: E731
    loader = costs.efficiency
    demands = {  # units that one warm image and one cold image take, and units there are in a second
        "model": (*both(costs.model_s), 1.0),
        "cores": (
            *both(costs.step_cpu_s + costs.loader_cpu_s / costs.core_efficiency),
            costs.cores,
        ),
        "decode": (*both(costs.decode_s), costs.threads * loader),
        "feed": (*both(costs.feed_s), loader),
        "readers": (costs.read_warm_s, costs.read_cold_s, costs.readers * loader),
        "storage": (
            costs.num_bytes / costs.bandwidth_warm,
            costs.num_bytes / costs.bandwidth_cold,
            1.0,
        ),
    }
    names = [
        name
        for name, (warm, cold, capacity) in demands.items()
        if name not in without and warm + cold > 0
    ]
    table = np.array([demands[name] for name in names])
    scale = table[:, 2]  # every row in shares of what there is: no unit dwarfs another
    answer = linprog(
        c=[-1.0, -1.0],
        A_ub=table[:, :2] / scale[:, None],
        b_ub=np.ones(len(names)),
        A_eq=[[costs.cold_share, costs.cold_share - 1.0]],
        b_eq=[0.0],
        method="highs",
    )
    if not answer.success:
        raise RuntimeError(f"the resource model has no solution: {answer.message}")
    return float(-answer.fun), names[int(np.argmin(answer.slack))]


def cache_hits(cached: float) -> float:
    """Share of reads that hit a cache of this share of the data, when every epoch is a new permutation.

    Between two uses of a sample lie its place from the end of one epoch and from the start of the next; for a
    cache that drops what was unused longest, the chance that fewer than `cached` of the data came between is
    a + (1 - a) ln(1 - a).
    """
    if cached >= 1:
        return 1.0
    return cached + (1 - cached) * math.log(1 - cached) if cached > 0 else 0.0
