"""Other settings, tried: what they cost the loader alone, and what the full run gains by them."""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from cmae.errors import CmaeError
from cmae.pipeline import Loader
from cmae.pipeline.sources.records import RawBatch, Record
from cmae.train.config import Config
from cmae.train.distributed import World, from_main
from cmae.train.profiling.analysis.bootstrap import estimate
from cmae.train.profiling.analysis.bottleneck_model import Costs
from cmae.train.profiling.analysis.records import Action, Estimate, Reading
from cmae.train.profiling.analysis.verdict import Trial
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.measure.phases import Bench
from cmae.train.profiling.measure.rounds import whole_bursts
from cmae.train.profiling.measure.subject import Log, Subject, open_recorded, open_subject
from cmae.train.profiling.measure.timing import measure_window, wait_until_idle

_WARM = 3
"""Batches that are not timed."""
_WINDOW_S = 0.7

_BUDGET_S = 40.0
"""Time for one action, when three pairs have been measured."""


def override(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The configuration with dotted settings changed.

    Raises:
        CmaeError: There is no such setting.
    """
    for key, value in overrides.items():
        config = _override(config, key.split("."), value, key)
    return config


def _override(section: Any, names: Sequence[str], value: Any, key: str) -> Any:
    known = {field.name for field in fields(section)}
    if names[0] not in known:
        raise CmaeError(
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
    log: Log,
    rounds: int = 5,
) -> list[Trial]:
    """Measure the loader alone, from memory, as other settings of the views would have it.

    The settings of the run are measured the same way, in every round; a trial's costs are the measured costs
    times the median ratio of the two in a round.

    Args:
        config: Configuration of the run.
        world: This process among all.
        recorded: Encoded files.
        costs: Measured costs of the run.
        log: Function that takes a line for each trial.
        rounds: Repetitions of each, in turn.
    """
    variants = [_Variant("as it is", {}, recorded), *_variants(config, world, recorded)]
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(open_recorded(override(config, one.overrides), world, one.batches))
            for one in variants
        ]
        count = math.ceil(4 * _WINDOW_S / _time(loaders[0], 4).wall_s)
        readings: list[list[Reading]] = [[] for _ in variants]
        for number in range(rounds):
            turns = list(zip(variants, loaders, readings, strict=True))
            for variant, loader, found in turns[:: 1 if number % 2 else -1]:
                log(f"trial: {variant.what}")
                found.append(_time(loader, min(max(4, count), 64)))
    return [
        _trial(variant, costs, readings[0], found)
        for variant, found in zip(variants[1:], readings[1:], strict=True)
    ]


def _trial(
    variant: _Variant, costs: Costs, base: Sequence[Reading], found: Sequence[Reading]
) -> Trial:
    """A trial's rate is taken for the decoder's: with files in memory little else can limit it."""

    def ratio(cost: Callable[[Reading], float]) -> float:
        pairs = zip(base, found, strict=True)
        return statistics.median(cost(changed) / cost(now) for now, changed in pairs)

    return Trial(
        variant.what,
        variant.overrides,
        decode_augment_s=costs.decode_augment_s * ratio(lambda one: one.wall_s / one.images),
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
    """The same image with its shorter side scaled down to `side`, as JPEG."""
    image = Image.open(io.BytesIO(record.data.tobytes()))
    shorter = min(image.size)
    if shorter <= side:
        return record
    size = tuple(round(edge * side / shorter) for edge in image.size)
    image.draft("RGB", (2 * size[0], 2 * size[1]))
    file = io.BytesIO()
    image.convert("RGB").resize((size[0], size[1])).save(file, "JPEG", quality=92)
    data = np.frombuffer(file.getvalue(), dtype=np.uint8)
    return replace(record, data=data, height=size[1], width=size[0])


def _time(loader: Loader, num_batches: int) -> Reading:
    # The loader that was timed before fills its queue.
    wait_until_idle()
    for _ in range(_WARM + 2):
        next(loader)
    size = len(next(loader).label)
    return measure_window(
        "trial",
        lambda: next(loader),
        lambda batch: None,
        count=num_batches,
        images_per_step=size,
        synchronise=lambda: None,
        snapshot=loader.snapshot,
    )


def verify(
    subject: Subject,
    config: Config,
    actions: Sequence[Action],
    *,
    options: ProfileConfig,
    steps: int,
    base_rates: Sequence[float],
    cold_share: float = 0.0,
    log: Log,
) -> tuple[Action, ...]:
    """Apply the best actions that are settings, one by one, and measure what the full run gains by each.

    The run as it is and the run with the change take turns, so that drift of the machine since the profile
    meets both; what is noted is the gain times the rate of the profile.

    Args:
        subject: Run as it is; its `start` is where samples begin that nothing has read.
        config: Configuration of the run as it is.
        actions: Actions, best first.
        options: Options of the profile; `verify` is the number of actions to apply.
        steps: Timed steps in a measurement window.
        base_rates: Images per second of this rank's full runs.
        cold_share: Share of the files that those missed in the page cache; as many are evicted here.
        log: Function that takes a line for each action.
    """
    measured = list(actions)
    cold_share = cold_share if cold_share > 0.05 else 0.0
    bench = Bench(subject, steps=steps, cold_share=cold_share)
    base = estimate([subject.world.world_size * rate for rate in base_rates])
    settings = [number for number, action in enumerate(actions) if action.overrides]
    for number in settings[: options.verify]:
        action = actions[number]
        log(f"verify: {action.what}")
        changed = override(config, action.overrides)
        with open_subject(changed, subject.world, subject.step, wrap=subject.wrap) as other:
            whole = whole_bursts(steps, other.settings.num_readers)
            beside = Bench(other, steps=whole, cold_share=cold_share)
            gain = estimate(_gains(bench, beside, options, subject.world))
        measured[number] = replace(action, measured_images_per_s=_scaled(gain, base.value))
    return tuple(measured)


def _gains(bench: Bench, changed: Bench, options: ProfileConfig, world: World) -> list[float]:
    """Rate with a change over the rate without it, in neighbouring windows of the full run.

    Each reads files that neither has read before.
    """
    gains: list[float] = []
    end = time.monotonic() + _BUDGET_S
    for number in range(1 + (options.rounds or 7)):
        rates = []
        for one, other in ((bench, changed), (changed, bench)):
            wait_until_idle()
            rates.append(one.run("full").images_per_s)
            other.place = one.place
        # The first pair warms up.
        if number:
            gains.append(rates[1] / rates[0])
        is_over = number >= 3 and time.monotonic() > end
        if from_main(is_over, world):
            break
    return gains


def _scaled(value: Estimate, factor: float) -> Estimate:
    return Estimate(value.value * factor, value.low * factor, value.high * factor, value.n)
