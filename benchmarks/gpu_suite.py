"""Every check and benchmark that wants a GPU, in one command, within a time budget.

    python benchmarks/gpu_suite.py --budget-s 540

Sections run in order, each in a process of its own: one that fails or runs out of time leaves the others
alone. The summary goes to `benchmarks/results/<date>_gpu-suite_<device>_<sha>.json`; the benchmarks write
files of their own.
"""

from __future__ import annotations

import sys

import torch
from suite import build_parser, run_suite

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
    "profile": [PYTHON, "benchmarks/bench_profile.py", "--budget-s", "45", "--verify", "4"],
    "fp8": [PYTHON, "benchmarks/fp8_curve.py", "--steps", "300", "--precision", "fp16"],
    "e2e": [PYTHON, "benchmarks/bench_e2e.py"],
    "sweep-decode": [
        *(PYTHON, "benchmarks/bench_sweep.py", "--sweeps", "threads", "hw_decoder_load"),
    ],
    "sweep-step": [
        *(PYTHON, "benchmarks/bench_sweep.py", "--sweeps", "batch_size", "img_size"),
    ],
    "demo": [PYTHON, "-m", "cmae.train", "demo", "--out", "runs/gpu-demo"],
}
LIMITS_S: dict[str, float] = {
    "doctor": 30,
    "tests": 120,
    "kernels": 60,
    "levers": 130,
    "step": 80,
    "step-sizes": 60,
    "model": 15,
    "profile": 110,
    "fp8": 60,
    "e2e": 90,
    "sweep-decode": 60,
    "sweep-step": 60,
}
"""A section that hangs must not take the others' time; those without a limit get what is left."""


def main() -> int:
    """Run the chosen sections."""
    arguments = build_parser(__doc__, SECTIONS, budget_s=540).parse_args()
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU; `cmae doctor` says why", file=sys.stderr)
        return 1
    return run_suite("gpu-suite", SECTIONS, arguments, limits_s=LIMITS_S)


if __name__ == "__main__":
    raise SystemExit(main())
