"""The loader: shards in, batches of views and masks out, ready on the device."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch

from cmae.pipeline.batch import Batch, LoaderState
from cmae.pipeline.counters import LoaderSnapshot, State
from cmae.pipeline.dataset_index import DatasetIndex
from cmae.pipeline.feed import DrawMask, Feed, ViewMaker
from cmae.pipeline.graph import GraphViews
from cmae.pipeline.health import Health
from cmae.pipeline.host import HostViews
from cmae.pipeline.index import index_path
from cmae.pipeline.plan import EpochPlan
from cmae.pipeline.sources import IndexedSource, Source, StreamSource
from cmae.pipeline.urls import expand_shards, is_local
from cmae.pipeline.views import ViewConfig

Wrap = Callable[[Source, ViewMaker], tuple[Source, ViewMaker]]


class Loader:
    """Endless iterator over one rank's batches; epochs follow one another.

    Nothing is computed in the calling thread: `next` takes a finished batch from a queue. Close it, or use
    it as a context manager; a loader that is only dropped closes itself.
    """

    num_samples: int | None
    """Samples in the data set; None for a stream."""
    steps_per_epoch: int | None
    """Optimiser steps in an epoch, equal on every rank; None for a stream."""

    def __init__(
        self, source: Source, maker: ViewMaker, *, feed: Feed, health: Health, state: LoaderState
    ) -> None:
        self.num_samples = source.num_samples
        self.steps_per_epoch = source.steps_per_epoch
        self._source = source
        self._maker = maker
        self._feed = feed
        self._health = health
        self._state = state
        self._num_batches = 0
        self._finalizer = weakref.finalize(self, feed.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: Too many bad samples, or a shard that cannot be read.
        """
        ready = self._feed.get()
        if ready.event is not None:
            _hand_over(ready.batch, ready.event)
        self._health.add(len(ready.batch.label), ready.bad)
        self._num_batches += 1
        self._state = ready.batch.state
        return ready.batch

    @property
    def state(self) -> LoaderState:
        """The position after the last batch handed out; batches made ahead do not count."""
        return self._state

    @property
    def bad_samples(self) -> int:
        """Bad records behind the batches handed out so far."""
        return self._health.bad_samples

    @property
    def wait_s(self) -> float:
        """Seconds that `next` was blocked so far."""
        return self._feed.ready.seconds(State.STARVED)

    def snapshot(self) -> LoaderSnapshot:
        """All counters as of now; may be called from any thread at any time.

        The stages count batches made ahead; `batches`, `samples` and `bad_samples` those handed out.
        """
        time_s, depth = self._feed.depth.read()
        finish, ready = self._feed.stage.snapshot(), self._feed.ready.snapshot()
        ready = replace(
            ready, blocked_s=finish.blocked_s
        )  # the feed's: the same wait, seen from the queue
        stages = (self._source.stage.snapshot(), self._maker.stage.snapshot(), finish, ready)
        return LoaderSnapshot(
            time_s=time_s,
            stages={stage.name: stage for stage in stages},
            batches=self._num_batches,
            samples=ready.items,
            wait_s=ready.starved_s,
            queue_depth_mean=depth,
            bad_samples=self.bad_samples,
            views_by_kind={} if self._maker.kinds is None else self._maker.kinds.snapshot(),
        )

    def close(self) -> None:
        """Stop and join all threads. May be called again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _hand_over(batch: Batch, event: torch.cuda.Event) -> None:
    """Order the caller's stream after the feed's, and keep memory from reuse until its work is done."""
    stream = torch.cuda.current_stream(batch.online.device)
    stream.wait_event(event)
    for name in ("online", "target", "ids_keep", "ids_mask", "sample_index", "label"):
        tensor = getattr(batch, name)
        if tensor is not None:
            tensor.record_stream(stream)


def build_loader(
    shards: str | Path | Sequence[str | Path],
    views: ViewConfig,
    *,
    batch_size: int,
    global_batch_size: int,
    draw_mask: DrawMask,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    num_threads: int | None = None,
    prefetch: int = 2,
    state: LoaderState | None = None,
    shuffle: bool = True,
    source: Literal["auto", "indexed", "stream"] = "auto",
    backend: Literal["auto", "dali", "host"] = "auto",
    hw_decoder_load: float = 0.65,
    ledger: Path | None = None,
    max_bad_fraction: float = 0.01,
    probation: int = 1000,
    check_crc: bool = True,
    wrap: Wrap | None = None,
) -> Loader:
    """Open shards and start reading.

    Args:
        shards: tars, patterns or URLs; see `expand_shards`.
        views: what the views are.
        batch_size: images in a batch of this rank.
        global_batch_size: images in an optimiser step over all ranks; a multiple of world_size * batch_size.
        draw_mask: called in the background with (sample_index on the device, epoch).
        rank: of this process.
        world_size: number of ranks.
        seed: of order, views and masks.
        device: where batches are put.
        num_threads: CPU threads that decode; None = one per core this process may use.
        prefetch: ready batches kept ahead.
        state: where to continue; None = the beginning.
        shuffle: draw a new order in every epoch.
        source: 'indexed' needs a sidecar index for every shard, 'stream' none; 'auto' looks.
        backend: 'dali' or 'host' make the views; 'auto' is DALI on CUDA and the faster host way on a CPU.
        hw_decoder_load: share of the JPEGs for the GPU's decoder unit; the best value differs by machine.
        ledger: JSON lines file for bad records.
        max_bad_fraction: raise DataError above this fraction of bad records.
        probation: samples before that fraction is looked at.
        check_crc: compare files with the CRC32 in the index.
        wrap: gets the source and the view maker and returns what the loader uses instead (the profiler puts
            its switches there).

    Raises:
        ValueError: A size, the state or the shard list does not fit; the message names the repair.
        FileNotFoundError: source='indexed' and a shard has no index.
        StaleIndexError: An index was made for another tar.
    """
    device = torch.device(device)
    _check_sizes(batch_size, global_batch_size, rank=rank, world_size=world_size, prefetch=prefetch)
    paths = expand_shards(shards)
    health = Health(ledger=ledger, max_bad_fraction=max_bad_fraction, probation=probation)
    place = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
    opened: Source
    if _is_indexed(source, paths):
        index = DatasetIndex.load(paths)
        plan = EpochPlan(len(index), global_batch_size, seed=seed, shuffle=shuffle)
        opened = IndexedSource(index, plan=plan, check_crc=check_crc, **place)
    else:
        opened = StreamSource(paths, seed=seed, shuffle=shuffle, **place)
    if state is None:
        state = LoaderState(seed, epoch=0, next_sample=0, digest=opened.digest)
    _check_state(state, seed=seed, digest=opened.digest)
    threads = num_threads or len(os.sched_getaffinity(0))
    backend = _pick_backend(backend, device)
    maker: ViewMaker = (
        HostViews(views, num_threads=threads)
        if backend == "host"
        else GraphViews(
            views,
            device,
            batch_size=batch_size,
            num_threads=threads,
            hw_decoder_load=hw_decoder_load,
        )
    )
    if wrap is not None:
        opened, maker = wrap(opened, maker)
    feed = Feed(
        opened,
        maker,
        views=views,
        draw_mask=draw_mask,
        device=device,
        state=state,
        prefetch=prefetch,
    )
    return Loader(opened, maker, feed=feed, health=health, state=state)


def _pick_backend(
    backend: Literal["auto", "dali", "host"], device: torch.device
) -> Literal["dali", "host"]:
    if backend == "auto":
        return "dali" if device.type == "cuda" else "host"
    if backend not in ("dali", "host"):
        raise ValueError(f"backend={backend!r} must be auto, dali or host")
    if backend == "host" and device.type != "cpu":
        raise ValueError(f"backend='host' makes views on the CPU; device={device} needs 'dali'")
    return backend


def _is_indexed(source: str, paths: Sequence[str]) -> bool:
    if source not in ("auto", "indexed", "stream"):
        raise ValueError(f"source={source!r} must be auto, indexed or stream")
    if source != "auto":
        return source == "indexed"
    return all(is_local(path) and index_path(path).exists() for path in paths)


def _check_sizes(
    batch_size: int, global_batch_size: int, *, rank: int, world_size: int, prefetch: int
) -> None:
    if batch_size < 1 or prefetch < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size={batch_size} and prefetch={prefetch} must be at least 1, and rank={rank} "
            f"in 0..{world_size - 1} (world_size={world_size})"
        )
    if global_batch_size % (world_size * batch_size):
        raise ValueError(
            f"global_batch_size={global_batch_size} must be a multiple of world_size * batch_size = "
            f"{world_size} * {batch_size}: an optimiser step is a whole number of batches of every rank"
        )


def _check_state(state: LoaderState, *, seed: int, digest: str) -> None:
    if state.seed != seed:
        raise ValueError(
            f"the state to continue from has seed={state.seed}, the loader seed={seed}: order, views and "
            f"masks would change in the middle of the run. Set seed={state.seed}, or start a new run"
        )
    if state.digest != digest:
        raise ValueError(
            f"the state to continue from belongs to other data (digest {state.digest}) than the shards "
            f"given now ({digest}). Give the same shards in the same order, or start a new run"
        )
