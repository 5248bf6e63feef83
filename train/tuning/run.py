"""`cmae tune`: measure the real loader on this machine and these shards, explain the choice, store it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cmae.pipeline import Loader
from cmae.train.config import BatchSplit, Config
from cmae.train.distributed import World, join_world
from cmae.train.loop.loader_settings import LoaderSettings, default_settings, tunable
from cmae.train.loop.pretrain import check_shards, open_loader
from cmae.train.tuning.search import Measure, Phase, Result, Search, Window
from cmae.train.tuning.tuned import TunedEntry, describe_circumstances, store_tuned, tune_path

_WINDOWS = {"cpu": 41, "cuda": 57}
"""About as many as a search takes; the time for each follows from the budget."""
_OPENING_SHARE = 0.5
"""Of a window's time: a new loader, its first batches."""


@dataclass(frozen=True)
class TuneOptions:
    """What `cmae tune` is asked for beside a run's configuration."""

    budget_s: float = 150.0
    """Seconds for the whole search."""
    step_images_per_s: float | None = None
    """What one rank's training step takes; a loader that is 10 % faster is fast enough. null: not known."""
    local_ranks: int = 1
    """Ranks that will share this node: the search gets its part of the cores, as each of them will."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if self.budget_s < 1:
            raise ValueError(f"budget_s is {self.budget_s}; it must be at least 1 second")
        if self.step_images_per_s is not None and self.step_images_per_s <= 0:
            raise ValueError(
                f"step_images_per_s is {self.step_images_per_s}; it must be > 0, or null for not known"
            )
        cores = len(os.sched_getaffinity(0))
        if not 1 <= self.local_ranks <= cores:
            raise ValueError(
                f"local_ranks is {self.local_ranks}; it must be 1..{cores}: each rank needs a core"
            )


def tune(config: Config, options: TuneOptions, *, console: Console | None = None) -> int:
    """Search, print what was tried and why the winner won, and store it; exit code 0.

    Raises:
        ValueError: no shards, or settings that do not fit them.
        OSError: the settings cannot be stored.
    """
    console = console or Console()
    check_shards(config)
    with _share_of_cores(options.local_ranks), join_world(config.speed.device) as world:
        circumstances = describe_circumstances(config, world.device)
        result = search(config, options, world, say=console.print)
    for phase in result.phases:
        console.print(_phase_table(phase, options.step_images_per_s))
    entry = TunedEntry(
        circumstances, result.settings, date.today().isoformat(), _measurements(result)
    )
    names = tunable(world.device)
    console.print(_verdict(result, options, names), highlight=False)
    store_tuned(tune_path(), entry)
    console.print(
        f"stored in {tune_path()}; runs on this machine and these shards take it where a setting is null",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def search(
    config: Config,
    options: TuneOptions,
    world: World,
    *,
    say: Callable[[str], None],
) -> Result:
    """Measure until the budget is spent. `speed`'s explicit settings are not searched."""
    default = default_settings()
    fixed = {name: getattr(config.speed, name) for name in tunable(world.device)}
    fixed = {name: value for name, value in fixed.items() if value is not None}
    default = replace(default, **fixed)
    with tempfile.TemporaryDirectory() as out:  # for the ledger of bad samples
        config = replace(config, run=replace(config.run, out=Path(out)))
        window_s = options.budget_s / _WINDOWS[world.device.type] * (1 - _OPENING_SHARE)
        measure, has_readers = _loader_measure(config, options, world, window_s=window_s)
        grid = build_grid(default, world.device, has_readers=has_readers)
        grid = {name: values for name, values in grid.items() if name not in fixed}
        if not grid:
            given = ", ".join(f"speed.{name}" for name in fixed)
            raise ValueError(
                f"{given} are all given: leave one of them out, there is nothing to search"
            )
        say(
            f"searching {', '.join(grid)} for about {options.budget_s:.0f} s, "
            f"{window_s:.1f} s a window"
        )
        return Search(
            measure,
            budget_s=options.budget_s,
            clock=time.monotonic,
            target_images_per_s=options.step_images_per_s,
        ).run(default, grid)


