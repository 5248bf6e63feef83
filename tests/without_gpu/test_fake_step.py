"""The training step on 'cuda:0' without a GPU: devices, waits, precision, launches, traffic, attention."""

from __future__ import annotations

from typing import Any

import pytest
from support.cuda_stub import run_on_stub
from support.stub_step import BATCH, CASES, FULL

from cmae.model import ModelConfig
from cmae.model.analysis.operations import Precision
from cmae.model.analysis.roofline import ema_bytes, optimizer_bytes
from cmae.train.bench.estimate import estimate_step
from cmae.train.config import Config, OptimConfig, SpeedConfig
from cmae.train.gpus import GPUS

Facts = dict[str, Any]

LAUNCHES = {"target": 267, "forward": 536, "backward": 794, "optimiser": 17, "EMA": 1}
"""Operators of ViT-B's eager step that reach the device, November 2026. A switch may only lower them."""
# Versions of torch count a little differently.
ROOM = 1.03


@pytest.fixture(scope="module")
def facts() -> dict[str, Facts]:
    return dict(run_on_stub("stub_step"))


@pytest.mark.parametrize("case", CASES)
def test_no_pass_waits_mixes_devices_or_copies_from_the_host(
    case: str, facts: dict[str, Facts]
) -> None:
    """As a recording in a CUDA graph asks, too."""
    assert facts[case]["faults"] == []
    assert facts[case]["waits"] == 1


def test_the_recorder_sees_waits_and_copies() -> None:
    found = run_on_stub("stub_step", "planted")
    assert sum("between ['cpu', 'cuda']" in line for line in found) == 2
    assert any("item" in line or "waits" in line for line in found)


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_product_is_in_the_precision_of_the_run(
    case: str, facts: dict[str, Facts]
) -> None:
    precision = CASES[case].optim.get("precision", "fp16")
    products = facts[case]["products"]
    expected = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[precision]
    # The reference of InfoNCE keeps its logits in float32, as the kernel does inside.
    allowed = 2 if case == "torch kernels" else 0
    assert sum(products.values()) - products[expected] <= allowed
    assert products[expected] > 40


def test_launches_of_the_shipped_step_stay_within_their_budget(facts: dict[str, Facts]) -> None:
    launches = facts["vit_b"]["launches"]
    assert set(launches) == {*LAUNCHES, "other"}
    for phase, budget in LAUNCHES.items():
        assert launches[phase] <= ROOM * budget, phase
    assert sum(launches.values()) <= ROOM * sum(LAUNCHES.values())


def test_each_switch_saves_the_launches_that_it_is_for(facts: dict[str, Facts]) -> None:
    def launches(case: str) -> int:
        return sum(facts[case]["launches"].values())

    assert launches("torch kernels") - launches("default") >= 60
    assert facts["default"]["casts"]["target"] - facts["target copy"]["casts"]["target"] >= 20
    assert launches("fp32") < 0.7 * launches("default")  # the rest are autocast's casts
    assert launches("mae") < launches("default")
    assert "EMA" not in facts["mae"]["launches"]


def test_the_step_moves_what_the_cost_model_says(facts: dict[str, Facts]) -> None:
    """Operators read and write every input and output; the model counts the same, with perfect kernels."""
    config = ModelConfig(**FULL)
    moved = facts["vit_b"]["bytes"]
    assert moved["EMA"] == pytest.approx(ema_bytes(config, Precision()), rel=0.4)
    assert moved["optimiser"] <= 1.3 * optimizer_bytes(config)
    run = Config(
        model=config,
        optim=OptimConfig(global_batch_size=BATCH),
        speed=SpeedConfig(compile="none"),
    )
    parts = estimate_step(run, GPUS["a100"], batch_size=BATCH).parts
    model = 1e9 * sum(part.gbytes for part in parts if part.part not in ("optimiser", "EMA"))
    counted = moved["target"] + moved["forward"] + moved["backward"]
    assert 0.8 * model <= counted <= 1.5 * model


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "kernel"), [(80, "flash"), (90, "cudnn"), (100, "cudnn")])
def test_attention_kernel_of_each_gpu_generation(capability: int, kernel: str) -> None:
    """What torch itself chooses; docs/design/0020 measured it as no slower than another on an H100."""
    case = run_on_stub("stub_step", "default", capability=capability)["default"]
    assert set(case["attention"]) == {
        f"_scaled_dot_product_{kernel}_attention",
        f"_scaled_dot_product_{kernel}_attention_backward",
    }
    assert case["faults"] == []
