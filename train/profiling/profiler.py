"""`cmae profile`: interleaved phases, the account of the step, the verdict and what would help."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from cmae.model import build_model, draw_mask
from cmae.pipeline import Batch, LoaderState, synthetic_batches
from cmae.pipeline.loader.loader import Wrap
from cmae.pipeline.sources.records import Source
from cmae.pipeline.views.backend import ViewBackend
from cmae.train.config import BatchSplit, Config
from cmae.train.distributed import World, from_main
from cmae.train.loop.loader_settings import loader_settings
from cmae.train.loop.pretrain import join_run, open_loader
from cmae.train.loop.step import TrainStep
from cmae.train.machine import describe_machine, usable_cores
from cmae.train.monitor.gpu import GpuSampler
from cmae.train.profiling.analysis.bootstrap import estimate
from cmae.train.profiling.analysis.bottleneck_model import Costs, loader_limit
from cmae.train.profiling.analysis.breakdown import UNEXPLAINED, Readings, account
from cmae.train.profiling.analysis.records import (
    Action,
    Curve,
    Estimate,
    Operation,
    Part,
    Phase,
    Profile,
    Reading,
    Verdict,
)
from cmae.train.profiling.analysis.verdict import Facts, draw_curves, judge, rank_actions
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.measure.operations import measure_operations
from cmae.train.profiling.measure.phases import WHAT, Bench, Step, Subject, without_collectives
from cmae.train.profiling.measure.python_time import dissect, python_ms
from cmae.train.profiling.measure.storage import StorageCurve, probe_storage
from cmae.train.profiling.measure.switches import SwitchedBackend, SwitchedSource
from cmae.train.profiling.measure.timing import merge_snapshots, wait_until_idle
from cmae.train.profiling.measure.trials import override, run_trials

Say = Callable[[str], None]

_TRIALS_S = 30.0
"""Of the budget, for trials and operations after the rounds; at most a quarter of it."""

_VERIFY_S = 40.0
"""For one action, when three pairs have been measured."""

_MOST_ROUNDS = 12
"""More tell little that is new."""

_SLOW_STEP_S = 1.0
"""A step that takes longer is worth no second one to warm up."""

_TINY_SHARD = 20
"""Files in a shard below which opening shards is worth a word."""


def profile(config: Config, options: ProfileConfig, *, say: Say = print) -> Profile:
    """Profile the run that `cmae pretrain` would make of this configuration.

    Args:
        config: of the run; nothing is written to its `run.out`.
        options: how long to measure.
        say: called with lines about the progress, on the first rank.

    Raises:
        ValueError: settings that do not fit each other, the data or the machine.
    """
    config = replace(config, run=replace(config.run, out=options.out))
    with ExitStack() as stack:
        world = stack.enter_context(join_run(config))
        model = build_model(config.model, seed=config.seed)
        train_step = TrainStep(model.to(world.device), config.optim, config.speed, world)
        # Without a learning rate the step costs what it costs, and the weights stay where they are.
        step = lambda batches: train_step(batches, lr=0.0, momentum=1.0)  # noqa: E731
        local = (lambda: without_collectives(train_step)) if world.world_size > 1 else None
        subject = stack.enter_context(open_subject(config, world, step, local=local))
        return measure(subject, options, config, say=say if world.is_main else _silent)


def _silent(line: str) -> None:
    """For ranks that are not the first."""


@contextmanager
def open_subject(
    config: Config, world: World, step: Step, *, local: Any = None, wrap: Wrap | None = None
) -> Iterator[Subject]:
    """The run's loader with switches in it, and what its batches go to.

    Args:
        config: of the run.
        world: this process among all.
        step: takes one optimiser step's micro-batches.
        local: see `Subject.local`.
        wrap: put around the real source and maker, inside the switches.
    """
    split = BatchSplit.of(
        config.optim.global_batch_size, config.speed.micro_batch_size, world.world_size
    )
    switches: list[tuple[SwitchedSource, SwitchedBackend]] = []

    def switched(source: Source, view_backend: ViewBackend) -> tuple[Source, ViewBackend]:
        if wrap is not None:
            source, view_backend = wrap(source, view_backend)
        switches.append((SwitchedSource(source), SwitchedBackend(view_backend)))
        return switches[0]

    settings = loader_settings(config.data)
    with open_loader(config, split, world, settings=settings, wrap=switched) as loader:
        source, view_backend = switches[0]
        yield Subject(
            loader=loader,
            source=source,
            view_backend=view_backend,
            step=step,
            synthetic=_synthetic(config, split, world),
            world=world,
            start=LoaderState(config.seed, epoch=0, offset=0, digest=source.digest),
            settings=settings,
            local=local,
            wrap=wrap,
        )


def _synthetic(config: Config, split: BatchSplit, world: World) -> list[Batch]:
    batches = synthetic_batches(
        config.loader_views,
        batch_size=split.micro_batch_size,
        device=world.device,
        draw_mask=lambda index, epoch: draw_mask(
            config.model, index, seed=config.seed, epoch=epoch
        ),
        seed=config.seed,
    )
    return [next(batches) for _ in range(split.accumulation)]


@dataclass(frozen=True)
class Rounds:
    """Everything that the rounds measured."""

    readings: dict[str, list[Reading]]
    python_ms: list[float]
    local_ms: list[list[float]]
    """Every rank's step without collectives, by round; empty with one rank."""
    waits_ms: list[float]
    """What each rank waited for data in a step of the full run."""
    resident: float | None
    """Share of the files that the full run found in the page cache; None where no one can tell."""
    end: LoaderState
    """Where samples begin that no phase has read."""
    steps: int
    """Timed in a stretch."""
    gpu: dict[str, Any]
    """Load of the GPU's engines during full runs."""
    notes: list[str]


