"""The pretraining loop: data, step, record, checkpoint, from the first sample to the last."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from cmae.errors import CmaeError
from cmae.kernels import color_jitter, use_backend
from cmae.model import build_model, draw_mask
from cmae.model.export.checkpoints import check_finite
from cmae.model.export.stored import CheckpointError, list_checkpoints, load_checkpoint
from cmae.pipeline import FillProgress, Loader, LoaderState, build_loader
from cmae.pipeline.bad_samples import LEDGER_FILE, BadLimit
from cmae.pipeline.loader.loader import Wrap
from cmae.train.batch_split import BatchSplit, split_batch
from cmae.train.checkpoints.folder import (
    Retention,
    find_checkpoint,
    origin_of,
    set_aside_newer,
)
from cmae.train.checkpoints.lock import hold_folder
from cmae.train.checkpoints.writer import Checkpointer
from cmae.train.config import Config
from cmae.train.distributed import World, from_main, gather_values, join_world, largest
from cmae.train.evaluation.online import OnlineEvaluation
from cmae.train.loop.loader_settings import LoaderSettings, agree_on_decode, loader_settings
from cmae.train.loop.resume_rules import check_changes
from cmae.train.loop.schedules import build_schedule, ema_momentum
from cmae.train.loop.step import TrainStep, check_step
from cmae.train.loop.step_batches import StepBatches
from cmae.train.loop.weights import load_initial_weights
from cmae.train.monitor.metrics import ColdStart
from cmae.train.monitor.run_log import RunLog
from cmae.train.old_keys import update_keys


class TrainingError(CmaeError, RuntimeError):
    """The run cannot go on; what it had reached is in its last checkpoint.

    Every rank raises it at the same step, so one of them has to print it.
    """

    is_on_every_rank = True


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    total_steps: int
    checkpoint: Path | None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0: all done. 130: Ctrl-C. 75 (EX_TEMPFAIL): stopped by another signal, start it again."""
        if self.signal is None:
            return 0
        return 130 if self.signal == signal.SIGINT else 75


