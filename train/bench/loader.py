"""How fast do two views of real JPEGs come, beside other loaders on the same images and cores?

peers/ holds the other loaders; one that is not installed is named with the
reason, and what it makes stands in its row. Rows 'downscaled' read shards of `cmae shards write --max-size`,
which do not hold the original images.

Predictions, written before the first run (2 CPU cores, from earlier measurements of the parts): torch
DataLoader with PIL and colour 95-105 images/s a core; our DALI graph 120-150, indexed and stream within 5 %
of each other, since decoding is the bottleneck, not reading; without colour about 180 a core against 173.
Written before the peers' first run: webdataset within 10 % of the torch DataLoader (decoding again); DALI's
own readers within 10 % of our DALI graph; the re-created authors' loader 30 % slower than PIL alone
(floats are six times the bytes); shards downscaled to 512 px 10 % faster (they hold a fifth less pixels).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cmae.errors import require
from cmae.kernels import color_jitter
from cmae.model import ModelConfig, draw_mask
from cmae.pipeline import LoaderConfig, build_loader, expand_shards, synthetic_batches
from cmae.train.bench.config import BenchConfig
from cmae.train.bench.harness import Measurement, Report, interleave, summarise, time_batches
from cmae.train.bench.images import MAX_UNPACKED, Data, unpack_images, with_indices, write_presized
from cmae.train.bench.peers import find_peers
from cmae.train.bench.peers.check import check_peer
from cmae.train.bench.peers.contract import Absent, Job, Peer
from cmae.train.config import Config

CORES = len(os.sched_getaffinity(0))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Contender(NamedTuple):
    """One row: its facts, and how to measure it once (None where it is absent)."""

    row: dict[str, str]
    run: Callable[[], Measurement] | None


def cmae_run(job: Job, *, source: Any, backend: Any, shards: list[str], count: int) -> Measurement:
    """One measurement window of our loader."""
    config = LoaderConfig(
        shards,
        views=job.views,
        batch_size=job.batch_size,
        num_threads=job.threads,
        source=source,
        view_backend=backend,
    )
    with build_loader(config, draw_mask=_mask, device=job.device, color_op=color_jitter) as loader:
        sizes = (len(batch.online) for batch in loader)
        return time_batches(sizes, warmup=3, count=count)


def peer_run(peer: Peer, job: Job, *, count: int) -> Measurement:
    """One measurement window of another loader."""
    with peer.open(job) as pairs:
        return time_batches((len(online) for online, _ in pairs), warmup=job.threads, count=count)


def synthetic_run(job: Job, *, count: int) -> Measurement:
    """The ceiling: batches that are ready, through the same mask and Batch."""
    batches = synthetic_batches(
        job.views, batch_size=job.batch_size, device=job.device, draw_mask=_mask, seed=0
    )
    return time_batches((len(batch.online) for batch in batches), warmup=1, count=count)


def _mask(sample_id: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_mask(ModelConfig(), sample_id, seed=0, epoch=epoch)


def build_contenders(
    job: Job, presized: dict[int, list[str]], *, count: int
) -> Iterator[Contender]:
    """Everything that is compared in one colour mode."""
    color = job.views.color
    best = "dali" if job.device == "cuda" else "cpu"
    other = () if job.device == "cuda" else ("dali",)
    ours = [("indexed", name) for name in (best, *other)] + [("stream", best)]
    if color == "fast":  # between the two others: one row is enough
        ours = ours[:1]
    facts = {"color": color, "version": f"cmae {version('cmae')}"}
    for source, backend in ours:
        row = {"peer": f"cmae {source}, {backend}", "views": "the recipe's", **facts}
        run = partial(cmae_run, job, source=source, backend=backend, shards=job.shards, count=count)
        yield Contender(row, run)
    for max_size, shards in presized.items() if color != "fast" else ():
        views = f"the recipe's, of images downscaled to {max_size} px (not the original files)"
        row = {"peer": f"cmae indexed, {best}; downscaled {max_size}", "views": views, **facts}
        run = partial(cmae_run, job, source="indexed", backend=best, shards=shards, count=count)
        yield Contender(row, run)
    for peer in find_peers(job):
        if isinstance(peer, Absent):
            yield Contender({"peer": peer.name, "color": color, "absent": peer.reason}, None)
            continue
        row = {"peer": peer.name, "views": peer.views, "color": color, "version": peer.version}
        yield Contender(row | {"layout": peer.layout}, partial(peer_run, peer, job, count=count))


def our_mean(job: Job) -> float:
    """Mean level of our online views over one pass of the images, or 2000 of them."""
    config = LoaderConfig(
        job.shards,
        views=job.views,
        batch_size=job.batch_size,
        num_threads=job.threads,
    )
    with build_loader(config, draw_mask=_mask, device=job.device, color_op=color_jitter) as loader:
        batches = max(1, min(loader.num_samples or 2000, 2000) // job.batch_size)
        means = [next(loader).online.float().mean().item() for _ in range(batches)]
    return sum(means) / len(means)


def check(jobs: list[Job]) -> None:
    """Look at the first batches of every peer that runs here; raise AssertionError where one is wrong."""
    for job in jobs:
        mean = our_mean(job)
        for peer in find_peers(job):
            if isinstance(peer, Absent):
                print(f"{job.views.color:<6} {peer.name}: absent: {peer.reason}")
                continue
            check_peer(peer, job, expected_mean=mean)
            print(f"{job.views.color:<6} {peer.name}: {peer.views}: as stated", flush=True)


def bench_loader(config: Config, bench: BenchConfig) -> Report:
    """Rates of our loader and of other people's on the shards of a recipe.

    Args:
        config: The recipe; `data.shards` may name any tars, `data.num_threads` the threads of all.
        bench: What to compare and how often.

    Raises:
        CmaeError: There are no shards.
    """
    require(bool(config.data.shards), "data.shards", config.data.shards, "tars to read")
    count, rounds = bench.steps or 10, bench.rounds or 5
    with tempfile.TemporaryDirectory() as folder:
        data = with_indices(expand_shards(config.data.shards), Path(folder))
        images = None
        if data.num_images <= MAX_UNPACKED and (bench.peers or bench.presized):
            images = unpack_images(data.shards, Path(folder))
        presized = {}
        if images is not None:
            for size in bench.presized:
                presized[size] = write_presized(images, Path(folder), max_size=size)
        jobs = build_jobs(config, bench, data, images)
        rows = measure(jobs, presized, count=count, rounds=rounds, peers=bench.peers)
    settings: dict[str, Any] = {"batch_size": jobs[0].batch_size, "batches": count}
    settings["rounds"] = rounds
    settings |= {"colors": [job.views.color for job in jobs], "presized": bench.presized}
    settings |= {"data": data.description, "shards": len(data.shards), "device": DEVICE}
    return Report("loader", "", settings | {"threads": jobs[0].threads}, rows)


def build_jobs(config: Config, bench: BenchConfig, data: Data, images: Path | None) -> list[Job]:
    """What is asked for in each colour mode."""
    views = config.data.views
    size = bench.batch_size or (64 if DEVICE == "cpu" else 128)
    threads = config.data.num_threads or CORES
    return [
        Job(data.shards, images, replace(views, color=color), size, threads, DEVICE)
        for color in bench.colors or [views.color]
    ]


def measure(
    jobs: list[Job], presized: dict[int, list[str]], *, count: int, rounds: int, peers: bool
) -> list[dict[str, Any]]:
    """Rows of the result file, from interleaved rounds.

    Args:
        jobs: What is asked for, by colour mode.
        presized: Shards of the same images, by the shorter side to which they are downscaled.
        count: Timed batches of a round.
        rounds: Number of rounds.
        peers: Whether other people's loaders run too.
    """
    contenders = [
        one
        for job in jobs
        for one in build_contenders(job, presized, count=count)
        if peers or one.row["peer"].startswith("cmae")
    ]
    ceiling = {"peer": "synthetic ceiling", "views": "drawn once, given again", "color": "-"}
    contenders.append(Contender(ceiling, partial(synthetic_run, jobs[-1], count=count)))
    measured = interleave(
        {f"{one.row['color']}: {one.row['peer']}": one.run for one in contenders if one.run},
        rounds=rounds,
    )
    rows: list[dict[str, Any]] = []
    for row, _ in contenders:
        results = measured.get(f"{row['color']}: {row['peer']}", [])
        rates = (
            {
                "images_per_s_per_core": summarise([m.images_per_s / CORES for m in results]),
                "cpu_s_per_1000_images": summarise([m.cpu_s_per_1000 for m in results]),
            }
            if results
            else {}
        )
        rows.append(row | rates)
    return rows