def measure(
    subject: Subject, options: ProfileConfig, config: Config, *, say: Say = _silent
) -> Profile:
    """Profile a subject that is open already."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rounds = run_rounds(subject, options, say=say)
    world = subject.world
    cold_share = 0.0 if rounds.resident is None else 1 - rounds.resident
    parts = account(
        rounds.readings,
        python_ms=rounds.python_ms,
        cold_share=cold_share,
        local_ms=rounds.local_ms,
        waits_show=world.device.type == "cpu" and world.world_size == 1,
    )
    probes = _probe(subject, rounds.end, say) if subject.source.can_return else {}
    facts = _facts(subject, rounds, parts, cold_share)
    facts = replace(facts, costs=_with_bandwidth(facts.costs, probes))
    operations: tuple[Operation, ...] = ()
    if options.trials:
        recorded = subject.source.recorded
        say("operations on an image")
        operations = measure_operations(
            config.loader_views,
            recorded,
            device=world.device,
            backend=config.data.view_backend,
            settings=subject.settings,
        )
        trials = run_trials(config, world, recorded, costs=facts.costs, say=say)
        facts = replace(facts, trials=trials)
    # Every rank has measured for itself; what is tried now, all have to try together.
    actions = from_main(rank_actions(facts), world)
    if options.verify:
        unread = replace(subject, start=rounds.end)
        actions = verify(
            unread,
            config,
            actions,
            options=options,
            steps=rounds.steps,
            base_rates=[one.images / one.wall_s for one in rounds.readings["full"]],
            cold_share=cold_share,
            say=say,
        )
    verdict = judge(facts)
    return Profile(
        created=created,
        machine=describe_machine(world.device),
        config=config.to_dict(),
        global_batch_size=subject.images_per_step * world.world_size,
        world_size=world.world_size,
        phases=tuple(
            build_phase(name, readings, world_size=world.world_size)
            for name, readings in rounds.readings.items()
        ),
        step_ms=estimate([one.step_ms for one in rounds.readings["full"]]),
        parts=parts,
        verdict=verdict,
        actions=actions,
        curves=(*draw_curves(facts), *_storage_curves(probes, facts)),
        gpu=rounds.gpu,
        operations=operations,
        ranks=_ranks(rounds),
        notes=(*rounds.notes, *_notes(rounds, facts, verdict, config)),
    )


def run_rounds(subject: Subject, options: ProfileConfig, *, say: Say) -> Rounds:
    """Calibrate, then run every phase once a round until the rounds or the time are used up; at least two."""
    reserve_s = min(_TRIALS_S, options.budget_s / 4) * options.trials
    deadline = time.monotonic() + options.budget_s - reserve_s
    bench = Bench(subject, steps=1)
    bench.steps = _plan(bench, subject, options, deadline=deadline, say=say)
    bench.resident.clear()
    anatomy = dissect(lambda: subject.step(subject.synthetic), subject.world.device)
    readings: dict[str, list[Reading]] = {name: [] for name in bench.phases()}
    python, local_ms, waits = [], [], [0.0] * subject.world.world_size
    begun = time.monotonic()
    count = options.rounds or _MOST_ROUNDS
    for number in range(count):
        now = time.monotonic()
        is_over = number >= 2 and now + (now - begun) / number > deadline
        if from_main(is_over, subject.world):
            if options.rounds or number < 3:
                bench.notes.append(
                    f"the budget of {options.budget_s:g} s ended after {number} rounds"
                )
            break
        for name in _order(bench.phases(), number):
            say(f"round {number + 1} of {'' if options.rounds else 'at most '}{count}: {name}")
            readings[name].append(bench.run(name))
        cpu_ms = 1000 * readings["replay"][-1].step_cpu_s / bench.steps
        python.append(python_ms(cpu_ms, readings["replay"][-1].step_ms, anatomy))
        if subject.local:
            local_ms.append(_gather(readings["local"][-1].step_ms, subject.world))
            own = 1000 * readings["full"][-1].next_s / bench.steps
            waits = [a + b for a, b in zip(waits, _gather(own, subject.world), strict=True)]
    resident = statistics.fmean(bench.resident) if bench.resident else None
    gpu = _gpu_load(bench, subject.world.device)
    return Rounds(
        readings=readings,
        python_ms=python,
        local_ms=local_ms,
        waits_ms=[wait / len(python) for wait in waits],
        resident=resident,
        end=bench.place,
        steps=bench.steps,
        gpu=gpu,
        notes=bench.notes,
    )


def _gpu_load(bench: Bench, device: torch.device) -> dict[str, Any]:
    """Load of the GPU's engines during two more full stretches."""
    if device.type != "cuda":
        return {}
    with GpuSampler(device) as sampler:
        for _ in range(2):
            bench.run("full")
    if sampler.note:
        bench.notes.append(sampler.note)
    return sampler.load


