"""What a run leaves behind and shows: progress, metrics, image grids and the record of skipped steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
import yaml
from rich.text import Text
from torch import Tensor

from cmae.model import CMAE, count_multiply_adds
from cmae.model.blocks import unpinned
from cmae.pipeline import Batch, FillProgress, Loader
from cmae.pipeline.bad_samples import LEDGER_FILE
from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.config import Config
from cmae.train.distributed import World
from cmae.train.gpus import vendor_tflops
from cmae.train.monitor.bands import load_bands, outside
from cmae.train.monitor.console import labelled
from cmae.train.monitor.gpu import gpu_reader
from cmae.train.monitor.images import draw_reconstructions, first_batch_grid, predict_pixels
from cmae.train.monitor.metrics import Display, MetricLog, MetricWindow, read_metrics
from cmae.train.monitor.plots import loss_plot
from cmae.train.monitor.services.choose import choose_services
from cmae.train.monitor.sinks import Sink
from cmae.train.monitor.status import StatusPublisher

NUM_IMAGES = 16
"""In a picture of reconstructions."""


class RunLog:
    """Collects losses on every rank; on the first one also writes files and prints.

    Args:
        config: Configuration of the run.
        world: This process among all.
        start_step: Step that the run begins after.
        total_steps: Length of the schedule.
        loader: Loader that is asked for its counters.
        doing: Function that says what the loop does, for `cmae top` and the watchdog.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        *,
        start_step: int,
        total_steps: int,
        loader: Loader,
        doing: Callable[[], str] = str,
    ) -> None:
        self._config = config
        self._world = world
        self._loader = loader
        self._start_step = start_step
        self._total_steps = total_steps
        self._window = MetricWindow(world.device)
        self._multiply_adds = count_multiply_adds(config.model)["training_step"]
        self._vendor_tflops = vendor_tflops(world.device)
        self._publisher = StatusPublisher(
            config.run.out,
            world,
            step=start_step,
            total_steps=total_steps,
            global_batch_size=config.optim.global_batch_size,
            snapshot=loader.snapshot,
            read_gpu=gpu_reader(world.device),
            doing=doing,
        )
        self._resources = ExitStack()
        self._bands = load_bands(config.run.bands)
        self._images = Sink("images", self._warn)
        self._skipped = Sink("skipped_steps", self._warn if world.is_main else print)
        self._seen_bad = 0
        self._first_host = 0
        self._reported_unpublished = False

    def __enter__(self) -> Self:
        """Open the files and start the display, on the first rank."""
        if self._world.is_main:
            run, config = self._config.run, self._config
            run.out.mkdir(parents=True, exist_ok=True)
            self._display = self._resources.enter_context(
                Display(
                    self._total_steps,
                    start_step=self._start_step,
                    live=run.progress,
                    fallback=run.out / "output.log",
                )
            )
            self._log = MetricLog(
                run.out,
                start_step=self._start_step,
                services=choose_services(run, config.to_dict()),
                warn=self._warn,
            )
            self._resources.callback(self._log.close)
            path = run.out / "config.yaml"
            try:
                write_config(config, path)
            except OSError as error:
                self._warn(f"{path} cannot be written ({error}); the run goes on without it")
        self._resources.enter_context(self._publisher)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close what was opened."""
        self._resources.__exit__(kind, error, trace)

    def opening(self, resumed_from: Path | None, notes: Sequence[str]) -> None:
        """Report what is about to run, and what differs from the checkpoint it continues."""
        if not self._world.is_main:
            return
        config, loader = self._config, self._loader
        self._display.log(
            f"{config.run.out}: {loader.num_samples or 'an unknown number of'} samples, "
            f"{loader.steps_per_epoch or '?'} steps an epoch, {self._total_steps} steps, "
            f"global batch {config.optim.global_batch_size} on {self._world.world_size} x "
            f"{self._world.device.type}, {config.optim.precision}"
        )
        if loader.downscaled:
            self._display.log(labelled("not the original files:", loader.downscaled))
        if loader.decode is not None:
            first, *others = loader.decode.describe().splitlines()
            self._display.log(first)
            for line in others:
                self._warn(line)
        if resumed_from is not None:
            self._display.log(f"continuing {resumed_from}")
        for note in notes:
            self._display.log(labelled("changed:", note))
        if self._log.num_damaged:
            self._warn(f"{self._log.num_damaged} damaged line(s) of {self._log.path} were left out")

    def _warn(self, message: str) -> None:
        self._display.log(labelled("warning:", message))

    def warn(self, message: str) -> None:
        """Print a warning, on the first rank."""
        if self._world.is_main:
            self._warn(message)

    def log(self, message: str | Text) -> None:
        """Print a message on one line, on the first rank."""
        if self._world.is_main:
            self._display.log(message)

    def fill(self, progress: FillProgress) -> None:
        """Show how far the copying of remote shards is, on the first rank. From any thread."""
        if self._world.is_main:
            self._display.fill(progress)

    def step(self, step: int, batches: Sequence[Batch], losses: Tensor) -> None:
        """Note a step that was taken."""
        self._window.add(losses)
        self._publisher.step(step)
        if not self._world.is_main:
            return
        self._display.advance(step)
        if step == self._start_step + 1:
            self._images.run(
                lambda: first_batch_grid(batches[0], self._config.run.out / "first_batch.png")
            )

    def record(
        self,
        step: int,
        *,
        lr: float,
        epoch: int,
        bad_samples: int,
        vitals: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Average over the ranks since the last record, write and show. A collective.

        Args:
            step: Number of steps taken.
            lr: Learning rate of the last one.
            epoch: Epoch of its samples.
            bad_samples: Samples replaced so far, over all ranks.
            vitals: Gives more about the step, such as its gradients' norm; asked on the first rank.
        """
        record = self._window.read(
            images_per_step=self._config.optim.global_batch_size,
            waited_s=self._loader.wait_s,
            world=self._world,
        )
        self._publisher.loss = record["total"]
        if not self._world.is_main:
            return
        record |= {"lr": lr, "epoch": epoch, "bad_samples": bad_samples, **vitals()}
        record |= self._throughput(record["images_per_s"])
        self._log.write(step, record)
        self._display.show(step, record)
        if bad_samples > self._seen_bad:
            self._seen_bad = bad_samples
            self._display.log(
                labelled(
                    f"{self._seen_bad} bad samples replaced so far;",
                    f"see {self._config.run.out / LEDGER_FILE}",
                )
            )
        error = self._publisher.error
        if error is not None and not self._reported_unpublished:
            self._reported_unpublished = True
            self._warn(
                f"`cmae top` has no news of this run: its status cannot be written ({error}); it is tried "
                "again every few seconds"
            )

    def _throughput(self, images_per_s: float) -> dict[str, float]:
        """Per rank: images and published operations a second, their share of the vendor's rate, memory."""
        device, own = self._world.device, images_per_s / self._world.world_size
        tflops = 2e-12 * self._multiply_adds * own
        found = {"images_per_s_per_rank": own, "tflops_per_rank": tflops}
        if self._vendor_tflops is not None:
            found["mfu_pct"] = 100 * tflops / self._vendor_tflops
        if device.type == "cuda":
            found["device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        host = psutil.Process().memory_info().rss
        self._first_host = self._first_host or host
        found["host_gib"] = host / 2**30
        found["host_growth_mib"] = (host - self._first_host) / 2**20
        return found

    def skipped(
        self, step: int, count: int, batches: Sequence[Batch], losses: Tensor, *, why: str
    ) -> None:
        """Note a step that was not taken, why, and with its samples, on every rank."""
        line = {
            "after_step": step,
            "rank": self._world.rank,
            "why": why,
            "losses": losses.tolist(),
            "samples": [index for batch in batches for index in batch.sample_id.tolist()],
        }
        name = f"skipped_steps.rank{self._world.rank}.jsonl"
        self._skipped.run(lambda: _append_line(self._config.run.out / name, line))
        if self._world.is_main:
            self._display.log(labelled(f"step {step + 1} skipped ({count} in a row):", why))

    def draw_images(
        self, step: int, model: CMAE, batch: Batch, *, is_sharded: bool = False
    ) -> None:
        """Draw original, masked and reconstruction of the first images of a batch.

        Args:
            step: Step that was taken.
            model: Model that reconstructs.
            batch: This rank's batch.
            is_sharded: Whether the weights lie in shards: all ranks compute then, and the first one draws.
        """
        images = batch.online[:NUM_IMAGES], batch.masks[0][:NUM_IMAGES]
        rows = self._predict(model, *images) if is_sharded else None
        if self._world.is_main:
            self._images.run(lambda: self._draw(step, model, images, rows))

    def _predict(self, model: CMAE, online: Tensor, ids_keep: Tensor) -> Tensor:
        # A compiled block would be compiled again for the few images of a grid.
        eagerly = torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eagerly, unpinned(model):
            return predict_pixels(model, online, ids_keep)

    def _draw(
        self, step: int, model: CMAE, images: tuple[Tensor, Tensor], rows: Tensor | None
    ) -> None:
        rows = self._predict(model, *images) if rows is None else rows
        folder = self._config.run.out / "images"
        folder.mkdir(exist_ok=True)
        draw_reconstructions(model, *images, folder / f"step-{step:08d}.png", rows=rows)

    def closing(self, step: int, checkpoint: Path | None, *, stopped: bool) -> None:
        """Report where the results lie."""
        if not self._world.is_main:
            return
        out = self._config.run.out
        records = read_metrics(self._log.path)
        if records:
            self._images.run(lambda: loss_plot(self._log.path, out / "loss.png", self._bands))
        for line in outside(records, self._bands):
            self._warn(f"outside the expected range ({self._config.run.bands}): {line}")
        if stopped:
            self._display.log(f"stopped at step {step}; run the same command again to continue")
        elif checkpoint is None:
            self._display.log(f"nothing to do: {out} is already at step {step}")
        else:
            self._display.log(f"done: step {step}, {checkpoint}")


def _append_line(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write_config(config: Config, path: Path) -> None:
    """Write the configuration as a recipe that `--recipe` reads back."""
    plain = config.to_dict()
    del plain["data"]["views"]["img_size"]  # follows model.img_size
    text = yaml.safe_dump(plain, sort_keys=False)
    with atomic_write(path) as file:
        file.write(text.encode())
