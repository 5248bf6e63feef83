"""What is profiled: the run's loader with switches in it, and the step that its batches go to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from cmae.model import draw_mask
from cmae.pipeline import Batch, Loader, LoaderState, synthetic_batches
from cmae.pipeline.loader.loader import Wrap
from cmae.pipeline.sources.records import RawBatch, Source
from cmae.pipeline.views.backend import ViewBackend
from cmae.train.batch_split import BatchSplit, split_batch
from cmae.train.config import Config
from cmae.train.distributed import World
from cmae.train.loop.loader_settings import LoaderSettings, loader_settings
from cmae.train.loop.pretrain import open_loader
from cmae.train.profiling.measure.switches import SwitchedBackend, SwitchedSource

Step = Callable[[Sequence[Batch]], object]

Log = Callable[[str], None]


def log_nothing(line: str) -> None:
    """For ranks that are not the first."""


@dataclass(frozen=True)
class Subject:
    """What is profiled."""

    loader: Loader
    source: SwitchedSource
    view_backend: SwitchedBackend
    step: Step
    synthetic: list[Batch]
    """One optimiser step's micro-batches that never change."""
    world: World
    start: LoaderState
    settings: LoaderSettings
    """The loader's threads and queues."""
    local: Callable[[], AbstractContextManager[None]] | None = None
    """Within it the step talks to no other rank; None where there is no other."""
    wrap: Wrap | None = None
    """What lies around the real source and view backend, inside the switches."""

    @property
    def accumulation(self) -> int:
        """Micro-batches in a step."""
        return len(self.synthetic)

    @property
    def images_per_step(self) -> int:
        """Images of this rank in a step."""
        return sum(len(batch.label) for batch in self.synthetic)


@contextmanager
def open_subject(
    config: Config,
    world: World,
    step: Step,
    *,
    local: Callable[[], AbstractContextManager[None]] | None = None,
    wrap: Wrap | None = None,
) -> Iterator[Subject]:
    """Open the run's loader with switches in it.

    Args:
        config: Configuration of the run.
        world: This process among all.
        step: Function that takes one optimiser step's micro-batches.
        local: Context of steps that talk to no other rank, see `Subject.local`.
        wrap: Layer around the real source and view backend, inside the switches.
    """
    split = split_batch(config, world)
    switches: list[tuple[SwitchedSource, SwitchedBackend]] = []

    def switched(source: Source, view_backend: ViewBackend) -> tuple[Source, ViewBackend]:
        if wrap is not None:
            source, view_backend = wrap(source, view_backend)
        switches.append((SwitchedSource(source), SwitchedBackend(view_backend)))
        return switches[0]

    settings = loader_settings(config.data, world.device.type)
    with open_loader(config, split, world, settings=settings, wrap=switched) as loader:
        source, view_backend = switches[0]
        yield Subject(
            loader=loader,
            source=source,
            view_backend=view_backend,
            step=step,
            synthetic=_synthetic(config, split, world),
            world=world,
            start=LoaderState(config.seed, epoch=0, offset=0, digest=source.digest),
            settings=settings,
            local=local,
            wrap=wrap,
        )


def open_recorded(config: Config, world: World, recorded: list[RawBatch]) -> Loader:
    """The run's loader, fed with encoded files that are held in memory.

    Args:
        config: Configuration of the run.
        world: This process among all.
        recorded: Encoded files, given again and again.
    """

    def from_memory(source: Source, view_backend: ViewBackend) -> tuple[Source, ViewBackend]:
        return SwitchedSource.holding(source, recorded), view_backend

    return open_loader(config, split_batch(config, world), world, wrap=from_memory)


def _synthetic(config: Config, split: BatchSplit, world: World) -> list[Batch]:
    batches = synthetic_batches(
        config.loader_views,
        batch_size=split.micro_batch_size,
        device=world.device,
        draw_mask=lambda index, epoch: draw_mask(
            config.model, index, seed=config.seed, epoch=epoch
        ),
        seed=config.seed,
    )
    return [next(batches) for _ in range(split.accumulation)]
