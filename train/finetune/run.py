"""Supervised training of an encoder with a head: fine-tuning, partial fine-tuning, linear probe on images."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmae.errors import CmaeError
from cmae.kernels import color_jitter
from cmae.model.export.stored import CheckpointError, list_checkpoints, load_checkpoint
from cmae.pipeline import Loader, LoaderConfig, LoaderState, ViewConfig, build_loader
from cmae.pipeline.bad_samples import LEDGER_FILE, BadLimit
from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.batch_split import BatchSplit
from cmae.train.checkpoints.folder import Retention
from cmae.train.checkpoints.lock import hold_folder
from cmae.train.checkpoints.writer import Checkpointer
from cmae.train.distributed import (
    World,
    from_main,
    gather_values,
    join_world,
    mean_over_ranks,
    threads_per_rank,
)
from cmae.train.evaluation.encoders import load_encoder
from cmae.train.evaluation.features import Images, count_images, open_images, read_labels
from cmae.train.finetune.classifier import Classifier
from cmae.train.finetune.config import FinetuneConfig
from cmae.train.finetune.trainer import Scores, Trainer, score, summarise
from cmae.train.loop.step_batches import StepBatches
from cmae.train.loop.training import Outcome, StopSignals, TrainingError
from cmae.train.monitor.metrics import Display, MetricLog

_MAY_CHANGE = {
    *("out", "device", "num_threads", "micro_batch_size", "progress", "log_every"),
    *("eval_every", "checkpoint_every"),
}
"""Settings that a continued run may change: they do not change what it computes."""


def finetune(config: FinetuneConfig) -> Outcome:
    """Train until the schedule ends or a signal; continue where the last run stopped.

    Writes `checkpoints/`, `metrics.jsonl`, TensorBoard events, and `result.json` with the last scores.

    Raises:
        CmaeError: Settings that do not fit each other, the encoder, the data or the machine.
        TrainingError: The loss is no longer finite, or too much of the data is bad.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join_world(config.device))
        if world.device.type == "cpu" and config.precision == "fp16":
            config = replace(config, precision="fp32")
        if world.is_main:
            stack.enter_context(hold_folder(config.out / "checkpoints"))
        resumed = _find_resumed(config, world)
        run = _open(config, world, resumed, stack)
        return run.loop(resumed["step"] if resumed else 0)


def _open(
    config: FinetuneConfig, world: World, resumed: dict[str, Any] | None, stack: ExitStack
) -> _Run:
    split = BatchSplit.of(config.global_batch_size, config.micro_batch_size, world.world_size)
    encoder = load_encoder(
        config.encoder,
        branch=config.branch,
        img_size=config.img_size,
        drop_path_rate=config.drop_path,
    )
    val = Images(config.val, encoder.img_size, config.centre_share)
    num_classes = config.num_classes or int(read_labels(val.shards).max()) + 1
    torch.manual_seed(config.seed)
    model = Classifier(
        encoder, num_classes, pool=config.pool, head=config.head, blocks=config.blocks
    )
    loader = stack.enter_context(_open_loader(config, encoder.img_size, split, world, resumed))
    if not loader.steps_per_epoch:
        raise CmaeError(
            "train: these shards have no index, so nobody knows how long an epoch is: make one with `cmae "
            "shards index`"
        )
    trainer = Trainer(
        config,
        model.to(world.device),
        num_classes,
        world,
        steps_per_epoch=loader.steps_per_epoch,
    )
    if resumed is not None:
        trainer.load_state_dict(resumed["trainer"])
    stop = stack.enter_context(StopSignals())
    batches = StepBatches(
        loader,
        world,
        limit=BadLimit(0.01),
        ledger=config.out / LEDGER_FILE,
        global_batch_size=config.global_batch_size,
        stop_signal=lambda: stop.number,
        counts=resumed["data_health"] if resumed else None,
    )
    run = _Run(config, world, trainer, loader, batches, split, val)
    if world.is_main:
        start = resumed["step"] if resumed else 0
        run.display = stack.enter_context(
            Display(
                trainer.total_steps,
                start_step=start,
                live=config.progress,
                fallback=config.out / "output.log",
            )
        )
        run.log = MetricLog(config.out, start_step=start, warn=run.display.log)
        stack.callback(run.log.close)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        run.display.log(
            f"{config.out}: {encoder.name} ({config.branch}), {num_classes} classes, {loader.num_samples} "
            f"images, {trainer.total_steps} steps of {config.global_batch_size} on {world.world_size} x "
            f"{world.device.type}, {config.precision}; {trained / 1e6:.3g} M parameters are trained"
        )
    return run


