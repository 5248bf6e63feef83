"""Views by NVIDIA DALI: one graph definition for the GPU ('mixed' decode) and, for its tests, the CPU.

The graph holds the geometry: window decode, one bicubic resize to the source crop, flip, two crops. Colour
runs after it on the whole batch (color_batch.py); docs/design/0003-colour-chain.md has the reason.
The CPU graph exists so that the GPU's graph can be checked anywhere; cmae.pipeline.views.cpu is the faster
way on a CPU.
"""

from __future__ import annotations

import io
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.tensors import TensorCPU, TensorListCPU
from PIL import Image
from torch.utils.dlpack import from_dlpack

from cmae.pipeline.stage_stats import Stage, State
from cmae.pipeline.views.backend import Views, find_undecodable
from cmae.pipeline.views.color_batch import ColorOp, apply_color
from cmae.pipeline.views.config import DecodeWay, ViewConfig, ViewStep
from cmae.pipeline.views.params import ViewParams, draw_view_params

_EXECUTOR: dict[str, Any] = {"exec_dynamic": True}  # DALI's stubs do not know the name


def build_view_graph(
    views: ViewConfig,
    device: torch.device,
    *,
    batch_size: int,
    num_threads: int,
    hw_decoder_load: float = 0.65,
    prefetch: int = 2,
    last_step: ViewStep = "color",
    decode_way: DecodeWay = "window",
) -> Pipeline:
    """The DALI pipeline with inputs 'encoded' (bytes) and 'params' (`ViewParams.matrix()` rows).

    Outputs one or two uint8 HWC batches: online and, with two views, the target before its colours. With
    `last_step` decode or resize, what the views would be cropped from.
    Only the dynamic executor keeps outputs that are still referenced and survives a failed batch.
    """
    is_gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=(device.index or 0) if is_gpu else None,  # type: ignore[arg-type]  # None: no GPU
        prefetch_queue_depth=prefetch,
        **_EXECUTOR,
    )
    def graph() -> Any:
        encoded = fn.external_source(
            name="encoded", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True
        )
        params = fn.external_source(name="params", dtype=types.DALIDataType.FLOAT, ndim=1)
        decode = Decode(decode_way, is_gpu=is_gpu, hw_decoder_load=hw_decoder_load)
        return _views(encoded, params, views, decode=decode, last_step=last_step)

    pipeline = graph()
    pipeline.build()
    return pipeline


class Decode:
    """The decoder of a graph; `window` gives nodes with pixels on the graph's device."""

    def __init__(self, way: DecodeWay, *, is_gpu: bool, hw_decoder_load: float) -> None:
        self._way = way
        self._to_gpu = is_gpu and way == "cpu"
        self._options: dict[str, Any] = {
            "device": "mixed" if is_gpu and way != "cpu" else "cpu",
            "adjust_orientation": False,
            "jpeg_fancy_upsampling": True,  # Pillow's and libjpeg's chroma upsampling
        }
        if self._options["device"] == "mixed":
            self._options["hw_decoder_load"] = hw_decoder_load
        self._whole: Any = None

    def window(self, encoded: Any, start: Any, shape: Any) -> Any:
        """A window of the image; the whole image is decoded once for all its windows."""
        region = {"start": start, "shape": shape, "axes": [0, 1]}
        if self._way == "whole":
            if self._whole is None:
                self._whole = fn.decoders.image(encoded, **self._options)
            return fn.slice(self._whole, **region)
        image: Any = fn.decoders.image_slice(encoded, **region, **self._options)
        return image.gpu() if self._to_gpu else image


def _views(
    encoded: Any, params: Any, views: ViewConfig, *, decode: Decode, last_step: ViewStep
) -> Any:
    def window(first: int, flip: int, size: int) -> Any:
        start, shape = params[first : first + 2], params[first + 2 : first + 4]
        image: Any = decode.window(encoded, _integers(start), _integers(shape))
        if last_step == "decode":
            return image
        image = fn.resize(
            image, size=[size, size], interp_type=types.DALIInterpType.INTERP_CUBIC, antialias=True
        )
        return fn.flip(image, horizontal=_integers(params[flip]))

    def crop(source: Any, first: int) -> Any:
        start = _integers(params[first : first + 2])
        return fn.slice(source, start=start, shape=[views.img_size] * 2, axes=[0, 1])

    columns = ViewParams.columns()
    source = window(columns["crop"], columns["flip"], views.source_crop_size)
    own: tuple[Any, ...] = ()
    if views.has_own_target_crop:
        own = (window(columns["target_crop"], columns["target_flip"], views.img_size),)
    if last_step in ("decode", "resize"):
        return (source, *own)
    online = crop(source, columns["online_offset"])
    if views.has_target and not own:
        return online, crop(source, columns["target_offset"])
    return (online, *own)


def _integers(node: Any) -> Any:
    return fn.cast(node, dtype=types.DALIDataType.INT32)


@dataclass
class _Job:
    encoded: list[UInt8[np.ndarray, " n"]]
    """Kept until the batch is out: DALI reads them in place."""
    params: ViewParams
    outputs: Any = None
    error: RuntimeError | None = None
    submitted_s: float = field(default_factory=time.perf_counter)


