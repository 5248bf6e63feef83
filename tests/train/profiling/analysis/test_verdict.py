"""A stage that is made slow is the bottleneck that is named, with what would help and by how much."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.simulated_run import IMAGES, SimulatedRun

from cmae.train.profiling.analysis.breakdown import break_down
from cmae.train.profiling.analysis.costs import (
    median_rate,
    others_cores,
    stage_costs,
    waiting_for_cores,
)
from cmae.train.profiling.analysis.notes import Circumstances, build_notes
from cmae.train.profiling.analysis.verdict import Facts, diagnose, rank_actions


def facts_of(run: SimulatedRun, *, local_ms: tuple[float, ...] = ()) -> Facts:
    readings = run.readings()
    breakdown = break_down(
        readings,
        python_ms=[run.python] * 3,
        cold_share=run.cold_share,
        local_ms=[list(local_ms)] * 3 if local_ms else (),
        waits_show=True,
    )
    found = {one.name: one.ms.value for one in breakdown}
    assert sum(found.values()) == pytest.approx(readings["full"][0].step_ms)
    assert found["residual"] == pytest.approx(0, abs=1e-6)
    return Facts(
        breakdown=breakdown,
        costs=stage_costs(readings, cold_share=run.cold_share, cores=8, threads=run.threads),
        measured_images_per_s=median_rate(readings["full"]),
        world_size=1,
        device="cpu",
        others_cores=others_cores(readings),
        waiting_for_cores=waiting_for_cores(readings),
    )


@pytest.mark.parametrize(
    ("run", "bottleneck"),
    [
        (SimulatedRun(), "model"),
        (SimulatedRun(step=400.0), "model"),
        (SimulatedRun(decode_augment=250.0), "decode_augment"),
        (SimulatedRun(prefetch=250.0), "prefetch"),
        (SimulatedRun(read_warm=250.0, read_cold=250.0), "storage"),
        (SimulatedRun(read_cold=400.0, cold_share=0.6), "storage"),
        (SimulatedRun(python=60.0), "python"),
        (SimulatedRun(decode_augment=250.0, others_cores=1.5, waiting_for_cores=0.5), "neighbour"),
        (SimulatedRun(decode_augment=250.0, others_cores=1.5), "decode_augment"),
    ],
)
def test_the_slow_stage_is_named(run: SimulatedRun, bottleneck: str) -> None:
    assert diagnose(facts_of(run)).bottleneck == bottleneck


def test_a_slow_rank_is_named() -> None:
    assert diagnose(facts_of(SimulatedRun(), local_ms=(50.0, 100.0))).bottleneck == "straggler"


def test_the_loaders_head_room_is_that_over_its_slowest_stage() -> None:
    assert diagnose(facts_of(SimulatedRun(decode_augment=25.0))).headroom == pytest.approx(4.0)


def test_more_readers_are_proposed_with_the_rate_that_the_simulation_then_reaches() -> None:
    run = SimulatedRun(read_warm=250.0, read_cold=250.0)
    actions = {one.what: one for one in rank_actions(facts_of(run))}
    # Little's law: twice the readers, half the time of a batch.
    halved = replace(run, read_warm=125.0, readers=8).readings()["full"][0]
    doubled = actions["read 8 batches at a time"]
    assert doubled.overrides == {"speed.num_readers": 8}
    assert doubled.predicted_images_per_s == pytest.approx(halved.images_per_s)
    four = actions["read 16 batches at a time"]
    assert four.predicted_images_per_s == pytest.approx(1000 * IMAGES / run.step)
    assert four.then_bottleneck == "model"


def test_more_threads_are_proposed_where_decoding_is_slow() -> None:
    run = SimulatedRun(decode_augment=400.0)
    actions = {one.what: one for one in rank_actions(facts_of(run))}
    doubled = actions["decode on 4 threads instead of 2"]
    assert doubled.predicted_images_per_s == pytest.approx(1000 * IMAGES / 200)


def test_notes_say_what_is_worth_a_word() -> None:
    facts = facts_of(SimulatedRun(others_cores=1.5))
    ranks = (
        {"rank": 0, "step_ms": 60.0, "wait_ms": 0.0},
        {"rank": 1, "step_ms": 90.0, "wait_ms": 2.0},
    )
    found = Circumstances(resident=0.25, ranks=ranks, unused_switches=("speed.compile blocks",))
    notes = "\n".join(build_notes(facts, diagnose(facts), found))
    for expected in (
        "speed.compile blocks",
        "25 % of its files",
        "1.5 CPU cores",
        "rank 1 is the slowest",
    ):
        assert expected in notes
    assert build_notes(facts_of(SimulatedRun()), diagnose(facts), Circumstances()) == []
