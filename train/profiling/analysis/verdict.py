"""What limits, in a sentence, and what to change, with what that would bring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cmae.train.profiling.analysis.bottleneck_model import Costs, Rate, loader_rate, solve
from cmae.train.profiling.analysis.records import Action, Component, Diagnosis

SMALL = 0.1
"""A component below this share of the step is not what one should work on."""

_AGREED = 0.02
"""Share of the step that the lower end of a component's interval must exceed, else the rounds do not agree
that it is there. Three rounds that all lie above zero are no rarity."""

NEIGHBOUR_CORES = 0.25
"""CPU cores that others take, and share of decoding in which threads wait for a core, from which on the
neighbours are named."""

BOTTLENECKS = {
    "python": "python",
    "straggler": "straggler",
    "collective": "collective",
    "host_to_device": "host_to_device",
    "interference": "cores",
    "prefetch": "prefetch",
    "decode_augment": "decode_augment",
    "read_warm": "storage",
    "read_cold": "storage",
    "loader": "loader",
    "residual": "unexplained",
}
"""Component of the step -> bottleneck that it shows."""

NAMES = {
    "model": "the model",
    "python": "Python in the training thread",
    "straggler": "the slowest rank",
    "collective": "communication between ranks",
    "host_to_device": "copies to the device",
    "cores": "CPU cores that the step and the loader share",
    "prefetch": "the prefetch thread",
    "decode_augment": "decode and augmentation",
    "readers": "the readers' latency",
    "storage": "storage",
    "loader": "the loader",
    "neighbour": "other processes on the CPU cores",
    "unexplained": "something that no phase isolates",
}

_CPU = ("decode_augment", "loader", "cores", "neighbour")


@dataclass(frozen=True)
class Facts:
    """What the diagnosis is made from."""

    breakdown: Sequence[Component]
    costs: Costs
    measured_images_per_s: float
    """Rate of the full run, one rank."""
    world_size: int
    device: str
    others_cores: float
    """CPU cores that other processes took meanwhile."""
    waiting_for_cores: float
    """Share of the decoding threads' busy time in which this process's threads waited for a core."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Words that say more about a bottleneck, by its name: '2 threads'."""
    trials: Sequence[Trial] = ()

    @property
    def rate(self) -> float:
        """Images per second of the full run over all ranks."""
        return self.measured_images_per_s * self.world_size

    @property
    def step_ms(self) -> float:
        """Milliseconds of the full step, which the components sum to."""
        return sum(one.ms.value for one in self.breakdown)


@dataclass(frozen=True)
class Trial:
    """Another setting whose cost was measured."""

    what: str
    overrides: dict[str, Any]
    decode_augment_s: float
    loader_cpu_s: float
    efficiency: float


def diagnose(facts: Facts) -> Diagnosis:
    """The sentence on top, and the bottleneck that it names."""
    bottleneck = _bottleneck(facts)
    if bottleneck == "model":
        headroom = max(1.0, loader_rate(facts.costs) * facts.costs.model_s)
        sentence = f"The model is the bottleneck; the loader has {headroom:.1f}x head-room."
        return Diagnosis(sentence, bottleneck, headroom)
    lost = _share(facts, bottleneck)
    # Measured: the step without these components.
    headroom = 1 / max(0.01, 1 - lost)
    name = NAMES[bottleneck]
    if bottleneck in facts.details:
        name += f" ({facts.details[bottleneck]})"
    change, gain, then = "without it", headroom, _without(facts, bottleneck).bottleneck
    best = next((action for action, helps in _rank(facts) if bottleneck in helps), None)
    if best is not None and best.predicted_images_per_s > 1.05 * facts.rate:
        change, then = best.what, best.then_bottleneck
        gain = best.predicted_images_per_s / facts.rate
    sentence = (
        f"Bound by {name}: {100 * lost:.0f} % of the step. Predicted: {change}, {gain:.1f}x; "
        f"the next limit is then {NAMES[then]}."
    )
    return Diagnosis(sentence, bottleneck, headroom)


def _share(facts: Facts, bottleneck: str) -> float:
    # The breakdown's name of a neighbour's effect is that of what it slows.
    name = _largest(facts)[0] if bottleneck == "neighbour" else bottleneck
    found = [one.ms.value for one in facts.breakdown if BOTTLENECKS.get(one.name) == name]
    return min(1.0, sum(found) / facts.step_ms)


def _largest(facts: Facts) -> tuple[str, float]:
    """The bottleneck with the largest share of the step among those that the rounds agree on."""
    shares: dict[str, float] = {}
    for one in facts.breakdown:
        if one.name in BOTTLENECKS and one.ms.low > _AGREED * facts.step_ms:
            name = BOTTLENECKS[one.name]
            shares[name] = shares.get(name, 0.0) + one.ms.value / facts.step_ms
    name = max(shares, key=lambda one: shares[one], default="model")
    return name, shares.get(name, 0.0)


def _bottleneck(facts: Facts) -> str:
    name, share = _largest(facts)
    if share < SMALL:
        return "model"
    needs_cores = name in ("decode_augment", "cores")
    if needs_cores and min(facts.others_cores, facts.waiting_for_cores) >= NEIGHBOUR_CORES:
        return "neighbour"
    return name


def _without(facts: Facts, bottleneck: str) -> Rate:
    """The rate if the bottleneck cost nothing; what lies inside the step is part of the model here."""
    costs = facts.costs
    freed = {
        "decode_augment": {"decode_augment_s": 0.0, "loader_cpu_s": 0.0},
        "loader": {"worker_s": 0.0, "loader_cpu_s": 0.0},
        "python": {"in_thread_s": 0.0},
        "prefetch": {"prefetch_s": 0.0},
        "storage": {
            "read_warm_s": 0.0,
            "read_cold_s": 0.0,
            "bandwidth_warm": math.inf,
            "bandwidth_cold": math.inf,
        },
        "cores": {"cores": math.inf},
        "neighbour": {"cores": costs.cores + facts.others_cores},
    }
    return solve(replace(costs, **freed.get(bottleneck, {})))


