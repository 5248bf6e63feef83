"""Open what a loader is made of, by its configuration."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from cmae.errors import CmaeError
from cmae.pipeline.bad_samples import BEFORE_FIRST_EPOCH, BadLimit, BadSample, Health
from cmae.pipeline.batch import DrawMask, LoaderState
from cmae.pipeline.formats.dataset_folder import stated_downscaled
from cmae.pipeline.formats.dataset_index import DatasetIndex
from cmae.pipeline.formats.presized import downscaled_line
from cmae.pipeline.formats.shard_index import index_path
from cmae.pipeline.loader.config import LoaderConfig
from cmae.pipeline.loader.loader import Loader, Wrap
from cmae.pipeline.loader.remote_order import order_of_use
from cmae.pipeline.remote.client import Remote, RemoteConfig
from cmae.pipeline.remote.files import Reading, choose_reading
from cmae.pipeline.remote.progress import FillProgress
from cmae.pipeline.remote.schemes import is_local, is_remote
from cmae.pipeline.sampling.epoch_plan import EpochPlan
from cmae.pipeline.sources.difference import ShardFacts, describe_difference, file_name
from cmae.pipeline.sources.expand import expand_shards
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.left_out import lost_members
from cmae.pipeline.sources.records import Source
from cmae.pipeline.sources.stream import StreamSource
from cmae.pipeline.views.backend import ViewBackend
from cmae.pipeline.views.color_batch import ColorOp
from cmae.pipeline.views.config import ViewStep
from cmae.pipeline.views.cpu import CpuViews
from cmae.pipeline.views.dali import DaliViews
from cmae.pipeline.views.decode_check import DecodeChoice, choose_decode


def build_loader(
    config: LoaderConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    state: LoaderState | None = None,
    draw_mask: DrawMask | None = None,
    ledger: Path | None = None,
    limit_bad: bool = True,
    progress: Callable[[FillProgress], None] | None = None,
    wrap: Wrap | None = None,
    color_op: ColorOp | None = None,
    decode: DecodeChoice | None = None,
    shards_before: Sequence[Sequence[object]] | None = None,
) -> Loader:
    """Open shards and start reading.

    Args:
        config: Shards, views, sizes and speed.
        rank: Rank of this process.
        world_size: Number of ranks.
        device: Device on which batches are put.
        state: Place in the data at which to continue; None = the beginning.
        draw_mask: Called in the background with (sample_id on the device, epoch); None = no masks.
        ledger: JSON lines file for bad records.
        limit_bad: Raise DataError above `config.max_bad_fraction` of bad records on this rank. False: the
            caller adds `Loader.bad_samples` over all ranks and decides.
        progress: Called about once a second from a background thread while remote shards are copied.
        wrap: Called with the source and the view backend; returns what the loader uses instead (the profiler
            puts its switches there).
        color_op: What colours a batch on a GPU, such as `cmae.kernels.color_jitter`; None = torch operators.
        decode: How JPEGs are decoded for a GPU, where ranks have agreed on it; None = as configured, or by
            trying.
        shards_before: `Loader.shards` of the run that `state` comes from; other shards are named by it.

    Raises:
        CmaeError: A size, the state or the shard list does not fit; the message names the repair.
        FileNotFoundError: source='indexed' and a shard has no index.
        StaleIndexError: An index was made for another tar.
        RemoteError: A remote shard or its store does not answer.
    """
    device = torch.device(device)
    config = config.resolved(world_size)
    # What is open is closed again where a later part cannot be had.
    with ExitStack() as undo:
        opened = open_source(
            config, rank=rank, world_size=world_size, state=state, progress=progress
        )
        source = opened.source
        undo.callback(source.close)
        state = _place_to_begin(state, opened, shards_before, seed=config.seed)
        decode = decode or decode_for(config, device)
        view_backend = open_views(config, device, color_op=color_op, decode=decode)
        undo.callback(view_backend.close)
        limit = BadLimit(config.max_bad_fraction) if limit_bad else None
        health = Health(ledger=ledger, limit=limit, rank=rank, first_epoch=state.epoch)
        health.note_left_out(opened.left_out)
        if wrap is not None:
            source, view_backend = wrap(source, view_backend)
        loader = Loader(
            source,
            view_backend,
            config=config,
            device=device,
            state=state,
            health=health,
            draw_mask=draw_mask,
            downscaled=opened.downscaled,
            decode=decode if device.type == "cuda" else None,
            shards=opened.shards,
        )
        undo.pop_all()
    return loader


class OpenSource(NamedTuple):
    """A source, and what is known of its shards."""

    source: Source
    unit: Literal["sample", "shard"]
    """What its states count."""
    downscaled: str
    """Line that says which images are not the original files; '' if all are."""
    left_out: list[BadSample]
    """Records that the indexes leave out; on rank 0 alone."""
    shards: list[ShardFacts]
    """The shards in their order."""


def open_source(
    config: LoaderConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    state: LoaderState | None = None,
    progress: Callable[[FillProgress], None] | None = None,
) -> OpenSource:
    """Open the shards for reading by index, or as a stream.

    Args:
        config: Shards and sizes.
        rank: Rank of this process.
        world_size: Number of ranks.
        state: Place at which reading will begin, and the copying of remote shards; None = the beginning.
        progress: Called while remote shards are copied.

    Raises:
        CmaeError: A size or the shard list does not fit.
        FileNotFoundError: source='indexed' and a shard has no index.
        StaleIndexError: An index was made for another tar.
        RemoteError: A remote shard or its store does not answer.
    """
    config = config.resolved(world_size)
    if not 0 <= rank < world_size:
        raise CmaeError(f"rank={rank} must be in 0..{world_size - 1} (world_size={world_size})")
    remote = RemoteConfig(
        mode=config.remote,
        cache_dir=config.cache_dir,
        cache_quota_gib=config.cache_quota_gib,
        deadline_s=config.remote_deadline_s,
        storage_options=config.storage_options,
        progress=progress,
    )
    paths = expand_shards(config.shards, storage_options=config.storage_options)
    index, reading = _find_index(config.source, paths, remote)
    if index is None:
        return _open_stream(config, paths, remote, rank=rank, world_size=world_size)
    return _open_indexed(config, index, reading, state, rank=rank, world_size=world_size)


def open_views(
    config: LoaderConfig,
    device: torch.device,
    *,
    last_step: ViewStep = "color",
    color_op: ColorOp | None = None,
    decode: DecodeChoice | None = None,
) -> ViewBackend:
    """Open the view backend.

    Args:
        config: Views, backend and threads.
        device: Device of the views.
        last_step: Last operation on an image; for measurements, see the backends.
        color_op: What colours a batch on a GPU; None = torch operators.
        decode: How JPEGs are decoded for a GPU; None = as configured, or by trying.

    Raises:
        CmaeError: The backend cannot work on this device.
    """
    num_threads, batch_size = _threads_and_batch(config)
    if _pick_backend(config.view_backend, device) == "cpu":
        return CpuViews(config.views, num_threads=num_threads, last_step=last_step)
    return DaliViews(
        config.views,
        device,
        batch_size=batch_size,
        num_threads=num_threads,
        hw_decoder_load=config.hw_decoder_load,
        last_step=last_step,
        color_op=color_op,
        decode_way=(decode or decode_for(config, device)).way,
    )


def decode_for(config: LoaderConfig, device: torch.device) -> DecodeChoice:
    """How JPEGs are decoded on a device: as configured, or by trying."""
    if device.type != "cuda":
        return DecodeChoice("window")
    if config.gpu_decode != "auto":
        return DecodeChoice(config.gpu_decode)
    choice = choose_decode(device.index or 0)
    if choice.passed_over:
        warnings.warn(choice.describe(), RuntimeWarning, stacklevel=2)
    return choice


def _threads_and_batch(config: LoaderConfig) -> tuple[int, int]:
    if config.num_threads is None or config.batch_size is None:
        config = config.resolved()
    assert config.num_threads is not None
    assert config.batch_size is not None
    return config.num_threads, config.batch_size


def _open_indexed(
    config: LoaderConfig,
    index: DatasetIndex,
    reading: Reading | None,
    state: LoaderState | None,
    *,
    rank: int,
    world_size: int,
) -> OpenSource:
    assert config.batch_size is not None
    assert config.global_batch_size is not None
    plan = EpochPlan(
        len(index),
        config.global_batch_size,
        seed=config.seed,
        shuffle=config.shuffle,
        block_size=config.shuffle_block,
        window_size=config.shuffle_window,
        last_batch=config.last_batch,
    )
    _check_grid(state, config.global_batch_size, stride=world_size * config.batch_size)
    source = IndexedSource(
        index,
        plan=plan,
        rank=rank,
        world_size=world_size,
        batch_size=config.batch_size,
        num_readers=config.num_readers,
        remote=reading.open_files(order_of_use(index, plan, state)) if reading else None,
    )
    left_out = _left_out(index) if rank == 0 else []
    rows = zip(index.paths, index.shard_sizes.tolist(), index.tar_digests, strict=True)
    facts = [ShardFacts(file_name(path), size, digest) for path, size, digest in rows]
    downscaled = downscaled_line(index.downscaled, len(index))
    return OpenSource(source, "sample", downscaled, left_out, facts)


def _open_stream(
    config: LoaderConfig, paths: Sequence[str], remote: RemoteConfig, *, rank: int, world_size: int
) -> OpenSource:
    assert config.batch_size is not None
    if config.last_batch == "pad":
        raise CmaeError(
            "last_batch='pad' needs to know the samples of an epoch beforehand, and a stream does not: make "
            "indexes with `cmae shards index`, or set last_batch=drop"
        )
    source = StreamSource(
        paths,
        seed=config.seed,
        shuffle=config.shuffle,
        remote=Remote(remote),
        rank=rank,
        world_size=world_size,
        batch_size=config.batch_size,
    )
    downscaled = stated_downscaled([path for path in paths if is_local(path)])
    facts = [ShardFacts(file_name(path), -1, "") for path in paths]
    return OpenSource(source, "shard", downscaled, [], facts)


def _left_out(index: DatasetIndex) -> list[BadSample]:
    lost = zip(index.paths, index.members, strict=True)
    return [line for path, members in lost for line in lost_members(path, members)] + [
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
    backend: Literal["auto", "dali", "cpu"], device: torch.device
) -> Literal["dali", "cpu"]:
    if backend == "auto":
        return "dali" if device.type == "cuda" else "cpu"
    if backend == "cpu" and device.type != "cpu":
        raise CmaeError(f"view_backend='cpu' makes views on the CPU; device={device} needs 'dali'")
    return backend


def _find_index(
    source: str, paths: Sequence[str], remote: RemoteConfig
) -> tuple[DatasetIndex | None, Reading | None]:
    """The index, and how its shards are read where they are remote; None and None for a stream."""
    if source == "stream":
        return None, None
    if all(map(is_remote, paths)):
        reading = choose_reading(paths, Remote(remote), needs_index=source == "indexed")
        return (None, None) if reading is None else (reading.index, reading)
    if source == "indexed" or all(is_local(path) and index_path(path).exists() for path in paths):
        return DatasetIndex.load(paths), None
    return None, None


def _check_grid(state: LoaderState | None, global_batch_size: int, *, stride: int) -> None:
    """Refuse to continue inside a global batch at a place where no batch of these sizes begins."""
    inside = 0 if state is None else state.offset % global_batch_size
    if state is not None and inside % stride:
        raise CmaeError(
            f"the state to continue from has offset={state.offset}, which is {inside} samples into "
            f"a global batch of {global_batch_size}; {stride} = world_size * batch_size samples at a time "
            "do not reach its end from there. Take a state from between two optimiser steps (checkpoints "
            "hold such), the global_batch_size of the run before, or a smaller batch_size"
        )


def _place_to_begin(
    state: LoaderState | None,
    opened: OpenSource,
    shards_before: Sequence[Sequence[object]] | None,
    *,
    seed: int,
) -> LoaderState:
    """The state to continue from, checked against the data, or that of the beginning."""
    digest, unit = opened.source.digest, opened.unit
    if state is None:
        return LoaderState(seed, epoch=0, offset=0, digest=digest, unit=unit)
    if state.seed != seed:
        raise CmaeError(
            f"the state to continue from has seed={state.seed}, the loader seed={seed}: order, views and "
            f"masks would change in the middle of the run. Set seed={state.seed}, or start a new run"
        )
    if state.digest != digest:
        lines = describe_difference(shards_before or (), opened.shards) if shards_before else ""
        lines = lines or f"digest {state.digest} there, {digest} here"
        raise CmaeError(
            "the state to continue from belongs to other data than the shards given now:\n  "
            f"{lines}\ngive the same shards in the same order, or start a new run from the weights "
            "(--init_from)",
            key="shards",
        )
    if state.unit not in (unit, "unstated"):
        raise CmaeError(
            f"the state to continue from counts in units of a {state.unit}, this source in units of "
            f"a {unit}; set `source` as in the run before"
        )
    return replace(state, unit=unit)
