"""What limits, in a sentence; what to change, and what that would bring; curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cmae.train.profiling.analysis.bottleneck_model import Costs, Rate, loader_rate, solve
from cmae.train.profiling.analysis.records import Action, Curve, Part, Verdict

SMALL = 0.1
"""A part below this share of the step is not what one should work on."""

_AGREED = 0.02
"""Share of the step that the lower end of a part's interval must exceed, else the rounds do not agree that it
is there. Three rounds that all lie above zero are no rarity."""

BINDS = {
    "python": "python",
    "straggler": "straggler",
    "collective": "collective",
    "host_to_device": "h2d",
    "interference": "cores",
    "feed": "feed",
    "decode": "decode",
    "fetch_warm": "storage",
    "fetch_cold": "storage",
    "residual": "unexplained",
}

_CPU = ("decode", "cores", "neighbour")

NAMES = {
    "model": "the model",
    "python": "Python in the training thread",
    "straggler": "the slowest rank",
    "collective": "communication between ranks",
    "h2d": "copies to the device",
    "cores": "CPU cores that the step and the loader share",
    "feed": "the feed thread",
    "decode": "decode and augmentation",
    "readers": "the readers' latency",
    "storage": "storage",
    "neighbour": "other processes on the CPU cores",
    "unexplained": "something that no phase isolates",
}


@dataclass(frozen=True)
class Facts:
    """What the verdict is made from."""

    parts: Sequence[Part]
    costs: Costs
    measured_images_per_s: float
    """Of the full run, one rank."""
    world_size: int
    device: str
    others_cores: float
    """CPU cores that other processes took meanwhile."""
    waiting_for_cores: float
    """Share of the decoding threads' busy time in which this process's threads waited for a core."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Words that say more about a resource, by its name: '2 threads'."""
    trials: Sequence[Trial] = ()


@dataclass(frozen=True)
class Trial:
    """Another setting whose cost was measured."""

    what: str
    overrides: dict[str, Any]
    decode_s: float
    loader_cpu_s: float
    efficiency: float


def judge(facts: Facts) -> Verdict:
    """The sentence on top, and the resource that it names."""
    binds = _binding(facts)
    if binds == "model":
        headroom = max(1.0, loader_rate(facts.costs) * facts.costs.model_s)
        sentence = f"The model binds; the loader has {headroom:.1f}x head-room."
        return Verdict(sentence, binds, headroom)
    lost = _share(facts, binds)
    headroom = 1 / max(0.01, 1 - lost)  # measured: the step without this part of the account
    name = NAMES[binds] + (f" ({facts.details[binds]})" if binds in facts.details else "")
    change, gain, then = "without it", headroom, _without(facts, binds).binds
    best = next((action for action, helps in _rank(facts) if binds in helps), None)
    if best is not None and best.predicted_images_per_s > 1.05 * _measured(facts):
        change, then = best.what, best.then_binds
        gain = best.predicted_images_per_s / _measured(facts)
    sentence = (
        f"Bound by {name}: {100 * lost:.0f} % of the step. Predicted: {change}, {gain:.1f}x; "
        f"the next limit is then {NAMES[then]}."
    )
    return Verdict(sentence, binds, headroom)


def _measured(facts: Facts) -> float:
    return facts.measured_images_per_s * facts.world_size


def _share(facts: Facts, binds: str) -> float:
    total = sum(part.ms.value for part in facts.parts)
    names = [part for part in facts.parts if BINDS.get(part.name) == _cause(binds, facts)]
    return min(1.0, sum(part.ms.value for part in names) / total)


def _cause(binds: str, facts: Facts) -> str:
    """The account's name of a neighbour's effect is that of what it slows."""
    return _largest(facts)[0] if binds == "neighbour" else binds


def _largest(facts: Facts) -> tuple[str, float]:
    total = sum(part.ms.value for part in facts.parts)
    shares: dict[str, float] = {}
    for part in facts.parts:
        if part.name in BINDS and part.ms.low > _AGREED * total:
            name = BINDS[part.name]
            shares[name] = shares.get(name, 0.0) + part.ms.value / total
    name = max(shares, key=lambda one: shares[one], default="model")
    return name, shares.get(name, 0.0)


def _binding(facts: Facts) -> str:
    name, share = _largest(facts)
    if share < SMALL:
        return "model"
    needs_cores = name in ("decode", "cores")
    if needs_cores and facts.others_cores >= 0.25 and facts.waiting_for_cores >= 0.25:
        return "neighbour"
    return name


