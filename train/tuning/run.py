"""`cmae tune`: measure the real loader on this machine and these shards, write a recipe."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from cmae.errors import CmaeError
from cmae.pipeline import Loader, LoaderConfig
from cmae.pipeline.remote.schemes import redact_shards
from cmae.train.batch_split import BatchSplit, split_batch
from cmae.train.config import Config
from cmae.train.distributed import World, join_world
from cmae.train.loop.loader_settings import (
    LoaderSettings,
    default_settings,
    loader_settings,
    tunable,
)
from cmae.train.loop.pretrain import check_shards, open_loader
from cmae.train.machine import describe_machine
from cmae.train.monitor.console import PlainConsole
from cmae.train.tuning.config import TuneConfig
from cmae.train.tuning.recipe import Circumstances, check_writable, write_tuned
from cmae.train.tuning.search import Measure, Phase, Result, Search, Window

_WINDOWS = {"cpu": 41, "cuda": 57}
"""About as many as a search takes; the time for each follows from the budget."""
_OPENING_SHARE = 0.5
"""Share of a window's time for a new loader and its first batches."""
_INTERRUPTED = 130


def tune(config: Config, options: TuneConfig, *, console: PlainConsole | None = None) -> int:
    """Search, print what was tried and why the winner won, and write it as a recipe.

    The recipe is written anew after every phase, so that Ctrl-C loses only the one that goes on.

    Args:
        config: Configuration of the run; settings of the loader that it gives are not searched.
        options: What is asked for.
        console: Place to print; None takes stdout.

    Returns:
        The exit code: 0, or 130 after Ctrl-C.

    Raises:
        CmaeError: No shards, settings that do not fit them, or no place for the recipe.
    """
    console = console or PlainConsole(highlight=True)
    check_shards(config)
    check_writable(options.out)
    phases: list[Phase] = []
    with _share_of_cores(options.local_ranks), join_world(config.speed.device) as world:
        around = Circumstances(
            describe_machine(world.device),
            str(redact_shards(config.data.shards)),
            options.local_ranks,
            tunable(world.device),
        )

        def keep(phase: Phase) -> None:
            phases.append(phase)
            write_tuned(options.out, around, phases, is_done=phase.is_last)
            console.print(_phase_table(phase, options.step_images_per_s))

        try:
            result = search(config, options, world, log=console.print, on_phase=keep)
        except KeyboardInterrupt:
            found = f"{options.out} holds what was found" if phases else "nothing was found yet"
            console.print(f"interrupted: {found}", highlight=False, soft_wrap=True)
            return _INTERRUPTED
    console.print(_verdict(result, options, around.names), highlight=False)
    console.print(
        f"wrote {options.out}; name it after the recipe: --recipe RECIPE --recipe {options.out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def search(
    config: Config,
    options: TuneConfig,
    world: World,
    *,
    log: Callable[[str], None],
    on_phase: Callable[[Phase], None],
) -> Result:
    """Measure until the budget is spent.

    Args:
        config: Configuration of the run; settings of the loader that it gives are not searched.
        options: What is asked for.
        world: This process among all.
        log: Called with lines about the progress.
        on_phase: Called with each phase as it ends.

    Raises:
        CmaeError: There is nothing to search.
    """
    default = loader_settings(config.data, world.device.type)
    usual = LoaderConfig()
    fixed = [
        name for name in tunable(world.device) if getattr(config.data, name) != getattr(usual, name)
    ]
    with tempfile.TemporaryDirectory() as out:  # for the ledger of bad samples
        config = replace(config, run=replace(config.run, out=Path(out)))
        window_s = options.budget_s / _WINDOWS[world.device.type] * (1 - _OPENING_SHARE)
        measure, has_readers = _loader_measure(config, options, world, window_s=window_s)
        grid = build_grid(default, world.device, has_readers=has_readers)
        grid = {name: values for name, values in grid.items() if name not in fixed}
        if not grid:
            given = ", ".join(f"data.{name}" for name in fixed)
            raise CmaeError(
                f"{given} are all given: leave one of them out, there is nothing to search"
            )
        log(
            f"searching {', '.join(grid)} for about {options.budget_s:.0f} s, "
            f"{window_s:.1f} s a window"
        )
        return Search(
            measure,
            budget_s=options.budget_s,
            clock=time.monotonic,
            target_images_per_s=options.step_images_per_s,
            on_phase=on_phase,
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
    config: Config, options: TuneConfig, world: World, *, window_s: float
) -> tuple[Measure, bool]:
    """The measure of the real loader, and whether that reads by index."""
    split = split_batch(config, world, num_ranks=options.local_ranks)
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

    with open_with(default_settings(world.device.type)) as loader:
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
            Text(f"{name} <-", "bold") if trial.settings == phase.chosen else name,
            f"{trial.images_per_s:.0f}{enough}",
            f"{low:.0f} to {high:.0f}",
            cost,
            str(len(trial.windows)),
        )
    return table


def _whole(settings: LoaderSettings) -> str:
    return settings.describe(("num_threads", "prefetch", "num_readers"))


def _verdict(result: Result, options: TuneConfig, names: tuple[str, ...]) -> Text:
    rate, target = result.chosen.images_per_s, options.step_images_per_s
    text = Text(result.settings.describe(names), "bold")
    text.append(f": {rate:.0f} images/s for each rank", "not bold")
    lines = []
    if target is not None:
        enough = "enough for" if rate >= target else "less than"
        lines.append(f"{enough} the step's {target:.0f} images/s ({rate / target:.2f} x)")
        lines.append("* in the tables: at least that")
    if result.out_of_time:
        lines.append(
            "the time was up before every window was measured: a larger --budget_s is surer"
        )
    return text.append("".join(f"\n{line}" for line in lines), "not bold")
