"""The cache of whole shards: one copy a node, nothing wrong under a final name, never above its quota."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from support.pipeline_data import write_photo_shards
from support.remote_servers import FaultyServer, serve

from cmae.pipeline.errors import RemoteError
from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.formats.shard_index import index_path
from cmae.pipeline.remote import cache as cache_module
from cmae.pipeline.remote import client
from cmae.pipeline.remote.cache import CacheFullError, ShardCache
from cmae.pipeline.remote.client import Remote, RemoteConfig, RemoteFile
from cmae.pipeline.remote.index import check_copy, copy_shard, fetch_index

PART = 2_000
NUM_SHARDS = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[Path]:
    paths = write_photo_shards(tmp_path_factory.mktemp("store"), sizes=[8] * NUM_SHARDS)
    assert all(result.error is None for result in build_indices([str(path) for path in paths]))
    return paths


@pytest.fixture
def server(shards: list[Path]):
    with serve(shards[0].parent) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", quota_bytes=10**9)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small parts, and retries at once; a forked process has them too."""
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(client, "PART_BYTES", PART)


@pytest.fixture
def whole_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard is one part."""
    monkeypatch.setattr(client, "PART_BYTES", 10**6)


def connect(server: FaultyServer, **options) -> list[RemoteFile]:
    remote = Remote(RemoteConfig(**({"deadline_s": 20.0} | options)))
    return [remote.file(f"{server.url}/part-{n:03d}.tar") for n in range(NUM_SHARDS)]


def no_check(path: Path) -> None:
    pass


def names(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in cache.folder.rglob("*.tar"))


def leftovers(cache: ShardCache) -> list[str]:
    return [p.name for p in cache.folder.rglob(".*") if p.suffix in (".partial", ".parts")]


def test_a_copy_is_the_shard_and_its_index_lies_beside_it(
    server: FaultyServer, cache: ShardCache, shards: list[Path]
) -> None:
    (file, *_) = connect(server)
    path = copy_shard(file, cache)
    assert path.name == "part-000.tar"
    assert path.read_bytes() == shards[0].read_bytes()
    assert index_path(path).read_bytes() == index_path(shards[0]).read_bytes()
    assert not leftovers(cache)
    asked = len(server.requests)
    assert copy_shard(file, cache) == path
    assert len(server.requests) == asked


@pytest.mark.parametrize("fault", ["503", "truncated", "reset", "too_short"])
def test_a_fault_on_the_way_leaves_the_right_copy(
    server: FaultyServer, cache: ShardCache, shards: list[Path], fault: str
) -> None:
    file = connect(server)[1]
    server.fail("part-001.tar", fault, times=2, after=2)
    assert copy_shard(file, cache).read_bytes() == shards[1].read_bytes()
    assert file.remote.num_retries == 2


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.usefixtures("whole_parts")
def test_damage_on_the_way_is_fetched_again(
    server: FaultyServer, cache: ShardCache, shards: list[Path], has_ranges: bool
) -> None:
    server.has_ranges = has_ranges
    file = connect(server)[0]
    check = partial(check_copy, index_file=fetch_index(file, cache))
    server.fail("part-000.tar", "rotten", times=1)
    path = cache.fetch(file, check=check)
    assert path.read_bytes() == shards[0].read_bytes()
    whole = [r for r in server.asked("part-000.tar") if r.end == file.size and not r.start]
    assert len(whole) >= 2


@pytest.mark.usefixtures("whole_parts")
def test_damage_that_stays_is_an_error_with_what_was_found_and_expected(
    server: FaultyServer, cache: ShardCache
) -> None:
    file = connect(server)[0]
    check = partial(check_copy, index_file=fetch_index(file, cache))
    server.fail("part-000.tar", "rotten", times=1000)
    with pytest.raises(
        RemoteError,
        match=r"part-000\.tar: the copy is wrong, twice: digest \w{16} over .*index says \w{16}\. The object",
    ):
        cache.fetch(file, check=check)
    assert not names(cache)
    assert not leftovers(cache)


def test_damage_in_the_middle_is_found_by_the_images_crc(
    server: FaultyServer, cache: ShardCache, shards: list[Path], tmp_path: Path
) -> None:
    big = write_photo_shards(tmp_path / "big", sizes=[8], edge=600)[0]
    build_indices([str(big)])
    data = bytearray(big.read_bytes())
    assert len(data) > 300_000
    data[len(data) // 2] ^= 1
    rotten = tmp_path / "rotten.tar"
    rotten.write_bytes(data)
    with pytest.raises(ValueError, match=r"CRC32 \w{8} of image 00-00\d, its index says \w{8}"):
        check_copy(rotten, index_file=index_path(big))
    check_copy(big, index_file=index_path(big))


@pytest.mark.usefixtures("whole_parts")
def test_the_stores_checksum_is_compared_where_there_is_no_index(
    server: FaultyServer, cache: ShardCache
) -> None:
    server.sends_md5 = True
    file = connect(server)[0]
    assert len(file.info.md5) == 32
    server.fail("part-000.tar", "rotten", times=1000)
    with pytest.raises(RemoteError, match=rf"twice: MD5 \w{{32}}, the store says {file.info.md5}"):
        cache.fetch(file, check=no_check)


def test_a_sha256_file_beside_a_shard_is_compared_where_there_is_no_index(
    tmp_path: Path, cache: ShardCache
) -> None:
    (path,) = write_photo_shards(tmp_path / "store", sizes=[4])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with serve(path.parent) as server:
        file = Remote(RemoteConfig()).file(f"{server.url}/part-000.tar")
        (path.parent / "part-000.tar.sha256").write_text(f"{'0' * 64}  part-000.tar\n")
        with pytest.raises(RemoteError, match=f"SHA-256 {digest}, .* says {'0' * 64}"):
            copy_shard(file, cache)
        assert not names(cache)
        (path.parent / "part-000.tar.sha256").write_text(f"{digest}  part-000.tar\n")
        assert copy_shard(file, cache).read_bytes() == path.read_bytes()


def test_a_new_version_in_the_store_is_not_served_from_the_old_copy(
    tmp_path: Path, cache: ShardCache
) -> None:
    (path,) = write_photo_shards(tmp_path / "store", sizes=[4])
    with serve(path.parent) as server:
        remote = Remote(RemoteConfig())
        old = remote.file(f"{server.url}/part-000.tar")
        copy_shard(old, cache)
        path.write_bytes(path.read_bytes()[::-1])  # of the same size
        new = remote.file(old.url)
        assert cache.open(new.url, new.info) is None
        assert copy_shard(new, cache).read_bytes() == path.read_bytes()
        assert cache.open(old.url, old.info) is None


def test_a_renewed_signature_finds_the_same_copy(server: FaultyServer, cache: ShardCache) -> None:
    file = connect(server)[0]
    names = [f"{file.url}?X-Amz-Signature={secret}&id=7" for secret in ("one", "two")]
    assert cache.path(names[0]) == cache.path(names[1])
    assert cache.path(names[0]) != cache.path(f"{file.url}?id=8")


# --- quota ------------------------------------------------------------------------------------------------


def test_the_copy_that_nobody_read_for_longest_makes_room(
    server: FaultyServer, tmp_path: Path
) -> None:
    files = connect(server)
    cache = ShardCache(tmp_path / "cache", quota_bytes=3 * max(file.size for file in files))
    for number, file in enumerate(files[:3]):
        path = cache.fetch(file, check=no_check)
        os.utime(path, (1000 + number, 1000 + number))
    cache.open(files[0].url, files[0].info).close()  # used now
    cache.fetch(files[3], check=no_check)
    assert names(cache) == ["part-000.tar", "part-002.tar", "part-003.tar"]
    assert cache.used_bytes() <= cache.quota_bytes


def test_a_copy_in_use_is_never_removed(server: FaultyServer, tmp_path: Path) -> None:
    files = connect(server)
    cache = ShardCache(tmp_path / "cache", quota_bytes=2 * max(file.size for file in files))
    held = []
    for file in files[:2]:
        cache.fetch(file, check=no_check)
        held.append(cache.open(file.url, file.info))
    with pytest.raises(CacheFullError, match=r"no room for part-002\.tar.*cache_quota_gib"):
        cache.fetch(files[2], check=no_check)
    assert names(cache) == ["part-000.tar", "part-001.tar"]
    held[1].close()
    cache.fetch(files[2], check=no_check)
    assert names(cache) == ["part-000.tar", "part-002.tar"]
    assert cache.used_bytes() <= cache.quota_bytes


def test_a_copy_that_another_process_reads_is_never_removed(
    server: FaultyServer, tmp_path: Path
) -> None:
    files = connect(server)
    cache = ShardCache(tmp_path / "cache", quota_bytes=max(file.size for file in files))
    path = cache.fetch(files[0], check=no_check)
    program = """
