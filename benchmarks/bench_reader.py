"""How many encoded samples does one process read, and what stops it?

    python benchmarks/bench_reader.py --shards '/data/imagenet/train-*.tar'

Reads every batch of the epoch plan through the indexed source, warm page cache, without views. Beside it
stand the parts it cannot do without: the kernel's copy out of the page cache, the CRC32, the header walk. CRC
libraries that are installed (isal, zlib_ng) are measured too; none is needed.

Predictions, written before the first run (2 cores): 25 us of CPU a sample of 110 kB without CRC, half of it
the copy, so 40k samples/s and more on two free cores; 33 us more with zlib's CRC32.
"""

from __future__ import annotations

import argparse
import importlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lib.data import prepare_shards
from lib.results import write_result

from cmae.pipeline import EpochPlan, LoaderState
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.images.jpeg import inspect_jpeg
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.train.bench.harness import Measurement, interleave, summarise, time_batches


def source_run(
    index: DatasetIndex, arguments: argparse.Namespace, *, check_crc: bool, num_readers: int
) -> Measurement:
    """One measurement window of the indexed source."""
    source = IndexedSource(
        index,
        plan=EpochPlan(len(index), arguments.batch_size),
        rank=0,
        world_size=1,
        batch_size=arguments.batch_size,
        check_crc=check_crc,
        num_readers=num_readers,
    )
    batches = source.batches(LoaderState(0, epoch=0, offset=0, digest=index.digest))
    try:
        sizes = (len(raw.records) for raw in batches)
        return time_batches(sizes, warmup=2 * num_readers, count=arguments.batches)
    finally:
        source.close()


def part_run(part: Callable[[int], Any], count: int) -> Measurement:
    """One part of a read for every sample, in this thread."""
    wall, cpu = time.perf_counter(), time.process_time()
    for number in range(count):
        part(number)
    return Measurement(count, time.perf_counter() - wall, time.process_time() - cpu)


def build_parts(index: DatasetIndex) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """(name, part for sample i); buffers are as many as a loader has in flight, so no cache holds them."""
    files = [os.open(path, os.O_RDONLY) for path in index.paths]
    ends = np.cumsum(index.size)
    memory = np.zeros(ends[-1], dtype=np.uint8)
    slots = [memory[end - size : end] for end, size in zip(ends, index.size, strict=True)]
    shards = index.locate(np.arange(len(index)))[0]

    def copy(number: int) -> int:
        return os.preadv(files[shards[number]], [slots[number]], index.byte_offset[number])

    for number in range(len(index)):
        copy(number)
    yield "part: kernel's copy (preadv)", copy
    yield "part: header walk", lambda number: inspect_jpeg(slots[number].data)
    yield "part: zlib.crc32", lambda number: zlib.crc32(slots[number].data)
    for name in ("isal.isal_zlib", "zlib_ng.zlib_ng"):
        try:
            crc32 = importlib.import_module(name).crc32
        except ModuleNotFoundError:
            continue
        yield f"part: {name}.crc32", lambda number, crc32=crc32: crc32(slots[number].data)


def build_contenders(
    index: DatasetIndex, arguments: argparse.Namespace
) -> dict[str, Callable[[], Measurement]]:
    """Everything that is measured, by name."""
    contenders: dict[str, Callable[[], Measurement]] = {}
    for check_crc in (False, True):
        for num_readers in arguments.readers:

            def run(check_crc: bool = check_crc, num_readers: int = num_readers) -> Measurement:
                return source_run(index, arguments, check_crc=check_crc, num_readers=num_readers)

            contenders[f"source, crc {'on' if check_crc else 'off'}, {num_readers} readers"] = run
    for name, part in build_parts(index):
        contenders[name] = lambda part=part: part_run(part, len(index))
    return contenders


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", help="tars; default: the sample in CMAE_DATA, else photographs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=60, help="timed batches per round")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards, data, _ = prepare_shards(arguments.shards, Path(folder))
        index = DatasetIndex.load(shards)
        measured = interleave(build_contenders(index, arguments), rounds=arguments.rounds)
    rows = [
        {
            "what": name,
            "samples_per_s": summarise([m.images_per_s for m in results]),
            "cpu_us_per_sample": summarise([1000 * m.cpu_s_per_1000 for m in results]),
        }
        for name, results in measured.items()
    ]
    for row in rows:
        rate, cost = row["samples_per_s"], row["cpu_us_per_sample"]
        print(f"{row['what']:<32} {rate['median']:9.0f} samples/s  {cost['median']:7.1f} us of CPU")
    config = {key: value for key, value in vars(arguments).items() if key != "shards"}
    write_result("reader", config=config | {"data": data, "shards": len(shards)}, rows=rows)


if __name__ == "__main__":
    main()
