"""`cmae profile`: phases in turn, the breakdown of the step, the diagnosis and what would help."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cmae.model import build_model
from cmae.pipeline import LoaderState
from cmae.train.config import Config
from cmae.train.distributed import World, from_main
from cmae.train.loop.pretrain import join_run
from cmae.train.loop.step import TrainStep
from cmae.train.machine import compute_capability, describe_machine, usable_cores
from cmae.train.monitor.gpu import GpuSampler
from cmae.train.profiling.analysis.bootstrap import estimate
from cmae.train.profiling.analysis.bottleneck_model import Costs
from cmae.train.profiling.analysis.breakdown import break_down
from cmae.train.profiling.analysis.costs import (
    median_rate,
    others_cores,
    stage_costs,
    waiting_for_cores,
)
from cmae.train.profiling.analysis.curves import predict_curves
from cmae.train.profiling.analysis.notes import Circumstances, build_notes
from cmae.train.profiling.analysis.records import Action, Component, Profile, Reading
from cmae.train.profiling.analysis.verdict import Facts, diagnose, rank_actions
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.measure.operations import measure_operations, measure_slow_images
from cmae.train.profiling.measure.phases import WHAT, Bench
from cmae.train.profiling.measure.python_time import python_ms, time_one_step
from cmae.train.profiling.measure.rounds import phase_records, plan_steps, run_rounds
from cmae.train.profiling.measure.storage import StorageCurve, probe_storage
from cmae.train.profiling.measure.subject import Log, Subject, log_nothing, open_subject
from cmae.train.profiling.measure.trials import run_trials, verify

ValueT = TypeVar("ValueT")

_TRIALS_S = 30.0
"""Of the budget, for trials and operations after the rounds; at most a quarter of it."""

_MOST_ROUNDS = 12
"""More tell little that is new."""

_TINY_SHARD = 20
"""Files in a shard below which opening shards is worth a word."""


def profile(config: Config, options: ProfileConfig, *, log: Log = print) -> Profile:
    """Profile the run that `cmae pretrain` would make of this configuration.

    Args:
        config: Configuration of the run; nothing is written to its `run.out`.
        options: How long to measure.
        log: Function that takes lines about the progress, on the first rank.

    Raises:
        ValueError: Settings do not fit each other, the data or the machine.
    """
    config = replace(config, run=replace(config.run, out=options.out))
    with ExitStack() as stack:
        world = stack.enter_context(join_run(config))
        model = build_model(config.model, seed=config.seed)
        train_step = TrainStep(model.to(world.device), config.optim, config.speed, world)
        # Without a learning rate the step costs what it costs, and the weights stay where they are.
        step = lambda batches: train_step(batches, lr=0.0, momentum=1.0)  # noqa: E731
        runs_alone = world.world_size > 1 and not train_step.is_sharded
        local = train_step.without_collectives if runs_alone else None
        subject = stack.enter_context(open_subject(config, world, step, local=local))
        return measure(subject, options, config, log=log if world.is_main else log_nothing)


@dataclass(frozen=True)
class _Rounds:
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
    """Timed steps in a window."""
    gpu: dict[str, Any]
    """Load of the GPU's engines during full runs."""
    notes: list[str]

    @property
    def cold_share(self) -> float:
        """Share of the files that the full run did not find in the page cache."""
        return 0.0 if self.resident is None else 1 - self.resident


