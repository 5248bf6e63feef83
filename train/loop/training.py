"""The steps of an open run: data, step, record, checkpoint, from the first sample to the last."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from torch import Tensor

from cmae.errors import CmaeError
from cmae.model.export.stored import CheckpointError, list_checkpoints
from cmae.pipeline import Batch, Loader
from cmae.train.batch_split import BatchSplit
from cmae.train.checkpoints.folder import Retention
from cmae.train.checkpoints.mirror import Mirror, open_mirror
from cmae.train.checkpoints.shards import ShardedCheckpointer
from cmae.train.checkpoints.writer import Checkpointer
from cmae.train.config import Config
from cmae.train.distributed import World, from_main
from cmae.train.evaluation.online import OnlineEvaluation
from cmae.train.loop.schedules import build_schedule, ema_momentum
from cmae.train.loop.step import TrainStep
from cmae.train.loop.step_batches import StepBatches
from cmae.train.monitor.run_log import RunLog
from cmae.train.monitor.watchdog import Watchdog


class TrainingError(CmaeError, RuntimeError):
    """The run cannot go on; what it had reached is in its last checkpoint.

    Every rank raises it at the same step, so one of them has to print it.
    """

    is_on_every_rank = True


class LostRankError(CmaeError, RuntimeError):
    """A collective failed because another rank has ended; every rank that is left has its own."""


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


@dataclass(frozen=True)
class RollBack:
    """The run has to begin again at its newest checkpoint, behind the data that led it astray."""

    data: dict[str, Any]
    """Place in the data and counts, as in a checkpoint: where it goes on."""
    history: list[dict[str, Any]]
    """All that have been made, this one last."""


@dataclass(frozen=True)
class OpenRun:
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
    watchdog: Watchdog
    rollbacks: list[dict[str, Any]]
    """Those that were made before; see `RollBack.history`."""


class Training:
    """Takes the steps of a run, and notes what each of them leaves.

    Args:
        run: Everything that the run holds open.
        step: Number of steps that it begins after.
        total_steps: Length of the schedule.
        saves_first: Whether to write a checkpoint before the first step.
    """

    def __init__(
        self, run: OpenRun, step: int, *, total_steps: int, saves_first: bool = False
    ) -> None:
        config, loader = run.config, run.loader
        self.step = step
        self.total_steps = total_steps
        self.train_step = run.train_step
        self._run = run
        self._last_step = min(total_steps, config.run.stop_at_step or total_steps)
        self._schedule = build_schedule(
            config.optim, total_steps=total_steps, steps_per_epoch=loader.steps_per_epoch
        )
        self._eval_every = (
            config.run.eval_every or loader.steps_per_epoch or config.run.checkpoint_every
        )
        self._skipped = self._num_skipped = 0
        self._mirror = _open_mirror(config, run.run_log) if run.world.is_main else None
        self._checkpoints: Checkpointer | ShardedCheckpointer | None = None
        if config.run.checkpoint_shards:
            self._checkpoints = _open_sharded(config, run.world, run.run_log)
        elif run.world.is_main:
            self._checkpoints = _open_checkpoints(config, run.run_log, self._mirror)
        self._saved = step
        self._path: Path | None = None
        self._saves_first = saves_first

    def run(self) -> Outcome | RollBack:
        """Train until the schedule ends, `run.stop_at_step`, or a signal.

        Raises:
            TrainingError: The loss is no longer finite, or too much of the data is bad.
            CheckpointError: The disk has refused every checkpoint for too long.
        """
        with self._mirror or nullcontext(), self._checkpoints or nullcontext():
            if self._saves_first:
                self._save()
            while self.step < self._last_step:
                batches = self.next_batches()
                if batches is None:  # on every rank alike
                    break
                losses, taken = self.take(batches)
                if taken:
                    self._note(batches, losses)
                elif self._note_skipped(batches, losses):
                    return self._roll_back()
            return self._finish()

    def next_batches(self) -> list[Batch] | None:
        """This rank's micro-batches of the next step; None where all ranks have to stop. A collective."""
        return self._run.step_batches.next_batches(self._run.split.accumulation)

    def take(self, batches: Sequence[Batch]) -> tuple[Tensor, bool]:
        """Take a step; return the losses and whether anything has moved: weights, schedule, counter."""
        run, step = self._run, self.step
        ahead = partial(run.step_batches.fetch_ahead, run.split.accumulation)
        losses, taken = run.train_step(
            batches,
            lr=self._schedule(step),
            momentum=ema_momentum(run.config.model, step, self.total_steps),
            meanwhile=ahead if step + 1 < self._last_step else None,
            with_norm=self._is_told(step + 1),
        )
        self.step += taken
        run.watchdog.moved()
        return losses, taken

    def _is_scored(self, step: int) -> bool:
        is_due = step % self._eval_every == 0 or step == self._last_step
        return self._run.online is not None and is_due

    def _is_told(self, step: int) -> bool:
        is_due = step % self._run.config.run.log_every == 0 or step == self._last_step
        return self._is_scored(step) or is_due

    def _note(self, batches: Sequence[Batch], losses: Tensor) -> None:
        """Record, score, draw and save what the step that was taken is due for."""
        run, step, periods = self._run, self.step, self._run.config.run
        self._skipped = 0
        run.run_log.step(step, batches, losses)
        scores = {}
        if self._is_scored(step) and run.online is not None:
            with run.watchdog.paused("evaluating"):
                scores = run.online(run.train_step.model)
        if self._is_told(step):
            run.run_log.record(
                step,
                lr=self._schedule(step - 1),
                epoch=batches[-1].epoch,
                bad_samples=run.step_batches.bad_samples,
                vitals=partial(self._vitals, scores),
            )
        if periods.image_every and step % periods.image_every == 0:
            weights = run.train_step
            run.run_log.draw_images(step, weights.model, batches[0], is_sharded=weights.is_sharded)
        if step % periods.checkpoint_every == 0 or step == self._last_step:
            self._save()

    def _vitals(self, scores: dict[str, float]) -> dict[str, float]:
        """What only the first rank is asked for: gradients, averages, checkpoints, scores."""
        run, found = self._run, self._run.train_step.vitals()
        if run.config.model.has_contrast:
            found["ema_momentum"] = ema_momentum(run.config.model, self.step - 1, self.total_steps)
        found["skipped_steps"] = self._num_skipped
        if self._checkpoints is not None and self._checkpoints.last_s is not None:
            found["checkpoint_s"] = self._checkpoints.last_s
        return found | scores

    def _save(self) -> None:
        """Write a checkpoint; where the state lies in shards, all ranks take part."""
        step, checkpoints = self.train_step, self._checkpoints
        if isinstance(checkpoints, ShardedCheckpointer):
            state = _state_of(self._run, step.state_dict(with_tensors=False))
            self._path = checkpoints.save(self.step, state, step.tensors())
        elif checkpoints is not None or step.is_sharded:
            state = _state_of(self._run, step.state_dict())
            if checkpoints is not None:
                self._path = checkpoints.save(self.step, state, is_copy=step.is_sharded)
        self._saved = self.step

    def _note_skipped(self, batches: Sequence[Batch], losses: Tensor) -> bool:
        """Record a step that was not taken; True where there is a checkpoint to begin again at.

        Raises:
            TrainingError: There were too many in a row, and no way back is left.
        """
        run, optim = self._run, self._run.config.optim
        self._skipped += 1
        self._num_skipped += 1
        why = run.train_step.why_skipped()
        run.run_log.skipped(self.step, self._skipped, batches, losses, why=why)
        if self._skipped < optim.max_skipped_steps:
            return False
        if self._checkpoints is not None:  # one may be under way
            with suppress(CheckpointError):
                self._checkpoints.wait()
        folder = run.config.run.out / "checkpoints"
        has_way_back = from_main(bool(list_checkpoints(folder)), run.world)
        if not has_way_back or len(run.rollbacks) >= optim.max_rollbacks:
            raise TrainingError(
                _astray(self.step, self._skipped, run.config.run.out, len(run.rollbacks), why)
            )
        return True

    def _roll_back(self) -> RollBack:
        data = self._run.step_batches.state_dict()
        made = {"after_step": self.step, "skipped": self._skipped, "data": data["loader"]}
        return RollBack(data, [*self._run.rollbacks, made])

    def _finish(self) -> Outcome:
        run = self._run
        run.watchdog.rest("writing the last checkpoint")
        if self._saved < self.step:
            self._save()
        if self._checkpoints is not None:
            self._checkpoints.wait()
        if (failure := run.step_batches.failure) is not None:
            raise TrainingError(f"stopped at step {self.step} on all ranks: {failure}")
        stopped_by = run.step_batches.signal
        run.run_log.closing(self.step, self._path, stopped=bool(stopped_by))
        return Outcome(self.step, self.total_steps, self._path, stopped_by or None)


