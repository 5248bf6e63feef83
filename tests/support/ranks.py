"""Two processes of a command, as `cmae launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress

import psutil


def start_two_ranks(*words: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "cmae.train",
        "launch",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")  # of a rank that is stopped
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *words], env=environment, text=True, **pipes)


def end_ranks(process: subprocess.Popen[str]) -> None:
    """Kill what a test has left: ranks outlive a launcher that is killed, and have sessions of their own."""
    for child in (
        psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    ):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.wait()
