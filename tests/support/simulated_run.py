"""Readings of a run whose stages take known times: a pipeline is as slow as its slowest stage."""

from __future__ import annotations

from dataclasses import dataclass

from cmae.pipeline.stage_stats import Histogram, LoaderSnapshot, StageSnapshot
from cmae.train.profiling.analysis.records import Reading

IMAGES, STEPS = 8, 4
"""In a step, and in a window."""


@dataclass(frozen=True)
class SimulatedRun:
    """Milliseconds of each stage for one batch, all its threads at work."""

    step: float = 100.0
    decode_augment: float = 20.0
    prefetch: float = 5.0
    read_warm: float = 2.0
    read_cold: float = 10.0
    cold_share: float = 0.0
    python: float = 0.0
    """CPU time of the training thread, part of `step`."""
    others_cores: float = 0.0
    waiting_for_cores: float = 0.0
    """Share of the decoding threads' time."""
    threads: int = 2
    readers: int = 4

    def readings(self, rounds: int = 3) -> dict[str, list[Reading]]:
        """Of every phase of the profiler."""
        decode, prefetch = self.decode_augment, self.prefetch
        cold = self.cold_share * self.read_cold + (1 - self.cold_share) * self.read_warm
        loader = {
            "replay": (),
            "interference": (),
            "prefetch": (prefetch,),
            "memory": (prefetch, decode),
            "warm": (prefetch, decode, self.read_warm),
            "cold": (prefetch, decode, self.read_cold),
            "full": (prefetch, decode, cold),
        }
        found = {
            name: self._reading(name, max(self.step, *stages, 0.0), busy=bool(stages))
            for name, stages in loader.items()
        }
        found["loader_memory"] = self._reading("loader_memory", max(prefetch, decode), busy=True)
        alone = max(prefetch, decode, self.read_warm)
        found["loader_warm"] = self._reading("loader_warm", alone, busy=True)
        return {name: [one] * rounds for name, one in found.items()}

    def _reading(self, phase: str, step_ms: float, *, busy: bool) -> Reading:
        wall_s = STEPS * step_ms / 1000
        has_step = not phase.startswith("loader_")
        return Reading(
            phase=phase,
            step_times_ms=(step_ms,) * STEPS,
            wall_s=wall_s,
            images=STEPS * IMAGES,
            next_s=STEPS * max(0.0, step_ms - self.step) / 1000 if has_step else wall_s,
            next_cpu_s=0.0,
            step_cpu_s=STEPS * self.python / 1000 if has_step else 0.0,
            process_cpu_s=0.0,
            others_cpu_s=self.others_cores * wall_s,
            run_delay_s=self.waiting_for_cores * STEPS * self.decode_augment * self.threads / 1000,
            loader=self._snapshot(phase, wall_s) if busy else None,
        )

    def _snapshot(self, phase: str, wall_s: float) -> LoaderSnapshot:
        read = self.read_cold if phase == "cold" else self.read_warm
        stages = [
            self._stage("read", self.readers, read),
            self._stage("decode_augment", self.threads, self.decode_augment),
            self._stage("prefetch", 1, self.prefetch),
        ]
        return LoaderSnapshot(
            time_s=wall_s,
            stages={one.name: one for one in stages},
            batches=STEPS,
            samples=STEPS * IMAGES,
            wait_s=0.0,
            queue_depth_mean=0.0,
            bad_samples=0,
        )

    def _stage(self, name: str, threads: int, batch_ms: float) -> StageSnapshot:
        return StageSnapshot(
            name=name,
            threads=threads,
            items=STEPS * IMAGES,
            bytes=STEPS * IMAGES * 100_000,
            busy_s=STEPS * batch_ms * threads / 1000,
            cpu_s=0.0,
            starved_s=0.0,
            blocked_s=0.0,
            histogram=Histogram(),
        )