@dataclass
class _Run:
    """Everything that one run holds open."""

    config: FinetuneConfig
    world: World
    trainer: Trainer
    loader: Loader
    batches: StepBatches
    split: BatchSplit
    val: Images
    display: Display | None = None
    log: MetricLog | None = None

    def loop(self, step: int) -> Outcome:
        """Train from a step to the end."""
        config, trainer, total = self.config, self.trainer, self.trainer.total_steps
        checkpoints = None
        if self.world.is_main:
            checkpoints = Checkpointer(config.out / "checkpoints", retention=Retention(1))
        path, saved = None, step
        while step < total:
            drawn = self.batches.next_batches(self.split.accumulation)
            if drawn is None:  # on every rank alike
                break
            loss = trainer.train_step(drawn, step)
            step += 1
            epoch, rest = divmod(step, trainer.steps_per_epoch)
            is_scored = rest == 0 and (epoch % config.eval_every == 0 or step == total)
            if step % config.log_every == 0 or is_scored:
                self._record(step, loss)
            elif self.display is not None:
                self.display.advance(step)
            if is_scored:
                self._score(step)
            due = rest == 0 and (epoch % config.checkpoint_every == 0 or step == total)
            if checkpoints is not None and due:
                path, saved = checkpoints.save(step, self._state()), step
        if checkpoints is not None:
            if saved < step:
                path = checkpoints.save(step, self._state())
            checkpoints.wait()
        if self.batches.failure is not None:
            raise TrainingError(f"stopped at step {step} on all ranks: {self.batches.failure}")
        return Outcome(step, total, path, self.batches.signal or None)

    def _record(self, step: int, loss: Tensor) -> None:
        """Write and show the loss. A collective.

        Raises:
            TrainingError: It is not finite.
        """
        value = mean_over_ranks(loss.clone(), self.world).item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {step} on all ranks: lower lr_per_256, or take another encoder"
            )
        if self.log is not None and self.display is not None:
            rate = self.trainer.rate(step - 1)
            record = {"total": value, "lr": rate, "grad_norm": self.trainer.grad_norm.item()}
            record["epoch"] = step / self.trainer.steps_per_epoch
            self.log.write(step, record)
            self.display.show(step, record)

    def _score(self, step: int) -> None:
        """Score the validation images, and keep the result. A collective."""
        scores = {"val": self.trainer.model}
        if self.trainer.ema is not None:
            scores["ema"] = self.trainer.ema.module
        found = {
            name: score_images(model, self.val, self.world, self.trainer.num_classes)
            for name, model in scores.items()
        }
        if self.log is None or self.display is None:
            return
        record = {f"{name}_top1": one.top1 for name, one in found.items()}
        record |= {f"{name}_top5": one.top5 for name, one in found.items()}
        self.log.write(step, record | {"val_loss": found["val"].loss})
        epoch = step / self.trainer.steps_per_epoch
        told = ", ".join(f"{name} {value:.2%}" for name, value in record.items())
        self.display.log(f"epoch {epoch:g}: {told} of {found['val'].num_images} images")
        result: dict[str, Any] = {
            **record,
            "step": step,
            "epoch": epoch,
            "num_images": found["val"].num_images,
        }
        result["config"] = plain_settings(self.config)
        with atomic_write(self.config.out / "result.json") as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())

    def _state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            **self.batches.state_dict(),
            "trainer": self.trainer.state_dict(),
            "finetune": plain_settings(self.config),
            "num_classes": self.trainer.num_classes,
            "shards": [list(one) for one in self.loader.shards],
        }


