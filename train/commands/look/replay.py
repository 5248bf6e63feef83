"""`cmae replay`: repeat one step of a run exactly, and find where its numbers stop being finite."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from cmae.errors import CmaeError, require
from cmae.model import CMAE, Losses
from cmae.model.export.stored import list_checkpoints
from cmae.paths import expand_home
from cmae.pipeline import Batch
from cmae.train.checkpoints.folder import newest_whole, step_of
from cmae.train.config import Config, SpeedConfig
from cmae.train.config_parser import load_recipe
from cmae.train.distributed import World
from cmae.train.loop.pretrain import join_run, open_run
from cmae.train.loop.step import TrainStep
from cmae.train.loop.training import Training
from cmae.train.monitor.console import PlainConsole
from cmae.train.monitor.images import first_batch_grid

_MAX_SKIPPED = 1000
"""Skipped batches that are passed over before the one that is looked for."""


@dataclass(frozen=True)
class Found:
    """What one precision makes of the step."""

    precision: str
    losses: dict[str, float]
    grad_norm: float
    forward: str
    """First module whose output is not finite; '' where all are."""
    backward: str
    """First module, from the loss on, whose output has a gradient that is not finite."""
    parameters: list[str]
    """Names of parameters whose gradients are not finite."""


def replay(run: Path, *, step: int, out: Path | None = None) -> int:
    """Repeat a step of a run from the checkpoint before it: the same samples, views, masks and weights.

    Nothing of the run is changed. Prints losses, the norm of the gradients, and the first module whose output
    and whose gradient are not finite, in the run's precision and in float32.

    Args:
        run: Folder of a pretraining run (its run.out).
        step: Number of the step, from 1; `skipped_steps.rank*.jsonl` notes the one before as `after_step`.
        out: Folder for the views of the batch (batch.png) and what was found (replay.json); default:
            RUN/replay/step-N.
    """
    require(step >= 1, "--step", step, ">= 1")
    run = expand_home(run)
    if not (run / "config.yaml").is_file():
        raise CmaeError(f"{run} holds no config.yaml: give the folder of a pretraining run")
    place = expand_home(out) if out else run / "replay" / f"step-{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    skipped = _skipped_samples(run, step)
    start = _checkpoint_before(run, step)
    console = PlainConsole()
    with tempfile.TemporaryDirectory(prefix="cmae-replay-") as work:
        config = _quiet(load_recipe(run / "config.yaml"), Path(work), start)
        with join_run(config) as world, open_run(config, world) as training:
            batches = _draw(training, step, skipped)
            first_batch_grid(batches[0], place / "batch.png")
            found = list(_look(training, config, world, batches))
    samples = [number for batch in batches for number in batch.sample_id.tolist()]
    was = "was skipped" if skipped else "was taken"
    console.print(
        f"step {step} of {run} {was}; repeated from {start.name if start else 'the initial weights'}, "
        f"{len(samples)} samples of epoch {batches[0].epoch}",
        soft_wrap=True,
    )
    console.print(_table(found))
    content = {"step": step, "samples": samples, "epoch": batches[0].epoch}
    content |= {"found": [vars(one) for one in found]}
    (place / "replay.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {place / 'batch.png'} and replay.json", soft_wrap=True)
    return 0


def _skipped_samples(run: Path, step: int) -> set[int]:
    """Samples of the first batch that was skipped in place of this step, on all ranks; empty: none was."""
    found: set[int] = set()
    for path in sorted(run.glob("skipped_steps.rank*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry["after_step"] == step - 1:
                    found |= {int(number) for number in entry["samples"]}
                    break
            except (ValueError, KeyError, TypeError):  # cut off by a kill
                continue
    return found


def _checkpoint_before(run: Path, step: int) -> Path | None:
    """The newest whole checkpoint before a step; None where the run has to be repeated from its start.

    Raises:
        CmaeError: There are checkpoints, and all are of later steps.
    """
    stored = list_checkpoints(run / "checkpoints")
    earlier = [path for path in stored if step_of(path) < step]
    if (found := newest_whole(earlier)) is not None:
        return found
    if stored and step_of(stored[0]) > _MAX_SKIPPED:
        raise CmaeError(
            f"--step {step}: the oldest checkpoint of {run} is {stored[0].name}; from the start it would "
            f"take {step} steps. Keep more with run.keep_every, or choose a later step"
        )
    return None


def _quiet(config: Config, work: Path, start: Path | None) -> Config:
    """The run's configuration, writing elsewhere and evaluating nothing."""
    run = replace(
        config.run,
        out=work,
        resume=str(start) if start else "auto",
        stop_at_step=None,
        image_every=None,
        eval_shards="",
        bands="",
        progress=False,
        wandb_project=None,
        mlflow_uri=None,
        prometheus_port=None,
        mirror=None,
    )
    return replace(config, run=run, init_from=None if start else config.init_from)


