"""The kernels without a GPU: Triton's interpreter runs `support/kernel_checks.py` in processes of its own.

Triton reads TRITON_INTERPRET when a kernel is defined, so these checks cannot share a process with others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_runs import arguments

from cmae.train.monitor.metrics import read_metrics

pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parents[1]


def run_interpreted(*command: str) -> str:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(TESTS),
    }
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "group",
    ["patch_gather", "masked_mse", "info_nce", "block_mask", "color_jitter", "op or autocast"],
)
def test_kernels_in_the_interpreter(group):
    names = ["patch_gather", "masked_mse", "info_nce", "block_mask", "color_jitter"]
    select = f"test_{group}" if group in names else "test_op or test_autocast"
    output = run_interpreted(
        *("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-c", "pyproject.toml", "tests/support/kernel_checks.py", "-k", select),
    )
    assert " passed" in output
    assert " failed" not in output


@pytest.mark.slow
def test_a_run_on_kernels_has_the_losses_of_a_run_on_references(small_shards, tmp_path):
    """Twelve steps in float32, where the two may differ by rounding alone: 2e-5, after it has grown."""
    curves = {}
    for kernels in ("torch", "triton"):
        overrides = {"speed.kernels": kernels, "optim.total_steps": 12}
        words = arguments(small_shards, tmp_path / kernels, **overrides)
        run_interpreted("-m", "cmae.train", "pretrain", *words)
        records = read_metrics(tmp_path / kernels / "metrics.jsonl")
        curves[kernels] = [(r["total"], r["reconstruction"], r["contrastive_raw"]) for r in records]
    assert len(curves["torch"]) == 12
    for mine, reference in zip(curves["triton"], curves["torch"], strict=True):
        assert mine == pytest.approx(reference, rel=2e-5)
    moved = max(abs(total - curves["torch"][0][0]) for total, _, _ in curves["torch"])
    assert moved > 0.02, "the losses agree because nothing was trained"


@pytest.mark.slow
def test_a_run_that_is_told_to_use_kernels_does_not_fall_back(small_shards, tmp_path):
    words = arguments(small_shards, tmp_path, **{"speed.kernels": "triton"})
    done = subprocess.run(
        [sys.executable, "-m", "cmae.train", "pretrain", *words],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "backend='triton' cannot run" in done.stderr
