"""What an image costs, from the readings of the phases: the input of the bottleneck model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cmae.train.profiling.analysis.bottleneck_model import Costs, loader_limit
from cmae.train.profiling.analysis.breakdown import Readings
from cmae.train.profiling.analysis.records import Reading


def stage_costs(readings: Readings, *, cold_share: float, cores: float, threads: int) -> Costs:
    """Costs by stage, of this project's loader.

    Args:
        readings: Readings of every phase.
        cold_share: Share of the files that the full run did not find in the page cache.
        cores: CPU cores of this rank, those that others take included.
        threads: Decoding threads.
    """
    alone = readings.get("loader_warm") or readings["loader_full"]
    # On a device of its own the step loses time to the loader beside it in ways that are no resource here;
    # on the CPU both take cores, and that is one.
    on_cores = _cpu_s(readings["replay"]) * median_rate(readings["replay"]) > 0.5
    step = readings["replay" if on_cores else "interference"]
    decoding = _stage(readings["loader_memory"], "decode_augment")
    read_warm = _stage(alone, "read")
    read_cold = _stage(readings["cold"], "read") if "cold" in readings else read_warm
    costs = Costs(
        model_s=1 / median_rate(step),
        step_cpu_s=_cpu_s(readings["replay"]),
        loader_cpu_s=_cpu_s(alone),
        # DALI is one thread to its counters.
        decode_augment_s=decoding.busy_s * threads / decoding.threads,
        prefetch_s=_stage(readings["loader_memory"], "prefetch").busy_s,
        read_warm_s=read_warm.busy_s,
        read_cold_s=read_cold.busy_s,
        num_bytes=read_warm.bytes,
        cold_share=cold_share,
        cores=_left_over(cores, readings),
        threads=float(threads),
        readers=read_warm.threads,
    )
    return _calibrated(costs, median_rate(alone))


def worker_costs(readings: Readings, *, cores: float, workers: int) -> Costs:
    """Costs of a loader whose stages cannot be told apart.

    Args:
        readings: Readings of `replay`, `loader_full` and all other phases.
        cores: CPU cores of this process, those that others take included.
        workers: Processes or threads that work for the loader; 0 = the training thread does.
    """
    alone_s = 1 / median_rate(readings["loader_full"])
    costs = Costs(
        model_s=1 / median_rate(readings.get("replay_h2d", readings["replay"])),
        step_cpu_s=_cpu_s(readings["replay"]),
        loader_cpu_s=_cpu_s(readings["loader_full"]),
        decode_augment_s=0.0,
        prefetch_s=0.0,
        read_warm_s=0.0,
        read_cold_s=0.0,
        num_bytes=0.0,
        cold_share=0.0,
        cores=_left_over(cores, readings),
        threads=float(max(1, workers)),
        readers=1.0,
        worker_s=workers * alone_s,
        in_thread_s=0.0 if workers else alone_s,
    )
    return _calibrated(costs, 1 / alone_s)


def median_rate(readings: Sequence[Reading]) -> float:
    """Images per second of this rank, median over rounds."""
    return statistics.median(one.images_per_s for one in readings)


def others_cores(readings: Readings) -> float:
    """CPU cores that other processes took meanwhile."""
    every = [one for each in readings.values() for one in each]
    return statistics.median(one.others_cpu_s / one.wall_s for one in every)


def waiting_for_cores(readings: Readings) -> float:
    """Share of the decoding threads' busy time in which this process's threads waited for a core."""
    alone = readings["loader_memory"]
    busy_s = sum(one.loader.stages["decode_augment"].busy_s for one in alone if one.loader)
    return sum(one.run_delay_s for one in alone) / busy_s if busy_s else 0.0


def _calibrated(costs: Costs, loader_images_per_s: float) -> Costs:
    """The costs with what the loader alone reached of what they allow it."""
    possible, bottleneck = loader_limit(replace(costs, cold_share=0.0))
    efficiency = min(1.0, loader_images_per_s / possible)
    if bottleneck == "cores":
        costs = replace(costs, core_efficiency=costs.core_efficiency * efficiency)
    return replace(costs, efficiency=efficiency)


def _left_over(cores: float, readings: Readings) -> float:
    return max(0.5, cores - others_cores(readings))


@dataclass(frozen=True)
class _PerImage:
    busy_s: float
    bytes: float
    threads: float


def _stage(readings: Sequence[Reading], name: str) -> _PerImage:
    """A stage's costs of an image, median over rounds."""
    stages = [one.loader.stages[name] for one in readings if one.loader is not None]
    used = [stage for stage in stages if stage.items]
    if not used:
        return _PerImage(0.0, 0.0, stages[0].threads)
    return _PerImage(
        busy_s=statistics.median(stage.busy_s / stage.items for stage in used),
        bytes=statistics.median(stage.bytes / stage.items for stage in used),
        threads=used[0].threads,
    )


def _cpu_s(readings: Sequence[Reading]) -> float:
    """CPU seconds of this process for an image."""
    return statistics.median(one.process_cpu_s / one.images for one in readings)