def _without(facts: Facts, binds: str) -> Rate:
    """The rate if what binds cost nothing; what lies inside the step is part of the model here."""
    costs = facts.costs
    freed = {
        "decode": {"decode_s": 0.0, "loader_cpu_s": 0.0},
        "feed": {"feed_s": 0.0},
        "storage": {
            "read_warm_s": 0.0,
            "read_cold_s": 0.0,
            "bandwidth_warm": math.inf,
            "bandwidth_cold": math.inf,
        },
        "cores": {"cores": math.inf},
        "neighbour": {"cores": costs.cores + facts.others_cores},
    }
    return solve(replace(costs, **freed.get(binds, {})))


def rank_actions(facts: Facts, *, most: int = 8) -> tuple[Action, ...]:
    """Changes that help, best first; predictions are for all ranks."""
    return tuple(action for action, _ in _rank(facts)[:most])


def _rank(facts: Facts) -> list[tuple[Action, tuple[str, ...]]]:
    """Changes that help, best first, and the verdicts that each answers."""
    before = solve(facts.costs)
    # The model knows no burst and no jitter: what the run lost to them, it loses after the change too.
    jitter = min(1.1, facts.measured_images_per_s / before.images_per_s)
    found = []
    for change in _candidates(facts):
        after = solve(change.costs)
        limit = 1 / change.costs.model_s
        predicted = min(after.images_per_s * jitter, limit) * facts.world_size
        if predicted > 1.02 * _measured(facts):
            action = Action(change.what, change.overrides, predicted, after.binds)
            found.append((action, change.helps))
    found.sort(key=lambda pair: (-pair[0].predicted_images_per_s, not pair[0].overrides))
    return found


@dataclass(frozen=True)
class _Change:
    what: str
    overrides: dict[str, Any]
    costs: Costs
    """After it."""
    helps: tuple[str, ...]
    """Values of `Verdict.binds` that it answers."""


def _candidates(facts: Facts) -> list[_Change]:
    """Everything that could be changed."""
    return [*_loader_changes(facts), *_storage_changes(facts.costs), *_other_changes(facts)]


def _loader_changes(facts: Facts) -> list[_Change]:
    costs = facts.costs
    found: list[_Change] = []
    physical = max(1, round(costs.cores + facts.others_cores))
    for threads in sorted({int(costs.threads) * 2, physical}):
        if costs.threads < threads <= physical:
            what = f"decode on {threads} threads instead of {int(costs.threads)}"
            after = replace(costs, threads=float(threads))
            found.append(_Change(what, {"data.num_threads": threads}, after, ("decode",)))
    for factor in (2, 4):
        after = replace(costs, cores=costs.cores * factor, threads=costs.threads * factor)
        what = f"+{physical * (factor - 1)} CPU cores, with a decoding thread each"
        found.append(_Change(what, {}, after, _CPU))
    for trial in facts.trials:
        after = replace(
            costs,
            decode_s=trial.decode_s,
            loader_cpu_s=trial.loader_cpu_s,
            efficiency=trial.efficiency,
        )
        found.append(_Change(trial.what, trial.overrides, after, _CPU))
    return found


def _storage_changes(costs: Costs) -> list[_Change]:
    found = []
    if costs.cold_share > 0.05:
        what = "all files in the page cache, or on a disk as fast"
        found.append(_Change(what, {}, replace(costs, cold_share=0.0), ("storage",)))
    for factor in (2, 4):
        number = int(costs.readers) * factor
        after, setting = replace(costs, readers=float(number)), {"data.num_readers": number}
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
    if facts.others_cores >= 0.25:
        after = replace(costs, cores=costs.cores + facts.others_cores)
        what = f"stop the other processes, which take {facts.others_cores:.1f} cores"
        found.append(_Change(what, {}, after, ("neighbour", "cores")))
    prefetcher = replace(costs, feed_s=costs.feed_s / 2)
    found.append(_Change("a feed thread of half the cost", {}, prefetcher, ("feed",)))
    faster = replace(costs, model_s=costs.model_s / 2, step_cpu_s=costs.step_cpu_s / 2)
    return [*found, _Change("a step of half the time", {}, faster, ("model",))]


def draw_curves(facts: Facts) -> tuple[Curve, ...]:
    """Predicted rate against cores, threads, readers and share of the data in the page cache."""
    costs, world = facts.costs, facts.world_size

    def curve(
        title: str, label: str, x: Sequence[float], now: float, change: Callable[[float], Costs]
    ) -> Curve:
        rates = tuple(solve(change(value)).images_per_s * world for value in x)
        return Curve(title, label, tuple(x), rates, now)

    per_core = costs.threads / costs.cores
    counts = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    return (
        curve(
            "CPU cores a rank, decoding threads in proportion",
            "cores",
            counts,
            costs.cores,
            lambda cores: replace(costs, cores=cores, threads=max(1.0, cores * per_core)),
        ),
        curve(
            "decoding threads, cores as they are",
            "threads",
            counts,
            costs.threads,
            lambda threads: replace(costs, threads=threads),
        ),
        curve(
            "batches read at a time",
            "readers",
            counts,
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
