"""Profiles of other loaders: any iterable of batches, with any step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cmae.train.machine import describe_machine, usable_cores
from cmae.train.profiling.analysis.bootstrap import estimate, estimates
from cmae.train.profiling.analysis.bottleneck_model import Costs, solve
from cmae.train.profiling.analysis.breakdown import UNEXPLAINED
from cmae.train.profiling.analysis.records import (
    Action,
    Estimate,
    Part,
    Phase,
    Profile,
    Reading,
    Verdict,
)
from cmae.train.profiling.measure.phases import synchronise
from cmae.train.profiling.measure.python_time import dissect, python_ms
from cmae.train.profiling.measure.timing import background_consumer, run_stretch

BatchT = TypeVar("BatchT")

WHAT = {
    "full": "the loader and the step together",
    "replay": "the step on batches that were kept",
    "replay_device": "the step on the same batches, copied to the device before",
    "interference": "replay, while the loader works beside it at the step's rate for nobody",
    "loader_full": "the loader alone",
}
_NOTES = {
    "model": "replay of kept batches, less Python",
    "python": "the training thread's own work: outside torch operators in the step, and in `next`",
    "host_to_device": "replay from host memory less replay on the device",
    "interference": "replay beside a working loader less replay: shared cores, memory, interpreter lock",
    "loader": "waiting for the loader in `next`",
    "residual": "what the differences do not explain",
}
_SMALL = 0.1


def profile_loader(
    loader: Iterable[BatchT],
    step: Callable[[BatchT], object],
    *,
    batch_size: int | None = None,
    rounds: int = 5,
    steps: int | None = None,
    stock: int | None = None,
    device: str | torch.device | None = None,
) -> Profile:
    """Say whether training waits for a loader, and why.

    Runs the step alone on kept batches, the loader alone, both together, and the step beside a loader whose
    batches nobody uses; in turn, several times.

    Args:
        loader: gives batches; begun again when it ends. Its `num_workers` and `prefetch_factor` are looked at
            where it has them.
        step: trains on one batch, copies to the device included. It runs a few hundred times.
        batch_size: images in a batch; None = the length of the first tensor or array in it.
        rounds: repetitions behind each number.
        steps: timed steps in a phase of a round; None = about half a second, at least 4.
        stock: batches that the loader may have ready; None = what its attributes say, at least 2.
        device: to wait for at the end of a phase; None = the current GPU where torch uses one.

    Raises:
        ValueError: the loader is empty, or the size of a batch cannot be seen.
    """
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    bench = _ForeignBench(loader, step, batch_size=batch_size, stock=stock, device=device)
    bench.plan(steps)
    anatomy = dissect(lambda: step(bench.kept[0]), bench.device)
    names = bench.phases()
    readings: dict[str, list[Reading]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            readings[name].append(bench.run(name))
    python = [
        python_ms(1000 * one.step_cpu_s / bench.steps, one.step_ms, anatomy)
        for one in readings["replay"]
    ]
    bench.close()
    parts = _account(readings, python)
    costs = _costs(readings, loader)
    verdict, actions = _judge(parts, costs, readings, workers=_workers(loader))
    return Profile(
        created=created,
        machine=describe_machine(bench.device),
        config={"loader": type(loader).__name__, "num_workers": _workers(loader)},
        global_batch_size=bench.batch_size,
        world_size=1,
        phases=tuple(_phase(name, each) for name, each in readings.items()),
        step_ms=estimate([one.step_ms for one in readings["full"]]),
        parts=parts,
        verdict=verdict,
        actions=actions,
        notes=_notes(parts),
    )


class _ForeignBench(Generic[BatchT]):
    """Runs the phases of a loader and a step that are not this project's."""

    def __init__(
        self,
        loader: Iterable[BatchT],
        step: Callable[[BatchT], object],
        *,
        batch_size: int | None,
        stock: int | None,
        device: str | torch.device | None,
    ) -> None:
        self._batches = _endless(loader)
        self._step = step
        ready = _workers(loader) * int(getattr(loader, "prefetch_factor", None) or 1)
        self._stock = max(2, ready) if stock is None else stock
        self.device = _device(device)
        self.kept = [next(self._batches) for _ in range(3)]
        self.batch_size = batch_size or _size_of(self.kept[0])
        self.steps = 2
        self._on_device = self.kept
        if self.device.type == "cuda":
            self._on_device = [
                tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, batch)
                for batch in self.kept
            ]

    def close(self) -> None:
        """End the loader's workers."""
        self._batches.close()

    def plan(self, steps: int | None) -> None:
        """Choose the timed steps of a stretch."""
        self.run("full")
        step_s = self.run("full").wall_s / self.steps
        self.steps = steps or max(4, min(100, math.ceil(0.5 / step_s)))

    def phases(self) -> list[str]:
        """Phases that can be run here."""
        names = ["full", "replay", "interference", "loader_full"]
        return [*names, "replay_device"] if self.device.type == "cuda" else names

    def run(self, phase: str) -> Reading:
        """One stretch of a phase."""
        if phase in ("replay", "replay_device"):
            batches = cycle(self.kept if phase == "replay" else self._on_device)
            self._step(next(batches))
            return self._timed(phase, lambda: next(batches), self._step)
        for _ in range(self._stock):  # made while the phase before ran
            next(self._batches)
        if phase == "loader_full":
            return self._timed(phase, lambda: next(self._batches), lambda batch: None)
        if phase == "full":
            self._step(next(self._batches))
            return self._timed(phase, lambda: next(self._batches), self._step)
        return self._interference()

    def _interference(self) -> Reading:
        batches = cycle(self.kept)
        with background_consumer(lambda: next(self._batches)) as release:

            def draw() -> BatchT:
                release()
                return next(batches)

            self._step(draw())
            return self._timed("interference", draw, self._step)

    def _timed(
        self, phase: str, draw: Callable[[], BatchT], step: Callable[[BatchT], object]
    ) -> Reading:
        return run_stretch(
            phase,
            draw,
            step,
            count=self.steps,
            images_per_step=self.batch_size,
            synchronise=lambda: synchronise(self.device),
        )


