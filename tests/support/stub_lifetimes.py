"""Run what hands memory from stream to stream on the CUDA stub; prints what became of it, as JSON.

    python -m support.stub_lifetimes SCENARIO [FAULT]

With CUDA_STUB_LAG=1 the device never gets on by itself, the slowest device there is: whatever work has read
must stay as it is. FAULT breaks one rule, and the checks must find it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from cmae.pipeline import LoaderConfig, LoaderState
from cmae.pipeline import batch as batch_module
from cmae.pipeline.bad_samples import Health
from cmae.pipeline.batch import upload
from cmae.pipeline.loader import loader as loader_module
from cmae.pipeline.loader import prefetcher as prefetcher_module
from cmae.pipeline.loader.loader import Loader
from cmae.pipeline.sources.records import RawBatch, Record
from cmae.pipeline.stage_stats import Stage
from cmae.pipeline.views import dali as dali_module
from cmae.pipeline.views.backend import ViewBackend, Views
from cmae.pipeline.views.config import ViewConfig
from cmae.pipeline.views.dali import DaliViews
from cmae.pipeline.views.params import draw_view_params
from cmae.train.checkpoints.writer import _to_host
from cmae.train.loop.step import HostFlag
from cmae.train.profiling.measure.phases import _copied_ahead

GPU = torch.device("cuda", 0)
VIEWS = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
SIZE = 4
BATCHES = 6


def mark(text: str) -> None:
    """A line in the trace."""
    ctypes.CDLL(None).cuda_stub_mark(text.encode())


class FakeSource:
    """Empty files, batch after batch."""

    digest, num_samples, steps_per_epoch = "", None, None

    def __init__(self) -> None:
        self.stage = Stage("read", threads=1)

    def batches(self, state: LoaderState) -> Iterator[RawBatch]:
        for number in count():
            ids = np.arange(SIZE, dtype=np.int64) + number * SIZE
            yield RawBatch([_RECORD] * SIZE, ids, 0, state, [], SIZE)

    def close(self) -> None:
        pass


_RECORD = Record.__new__(Record)
for _name, _value in {"data": np.zeros(1, np.uint8), "height": 64, "width": 64, "label": 0}.items():
    object.__setattr__(_RECORD, _name, _value)


class FakeViews:
    """Pixels that a kernel writes on the stream of the caller."""

    def __init__(self) -> None:
        self.stage = Stage("decode_augment", threads=1)
        self._numbers = count()

    def depth(self, batch_size: int) -> int:
        return 1

    def submit(self, encoded: Any, params: Any) -> None:
        pass

    def collect(self, job: Any) -> Views:
        mark(f"make {next(self._numbers)}")
        online = torch.empty(SIZE, 32, 32, 3, dtype=torch.uint8, device=GPU).fill_(1)
        target = torch.empty(SIZE, 32, 32, 3, dtype=torch.uint8, device=GPU).fill_(1)
        return Views(online, target, {})

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


def loader_scenario(fault: str) -> dict[str, Any]:
    """A training step reads each batch and drops it, while the loader makes the next ones."""
    if fault == "no record_stream":
        loader_module._hand_over = lambda batch, event: torch.cuda.current_stream().wait_event(
            event
        )
    elif fault == "no wait_event":
        loader_module._hand_over = lambda batch, event: None
    elif fault == "pageable upload":
        prefetcher_module.upload = lambda tensor, device: tensor.to(device)
    config = LoaderConfig(shards="", views=VIEWS, batch_size=SIZE, global_batch_size=SIZE)
    state = LoaderState(seed=0, epoch=0, offset=0, digest="")
    loader = Loader(
        cast(Any, FakeSource()),
        cast(ViewBackend, FakeViews()),
        config=config,
        device=GPU,
        state=state,
        health=Health(ledger=None, limit=None, rank=0, first_epoch=0),
        draw_mask=lambda ids, epoch: (ids.unsqueeze(1) + 0, ids.unsqueeze(1) + 1),
    )
    regions = []
    for number in range(BATCHES):
        mark(f"next {number}")
        batch = next(loader)
        mark(f"read {number}")
        for tensor in (batch.online, batch.target, batch.ids_keep, batch.ids_mask, batch.label):
            assert tensor is not None
            tensor + 1
            storage = tensor.untyped_storage()
            regions.append((number, storage.data_ptr(), storage.nbytes()))
        mark(f"drop {number}")
        del batch, tensor, storage
    loader.close()
    return {"reused": _overlaps(regions), "stream": loader_stream(loader)}


def loader_stream(loader: Loader) -> int:
    """Handle of the stream that makes batches."""
    stream = loader._prefetcher._stream
    assert stream is not None
    return stream.cuda_stream


def _overlaps(regions: list[tuple[int, int, int]]) -> list[list[int]]:
    """Pairs of batches that lie in the same memory."""
    return sorted(
        [one, other]
        for one, start, size in regions
        for other, other_start, other_size in regions
        if one < other and start < other_start + other_size and other_start < start + size
    )


class _DaliOutput:
    """One output of DALI; alive as long as its buffer may be read."""

    def __init__(self) -> None:
        self._tensor = torch.empty(SIZE, 32, 32, 3, dtype=torch.uint8, device=GPU)

    def as_tensor(self) -> torch.Tensor:
        return self._tensor


class _FakePipeline:
    def __init__(self) -> None:
        self.buffers: list[weakref.ref[_DaliOutput]] = []

    def schedule_run(self) -> None:
        pass

    def feed_input(self, name: str, data: Any) -> None:
        pass

    def outputs(self, cuda_stream: Any = None) -> list[_DaliOutput]:
        made = [_DaliOutput(), _DaliOutput()]
        self.buffers += [weakref.ref(one) for one in made]
        return made


def dali_scenario(fault: str) -> dict[str, Any]:
    """DALI's outputs are copied, and their buffers may go when the copies have passed on the device."""
    if fault == "dropped at once":
        DaliViews._keep_while_read = lambda self, job: None  # type: ignore[method-assign]
    pipeline = _FakePipeline()
    dali_module.build_view_graph = lambda *args, **kwargs: cast(Pipeline, pipeline)  # type: ignore[assignment]
    views = DaliViews(VIEWS, GPU, batch_size=SIZE, num_threads=1, last_step="crop")
    pipeline.buffers.clear()
    sides = np.full(SIZE, 64, np.int32)
    ids = np.arange(SIZE, dtype=np.int64)
    params = draw_view_params(VIEWS, seed=0, epoch=0, sample_id=ids, height=sides, width=sides)
    alive = []
    for _ in range(3):
        views.collect(views.submit([np.zeros(1, np.uint8)] * SIZE, params))
        gc.collect()
        alive.append(sum(one() is not None for one in pipeline.buffers))
    views.close()
    gc.collect()
    return {"alive": alive, "after": sum(one() is not None for one in pipeline.buffers)}


