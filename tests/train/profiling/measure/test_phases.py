"""Each phase runs what its name says and leaves out the rest: counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support.profiling_runs import open_quick

from cmae.pipeline import Batch
from cmae.pipeline.sources.indexed import IndexedSource
from cmae.pipeline.sources.records import Extent, Source
from cmae.pipeline.views.backend import ViewBackend
from cmae.train.profiling.measure.phases import WHAT, Bench, spread_out

STEPS = 40
FED = ("full", "prefetch", "memory", "warm", "cold")
"""Phases that take one step before the timed ones."""

AHEAD = 20
"""Batches that threads may still be at work on when a phase begins."""


class Counted:
    """Another object, whose calls of one method are counted."""

    def __init__(self, inner: Any, method: str, counts: Counter[str]) -> None:
        self._inner, self._method, self._counts = inner, method, counts

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self._counts[name] += 1
        return getattr(self._inner, name)


@pytest.fixture
def counts() -> Counter[str]:
    return Counter()


@pytest.fixture
def bench(small_shards: str, counts: Counter[str]) -> Iterator[Bench]:
    def wrap(source: Source, view_backend: ViewBackend) -> tuple[Source, ViewBackend]:
        assert isinstance(source, IndexedSource)
        source.reader = Counted(source.reader, "read_batch", counts)
        return source, Counted(view_backend, "submit", counts)

    def step(batches: Sequence[Batch]) -> None:
        counts["step"] += 1

    with open_quick(small_shards, step=step, wrap=wrap) as subject:
        found = Bench(subject, steps=STEPS)
        found.run("full")
        counts.clear()
        yield found


@pytest.mark.parametrize(
    ("phase", "reads", "decodes", "steps"),
    [
        ("full", True, True, True),
        ("synthetic", False, False, True),
        ("replay", False, False, True),
        ("prefetch", False, False, True),
        ("memory", False, True, True),
        ("warm", True, True, True),
        ("cold", True, True, True),
        ("loader_memory", False, True, False),
        ("loader_warm", True, True, False),
    ],
)
def test_a_phase_leaves_out_what_its_name_says(
    bench: Bench, counts: Counter[str], phase: str, reads: bool, decodes: bool, steps: bool
) -> None:
    found = bench.run(phase)
    assert len(found.step_times_ms) == STEPS
    assert found.images == 8 * STEPS
    assert counts["step"] == (STEPS + (phase in FED) if steps else 0)
    for method, expected in (("read_batch", reads), ("submit", decodes)):
        assert (counts[method] >= STEPS) == expected, (method, counts)
        assert expected or counts[method] <= AHEAD


def test_the_loader_works_beside_the_step_of_the_phase_interference(
    bench: Bench, counts: Counter[str]
) -> None:
    bench.run("interference")
    assert counts["step"] == STEPS + 1
    # It falls behind a step that takes no time.
    assert 0 < counts["read_batch"] <= STEPS + AHEAD


def test_every_phase_says_what_it_is_and_the_full_run_comes_first(bench: Bench) -> None:
    assert bench.phases()[0] == "full"
    assert set(bench.phases()) <= set(WHAT)


def test_files_to_evict_are_spread_over_all() -> None:
    extents = [Extent("x", number, 1) for number in range(10)]
    assert [one.byte_offset for one in spread_out(extents, 0.3)] == [3, 6, 9]
    assert spread_out(extents, 1.0) == extents
    assert spread_out(extents, 0.0) == []