def score_images(model: Classifier, images: Images, world: World, num_classes: int) -> Scores:
    """Scores of a classifier on labelled shards; every rank takes its share. A collective."""
    size = 128 if world.device.type == "cuda" else 64
    with open_images(images, batch_size=size, world=world) as loader:
        own = score(model, islice(loader, loader.steps_per_epoch))
        total = count_images(images.shards)
    return summarise(gather_values(own, world), num_classes, total=total)


def load_classifier(path: Path) -> tuple[Classifier, dict[str, Any]]:
    """The classifier of a run of `cmae finetune`, in evaluation mode on the CPU, and its checkpoint.

    Args:
        path: The run's folder, or a checkpoint.

    Raises:
        CmaeError: It is none, or its encoder's file is gone.
    """
    found = list_checkpoints(path / "checkpoints") if path.is_dir() else [path]
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint of `cmae finetune`")
    state = load_checkpoint(found[-1])
    if "finetune" not in state:
        raise CheckpointError(f"{found[-1]} is no checkpoint of `cmae finetune`")
    config = FinetuneConfig(**{**state["finetune"], "out": Path(state["finetune"]["out"])})
    encoder = load_encoder(config.encoder, branch=config.branch, img_size=config.img_size)
    model = Classifier(
        encoder, state["num_classes"], pool=config.pool, head=config.head, blocks=config.blocks
    )
    model.load_state_dict(state["trainer"]["model"])
    return model.eval(), state


def plain_settings(config: Any) -> dict[str, Any]:
    """Fields of a settings dataclass as JSON and checkpoints hold them: paths as text."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}


def _find_resumed(config: FinetuneConfig, world: World) -> dict[str, Any] | None:
    """The newest checkpoint of this run.

    Raises:
        CheckpointError: It is of other settings.
    """
    own = list_checkpoints(config.out / "checkpoints") if world.is_main else []
    path: Path | None = from_main(own[-1] if own else None, world)
    if path is None:
        return None
    state = load_checkpoint(path)
    stored = state.get("finetune")
    if stored is None:
        raise CheckpointError(f"{path} is no checkpoint of `cmae finetune`: choose another --out")
    now = plain_settings(config)
    other = [
        f"{name} was {stored.get(name)!r} and is {now[name]!r}"
        for name in sorted(now.keys() - _MAY_CHANGE)
        if stored.get(name) != now[name]
    ]
    if other:
        raise CheckpointError(
            f"{path} was trained with other settings: {'; '.join(other)}. Set them as they were, or choose "
            "another --out"
        )
    return state


def _open_loader(
    config: FinetuneConfig,
    img_size: int,
    split: BatchSplit,
    world: World,
    resumed: dict[str, Any] | None,
) -> Loader:
    views = ViewConfig(
        img_size=img_size,
        source_crop_size=img_size,
        num_views=1,
        min_area=config.min_area,
        hflip_prob=config.hflip_prob,
    )
    data = LoaderConfig(
        config.train,
        views=views,
        batch_size=split.micro_batch_size,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        num_threads=config.num_threads or threads_per_rank(world.device.type),
    )
    return build_loader(
        data,
        rank=world.rank,
        world_size=world.world_size,
        device=world.device,
        state=LoaderState.from_dict(resumed["loader"]) if resumed else None,
        ledger=config.out / LEDGER_FILE,
        limit_bad=False,  # StepBatches looks at the counts of all ranks
        color_op=color_jitter,
        shards_before=resumed["shards"] if resumed else None,
    )
