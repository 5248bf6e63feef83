"""What do remote shards cost, by mode and latency, beside local files?

    python benchmarks/bench_remote.py --latencies-ms 0 20 100

Reads every sample of the shards once in the order of the epoch plan (no decoding), through the loader's own
source. The server is in a process of its own on this machine, so its CPU does not count; it waits `latency`
before each answer and sends `--mb-per-s` on each connection. `cold` begins with an empty cache, `warm` with
the one that `cold` left. Without --shards it takes the research sample.

Predictions, written before the first run: warm equals local within a few per cent (same preadv). A range read
costs about 1 ms of CPU a sample, ten times a local read with its CRC, whatever the latency. With 64
connections and 4 batches of 64 in flight, 100 ms of latency bound range reads to 4 * 64 / (0.1 s + transfer)
= 2000 samples/s or fewer; 20 ms do not bind before the CPU does. A stream of 8 MiB parts hides 100 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lib.data import prepare_shards
from lib.results import ROOT, write_result

from cmae.pipeline import EpochPlan, LoaderState, RemoteConfig
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.loader.remote_order import order_of_use
from cmae.pipeline.remote.client import Remote
from cmae.pipeline.remote.files import Reading, choose_reading
from cmae.pipeline.remote.index import copy_shard, open_cache
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.stream import StreamSource
from cmae.train.bench.harness import Measurement, interleave, summarise

BATCH = 64


@contextlib.contextmanager
def served(folder: Path, *, latency_s: float, bytes_per_s: float | None) -> Iterator[str]:
    """URL of a server in a process of its own, so that its work is not ours."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    run = partial(_serve_forever, sender, folder, latency_s, bytes_per_s)
    process = multiprocessing.get_context("spawn").Process(target=run, daemon=True)
    process.start()
    try:
        yield receiver.recv()
    finally:
        process.kill()
        process.join()


def _serve_forever(sender: Any, folder: Path, latency_s: float, bytes_per_s: float | None) -> None:
    import sys

    sys.path.insert(0, str(ROOT / "tests"))
    from remote_servers import serve

    with serve(folder, latency_s=latency_s, bytes_per_s=bytes_per_s, has_etag=True) as server:
        sender.send(server.url)
        time.sleep(3600)


def local(folder: Path) -> Measurement:
    """The same source over local files."""
    return _drain_indexed(DatasetIndex.load(sorted(map(str, folder.glob("*.tar")))), None)


def remote(urls: list[str], cache_dir: Path, *, mode: str, keep_cache: bool) -> Measurement:
    """One epoch over the server, opening included."""
    if not keep_cache:
        shutil.rmtree(cache_dir, ignore_errors=True)
    start, cpu = time.perf_counter(), _cpu_s()
    connection = Remote(RemoteConfig(mode=mode, cache_dir=cache_dir))
    if mode == "stream":
        source = StreamSource(
            urls, seed=0, rank=0, world_size=1, batch_size=BATCH, remote=connection
        )
        state = LoaderState(0, 0, 0, source.digest)
        images = _drain(source.batches(state), state)
        source.close()
    else:
        reading = choose_reading(urls, connection, needs_index=True)
        assert reading is not None
        images = _drain_indexed(reading.index, reading).images
    result = Measurement(images, time.perf_counter() - start, _cpu_s() - cpu)
    if mode == "cache" and not keep_cache:  # a short epoch ends before all shards are there
        connection = Remote(RemoteConfig(mode=mode, cache_dir=cache_dir))
        for url in urls:
            copy_shard(connection.file(url), open_cache(connection.config))
    return result


def _drain_indexed(index: DatasetIndex, reading: Reading | None) -> Measurement:
    start, cpu = time.perf_counter(), _cpu_s()
    plan = EpochPlan(len(index), BATCH)
    files = reading.open_files(order_of_use(index, plan, None)) if reading else None
    source = IndexedSource(index, plan=plan, rank=0, world_size=1, batch_size=BATCH, remote=files)
    state = LoaderState(0, 0, 0, source.digest)
    images = _drain(source.batches(state), state)
    source.close()
    return Measurement(images, time.perf_counter() - start, _cpu_s() - cpu)


def _drain(batches: Iterator[Any], state: LoaderState) -> int:
    images = 0
    for raw in batches:
        if raw.epoch != state.epoch:
            break
        images += len(raw.records)
    return images


def _cpu_s() -> float:
    return time.process_time()  # of all threads; the server is another process


def build_contenders(
    folder: Path, urls: list[str], caches: Path, latency_ms: float
) -> dict[str, Callable[[], Measurement]]:
    """Name and run of every mode, in an order in which warm follows cold."""
    shared = caches / f"shared-{latency_ms:g}"
    runs: dict[str, Callable[[], Measurement]] = {}
    if latency_ms == 0:
        runs["local files"] = partial(local, folder)
    at = f"{latency_ms:g} ms"
    for name, mode, keep in (
        ("range, first start", "range", False),
        ("range, indices at hand", "range", True),
        ("cache, cold", "cache", False),
        ("cache, warm", "cache", True),
        ("stream", "stream", True),
    ):
        cache_dir = shared if mode == "cache" else caches / f"range-{latency_ms:g}"
        runs[f"{at}: {name}"] = partial(remote, urls, cache_dir, mode=mode, keep_cache=keep)
    return runs


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", help="indexed tars; default: the sample in CMAE_DATA")
    parser.add_argument("--latencies-ms", type=float, nargs="+", default=[0.0, 20.0, 100.0])
    parser.add_argument("--mb-per-s", type=float, default=None, help="of one connection")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rate = None if arguments.mb_per_s is None else arguments.mb_per_s * 1e6
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (work / "shards").mkdir()
        shards, data, _ = prepare_shards(arguments.shards, work / "shards")
        folder = Path(shards[0]).parent
        contenders: dict[str, Callable[[], Measurement]] = {}
        for latency_ms in arguments.latencies_ms:
            url = stack.enter_context(served(folder, latency_s=latency_ms / 1000, bytes_per_s=rate))
            urls = [f"{url}/{Path(path).name}" for path in shards]
            contenders |= build_contenders(folder, urls, work / "caches", latency_ms)
        measured = interleave(contenders, rounds=arguments.rounds)
    rows = [
        {
            "mode": name,
            "images": results[0].images,
            "wall_s": summarise([m.wall_s for m in results]),
            "images_per_s": summarise([m.images_per_s for m in results]),
            "cpu_s_per_1000_images": summarise([m.cpu_s_per_1000 for m in results]),
        }
        for name, results in measured.items()
    ]
    for row in rows:
        print(
            f"{row['mode']:<36} {row['wall_s']['median']:7.2f} s wall  "
            f"{row['images_per_s']['median']:8.0f} images/s  "
            f"{row['cpu_s_per_1000_images']['median']:6.2f} CPU-s per 1000"
        )
    config = {"batch_size": BATCH, "rounds": arguments.rounds, "data": data}
    config |= {"latencies_ms": arguments.latencies_ms, "mb_per_s": arguments.mb_per_s}
    write_result("remote", config=config, rows=rows)


if __name__ == "__main__":
    main()