def pretrain(config: Config) -> Outcome:
    """Train until the schedule ends, `run.stop_at_step`, or a signal; continue where the last run stopped.

    Raises:
        CmaeError: Settings that do not fit each other, the data or the machine.
        TrainingError: The loss is no longer finite, or too much of the data is bad.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join_run(config))
        if world.is_main:
            stack.enter_context(hold_folder(config.run.out / "checkpoints"))
        notes: list[str] = []
        found = _agree_on_checkpoint(config, world, note=notes.append)
        resumed, changes = _load_complete(found, config) if found else (None, [])
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
        run_log = stack.enter_context(
            RunLog(config, world, start_step=step, total_steps=total_steps, loader=loader)
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
            train_step.load_state_dict(resumed)
        stop = stack.enter_context(StopSignals())
        step_batches = _open_step_batches(config, world, loader, stop, resumed)
        origin = origin_of(config.run.resume, resumed)
        del resumed  # a second copy of all weights
        online = OnlineEvaluation(config, world) if config.run.eval_shards else None
        run = _Run(config, world, split, loader, step_batches, train_step, run_log, origin, online)
        return _loop(run, step, total_steps=total_steps)


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


@dataclass(frozen=True)
class _Run:
    """Everything that one run holds open."""

    config: Config
    world: World
    split: BatchSplit
    loader: Loader
    step_batches: StepBatches
    train_step: TrainStep
    run_log: RunLog
    origin: str
    online: OnlineEvaluation | None


def _loop(run: _Run, step: int, *, total_steps: int) -> Outcome:
    config, step_batches, loader, run_log = run.config, run.step_batches, run.loader, run.run_log
    last_step = min(total_steps, config.run.stop_at_step or total_steps)
    schedule = build_schedule(
        config.optim, total_steps=total_steps, steps_per_epoch=loader.steps_per_epoch
    )
    checkpoints = _open_checkpoints(config, run_log) if run.world.is_main else None
    fetch_ahead = partial(step_batches.fetch_ahead, run.split.accumulation)
    eval_every = config.run.eval_every or loader.steps_per_epoch or config.run.checkpoint_every
    skipped, saved, path = 0, step, None
    while step < last_step:
        batches = step_batches.next_batches(run.split.accumulation)
        if batches is None:  # on every rank alike
            break
        is_scored = run.online is not None and (
            (step + 1) % eval_every == 0 or step + 1 == last_step
        )
        is_told = is_scored or (step + 1) % config.run.log_every == 0 or step + 1 == last_step
        losses, taken = run.train_step(
            batches,
            lr=schedule(step),
            momentum=ema_momentum(config.model, step, total_steps),
            meanwhile=fetch_ahead if step + 1 < last_step else None,
            with_norm=is_told,
        )
        if not taken:  # nothing has moved: not the weights, not the schedule, not the counter
            skipped += 1
            run_log.skipped(step, skipped, batches, losses)
            if skipped >= config.optim.max_skipped_steps:
                if checkpoints is not None:  # one may be under way
                    with suppress(CheckpointError):
                        checkpoints.wait()
                raise TrainingError(_not_finite(step, skipped, config.run.out))
            continue
        skipped = 0
        step += 1
        run_log.step(step, batches, losses)
        scores = {}
        if is_scored and run.online is not None:
            scores = run.online(run.train_step.model)
        if is_told:
            run_log.record(
                step,
                lr=schedule(step - 1),
                epoch=batches[-1].epoch,
                bad_samples=step_batches.bad_samples,
                vitals=partial(_vitals, run.train_step, scores),
            )
        if config.run.image_every and step % config.run.image_every == 0:
            run_log.draw_images(step, run.train_step.model, batches[0])
        if checkpoints is not None and (
            step % config.run.checkpoint_every == 0 or step == last_step
        ):
            path, saved = checkpoints.save(step, _state_of(run)), step
    if checkpoints is not None:
        if saved < step:
            path = checkpoints.save(step, _state_of(run))
        checkpoints.wait()
    if step_batches.failure is not None:
        raise TrainingError(f"stopped at step {step} on all ranks: {step_batches.failure}")
    run_log.closing(step, path, stopped=bool(step_batches.signal))
    return Outcome(step, total_steps, path, step_batches.signal or None)


def _vitals(train_step: TrainStep, scores: dict[str, float]) -> dict[str, float]:
    return train_step.vitals() | scores


def _state_of(run: _Run) -> dict[str, Any]:
    """All that a checkpoint holds."""
    state = {**run.train_step.state_dict(), **run.step_batches.state_dict()}
    shards = [list(one) for one in run.loader.shards]
    return {
        **state,
        "config": run.config.to_dict(),
        "origin": run.origin,
        "shards": shards,
        "micro_batch_size": run.split.micro_batch_size,
    }


def _open_checkpoints(config: Config, run_log: RunLog) -> Checkpointer:
    run = config.run
    return Checkpointer(
        run.out / "checkpoints",
        retention=Retention(run.keep_checkpoints, run.keep_every, run.keep_hours),
        patience_s=60 * run.checkpoint_patience_min,
        warn=run_log.warn,
    )


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
    state = load_checkpoint(path)
    state["config"] = update_keys(state["config"]).settings
    if "optimizer" not in state:
        raise CheckpointError(
            f"{path} holds weights alone, with no optimiser and no place in the data to resume; start a "
            f"run from them with --init_from {path}"
        )
    changes = check_changes(path, state, config)
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


def _not_finite(step: int, skipped: int, out: Path) -> str:
    milder = "a lower optim.lr_per_256, a longer warmup, or optim.precision=bf16"
    stored = list_checkpoints(out / "checkpoints")
    advice = (
        f"The last checkpoint, {stored[-1]}, is from before: the same command with {milder} goes on from it"
        if stored
        else f"There is no checkpoint of it yet: start again with {milder}"
    )
    return (
        f"{skipped} steps in a row after step {step} had gradients that are not finite; the samples are "
        f"listed in {out / 'skipped_steps.rank*.jsonl'}. {advice}"
    )


STOP_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
"""What schedulers, launchers and terminals send before they kill: Slurm and torchrun SIGTERM and SIGUSR1,
submitit SIGUSR2, a closed terminal SIGHUP, a spent limit of CPU time SIGXCPU."""


class StopSignals:
    """Turns `STOP_SIGNALS` into a flag; a second SIGINT interrupts at once.

    A signal that is ignored when the run starts, as by nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.number = 0
        """The signal that asked the run to stop; 0 as long as none did."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take over the signals."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.number:
            raise KeyboardInterrupt
        self.number = number
