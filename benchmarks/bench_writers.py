"""How fast do writers of shards turn a folder of JPEGs into their format?

    python benchmarks/bench_writers.py --images /data/imagenet/val --peers /tmp/peers/bin/python

The same files with the same labels, in shards of about 64 MB, from the page cache to the same disk; each run
in a process of its own that is timed after its imports. `--peers` is a Python that has litdata,
mosaicml-streaming and webdataset; what it lacks is left out. Beside them stands a plain copy of the files,
the ceiling. What each does beside writing is not the same: ours also reads every header, takes a CRC32 of
every image and a SHA-256 of every tar, writes an index for random access, and syncs every shard to the disk.

Predictions, written before the first run (2 cores): a copy of 110 kB files 6,000 images/s, ours half of it,
for the reading of headers and the digests; webdataset's one thread 2,500; LitData with two processes 2,000;
MosaicML's one thread 2,000.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARD_BYTES = 64 << 20


def list_images(root: Path) -> list[tuple[str, int]]:
    """(path, label) of every JPEG, one class a folder, shuffled as all writers get them."""
    classes = sorted(path.name for path in root.iterdir() if path.is_dir())
    found = [
        (str(path), label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).iterdir())
    ]
    random.Random(0).shuffle(found)
    return found


def write_cmae(images: Path, out: Path, workers: int) -> Callable[[], object]:
    """Ours; `digests` are part of it."""
    from cmae.pipeline.shards.originals.image_folder import scan_image_folder
    from cmae.pipeline.shards.write import write_shards

    return lambda: write_shards(
        scan_image_folder(images),
        out,
        max_shard_bytes=SHARD_BYTES,
        samples_per_shard=100_000,
        workers=workers,
    )


def write_copy(images: Path, out: Path, workers: int) -> Callable[[], object]:
    """The ceiling: every file into one, nothing else."""
    found = list_images(images)

    def run() -> None:
        with open(out.with_suffix(".copy"), "wb") as file:
            for path, _ in found:
                file.write(Path(path).read_bytes())

    return run


def write_webdataset(images: Path, out: Path, workers: int) -> Callable[[], object]:
    """ShardWriter, one thread, as its documentation shows it."""
    import webdataset

    found = list_images(images)
    out.mkdir()

    def run() -> None:
        pattern, options = f"{out}/x-%06d.tar", {"maxsize": SHARD_BYTES, "maxcount": 100_000}
        with webdataset.ShardWriter(pattern, verbose=0, **options) as sink:
            for number, (path, label) in enumerate(found):
                data = Path(path).read_bytes()
                sink.write({"__key__": f"{number:08d}", "jpg": data, "cls": label})

    return run


def read_for_litdata(item: tuple[str, int]) -> dict[str, Any]:
    """One sample for LitData."""
    return {"image": Path(item[0]).read_bytes(), "label": item[1]}


def write_litdata(images: Path, out: Path, workers: int) -> Callable[[], object]:
    """`litdata.optimize` with as many processes as the others have threads."""
    import litdata

    found = list_images(images)
    return lambda: litdata.optimize(
        fn=read_for_litdata,
        inputs=found,
        output_dir=str(out),
        chunk_bytes=SHARD_BYTES,
        num_workers=workers,
    )


def write_mosaicml(images: Path, out: Path, workers: int) -> Callable[[], object]:
    """MDSWriter, without compression and hashes, as its documentation shows it."""
    from streaming import MDSWriter

    found = list_images(images)

    def run() -> None:
        columns = {"image": "bytes", "label": "int"}
        with MDSWriter(out=str(out), columns=columns, size_limit=SHARD_BYTES) as sink:
            for path, label in found:
                sink.write({"image": Path(path).read_bytes(), "label": label})

    return run


WRITERS = {
    "copy into one file": write_copy,
    "cmae": write_cmae,
    "webdataset": write_webdataset,
    "LitData": write_litdata,
    "MosaicML Streaming": write_mosaicml,
}


def run_one(name: str, images: Path, workers: int) -> None:
    """One timed run in this process; prints JSON."""
    with tempfile.TemporaryDirectory(dir=images.parent) as folder:
        out = Path(folder) / "train"
        run = WRITERS[name](images, out, workers)
        start, cpu = time.perf_counter(), _cpu_s()
        run()
        seconds, cpu = time.perf_counter() - start, _cpu_s() - cpu
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    print(json.dumps({"seconds": seconds, "cpu_s": cpu, "bytes": size}))


def _cpu_s() -> float:
    """Of this process and its children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(python: str, name: str, images: Path, workers: int) -> dict[str, float] | None:
    """One run in a fresh process; None where the package is missing."""
    command = [python, __file__, "--images", str(images), "--workers", str(workers), "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: left out: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def repeat_images(images: Path, times: int, to: Path) -> int:
    """Copy a folder of classes `times` over; return the number of images."""
    for path, label in list_images(images):
        for number in range(times):
            folder = to / f"{label:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f"{Path(path).stem}-{number}.JPEG")
    return len(list_images(to))


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder, one subfolder a class")
    parser.add_argument("--times", type=int, default=1, help="copies of each image, to have more")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has the peers")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", choices=WRITERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments.images, arguments.workers)
        return
    from lib.results import write_result

    from cmae.train.bench.harness import summarise

    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        num_images = repeat_images(arguments.images, arguments.times, images)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in WRITERS}
        for _ in range(arguments.rounds):
            for name in WRITERS:
                found = measure(arguments.peers, name, images, arguments.workers)
                runs[name] += [found] if found else []
    rows = [
        {
            "writer": name,
            "images_per_s": summarise([num_images / one["seconds"] for one in found]),
            "cpu_ms_per_image": summarise([1000 * one["cpu_s"] / num_images for one in found]),
            "bytes_per_image": found[0]["bytes"] / num_images,
        }
        for name, found in runs.items()
        if found
    ]
    for row in rows:
        rate, cost = row["images_per_s"]["median"], row["cpu_ms_per_image"]["median"]
        print(f"{row['writer']:<20} {rate:8.0f} images/s  {cost:6.2f} ms of CPU an image")
    config = {"images": num_images, "workers": arguments.workers, "shard_bytes": SHARD_BYTES}
    write_result("writers", config=config | {"rounds": arguments.rounds}, rows=rows)


if __name__ == "__main__":
    main()