import fcntl, sys
with open(sys.argv[1], "rb") as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    print("reading", flush=True)
    sys.stdin.read()
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert reader.stdout.readline() == b"reading\n"
    with pytest.raises(CacheFullError):
        cache.fetch(files[1], check=no_check)
    reader.kill()  # and the lock goes with it
    reader.wait()
    cache.fetch(files[1], check=no_check)
    assert names(cache) == ["part-001.tar"]


def test_copies_in_the_making_count_in_full(server: FaultyServer, tmp_path: Path) -> None:
    files = connect(server)
    cache = ShardCache(tmp_path / "cache", quota_bytes=int(1.5 * files[0].size))
    server.latency_s = 0.3
    other = threading.Thread(target=partial(cache.fetch, files[0], check=no_check))
    other.start()
    deadline = time.monotonic() + 10
    while not leftovers(cache) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(CacheFullError):
        cache.fetch(files[1], check=no_check)
    other.join()
    assert names(cache) == ["part-000.tar"]


def test_a_full_disk_is_named(
    server: FaultyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100})()
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheFullError, match=r"the disk has 0\.00 GiB free"):
        cache.fetch(connect(server)[0], check=no_check)


def test_a_copy_takes_its_name_only_while_nobody_adds_up_the_folder(
    server: FaultyServer, cache: ShardCache
) -> None:
    seen: list[list[str]] = []

    def add_up(lock: int) -> None:
        time.sleep(0.2)
        seen.append(names(cache))
        os.close(lock)

    def check(path: Path) -> None:
        lock = os.open(cache.folder / ".lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Thread(target=add_up, args=(lock,)).start()

    cache.fetch(connect(server)[0], check=check)
    assert seen == [[]]
    assert names(cache) == ["part-000.tar"]


# --- several processes, and their deaths ------------------------------------------------------------------


def copy_all(server: FaultyServer, folder: Path) -> None:
    for file in connect(server):
        ShardCache(folder, quota_bytes=10**9).fetch(file, check=no_check)


def start(server: FaultyServer, cache: ShardCache) -> BaseProcess:
    # Forked: a new interpreter would import torch for seconds. fsspec starts a new event loop in the child.
    process = get_context("fork").Process(target=copy_all, args=(server, cache.folder))
    process.start()
    return process


def test_two_processes_copy_each_shard_once(
    server: FaultyServer, cache: ShardCache, shards: list[Path]
) -> None:
    server.bytes_per_s = 20_000  # slow enough for them to meet
    both = [start(server, cache) for _ in range(2)]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    for file, shard in zip(connect(server), shards, strict=True):
        assert cache.path(file.url).read_bytes() == shard.read_bytes()
    for number, shard in enumerate(shards):
        asked = server.asked(f"part-{number:03d}.tar")
        starts = [r.start for r in asked if r.end - r.start > 1 and r.end - r.start <= PART]
        parts = [s for s in starts if s % PART == 0 and s > 0]
        assert sorted(parts) == list(range(PART, shard.stat().st_size, PART))


def test_a_kill_in_the_middle_leaves_no_shard_and_the_next_process_goes_on(
    server: FaultyServer, cache: ShardCache, shards: list[Path]
) -> None:
    server.bytes_per_s = 5_000
    process = start(server, cache)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        notes = [note.read_text().splitlines() for note in cache.folder.rglob(".*.parts")]
        if notes and max(map(len, notes)) >= 3:
            break
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not names(cache)
    assert len(leftovers(cache)) == 2

    server.bytes_per_s = None
    server.requests.clear()
    file = connect(server)[0]
    assert copy_shard(file, cache).read_bytes() == shards[0].read_bytes()
    whole_parts = [r for r in server.asked("part-000.tar") if r.end - r.start == PART]
    assert 0 < len(whole_parts) <= file.num_parts - 2
    assert not leftovers(cache)


def test_parts_that_a_crash_damaged_are_read_again(
    server: FaultyServer, cache: ShardCache, shards: list[Path]
) -> None:
    file = connect(server)[0]
    stop = threading.Event()
    with pytest.raises(InterruptedError):
        cache.fetch(
            file,
            check=no_check,
            stop=stop,
            progress=lambda amount: stop.set() if amount else None,
        )
    (partial_copy,) = cache.folder.rglob("*.partial")
    with open(partial_copy, "r+b") as damaged:  # as if the disk had lost what was written last
        damaged.write(bytes(PART))
    with open(next(iter(cache.folder.rglob("*.parts"))), "a") as notes:
        notes.write("1 12")  # and the last line was cut off
    assert cache.fetch(file, check=no_check).read_bytes() == shards[0].read_bytes()


def test_a_process_that_hangs_with_the_lock_is_named(
    server: FaultyServer, cache: ShardCache
) -> None:
    file = connect(server, deadline_s=0.5)[0]
    lock = cache.path(file.url).with_name(".part-000.tar.lock")
    lock.parent.mkdir()
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert cache.try_fetch(file, check=no_check) is None
        begun = time.monotonic()
        with pytest.raises(RemoteError, match=r"another process.*part-000\.tar\.lock.*for 0\.5 s"):
            cache.fetch(file, check=no_check)
        assert time.monotonic() - begun < 2.0
    assert cache.fetch(file, check=no_check) is not None
