"""The loader over http and s3 gives what it gives over local files, whatever the server does."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from support.loaders import loader_of
from support.pipeline_data import toy_mask, write_photo_shards
from support.remote_servers import FaultyServer, serve, serve_s3

from cmae.pipeline import (
    Batch,
    EpochPlan,
    FillProgress,
    Loader,
    LoaderState,
    RemoteConfig,
    RemoteError,
    ViewConfig,
    expand_shards,
)
from cmae.pipeline.formats.dataset_index import DatasetIndex, Place, build_indices
from cmae.pipeline.formats.shard_index import index_path
from cmae.pipeline.loader.remote_order import order_of_use
from cmae.pipeline.remote import client, stores
from cmae.pipeline.remote.cache import ShardCache
from cmae.pipeline.remote.client import Remote
from cmae.pipeline.remote.files import RemoteFiles
from cmae.train.commands import shards as shards_cli

VIEWS = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)
SIZES = (13, 20, 11, 9)  # 53 samples: 3 steps of 16, so 6 batches an epoch


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    paths = write_photo_shards(folder, sizes=SIZES, edge=200)
    assert all(result.error is None for result in build_indices([str(path) for path in paths]))
    return folder


@pytest.fixture
def server(shards: Path):
    with serve(shards) as running:
        yield running


@pytest.fixture(scope="module")
def expected(shards: Path) -> list[Batch]:
    return take(open_loader(shards), 9)


def open_loader(shards, *, mode: str = "auto", cache_dir: Path | None = None, **options) -> Loader:
    settings = {"batch_size": 8, "global_batch_size": 16, "num_threads": 2, "seed": 5}
    remote = {"remote": mode, "cache_dir": cache_dir, "remote_deadline_s": 20.0}
    return loader_of(shards, VIEWS, draw_mask=toy_mask, **(settings | remote | options))


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return list(islice(loader, count))


def urls(server: FaultyServer) -> str:
    return f"{server.url}/part-{{000..003}}.tar"


def assert_same(batches: Sequence[Batch], expected: Sequence[Batch]) -> None:
    assert len(batches) == len(expected)
    for one, other in zip(batches, expected, strict=True):
        for name in ("online", "target", "ids_keep", "ids_mask", "sample_id", "label"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert (one.epoch, one.state) == (other.epoch, other.state)


def wait_for_copies(cache_dir: Path, count: int = len(SIZES)) -> None:
    deadline = time.monotonic() + 20
    while len(list(cache_dir.rglob("*.tar"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def retries_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.01)


@pytest.fixture(autouse=True)
def home_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indices of shards without a `cache_dir` go here, and not to the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "cmae"


# --- equal to local files ---------------------------------------------------------------------------------


def test_ranges_give_the_local_batches(
    server: FaultyServer, expected: list[Batch], home_cache: Path
) -> None:
    assert_same(take(open_loader(urls(server), mode="range"), 9), expected)
    assert not list(home_cache.rglob("*.tar"))
    assert len(list(home_cache.rglob("*.index.npz"))) == 4


def test_samples_that_lie_together_are_one_request(server: FaultyServer, shards: Path) -> None:
    remote = Remote(RemoteConfig())
    file = remote.file(f"{server.url}/part-001.tar")
    index = DatasetIndex.load([shards / "part-001.tar"])
    files = RemoteFiles([file], index, cache=None, order=[0])
    places = [Place(0, 100_000, 5_000), Place(0, 1_000, 7_000), Place(0, 8_500, 100)]
    content = (shards / "part-001.tar").read_bytes()
    buffer = np.empty(12_100, np.uint8)
    found = [data.tobytes() for data in files.read_batch(places, buffer)]
    assert found == [content[start : start + size] for _, start, size in places]
    assert buffer.tobytes() == b"".join(found)
    assert [(r.start, r.end) for r in server.asked("part-001.tar")] == [(1_000, 105_000)]
    files.close()


def test_a_cold_and_a_warm_cache_give_the_local_batches(
    server: FaultyServer, expected: list[Batch], tmp_path: Path
) -> None:
    with open_loader(urls(server), cache_dir=tmp_path / "c") as loader:
        cold = [next(loader)]
        wait_for_copies(tmp_path / "c")
        cold += list(islice(loader, 8))
    assert_same(cold, expected)
    server.requests.clear()
    assert_same(take(open_loader(urls(server), cache_dir=tmp_path / "c"), 9), expected)
    assert [r.end - r.start for r in server.requests] == [1] * 4  # is it still the same version?


def test_s3_gives_the_local_batches(
    shards: Path, expected: list[Batch], tmp_path: Path, home_cache: Path
) -> None:
    with serve_s3(shards, "bucket") as options:
        for pattern in ("s3://bucket/train/part-{000..003}.tar", "s3://bucket/train/*.tar"):
            assert_same(take(open_loader(pattern, storage_options=options), 9), expected)
        cached = {"cache_dir": tmp_path / "c", "storage_options": options}
        with open_loader("s3://bucket/train/", **cached) as loader:
            first = next(loader)
            wait_for_copies(tmp_path / "c")
            assert_same([first, *islice(loader, 8)], expected)
        stream = open_loader("s3://bucket/train", mode="stream", storage_options=options)
        local = open_loader(shards, source="stream")
        for one, other in zip(take(stream, 4), take(local, 4), strict=True):
            assert torch.equal(one.sample_id, other.sample_id)
            assert torch.equal(one.target, other.target)
        with pytest.raises(ValueError, match=r"s3://bucket/none/.*matches no tar file"):
            expand_shards("s3://bucket/none/*.tar", storage_options=options)


@pytest.mark.parametrize("done", [1, 5, 7])
def test_resume_is_exact(
    server: FaultyServer, expected: list[Batch], done: int, tmp_path: Path
) -> None:
    state = expected[done - 1].state
    for cache_dir in (None, tmp_path / "c"):
        loader = open_loader(urls(server), state=state, cache_dir=cache_dir)
        assert_same(take(loader, 9 - done), expected[done:])


def test_a_run_may_move_between_local_and_remote_shards(
    server: FaultyServer, shards: Path, expected: list[Batch]
) -> None:
    start = take(open_loader(urls(server)), 4)
    rest = take(open_loader(shards, state=start[-1].state), 5)
    assert_same(start + rest, expected)


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_stream_gives_the_samples_of_local_tars(
    server: FaultyServer, shards: Path, has_ranges: bool
) -> None:
    server.has_ranges = has_ranges
    options = {"batch_size": 53, "global_batch_size": 53}
    (remote,) = take(open_loader(urls(server), mode="stream", **options), 1)
    (local,) = take(open_loader(shards, source="stream", **options), 1)
    for batch in (remote, local):
        assert len(set(batch.sample_id.tolist())) == 53
    one, other = remote.sample_id.argsort(), local.sample_id.argsort()
    assert torch.equal(remote.sample_id[one], local.sample_id[other])
    assert torch.equal(remote.online[one], local.online[other])
    assert torch.equal(remote.label[one], local.label[other])


# --- what is chosen ---------------------------------------------------------------------------------------


def test_without_an_index_auto_streams_and_says_how_to_get_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_photo_shards(tmp_path / "s", sizes=[8, 8])
    with serve(tmp_path / "s") as server:
        with caplog.at_level(logging.WARNING):
            (batch,) = take(open_loader(f"{server.url}/"), 1)
        assert batch.state.offset in (0, 1)
        assert re.search(r"(part-00\d)\.tar has no index \1\.index\.npz beside it", caplog.text)
        assert "cmae shards index" in caplog.text
        with pytest.raises(
            FileNotFoundError, match=r"cmae shards index .*part-00\d\.tar --cache_dir"
        ):
            open_loader(f"{server.url}/", source="indexed")
        with pytest.raises(FileNotFoundError, match="has no index"):
            open_loader(f"{server.url}/", mode="range")


def test_forbidden_means_missing_where_a_store_must_not_be_listed(
    server: FaultyServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail("index.npz", "403", times=100)
    with open_loader(urls(server)) as loader:
        assert loader.steps_per_epoch is None
    assert "has no index" in caplog.text


def test_an_index_made_in_the_cache_gives_the_batches_of_an_indexed_store(
    shards: Path, expected: list[Batch], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s").mkdir()
    for path in shards.glob("*.tar"):
        (tmp_path / "s" / path.name).symlink_to(path)
    with serve(tmp_path / "s") as server:
        assert shards_cli.index(f"{server.url}/", cache_dir=tmp_path / "c") == 0
        assert "53 samples in 4 shards: 4 indexed, 0 fresh" in capsys.readouterr().out
        assert shards_cli.index(f"{server.url}/", cache_dir=tmp_path / "c") == 0
        assert "0 indexed, 4 fresh" in capsys.readouterr().out
        loader = open_loader(f"{server.url}/", mode="range", cache_dir=tmp_path / "c")
        assert_same(take(loader, 9), expected)


def test_verify_and_inspect_look_at_copies(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shards_cli.verify(urls(server), cache_dir=tmp_path / "c") == 0
    assert "no problem in 53 samples, 4 shards" in capsys.readouterr().out
    sheet = tmp_path / "sheet.png"
    assert shards_cli.inspect(urls(server), sheet=sheet, cache_dir=tmp_path / "c") == 0
    assert "53 baseline" in capsys.readouterr().out
    assert sheet.stat().st_size > 1000
    with pytest.raises(ValueError, match="--cache_dir"):
        shards_cli.verify(urls(server))
    with pytest.raises(ValueError, match="is a pipe"):
        shards_cli.verify("pipe:cat a.tar", cache_dir=tmp_path / "c")


def test_a_server_without_ranges_is_streamed_or_copied_and_never_read_by_range(
    server: FaultyServer, expected: list[Batch], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.has_ranges = False
    assert_same(take(open_loader(urls(server), cache_dir=tmp_path / "c"), 9), expected)
    assert sum(request.start is None for request in server.asked(".tar")) == 4  # each once
    with open_loader(urls(server)) as loader:
        assert loader.steps_per_epoch is None
    assert "no byte ranges" in caplog.text
    with pytest.raises(ValueError, match="remote='range' does not work with"):
        open_loader(urls(server), mode="range")
    with pytest.raises(ValueError, match="quota that holds all shards"):
        open_loader(
            urls(server), mode="cache", cache_dir=tmp_path / "d", cache_quota_gib=50_000 / 2**30
        )


def test_http_folders_are_listed_and_an_empty_one_is_named(server: FaultyServer) -> None:
    found = [f"{server.url}/part-{number:03d}.tar" for number in range(4)]
    assert expand_shards(f"{server.url}/") == found
    assert expand_shards(f"{server.url}/part-*.tar") == found
    assert expand_shards(f"{server.url}/part-00[01].tar") == found[:2]
    with pytest.raises(ValueError, match="matches no tar file"):
        expand_shards(f"{server.url}/val-*.tar")


def test_a_stale_index_in_the_store_is_refused(shards: Path, tmp_path: Path) -> None:
    (path,) = write_photo_shards(tmp_path / "s", sizes=[8])
    index_path(path).write_bytes(index_path(shards / "part-000.tar").read_bytes())
    with serve(tmp_path / "s") as server, pytest.raises(ValueError, match="was made for"):
        open_loader(f"{server.url}/part-000.tar")


# --- faults under way -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_faults_in_the_middle_change_nothing(
    server: FaultyServer,
    expected: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
) -> None:
    monkeypatch.setattr(stores, "STALL_S", 0.3)
    monkeypatch.setattr(stores, "MIN_BYTES_PER_S", 20_000)
    with open_loader(urls(server), cache_dir=tmp_path / "c" if cached else None) as loader:
        batches = [next(loader)]
        for fault in ("500", "503", "truncated", "reset", "trickle", "too_short", "too_long"):
            server.fail(".tar", fault, times=2, after=1)
        batches += list(islice(loader, 8))
    assert_same(batches, expected)


def test_a_store_that_dies_ends_the_run_with_the_named_error_in_time(
    server: FaultyServer, tmp_path: Path
) -> None:
    with open_loader(urls(server), remote_deadline_s=1.0) as loader:
        next(loader)
        server.fail("part-002.tar", "503", times=10**6)
        begun = time.monotonic()
        with pytest.raises(RemoteError, match=r"part-002\.tar: reading bytes .* \(deadline 1 s\)"):
            list(islice(loader, 40))
        assert time.monotonic() - begun < 10


def test_the_cache_outlives_the_store(
    server: FaultyServer, expected: list[Batch], tmp_path: Path
) -> None:
    with open_loader(urls(server), cache_dir=tmp_path / "c", remote_deadline_s=2.0) as loader:
        batches = [next(loader)]
        wait_for_copies(tmp_path / "c")
        time.sleep(0.1)
        server.fail(".tar", "503", times=10**6)
        batches += list(islice(loader, 8))
    assert_same(batches, expected)


def test_a_failing_disk_of_the_cache_is_not_taken_for_bad_data(
    server: FaultyServer,
    expected: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_loader(urls(server), cache_dir=tmp_path / "c") as loader:
        next(loader)
        wait_for_copies(tmp_path / "c")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with open_loader(urls(server), cache_dir=tmp_path / "c") as loader:
        assert_same([next(loader) for _ in expected], expected)
        assert loader.bad_samples == 0
    assert "the copy of" in caplog.text
    assert "Input/output error" in caplog.text


def copy_with_a_flipped_bit(shards: Path, to: Path) -> None:
    """A store whose part-001.tar is not what its index says."""
    to.mkdir()
    for path in shards.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    damaged = bytearray((shards / "part-001.tar").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (to / "part-001.tar").write_bytes(damaged)


def test_verify_and_repair_take_damaged_shards_from_a_store(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_with_a_flipped_bit(shards, tmp_path / "s")
    with serve(tmp_path / "s") as server:
        assert shards_cli.verify(urls(server), cache_dir=tmp_path / "c") == 1
        told = capsys.readouterr()
        assert re.search(r"part-001\.tar, 01-.*CRC32", told.out + told.err)
        assert shards_cli.repair(urls(server), tmp_path / "clean", cache_dir=tmp_path / "c") == 0
        # What was taken unchecked is nothing that a run would read.
        assert not list((tmp_path / "c").glob("*/part-001.tar"))
    assert shards_cli.verify(str(tmp_path / "clean" / "*.tar")) == 0


def test_an_image_that_is_damaged_in_the_store_is_replaced_and_written_down(
    shards: Path, tmp_path: Path
) -> None:
    copy_with_a_flipped_bit(shards, tmp_path / "s")
    ledger = tmp_path / "bad.jsonl"
    with (
        serve(tmp_path / "s") as server,
        open_loader(urls(server), cache_dir=tmp_path / "c", ledger=ledger) as loader,
    ):
        for _ in range(12):
            next(loader)
        assert loader.bad_samples >= 1
        copies = {path.name for path in (tmp_path / "c").rglob("*.tar")}
    line = json.loads(ledger.read_text().splitlines()[0])
    assert line["shard"] == f"{server.url}/part-001.tar"
    assert line["key"].startswith("01-")
    assert "CRC32" in line["reason"]
    assert "part-001.tar" not in copies


def test_a_shard_that_is_replaced_during_the_run_ends_it(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for path in shards.iterdir():
        (tmp_path / "s" / path.name).write_bytes(path.read_bytes())
    with serve(tmp_path / "s", has_etag=False) as server, open_loader(urls(server)) as loader:
        next(loader)
        other = (shards / "part-001.tar").read_bytes()
        (tmp_path / "s" / "part-000.tar").write_bytes(other)
        with pytest.raises(
            RemoteError, match=r"part-000\.tar was replaced during the run: \d+ bytes"
        ):
            list(islice(loader, 40))


def test_slow_storage_shows_as_waiting(server: FaultyServer, expected: list[Batch]) -> None:
    with open_loader(urls(server)) as loader:
        server.latency_s = 0.4
        batches = list(islice(loader, 8 + 9))  # the first may have been read ahead
        waited_s = loader.wait_s
    assert_same(batches[:9], expected)
    assert waited_s > 0.7  # at least two rounds of the four readers


def test_close_does_not_wait_for_a_store_that_hangs(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "STALL_S", 60.0)
    before = set(threading.enumerate())
    loader = open_loader(urls(server), remote_deadline_s=60.0)
    next(loader)
    server.latency_s = 8.0
    time.sleep(0.3)
    begun = time.monotonic()
    loader.close()
    assert time.monotonic() - begun < 3.0
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("cmae")]


# --- the cache under a run --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cold_start_reports_its_progress(
    server: FaultyServer, expected: list[Batch], tmp_path: Path
) -> None:
    server.latency_s = 0.5
    reports: list[FillProgress] = []
    with open_loader(urls(server), cache_dir=tmp_path / "c", progress=reports.append) as loader:
        batches = [next(loader)]
        wait_for_copies(tmp_path / "c")
        server.latency_s = 0.0
        batches += list(islice(loader, 8))
        time.sleep(0.2)
    assert_same(batches, expected)
    shard_reports = [report for report in reports if report.what == "shards"]
    last = shard_reports[-1]
    assert (last.num_done, last.num_total) == (4, 4)
    assert (
        last.bytes_done
        == last.bytes_total
        == sum(int(path.stat().st_size) for path in (tmp_path / "c").rglob("*.tar"))
    )
    assert last.bytes_per_s > 0
    done = [report.bytes_done for report in shard_reports]
    assert done == sorted(done)


def test_with_a_small_quota_the_rest_is_read_by_range(
    server: FaultyServer, shards: Path, expected: list[Batch], tmp_path: Path, caplog
) -> None:
    sizes = [path.stat().st_size for path in shards.glob("*.tar")]
    quota = int(sum(sizes) * 0.6)
    with open_loader(
        urls(server), cache_dir=tmp_path / "c", cache_quota_gib=quota / 2**30
    ) as loader:
        batches = list(islice(loader, 9))
        deadline = time.monotonic() + 10
        while "of 4 shards are on the disk" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        kept = {path.name for path in (tmp_path / "c").rglob("*.tar")}
        next(loader)
    assert_same(batches, expected)
    assert "of 4 shards are on the disk and the rest is read by range" in caplog.text
    assert 1 <= len(kept) < 4
    assert ShardCache(tmp_path / "c").used_bytes() <= quota
    assert kept == {path.name for path in (tmp_path / "c").rglob("*.tar")}  # none gave way


def test_two_runs_share_the_copies(
    server: FaultyServer, shards: Path, expected: list[Batch], tmp_path: Path
) -> None:
    one = open_loader(urls(server), cache_dir=tmp_path / "c")
    two = open_loader(urls(server), cache_dir=tmp_path / "c")
    with one, two:
        firsts = [next(one)], [next(two)]
        wait_for_copies(tmp_path / "c")
        for first, loader in zip(firsts, (one, two), strict=True):
            assert_same(first + list(islice(loader, 8)), expected)
    for path in shards.glob("*.tar"):
        size = path.stat().st_size
        whole = [r for r in server.asked(path.name) if (r.start, r.end) == (0, size)]
        assert len(whole) == 1


def test_modes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs cache_dir"):
        RemoteConfig(mode="cache")
    with pytest.raises(ValueError, match="remote='disk'"):
        RemoteConfig(mode="disk")
    with pytest.raises(ValueError, match="deadline_s=0"):
        RemoteConfig(deadline_s=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        ShardCache(tmp_path / "file" / "c")


def test_shards_are_copied_in_the_order_in_which_the_plan_needs_them(shards: Path) -> None:
    index = DatasetIndex.load(sorted(shards.glob("*.tar")))
    plan = EpochPlan(len(index), 4, seed=3, block_size=4, window_size=8)
    assert sorted(order_of_use(index, plan, None)) == [0, 1, 2, 3]
    for epoch, start in ((0, 0), (0, 20), (1, 32)):
        state = LoaderState(3, epoch, start, index.digest)
        needed = index.locate(plan.order(epoch)[start:])[0].tolist()
        order = order_of_use(index, plan, state)
        assert sorted(order) == [0, 1, 2, 3]
        assert order[: len(set(needed))] == list(dict.fromkeys(needed))
