"""The account of the step, estimates with intervals and the resource model, on numbers made here."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest

from cmae.train.profiling.analysis.bootstrap import estimate, estimates
from cmae.train.profiling.analysis.bottleneck_model import Costs, cache_hits, loader_rate, solve
from cmae.train.profiling.analysis.breakdown import account
from cmae.train.profiling.analysis.records import Estimate, Part, Reading
from cmae.train.profiling.analysis.verdict import Facts, judge, rank_actions
from cmae.train.profiling.measure.python_time import Anatomy, python_ms

COSTS = Costs(
    model_s=0.01,
    step_cpu_s=0.001,
    loader_cpu_s=0.004,
    decode_s=0.004,
    feed_s=0.0005,
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


def parts_of(cold_share: float = 0.0, **step_ms: float) -> dict[str, float]:
    readings = {name: [reading(name, ms)] * 3 for name, ms in step_ms.items()}
    parts = account(readings, python_ms=[2.0] * 3, cold_share=cold_share)
    return {part.name: part.ms.value for part in parts}


def test_parts_are_the_differences_between_phases_and_sum_to_the_full_run() -> None:
    parts = parts_of(
        0.5, replay=50, interference=53, prefetcher=50, memory=70, warm=75, cold=95, full=86
    )
    expected = {
        "model": 48,
        "python": 2,
        "interference": 3,
        "feed": 0,
        "decode": 17,
        "fetch_warm": 5,
        "fetch_cold": 10,
        "residual": 1,
    }
    assert parts == pytest.approx(expected)
    assert sum(parts.values()) == pytest.approx(86)


def test_a_wait_that_needs_no_decoding_is_the_feeds() -> None:
    parts = parts_of(
        replay=50, interference=50, prefetcher=90, memory=90, warm=90, cold=90, full=90
    )
    assert parts["feed"] == pytest.approx(40)
    assert parts["decode"] == pytest.approx(0)


def test_interference_is_at_most_what_the_connected_run_lost() -> None:
    parts = parts_of(
        replay=50, interference=80, prefetcher=50, memory=60, warm=60, cold=60, full=60
    )
    assert (parts["interference"], parts["decode"]) == (pytest.approx(10), 0)


def test_waiting_parts_are_at_most_what_was_waited_where_that_shows() -> None:
    phases = {"replay": 50, "interference": 50, "feed": 50, "memory": 60, "full": 90}
    readings = {name: [reading(name, ms)] * 3 for name, ms in phases.items()}
    readings["full"] = [replace(one, next_s=4 * 0.020) for one in readings["full"]]
    parts = account(readings, python_ms=[0.0] * 3, cold_share=0.0, waits_show=True)
    found = {part.name: part.ms.value for part in parts}
    assert (found["decode"], found["fetch_cold"]) == (pytest.approx(5), pytest.approx(15))
    assert found["residual"] == pytest.approx(20)


def test_ranks_split_the_replay_into_model_straggler_and_collective() -> None:
    phases = {"replay": 60, "interference": 60, "feed": 60, "memory": 60, "full": 60}
    readings = {name: [reading(name, ms)] * 3 for name, ms in phases.items()}
    parts = account(
        readings, python_ms=[0.0] * 3, cold_share=0.0, local_ms=[[40.0, 55.0, 41.0]] * 3
    )
    found = {part.name: part.ms.value for part in parts}
    assert found["model"] == pytest.approx(41)
    assert found["straggler"] == pytest.approx(14)
    assert found["collective"] == pytest.approx(5)


def test_python_is_no_more_than_the_gaps_between_operators() -> None:
    quick = Anatomy(
        operators_ms=122.0, kernels_ms=0.0, gaps_ms=5.0
    )  # its core was faster than usual
    assert python_ms(166.0, 166.0, quick) == 5.0
    assert python_ms(166.0, 166.0, replace(quick, operators_ms=64.0, gaps_ms=105.0)) == 102.0
    assert python_ms(120.0, 166.0, quick) == 0.0
    hidden = Anatomy(operators_ms=20.0, kernels_ms=90.0, gaps_ms=40.0)
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
    assert (found.images_per_s, found.binds) == (pytest.approx(100), "model")
    slow = replace(COSTS, decode_s=0.04)
    found = solve(slow)
    assert (found.images_per_s, found.binds) == (pytest.approx(50), "decode")
    assert found.next_binds == "model"
    assert found.headroom == pytest.approx(2)


def test_step_and_loader_share_the_cores() -> None:
    found = solve(replace(COSTS, step_cpu_s=0.019, loader_cpu_s=0.006))
    assert (found.images_per_s, found.binds) == (pytest.approx(80), "cores")
    assert loader_rate(replace(COSTS, step_cpu_s=0.019, loader_cpu_s=0.006)) == pytest.approx(
        2 / 0.006
    )


def test_reads_that_miss_the_cache_are_mixed_in_by_their_share() -> None:
    costs = replace(COSTS, model_s=1e-5, cold_share=0.25, decode_s=0.0, loader_cpu_s=0.0, feed_s=0)
    costs = replace(costs, step_cpu_s=0.0)
    expected = 4 / (0.75 * 0.0001 + 0.25 * 0.02)  # Little's law: four readers, mean latency
    assert solve(costs).images_per_s == pytest.approx(expected)
    narrow = replace(costs, bandwidth_cold=1e6)
    assert solve(narrow).images_per_s == pytest.approx(1e6 / (0.25 * 1e5))
    assert solve(narrow).binds == "storage"


@pytest.mark.parametrize("cached", [0.2, 0.5, 0.8])
def test_cache_hits_are_those_of_a_simulated_cache(cached: float) -> None:
    rng = np.random.default_rng(0)
    size, hits, reads = 2000, 0, 0
    cache: OrderedDict[int, None] = OrderedDict()
    for epoch in range(6):
        for sample in rng.permutation(size).tolist():
            if epoch:
                hits, reads = hits + (sample in cache), reads + 1
            cache[sample] = None
            cache.move_to_end(sample)
            if len(cache) > cached * size:
                cache.popitem(last=False)
    assert cache_hits(cached) == pytest.approx(hits / reads, abs=0.02)
    assert (cache_hits(0.0), cache_hits(1.0)) == (0.0, 1.0)


def facts(costs: Costs, *, others_cores: float = 0.0, **parts: float) -> Facts:
    total = sum(parts.values())
    return Facts(
        parts=[Part(name, Estimate(ms, ms, ms, 1), "") for name, ms in parts.items()],
        costs=costs,
        measured_images_per_s=8000 / total,
        world_size=1,
        device="cpu",
        others_cores=others_cores,
        waiting_for_cores=0.5,
    )


def test_the_verdict_dares_to_say_that_the_model_binds() -> None:
    verdict = judge(facts(COSTS, model=80.0, decode=2.0, residual=1.0))
    assert verdict.binds == "model"
    assert verdict.sentence == "The model binds; the loader has 5.0x head-room."


def test_the_largest_part_is_named_with_what_would_help() -> None:
    slow = replace(COSTS, decode_s=0.04, threads=2.0, cores=8.0)
    found = facts(slow, model=80.0, decode=80.0, residual=1.0)
    assert judge(found).binds == "decode"
    best = rank_actions(found)[0]
    assert best.overrides in ({"data.num_threads": 4}, {"data.num_threads": 8})
    assert best.predicted_images_per_s == pytest.approx(100, rel=0.02)
    assert best.then_binds == "model"
    assert "1.2x" not in judge(found).sentence
    assert "2.0x" in judge(found).sentence


def test_what_binds_inside_the_step_is_credited_with_its_own_share() -> None:
    verdict = judge(facts(COSTS, model=60.0, python=20.0))
    assert verdict.binds == "python"
    assert verdict.headroom == pytest.approx(80 / 60)
    assert "1.3x" in verdict.sentence


def test_a_part_that_the_rounds_do_not_agree_on_is_not_named() -> None:
    found = facts(COSTS, model=80.0, prefetcher=20.0)
    parts = [found.parts[0], replace(found.parts[1], ms=Estimate(20.0, -5.0, 90.0, 3))]
    assert judge(found).binds == "feed"
    assert judge(replace(found, parts=parts)).binds == "model"


def test_other_processes_are_named_where_decoding_waits_for_cores() -> None:
    slow = replace(COSTS, decode_s=0.04)
    assert judge(facts(slow, others_cores=1.5, model=80.0, decode=80.0)).binds == "neighbour"
    assert judge(facts(slow, others_cores=0.1, model=80.0, decode=80.0)).binds == "decode"


def test_a_saturated_storage_is_not_helped_by_more_readers() -> None:
    waits = replace(COSTS, read_warm_s=0.08)
    before = facts(waits, model=80.0, fetch_warm=80.0)
    assert any("batches at a time" in action.what for action in rank_actions(before))
    full = replace(waits, bandwidth_warm=1e5 * 50)
    after = facts(full, model=80.0, fetch_warm=80.0)
    assert not any("batches at a time" in action.what for action in rank_actions(after))
    assert math.isfinite(full.bandwidth_warm)
