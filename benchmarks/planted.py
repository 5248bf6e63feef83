"""Does the profiler name a bottleneck that was put there on purpose?

    python benchmarks/planted.py [NAME ...]

Every fault is put around the real source, view backend, mask or step; the loader, its threads and the
profiler are those of `cmae profile`. The step sleeps: a training thread that waits without CPU time is what
an accelerator looks like from the host. What a real GPU adds (copies, decode engines) is not tested here.

Predictions, written before the first run: all are named; storage faults by the right one of warm and cold.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import webdataset as wds
from lib.results import write_result
from PIL import Image

from cmae.model import ModelConfig, draw_mask
from cmae.pipeline import Batch, LoaderConfig, ViewConfig
from cmae.pipeline.formats.dataset_index import Place
from cmae.pipeline.formats.shard_index import build_index, index_path, save_index
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.records import Extent, Source
from cmae.pipeline.sources.shard_reader import LostShard
from cmae.pipeline.views.backend import ViewBackend
from cmae.train.bench.harness import describe_machine
from cmae.train.commands.demo.data import PHOTOGRAPHS, load_photograph
from cmae.train.config import Config, OptimConfig, RunConfig, SpeedConfig
from cmae.train.distributed import World, from_main, join_world
from cmae.train.profiling.analysis.records import Profile, load_profile
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.measure.page_cache import evict
from cmae.train.profiling.measure.subject import open_subject
from cmae.train.profiling.profiler import measure

LIBC = ctypes.CDLL(None, use_errno=True)
BATCH_SIZE = 8
STEP_S = 0.06


class SlowFiles:
    """Local files whose reads take longer. A `ShardReader`.

    Args:
        files: The source's reader of local files.
        latency_s: Seconds of every read; reads wait side by side.
        bytes_per_s: Rate of all reads together, one after another.
        open_s: Seconds where a file is opened that is not among the last 64.
        cold_only: Leave reads alone that the page cache answers.
    """

    is_local = True

    def __init__(
        self,
        files: Any,
        *,
        latency_s: float = 0.0,
        bytes_per_s: float | None = None,
        open_s: float = 0.0,
        cold_only: bool = False,
    ) -> None:
        self._files = files
        self._latency_s, self._bytes_per_s, self._open_s = latency_s, bytes_per_s, open_s
        self._cold_only = cold_only
        self._lock = threading.Lock()
        self._opened: OrderedDict[int, None] = OrderedDict()

    def read_batch(
        self, places: Sequence[Place], buffer: np.ndarray
    ) -> Iterator[np.ndarray | LostShard]:
        """Read, each record late."""
        found = self._files.read_batch(places, buffer)
        for place in places:
            self._delay(place)
            yield next(found)

    def check_unchanged(self, shard: int) -> None:
        """See `ShardReader`."""
        self._files.check_unchanged(shard)

    def close(self) -> None:
        """See `ShardReader`."""
        self._files.close()

    def _delay(self, place: Place) -> None:
        path = self._files.paths[place.shard]
        if self._cold_only and _is_cached(path, place.byte_offset + place.size // 2):
            return
        time.sleep(self._latency_s)
        if self._open_s and not self._is_open(place.shard):
            time.sleep(self._open_s)
        if self._bytes_per_s:
            with self._lock:
                time.sleep(place.size / self._bytes_per_s)

    def _is_open(self, number: int) -> bool:
        with self._lock:
            known = number in self._opened
            self._opened[number] = None
            self._opened.move_to_end(number)
            while len(self._opened) > 64:
                self._opened.popitem(last=False)
        return known


def _is_cached(path: str, offset: int) -> bool:
    """By mincore, which works for one's own files and leaves no trace."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        page = (ctypes.addressof(first) + offset) // mmap.PAGESIZE * mmap.PAGESIZE
        found = ctypes.c_ubyte()
        failed = LIBC.mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(found))
        del first  # else the map cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore failed for {path}")
    return bool(found.value & 1)


def slow_files(**settings: Any) -> Callable[[Source, ViewBackend], tuple[Source, ViewBackend]]:
    """A `wrap` that makes a source's reads slow."""

    def wrap(source: Source, view_backend: ViewBackend) -> tuple[Source, ViewBackend]:
        assert isinstance(source, IndexedSource)
        source.reader = SlowFiles(source.reader, **settings)
        return source, view_backend

    return wrap


def sleeping_step(seconds: float) -> Callable[[Sequence[Batch]], None]:
    """A step on an accelerator that the host waits for."""
    return lambda batches: time.sleep(seconds)


def python_step(seconds: float, python_s: float) -> Callable[[Sequence[Batch]], None]:
    """A step before which the training thread computes in Python."""

    def step(batches: Sequence[Batch]) -> None:
        end = time.thread_time() + python_s
        while time.thread_time() < end:
            sum(range(1000))
        time.sleep(seconds)

    return step