def verify(
    subject: Subject,
    config: Config,
    actions: Sequence[Action],
    *,
    options: ProfileConfig,
    steps: int,
    base_rates: Sequence[float],
    cold_share: float = 0.0,
    say: Say,
) -> tuple[Action, ...]:
    """Apply the best actions that are settings, one by one, and measure what the full run gains by each.

    The run as it is and the run with the change take turns, so that drift of the machine since the profile
    meets both; what is noted is the gain times the rate of the profile.

    Args:
        subject: of the run as it is; its `start` is where samples begin that nothing has read.
        config: of the run as it is.
        actions: best first.
        options: `verify` says how many.
        steps: timed steps in a stretch.
        base_rates: images/s of this rank's full runs.
        cold_share: share of the files that those missed in the page cache; as many are evicted here.
        say: called with a line for each action.
    """
    measured = list(actions)
    cold_share = cold_share if cold_share > 0.05 else 0.0
    bench = Bench(subject, steps=steps, cold_share=cold_share)
    base = estimate([subject.world.world_size * rate for rate in base_rates])
    settings = [number for number, action in enumerate(actions) if action.overrides]
    for number in settings[: options.verify]:
        action = actions[number]
        say(f"verify: {action.what}")
        changed = override(config, action.overrides)
        with open_subject(changed, subject.world, subject.step, wrap=subject.wrap) as other:
            whole = _whole_bursts(steps, other.settings.num_readers)
            beside = Bench(other, steps=whole, cold_share=cold_share)
            gain = estimate(_gains(bench, beside, options, subject.world))
        measured[number] = replace(action, measured_images_per_s=_scaled(gain, base.value))
    return tuple(measured)