def build_grid(
    default: LoaderSettings, device: torch.device, *, has_readers: bool
) -> dict[str, list[float]]:
    """Candidates of each setting, in the order of the search; the defaults are among them."""
    cores = default.num_threads
    threads = {max(1, round(cores * part)) for part in (0.5, 0.75, 1, 1.25, 1.5)}
    grid: dict[str, list[float]] = {"num_threads": sorted(threads | {cores, cores + 1})}
    if device.type == "cuda":
        grid["hw_decoder_load"] = [0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95]
    if has_readers:  # a stream has none
        grid["num_readers"] = [1, 2, 4, 8]
    grid["prefetch"] = [2, 3, 5]  # 1 leaves no batch in hand when a step is late
    return grid


def _loader_measure(
    config: Config, options: TuneOptions, world: World, *, window_s: float
) -> tuple[Measure, bool]:
    """The measure of the real loader, and whether that reads by index."""
    split = BatchSplit.of(
        config.optim.global_batch_size, config.speed.micro_batch_size, options.local_ranks
    )
    # A batch of the run's size, but windows of a few seconds have to hold several.
    size = min(split.micro_batch_size, 128 if world.device.type == "cuda" else 32)
    config = replace(config, optim=replace(config.optim, global_batch_size=size))

    def open_with(settings: LoaderSettings) -> Loader:
        return open_loader(config, BatchSplit(size, 1), world, settings=settings)

    def measure(settings: LoaderSettings, pace: float | None) -> Window:
        with open_with(settings) as loader:
            for _ in range(2):  # the first ones wait for first-use allocations; none are in stock
                next(loader)
            return _measure_window(loader, pace, window_s=window_s, device=world.device)

    with open_with(default_settings()) as loader:
        return measure, loader.num_samples is not None


def _measure_window(
    loader: Loader, pace: float | None, *, window_s: float, device: torch.device
) -> Window:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    images, batches = 0, 0
    start, cpu = now(), time.process_time()
    while batches < 2 or time.perf_counter() - start < window_s:
        size = len(next(loader).online)
        images, batches = images + size, batches + 1
        if pace is not None:  # the step
            time.sleep(size / pace)
    seconds = now() - start
    return Window(images / seconds, 1000 * (time.process_time() - cpu) / images)


@contextmanager
def _share_of_cores(local_ranks: int) -> Iterator[None]:
    """Run on one rank's share of the cores, threads started here included."""
    before = os.sched_getaffinity(0)
    share = sorted(before)[: len(before) // local_ranks]
    os.sched_setaffinity(0, share)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _phase_table(phase: Phase, target: float | None) -> Table:
    table = Table(title=f"{phase.name}: {phase.why}", title_justify="left")
    for column in ("", "images/s", "range", "CPU-s per 1000", "windows"):
        table.add_column(column, justify="left" if not column else "right")
    for trial in phase.trials:
        value = getattr(trial.settings, phase.name, None)
        name = f"{value:g}" if value is not None else _whole(trial.settings)
        low, high = trial.spread
        enough = "" if target is None or trial.images_per_s < target else " *"
        # Before a paced consumer the loader also works ahead: its CPU time is not that of these images.
        cost = "-" if phase.name == "prefetch" else f"{trial.cpu_s_per_1000:.2f}"
        table.add_row(
            f"[bold]{name} <-[/]" if trial.settings == phase.chosen else name,
            f"{trial.images_per_s:.0f}{enough}",
            f"{low:.0f} to {high:.0f}",
            cost,
            str(len(trial.windows)),
        )
    return table


def _whole(settings: LoaderSettings) -> str:
    return settings.describe(("num_threads", "prefetch", "num_readers"))


def _verdict(result: Result, options: TuneOptions, names: tuple[str, ...]) -> str:
    rate, target = result.chosen.images_per_s, options.step_images_per_s
    lines = [f"[bold]{result.settings.describe(names)}[/]: {rate:.0f} images/s for each rank"]
    if target is not None:
        enough = "enough for" if rate >= target else "[yellow]less than[/]"
        lines.append(f"{enough} the step's {target:.0f} images/s ({rate / target:.2f} x)")
        lines.append("* in the tables: at least that")
    if result.out_of_time:
        lines.append(
            "the time was up before every window was measured: a larger --budget_s is surer"
        )
    return "\n".join(lines)


def _measurements(result: Result) -> dict[str, float]:
    return {
        "images_per_s": result.chosen.images_per_s,
        "cpu_s_per_1000": result.chosen.cpu_s_per_1000,
        "default_images_per_s": result.default.images_per_s,
        "default_cpu_s_per_1000": result.default.cpu_s_per_1000,
    }