class DaliViews:
    """Runs the graph a few batches ahead; batches come out in the order in which they went in.

    Args:
        views: Configuration of the views.
        device: Device of the views.
        batch_size: Largest batch.
        num_threads: CPU threads of DALI.
        hw_decoder_load: Share of the JPEGs for the GPU's decoder unit.
        depth: Batches that DALI works on at the same time.
        last_step: Last operation on an image; before the crops there are no views. For measurements.
        color_op: What colours a batch on a GPU; None = the chain of torch operators.
        decode_way: How a window is decoded, see `LoaderConfig.gpu_decode`.
    """

    def __init__(
        self,
        views: ViewConfig,
        device: torch.device,
        *,
        batch_size: int,
        num_threads: int,
        hw_decoder_load: float = 0.65,
        depth: int = 2,
        last_step: ViewStep = "color",
        color_op: ColorOp | None = None,
        decode_way: DecodeWay = "window",
    ) -> None:
        self._views = views
        self._last_step = last_step
        self._color_op = color_op
        self._is_gpu = device.type == "cuda"
        self._pipeline = build_view_graph(
            views,
            device,
            batch_size=batch_size,
            num_threads=num_threads,
            hw_decoder_load=hw_decoder_load,
            prefetch=depth,
            last_step=last_step,
            decode_way=decode_way,
        )
        self._in_flight: deque[_Job] = deque()
        self._still_read: deque[tuple[torch.cuda.Event, _Job]] = deque()
        self._depth = depth
        # DALI's own threads cannot be watched. Busy is what waiting for it and colour take: less than its
        # run time while it is ahead, all of it when it is what the loader waits for.
        self.stage = Stage("decode_augment", threads=1)
        self._warm_up(depth)

    def depth(self, batch_size: int) -> int:
        """As many batches as DALI was built to prepare ahead, of any size."""
        return self._depth

    def submit(self, encoded: list[UInt8[np.ndarray, " n"]], params: ViewParams) -> _Job:
        """Start a batch."""
        job = _Job(encoded, params)
        self._feed(job)
        self._pipeline.schedule_run()
        self._in_flight.append(job)
        return job

    def collect(self, job: _Job) -> Views:
        """Wait for a batch. Samples that could not be decoded are named, and then there are no pixels."""
        self.stage.switch(State.BUSY)
        try:
            return self._finish(job)
        finally:
            self.stage.switch(State.IDLE)

    def _finish(self, job: _Job) -> Views:
        while job.outputs is None and job.error is None:
            self._receive(self._in_flight.popleft())
        if job.error is not None:
            bad = find_undecodable(job.encoded, job.params)
            if not bad:  # not one image's fault
                raise job.error
            return Views(online=None, target=None, bad=bad)
        if self._last_step in ("decode", "resize"):
            return Views(online=None, target=None, bad={})
        online, *rest = [self._to_torch(output) for output in job.outputs]
        self._keep_while_read(job)
        target = rest[0] if rest else None
        if target is not None and self._last_step == "color":
            target = apply_color(target, job.params, mode=self._views.color, op=self._color_op)
        num_bytes = online.nbytes + (0 if target is None else target.nbytes)
        latency_s = time.perf_counter() - job.submitted_s
        self.stage.add(items=len(online), num_bytes=num_bytes, latencies_s=[latency_s])
        return Views(online=online, target=target, bad={})

    def _to_torch(self, output: Any) -> torch.Tensor:
        tensor: torch.Tensor = from_dlpack(output.as_tensor())
        # On a CPU the tensor keeps DALI's buffer alive, and that is enough. On a GPU, work that reads it may
        # still be queued when the last reference goes, and only torch's own memory waits for other streams.
        return tensor.clone() if self._is_gpu else tensor

    def _keep_while_read(self, job: _Job) -> None:
        """Hold DALI's buffers, and the files, until the copies out of them have passed on the device."""
        if not self._is_gpu:
            return
        while self._still_read and self._still_read[0][0].query():
            self._still_read.popleft()
        self._still_read.append((torch.cuda.current_stream().record_event(), job))

    def _feed(self, job: _Job) -> None:
        # An array list would be copied sample by sample; a list of DALI tensors is only wrapped.
        tensors = [TensorCPU(data) for data in job.encoded]
        batch = TensorListCPU(tensors, contiguous=False)  # type: ignore[call-overload]  # stub too old
        self._pipeline.feed_input("encoded", batch)
        self._pipeline.feed_input("params", TensorListCPU(job.params.matrix()))

    def _receive(self, job: _Job) -> None:
        try:
            stream = torch.cuda.current_stream() if self._is_gpu else None
            job.outputs = self._pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:  # the executor goes on with the next batch
            job.error = error

    def _warm_up(self, depth: int) -> None:
        """Run `depth` tiny batches: DALI starts that many at its first run, and each later run starts one.

        The decoders' first-use allocations happen here too, before the first step is timed.
        """
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, "JPEG")
        size = np.array([16], dtype=np.int32)
        params = draw_view_params(
            self._views,
            seed=0,
            epoch=0,
            sample_id=np.zeros(1, dtype=np.int64),
            height=size,
            width=size,
        )
        jobs = [_Job([np.frombuffer(file.getvalue(), np.uint8)], params) for _ in range(depth)]
        for job in jobs:
            self._feed(job)
        self._pipeline.schedule_run()
        for job in jobs:
            self._receive(job)
            if job.error is not None:
                raise job.error

    def cancel(self) -> None:
        """Nothing: a batch that DALI has begun is finished."""

    def close(self) -> None:
        """Let the batches in flight finish: DALI must not be torn down while it reads their bytes."""
        while self._in_flight:
            self._receive(self._in_flight.popleft())
        while self._still_read:
            self._still_read.popleft()[0].synchronize()
        vars(self).pop("_pipeline", None)  # its threads and buffers go with it