def _endless(loader: Iterable[BatchT]) -> Generator[BatchT, None, None]:
    seen = 0
    while True:
        before = seen
        for batch in loader:
            seen += 1
            yield batch
        if seen == before:
            raise ValueError(
                f"the loader is used up after {seen} batches and cannot begin again; give an iterable that "
                "can, such as a DataLoader or a list"
                if seen
                else "the loader is empty: it must give at least one batch"
            )


def _device(device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _size_of(batch: Any) -> int:
    for leaf in tree_leaves(batch):
        shape = getattr(leaf, "shape", None)
        if shape:
            return int(shape[0])
    raise ValueError(
        f"batch_size is None, and a batch of type {type(batch).__name__} holds no tensor or array whose "
        "length it could be; give batch_size"
    )


def _workers(loader: Any) -> int:
    return int(getattr(loader, "num_workers", 0) or 0)


def _account(
    readings: Mapping[str, Sequence[Reading]], python: Sequence[float]
) -> tuple[Part, ...]:
    rounds = {name: [one.step_ms for one in each] for name, each in readings.items()}
    rounds["python"] = list(python)
    for name in ("next_s", "next_cpu_s"):
        rounds[name] = [
            1000 * getattr(one, name) / len(one.step_times_ms) for one in readings["full"]
        ]
    found = estimates(rounds, _differences)
    return tuple(Part(name, value, _NOTES[name]) for name, value in found.items())


def _differences(step: dict[str, float]) -> dict[str, float]:
    on_device = step.get("replay_device", step["replay"])
    in_next = min(step["next_cpu_s"], step["next_s"])
    if in_next > step["next_s"] / 3:  # it computes, and where it seems to wait it waits for a core
        in_next = step["next_s"]
    parts = {"model": on_device - step["python"], "python": step["python"] + in_next}
    if "replay_device" in step:
        parts["host_to_device"] = step["replay"] - on_device
    # The step of a run that waits for its loader is less disturbed than one that never waits.
    room = max(0.0, step["full"] - step["next_s"] - step["replay"])
    parts["interference"] = min(step["interference"] - step["replay"], room)
    parts["loader"] = step["next_s"] - in_next
    parts["residual"] = step["full"] - sum(parts.values())
    return parts


def _costs(readings: Mapping[str, Sequence[Reading]], loader: Any) -> Costs:
    def rate(phase: str) -> float:
        return statistics.median(one.images / one.wall_s for one in readings[phase])

    def cpu_s(phase: str) -> float:
        return statistics.median(one.process_cpu_s / one.images for one in readings[phase])

    workers = max(1, _workers(loader))
    model_s, in_thread = 1 / rate("replay"), _workers(loader) == 0
    alone_s = 1 / rate("loader_full")
    return Costs(
        model_s=model_s + (alone_s if in_thread else 0.0),
        step_cpu_s=cpu_s("replay"),
        loader_cpu_s=cpu_s("loader_full"),
        decode_s=workers * alone_s,
        feed_s=0.0,
        read_warm_s=0.0,
        read_cold_s=0.0,
        num_bytes=0.0,
        cold_share=0.0,
        cores=usable_cores(),
        threads=float(workers),
        readers=1.0,
    )


def _judge(
    parts: Sequence[Part],
    costs: Costs,
    readings: Mapping[str, Sequence[Reading]],
    *,
    workers: int,
) -> tuple[Verdict, tuple[Action, ...]]:
    total = sum(part.ms.value for part in parts)
    rates = {
        name: statistics.median(one.images / one.wall_s for one in each)
        for name, each in readings.items()
    }
    binds = {"host_to_device": "h2d", "interference": "cores"}
    name, share = max(
        ((part.name, part.ms.value / total) for part in parts if part.name != "model"),
        key=lambda pair: pair[1],
    )
    if share < _SMALL:
        headroom = max(1.0, rates["loader_full"] / rates["replay"])
        sentence = f"The model binds; the loader has {headroom:.1f}x head-room."
        return Verdict(sentence, "model", headroom), ()
    actions = _actions(costs, rates["full"], workers)
    headroom = max(1.0, rates["replay"] / rates["full"])
    words = {
        "loader": f"the loader ({workers} workers)",
        "python": "Python in the training thread",
        "interference": "CPU cores that the step and the loader share",
        "host_to_device": "copies to the device",
        "residual": "something that no phase isolates",
    }
    in_next_ms = statistics.median(
        1000 * one.next_cpu_s / len(one.step_times_ms) for one in readings["full"]
    )
    if name == "python" and in_next_ms > 0.3 * share * total:
        words["python"] = "the loader, which works in the training thread"
    sentence = (
        f"Bound by {words[name]}: {100 * share:.0f} % of the step; with data that is always ready "
        f"{headroom:.1f}x."
    )
    return Verdict(sentence, binds.get(name, name), headroom), actions


def _actions(costs: Costs, measured: float, workers: int) -> tuple[Action, ...]:
    step_s = costs.model_s - (costs.decode_s if workers == 0 else 0.0)
    jitter = min(1.1, measured / solve(costs).images_per_s)
    changes = {
        f"num_workers={max(1, 2 * workers)}": replace(
            costs, model_s=step_s, threads=float(max(1, 2 * workers))
        ),
        "twice the CPU cores, with as many more workers": replace(
            costs, model_s=step_s, cores=2 * costs.cores, threads=2 * costs.threads
        ),
        "a loader of half the cost": replace(
            costs,
            model_s=step_s + (costs.model_s - step_s) / 2,
            decode_s=costs.decode_s / 2,
            loader_cpu_s=costs.loader_cpu_s / 2,
        ),
    }
    found = []
    for what, changed in changes.items():
        after = solve(changed)
        predicted = min(after.images_per_s * jitter, 1 / step_s)
        if predicted > 1.02 * measured:
            found.append(Action(what, {}, predicted, after.binds.replace("decode", "loader")))
    return tuple(sorted(found, key=lambda action: -action.predicted_images_per_s))


def _phase(name: str, readings: Sequence[Reading]) -> Phase:
    return Phase(
        name=name,
        what=WHAT[name],
        step_ms=estimate([one.step_ms for one in readings]),
        images_per_s=estimate([one.images / one.wall_s for one in readings]),
        step_times_ms=tuple(value for one in readings for value in one.step_times_ms),
    )


def _notes(parts: Sequence[Part]) -> tuple[str, ...]:
    total = sum(part.ms.value for part in parts)
    residual: Estimate = next(part.ms for part in parts if part.name == "residual")
    if abs(residual.value) <= UNEXPLAINED * total:
        return ()
    return (f"{residual.value:+.1f} ms of the step are not explained; raise rounds",)