def _gains(bench: Bench, changed: Bench, options: ProfileConfig, world: World) -> list[float]:
    """Rate with a change over the rate without it, in neighbouring stretches of the full run.

    Each reads files that neither has read before.
    """
    gains: list[float] = []
    end = time.monotonic() + _VERIFY_S
    for number in range(1 + (options.rounds or 7)):
        rates = []
        for one, other in ((bench, changed), (changed, bench)):
            wait_until_idle()
            reading = one.run("full")
            rates.append(reading.images / reading.wall_s)
            other.place = one.place
        if number:  # the first pair warms up
            gains.append(rates[1] / rates[0])
        is_over = number >= 3 and time.monotonic() > end
        if from_main(is_over, world):
            break
    return gains


def _scaled(value: Estimate, factor: float) -> Estimate:
    return Estimate(value.value * factor, value.low * factor, value.high * factor, value.n)


def _order(phases: Sequence[str], number: int) -> list[str]:
    """`full` first, since the others use what it read; the rest begins elsewhere in every round."""
    first, rest = phases[0], list(phases[1:])
    shift = (number * 3) % len(rest)
    return [first, *rest[shift:], *rest[:shift]]


def _plan(
    bench: Bench, subject: Subject, options: ProfileConfig, *, deadline: float, say: Say
) -> int:
    """Timed steps of a stretch, the same on every rank; at least three rounds of them should fit."""
    say("warming up")
    begun = time.monotonic()
    bench.run("full")
    slow_s = time.monotonic() - begun  # with compilation, allocations and empty caches
    begun = time.monotonic()
    step_s = bench.run("full").wall_s
    stretch_s = time.monotonic() - begun - step_s  # what a stretch takes beside its timed steps
    if from_main(step_s > _SLOW_STEP_S, subject.world):
        bench.warm_up = False
        stretch_s -= step_s
    readers = subject.settings.num_readers
    steps = options.steps or _whole_bursts(min(200, math.ceil(1 / step_s)), readers)
    left = max(0.0, deadline - time.monotonic() - min(slow_s, 30.0))
    num_phases = len(bench.phases())
    if not options.steps and num_phases * (stretch_s + steps * step_s) * 3 > left:
        steps = max(1, math.floor((left / 3 / num_phases - stretch_s) / step_s))
    return int(from_main(steps, subject.world))


def _whole_bursts(steps: int, readers: int) -> int:
    """At least so many: readers that begin together bring batches in bursts, and only whole ones count."""
    return readers * math.ceil(steps / readers)


