"""The loader: an endless iterator over one rank's batches, with its state and its counters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from cmae.pipeline.bad_samples import Health, NoGoodSamplesError
from cmae.pipeline.batch import Batch, DrawMask, LoaderState
from cmae.pipeline.loader.config import LoaderConfig
from cmae.pipeline.loader.prefetcher import Prefetcher
from cmae.pipeline.sources.difference import ShardFacts
from cmae.pipeline.sources.records import Source
from cmae.pipeline.stage_stats import LoaderSnapshot, State
from cmae.pipeline.views.backend import ViewBackend
from cmae.pipeline.views.decode_check import DecodeChoice

Wrap = Callable[[Source, ViewBackend], tuple[Source, ViewBackend]]


class Loader:
    """Endless iterator over one rank's batches; epochs follow one another.

    Nothing is computed in the calling thread: `next` takes a finished batch from a queue. Close it, or use
    it as a context manager; a loader that is only dropped closes itself.

    Args:
        source: Encoded samples, batch by batch; closed with the loader.
        view_backend: Maker of the views; closed with the loader.
        config: Views, and the number of batches made ahead.
        device: Device on which batches are put.
        state: Place in the data at which to begin.
        health: Record of bad samples.
        draw_mask: Drawer of masks, called in the background; None = batches without masks.
        downscaled: Line for the attribute of that name.
        decode: Value of the attribute of that name.
        shards: Value of the attribute of that name.
    """

    num_samples: int | None
    """Samples in the data set; None for a stream."""
    steps_per_epoch: int | None
    """Optimiser steps in an epoch, equal on every rank; None for a stream."""
    downscaled: str
    """Says which of the images are not the original files (`cmae shards write --max-size`); '' if all are."""
    decode: DecodeChoice | None
    """How JPEGs are decoded for a GPU; None on a CPU."""
    shards: tuple[ShardFacts, ...]
    """The shards in their order; a checkpoint keeps them, so that a later difference can be named."""

    def __init__(
        self,
        source: Source,
        view_backend: ViewBackend,
        *,
        config: LoaderConfig,
        device: torch.device,
        state: LoaderState,
        health: Health,
        draw_mask: DrawMask | None = None,
        downscaled: str = "",
        decode: DecodeChoice | None = None,
        shards: Sequence[ShardFacts] = (),
    ) -> None:
        self.num_samples = source.num_samples
        self.steps_per_epoch = source.steps_per_epoch
        self.downscaled = downscaled
        self.decode = decode
        self.shards = tuple(shards)
        self._source = source
        self._view_backend = view_backend
        self._prefetcher = Prefetcher(
            source,
            view_backend,
            views=config.views,
            draw_mask=draw_mask,
            device=device,
            state=state,
            prefetch=config.prefetch,
        )
        self._health = health
        self._state = state
        self._num_batches = 0
        self._finalizer = weakref.finalize(self, self._prefetcher.close)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: Too many bad samples, or a shard that cannot be read.
        """
        try:
            queued = self._prefetcher.get()
        except NoGoodSamplesError as error:
            # No batch will carry them to the ledger.
            self._health.add(0, error.bad)
            raise
        if queued.event is not None:
            _hand_over(queued.batch, queued.event)
        self._health.add(len(queued.batch.label), queued.bad)
        self._num_batches += 1
        self._state = queued.batch.state
        return queued.batch

    @property
    def state(self) -> LoaderState:
        """The place in the data after the last batch handed out; batches made ahead do not count."""
        return self._state

    @property
    def bad_samples(self) -> int:
        """Bad records behind the batches handed out so far."""
        return self._health.bad_samples

    @property
    def wait_s(self) -> float:
        """Seconds that `next` was blocked so far."""
        return self._prefetcher.queue_stage.seconds(State.STARVED)

    def snapshot(self) -> LoaderSnapshot:
        """All counters as of now; may be called from any thread at any time.

        The stages count batches made ahead; `batches`, `samples` and `bad_samples` those handed out.
        """
        time_s, depth = self._prefetcher.depth.read()
        prefetch, queue = self._prefetcher.stage.snapshot(), self._prefetcher.queue_stage.snapshot()
        # The prefetcher's: the same wait, seen from the queue.
        queue = replace(queue, blocked_s=prefetch.blocked_s)
        first = (self._source.stage.snapshot(), self._view_backend.stage.snapshot())
        return LoaderSnapshot(
            time_s=time_s,
            stages={stage.name: stage for stage in (*first, prefetch, queue)},
            batches=self._num_batches,
            samples=queue.items,
            wait_s=queue.starved_s,
            queue_depth_mean=depth,
            bad_samples=self.bad_samples,
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
    """Order the caller's stream after the prefetcher's, and keep memory from reuse until its work is done."""
    stream = torch.cuda.current_stream(batch.online.device)
    stream.wait_event(event)
    for name in ("online", "target", "ids_keep", "ids_mask", "sample_id", "label"):
        tensor = getattr(batch, name)
        if tensor is not None:
            tensor.record_stream(stream)
