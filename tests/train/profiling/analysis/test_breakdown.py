"""The breakdown of the step, estimates with intervals and the bottleneck model, on numbers made here."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cmae.train.profiling.analysis.bootstrap import estimate, estimates
from cmae.train.profiling.analysis.bottleneck_model import Costs, loader_rate, solve
from cmae.train.profiling.analysis.breakdown import break_down
from cmae.train.profiling.analysis.records import Component, Estimate, Reading
from cmae.train.profiling.analysis.verdict import Facts, diagnose, rank_actions
from cmae.train.profiling.measure.python_time import StepTimes, python_ms

COSTS = Costs(
    model_s=0.01,
    step_cpu_s=0.001,
    loader_cpu_s=0.004,
    decode_augment_s=0.004,
    prefetch_s=0.0005,
    read_warm_s=0.0001,
    read_cold_s=0.02,
    num_bytes=1e5,
    cold_share=0.0,
    cores=2.0,
    threads=2.0,
    readers=4.0,
    core_efficiency=1.0,
)


def reading(phase: str, step_ms: float, *, next_cpu_ms: float = 0.0) -> Reading:
    return Reading(
        phase=phase,
        step_times_ms=(step_ms,) * 4,
        wall_s=4 * step_ms / 1000,
        images=32,
        next_s=0.0,
        next_cpu_s=4 * next_cpu_ms / 1000,
        step_cpu_s=0.0,
        process_cpu_s=0.0,
        others_cpu_s=0.0,
        run_delay_s=0.0,
    )


def components_of(cold_share: float = 0.0, **step_ms: float) -> dict[str, float]:
    readings = {name: [reading(name, ms)] * 3 for name, ms in step_ms.items()}
    breakdown = break_down(readings, python_ms=[2.0] * 3, cold_share=cold_share)
    return {one.name: one.ms.value for one in breakdown}


def test_components_are_the_differences_between_phases_and_sum_to_the_full_run() -> None:
    components = components_of(
        0.5, replay=50, interference=53, prefetch=50, memory=70, warm=75, cold=95, full=86
    )
    expected = {
        "model": 48,
        "python": 2,
        "interference": 3,
        "prefetch": 0,
        "decode_augment": 17,
        "read_warm": 5,
        "read_cold": 10,
        "residual": 1,
    }
    assert components == pytest.approx(expected)
    assert sum(components.values()) == pytest.approx(86)


def test_a_wait_that_needs_no_decoding_is_the_prefetch_threads() -> None:
    components = components_of(
        replay=50, interference=50, prefetch=90, memory=90, warm=90, cold=90, full=90
    )
    assert components["prefetch"] == pytest.approx(40)
    assert components["decode_augment"] == pytest.approx(0)


def test_interference_is_at_most_what_the_connected_run_lost() -> None:
    components = components_of(
        replay=50, interference=80, prefetch=50, memory=60, warm=60, cold=60, full=60
    )
    assert (components["interference"], components["decode_augment"]) == (pytest.approx(10), 0)


def test_waiting_components_are_at_most_what_was_waited_where_that_shows() -> None:
    phases = {"replay": 50, "interference": 50, "prefetch": 50, "memory": 60, "full": 90}
    readings = {name: [reading(name, ms)] * 3 for name, ms in phases.items()}
    readings["full"] = [replace(one, next_s=4 * 0.020) for one in readings["full"]]
    breakdown = break_down(readings, python_ms=[0.0] * 3, cold_share=0.0, waits_show=True)
    found = {one.name: one.ms.value for one in breakdown}
    assert (found["decode_augment"], found["read_cold"]) == (pytest.approx(5), pytest.approx(15))
    assert found["residual"] == pytest.approx(20)


def test_ranks_split_the_replay_into_model_straggler_and_collective() -> None:
    phases = {"replay": 60, "interference": 60, "prefetch": 60, "memory": 60, "full": 60}
    readings = {name: [reading(name, ms)] * 3 for name, ms in phases.items()}
    breakdown = break_down(
        readings, python_ms=[0.0] * 3, cold_share=0.0, local_ms=[[40.0, 55.0, 41.0]] * 3
    )
    found = {one.name: one.ms.value for one in breakdown}
    assert found["model"] == pytest.approx(41)
    assert found["straggler"] == pytest.approx(14)
    assert found["collective"] == pytest.approx(5)


def test_python_is_no_more_than_the_gaps_between_operators() -> None:
    # Its core was faster than usual.
    quick = StepTimes(operators_ms=122.0, kernels_ms=0.0, gaps_ms=5.0)
    assert python_ms(166.0, 166.0, quick) == 5.0
    assert python_ms(166.0, 166.0, replace(quick, operators_ms=64.0, gaps_ms=105.0)) == 102.0
    assert python_ms(120.0, 166.0, quick) == 0.0
    hidden = StepTimes(operators_ms=20.0, kernels_ms=90.0, gaps_ms=40.0)
    assert python_ms(60.0, 100.0, hidden) == 10.0


def test_drift_that_meets_both_phases_does_not_widen_their_difference() -> None:
    drift = [0.0, 30.0, 5.0, 80.0, 12.0, 50.0, 22.0]
    rounds = {"a": [100 + d for d in drift], "b": [110 + d for d in drift]}
    found = estimates(rounds, lambda m: {"difference": m["b"] - m["a"], "a": m["a"]})
    assert found["difference"] == Estimate(10.0, 10.0, 10.0, n=7)
    assert found["a"].high - found["a"].low > 30


def test_an_estimate_is_the_median_inside_its_interval() -> None:
    rng = np.random.default_rng(1)
    found = estimate([*rng.normal(10, 1, 20), 1000.0])  # one round met something else
    assert 9 < found.low < found.value < found.high < 11


def test_the_rate_is_that_of_the_scarcest_resource() -> None:
    found = solve(COSTS)
    assert (found.images_per_s, found.bottleneck) == (pytest.approx(100), "model")
    slow = replace(COSTS, decode_augment_s=0.04)
    found = solve(slow)
    assert (found.images_per_s, found.bottleneck) == (pytest.approx(50), "decode_augment")
    assert found.next_bottleneck == "model"
    assert found.headroom == pytest.approx(2)


def test_step_and_loader_share_the_cores() -> None:
    found = solve(replace(COSTS, step_cpu_s=0.019, loader_cpu_s=0.006))
    assert (found.images_per_s, found.bottleneck) == (pytest.approx(80), "cores")
    assert loader_rate(replace(COSTS, step_cpu_s=0.019, loader_cpu_s=0.006)) == pytest.approx(
        2 / 0.006
    )


def test_reads_that_miss_the_cache_are_mixed_in_by_their_share() -> None:
    costs = replace(
        COSTS, model_s=1e-5, cold_share=0.25, decode_augment_s=0.0, loader_cpu_s=0.0, prefetch_s=0
    )
    costs = replace(costs, step_cpu_s=0.0)
    expected = 4 / (0.75 * 0.0001 + 0.25 * 0.02)  # Little's law: four readers, mean latency
    assert solve(costs).images_per_s == pytest.approx(expected)
    narrow = replace(costs, bandwidth_cold=1e6)
    assert solve(narrow).images_per_s == pytest.approx(1e6 / (0.25 * 1e5))
    assert solve(narrow).bottleneck == "storage"


def facts(costs: Costs, *, others_cores: float = 0.0, **components: float) -> Facts:
    total = sum(components.values())
    return Facts(
        breakdown=[Component(name, Estimate(ms, ms, ms, 1), "") for name, ms in components.items()],
        costs=costs,
        measured_images_per_s=8000 / total,
        world_size=1,
        device="cpu",
        others_cores=others_cores,
        waiting_for_cores=0.5,
    )


def test_the_diagnosis_dares_to_name_the_model() -> None:
    diagnosis = diagnose(facts(COSTS, model=80.0, decode_augment=2.0, residual=1.0))
    assert diagnosis.bottleneck == "model"
    assert diagnosis.sentence == "The model is the bottleneck; the loader has 5.0x head-room."


def test_the_largest_component_is_named_with_what_would_help() -> None:
    slow = replace(COSTS, decode_augment_s=0.04, threads=2.0, cores=8.0)
    found = facts(slow, model=80.0, decode_augment=80.0, residual=1.0)
    assert diagnose(found).bottleneck == "decode_augment"
    best = rank_actions(found)[0]
    assert best.overrides in ({"speed.num_threads": 4}, {"speed.num_threads": 8})
    assert best.predicted_images_per_s == pytest.approx(100, rel=0.02)
    assert best.then_bottleneck == "model"
    assert "1.2x" not in diagnose(found).sentence
    assert "2.0x" in diagnose(found).sentence


def test_a_bottleneck_inside_the_step_is_credited_with_its_own_share() -> None:
    diagnosis = diagnose(facts(COSTS, model=60.0, python=20.0))
    assert diagnosis.bottleneck == "python"
    assert diagnosis.headroom == pytest.approx(80 / 60)
    assert "1.3x" in diagnosis.sentence


def test_a_component_that_the_rounds_do_not_agree_on_is_not_named() -> None:
    found = facts(COSTS, model=80.0, prefetch=20.0)
    components = [found.breakdown[0], replace(found.breakdown[1], ms=Estimate(20.0, -5.0, 90.0, 3))]
    assert diagnose(found).bottleneck == "prefetch"
    assert diagnose(replace(found, breakdown=components)).bottleneck == "model"


def test_other_processes_are_named_where_decoding_waits_for_cores() -> None:
    slow = replace(COSTS, decode_augment_s=0.04)
    assert (
        diagnose(facts(slow, others_cores=1.5, model=80.0, decode_augment=80.0)).bottleneck
        == "neighbour"
    )
    assert (
        diagnose(facts(slow, others_cores=0.1, model=80.0, decode_augment=80.0)).bottleneck
        == "decode_augment"
    )


def test_a_saturated_storage_is_not_helped_by_more_readers() -> None:
    waits = replace(COSTS, read_warm_s=0.08)
    before = facts(waits, model=80.0, read_warm=80.0)
    assert any("batches at a time" in action.what for action in rank_actions(before))
    full = replace(waits, bandwidth_warm=1e5 * 50)
    after = facts(full, model=80.0, read_warm=80.0)
    assert not any("batches at a time" in action.what for action in rank_actions(after))
    assert math.isfinite(full.bandwidth_warm)
