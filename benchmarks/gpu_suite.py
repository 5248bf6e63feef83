"""Every check and benchmark that wants a GPU, in one command, within a time budget.

    python benchmarks/gpu_suite.py --budget-s 540

Sections run in order, each in a process of its own: one that fails or runs out of time leaves the others
alone. The summary goes to `benchmarks/results/<date>_gpu-suite_<device>_<sha>.json`; the benchmarks write
files of their own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, write_result

PYTHON = sys.executable
STEP = (PYTHON, "benchmarks/bench_step.py", "--rounds", "3", "--steps", "8")
SECTIONS: dict[str, list[str]] = {
    "doctor": [PYTHON, "-m", "cmae.train", "doctor"],
    "tests": [PYTHON, "-m", "pytest", "-m", "gpu", "-q", "tests"],
    "kernels": [PYTHON, "benchmarks/bench_kernels.py", "--rounds", "20"],
    "levers": [
        *(*STEP, "--levers", "--methods", "cmae", "--precisions", "fp16"),
        *("--batch-sizes", "128", "--budget-s", "120"),
    ],
    "step": [*STEP, "--batch-sizes", "128", "256", "512", "--budget-s", "60"],
    "step-sizes": [
        *(*STEP, "--sizes", "s", "l", "h", "--batch-sizes", "128", "--methods", "cmae"),
        *("--precisions", "fp16", "--budget-s", "45"),
    ],
    "model": [
        PYTHON,
        "-m",
        "cmae.train",
        "bench",
        "--model",
        "--recipe",
        "cmae_vit_b",
        "--gpu",
        "measured",
    ],
    "loader": [PYTHON, "benchmarks/bench_loader.py", "--rounds", "3"],
    "fp8": [PYTHON, "benchmarks/fp8_curve.py", "--steps", "300", "--precision", "fp16"],
    "demo": [PYTHON, "-m", "cmae.train", "demo", "--out", "runs/gpu-demo"],
}
LIMITS_S = {"doctor": 30, "tests": 120, "levers": 130, "step": 80, "step-sizes": 60, "model": 15}
"""A section that hangs must not take the others' time; those without a limit get what is left."""


def run_section(name: str, *, limit_s: float) -> dict[str, Any]:
    """Run one section; its output is shown as it comes, its end is kept."""
    print(f"=== {name} (at most {limit_s:.0f} s)", flush=True)
    started = time.perf_counter()
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": str(ROOT / "benchmarks"),  # for `harness`, which safe mode would not find
        "PYTHONUNBUFFERED": "1",
    }
    try:
        done = subprocess.run(
            SECTIONS[name],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
            check=False,
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as expired:
        code, output = 124, (expired.stdout or b"").decode(errors="replace")
    print(output[-6000:], flush=True)
    seconds = round(time.perf_counter() - started, 1)
    return {"section": name, "exit_code": code, "seconds": seconds, "end": output[-3000:]}


def main() -> int:
    """Run the chosen sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--budget-s", type=float, default=540, help="for all sections together")
    parser.add_argument("--copy-to", type=Path, help="copy the result files there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU; `cmae doctor` says why", file=sys.stderr)
        return 1
    deadline = time.perf_counter() + arguments.budget_s
    rows = []
    for name in arguments.sections:
        left = deadline - time.perf_counter()
        if left < 5:
            rows.append({"section": name, "exit_code": None, "seconds": 0, "end": "no time left"})
            continue
        rows.append(run_section(name, limit_s=min(left, LIMITS_S.get(name, left))))
    path = write_result("gpu-suite", config={"budget_s": arguments.budget_s}, rows=rows)
    if arguments.copy_to is not None:
        for result in path.parent.glob(f"{path.name[:10]}_*.json"):
            (arguments.copy_to / result.name).write_bytes(result.read_bytes())
    for row in rows:
        print(f"{row['section']:<16} exit {row['exit_code']}  {row['seconds']} s")
    return max((row["exit_code"] or 0 for row in rows), default=0)


if __name__ == "__main__":
    raise SystemExit(main())
