"""Actions applied: what the full run gains by each, in turn with the run as it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from cmae.train.config import Config
from cmae.train.distributed import World, from_main
from cmae.train.profiling.analysis.bootstrap import estimate
from cmae.train.profiling.analysis.records import Action, Estimate
from cmae.train.profiling.config import ProfileConfig
from cmae.train.profiling.measure.phases import Bench
from cmae.train.profiling.measure.rounds import whole_bursts
from cmae.train.profiling.measure.subject import Log, Subject, open_subject
from cmae.train.profiling.measure.timing import wait_until_idle
from cmae.train.profiling.measure.trials import override

_BUDGET_S = 40.0
"""Time for one action, when three pairs have been measured."""


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
        if number:  # the first pair warms up
            gains.append(rates[1] / rates[0])
        is_over = number >= 3 and time.monotonic() > end
        if from_main(is_over, world):
            break
    return gains


def _scaled(value: Estimate, factor: float) -> Estimate:
    return Estimate(value.value * factor, value.low * factor, value.high * factor, value.n)
