"""The breakdown of the step: telescoping differences between phases, which sum to the full run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cmae.train.profiling.analysis.bootstrap import estimates
from cmae.train.profiling.analysis.records import Component, Reading

NOTES = {
    "model": "replay of batches on the device, less Python: forward, backward, optimiser",
    "python": "the training thread's own work: outside torch operators in the step, and in `next`",
    "straggler": "slowest rank less the median rank, each alone: what the others wait",
    "collective": "replay less the slowest rank alone: communication that nothing hides",
    "host_to_device": "replay from host memory less replay on the device: copies that are not hidden",
    "interference": "replay beside a working loader less replay: shared cores, memory and interpreter lock",
    "prefetch": "waiting for the prefetch thread (parameters, masks, hand-over) with views ready",
    "decode_augment": "waiting for decode and augmentation, with files in memory",
    "read_warm": "waiting for reads from the page cache",
    "read_cold": "waiting for reads that miss the page cache, as often as the full run missed it",
    "loader": "waiting for the loader in `next`",
    "residual": "what the differences do not explain",
}

_WAITING = ("prefetch", "decode_augment", "read_warm", "read_cold")

_COMPUTES = 1 / 3
"""Share of the time in `next` that must be CPU time for all of it to be the training thread's work: where it
computes and seems to wait, it waits for a core."""

Readings = Mapping[str, Sequence[Reading]]
"""By phase, one for each round."""


def break_down(
    readings: Readings,
    *,
    python_ms: Sequence[float],
    cold_share: float = 0.0,
    local_ms: Sequence[Sequence[float]] = (),
    waits_show: bool = False,
) -> tuple[Component, ...]:
    """Split the step of the full run; the components sum to it, the residual included.

    Phases tell the loader's stages apart where `prefetch` and `memory` could be run; else all waiting is the
    loader's.

    Args:
        readings: Readings of `full`, `replay` and `interference`; of `prefetch`, `memory`, `warm`, `cold` and
            `replay_h2d` where they could be run.
        python_ms: Python of the training thread in a step, in each round.
        cold_share: Share of the files that the full run did not find in the page cache.
        local_ms: Every rank's step without collectives, for each round; empty with one rank.
        waits_show: Whether all waiting for data happens in `next`, as it does without a GPU, whose queue
            hides some of it. Waiting components are then at least 0 and at most what the full run waited;
            what differs beyond that is noise of the step, and goes to the residual.
    """
    rounds = {name: [one.step_ms for one in values] for name, values in readings.items()}
    rounds["python"] = list(python_ms)
    rounds["waited"] = [one.next_ms for one in readings["full"]]
    rounds["next_cpu"] = [one.next_cpu_ms for one in readings.get("prefetch", readings["full"])]
    if local_ms:
        rounds["slowest"] = [max(each) for each in local_ms]
        rounds["typical"] = [_low_median(each) for each in local_ms]
    found = estimates(
        rounds, lambda medians: _differences(medians, cold_share, waits_show=waits_show)
    )
    return tuple(Component(name, value, NOTES[name]) for name, value in found.items())


def _differences(
    step: dict[str, float], cold_share: float, *, waits_show: bool
) -> dict[str, float]:
    components = _inside_the_step(step)
    if "memory" in step:
        components = _add_stages(components, step, cold_share)
        if waits_show:
            _limit(components, step["waited"])
    else:
        components = _add_loader(components, step)
    components["residual"] = step["full"] - sum(components.values())
    return components


def _inside_the_step(step: dict[str, float]) -> dict[str, float]:
    """What the step takes with data at hand."""
    replay = step["replay"]
    alone = step.get("typical", replay)
    python = min(step["python"], alone)
    components = {"model": alone - python, "python": python}
    if "slowest" in step:
        components["straggler"] = step["slowest"] - alone
        components["collective"] = replay - step["slowest"]
    if "replay_h2d" in step:
        components["host_to_device"] = step["replay_h2d"] - replay
    return components


def _add_stages(
    components: dict[str, float], step: dict[str, float], cold_share: float
) -> dict[str, float]:
    """Waiting by stage, from phases that leave out one stage after the other."""
    # With decoding it cannot have been faster than without: what looks so is noise.
    fed = max(0.0, min(step["prefetch"], step["memory"]) - step["replay"])
    in_next = min(step["next_cpu"], fed)
    interference = step["interference"] - step.get("replay_h2d", step["replay"])
    decode_augment = step["memory"] - step["interference"] - fed
    if decode_augment < 0:  # the connected run lost less than the loader beside it took
        interference, decode_augment = interference + decode_augment, 0.0
    found = components | {
        "python": components["python"] + in_next,
        "interference": interference,
        "prefetch": fed - in_next,
        "decode_augment": decode_augment,
    }
    if "warm" in step:
        found["read_warm"] = step["warm"] - step["memory"]
        found["read_cold"] = cold_share * (step.get("cold", step["warm"]) - step["warm"])
    else:
        found["read_cold"] = step["full"] - step["memory"]
    return found


def _add_loader(components: dict[str, float], step: dict[str, float]) -> dict[str, float]:
    """All waiting as one component, from the time in `next`."""
    beside, waited = step.get("replay_h2d", step["replay"]), step["waited"]
    in_next = min(step["next_cpu"], waited)
    if in_next > _COMPUTES * waited:
        in_next = waited
    # The step of a run that waits for its loader is less disturbed than one that never waits.
    lost = max(0.0, step["full"] - waited - beside)
    return components | {
        "python": components["python"] + in_next,
        "interference": min(step["interference"] - beside, lost),
        "loader": waited - in_next,
    }


def _limit(components: dict[str, float], waited_ms: float) -> None:
    """Bring the waiting components to 0 and more, and in proportion to no more than was waited."""
    waiting = {name: max(0.0, components[name]) for name in _WAITING if name in components}
    scale = min(1.0, waited_ms / max(sum(waiting.values()), 1e-9))
    components |= {name: value * scale for name, value in waiting.items()}


def waterfall(breakdown: Sequence[Component]) -> Iterator[tuple[Component, float]]:
    """Each component with the ms at which it begins when all are laid end to end."""
    start = 0.0
    for one in breakdown:
        yield one, start
        start += one.ms.value


def _low_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]
