"""Ctrl-C gets through within two seconds wherever it finds a program, and a loader leaves nothing behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest
from support.loaders import loader_of
from support.pipeline_data import jpeg, photo, toy_mask, write_photo_shards, write_tar

from cmae.pipeline import DataError, ViewConfig
from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.loader import prefetcher

VIEWS = ViewConfig(img_size=16, source_crop_size=16, target_shift=0)

PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path.insert(0, {tests!r})
from support.loaders import loader_of
from support.pipeline_data import toy_mask
from cmae.pipeline import DataError, ViewConfig
views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
try:
    with loader_of(
        {shards!r}, views, batch_size={batch_size}, global_batch_size={batch_size},
        draw_mask=toy_mask, num_threads=1, view_backend={view_backend!r}, source={source!r}
    ) as loader:
        {prepare}
        print("ready", flush=True)
        {wait}
except KeyboardInterrupt:
    print(time.monotonic(), flush=True)
    sys.exit(130)
"""
READ_ON = "while True: next(loader)"
SLEEP = "time.sleep(60)"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = write_photo_shards(tmp_path_factory.mktemp("small"), sizes=[40, 40], edge=32)
    build_indices([str(path) for path in paths])
    return [str(path) for path in paths]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """64 images of 3 megapixels: a batch of all of them takes seconds to decode on one thread."""
    image = jpeg(photo(1500, 2000))
    path = tmp_path_factory.mktemp("large") / "large.tar"
    write_tar(path, [(f"{i:02d}", image, 0) for i in range(64)])
    build_indices([str(path)])
    return str(path)


def seconds_to_end(shards: object, *, wait: str, prepare: str = "pass", **options: object) -> float:
    """Start a program, send SIGINT once it is ready, and time until it has closed its loader and goes on.

    What follows, the end of an interpreter with torch in it, takes a second of its own on a busy machine.
    """
    settings = {"batch_size": 8, "view_backend": "cpu", "source": "auto", **options}
    program = PROGRAM.format(
        tests=str(Path(__file__).parents[2]), shards=shards, prepare=prepare, wait=wait, **settings
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)  # into the wait
    start = time.monotonic()  # one clock for all processes of a Linux machine
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    return float(output) - start


def test_while_a_pipe_gives_no_bytes(small):
    # The command ends only when somebody ends it: Ctrl-C in a terminal reaches it, a signal to us does not.
    before = {p.pid for p in psutil.process_iter() if "sleep 61" in " ".join(_command(p))}
    shards = [f"pipe:cat {small[0]}; sleep 61"]
    assert seconds_to_end(shards, wait=READ_ON, source="stream") < 2
    after = {p.pid for p in psutil.process_iter() if "sleep 61" in " ".join(_command(p))}
    assert after <= before


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_while_reading_by_index(small):
    assert seconds_to_end(small, wait=READ_ON) < 2


@pytest.mark.slow
def test_while_a_large_batch_is_decoded(large):
    assert seconds_to_end(large, wait="next(loader)", batch_size=64) < 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_while_the_queue_is_full_and_the_program_is_elsewhere(small, backend):
    assert seconds_to_end(small, wait=SLEEP, prepare="next(loader)", view_backend=backend) < 2


# --- nothing is left behind --------------------------------------------------------------------------------


def open_loader(shards: list[str], backend: str, **options: object):
    settings = {"batch_size": 4, "global_batch_size": 4, "num_threads": 2, "draw_mask": toy_mask}
    return loader_of(shards, VIEWS, view_backend=backend, **(settings | options))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_memory_files_and_threads_stay_flat(small, backend):
    process = psutil.Process()

    def run(count: int) -> object:
        with open_loader(small, backend) as loader:
            for _ in islice(loader, count):
                pass
        return loader

    run(50)  # pools, arenas and caches fill up
    gc.collect()
    files, threads, memory = process.num_fds(), process.num_threads(), process.memory_info().rss
    closed = [run(count) for count in (400, 5, 5, 5, 5)]  # closed, but not dropped
    gc.collect()
    assert process.num_threads() <= threads
    assert process.num_fds() <= files
    assert len(closed) == 5
    # 400 kept batches of views would be 2.5 MB, and 400 kept batches of encoded files 3 MB;
    # DALI's pools move by some MB.
    assert process.memory_info().rss - memory < 24 * 2**20


@pytest.mark.parametrize("backends", [("cpu", "cpu"), ("cpu", "dali"), ("dali", "dali")])
def test_two_loaders_at_once_and_one_after_the_other_give_the_same(small, backends):
    alone = []
    for backend in backends:
        with open_loader(small, backend) as loader:
            alone.append([next(loader).online.clone() for _ in range(25)])
    with open_loader(small, backends[0]) as one, open_loader(small, backends[1]) as two:
        for first, second in zip(*alone, strict=True):
            assert next(one).online.equal(first)
            assert next(two).online.equal(second)


class HangingViews:
    """A view backend whose decoder never comes back from its third batch."""

    def __init__(self, real: object) -> None:
        self._real, self._count, self.release = real, 0, threading.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def collect(self, job: object) -> object:
        self._count += 1
        if self._count == 3:
            self.release.wait()
            raise RuntimeError("released")
        return self._real.collect(job)


def test_a_decoder_that_hangs_ends_the_run_with_the_names_of_its_files(small, monkeypatch):
    monkeypatch.setattr(prefetcher, "DECODE_DEADLINE_S", 0.5)
    made = []

    def hang(source: object, views: object) -> tuple[object, object]:
        made.append(HangingViews(views))
        return source, made[0]

    loader = loader_of(
        small, VIEWS, batch_size=8, draw_mask=toy_mask, num_threads=1, shuffle=False, wrap=hang
    )
    try:
        assert len([next(loader) for _ in range(2)]) == 2
        with pytest.raises(DataError, match="the decoder hangs") as caught:
            next(loader)
        lines = str(caught.value).splitlines()[1:]
        assert len(lines) == 8
        assert lines[0].startswith("  shard 0, record 16: ")
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < 3
    finally:
        made[0].release.set()
