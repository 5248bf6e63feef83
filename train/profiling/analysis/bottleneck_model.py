"""A model of what limits the rate: a linear programme over measured costs of an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Costs:
    """What an image takes of everything, and how much of everything there is. For one rank."""

    model_s: float
    """Step time / images: the training thread and the device, data at hand."""
    step_cpu_s: float
    """CPU seconds of the step, all threads."""
    loader_cpu_s: float
    """CPU seconds of the loader, all threads."""
    decode_augment_s: float
    """Busy seconds of the decoding threads."""
    prefetch_s: float
    """Busy seconds of the prefetch thread, which is one."""
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
    """Decoding threads; workers of a loader without stages."""
    readers: float
    """Files that are read at the same time (Little's law: rate = readers / latency)."""
    worker_s: float = 0.0
    """Busy seconds of a worker in a loader whose stages cannot be told apart; it has no decoding threads."""
    in_thread_s: float = 0.0
    """Seconds that such a loader works in the training thread."""
    bandwidth_warm: float = math.inf
    """Bytes per second of reads that hit the page cache, for one rank; infinite where it was not reached."""
    bandwidth_cold: float = math.inf
    """The same of reads that miss it."""
    efficiency: float = 1.0
    """Measured rate of the loader alone over what this model says of it: hand-overs, the interpreter lock. It
    costs the cores something only when it was measured on busy ones: threads that wait take no core."""
    core_efficiency: float = 0.9
    """The same of the cores. Where nothing was measured on busy ones: decoding threads that fill all cores,
    beside the loader's other threads, got 0.8 to 0.95 of them in runs on two cores (docs/design/0020)."""


@dataclass(frozen=True)
class Rate:
    """Answer of the model."""

    images_per_s: float
    bottleneck: str
    next_bottleneck: str
    """What limits when `bottleneck` does not."""
    headroom: float
    """Rate without the bottleneck, over the rate."""


def solve(costs: Costs) -> Rate:
    """Largest rate that no resource forbids, and the resource that limits it."""
    rate, bottleneck = _maximise(costs, without=())
    freed, then = _maximise(costs, without=(bottleneck,))
    return Rate(rate, bottleneck, then, freed / rate)


def loader_rate(costs: Costs) -> float:
    """Rate of the loader alone: no step, and its cores to itself."""
    return loader_limit(costs)[0]


def loader_limit(costs: Costs) -> tuple[float, str]:
    """That rate, and what limits it."""
    alone = replace(costs, model_s=0.0, step_cpu_s=0.0)
    return _maximise(alone, without=())


def _maximise(costs: Costs, *, without: Sequence[str]) -> tuple[float, str]:
    """Maximise warm + cold images per second under every resource but those in `without`."""
    # Here, since reports and `cmae top` need this module's neighbours and not scipy.
    from scipy.optimize import linprog

    both = lambda cost: (cost, cost)  # noqa: E731
    loader = costs.efficiency
    # Units that one warm image and one cold image take, and units there are in a second.
    demands = {
        "model": (*both(costs.model_s + costs.in_thread_s), 1.0),
        "cores": (
            *both(costs.step_cpu_s + costs.loader_cpu_s / costs.core_efficiency),
            costs.cores,
        ),
        "decode_augment": (*both(costs.decode_augment_s), costs.threads * loader),
        "loader": (*both(costs.worker_s), costs.threads * loader),
        "prefetch": (*both(costs.prefetch_s), loader),
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
    if not names:
        return math.inf, "unexplained"
    table = np.array([demands[name] for name in names])
    # Every row in shares of what there is: no unit dwarfs another.
    scale = table[:, 2]
    answer = linprog(
        c=[-1.0, -1.0],
        A_ub=table[:, :2] / scale[:, None],
        b_ub=np.ones(len(names)),
        A_eq=[[costs.cold_share, costs.cold_share - 1.0]],
        b_eq=[0.0],
        method="highs",
    )
    if not answer.success:
        raise RuntimeError(f"the bottleneck model has no solution: {answer.message}")
    return float(-answer.fun), names[int(np.argmin(answer.slack))]