def rank_actions(facts: Facts, *, most: int = 8) -> tuple[Action, ...]:
    """Changes that help, best first; predictions are for all ranks."""
    return tuple(action for action, _ in _rank(facts)[:most])


def _rank(facts: Facts) -> list[tuple[Action, tuple[str, ...]]]:
    """Changes that help, best first, and the bottlenecks that each answers."""
    before = solve(facts.costs)
    # The model knows no burst and no jitter: what the run lost to them, it loses after the change too.
    jitter = min(1.1, facts.measured_images_per_s / before.images_per_s)
    found = []
    for change in _candidates(facts):
        after = solve(change.costs)
        limit = 1 / (change.costs.model_s + change.costs.in_thread_s)
        predicted = min(after.images_per_s * jitter, limit) * facts.world_size
        if predicted > 1.02 * facts.rate:
            action = Action(change.what, change.overrides, predicted, after.bottleneck)
            found.append((action, change.helps))
    found.sort(key=lambda pair: (-pair[0].predicted_images_per_s, not pair[0].overrides))
    return found


@dataclass(frozen=True)
class _Change:
    what: str
    overrides: dict[str, Any]
    costs: Costs
    """Costs after it."""
    helps: tuple[str, ...]
    """Values of `Diagnosis.bottleneck` that it answers."""


def _candidates(facts: Facts) -> list[_Change]:
    """Everything that could be changed."""
    costs = facts.costs
    has_stages = not (costs.worker_s or costs.in_thread_s)
    loader = [*_thread_changes(facts), *_storage_changes(costs)] if has_stages else []
    return [*loader, *_worker_changes(costs), *_other_changes(facts)]


def _thread_changes(facts: Facts) -> list[_Change]:
    costs = facts.costs
    found: list[_Change] = []
    physical = max(1, round(costs.cores + facts.others_cores))
    for threads in sorted({int(costs.threads) * 2, physical}):
        if costs.threads < threads <= physical:
            what = f"decode on {threads} threads instead of {int(costs.threads)}"
            after = replace(costs, threads=float(threads))
            found.append(_Change(what, {"speed.num_threads": threads}, after, ("decode_augment",)))
    for factor in (2, 4):
        after = replace(costs, cores=costs.cores * factor, threads=costs.threads * factor)
        what = f"+{physical * (factor - 1)} CPU cores, with a decoding thread each"
        found.append(_Change(what, {}, after, _CPU))
    for trial in facts.trials:
        after = replace(
            costs,
            decode_augment_s=trial.decode_augment_s,
            loader_cpu_s=trial.loader_cpu_s,
            efficiency=trial.efficiency,
        )
        found.append(_Change(trial.what, trial.overrides, after, _CPU))
    return found


def _worker_changes(costs: Costs) -> list[_Change]:
    """Changes of a loader whose stages cannot be told apart."""
    if not (costs.worker_s or costs.in_thread_s):
        return []
    helps = ("loader", "python", "cores") if costs.in_thread_s else ("loader", "cores")
    workers = 2 * int(costs.threads) if costs.worker_s else 1
    working = replace(
        costs,
        in_thread_s=0.0,
        worker_s=costs.worker_s + costs.in_thread_s,
        threads=float(workers),
    )
    more_cores = replace(working, cores=2 * costs.cores, threads=2 * costs.threads)
    cheaper = replace(
        costs,
        in_thread_s=costs.in_thread_s / 2,
        worker_s=costs.worker_s / 2,
        loader_cpu_s=costs.loader_cpu_s / 2,
    )
    return [
        _Change(f"num_workers={workers}", {}, working, helps),
        _Change("twice the CPU cores, with as many more workers", {}, more_cores, helps),
        _Change("a loader of half the cost", {}, cheaper, helps),
    ]


def _storage_changes(costs: Costs) -> list[_Change]:
    found = []
    if costs.cold_share > 0.05:
        what = "all files in the page cache, or on a disk as fast"
        found.append(_Change(what, {}, replace(costs, cold_share=0.0), ("storage",)))
    for factor in (2, 4):
        number = int(costs.readers) * factor
        after, setting = replace(costs, readers=float(number)), {"speed.num_readers": number}
        found.append(_Change(f"read {number} batches at a time", setting, after, ("storage",)))
    faster = replace(
        costs,
        read_warm_s=costs.read_warm_s / 2,
        read_cold_s=costs.read_cold_s / 2,
        bandwidth_warm=costs.bandwidth_warm * 2,
        bandwidth_cold=costs.bandwidth_cold * 2,
    )
    what = "storage of half the latency and twice the bandwidth"
    return [*found, _Change(what, {}, faster, ("storage",))]


def _other_changes(facts: Facts) -> list[_Change]:
    costs, found = facts.costs, []
    if facts.others_cores >= NEIGHBOUR_CORES:
        after = replace(costs, cores=costs.cores + facts.others_cores)
        what = f"stop the other processes, which take {facts.others_cores:.1f} cores"
        found.append(_Change(what, {}, after, ("neighbour", "cores")))
    cheaper = replace(costs, prefetch_s=costs.prefetch_s / 2)
    found.append(_Change("a prefetch thread of half the cost", {}, cheaper, ("prefetch",)))
    faster = replace(costs, model_s=costs.model_s / 2, step_cpu_s=costs.step_cpu_s / 2)
    return [*found, _Change("a step of half the time", {}, faster, ("model",))]
