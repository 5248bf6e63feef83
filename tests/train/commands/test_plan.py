"""`cmae plan`: arithmetic by hand, what must not get worse, errors that name the option."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cmae.errors import CmaeError
from cmae.model import count_parameters
from cmae.train.bench.estimate import estimate_step
from cmae.train.commands.main import main
from cmae.train.commands.plan.predict import Cluster, Plan, parse_gpus, plan_run
from cmae.train.config_parser import load_recipe
from cmae.train.gpus import GPUS

VIT_B = load_recipe("cmae_vit_b")
A100 = GPUS["a100"]


def plan(cluster: Cluster, config=VIT_B, **options) -> Plan:
    return plan_run("x", config, cluster, **{"results": Path("nowhere"), **options})


def test_one_case_by_hand() -> None:
    cluster = Cluster(A100, 32, network_gb_per_s=10, link_gb_per_s=100, overlap=0.0)
    found = plan(cluster, images=4096 * 10)
    assert (found.micro_batch_size, found.accumulation) == (128, 1)
    assert found.steps == 300 * 10
    assert found.compute_ms == estimate_step(VIT_B, A100, batch_size=128).step_ms
    gradients = 4 * count_parameters(VIT_B.model)["online"] / 1e9
    keys = 4 * 4096 * VIT_B.model.proj_dim / 1e9
    seconds = 2 * 7 / 8 * gradients / 100 + 2 * 3 / 4 * gradients / 10 + 31 / 32 * keys / 10
    assert found.communication_ms == pytest.approx(1e3 * seconds)
    assert found.exposed_ms == found.communication_ms
    assert found.loader_ms == pytest.approx(1e3 * 128 / (16 * 450))
    assert found.storage_ms == pytest.approx(1e3 * 8 * 128 * 110e3 / 2e9)
    assert found.step_ms == found.compute_ms + found.exposed_ms
    assert found.hours == pytest.approx(found.steps * found.step_ms / 3.6e6)


def sharded(way: str, **speed):
    return replace(VIT_B, speed=replace(VIT_B.speed, parallel=way, **speed))


def test_messages_of_shards_by_hand() -> None:
    cluster = Cluster(A100, 32, network_gb_per_s=10, link_gb_per_s=100, overlap=0.0)
    counts = count_parameters(VIT_B.model)
    keys = 31 / 32 * 4 * 4096 * VIT_B.model.proj_dim / 10e9
    inside, between = 7 / 8 / 100e9, 3 / 4 / 10e9
    online, target = 4 * counts["online"], 4 * counts["target"]
    gathered = 3 * online + target  # weights for both passes, gradients; the target has one pass
    seconds = {
        "ddp": 2 * online * (inside + between),
        "zero1": 3 * online * (inside + between),
        "fsdp": gathered * (inside + between),
        "hsdp": gathered * inside + 2 * online * between,
    }
    for way, expected in seconds.items():
        found = plan(cluster, sharded(way)).communication_ms
        assert found == pytest.approx(1e3 * (expected + keys)), way
    passes = replace(sharded("fsdp").speed, micro_batch_size=64)
    twice = plan(cluster, replace(VIT_B, speed=passes))
    assert twice.accumulation == 2
    assert twice.communication_ms == pytest.approx(1e3 * (2 * seconds["fsdp"] + keys))


def test_what_the_optimiser_sends_hides_behind_nothing() -> None:
    hidden = Cluster(A100, 8, overlap=1.0, link_gb_per_s=1000)
    assert plan(hidden, sharded("ddp")).exposed_ms == 0
    online = 4 * count_parameters(VIT_B.model)["online"]
    assert plan(hidden, sharded("zero1")).exposed_ms == pytest.approx(7 / 8 * online / 1e9)


def test_shards_leave_more_memory() -> None:
    wide = {way: plan(Cluster(A100, 32), sharded(way)) for way in ("ddp", "zero1", "hsdp", "fsdp")}
    memory = [one.memory_gb for one in wide.values()]
    assert memory == sorted(memory, reverse=True)
    ddp, fsdp = wide["ddp"], wide["fsdp"]
    counts = count_parameters(VIT_B.model)
    saved = (16 * counts["online"] + 4 * counts["target"]) * 31 / 32 / 1e9
    assert ddp.memory_gb - fsdp.memory_gb == pytest.approx(saved, rel=0.25)  # less what is gathered
    small = Cluster(replace(A100, memory_gb=3), 8)
    with pytest.raises(CmaeError, match=r"--set speed\.parallel=fsdp speed\.recompute=blocks"):
        plan(small)
    assert plan(small, sharded("fsdp", recompute="blocks")).micro_batch_size >= 1


def test_one_gpu_talks_to_nobody() -> None:
    assert plan(Cluster(A100, 1)).communication_ms == 0


@pytest.mark.parametrize("numbers", [(1, 2, 4, 8, 16, 32, 64)])
def test_more_gpus_are_never_slower_and_links_only_help(numbers: tuple[int, ...]) -> None:
    hours = [plan(Cluster(A100, number)).hours for number in numbers]
    assert hours == sorted(hours, reverse=True)
    slow = plan(Cluster(A100, 32, network_gb_per_s=1))
    assert slow.step_ms > plan(Cluster(A100, 32)).step_ms
    assert slow.binds == "network"


def test_what_binds_is_named() -> None:
    assert plan(Cluster(A100, 8, cores_per_gpu=0.5)).binds == "loader"
    assert plan(Cluster(A100, 8, storage_gb_per_s=0.1)).binds == "storage"
    found = plan(Cluster(A100, 8))
    assert found.binds == "GPU"
    assert found.margin > 1


def test_a_batch_that_does_not_fit_is_split() -> None:
    small = replace(A100, memory_gb=16)
    found = plan(Cluster(small, 8))
    assert found.accumulation > 1
    assert found.micro_batch_size * found.accumulation * 8 == 4096
    assert found.micro_batch_size <= found.largest_micro_batch
    with pytest.raises(CmaeError, match="not one image fits"):
        plan(Cluster(replace(A100, memory_gb=1), 8))


def test_a_measured_step_corrects_the_model_when_asked(tmp_path: Path) -> None:
    model = estimate_step(VIT_B, A100, batch_size=128).images_per_s
    row = {"gmacs_per_image": 56.47629312, "batch_size": 128, "compile": "blocks"}
    row |= {"method": "cmae", "images_per_s": {"median": model / 2}}
    result = {"machine": {"device": "NVIDIA A100-SXM4"}, "rows": [row]}
    (tmp_path / "1_levers_a100.json").write_text(json.dumps(result))
    plain, corrected = (
        plan(Cluster(A100, 32), results=tmp_path, calibrate=calibrate)
        for calibrate in (False, True)
    )
    assert "1_levers_a100.json: 2.00 times" in plain.measured
    assert corrected.compute_ms == pytest.approx(2 * plain.compute_ms)


@pytest.mark.parametrize("text", ["32xfoo", "0xa100", "axa100", "", "-1xa100"])
def test_what_is_no_number_of_gpus_is_refused(text: str) -> None:
    with pytest.raises(CmaeError, match="--gpus is"):
        parse_gpus(text)


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--gpus", "32xa100", "--recipe", "cmae_vit_b", "--epochs", "1600"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "cmae_vit_b" in shown
    assert "Everything is a model" in shown
    assert main([*words, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["steps"] == 1600 * (1_281_167 // 4096)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gpus", "3xa100"], "which 3 GPUs cannot share"),
        (["--overlap", "2"], "--overlap is 2"),
        (["--set", "x"], "--set is 'x'"),
        (["--network_gb_per_s", "0"], "--network_gb_per_s is 0"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--recipe", "nothing"], "--recipe nothing"),
    ],
)
def test_errors_name_the_option(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 1
    assert named in capsys.readouterr().err
