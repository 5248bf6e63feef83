"""The phases of a profile of this project's loader: what runs in each, and how it is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cmae.pipeline import Batch, LoaderState
from cmae.pipeline.sources.records import Extent
from cmae.train.profiling.analysis.records import Reading
from cmae.train.profiling.measure.page_cache import evict, resident_fraction, touch
from cmae.train.profiling.measure.subject import Step, Subject
from cmae.train.profiling.measure.switches import Mode
from cmae.train.profiling.measure.timing import (
    background_consumer,
    measure_window,
    synchronise,
    wait_until_idle,
)

WHAT = {
    "local": "the step on one batch, each rank for itself, without any collective",
    "synthetic": "the step on one batch of random pixels that lies on the device",
    "replay": "the step on real batches that lie on the device",
    "replay_h2d": "the same batches, copied from pinned host memory one step ahead",
    "interference": "replay, while the loader works beside it at the step's rate for nobody",
    "prefetch": "the step fed by the loader, whose views are ready: no reading, no decoding",
    "memory": "the step fed by the loader, with encoded files held in memory: no reading",
    "warm": "the step fed by the loader, files in the page cache",
    "cold": "the step fed by the loader, files evicted from the page cache before",
    "full": "training as it is: the loader on storage as it was found",
    "loader_memory": "the loader alone, encoded files held in memory",
    "loader_warm": "the loader alone, files in the page cache",
    "loader_full": "the loader alone, on storage as it was found",
}

_WITHOUT_LOADER = ("synthetic", "replay", "local", "replay_h2d")

_FILL = 4
"""Batches thrown away after a switch, at least; as many as there are readers, which begin together and have
to get out of step."""


class Bench:
    """Runs phases of a subject; keeps what one phase leaves for another.

    Args:
        subject: Loader and step to profile.
        steps: Timed steps in a measurement window.
        cold_share: Share of the full run's files that is evicted first: once all were read, all would be
            warm.
    """

    def __init__(self, subject: Subject, *, steps: int, cold_share: float = 0.0) -> None:
        self._subject = subject
        self.steps = steps
        self.warm_up = True
        """Take a step that is not timed in front of each window."""
        self._cold_share = cold_share
        # Batches that may be read before they are asked for.
        self._fill = max(_FILL, subject.settings.num_readers)
        self._ahead = self._fill + subject.settings.num_readers + subject.settings.prefetch + 4
        self.place = subject.start
        """Place where samples begin that no phase has read; another bench may have gone further."""
        if subject.source.can_return:
            _, self.place = subject.source.upcoming(subject.start, self._ahead)
        self._files: list[Extent] = []
        self._round_start, self._round_batches = subject.start, 1
        self._replay: list[Batch] = []
        self._number = 0
        """Number of the last switch, which the batches that come after it carry."""
        self.resident: list[float] = []
        """Share of the files in the page cache as each round found them."""
        self.notes: list[str] = []

    def phases(self) -> list[str]:
        """Phases that can be run here, `full` first: the others use what it read."""
        subject = self._subject
        names = ["full", "synthetic", "replay"]
        names += ["local"] if subject.local else []
        names += ["replay_h2d"] if subject.world.device.type == "cuda" else []
        names += ["interference", "prefetch", "memory", "loader_memory"]
        if subject.source.can_return:
            return [*names, "warm", "cold", "loader_warm"]
        return [*names, "loader_full"]

    def run(self, phase: str) -> Reading:
        """One measurement window of a phase, on every rank at the same time; NVTX tools see its name."""
        if self._subject.world.device.type != "cuda":
            return self._run(phase)
        with torch.cuda.nvtx.range(f"cmae {phase}"):
            return self._run(phase)

    def _run(self, phase: str) -> Reading:
        if phase in _WITHOUT_LOADER:
            wait_until_idle()
        if self._subject.world.world_size > 1:
            dist.barrier()
        runs: dict[str, Callable[[], Reading]] = {
            "full": self._full,
            "synthetic": lambda: self._timed("synthetic", lambda: self._subject.synthetic),
            "replay": lambda: self._timed("replay", self._replayed()),
            "local": self._local,
            "replay_h2d": self._replay_h2d,
            "interference": self._interference,
            "prefetch": self._prefetch,
            "cold": self._cold,
        }
        return runs[phase]() if phase in runs else self._by_loader(phase)

    def _by_loader(self, phase: str) -> Reading:
        alone = phase.startswith("loader_")
        if phase.endswith("memory"):
            self._switch("memory")
        elif phase.endswith("warm"):
            touch(self._files)
            self._switch("storage", start=self._round_start)
        else:
            self._switch("storage")
        return self._fed(phase, alone=alone)

    def _full(self) -> Reading:
        """On samples that no phase has read before; what it reads is what the others get."""
        if not self._subject.source.can_return:
            self._switch("storage", record=True)
        else:
            self._open_round()
            evict(spread_out(self._files, self._cold_share))
            found = resident_fraction(self._unread())
            if found is not None:
                self.resident.append(found)
            self._switch("storage", start=self._round_start, record=True)
        return self._fed("full", keep=not self._replay)

    def _cold(self) -> Reading:
        evict(self._files)
        stayed = resident_fraction(self._unread())
        if stayed is None:
            self._note("this file system does not say what is cached: cold files may be warm")
        elif stayed > 0.1:
            self._note(f"{100 * stayed:.0f} % of the files stayed in the page cache when evicted")
        self._switch("storage", start=self._round_start)
        return self._fed("cold")

    def _prefetch(self) -> Reading:
        self._subject.view_backend.instant = True
        try:
            self._switch("memory")
            return self._fed("prefetch")
        finally:
            self._subject.view_backend.instant = False

    def _interference(self) -> Reading:
        subject = self._subject
        if subject.source.can_return:
            touch(self._files)
            self._switch("storage", start=self._round_start)
        else:
            self._switch("memory")
        replayed = self._replayed()
        with background_consumer(self._on_a_side_stream(self._next_micro_batches)) as release:

            def draw() -> Sequence[Batch]:
                release()
                return replayed()

            self._warm_up(draw)
            return self._timed("interference", draw, loader=True)

    def _local(self) -> Reading:
        assert self._subject.local is not None
        with self._subject.local():
            return self._timed("local", lambda: self._subject.synthetic)

    def _replay_h2d(self) -> Reading:
        host = [_map_tensors(batch, lambda t: t.cpu().pin_memory()) for batch in self._replay]
        copies = _copied_ahead(cycle(host), self._subject.world.device)
        draw = lambda: [next(copies) for _ in range(self._subject.accumulation)]  # noqa: E731
        self._warm_up(draw)
        return self._timed("replay_h2d", draw)

    def _note(self, note: str) -> None:
        if not any(one[-40:] == note[-40:] for one in self.notes):
            self.notes.append(note)

    def _open_round(self) -> None:
        """Choose the samples of this round: those that it takes, and those that are read ahead."""
        count = self._fill + (1 + self.steps) * self._subject.accumulation + self._ahead
        self._round_start, self._round_batches = self.place, count
        self._files, self.place = self._subject.source.upcoming(self.place, count)

    def _unread(self) -> list[Extent]:
        """The round's last files, read ahead at most: to look whether a file is cached caches it."""
        return self._files[-(_FILL * len(self._files) // self._round_batches) :]

    def _switch(
        self, mode: Mode, *, start: LoaderState | None = None, record: bool = False
    ) -> None:
        """Change what the loader does, and drop what it had made before."""
        self._number = self._subject.source.switch(mode, start=start, record=record)
        fresh = 0
        while fresh < self._fill:
            fresh += next(self._subject.loader).state.epoch == self._number

    def _next_micro_batches(self) -> list[Batch]:
        return [next(self._subject.loader) for _ in range(self._subject.accumulation)]

    def _fed(self, phase: str, *, alone: bool = False, keep: bool = False) -> Reading:
        """A window on the loader's batches; without the step when `alone`."""
        if not alone:
            batches = self._warm_up(self._next_micro_batches)
            if keep:
                self._replay = list(batches)
        return self._timed(
            phase, self._next_micro_batches, step=_no_step if alone else None, loader=True
        )

    def _warm_up(self, draw: Callable[[], Sequence[Batch]]) -> Sequence[Batch]:
        batches = draw()
        if self.warm_up:
            self._subject.step(batches)
        return batches

    def _timed(
        self,
        phase: str,
        draw: Callable[[], Sequence[Batch]],
        *,
        step: Step | None = None,
        loader: bool = False,
    ) -> Reading:
        subject = self._subject
        return measure_window(
            phase,
            draw,
            step or subject.step,
            count=self.steps,
            images_per_step=subject.images_per_step,
            synchronise=lambda: synchronise(subject.world.device),
            snapshot=subject.loader.snapshot if loader else None,
        )

    def _replayed(self) -> Callable[[], Sequence[Batch]]:
        batches = cycle(self._replay)
        return lambda: [next(batches) for _ in range(self._subject.accumulation)]

    def _on_a_side_stream(self, take: Callable[[], object]) -> Callable[[], object]:
        """Keep the consumed batches' events away from the stream that trains."""
        device = self._subject.world.device
        if device.type != "cuda":
            return take
        stream = torch.cuda.Stream(device)

        def taken() -> object:
            with torch.cuda.stream(stream):
                return take()

        return taken


def spread_out(extents: Sequence[Extent], share: float) -> list[Extent]:
    """A share of them, evenly from all over."""
    chosen = [
        math.floor((number + 1) * share) > math.floor(number * share)
        for number in range(len(extents))
    ]
    return [extent for extent, is_chosen in zip(extents, chosen, strict=True) if is_chosen]


def _no_step(batches: Sequence[Batch]) -> None:
    """The loader alone."""


def _map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    changed: dict[str, Any] = {
        name: change(value) for name, value in vars(batch).items() if isinstance(value, Tensor)
    }
    return replace(batch, **changed)


def _copied_ahead(host: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device, each copied on a stream of its own while the step before it runs."""
    stream, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def copy() -> Batch:
        with torch.cuda.stream(stream):
            return _map_tensors(next(host), lambda t: t.to(device, non_blocking=True))

    ahead = copy()
    while True:
        main.wait_stream(stream)
        ready, ahead = ahead, copy()
        for value in vars(ready).values():
            if isinstance(value, Tensor):
                value.record_stream(main)
        yield ready
