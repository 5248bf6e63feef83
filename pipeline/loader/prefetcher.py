"""The prefetcher: raw batches become finished batches in a thread of their own, ahead of the training."""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from cmae.pipeline.bad_samples import (
    MAX_BAD_RUN,
    BadSample,
    NoGoodSamplesError,
    describe_bad,
)
from cmae.pipeline.batch import Batch, DrawMask, LoaderState, upload
from cmae.pipeline.errors import DataError
from cmae.pipeline.sources.records import RawBatch, Source
from cmae.pipeline.stage_stats import QueueDepth, Stage, State
from cmae.pipeline.views.backend import ViewBackend, Views
from cmae.pipeline.views.config import ViewConfig
from cmae.pipeline.views.params import draw_view_params
from cmae.printable import printable

DECODE_DEADLINE_S = 180.0
"""Longest time that decoding one batch may take; a malformed file has hung decoders for ever."""


_MOST_NAMES = 512


@dataclass(frozen=True)
class QueuedBatch:
    """A finished batch; on CUDA `event` says when its tensors may be read."""

    batch: Batch
    bad: list[BadSample]
    event: torch.cuda.Event | None
    num_bytes: int


def _first_of(bad: Sequence[BadSample]) -> str:
    if not bad:
        return ""
    return f"The first: {describe_bad(bad[0])}. "