def _draw(training: Training, step: int, skipped: set[int]) -> list[Batch]:
    """Repeat all steps before, and return the batches of this one.

    Raises:
        CmaeError: The data end before, or the batch that was skipped does not come.
    """
    if step > training.total_steps:
        raise CmaeError(f"--step {step}: the run's schedule has only {training.total_steps} steps")
    passed = 0
    while passed <= _MAX_SKIPPED:
        batches = training.next_batches()
        if batches is None:
            raise CmaeError(f"the data end, or a signal came, before step {step} ({training.step})")
        if training.step == step - 1:
            samples = {number for batch in batches for number in batch.sample_id.tolist()}
            if not skipped or skipped <= samples or samples <= skipped:
                return batches
            passed += 1
        training.take(batches)
    raise CmaeError(
        f"the samples that were skipped in step {step} did not come again among {_MAX_SKIPPED} batches: the "
        "run was continued with other data, or with other settings than config.yaml says now"
    )


def _look(
    training: Training, config: Config, world: World, batches: Sequence[Batch]
) -> Iterator[Found]:
    """The step in the run's precision and in float32, without moving anything."""
    own = config.optim.precision
    for precision in dict.fromkeys((own, "fp32")):
        optim = replace(config.optim, precision=precision, residual="fp32")
        speed = SpeedConfig(
            device=config.speed.device, kernels=config.speed.kernels, compile="none"
        )
        before = training.train_step
        model = copy.deepcopy(before.model)
        step = TrainStep(model, optim, speed, world)
        if precision == own:
            step.scaler.load_state_dict(before.scaler.state_dict())
        with _watched(model) as notes:
            losses = step.backward(batches)
        step.scaler.unscale_(step.optimizer)
        yield _summary(precision, losses, model, notes)


def _summary(precision: str, losses: Tensor, model: CMAE, notes: dict[str, str]) -> Found:
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Found(
        precision=precision,
        losses=dict(zip(Losses._fields, losses.tolist(), strict=True)),
        grad_norm=float(torch.nn.utils.get_total_norm(list(gradients.values()))),
        forward=notes.get("forward", ""),
        backward=notes.get("backward", ""),
        parameters=[n for n, grad in gradients.items() if not torch.isfinite(grad).all()],
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, str]]:
    """Notes the first module whose output, and the first whose output's gradient, is not finite."""
    notes: dict[str, str] = {}

    def watch(name: str) -> Any:
        def note_gradient(gradient: Tensor) -> None:
            if "backward" not in notes and not torch.isfinite(gradient).all():
                notes["backward"] = name

        def note_output(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                if "forward" not in notes and not torch.isfinite(tensor).all():
                    notes["forward"] = name
                if tensor.requires_grad:
                    tensor.register_hook(note_gradient)

        return note_output

    hooks = [
        module.register_forward_hook(watch(f"{name} ({type(module).__name__})"))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield notes
    finally:
        for hook in hooks:
            hook.remove()


def _table(found: Sequence[Found]) -> Table:
    table = Table("", *(one.precision for one in found))
    for name in found[0].losses:
        table.add_row(f"loss, {name}", *(f"{one.losses[name]:.6g}" for one in found))
    table.add_row("gradients' norm", *(f"{one.grad_norm:.6g}" for one in found))
    table.add_row("first output not finite", *(one.forward or "-" for one in found))
    table.add_row(
        "first gradient not finite, from the loss", *(one.backward or "-" for one in found)
    )
    shown = [f"{len(one.parameters)}" for one in found]
    table.add_row("parameters with such gradients", *shown)
    return table
