"""Shares of a stage's threads, and windows put together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.profile_data import decode_bound, loader

from cmae.pipeline.stage_stats import LoaderSnapshot
from cmae.train.profiling.analysis.stages import (
    format_number,
    loader_phase,
    loader_window,
    stage_shares,
    sum_windows,
)


def window() -> LoaderSnapshot:
    return LoaderSnapshot.from_dict(loader())


def test_shares_are_of_all_threads() -> None:
    phase = loader_phase(decode_bound())
    assert phase is not None
    assert phase.name == "full"
    shares = {one.name: one for one in stage_shares(loader_window(phase))}
    found = shares["decode_augment"]
    assert (found.busy, found.starved, found.blocked) == pytest.approx((0.97, 0.01, 0.02))
    assert found.images_per_s == pytest.approx(960)
    assert found.capacity_images_per_s == pytest.approx(960 / 0.97)


def test_windows_of_one_loader_follow_each_other() -> None:
    short = replace(window(), time_s=10.0, queue_depth_mean=2.06)
    both = sum_windows([window(), short])
    one, stage = window().stages["read"], both.stages["read"]
    assert both.time_s == 40
    assert both.samples == 2 * 28672
    assert both.wait_s == pytest.approx(2 * 18.6)
    assert both.queue_depth_mean == pytest.approx((30 * 0.06 + 10 * 2.06) / 40)
    assert (stage.threads, stage.items, stage.busy_s) == (4, 2 * one.items, 2 * one.busy_s)
    assert stage.histogram.total == 2 * one.histogram.total


def test_windows_of_ranks_lie_side_by_side() -> None:
    both, one = sum_windows([window(), window()], side_by_side=True), window()
    assert both.time_s == one.time_s
    assert both.wait_s == one.wait_s
    assert both.stages["read"].threads == 2 * one.stages["read"].threads
    assert [each.busy for each in stage_shares(both)] == pytest.approx(
        [each.busy for each in stage_shares(one)]
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.0042, "0.004"),
        (3.14159, "3.14"),
        (268.4, "268"),
        (12345.6, "12,346"),
        (float("nan"), "-"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert format_number(value) == text
