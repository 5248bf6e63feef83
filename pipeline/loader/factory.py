"""The loader: shards in, batches of views and masks out, ready on the device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch

from cmae.pipeline.bad_samples import BEFORE_FIRST_EPOCH, BadLimit, BadSample, Health
from cmae.pipeline.batch import DrawMask, LoaderState
from cmae.pipeline.formats.dataset_folder import stated_downscaled
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.presized import downscaled_line
from cmae.pipeline.formats.shard_index import index_path
from cmae.pipeline.loader.loader import Loader, Wrap
from cmae.pipeline.loader.prefetcher import Prefetcher
from cmae.pipeline.loader.remote_order import order_of_use
from cmae.pipeline.remote.client import Remote, RemoteConfig
from cmae.pipeline.remote.files import Reading, choose_reading
from cmae.pipeline.remote.schemes import is_local, is_remote
from cmae.pipeline.sampling.epoch_plan import EpochPlan
from cmae.pipeline.sources.expand import expand_shards
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.records import Source
from cmae.pipeline.sources.stream import StreamSource
from cmae.pipeline.views.backend import ViewBackend
from cmae.pipeline.views.config import ViewConfig, ViewStep
from cmae.pipeline.views.cpu import CpuViews
from cmae.pipeline.views.dali import DaliViews

_DEFAULT_REMOTE = RemoteConfig()


def build_loader(
    shards: str | Path | Sequence[str | Path],
    views: ViewConfig,
    *,
    batch_size: int,
    global_batch_size: int,
    draw_mask: DrawMask,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    num_threads: int | None = None,
    prefetch: int = 2,
    state: LoaderState | None = None,
    shuffle: bool = True,
    shuffle_block: int = 1,
    shuffle_window: int = 16384,
    source: Literal["auto", "indexed", "stream"] = "auto",
    backend: Literal["auto", "dali", "host"] = "auto",
    hw_decoder_load: float = 0.65,
    num_readers: int = 4,
    ledger: Path | None = None,
    max_bad_fraction: float | None = 0.01,
    probation: int = 1000,
    check_crc: bool = True,
    last_batch: Literal["drop", "pad"] = "drop",
    remote: RemoteConfig = _DEFAULT_REMOTE,
    wrap: Wrap | None = None,
) -> Loader:
    """Open shards and start reading.

    Args:
        shards: tars, patterns or URLs; see `expand_shards`.
        views: what the views are.
        batch_size: images in a batch of this rank.
        global_batch_size: images in an optimiser step over all ranks; a multiple of world_size * batch_size.
        draw_mask: called in the background with (sample_id on the device, epoch).
        rank: of this process.
        world_size: number of ranks.
        seed: of order, views and masks.
        device: where batches are put.
        num_threads: CPU threads that decode; None = one per core this process may use.
        prefetch: ready batches kept ahead.
        state: where to continue; None = the beginning.
        shuffle: draw a new order in every epoch.
        shuffle_block: samples that stay near each other in that order, see `EpochPlan`; 1 is uniform.
        shuffle_window: samples among which blocks are mixed.
        source: 'indexed' needs a sidecar index for every shard, 'stream' none; 'auto' looks.
        backend: 'dali' or 'host' make the views; 'auto' is DALI on CUDA and the faster host way on a CPU.
        hw_decoder_load: share of the JPEGs for the GPU's decoder unit; the best value differs by machine.
        num_readers: batches that are read at the same time; an indexed source has that many threads.
        ledger: JSON lines file for bad records.
        max_bad_fraction: raise DataError above this fraction of bad records on this rank. None = the caller
            adds `Loader.bad_samples` over all ranks and decides.
        probation: samples before that fraction is looked at.
        check_crc: compare files with the CRC32 in the index.
        last_batch: leave the samples out that do not fill an epoch's last global batch, or 'pad' it with the
            epoch's first ones (`EpochPlan.padding`). A stream can only drop: each rank leaves out what does
            not fill its own last batch.
        remote: how shards behind URLs are read.
        wrap: gets the source and the view maker and returns what the loader uses instead (the profiler puts
            its switches there).

    Raises:
        ValueError: A size, the state or the shard list does not fit; the message names the repair.
        FileNotFoundError: source='indexed' and a shard has no index.
        StaleIndexError: An index was made for another tar.
        RemoteError: A remote shard or its store does not answer.
    """
    device = torch.device(device)
    _check_sizes(batch_size, global_batch_size, rank=rank, world_size=world_size, prefetch=prefetch)
    if num_readers < 1:
        raise ValueError(f"num_readers={num_readers} must be at least 1; 4 is the default")
    paths = expand_shards(shards, storage_options=remote.storage_options)
    first_epoch = 0 if state is None else state.epoch
    limit = None if max_bad_fraction is None else BadLimit(max_bad_fraction, probation)
    health = Health(ledger=ledger, limit=limit, rank=rank, first_epoch=first_epoch)
    place = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
    opened: Source
    index, reading = _find_index(source, paths, remote)
    if index is not None:
        plan = EpochPlan(
            len(index),
            global_batch_size,
            seed=seed,
            shuffle=shuffle,
            block_size=shuffle_block,
            window_size=shuffle_window,
            last_batch=last_batch,
        )
        _check_grid(state, global_batch_size, stride=world_size * batch_size)
        if rank == 0:
            health.note_left_out(_left_out(index))
        files = reading.open_files(order_of_use(index, plan, state)) if reading else None
        opened = IndexedSource(
            index, plan=plan, check_crc=check_crc, num_readers=num_readers, remote=files, **place
        )
        downscaled = downscaled_line(index.downscaled, len(index))
    elif last_batch == "pad":
        raise ValueError(
            "last_batch='pad' needs to know the samples of an epoch beforehand, and a stream does not: make "
            "indexes with `cmae shards index`, or set last_batch=drop"
        )
    else:
        opened = StreamSource(paths, seed=seed, shuffle=shuffle, remote=Remote(remote), **place)
        downscaled = stated_downscaled([path for path in paths if is_local(path)])
    with ExitStack() as undo:  # what is open is closed again where a later part cannot be had
        undo.callback(opened.close)
        if state is None:
            state = LoaderState(seed, epoch=0, next_sample=0, digest=opened.digest)
        _check_state(state, seed=seed, digest=opened.digest)
        view_backend = build_view_backend(
            views,
            device,
            backend=backend,
            batch_size=batch_size,
            num_threads=num_threads or len(os.sched_getaffinity(0)),
            hw_decoder_load=hw_decoder_load,
        )
        undo.callback(view_backend.close)
        if wrap is not None:
            opened, view_backend = wrap(opened, view_backend)
        prefetcher = Prefetcher(
            opened,
            view_backend,
            views=views,
            draw_mask=draw_mask,
            device=device,
            state=state,
            prefetch=prefetch,
        )
        undo.pop_all()
    return Loader(
        opened,
        view_backend,
        prefetcher=prefetcher,
        health=health,
        state=state,
        downscaled=downscaled,
    )


def build_view_backend(
    views: ViewConfig,
    device: torch.device,
    *,
    backend: Literal["auto", "dali", "host"],
    batch_size: int,
    num_threads: int,
    hw_decoder_load: float,
    last_step: ViewStep = "color",
) -> ViewBackend:
    """What makes the views of a loader; for `last_step` see the makers.

    Raises:
        ValueError: The backend is unknown, or cannot work on this device.
    """
    if _pick_backend(backend, device) == "host":
        return CpuViews(views, num_threads=num_threads, last_step=last_step)
    return DaliViews(
        views,
        device,
        batch_size=batch_size,
        num_threads=num_threads,
        hw_decoder_load=hw_decoder_load,
        last_step=last_step,
    )


def _left_out(index: DatasetIndex) -> list[BadSample]:
    return [
        BadSample(
            index.paths[shard],
            index.key(shard, record_number),
            record_number,
            f"left out by the index: {kind.name.lower()} JPEG (`cmae shards verify` says more)",
            BEFORE_FIRST_EPOCH,
        )
        for shard, record_number, kind in index.left_out
    ]


def _pick_backend(
    backend: Literal["auto", "dali", "host"], device: torch.device
) -> Literal["dali", "host"]:
    if backend == "auto":
        return "dali" if device.type == "cuda" else "host"
    if backend not in ("dali", "host"):
        raise ValueError(f"backend={backend!r} must be auto, dali or host")
    if backend == "host" and device.type != "cpu":
        raise ValueError(f"backend='host' makes views on the CPU; device={device} needs 'dali'")
    return backend


def _find_index(
    source: str, paths: Sequence[str], remote: RemoteConfig
) -> tuple[DatasetIndex | None, Reading | None]:
    """The index, and how its shards are read where they are remote; None and None for a stream."""
    if source not in ("auto", "indexed", "stream"):
        raise ValueError(f"source={source!r} must be auto, indexed or stream")
    if source == "stream":
        return None, None
    if all(map(is_remote, paths)):
        reading = choose_reading(paths, Remote(remote), needs_index=source == "indexed")
        return (None, None) if reading is None else (reading.index, reading)
    if source == "indexed" or all(is_local(path) and index_path(path).exists() for path in paths):
        return DatasetIndex.load(paths), None
    return None, None


def _check_sizes(
    batch_size: int, global_batch_size: int, *, rank: int, world_size: int, prefetch: int
) -> None:
    if batch_size < 1 or prefetch < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size={batch_size} and prefetch={prefetch} must be at least 1, and rank={rank} "
            f"in 0..{world_size - 1} (world_size={world_size})"
        )
    if global_batch_size % (world_size * batch_size):
        raise ValueError(
            f"global_batch_size={global_batch_size} must be a multiple of world_size * batch_size = "
            f"{world_size} * {batch_size}: an optimiser step is a whole number of batches of every rank"
        )


def _check_grid(state: LoaderState | None, global_batch_size: int, *, stride: int) -> None:
    """Refuse to continue inside a global batch at a place where no batch of these sizes begins."""
    inside = 0 if state is None else state.next_sample % global_batch_size
    if state is not None and inside % stride:
        raise ValueError(
            f"the state to continue from has next_sample={state.next_sample}, which is {inside} samples into "
            f"a global batch of {global_batch_size}; {stride} = world_size * batch_size samples at a time "
            "do not reach its end from there. Take a state from between two optimiser steps (checkpoints "
            "hold such), the global_batch_size of the run before, or a smaller batch_size"
        )


def _check_state(state: LoaderState, *, seed: int, digest: str) -> None:
    if state.seed != seed:
        raise ValueError(
            f"the state to continue from has seed={state.seed}, the loader seed={seed}: order, views and "
            f"masks would change in the middle of the run. Set seed={state.seed}, or start a new run"
        )
    if state.digest != digest:
        raise ValueError(
            f"the state to continue from belongs to other data (digest {state.digest}) than the shards "
            f"given now ({digest}). Give the same shards in the same order, or start a new run"
        )
