from __future__ import annotations

import json
import threading
import time
from itertools import islice, pairwise

import numpy as np
import pytest
from support.pipeline_data import toy_mask, write_photo_shards

from cmae.pipeline import LoaderSnapshot, ViewConfig, build_loader
from cmae.pipeline import stage_stats as counters
from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.formats.jpeg import JpegKind
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.stage_stats import Histogram, KindTable, QueueDepth, Stage, State

VIEWS = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
BATCH = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    paths = write_photo_shards(folder, sizes=(40, 24))
    build_indices([str(path) for path in paths])
    return folder


def open_loader(shards, **options):
    settings = {"batch_size": BATCH, "global_batch_size": BATCH, "num_threads": 2}
    return build_loader(shards, VIEWS, draw_mask=toy_mask, **(settings | options))


class FakeTime:
    """A clock that the test turns; half of the time that passes is CPU time."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now / 2


@pytest.fixture
def clock(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(counters, "time", fake)
    return fake


def histogram(seconds) -> Histogram:
    stage = Stage("any", threads=1)
    stage.add(items=len(seconds), num_bytes=0, latencies_s=seconds)
    return stage.snapshot().histogram


@pytest.mark.parametrize("q", [0, 1, 50, 90, 99, 100])
def test_percentiles_are_right_to_six_percent(q):
    seconds = np.random.default_rng(0).lognormal(-6, 1.5, 4000)
    expected = np.percentile(seconds, q, method="inverted_cdf")
    assert histogram(seconds).percentile_s(q) == pytest.approx(expected, rel=0.13 / 2 + 0.001)


def test_percentile_of_one_value_is_that_value_and_of_none_is_nan():
    assert histogram([0.02]).percentile_s(50) == pytest.approx(0.02, rel=0.065)
    assert np.isnan(Histogram().percentile_s(50))
    with pytest.raises(ValueError, match="q=101 must be between 0 and 100"):
        Histogram().percentile_s(101)


def test_histograms_merge_and_subtract():
    first, second = [0.001] * 5, [0.1] * 3 + [0.0, 1e9]
    both = histogram(first + second)
    assert histogram(first) + histogram(second) == both
    assert both - histogram(first) == histogram(second)
    assert both.total == 10
    assert Histogram.from_dict(json.loads(json.dumps(both.to_dict()))) == both


def test_a_threads_time_is_divided_among_its_states(clock):
    stage = Stage("prefetch", threads=1, first_state=State.STARVED)
    clock.now += 3
    stage.switch(State.BUSY)
    clock.now += 4
    stage.switch(State.BLOCKED)
    clock.now += 5
    running = stage.snapshot()  # the last span has not ended
    assert (running.starved_s, running.busy_s, running.blocked_s) == (3, 4, 5)
    assert running.cpu_s == 2
    assert stage.seconds(State.BLOCKED) == 5
    stage.switch(State.AWAY)
    clock.now += 100
    assert stage.snapshot() == running


def test_idle_threads_are_blocked_while_the_stage_downstream_is(clock):
    prefetcher = Stage("prefetch", threads=1, first_state=State.BUSY)
    pool = Stage("decode_augment", threads=2, downstream=prefetcher)
    pool.switch(State.BUSY)
    clock.now += 1
    pool.switch(State.IDLE)
    clock.now += 2
    prefetcher.switch(State.BLOCKED)
    clock.now += 4
    assert pool.snapshot().blocked_s == 4 * 2
    prefetcher.switch(State.BUSY)
    clock.now += 8
    pool.switch(State.BUSY)
    seen = pool.snapshot()
    assert (seen.busy_s, seen.blocked_s) == (1, 4 * 2)
    assert seen.starved_s == (2 + 8) + (1 + 2 + 8)
    assert seen.busy_s + seen.blocked_s + seen.starved_s == 2 * 15


def test_queue_depth_is_averaged_over_time(clock):
    depth = QueueDepth()
    clock.now += 6
    depth.add(1)
    clock.now += 2
    depth.add(1)
    clock.now += 1
    depth.add(-1)
    clock.now += 1
    assert depth.read() == (10, (2 * 1 + 1 * 2 + 1 * 1) / 10)


def test_kinds_and_sizes_are_counted_in_their_own_cells():
    table = KindTable()
    kind = np.array([JpegKind.BASELINE, JpegKind.BASELINE, JpegKind.CMYK, 255], dtype=np.uint8)
    height = np.array([200, 2000, 500, 1], dtype=np.int32)
    width = np.array([300, 3000, 500, 1], dtype=np.int32)
    table.add(table.cells(kind, height, width), np.array([1.0, 2.0, 4.0, 8.0]))
    seen = table.snapshot()
    assert list(seen) == ["BASELINE", "CMYK", "BAD"]
    assert seen["BASELINE"].items_by_megapixels == (1, 0, 0, 0, 0, 1)
    assert seen["BASELINE"].busy_s_by_megapixels == (1, 0, 0, 0, 0, 2)
    assert (seen["BASELINE"].items, seen["BASELINE"].busy_s) == (2, 3)
    assert seen["CMYK"].items_by_megapixels == (
        0,
        1,
        0,
        0,
        0,
        0,
    )  # an edge belongs to the class below
    assert seen["BAD"].busy_s == 8


def wait_until_full(loader) -> None:
    """Until nothing is under way: no stage has done anything for a while."""
    deadline, done = time.monotonic() + 30, None
    while time.monotonic() < deadline:
        stages = loader.snapshot().stages
        last, done = (
            done,
            [(stage.items, stage.busy_s, stage.starved_s) for stage in stages.values()],
        )
        if done == last:
            return
        time.sleep(0.1)
    raise AssertionError("the loader never came to rest")


def assert_times_add_up(window: LoaderSnapshot) -> None:
    for name in ("read", "decode_augment", "prefetch"):
        stage = window.stages[name]
        total = stage.busy_s + stage.starved_s + stage.blocked_s
        assert total == pytest.approx(stage.threads * window.time_s, rel=0.03), name
        assert min(stage.busy_s, stage.starved_s, stage.blocked_s) >= -1e-6
        assert stage.cpu_s >= 0


@pytest.mark.parametrize("backend", ["host", "dali"])
def test_a_window_counts_what_happened_in_it(shards, backend):
    with open_loader(shards, backend=backend) as loader:
        next(loader)
        before = loader.snapshot()
        for _ in range(5):
            next(loader)
        time.sleep(0.2)  # long enough for the queue to fill
        window = loader.snapshot() - before
    assert list(window.stages) == ["read", "decode_augment", "prefetch", "queue"]
    assert window.batches == 5
    assert window.samples == 5 * BATCH == window.stages["queue"].items
    assert window.wait_s == window.stages["queue"].starved_s > 0
    assert 0 < window.queue_depth_mean <= 2
    assert_times_add_up(window)
    pixels = 2 * 3 * 32 * 32
    assert window.stages["decode_augment"].bytes == pixels * window.stages["decode_augment"].items
    assert window.stages["queue"].bytes == window.samples * (pixels + 10 * 4 + 8 + 8)
    assert window.stages["read"].bytes > 1000 * window.stages["read"].items
    # Two batches in the queue and one that waits for room may have been made before, or be made ahead.
    assert abs(window.stages["prefetch"].items - 5 * BATCH) <= 3 * BATCH
    assert (
        0 < window.stages["read"].percentile_ms(50) < window.stages["prefetch"].percentile_ms(100)
    )


def test_what_was_read_and_made_is_counted_by_kind(shards):
    with open_loader(shards) as loader:
        list(islice(loader, 4))
        wait_until_full(loader)
        seen = loader.snapshot()
    assert list(seen.views_by_kind) == ["BASELINE"]
    kind = seen.views_by_kind["BASELINE"]
    assert (
        kind.items
        == seen.stages["decode_augment"].items
        == seen.stages["decode_augment"].histogram.total
    )
    assert kind.items_by_megapixels == (kind.items, 0, 0, 0, 0, 0)
    assert 0 < kind.busy_s < seen.stages["decode_augment"].busy_s


def test_a_slow_training_thread_blocks_the_stages(shards):
    with open_loader(shards) as loader:
        next(loader)
        wait_until_full(loader)
        before = loader.snapshot()
        time.sleep(0.3)
        window = loader.snapshot() - before
        next(loader)
    for name in ("read", "decode_augment", "prefetch"):
        stage = window.stages[name]
        assert stage.blocked_s > 0.95 * stage.threads * window.time_s, name
    assert window.stages["queue"].blocked_s == window.stages["prefetch"].blocked_s
    assert window.wait_s == 0
    assert window.queue_depth_mean == pytest.approx(2)


def test_a_slow_disk_starves_the_stages(shards, monkeypatch):
    record = IndexedSource._record

    def slow(self, row, data):
        time.sleep(0.04)
        return record(self, row, data)

    monkeypatch.setattr(IndexedSource, "_record", slow)
    with open_loader(shards) as loader:
        next(loader)
        before = loader.snapshot()
        list(islice(loader, 8))
        window = loader.snapshot() - before
    read, views, finish = (window.stages[name] for name in ("read", "decode_augment", "prefetch"))
    assert read.busy_s > 0.6 * read.threads * window.time_s
    assert read.cpu_s < 0.5 * read.busy_s
    assert read.percentile_ms(50) > 38
    assert views.starved_s > 0.5 * views.threads * window.time_s
    assert finish.starved_s > 0.5 * window.time_s
    assert window.wait_s > 0.5 * window.time_s
    assert_times_add_up(window)


def test_a_stream_is_counted_too(shards):
    with open_loader(shards, source="stream") as loader:
        next(loader)
        before = loader.snapshot()
        list(islice(loader, 10))
        window = loader.snapshot() - before
    assert window.stages["read"].items >= 8 * BATCH
    assert window.stages["read"].busy_s > 0
    assert_times_add_up(window)


def test_snapshots_survive_json(shards):
    with open_loader(shards) as loader:
        list(islice(loader, 3))
        seen = loader.snapshot()
    assert LoaderSnapshot.from_dict(json.loads(json.dumps(seen.to_dict()))) == seen
    assert seen.to_dict()["stages"]["read"]["items"] == seen.stages["read"].items


def test_any_thread_may_look_at_any_time(shards):
    seen, done = [], threading.Event()
    with open_loader(shards) as loader:

        def look() -> None:
            while not done.is_set():
                seen.append(loader.snapshot())
                time.sleep(0.002)

        watcher = threading.Thread(target=look)
        watcher.start()
        list(islice(loader, 40))
        done.set()
        watcher.join()
        seen.append(loader.snapshot())
    seen.append(loader.snapshot())  # closed
    assert len(seen) > 5
    for earlier, later in pairwise(seen):
        window = later - earlier
        assert window.samples >= 0
        for stage in window.stages.values():
            assert min(stage.busy_s, stage.starved_s, stage.blocked_s) > -1e-3
            assert min(stage.histogram.counts) >= 0
    assert seen[-1].samples == 40 * BATCH
    assert seen[-1].batches == 40