def step_scenario(fault: str) -> dict[str, Any]:
    """The step's flag goes to the host without a wait, and the wait for it is one."""
    mark("flag")
    flag = HostFlag([torch.zeros((), device=GPU)])
    mark("flag asked")
    flag.wait()
    mark("flag waited")
    return {}


def checkpoint_scenario(fault: str) -> dict[str, Any]:
    """A snapshot travels to the host on a stream that waits for its copy."""
    snapshot = {"weight": torch.ones(1000, device=GPU).clone()}
    copied = torch.cuda.current_stream().record_event()
    mark("moving")
    _to_host(snapshot, copied)
    mark("moved")
    return {}


def profiler_scenario(fault: str) -> dict[str, Any]:
    """The profiler's batches are copied ahead on a stream of their own."""
    host = batch_module.Batch(
        online=torch.zeros(SIZE, 8, 8, 3, dtype=torch.uint8).pin_memory(),
        target=None,
        ids_keep=None,
        ids_mask=None,
        sample_id=torch.zeros(SIZE, dtype=torch.int64).pin_memory(),
        label=torch.zeros(SIZE, dtype=torch.int64).pin_memory(),
        epoch=0,
        state=LoaderState(seed=0, epoch=0, offset=0, digest=""),
    )
    batches = _copied_ahead(iter([host] * (BATCHES + 1)), GPU)
    regions = []
    for number in range(BATCHES):
        batch = next(batches)
        batch.online + 1
        storage = batch.online.untyped_storage()
        regions.append((number, storage.data_ptr(), storage.nbytes()))
        del batch, storage
    return {"reused": _overlaps(regions)}


SCENARIOS: dict[str, Callable[[str], dict[str, Any]]] = {
    "loader": loader_scenario,
    "dali": dali_scenario,
    "step": step_scenario,
    "checkpoint": checkpoint_scenario,
    "profiler": profiler_scenario,
}

if __name__ == "__main__":
    torch.zeros(1, device=GPU)
    upload(torch.zeros(1), GPU)
    scenario, fault = [*sys.argv[1:], ""][:2]
    print(json.dumps(SCENARIOS[scenario](fault)))
