"""Search for the fastest loader settings with a noisy measure: windows, halving, a repeat at the end.

One coordinate after another. The candidates of a coordinate take turns in short windows, and the worse half
leaves after each round, so that drift of the machine meets all alike and time goes to those that may win. A
candidate replaces the current value only if it is ahead by more than the noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from cmae.train.loop.loader_settings import LoaderSettings

MARGIN = 0.03
"""A candidate has to be ahead by this fraction; medians of three short windows differ by about as much."""
HEADROOM = 1.1
"""A loader this much faster than the training step keeps it fed; more is worth nothing."""
_FINAL_PAIRS = 5
_PACED_ROUNDS = 3
_FINAL_SHARE = 0.25
"""Of the time: kept for the comparison of the winner with the defaults."""


class Window(NamedTuple):
    """One short measurement."""

    images_per_s: float
    cpu_s_per_1000: float


Measure = Callable[[LoaderSettings, float | None], Window]
"""(settings, pace) -> a window. With a pace in images/s the consumer takes no more than that."""


@dataclass
class Trial:
    """One candidate and its windows so far."""

    settings: LoaderSettings
    windows: list[Window] = field(default_factory=list)

    @property
    def images_per_s(self) -> float:
        """Median rate."""
        return statistics.median(window.images_per_s for window in self.windows)

    @property
    def cpu_s_per_1000(self) -> float:
        """Median cost."""
        return statistics.median(window.cpu_s_per_1000 for window in self.windows)

    def value(self, name: str) -> float:
        """One of its settings."""
        return float(getattr(self.settings, name))

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest rate."""
        rates = [window.images_per_s for window in self.windows]
        return min(rates), max(rates)


class Phase(NamedTuple):
    """One coordinate: what was tried, what was taken, and why."""

    name: str
    trials: list[Trial]
    chosen: LoaderSettings
    why: str
    is_last: bool = False
    """It has compared the winner with the defaults."""


class Result(NamedTuple):
    """What a search found."""

    settings: LoaderSettings
    phases: list[Phase]
    """The last one compares the winner with the defaults."""
    chosen: Trial
    default: Trial
    out_of_time: bool
    """Some candidates have fewer windows than planned, or none."""


