"""The account of the step: telescoping differences between phases, which sum to the full run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cmae.train.profiling.analysis.bootstrap import estimates
from cmae.train.profiling.analysis.records import Part, Reading

UNEXPLAINED = 0.05
"""Share of the step above which the residual is said aloud."""

NOTES = {
    "model": "replay of batches on the device, less Python: forward, backward, optimiser",
    "python": "CPU time of the training thread outside torch operators: launches wait for it",
    "straggler": "slowest rank less the median rank, each alone: what the others wait",
    "collective": "replay less the slowest rank alone: communication that nothing hides",
    "host_to_device": "replay from pinned memory less replay on the device: copies that are not hidden",
    "interference": "replay beside a working loader less replay: shared cores, memory and interpreter lock",
    "feed": "waiting for the feed thread (parameters, masks, hand-over) with views ready",
    "decode": "waiting for decode and augmentation, with files in memory",
    "fetch_warm": "waiting for reads from the page cache",
    "fetch_cold": "waiting for reads that miss the page cache, as often as the full run missed it",
    "residual": "what the differences do not explain",
}

_WAITING = ("feed", "decode", "fetch_warm", "fetch_cold")

Readings = Mapping[str, Sequence[Reading]]
"""By phase, one for each round."""


def account(
    readings: Readings,
    *,
    python_ms: Sequence[float],
    cold_share: float,
    local_ms: Sequence[Sequence[float]] = (),
    waits_show: bool = False,
) -> tuple[Part, ...]:
    """Split the step of the full run; the parts sum to it, the residual included.

    Args:
        readings: of `full`, `replay`, `interference`, `feed`, `memory`; of `warm` and `cold`, `replay_h2d`
            where they could be run.
        python_ms: Python of the training thread in a step, in each round.
        cold_share: share of the files that the full run did not find in the page cache.
        local_ms: for each round, every rank's step without collectives; empty with one rank.
        waits_show: whether all waiting for data happens in `next`, as it does without a GPU, whose queue
            hides some of it. Waiting parts are then at least 0 and at most what the full run waited; what
            differs beyond that is noise of the step, and goes to the residual.
    """
    rounds = {name: [one.step_ms for one in values] for name, values in readings.items()}
    rounds["python"] = list(python_ms)
    rounds["next_cpu"] = [
        1000 * one.next_cpu_s / len(one.step_times_ms) for one in readings["feed"]
    ]
    if waits_show:
        rounds["waited"] = [1000 * one.next_s / len(one.step_times_ms) for one in readings["full"]]
    if local_ms:
        rounds["slowest"] = [max(each) for each in local_ms]
        rounds["typical"] = [_low_median(each) for each in local_ms]
    parts = estimates(rounds, lambda medians: _differences(medians, cold_share))
    return tuple(Part(name, value, NOTES[name]) for name, value in parts.items())


def _differences(step: dict[str, float], cold_share: float) -> dict[str, float]:
    replay = step["replay"]
    alone = step.get("typical", replay)
    python = min(step["python"], alone)
    # With decoding it cannot have been faster than without: what looks so is noise.
    fed = max(0.0, min(step["feed"], step["memory"]) - replay)
    in_next = min(step["next_cpu"], fed)
    parts = {"model": alone - python, "python": python + in_next}
    if "slowest" in step:
        parts["straggler"] = step["slowest"] - alone
        parts["collective"] = replay - step["slowest"]
    beside = step.get("replay_h2d", replay)
    if "replay_h2d" in step:
        parts["host_to_device"] = beside - replay
    interference = step["interference"] - beside
    decode = step["memory"] - step["interference"] - fed
    if decode < 0:  # the connected run lost less than the loader beside it took
        interference, decode = interference + decode, 0.0
    parts |= {"interference": interference, "feed": fed - in_next, "decode": decode}
    if "warm" in step:
        parts["fetch_warm"] = step["warm"] - step["memory"]
        parts["fetch_cold"] = cold_share * (step.get("cold", step["warm"]) - step["warm"])
    else:
        parts["fetch_cold"] = step["full"] - step["memory"]
    if "waited" in step:
        _limit(parts, step["waited"])
    parts["residual"] = step["full"] - sum(parts.values())
    return parts


def _limit(parts: dict[str, float], waited_ms: float) -> None:
    """Bring the waiting parts to 0 and more, and in proportion to no more than was waited."""
    waiting = {name: max(0.0, parts[name]) for name in _WAITING if name in parts}
    scale = min(1.0, waited_ms / max(sum(waiting.values()), 1e-9))
    parts |= {name: value * scale for name, value in waiting.items()}


def _low_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
