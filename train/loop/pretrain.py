"""The pretraining loop: data, step, record, checkpoint, from the first sample to the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cmae.errors import CmaeError
from cmae.kernels import color_jitter, use_backend
from cmae.model import build_model, draw_mask
from cmae.model.export.checkpoints import check_finite
from cmae.model.export.shards import SHARDS, shards_of
from cmae.model.export.stored import CheckpointError, load_checkpoint
from cmae.pipeline import FillProgress, Loader, LoaderState, build_loader
from cmae.pipeline.bad_samples import LEDGER_FILE, BadLimit
from cmae.pipeline.loader.loader import Wrap
from cmae.train.batch_split import BatchSplit, split_batch
from cmae.train.checkpoints.folder import (
    find_checkpoint,
    origin_of,
    set_aside_newer,
)
from cmae.train.checkpoints.lock import hold_folder
from cmae.train.checkpoints.mirror import fetch_newest, open_mirror
from cmae.train.config import Config
from cmae.train.distributed import (
    World,
    from_main,
    gather_values,
    is_lost_rank,
    join_world,
    largest,
)
from cmae.train.evaluation.online import OnlineEvaluation
from cmae.train.loop.loader_settings import LoaderSettings, agree_on_decode, loader_settings
from cmae.train.loop.resume_rules import check_changes
from cmae.train.loop.step import TrainStep, check_step
from cmae.train.loop.step_batches import StepBatches
from cmae.train.loop.training import (
    LostRankError,
    OpenRun,
    Outcome,
    RollBack,
    StopSignals,
    Training,
)
from cmae.train.loop.weights import load_initial_weights
from cmae.train.monitor.metrics import ColdStart
from cmae.train.monitor.run_log import RunLog
from cmae.train.monitor.watchdog import Watchdog
from cmae.train.old_keys import update_keys


def pretrain(config: Config) -> Outcome:
    """Train until the schedule ends, `run.stop_at_step`, or a signal; continue where the last run stopped.

    Raises:
        CmaeError: Settings that do not fit each other, the data or the machine.
        TrainingError: The loss is no longer finite, or too much of the data is bad.
    """
    with join_run(config) as world, _one_line_for_a_lost_rank(world), ExitStack() as stack:
        if world.is_main:
            stack.enter_context(hold_folder(config.run.out / "checkpoints"))
        back: RollBack | None = None
        while True:
            with open_run(config, world, back=back) as training:
                ended = training.run()
            if isinstance(ended, Outcome):
                return ended
            back, config = ended, replace(config, run=replace(config.run, resume="auto"))


@contextmanager
def _one_line_for_a_lost_rank(world: World) -> Iterator[None]:
    """Say what a collective's error means: another rank has ended, and its own message says why.

    Raises:
        TrainingError: Instead of the error of gloo or NCCL.
    """
    try:
        yield
    except RuntimeError as error:
        if world.world_size == 1 or not is_lost_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise LostRankError(
            f"rank {world.rank} lost another rank, whose own message says why ({reason}). The last "
            "checkpoint is whole: the same command goes on from it"
        ) from error


@contextmanager
def open_run(config: Config, world: World, *, back: RollBack | None = None) -> Iterator[Training]:
    """Open loader, model and log of a run, at its beginning or where its checkpoint left it.

    Args:
        config: Configuration of the run, whose folder the first rank holds.
        world: This process among all.
        back: Place behind the data that led the run astray; None where nothing did.

    Raises:
        CmaeError: Settings that do not fit each other, the data or the machine.
    """
    with ExitStack() as stack:
        notes: list[str] = []
        found = _agree_on_checkpoint(config, world, note=notes.append)
        resumed, changes = _load_complete(found, config) if found else (None, [])
        if resumed is not None and back is not None:
            notes.append(_gone_back(resumed["step"], back, config))
            resumed |= {**back.data, "rollbacks": back.history}
        before = resumed.get("micro_batch_size") if resumed else None
        split = split_batch(config, world, before=before, log=notes.append)
        cold_start = ColdStart(prints=world.is_main)
        loader = stack.enter_context(
            open_loader(config, split, world, resumed=resumed, progress=cold_start)
        )
        _check_same_data(loader, world)
        total_steps = _total_steps(config, loader)
        step = resumed["step"] if resumed else 0
        if step > total_steps:
            raise CheckpointError(_beyond_the_schedule(found, step, total_steps))
        watchdog = stack.enter_context(
            Watchdog(config.run.out, world.rank, limit_s=_hang_limit_s(config))
        )
        run_log = stack.enter_context(
            RunLog(
                config,
                world,
                start_step=step,
                total_steps=total_steps,
                loader=loader,
                doing=lambda: watchdog.doing,
            )
        )
        run_log.opening(found, changes)
        for line in notes:
            run_log.log(line)
        named = config.run.resume
        if resumed and named not in ("auto", "never") and Path(named) != found:
            run_log.log(f"it comes from {named}; to begin there again, choose another run.out")
        if world.is_main:
            for path in set_aside_newer(config.run.out / "checkpoints", step):
                run_log.log(f"set aside, since this run does not come from it: {path}")
        cold_start.show = run_log.fill
        model = build_model(config.model, seed=config.seed)
        if config.init_from is not None and not resumed:
            run_log.log(load_initial_weights(model, config.init_from))
        train_step = TrainStep(
            model.to(world.device), config.optim, config.speed, world, log=run_log.log
        )
        if resumed:
            folder = shards_of(found) if found and SHARDS in resumed else None
            train_step.load_state_dict(resumed, shards=folder)
        stop = stack.enter_context(StopSignals())
        step_batches = _open_step_batches(
            config, world, loader, stop, resumed, doing=partial(setattr, watchdog, "doing")
        )
        origin = origin_of(config.run.resume, resumed)
        rollbacks = resumed.get("rollbacks", []) if resumed else []
        del resumed  # a second copy of all weights
        online = OnlineEvaluation(config, world) if config.run.eval_shards else None
        run = OpenRun(
            config,
            world,
            split,
            loader,
            step_batches,
            train_step,
            run_log,
            origin,
            online,
            watchdog,
            rollbacks,
        )
        # Saved at once after going back, or a kill would have it go astray again.
        yield Training(run, step, total_steps=total_steps, saves_first=back is not None)


def _hang_limit_s(config: Config) -> float | None:
    """A read that is tried again until its deadline does not hang."""
    limit_s, deadline_s = config.run.hang_s, config.data.remote_deadline_s
    return None if limit_s is None else max(limit_s, 1.1 * deadline_s)


def _gone_back(step: int, back: RollBack, config: Config) -> str:
    made, place = back.history[-1], back.history[-1]["data"]
    count = (made["after_step"] - step + made["skipped"]) * config.optim.global_batch_size
    return (
        f"GONE BACK to step {step}: {made['skipped']} steps in a row after step {made['after_step']} were "
        f"skipped. The {count} samples since that checkpoint are left out, and the run goes on behind "
        f"them (epoch {place['epoch']}, sample {place['offset']} of its order). This is done "
        f"{config.optim.max_rollbacks} time(s) at most (optim.max_rollbacks)"
    )


@contextmanager
def join_run(config: Config) -> Iterator[World]:
    """Join the run's ranks, with its kernels and torch's threads set.

    Args:
        config: Configuration of the run.

    Raises:
        CmaeError: Settings that do not fit each other or the machine.
    """
    with join_world(config.speed.device) as world, use_backend(config.speed.kernels):
        check_step(config.optim, config.speed, world)
        if config.speed.micro_batch_size != "auto":
            split_batch(config, world)  # refuses what does not divide before anything is made
        if config.speed.torch_threads is not None:
            torch.set_num_threads(config.speed.torch_threads)
        yield world


def _beyond_the_schedule(path: Path | None, step: int, total_steps: int) -> str:
    return (
        f"{path} is at step {step}, and the schedule has only {total_steps} steps now: optim.epochs or "
        "optim.total_steps was lowered below what has been trained. Set them as they were, or begin from an "
        "earlier checkpoint (run.resume=PATH), whose learning rate still has to fall"
    )


def _agree_on_checkpoint(
    config: Config, world: World, *, note: Callable[[str], None]
) -> Path | None:
    """The checkpoint that the first rank finds; every rank must see the same file."""
    own = None
    if world.is_main:
        if config.run.mirror is not None and config.run.resume in ("auto", "never"):
            fetch_newest(
                open_mirror(config.run.mirror, config.data.storage_options),
                config.run.out,
                note=note,
            )
        own = find_checkpoint(config.run.resume, config.run.out / "checkpoints", note=note)
    found: Path | None = from_main(own, world)
    missing = largest(int(found is not None and not found.is_file()), world)
    if missing:
        raise CheckpointError(
            f"{found}: the first rank sees this checkpoint and another rank does not; run.out must lie "
            "on storage that all nodes share"
        )
    return found


def _load_complete(path: Path, config: Config) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint, and a line for each setting that this run changes."""
    state = load_checkpoint(path, whole=False)
    state["config"] = update_keys(state["config"]).settings
    if "optimizer" not in state:
        raise CheckpointError(
            f"{path} holds weights alone, with no optimiser and no place in the data to resume; start a "
            f"run from them with --init_from {path}"
        )
    changes = check_changes(path, state, config)
    if SHARDS not in state:
        check_finite(state["model"], str(path), error=CheckpointError)
    return state, changes


