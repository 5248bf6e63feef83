"""Views on CPU cores: nvImageCodec decodes the window, torch's uint8 antialiased resize makes the master.

Twice the rate of DALI's CPU graph from the same parameters (docs/design/0003-colour-chain.md); the decoded
pixels are Pillow's to the bit. Every sample is made by one thread from bytes to finished views.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from cmae.pipeline.buffer_pool import BufferPool
from cmae.pipeline.stage_stats import KindTable, Stage, State
from cmae.pipeline.views.backend import UNDECODABLE, Views, WindowDecoder
from cmae.pipeline.views.color_image import ImageColor
from cmae.pipeline.views.config import ViewConfig, ViewStep
from cmae.pipeline.views.params import ViewParams


@dataclass(frozen=True)
class _Job:
    online: UInt8[Tensor, "B H W 3"]
    target: UInt8[Tensor, "B H W 3"] | None
    futures: list[Future[dict[int, str]]]


class CpuViews:
    """Makes batches of views in a pool of threads.

    Args:
        views: what the views are.
        num_threads: of the pool.
        last_step: leave what comes after this operation out, and the pixels undefined. For measurements.
    """

    def __init__(
        self, views: ViewConfig, *, num_threads: int, last_step: ViewStep = "color"
    ) -> None:
        self._views = views
        self._last_step = last_step
        self._num_threads = num_threads
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(
            num_threads, thread_name_prefix="cmae-views", initializer=self._start_worker
        )
        self._buffers = BufferPool()
        self.stage = Stage("decode_augment", threads=num_threads)
        self.kinds = KindTable()
        self._is_cancelled = False

    def depth(self, batch_size: int) -> int:
        """The batch waited for, and as many more as hold four images for each thread.

        Batches are collected in order: while one is waited for, the threads live on those behind it.
        """
        return 1 + math.ceil(4 * self._num_threads / batch_size)

    def submit(
        self,
        encoded: Sequence[UInt8[np.ndarray, " n"]],
        params: ViewParams,
        *,
        cells: Int64[np.ndarray, " B"] | None = None,
    ) -> _Job:
        """Start a batch; `cells` of `kinds` are where its images count.

        What was handed out before and is still referenced is never written again.
        """
        batch_size = len(encoded)
        online = self._empty_batch(batch_size)
        target = self._empty_batch(batch_size) if self._views.has_target else None
        stride = max(1, batch_size // (4 * self._num_threads))
        futures = [
            self._pool.submit(
                self._run,
                range(i, min(i + stride, batch_size)),
                cells,
                encoded,
                params,
                online,
                target,
            )
            for i in range(0, batch_size, stride)
        ]
        return _Job(
            torch.from_numpy(online), None if target is None else torch.from_numpy(target), futures
        )

    def collect(self, job: _Job) -> Views:
        """Wait for a batch."""
        bad: dict[int, str] = {}
        for future in job.futures:
            bad |= future.result()
        return Views(job.online, job.target, bad)

    def cancel(self) -> None:
        """Drop work that has not begun; batches under way end at their next sample."""
        self._is_cancelled = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _empty_batch(self, batch_size: int) -> UInt8[np.ndarray, "B S S 3"]:
        shape = (batch_size, self._views.img_size, self._views.img_size, 3)
        return self._buffers.take(math.prod(shape)).reshape(shape)

    def _start_worker(self) -> None:
        # One thread a sample: a parallel region inside would only fight the other samples for cores.
        torch.set_num_threads(1)
        self._local.worker = _Worker(self._views, last_step=self._last_step)

    def _run(
        self, samples: range, cells: Int64[np.ndarray, " B"] | None, *work: Any
    ) -> dict[int, str]:
        """Make the views of some samples of a batch, and count them."""
        self.stage.switch(State.BUSY)
        times = [time.perf_counter()]
        bad = self._make(samples, times, *work)
        seconds = np.diff(times)
        num_bytes = self._views.num_views * 3 * self._views.img_size**2 * len(samples)
        self.stage.add(items=len(samples), num_bytes=num_bytes, latencies_s=seconds)
        if cells is not None:
            self.kinds.add(cells[samples.start : samples.stop], seconds)
        self.stage.switch(State.IDLE)
        return bad

    def _make(
        self,
        samples: range,
        times: list[float],
        encoded: Sequence[UInt8[np.ndarray, " n"]],
        params: ViewParams,
        online: UInt8[np.ndarray, "B S S 3"],
        target: UInt8[np.ndarray, "B S S 3"] | None,
    ) -> dict[int, str]:
        bad = {}
        for i in samples:
            if self._is_cancelled:
                raise CancelledError
            out = None if target is None else target[i]
            if not self._local.worker.make(encoded[i], params, row=i, online=online[i], target=out):
                bad[i] = UNDECODABLE
            times.append(time.perf_counter())
        return bad


class _Worker:
    """What one thread needs to make views: a decoder must not be shared, nor working memory."""

    def __init__(self, views: ViewConfig, *, last_step: ViewStep) -> None:
        self._views = views
        self._last_step = last_step
        self._decoder = WindowDecoder()
        has_color = views.has_color and last_step == "color"
        self._color = ImageColor(views.img_size) if has_color else None

    def make(
        self,
        encoded: UInt8[np.ndarray, " n"],
        params: ViewParams,
        *,
        row: int,
        online: UInt8[np.ndarray, "S S 3"],
        target: UInt8[np.ndarray, "S S 3"] | None,
    ) -> bool:
        """Write both views of one sample; False when it cannot be decoded."""
        views = self._views
        master = self._window(encoded, params.crop[row], views.source_crop_size, params.flip[row])
        own = master
        if views.has_own_target_crop:
            flip = params.target_flip[row]
            own = self._window(encoded, params.target_crop[row], views.img_size, flip)
        if master is None or own is None:
            return False
        if self._last_step in ("decode", "resize"):
            return True
        online[...] = _cut(master, params.online_offset[row], views.img_size)
        if target is None:
            return True
        cut = _cut(own, params.target_offset[row], views.img_size)
        if self._color is None:
            target[...] = cut
        else:
            self._color.apply(cut, params, row=row, mode=views.color, out=target)
        return True

    def _window(
        self, encoded: UInt8[np.ndarray, " n"], crop: Int32[np.ndarray, " 4"], size: int, flip: bool
    ) -> UInt8[np.ndarray, "s s 3"] | None:
        window = self._decoder.decode(encoded, crop)
        if window is None:
            return None
        if self._last_step == "decode":
            return window.numpy()
        channels_last = window[None].permute(0, 3, 1, 2)
        resized = F.interpolate(channels_last, size=(size, size), mode="bicubic", antialias=True)
        square = resized[0].permute(1, 2, 0)
        pixels: UInt8[np.ndarray, "s s 3"] = (square.flip(1) if flip else square).numpy()
        return pixels


def _cut(
    master: UInt8[np.ndarray, "m m 3"], offset: Int32[np.ndarray, " 2"], size: int
) -> UInt8[np.ndarray, "s s 3"]:
    top, left = offset
    return master[top : top + size, left : left + size]
