"""Other settings, tried: what they cost the loader (trials), and what they bring the run (verification)."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from cmae.pipeline import Loader
from cmae.pipeline.sources.records import RawBatch, Record, Source
from cmae.pipeline.views.backend import ViewBackend
from cmae.train.config import BatchSplit, Config
from cmae.train.distributed import World
from cmae.train.loop.pretrain import open_loader
from cmae.train.profiling.analysis.bottleneck_model import Costs
from cmae.train.profiling.analysis.records import Reading
from cmae.train.profiling.analysis.verdict import Trial
from cmae.train.profiling.measure.switches import SwitchedSource
from cmae.train.profiling.measure.timing import run_stretch, wait_until_idle

_WARM = 3  # batches that are not timed
_STRETCH_S = 0.7


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The configuration with dotted settings changed.

    Raises:
        ValueError: there is no such setting.
    """
    for key, value in overrides.items():
        config = _override(config, key.split("."), value, key)
    return config


def _override(section: Any, names: Sequence[str], value: Any, key: str) -> Any:
    known = {field.name for field in fields(section)}
    if names[0] not in known:
        raise ValueError(
            f"{key} is no setting; {names[0]!r} must be one of {', '.join(sorted(known))}"
        )
    if len(names) > 1:
        inner = getattr(section, names[0])
        assert is_dataclass(inner)
        value = _override(inner, names[1:], value, key)
    return replace(section, **{names[0]: value})


@dataclass(frozen=True)
class _Variant:
    what: str
    overrides: dict[str, Any]
    batches: list[RawBatch]


def run_trials(
    config: Config,
    world: World,
    recorded: list[RawBatch],
    *,
    costs: Costs,
    say: Callable[[str], None],
    rounds: int = 5,
) -> list[Trial]:
    """Measure the loader alone, from memory, as other settings of the views would have it.

    The settings of the run are measured the same way, in every round; a trial's costs are the measured costs
    times the median ratio of the two in a round.

    Args:
        config: of the run.
        world: this process among all.
        recorded: encoded files.
        costs: measured ones of the run.
        say: called with a line for each trial.
        rounds: how often each is measured, in turn.
    """
    variants = [_Variant("as it is", {}, recorded), *_variants(config, world, recorded)]
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(_open(override(config, one.overrides), world, one.batches))
            for one in variants
        ]
        count = math.ceil(4 * _STRETCH_S / _time(loaders[0], 4).wall_s)
        readings: list[list[Reading]] = [[] for _ in variants]
        for number in range(rounds):
            turns = list(zip(variants, loaders, readings, strict=True))
            for variant, loader, found in turns[:: 1 if number % 2 else -1]:
                say(f"trial: {variant.what}")
                found.append(_time(loader, min(max(4, count), 64)))
    return [
        _trial(variant, costs, readings[0], found)
        for variant, found in zip(variants[1:], readings[1:], strict=True)
    ]


def _trial(
    variant: _Variant, costs: Costs, base: Sequence[Reading], found: Sequence[Reading]
) -> Trial:
    """A trial's rate is taken for the decoder's: with files in memory little else can bind."""

    def ratio(cost: Callable[[Reading], float]) -> float:
        pairs = zip(base, found, strict=True)
        return statistics.median(cost(changed) / cost(now) for now, changed in pairs)

    return Trial(
        variant.what,
        variant.overrides,
        decode_s=costs.decode_s * ratio(lambda one: one.wall_s / one.images),
        loader_cpu_s=costs.loader_cpu_s * ratio(lambda one: one.process_cpu_s / one.images),
        efficiency=costs.efficiency,
    )


def _variants(config: Config, world: World, recorded: list[RawBatch]) -> list[_Variant]:
    views, found = config.data.views, []
    if config.model.has_contrast and views.color == "exact":
        what = "fast colour operations, whose pixels differ (data.views.color)"
        found.append(_Variant(what, {"data.views.color": "fast"}, recorded))
    if world.device.type == "cpu":
        now = "host" if config.speed.view_backend == "auto" else config.speed.view_backend
        other = "dali" if now == "host" else "host"
        what = f"views by {other} instead of {now}"
        found.append(_Variant(what, {"speed.view_backend": other}, recorded))
    else:
        for load in (0.0, 0.3, 0.9):
            what = f"{100 * load:.0f} % of the JPEGs on the GPU's decoder unit"
            found.append(_Variant(what, {"speed.hw_decoder_load": load}, recorded))
    side = 2 * views.source_crop_size
    shorter = [min(one.height, one.width) for raw in recorded for one in raw.records]
    if statistics.median(shorter) > 1.2 * side:
        what = f"shards of images resized to {side} px (cmae shards write)"
        found.append(_Variant(what, {}, [_resized(raw, side) for raw in recorded]))
    return found


def _resized(raw: RawBatch, side: int) -> RawBatch:
    return replace(raw, records=[_resize(record, side) for record in raw.records])


def _resize(record: Record, side: int) -> Record:
    """The same image with its shorter side cut down to `side`, as JPEG."""
    image = Image.open(io.BytesIO(record.data.tobytes()), formats=("JPEG",))
    shorter = min(image.size)
    if shorter <= side:
        return record
    size = tuple(round(edge * side / shorter) for edge in image.size)
    image.draft("RGB", (2 * size[0], 2 * size[1]))
    file = io.BytesIO()
    image.convert("RGB").resize((size[0], size[1])).save(file, "JPEG", quality=92)
    data = np.frombuffer(file.getvalue(), dtype=np.uint8)
    return replace(record, data=data, height=size[1], width=size[0])


def _open(config: Config, world: World, recorded: list[RawBatch]) -> Loader:
    split = BatchSplit.of(
        config.optim.global_batch_size, config.speed.micro_batch_size, world.world_size
    )

    def from_memory(source: Source, view_backend: ViewBackend) -> tuple[Source, ViewBackend]:
        return SwitchedSource.holding(source, recorded), view_backend

    return open_loader(config, split, world, wrap=from_memory)


def _time(loader: Loader, num_batches: int) -> Reading:
    wait_until_idle()  # the loader that was timed before fills its queue
    for _ in range(_WARM + 2):
        next(loader)
    size = len(next(loader).label)
    return run_stretch(
        "trial",
        lambda: next(loader),
        lambda batch: None,
        count=num_batches,
        images_per_step=size,
        synchronise=lambda: None,
        snapshot=loader.snapshot,
    )