def open_loader(
    config: Config,
    split: BatchSplit,
    world: World,
    *,
    settings: LoaderSettings | None = None,
    resumed: dict[str, Any] | None = None,
    progress: Callable[[FillProgress], None] | None = None,
    wrap: Wrap | None = None,
) -> Loader:
    """This rank's loader, at the beginning or where a checkpoint left it.

    Args:
        config: Configuration of the run.
        split: Shares of the global batch.
        world: This process among all.
        settings: Threads and queues; None takes those of the configuration.
        resumed: Complete checkpoint to go on from.
        progress: Called as remote shards are copied.
        wrap: Layer around source and view backend, see `build_loader`.

    Raises:
        CmaeError: No shards, or settings that do not fit them.
    """
    check_shards(config)
    settings = settings or loader_settings(config.data, world.device.type)
    data = replace(
        config.data,
        views=config.loader_views,
        batch_size=split.micro_batch_size,
        global_batch_size=config.optim.global_batch_size,
        seed=config.seed,
        **asdict(settings),
    )
    return build_loader(
        data,
        rank=world.rank,
        world_size=world.world_size,
        device=world.device,
        state=LoaderState.from_dict(resumed["loader"]) if resumed else None,
        draw_mask=lambda sample_id, epoch: draw_mask(
            config.model, sample_id, seed=config.seed, epoch=epoch
        ),
        ledger=config.run.out / LEDGER_FILE,
        limit_bad=False,  # StepBatches looks at the counts of all ranks
        progress=progress,
        wrap=wrap,
        color_op=color_jitter,
        decode=agree_on_decode(data, world),
        shards_before=resumed.get("shards") if resumed else None,
    )


