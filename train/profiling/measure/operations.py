"""What each operation on an image costs: views up to one operation, views up to the next, and the difference.

Counters inside the decoder cannot tell operations apart, and DALI's run on threads that nobody can watch. The
difference between two graphs, of which one has an operation more, needs neither.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any, Literal

import numpy as np
import torch

from cmae.kernels import color_jitter
from cmae.pipeline import LoaderConfig, ViewConfig, ViewParams, draw_view_params
from cmae.pipeline.formats.images.jpeg import JpegKind
from cmae.pipeline.loader.factory import open_views
from cmae.pipeline.sources.records import RawBatch, Record
from cmae.pipeline.views.backend import ViewBackend
from cmae.pipeline.views.config import ViewStep
from cmae.train.loop.loader_settings import LoaderSettings
from cmae.train.profiling.analysis.bootstrap import estimates
from cmae.train.profiling.analysis.records import Operation
from cmae.train.profiling.measure.timing import process_cpu_s

_WINDOW_S = 0.25
"""Time of a window with all operations."""

_GROUP = 32
"""Images of one kind and size that are timed together, at most."""

_MEGAPIXEL_EDGES = (0.1, 0.25, 0.5, 1.0, 4.0)
"""Upper ends of the size classes; the last class has none."""

_Job = tuple[RawBatch, ViewParams]


@dataclass(frozen=True)
class _Prefix:
    """All operations up to one, `name`."""

    name: str
    last_step: ViewStep
    left_out: tuple[Literal["grayscale", "blur_sigma"], ...] = ()
    """Colour operations that come after it."""

    def jobs(self, jobs: Sequence[_Job]) -> list[_Job]:
        """The same batches, without the parameters of what is left out."""
        return [
            (raw, replace(params, **{name: 0 * getattr(params, name) for name in self.left_out}))
            for raw, params in jobs
        ]


_GEOMETRY = (
    _Prefix("decode", "decode"),
    _Prefix("resize, flip", "resize"),
    _Prefix("crop", "crop"),
)
_COLOR = (
    _Prefix("colour jitter", "color", ("grayscale", "blur_sigma")),
    _Prefix("grayscale", "color", ("blur_sigma",)),
    _Prefix("blur", "color"),
)


def measure_operations(
    views: ViewConfig,
    recorded: Sequence[RawBatch],
    *,
    device: torch.device,
    backend: Literal["auto", "cpu", "dali"],
    settings: LoaderSettings,
    rounds: int = 7,
) -> tuple[Operation, ...]:
    """Time the views of encoded files in memory, made up to each operation, in turn.

    Args:
        views: Views to make.
        recorded: Encoded files; batches with one that cannot be decoded are left out.
        device: Device of the views.
        backend: Backend that makes them.
        settings: Threads and queues of the loader.
        rounds: Repetitions of each prefix.

    Returns:
        One for each operation, in their order; empty where no batch can be decoded.
    """
    prefixes = (*_GEOMETRY, *(_COLOR if views.has_color else ()))
    config = _loader_config(views, backend, settings, max(len(raw.records) for raw in recorded))
    with ExitStack() as stack:
        backends = {
            one.name: open_views(config, device, last_step=one.last_step, color_op=color_jitter)
            for one in prefixes
        }
        for view_backend in backends.values():
            stack.callback(view_backend.close)
        jobs = _choose(
            backends[prefixes[-1].name], [(raw, _params(views, raw)) for raw in recorded]
        )
        if not jobs:
            return ()
        # The first is not counted: allocations, caches.
        every = [
            {one.name: _time(backends[one.name], one.jobs(jobs), device) for one in prefixes}
            for _ in range(rounds + 1)
        ][1:]
    names = [one.name for one in prefixes]
    return _differences(names, {name: [each[name] for each in every] for name in names})


def measure_slow_images(
    views: ViewConfig,
    recorded: Sequence[RawBatch],
    *,
    device: torch.device,
    backend: Literal["auto", "cpu", "dali"],
    settings: LoaderSettings,
) -> tuple[dict[str, Any], ...]:
    """Time the views of encoded files in memory by JPEG kind and size, the slowest first.

    Args:
        views: Views to make.
        recorded: Encoded files; one that cannot be decoded is counted with its kind.
        device: Device of the views.
        backend: Backend that makes them.
        settings: Threads and queues of the loader.

    Returns:
        For each group `jpeg_kind`, `megapixels` and `megapixels_up_to` (None = no limit), `items`, and `ms`,
        the time of an image when its group alone is decoded by all threads.
    """
    groups: dict[tuple[int, int], list[Record]] = {}
    for record in (record for raw in recorded for record in raw.records):
        size = bisect(_MEGAPIXEL_EDGES, record.height * record.width / 1e6)
        groups.setdefault((record.kind, size), []).append(record)
    config = _loader_config(views, backend, settings, _GROUP)
    view_backend = open_views(config, device, color_op=color_jitter)
    rows: list[dict[str, Any]] = []
    try:
        for (kind, size), records in groups.items():
            raw = _raw_batch(records[:_GROUP], recorded[0])
            job = (raw, _params(views, raw))
            wall_ms = [_time(view_backend, [job], device).wall_ms for _ in range(4)]
            low, high = ((0.0, *_MEGAPIXEL_EDGES, None)[number] for number in (size, size + 1))
            name = JpegKind(kind).name.lower()
            found: dict[str, Any] = {"items": len(records), "ms": statistics.median(wall_ms[1:])}
            rows.append({"jpeg_kind": name, "megapixels": low, "megapixels_up_to": high} | found)
    finally:
        view_backend.close()
    return tuple(sorted(rows, key=lambda row: -row["ms"]))


def _loader_config(
    views: ViewConfig,
    backend: Literal["auto", "cpu", "dali"],
    settings: LoaderSettings,
    batch_size: int,
) -> LoaderConfig:
    return LoaderConfig(
        views=views,
        view_backend=backend,
        batch_size=batch_size,
        num_threads=settings.num_threads,
        hw_decoder_load=settings.hw_decoder_load,
    )


def _raw_batch(records: list[Record], like: RawBatch) -> RawBatch:
    ids = np.array([record.sample_id for record in records], dtype=np.int64)
    return replace(like, records=records, sample_id=ids, bad=[], num_own=len(records))


@dataclass(frozen=True)
class _Reading:
    cpu_ms: float
    """CPU time of the process for an image."""
    wall_ms: float


def _params(views: ViewConfig, raw: RawBatch) -> ViewParams:
    return draw_view_params(
        views,
        seed=0,
        epoch=raw.epoch,
        sample_id=raw.sample_id,
        height=raw.height,
        width=raw.width,
    )


def _choose(view_backend: ViewBackend, jobs: Sequence[_Job]) -> list[_Job]:
    """As many batches as take about `_WINDOW_S`, at least two; again and again where there are too few."""
    good = [job for job in jobs[:16] if not _run(view_backend, [job])]
    if not good:
        return []
    begun = time.perf_counter()
    _run(view_backend, good)
    seconds = (time.perf_counter() - begun) / len(good)
    count = max(2, min(200, round(_WINDOW_S / seconds)))
    return list(islice(cycle(good), count))


def _run(view_backend: ViewBackend, jobs: Sequence[_Job]) -> int:
    """Make the views of all batches as the loader does; the number of files that could not be decoded."""
    in_flight: deque[Any] = deque()
    bad = 0
    for raw, params in jobs:
        in_flight.append(view_backend.submit(raw.encoded, params))
        if len(in_flight) >= view_backend.depth(len(raw.records)):
            bad += len(view_backend.collect(in_flight.popleft()).bad)
    return bad + sum(len(view_backend.collect(job).bad) for job in in_flight)


def _time(view_backend: ViewBackend, jobs: Sequence[_Job], device: torch.device) -> _Reading:
    images = sum(len(raw.records) for raw, _ in jobs)
    begun, cpu_s = time.perf_counter(), process_cpu_s()
    _run(view_backend, jobs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall_ms = 1000 * (time.perf_counter() - begun) / images
    return _Reading(1000 * (process_cpu_s() - cpu_s) / images, wall_ms)


def _differences(
    names: Sequence[str], readings: dict[str, list[_Reading]]
) -> tuple[Operation, ...]:
    def subtract(medians: dict[str, float]) -> dict[str, float]:
        values = [0.0, *(medians[name] for name in names)]
        return {name: b - a for name, a, b in zip(names, values, values[1:], strict=False)}

    cpu = estimates({name: [one.cpu_ms for one in readings[name]] for name in names}, subtract)
    wall = estimates({name: [one.wall_ms for one in readings[name]] for name in names}, subtract)
    up_to = {name: float(np.median([one.wall_ms for one in readings[name]])) for name in names}
    return tuple(Operation(name, cpu[name], wall[name], 1000 / up_to[name]) for name in names)