def _gather(value: float, world: World) -> list[float]:
    """Every rank's number, on every rank."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def build_phase(name: str, readings: Sequence[Reading], *, world_size: int) -> Phase:
    """The record of a phase from its readings, one a round."""
    snapshots = [one.loader for one in readings if one.loader is not None]
    return Phase(
        name=name,
        what=WHAT.get(name, name),
        step_ms=estimate([one.step_ms for one in readings]),
        images_per_s=estimate([world_size * one.images / one.wall_s for one in readings]),
        loader=merge_snapshots(snapshots).to_dict() if snapshots else None,
        step_times_ms=tuple(value for one in readings for value in one.step_times_ms),
    )


def _facts(subject: Subject, rounds: Rounds, parts: Sequence[Part], cold_share: float) -> Facts:
    readings = rounds.readings
    costs = _costs(subject, readings, cold_share)
    every = [one for each in readings.values() for one in each]
    views = [one.loader.stages["decode_augment"] for one in readings["loader_memory"] if one.loader]
    busy = sum(view.busy_s for view in views)
    delay = sum(one.run_delay_s for one in readings["loader_memory"])
    return Facts(
        parts=parts,
        costs=costs,
        measured_images_per_s=_rate(readings["full"]),
        world_size=subject.world.world_size,
        device=subject.world.device.type,
        others_cores=statistics.median(one.others_cpu_s / one.wall_s for one in every),
        waiting_for_cores=delay / busy if busy else 0.0,
        details=_details(subject, costs),
    )


def _details(subject: Subject, costs: Costs) -> dict[str, str]:
    """What is worth knowing of a resource beside its name."""
    records = [record for raw in subject.source.recorded for record in raw.records]
    megapixels = statistics.fmean(one.height * one.width / 1e6 for one in records)
    threads = f"{costs.threads:g} thread{'' if costs.threads == 1 else 's'}"
    latency_s = costs.cold_share * costs.read_cold_s + (1 - costs.cold_share) * costs.read_warm_s
    storage = f"{1000 * latency_s:.1f} ms a file, {costs.readers:g} at a time"
    per_shard = subject.source.samples_per_shard
    if per_shard is not None and per_shard < _TINY_SHARD:
        storage += f", tiny shards of {per_shard:.0f} files"
    details = {
        "decode": f"{threads}, {costs.cores:.1f} cores, images of {megapixels:.2f} megapixels",
        "storage": storage,
    }
    if latency_s == 0:  # a stream's reads are not counted one by one
        del details["storage"]
    return details


def _probe(subject: Subject, start: LoaderState, say: Say) -> dict[str, StorageCurve]:
    """The storage's curves, warm and cold; each reads files that were not read before."""
    say("storage: 1, 2, 4 and 8 readers")
    warm, start = probe_storage(subject.source, start, cold=False)
    cold, _ = probe_storage(subject.source, start, cold=True)
    return {"warm": warm, "cold": cold}


def _with_bandwidth(costs: Costs, probes: Mapping[str, StorageCurve]) -> Costs:
    bandwidths = {f"bandwidth_{name}": curve.bandwidth for name, curve in probes.items()}
    return replace(costs, **bandwidths)


def _storage_curves(probes: Mapping[str, StorageCurve], facts: Facts) -> tuple[Curve, ...]:
    return tuple(
        Curve(
            f"reading alone, {'in' if name == 'warm' else 'not in'} the page cache (measured)",
            "batches read at a time",
            tuple(map(float, curve.images_per_s)),
            tuple(rate * facts.world_size for rate in curve.images_per_s.values()),
            facts.costs.readers,
        )
        for name, curve in probes.items()
    )


def _rate(readings: Sequence[Reading]) -> float:
    return statistics.median(one.images / one.wall_s for one in readings)


def _costs(subject: Subject, readings: Readings, cold_share: float) -> Costs:
    """What the phases say of the cost of an image."""
    alone = readings.get("loader_warm") or readings["loader_full"]
    others = statistics.median(
        one.others_cpu_s / one.wall_s for each in readings.values() for one in each
    )
    # On a device of its own the step loses time to the loader beside it in ways that are no resource here;
    # on the CPU both take cores, and that is one.
    on_cores = _cpu(readings["replay"]) * _rate(readings["replay"]) > 0.5
    step = readings["replay" if on_cores else "interference"]
    views, threads = (
        _stage(readings["loader_memory"], "decode_augment"),
        subject.settings.num_threads,
    )
    read_warm = _stage(alone, "read")
    read_cold = _stage(readings["cold"], "read") if "cold" in readings else read_warm
    costs = Costs(
        model_s=1 / _rate(step),
        step_cpu_s=_cpu(readings["replay"]),
        loader_cpu_s=_cpu(alone),
        decode_s=views.busy_s * threads / views.threads,  # DALI is one thread to its counters
        feed_s=_stage(readings["loader_memory"], "prefetch").busy_s,
        read_warm_s=read_warm.busy_s,
        read_cold_s=read_cold.busy_s,
        num_bytes=read_warm.bytes,
        cold_share=cold_share,
        cores=max(0.5, usable_cores() / _local_ranks(subject.world) - others),
        threads=float(threads),
        readers=read_warm.threads,
    )
    possible, binds = loader_limit(replace(costs, cold_share=0.0))
    efficiency = min(1.0, _rate(alone) / possible)
    if binds == "cores":
        costs = replace(costs, core_efficiency=costs.core_efficiency * efficiency)
    return replace(costs, efficiency=efficiency)


