"""A CUDA runtime without a GPU, built from source: torch then runs its own CUDA code, and kernels do nothing.

Device memory is host memory, so that copies and lifetimes are real; what kernels would compute is not there.
With fake tensors the whole training step runs on 'cuda:0' as on a GPU, but for the numbers.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parents[1]


@cache
def build_stub() -> Path:
    """Folder with the two libraries; skips the test where they cannot be made."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    include, runtime = _cuda_packages()
    folder = Path(mkdtemp(prefix="cuda-stub-"))
    atexit.register(shutil.rmtree, folder)
    headers = folder / "crt"
    headers.mkdir()
    shutil.copy(HERE / "host_defines.h", headers)
    text = (HERE / "runtime.c").read_text()
    own = re.findall(r"^(?:const char \*|cudaError_t |unsigned )(\w+)\(", text, re.M)
    others = [name for name in _functions(runtime) if name not in own]
    lines = [f"long {name}(void) {{ return 0; }}\n" for name in others]
    (folder / "others.inc").write_text("".join(lines))
    shared = [compiler, "-shared", "-fPIC", "-w", "-O1"]
    paths = [f"-I{folder}", f"-I{include}"]
    for source, library in (("runtime.c", "libstub.so"), ("driver.c", "libcuda.so.1")):
        command = [*shared, *paths, str(HERE / source), "-o", str(folder / library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


def run_on_stub(
    program: str,
    *arguments: str,
    capability: int = 80,
    trace: Path | None = None,
    lags: bool = False,
) -> Any:
    """Run a program of tests/support on the stub; what it prints as JSON.

    Args:
        program: Name of the module.
        arguments: Its words.
        capability: Compute capability of the device, 80 for 8.0.
        trace: File for one line a call of the runtime; None = nowhere.
        lags: Whether events are reached only when the host waits for them.
    """
    folder = build_stub()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(folder / "libstub.so"),
        "LD_LIBRARY_PATH": str(folder),
        "CUDA_STUB_CAPABILITY": str(capability),
        "PYTHONPATH": str(TESTS),
        "OMP_NUM_THREADS": "1",
    }
    if lags:
        environment["CUDA_STUB_LAG"] = "1"
    if trace is not None:
        environment["CUDA_STUB_TRACE"] = str(trace)
    command = [sys.executable, "-m", f"support.{program}", *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:] + done.stdout[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _cuda_packages() -> tuple[Path, Path]:
    """Headers and runtime library of NVIDIA's packages beside torch."""
    import torch

    site = Path(torch.__file__).parents[1] / "nvidia"
    headers = sorted(site.glob("*/include/driver_types.h"))
    libraries = sorted(site.glob("*/lib/libcudart.so.*"))
    if not headers or not libraries:
        pytest.skip("torch has no CUDA here")
    return headers[0].parent, libraries[0]


def _functions(library: Path) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("no nm to list the runtime's functions with")
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    )
    rows = (line.split() for line in listed.stdout.splitlines())
    return sorted({row[2].partition("@")[0] for row in rows if row[1] == "T"})
