"""README tables come from result files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_readme_tables_match_the_newest_results() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_results_say_where_and_how_they_were_measured() -> None:
    paths = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        assert {"benchmark", "written", "machine", "config", "rows"} <= result.keys(), path.name
        assert {"device", "driver", "versions", "git"} <= result["machine"].keys(), path.name


@pytest.mark.parametrize(
    "script",
    [
        *("bench_e2e", "bench_loader", "bench_presized", "bench_step", "bench_sweep", "compare"),
        *("fp8_curve", "gpu_suite", "tables"),
    ],
)
def test_every_script_explains_itself(script: str) -> None:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}.py", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{script}.py" in done.stdout