def slow_mask(seconds: float) -> Callable[..., Any]:
    """`draw_mask`, late: work of the prefetch thread that is slow."""

    def draw(config: ModelConfig, *arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return draw_mask(config, *arguments, **named)

    return draw


@dataclass(frozen=True)
class Fault:
    """What is planted, and what should be named."""

    name: str
    what: str
    expect: tuple[str, ...]
    """Values of `Diagnosis.bottleneck` that name it."""
    step: Callable[[Sequence[Batch]], None] = field(default_factory=lambda: sleeping_step(STEP_S))
    wrap: Callable[[Source, ViewBackend], tuple[Source, ViewBackend]] | None = None
    mask_s: float = 0.0
    threads: int = 2
    photographs: dict[str, Any] = field(default_factory=dict)
    busy_processes: int = 0
    cold: bool = False
    """Evict all shards first."""


FAULTS = (
    Fault("none", "a step of 60 ms for 8 images", ("model",)),
    Fault("slow model", "a step of 250 ms", ("model",), step=sleeping_step(0.25)),
    Fault(
        "slow disk",
        "1 MB/s for all reads together",
        ("storage",),
        wrap=slow_files(bytes_per_s=1e6),
    ),
    Fault(
        "slow network", "150 ms before every read", ("storage",), wrap=slow_files(latency_s=0.15)
    ),
    Fault(
        "cold cache",
        "150 ms before a read that misses the page cache; evicted at first",
        ("storage",),
        wrap=slow_files(latency_s=0.15, cold_only=True),
        photographs={"count": 1600, "padding": 150_000},
        cold=True,
    ),
    Fault(
        "tiny shards",
        "one image a shard, 150 ms to open a file",
        ("storage",),
        wrap=slow_files(open_s=0.15),
        photographs={"per_shard": 1, "count": 320},
    ),
    Fault(
        "few decode threads",
        "1 thread, photographs of 2400 px",
        ("decode_augment",),
        threads=1,
        photographs={"edge": 2400, "count": 64},
    ),
    Fault(
        "oversized images",
        "photographs of 3000 px, 2 threads",
        ("decode_augment",),
        photographs={"edge": 3000, "count": 64},
    ),
    Fault("slow stage", "200 ms in the prefetch thread", ("prefetch",), mask_s=0.2),
    Fault(
        "Python in the training thread",
        "100 ms of Python before the step",
        ("python",),
        step=python_step(STEP_S, 0.1),
    ),
    Fault("slow rank", "one of two ranks slower by 100 ms", ("straggler",)),
    Fault(
        "noisy neighbour",
        "4 busy processes beside 2 decoding threads",
        ("neighbour",),
        photographs={"edge": 1600, "count": 64},
        busy_processes=4,
    ),
)


def write_photographs(
    folder: Path, *, edge: int = 250, count: int = 128, per_shard: int = 64, padding: int = 0
) -> str:
    """Indexed shards of crops of scikit-image's photographs, `edge` pixels wide.

    Args:
        folder: Folder to write to.
        edge: Width of a crop, pixels.
        count: Number of samples; there are 48 crops, which come again and again.
        per_shard: Samples in a shard.
        padding: Bytes after each image, so that reading one does not read the next one ahead.
    """
    crops = _crops(edge, number=min(count, 48))
    for first in range(0, count, per_shard):
        path = folder / f"photographs-{first // per_shard:06d}.tar"
        with wds.TarWriter(str(path)) as tar:
            for number in range(first, min(first + per_shard, count)):
                sample = {"__key__": f"{number:05d}", "jpg": crops[number % len(crops)]}
                tar.write({**sample, "cls": "0", "bin": bytes(padding)})
        save_index(build_index(path), index_path(path))
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not on the disk yet cannot be evicted
    return str(folder / "*.tar")


def _crops(edge: int, *, number: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    width, height, margin = edge, edge * 3 // 4, edge // 10
    scaled = [
        Image.fromarray(load_photograph(name)).resize((width + margin, height + margin))
        for name in PHOTOGRAPHS
    ]
    crops = []
    for index in range(number):
        left, top = (int(rng.integers(0, margin)) for _ in range(2))
        file = io.BytesIO()
        crop = scaled[index % len(scaled)].crop((left, top, left + width, top + height))
        crop.save(file, "JPEG", quality=92)
        crops.append(file.getvalue())
    return crops


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Other programs that compute all the time; no children of this process, whose time would be its own."""
    command = ["sh", "-c", '"$0" -c "while True: pass" >/dev/null & echo $!', sys.executable]
    started = [subprocess.check_output(command, text=True) for _ in range(count)]
    try:
        yield
    finally:
        for number in started:
            os.kill(int(number), signal.SIGKILL)


def build_config(shards: str, *, threads: int) -> Config:
    """A run of small views; its model is never built."""
    views = ViewConfig(img_size=96, source_crop_size=112, target_shift=8, color="none")
    return Config(
        run=RunConfig(out=Path(tempfile.gettempdir()) / "planted"),
        speed=SpeedConfig(device="cpu"),
        data=LoaderConfig(shards, num_threads=threads, view_backend="cpu", views=views),
        model=ModelConfig(img_size=96),
        optim=OptimConfig(global_batch_size=BATCH_SIZE, precision="fp32"),
    )


def plant(fault: Fault, folder: Path, options: ProfileConfig) -> Profile:
    """Profile a run that has this fault."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = write_photographs(folder, **fault.photographs)
    config = build_config(shards, threads=fault.threads)
    if fault.cold:
        for path in folder.glob("*.tar"):
            evict([Extent(str(path), 0, path.stat().st_size)])
    mask = mock.patch("cmae.train.loop.pretrain.draw_mask", slow_mask(fault.mask_s))
    world = World(0, 1, torch.device("cpu"))
    with (
        mask,
        busy_processes(fault.busy_processes),
        open_subject(config, world, fault.step, wrap=fault.wrap) as subject,
    ):
        return measure(subject, options, config)


class RankStep:
    """A step that ends when every rank's has: the last rank is slower by `slow_s`."""

    def __init__(self, world: World, *, slow_s: float) -> None:
        self._seconds = STEP_S + (slow_s if world.rank == world.world_size - 1 else 0.0)
        self._alone = False

    def __call__(self, batches: Sequence[Batch]) -> None:
        """Work, then wait for the others."""
        time.sleep(self._seconds)
        if not self._alone:
            dist.barrier()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Without the other ranks."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False


def profile_slow_rank(path: Path, options: ProfileConfig) -> None:
    """Under torchrun: profile ranks of which one is slow by 100 ms, and write the profile."""
    with join_world("cpu") as world, tempfile.TemporaryDirectory() as folder:
        shards = from_main(
            write_photographs(Path(folder), count=64) if world.is_main else None, world
        )
        config = build_config(shards, threads=1)
        size = BATCH_SIZE * world.world_size
        config = replace(config, optim=replace(config.optim, global_batch_size=size))
        step = RankStep(world, slow_s=0.1)
        with open_subject(config, world, step, local=step.alone) as subject:
            found = measure(subject, options, config)
        dist.barrier()  # the shards are the first rank's
        if world.is_main:
            found.save(path)


def run_slow_rank(fault: Fault, folder: Path, options: ProfileConfig) -> Profile:
    """The same in two processes started from here."""
    path = folder / "profile.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += [__file__, "--slow-rank", str(path), "--rounds", str(options.rounds)]
    subprocess.run([*command, "--steps", str(options.steps)], check=True)
    return load_profile(path)


def replace_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows that were measured again into a result file, each with the revision that it is from."""
    result = json.loads(path.read_text(encoding="utf-8"))
    revision = describe_machine()["git"]
    again = {row["planted"]: row | {"revision": revision} for row in rows}
    result["rows"] = [again.get(row["planted"], row) for row in result["rows"]]
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def main() -> None:
    """Plant every fault, print what was named, and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="faults to plant; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--verify", type=int, default=1, help="actions to apply and measure, of each fault"
    )
    parser.add_argument(
        "--replace", type=Path, help="result file whose rows of these names are replaced"
    )
    parser.add_argument("--slow-rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = ProfileConfig(
        rounds=arguments.rounds,
        steps=arguments.steps,
        budget_s=600,
        verify=0 if arguments.slow_rank else arguments.verify,
        trials=False,
    )
    if arguments.slow_rank:
        profile_slow_rank(arguments.slow_rank, options)
        return
    rows = []
    for fault in FAULTS:
        if arguments.names and fault.name not in arguments.names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            begun = time.monotonic()
            run = run_slow_rank if fault.name == "slow rank" else plant
            found = run(fault, Path(folder), options)
        components = {one.name: one.ms.value for one in found.breakdown}
        row: dict[str, Any] = {
            "planted": fault.name,
            "what": fault.what,
            "named": found.diagnosis.bottleneck,
            "right": found.diagnosis.bottleneck in fault.expect,
            "sentence": found.diagnosis.sentence,
            "residual_percent": 100 * components["residual"] / found.step_ms.value,
            "what_if": [
                {
                    "action": action.what,
                    "predicted": action.predicted_images_per_s,
                    "measured": action.measured_images_per_s.value,
                }
                for action in found.actions
                if action.measured_images_per_s is not None
            ],
            "seconds": time.monotonic() - begun,
            "breakdown_ms": components,
        }
        rows.append(row)
        verdict = "right" if row["right"] else "WRONG"
        print(
            f"{fault.name:<30} {verdict} {found.diagnosis.bottleneck:<10} {found.diagnosis.sentence}"
        )
        print({name: round(ms, 1) for name, ms in row["breakdown_ms"].items()}, flush=True)
        for one in row["what_if"]:
            print(
                f"    {one['action']}: {one['predicted']:.1f} predicted, {one['measured']:.1f} measured"
            )
    if arguments.replace is not None:
        replace_rows(arguments.replace, rows)
    if not arguments.names:
        config = {"rounds": options.rounds, "steps": options.steps}
        write_result("planted", config=config, rows=rows)


if __name__ == "__main__":
    main()