@dataclass(frozen=True)
class _PerImage:
    busy_s: float
    cpu_s: float
    bytes: float
    threads: float


def _stage(readings: Sequence[Reading], name: str) -> _PerImage:
    """A stage's costs of an image, median over rounds."""
    stages = [one.loader.stages[name] for one in readings if one.loader is not None]
    used = [stage for stage in stages if stage.items]
    if not used:
        return _PerImage(0.0, 0.0, 0.0, stages[0].threads)
    return _PerImage(
        busy_s=statistics.median(stage.busy_s / stage.items for stage in used),
        cpu_s=statistics.median(stage.cpu_s / stage.items for stage in used),
        bytes=statistics.median(stage.bytes / stage.items for stage in used),
        threads=used[0].threads,
    )


def _cpu(readings: Sequence[Reading]) -> float:
    """CPU seconds of this process for an image."""
    return statistics.median(one.process_cpu_s / one.images for one in readings)


def _local_ranks(world: World) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world.world_size > 1 else 1


def _ranks(rounds: Rounds) -> tuple[dict[str, Any], ...]:
    """Every rank's own step and its wait for data; empty with one rank."""
    if not rounds.local_ms:
        return ()
    steps_ms = [statistics.median(each) for each in zip(*rounds.local_ms, strict=True)]
    return tuple(
        {"rank": rank, "step_ms": step_ms, "wait_ms": wait_ms}
        for rank, (step_ms, wait_ms) in enumerate(zip(steps_ms, rounds.waits_ms, strict=True))
    )


def _unused_levers(config: Config, *, is_gpu: bool) -> list[str]:
    """Switches of the step that are off and can be turned on, as they are typed."""
    speed = config.speed
    levers = {
        "speed.compile blocks": speed.compile == "none",
        "optim.precision fp16": config.optim.precision == "fp32" and is_gpu,
        "speed.sdpa auto": speed.sdpa == "torch" and is_gpu,
        "speed.target_copy true": not speed.target_copy and config.optim.precision != "fp32",
    }
    return [lever for lever, is_unused in levers.items() if is_unused]


def _notes(rounds: Rounds, facts: Facts, verdict: Verdict, config: Config) -> list[str]:
    notes, parts = [], facts.parts
    levers = _unused_levers(config, is_gpu=facts.device == "cuda")
    if verdict.binds == "model" and levers:
        notes.append(
            f"the model binds; switches of the step that are off: {', '.join(levers)}. "
            "benchmarks/bench_step.py measures what each brings"
        )
    total = sum(part.ms.value for part in parts)
    residual = next(part.ms.value for part in parts if part.name == "residual")
    if abs(residual) > UNEXPLAINED * total:
        notes.append(
            f"{residual:+.1f} ms, {100 * abs(residual) / total:.0f} % of the step, are not explained: phases "
            "differed more from round to round than their differences; raise profile.rounds, or look for "
            "other work on the machine"
        )
    if rounds.resident is not None:
        notes.append(
            f"the full run found {100 * rounds.resident:.0f} % of its files in the page cache"
        )
    if facts.others_cores >= 0.25:
        notes.append(f"other processes took {facts.others_cores:.1f} CPU cores meanwhile")
    if rounds.local_ms:
        slowest = max(_ranks(rounds), key=lambda one: float(one["step_ms"]))
        notes.append(
            f"rank {slowest['rank']} is the slowest alone, {slowest['step_ms']:.1f} ms a step; waits for "
            f"data by rank: {', '.join(f'{wait:.1f}' for wait in rounds.waits_ms)} ms"
        )
    return notes
