"""Two processes of a command, as `cmae launch` starts them."""

from __future__ import annotations

import os
import subprocess
import sys


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
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *words], env=environment, text=True, **pipes)