def measure(
    subject: Subject, options: ProfileConfig, config: Config, *, log: Log = log_nothing
) -> Profile:
    """Profile a subject that is open already.

    Args:
        subject: Loader and step to profile.
        options: How long to measure.
        config: Configuration of the run.
        log: Function that takes lines about the progress.
    """
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    world = subject.world
    rounds = _run_rounds(subject, options, log)
    breakdown = break_down(
        rounds.readings,
        python_ms=rounds.python_ms,
        cold_share=rounds.cold_share,
        local_ms=rounds.local_ms,
        waits_show=world.device.type == "cpu" and world.world_size == 1,
    )
    storage = _probe(subject, rounds.end, log) if subject.source.can_return else {}
    facts = _facts(subject, rounds, breakdown, storage)
    found: dict[str, Any] = {}
    if options.trials:
        found = _time_images(subject, config, log)
        recorded = subject.source.recorded
        facts = replace(
            facts, trials=run_trials(config, world, recorded, costs=facts.costs, log=log)
        )
    diagnosis = diagnose(facts)
    curves = [
        one.to_curve(name, facts.costs.readers, facts.world_size) for name, one in storage.items()
    ]
    return Profile(
        created=created,
        machine=describe_machine(world.device),
        config=config.to_dict(),
        global_batch_size=subject.images_per_step * world.world_size,
        world_size=world.world_size,
        phases=phase_records(rounds.readings, WHAT, world_size=world.world_size),
        step_ms=estimate([one.step_ms for one in rounds.readings["full"]]),
        breakdown=breakdown,
        diagnosis=diagnosis,
        actions=_actions(subject, options, config, rounds, facts, log),
        curves=(*predict_curves(facts), *curves),
        gpu=rounds.gpu,
        ranks=_ranks(rounds),
        notes=(
            *rounds.notes,
            *build_notes(facts, diagnosis, _circumstances(rounds, config, world)),
        ),
        **found,
    )


def _run_rounds(subject: Subject, options: ProfileConfig, log: Log) -> _Rounds:
    """Calibrate, then run every phase once a round until the rounds or the time are used up; at least two."""
    world = subject.world
    reserve_s = min(_TRIALS_S, options.budget_s / 4) * options.trials
    deadline = time.monotonic() + options.budget_s - reserve_s
    bench = Bench(subject, steps=1)
    log("warming up")
    bench.steps = plan_steps(
        bench,
        steps=options.steps,
        num_readers=subject.settings.num_readers,
        deadline=deadline,
        world=world,
    )
    bench.resident.clear()
    one_step = time_one_step(lambda: subject.step(subject.synthetic), world.device)
    readings = run_rounds(
        bench, options.rounds or _MOST_ROUNDS, is_over=_until(deadline, world), log=log
    )
    count = len(readings["full"])
    if count < (options.rounds or 3):
        bench.notes.append(f"the budget of {options.budget_s:g} s ended after {count} rounds")
    resident = statistics.fmean(bench.resident) if bench.resident else None
    local = [one.step_ms for one in readings.get("local", ())]
    waits = statistics.fmean(one.next_ms for one in readings["full"])
    return _Rounds(
        readings=readings,
        python_ms=[python_ms(one.step_cpu_ms, one.step_ms, one_step) for one in readings["replay"]],
        local_ms=[list(each) for each in zip(*_gather(local, world), strict=True)],
        waits_ms=_gather(waits, world),
        resident=resident,
        end=bench.place,
        steps=bench.steps,
        gpu=_gpu_load(bench, world.device),
        notes=bench.notes,
    )


def _until(deadline: float, world: World) -> Callable[[int], bool]:
    """Whether another round like those before would end after the deadline; the same on every rank."""
    begun = time.monotonic()

    def is_over(number: int) -> bool:
        now = time.monotonic()
        late = number >= 2 and now + (now - begun) / number > deadline
        return bool(from_main(late, world))

    return is_over


def _gather(value: ValueT, world: World) -> list[ValueT]:
    """Every rank's value, on every rank."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def _gpu_load(bench: Bench, device: torch.device) -> dict[str, Any]:
    """Load of the GPU's engines during two more full windows."""
    if device.type != "cuda":
        return {}
    with GpuSampler(device) as sampler:
        for _ in range(2):
            bench.run("full")
    if sampler.note:
        bench.notes.append(sampler.note)
    return sampler.load


def _probe(subject: Subject, start: LoaderState, log: Log) -> dict[str, StorageCurve]:
    """The storage's curves, warm and cold; each reads files that were not read before."""
    log("storage: 1, 2, 4 and 8 readers")
    warm, start = probe_storage(subject.source, start, cold=False)
    cold, _ = probe_storage(subject.source, start, cold=True)
    return {"warm": warm, "cold": cold}