class Search:
    """One search.

    Args:
        measure: Function that gives one window.
        budget_s: Seconds for everything; no window starts after them.
        clock: Monotonic clock, seconds.
        target_images_per_s: Rate that the training step needs; None asks for as fast as can be.
        on_phase: Called with each phase as it ends, so that nothing is lost when the search is stopped.
    """

    def __init__(
        self,
        measure: Measure,
        *,
        budget_s: float,
        clock: Callable[[], float],
        target_images_per_s: float | None = None,
        on_phase: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        self._measure = measure
        self._on_phase = on_phase
        self._clock = clock
        self._start = clock()
        self._budget_s = budget_s
        self._enough = math.inf if target_images_per_s is None else HEADROOM * target_images_per_s
        self._target = target_images_per_s
        self._out_of_time = False

    def run(self, default: LoaderSettings, grid: Mapping[str, Sequence[float]]) -> Result:
        """Search the grid from the defaults on; its order is that of the coordinates.

        'prefetch' is searched with a paced consumer: the queue is empty before one that never rests.
        """
        self._measure(default, None)  # fills caches; counts for nothing
        current, phases = default, []
        for number, (name, values) in enumerate(grid.items()):
            share = (1 - _FINAL_SHARE) * (number + 1) / len(grid)
            phase = self._search(
                name, values, current, deadline=self._start + share * self._budget_s
            )
            phases.append(phase)
            self._on_phase(phase)
            current = phase.chosen
        final, chosen, first = self._compare(current, default)
        phases.append(final)
        self._on_phase(final)
        return Result(final.chosen, phases, chosen, first, self._out_of_time)

    def _search(
        self, name: str, values: Sequence[float], current: LoaderSettings, *, deadline: float
    ) -> Phase:
        here = Trial(current)
        others = [Trial(_with(current, name, value)) for value in values]
        others = [trial for trial in others if trial.settings != current]
        if self._is_over(deadline):
            return Phase(name, [], current, "no time was left for it")
        if name == "prefetch":
            return self._smallest(name, here, others, deadline=deadline)
        rival = self._race(here, others, deadline=deadline)
        trials = _measured(name, here, others)
        if rival is None or not self._is_ahead(rival, here):
            value = f"{getattr(current, name):g}"
            return Phase(name, trials, current, f"{value} stays: nothing is ahead by more than 3 %")
        return Phase(name, trials, rival.settings, self._why(rival, here))

    def _race(self, here: Trial, rivals: list[Trial], *, deadline: float) -> Trial | None:
        """The last of the rivals; the current value stays in the race to the end, to be compared with."""
        while True:
            here.windows.append(self._measure(here.settings, None))
            for rival in rivals:
                if self._is_over(deadline):
                    break
                rival.windows.append(self._measure(rival.settings, None))
            rivals = sorted((one for one in rivals if one.windows), key=self._worth, reverse=True)
            is_done = len(rivals) <= 1 and len(here.windows) >= 3
            if is_done or not rivals or self._is_over(deadline):
                return rivals[0] if rivals else None
            rivals = rivals[: -(-len(rivals) // 2)]

    def _smallest(self, name: str, here: Trial, others: list[Trial], *, deadline: float) -> Phase:
        """The smallest value that keeps the pace: each batch of a deeper queue takes memory."""
        pace = self._pace(here.settings)
        for _ in range(_PACED_ROUNDS):
            for trial in (here, *others):
                if trial is here or not self._is_over(deadline):
                    trial.windows.append(self._measure(trial.settings, pace))
        trials = _measured(name, here, others)
        full = [trial for trial in trials if len(trial.windows) == _PACED_ROUNDS]
        chosen = next(
            trial
            for number, trial in enumerate(full)
            if not any(self._is_ahead(deeper, trial, surely=True) for deeper in full[number + 1 :])
        )
        why = (
            f"{chosen.value(name):g} is the smallest that keeps a step of {pace:.0f} images/s busy"
        )
        return Phase(name, trials, chosen.settings, why)

    def _pace(self, settings: LoaderSettings) -> float:
        """A step that takes nine tenths of what the loader gives, or what is known of the real one."""
        rate = 0.9 * self._measure(settings, None).images_per_s
        return rate if self._target is None else min(rate, self._target)

    def _compare(
        self, winner: LoaderSettings, default: LoaderSettings
    ) -> tuple[Phase, Trial, Trial]:
        """Measure both again, in turns: what looked best of many was partly lucky.

        The depth of the queue is no part of it: before a consumer that never rests it makes no difference.
        """
        name = "winner against defaults"
        default = _with(default, "prefetch", winner.prefetch)
        first = Trial(default)
        if winner == default:
            first.windows.append(self._measure(default, None))
            why = "nothing is ahead of the defaults"
            return Phase(name, [first], default, why, is_last=True), first, first
        best = Trial(winner)
        end = self._start + self._budget_s
        for number in range(_FINAL_PAIRS):
            if number >= 2 and self._is_over(end):  # two pairs at least: one says nothing
                break
            pair = (first, best) if number % 2 == 0 else (best, first)
            for trial in pair:
                trial.windows.append(self._measure(trial.settings, None))
        if self._is_ahead(best, first, surely=True):
            why = self._why(best, first)
            return Phase(name, [first, best], winner, why, is_last=True), best, first
        why = "the defaults stay: measured again, the winner is not ahead by more than 3 %"
        return Phase(name, [first, best], default, why, is_last=True), first, first

    def _worth(self, trial: Trial) -> tuple[float, float]:
        """More images up to what is needed, then less CPU."""
        return min(trial.images_per_s, self._enough), -trial.cpu_s_per_1000

    def _is_ahead(self, one: Trial, other: Trial, *, surely: bool = False) -> bool:
        rate, before = (min(trial.images_per_s, self._enough) for trial in (one, other))
        if rate > (1 + MARGIN) * before:
            # In nearly all pairs of neighbouring windows too: a median alone can be bursts of other work.
            pairs = zip(one.windows, other.windows, strict=False)
            lost = sum(new.images_per_s <= old.images_per_s for new, old in pairs)
            return lost <= len(one.windows) // (4 if surely else 3)
        feeds = before >= self._enough and rate >= self._enough
        return feeds and one.cpu_s_per_1000 < (1 - MARGIN) * other.cpu_s_per_1000

    def _why(self, best: Trial, other: Trial) -> str:
        gain = best.images_per_s / other.images_per_s - 1
        cost = best.cpu_s_per_1000 / other.cpu_s_per_1000 - 1
        if best.images_per_s >= self._enough and other.images_per_s >= self._enough:
            return f"both feed the step with {HEADROOM - 1:.0%} to spare; this one takes {cost:+.0%} CPU"
        return f"{gain:+.0%} images/s, {cost:+.0%} CPU-s per image"

    def _is_over(self, deadline: float) -> bool:
        over = self._clock() >= deadline
        self._out_of_time |= over
        return over


def _with(settings: LoaderSettings, name: str, value: float) -> LoaderSettings:
    changed: dict[str, Any] = {name: value}
    return replace(settings, **changed)


def _measured(name: str, here: Trial, others: Sequence[Trial]) -> list[Trial]:
    """Those with windows, in the order of their value."""
    trials = [trial for trial in (here, *others) if trial.windows]
    return sorted(trials, key=lambda trial: trial.value(name))
