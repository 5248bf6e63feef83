"""Every check and benchmark that wants a GPU, in one command, within a time budget, over several calls.

    python benchmarks/gpu_suite.py --budget-s 540
    python benchmarks/gpu_suite.py --sections no-dali --resume runs/gpu.json      and again, to go on

Sections run in the order of their questions (docs/design/0007-open-on-a-gpu.md), each in a process of its
own: one that fails or runs out of time leaves the others alone. Those of 'dali' come after those of
'no-dali', which run without DALI. Sections and calls share the caches of compiled code. The summary goes to
`benchmarks/results/<date>_gpu-suite_<device>_<sha>.json`; the benchmarks write files of their own.
"""

from __future__ import annotations

import os
import sys

import torch
from lib.suites import ROOT, build_parser, run_suite

PYTHON = sys.executable
TESTS = (PYTHON, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider")
GPU_ONLY = ("-m", "gpu and not slow")
STEP = (PYTHON, "benchmarks/bench_step.py", "--rounds", "3", "--steps", "6")
LEVERS = (*STEP, "--methods", "cmae", "--precisions", "fp16", "--levers")
DOCTOR = [PYTHON, "-m", "cmae.train", "doctor"]
NO_DALI: dict[str, list[str]] = {
    "levers": [
        *(*LEVERS, "base", "compile: blocks", "best", "--batch-sizes", "128"),
        *("--budget-s", "120"),
    ],
    "levers-512": [
        *(*LEVERS, "base", "compile: blocks", "best", "--batch-sizes", "512"),
        *("--budget-s", "120"),
    ],
    "graphs": [
        *(*LEVERS, "base", "best, model_graphs", "--batch-sizes", "128", "--budget-s", "180"),
    ],
    "attention": [PYTHON, "benchmarks/bench_attention.py", "--rounds", "20"],
    "kernels": [
        *(PYTHON, "benchmarks/bench_kernels.py", "--rounds", "10"),
        *("--batch-sizes", "128", "--keys", "4096"),
    ],
    "step-mae": [
        *(*STEP, "--methods", "mae", "--precisions", "bf16", "--levers", "base", "best"),
        *("--batch-sizes", "256", "--budget-s", "40"),
    ],
    "color": [PYTHON, "benchmarks/bench_color.py", "--rounds", "20"],
    "test-model": [
        *TESTS,
        *GPU_ONLY,
        "tests/model/test_cmae.py",
        "tests/model/test_target_copy.py",
    ],
    "test-kernels": [*TESTS, *GPU_ONLY, "tests/kernels/test_gpu.py"],
}
DALI: dict[str, list[str]] = {
    "doctor": DOCTOR,
    "test-pipeline": [*TESTS, *GPU_ONLY, "tests/pipeline/views/test_gpu.py"],
    "test-step": [*TESTS, *GPU_ONLY, "tests/train/loop/test_step.py"],
    "test-speed": [*TESTS, *GPU_ONLY, "tests/train/loop/test_speed.py"],
    "e2e": [PYTHON, "benchmarks/bench_e2e.py", "--rounds", "4", "--compile", "none"],
    "loader": [
        *(PYTHON, "benchmarks/bench_loader.py", "--rounds", "2", "--colors", "exact", "none"),
        "--presized",
    ],
    "decode": [PYTHON, "benchmarks/bench_decode.py"],
    "sweep-decode": [
        *(PYTHON, "benchmarks/bench_sweep.py", "--sweeps", "hw_decoder_load", "--rounds", "2"),
    ],
    "e2e-fast": [
        *(PYTHON, "benchmarks/bench_e2e.py", "--rounds", "3", "--compile", "none"),
        *("--color", "fast"),
    ],
    "sizes": [
        *(*LEVERS, "base", "best", "--sizes", "l", "h", "s", "--batch-sizes", "128"),
        *("--budget-s", "80"),
    ],
    "profile": [PYTHON, "benchmarks/bench_profile.py", "--budget-s", "45", "--verify", "2"],
    "test-profiling": [*TESTS, *GPU_ONLY, "tests/train/profiling/test_any_loader.py"],
}
SECTIONS = NO_DALI | DALI
GROUPS = {"no-dali": list(NO_DALI), "dali": list(DALI)}
LIMITS_S: dict[str, float] = {
    "doctor": 60,
    "test-step": 60,
    "test-speed": 150,
    "levers": 130,
    "levers-512": 130,
    "graphs": 190,
    "attention": 30,
    "color": 25,
    "step-mae": 60,
    "kernels": 60,
    "test-model": 30,
    "test-kernels": 90,
    "decode": 110,
    "test-pipeline": 60,
    "sweep-decode": 60,
    "e2e": 75,
    "e2e-fast": 45,
    "loader": 60,
    "sizes": 100,
    "profile": 70,
    "test-profiling": 30,
}
"""A section that hangs must not take the others' time."""
TAKES_SHARDS = ("decode", "sweep-decode", "e2e", "e2e-fast", "loader", "profile")


def choose(words: list[str]) -> list[str]:
    """Names of sections, from names of sections and groups."""
    return [name for word in words for name in GROUPS.get(word, [word])]


def with_shards(sections: dict[str, list[str]], shards: str | None) -> dict[str, list[str]]:
    """The commands, reading real images where they can."""
    extra = [] if shards is None else ["--shards", shards]
    return {
        name: command + (extra if name in TAKES_SHARDS else [])
        for name, command in sections.items()
    }


def main() -> int:
    """Run the chosen sections."""
    parser = build_parser(__doc__, {**SECTIONS, **GROUPS}, budget_s=540)
    parser.set_defaults(sections=list(GROUPS))
    parser.add_argument("--shards", help="tars; default: what each benchmark finds")
    arguments = parser.parse_args()
    arguments.sections = choose(arguments.sections)
    if not torch.cuda.is_available():
        print("gpu_suite: torch sees no GPU; `cmae doctor` says why", file=sys.stderr)
        return 1
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, str(ROOT / "runs" / "compiled" / name.split("_")[0].lower()))
    sections = with_shards(SECTIONS, arguments.shards)
    return run_suite("gpu-suite", sections, arguments, limits_s=LIMITS_S)


if __name__ == "__main__":
    raise SystemExit(main())