class Prefetcher:
    """Owns the thread between the source and the training step.

    The queue holds `prefetch` finished batches, so memory is bounded and the thread sleeps when training is
    slower. An exception in any background thread ends it and comes out of `get`.

    Args:
        source: Encoded samples, batch by batch; closed with the prefetcher.
        view_backend: Maker of the views; closed with the prefetcher.
        views: Configuration of the views.
        draw_mask: Drawer of masks; None = batches without masks.
        device: Device on which batches are put.
        state: Place in the data at which to begin.
        prefetch: Finished batches in the queue.
    """

    def __init__(
        self,
        source: Source,
        view_backend: ViewBackend,
        *,
        views: ViewConfig,
        draw_mask: DrawMask | None,
        device: torch.device,
        state: LoaderState,
        prefetch: int,
    ) -> None:
        self._source = source
        self._view_backend = view_backend
        self._views = views
        self._draw_mask = draw_mask
        self._device = device
        # Ahead of the training's kernels: what little the views take there is what the next step waits for.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._queue: queue.Queue[QueuedBatch | BaseException] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._decoding: tuple[float, RawBatch] | None = None
        """When the batch that is being waited for was begun to be waited for."""
        self._seed = state.seed
        self.stage = Stage("prefetch", threads=1, first_state=State.STARVED)
        self.queue_stage = Stage("queue", threads=1, first_state=State.AWAY)
        self.depth = QueueDepth()
        view_backend.stage.downstream = self.stage
        # A thread that asks for the first time gets the number that was set last, by any thread: ask here and
        # now, or the workers' 1 would become the training thread's number too.
        torch.get_num_threads()
        self._thread = threading.Thread(
            target=self._run, args=(state,), name="cmae-prefetch", daemon=True
        )
        self._thread.start()
        # DALI takes its pipelines down when the interpreter exits; the thread has to be gone by then.
        atexit.register(self.close)

    def get(self) -> QueuedBatch:
        """The next batch; blocks.

        Raises:
            Exception: Whatever a background thread died of.
            DataError: A batch is not decoded within DECODE_DEADLINE_S.
            RuntimeError: The loader is closed.
        """
        start = time.perf_counter()
        self.queue_stage.switch(State.STARVED)
        try:
            queued = self._wait()
        finally:
            self.queue_stage.switch(State.AWAY)
        if not isinstance(queued, QueuedBatch):
            self._put(queued)  # the next call gets it too
            raise queued
        self.depth.add(-1)
        latency_s = time.perf_counter() - start
        size = len(queued.batch.label)
        self.queue_stage.add(items=size, num_bytes=queued.num_bytes, latencies_s=[latency_s])
        return queued

    def _wait(self) -> QueuedBatch | BaseException:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=0.5)  # wakes now and then: Ctrl-C gets through
            if (hung := self._hung_batch()) is not None:
                raise DataError(_name_hung(hung))
        raise RuntimeError("the loader is closed")

    def close(self) -> None:
        """Stop and join the thread, then release the workers. May be called again."""
        atexit.unregister(self.close)
        self._stop.set()
        self._source.close()  # first: the thread may be waiting for a read that takes minutes
        self._view_backend.cancel()  # or for a large batch
        while self._thread.is_alive():
            self._thread.join(timeout=1)
            if self._hung_batch() is not None:
                return  # the decoder will not come back, and nothing of it can be released
        self._view_backend.close()

    def _hung_batch(self) -> RawBatch | None:
        """The batch whose decoding takes too long, if one does."""
        decoding = self._decoding
        if decoding is None or time.perf_counter() - decoding[0] < DECODE_DEADLINE_S:
            return None
        return decoding[1]

    def _run(self, state: LoaderState) -> None:
        # Small work beside the decoding threads: a parallel region would only wait for their cores.
        torch.set_num_threads(1)
        try:
            with torch.cuda.stream(self._stream):  # None on a CPU: does nothing
                self._produce(state)
        except BaseException as error:
            self._put(error)

    def _produce(self, state: LoaderState) -> None:
        in_flight: deque[tuple[RawBatch, Any]] = deque()
        for raw in self._source.batches(state):
            self.stage.switch(State.BUSY)
            in_flight.append((raw, self._submit(raw)))
            if len(in_flight) == self._view_backend.depth(len(raw.records)):
                queued = self._finish(*in_flight.popleft())
                self.stage.switch(State.BLOCKED)
                self._put(queued)
            if self._stop.is_set():
                return
            self.stage.switch(State.STARVED)

    def _submit(self, raw: RawBatch) -> Any:
        params = draw_view_params(
            self._views,
            seed=self._seed,
            epoch=raw.epoch,
            sample_id=raw.sample_id,
            height=raw.height,
            width=raw.width,
        )
        return self._view_backend.submit(raw.encoded, params)

    def _collect(self, raw: RawBatch, job: Any) -> Views:
        self.stage.switch(State.STARVED)
        self._decoding = (time.perf_counter(), raw)
        views = self._view_backend.collect(job)
        self._decoding = None
        self.stage.switch(State.BUSY)
        return views

    def _finish(self, raw: RawBatch, job: Any) -> QueuedBatch:
        start = time.perf_counter()
        views = self._collect(raw, job)
        num_in_row = 0
        while views.bad:
            before, num_in_row = len(views.bad), num_in_row + len(views.bad)
            self._replace(raw, views.bad, num_in_row)
            views = self._collect(raw, self._submit(raw))
            if len(views.bad) < before:
                num_in_row = 0
        assert views.online is not None
        sample_id = self._upload(raw.sample_id)
        ids_keep, ids_mask = None, None
        if self._draw_mask is not None:
            ids_keep, ids_mask = self._draw_mask(sample_id, raw.epoch)
        batch = Batch(
            online=views.online,
            target=views.target,
            ids_keep=ids_keep,
            ids_mask=ids_mask,
            sample_id=sample_id,
            label=self._upload(raw.label),
            epoch=raw.epoch,
            state=raw.state,
        )
        event = None if self._stream is None else self._stream.record_event()
        tensors = (value for value in vars(batch).values() if isinstance(value, Tensor))
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        latency_s = time.perf_counter() - start
        self.stage.add(items=len(batch.label), num_bytes=num_bytes, latencies_s=[latency_s])
        return QueuedBatch(batch, raw.bad, event, num_bytes)

    def _replace(self, raw: RawBatch, bad: dict[int, str], num_in_row: int) -> None:
        """Fill the slots of what cannot be decoded.

        Args:
            raw: The batch.
            bad: Reasons by slot.
            num_in_row: Records that failed since one did not.

        Raises:
            NoGoodSamplesError: There is nothing to fill them with, or all the substitutes so far failed too.
        """
        try:
            self._source.replace(raw, bad)
        except NoGoodSamplesError as error:
            raise NoGoodSamplesError(str(error), raw.bad) from error
        if num_in_row > MAX_BAD_RUN:
            raise NoGoodSamplesError(
                f"{num_in_row} samples in a row cannot be decoded, more than the limit of {MAX_BAD_RUN}. "
                f"{_first_of(raw.bad)}Check them with `cmae shards verify --decode pil`, make the indices "
                "anew with `cmae shards index --rebuild true`, or try another data.view_backend",
                raw.bad,
            )

    def _upload(self, array: Int64[np.ndarray, " B"]) -> Int64[Tensor, " B"]:
        return upload(torch.from_numpy(array), self._device)

    def _put(self, item: QueuedBatch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                self.depth.add(1 if isinstance(item, QueuedBatch) else 0)
                return
            except queue.Full:
                continue


def _name_hung(raw: RawBatch) -> str:
    names = [
        f"shard {record.shard}, record {record.record_number}: {printable(record.key)}"
        for record in raw.records
    ]
    shown = "\n  ".join(names[:_MOST_NAMES])
    more = f"\n  and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (
        f"decoding one batch has taken more than {DECODE_DEADLINE_S:.0f} s: the decoder hangs. One of these "
        "files is why (shards counted from 0); `cmae shards verify --decode nvimgcodec` tries them one by "
        f"one, and `--data.gpu_decode cpu` decodes without the GPU:\n  {shown}{more}"
    )