def _state_of(run: OpenRun, step: dict[str, Any]) -> dict[str, Any]:
    """All that a checkpoint holds, beside the state of the step."""
    state = {**step, **run.step_batches.state_dict()}
    shards = [list(one) for one in run.loader.shards]
    return {
        **state,
        "config": run.config.to_dict(),
        "origin": run.origin,
        "rollbacks": run.rollbacks,
        "shards": shards,
        "micro_batch_size": run.split.micro_batch_size,
    }


def _open_mirror(config: Config, run_log: RunLog) -> Mirror | None:
    run = config.run
    if run.mirror is None:
        return None
    return Mirror(
        open_mirror(run.mirror, config.data.storage_options),
        run.out,
        retention=_retention(config),
        warn=run_log.warn,
    )


def _retention(config: Config) -> Retention:
    run = config.run
    return Retention(run.keep_checkpoints, run.keep_every, run.keep_hours)


def _open_checkpoints(config: Config, run_log: RunLog, mirror: Mirror | None) -> Checkpointer:
    run = config.run
    return Checkpointer(
        run.out / "checkpoints",
        retention=_retention(config),
        patience_s=60 * run.checkpoint_patience_min,
        warn=run_log.warn,
        written=mirror.put if mirror else lambda path: None,
    )


def _open_sharded(config: Config, world: World, run_log: RunLog) -> ShardedCheckpointer:
    return ShardedCheckpointer(
        config.run.out / "checkpoints",
        world,
        retention=_retention(config),
        patience_s=60 * config.run.checkpoint_patience_min,
        warn=run_log.warn,
    )


def _astray(step: int, skipped: int, out: Path, num_rollbacks: int, why: str) -> str:
    milder = "a lower optim.lr_per_256, a longer warmup, or optim.precision=bf16"
    stored = list_checkpoints(out / "checkpoints")
    advice = (
        f"The last checkpoint, {stored[-1]}, is from before: the same command with {milder} goes on from it"
        if stored
        else f"There is no checkpoint of it yet: start again with {milder}"
    )
    again = f", again after {num_rollbacks} return(s) to a checkpoint" if num_rollbacks else ""
    return (
        f"{skipped} steps in a row after step {step} were skipped{again}: {why}; the samples "
        f"are listed in {out / 'skipped_steps.rank*.jsonl'}, and `cmae replay {out} --step {step + 1}` shows "
        f"where it begins. {advice}"
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