def _facts(
    subject: Subject,
    rounds: _Rounds,
    breakdown: Sequence[Component],
    storage: dict[str, StorageCurve],
) -> Facts:
    readings, world = rounds.readings, subject.world
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world.world_size > 1 else 1
    costs = stage_costs(
        readings,
        cold_share=rounds.cold_share,
        cores=usable_cores() / local_ranks,
        threads=subject.settings.num_threads,
    )
    bandwidths = {f"bandwidth_{name}": curve.bandwidth for name, curve in storage.items()}
    return Facts(
        breakdown=breakdown,
        costs=replace(costs, **bandwidths),
        measured_images_per_s=median_rate(readings["full"]),
        world_size=world.world_size,
        device=world.device.type,
        others_cores=others_cores(readings),
        waiting_for_cores=waiting_for_cores(readings),
        details=_details(subject, costs),
    )


def _details(subject: Subject, costs: Costs) -> dict[str, str]:
    """What is worth knowing of a bottleneck beside its name."""
    records = [record for raw in subject.source.recorded for record in raw.records]
    megapixels = statistics.fmean(one.height * one.width / 1e6 for one in records)
    threads = f"{costs.threads:g} thread{'' if costs.threads == 1 else 's'}"
    decoding = f"{threads}, {costs.cores:.1f} cores, images of {megapixels:.2f} megapixels"
    latency_s = costs.cold_share * costs.read_cold_s + (1 - costs.cold_share) * costs.read_warm_s
    if latency_s == 0:
        # A stream's reads are not counted one by one.
        return {"decode_augment": decoding}
    storage = f"{1000 * latency_s:.1f} ms a file, {costs.readers:g} at a time"
    per_shard = subject.source.samples_per_shard
    if per_shard is not None and per_shard < _TINY_SHARD:
        storage += f", tiny shards of {per_shard:.0f} files"
    return {"decode_augment": decoding, "storage": storage}


def _time_images(subject: Subject, config: Config, log: Log) -> dict[str, Any]:
    """Fields of the profile about the cost of single images."""
    log("operations on an image")
    settings: dict[str, Any] = {
        "device": subject.world.device,
        "backend": config.data.view_backend,
        "settings": subject.settings,
    }
    views, recorded = config.loader_views, subject.source.recorded
    return {
        "operations": measure_operations(views, recorded, **settings),
        "slow_images": measure_slow_images(views, recorded, **settings),
    }


def _actions(
    subject: Subject,
    options: ProfileConfig,
    config: Config,
    rounds: _Rounds,
    facts: Facts,
    log: Log,
) -> tuple[Action, ...]:
    """What would help, and where asked for what it brought."""
    # Every rank has measured for itself; what is tried now, all have to try together.
    actions = from_main(rank_actions(facts), subject.world)
    if not options.verify:
        return tuple(actions)
    return verify(
        replace(subject, start=rounds.end),
        config,
        actions,
        options=options,
        steps=rounds.steps,
        base_rates=[one.images_per_s for one in rounds.readings["full"]],
        cold_share=rounds.cold_share,
        log=log,
    )


def _ranks(rounds: _Rounds) -> tuple[dict[str, Any], ...]:
    """Every rank's own step and its wait for data; empty with one rank."""
    if not rounds.local_ms:
        return ()
    steps_ms = [statistics.median(each) for each in zip(*rounds.local_ms, strict=True)]
    return tuple(
        {"rank": rank, "step_ms": step_ms, "wait_ms": wait_ms}
        for rank, (step_ms, wait_ms) in enumerate(zip(steps_ms, rounds.waits_ms, strict=True))
    )


def _circumstances(rounds: _Rounds, config: Config, world: World) -> Circumstances:
    return Circumstances(
        resident=rounds.resident,
        ranks=_ranks(rounds),
        unused_switches=_unused_switches(config, compute_capability(world.device)),
    )


def _unused_switches(config: Config, capability: tuple[int, int] | None) -> tuple[str, ...]:
    """Switches of the step that are off and can be turned on, as they are typed."""
    speed, is_gpu = config.speed.resolved(capability), capability is not None
    switches = {
        "speed.compile blocks": speed.compile == "none",
        "optim.precision fp16": config.optim.precision == "fp32" and is_gpu,
        "speed.sdpa auto": speed.sdpa == "torch" and is_gpu,
        "speed.target_copy true": not speed.target_copy and config.optim.precision != "fp32",
    }
    return tuple(name for name, is_unused in switches.items() if is_unused)
