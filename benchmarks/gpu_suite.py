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
from lib.suites import BENCH, ROOT, SHARDS, TO_RESULTS, build_parser, run_suite, with_shards

PYTHON = sys.executable
TESTS = (PYTHON, "-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider")
GPU_ONLY = ("-m", "gpu and not slow")
STEP = (PYTHON, "benchmarks/bench_step.py", "--rounds", "3", "--steps", "6")
LEVERS = (*STEP, "--methods", "cmae", "--precisions", "fp16", "--levers")
E2E = (*BENCH, "e2e", *TO_RESULTS, "--data.shards", SHARDS, "--speed.compile", "none")
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
    "kernels": [*BENCH, "kernels", *TO_RESULTS, "--rounds", "10", "--batch_size", "128"],
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
    "e2e": [*E2E, "--rounds", "4"],
    "loader": [
        *(*BENCH, "loader", *TO_RESULTS, "--rounds", "2", "--colors", "[exact, none]"),
        *("--data.shards", SHARDS),
    ],
    "decode": [PYTHON, "benchmarks/bench_decode.py", "--shards", SHARDS],
    "sweep-decode": [
        *(PYTHON, "benchmarks/bench_sweep.py", "--sweeps", "hw_decoder_load", "--rounds", "2"),
        *("--shards", SHARDS),
    ],
    "e2e-fast": [*E2E, "--rounds", "3", "--data.views.color", "fast"],
    "sizes": [
        *(*LEVERS, "base", "best", "--sizes", "l", "h", "s", "--batch-sizes", "128"),
        *("--budget-s", "80"),
    ],
    "profile": [
        *(PYTHON, "benchmarks/bench_profile.py", "--budget-s", "45", "--verify", "2"),
        *("--shards", SHARDS),
    ],
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


def choose(words: list[str]) -> list[str]:
    """Names of sections, from names of sections and groups."""
    return [name for word in words for name in GROUPS.get(word, [word])]


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
    chosen = {name: SECTIONS[name] for name in arguments.sections}
    sections = with_shards(chosen, arguments.shards)
    return run_suite("gpu-suite", sections, arguments, limits_s=LIMITS_S)


if __name__ == "__main__":
    raise SystemExit(main())