def _open_step_batches(
    config: Config,
    world: World,
    loader: Loader,
    stop: StopSignals,
    resumed: dict[str, Any] | None,
    doing: Callable[[str], None],
) -> StepBatches:
    return StepBatches(
        loader,
        world,
        limit=BadLimit(config.data.max_bad_fraction),
        ledger=config.run.out / LEDGER_FILE,
        global_batch_size=config.optim.global_batch_size,
        stop_signal=lambda: stop.number,
        deadline_s=config.data.remote_deadline_s,
        counts=resumed.get("data_health") if resumed else None,
        doing=doing,
    )


def check_shards(config: Config) -> None:
    """Refuse a configuration without data.

    Raises:
        CmaeError: No shards are named.
    """
    if not config.data.shards:
        raise CmaeError(
            "data.shards is empty; name WebDataset tars, for instance "
            "--data.shards '/data/imagenet/train-*.tar' (`cmae shards write` makes them)"
        )


def _check_same_data(loader: Loader, world: World) -> None:
    """Every rank must have opened the same samples in the same way, or some are lost and others repeated.

    Raises:
        CmaeError: On every rank; names those that differ.
    """
    opened = gather_values((loader.state.digest, loader.steps_per_epoch), world)
    others = [rank for rank, one in enumerate(opened) if one != opened[0]]
    if others:
        raise CmaeError(
            f"ranks {others} have opened other data than rank 0: {opened[others[0]]} instead of {opened[0]} "
            "(digest, steps an epoch). Give every node the same shards with the same indices; an index that "
            "`cmae shards index --cache_dir` made lies on one node only: run it on each, or upload the index"
        )


def _total_steps(config: Config, loader: Loader) -> int:
    if config.optim.total_steps is not None:
        return config.optim.total_steps
    if loader.steps_per_epoch is None:
        raise CmaeError(
            "optim.total_steps is null and the stream's size is not known; set optim.total_steps, or "
            "write sidecar indexes with `cmae shards index`"
        )
    return config.optim.epochs * loader.steps_per_epoch
