"""What do the README's two commands print, and how long do they take?

    python benchmarks/bench_commands.py --commands demo          about 5 minutes on two cores
    python benchmarks/bench_commands.py --commands demo test     with all tests, about 20 minutes

The result holds what was printed, line by line; the README quotes it (`make docs`).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.results import ROOT, write_result

WORKERS = str(min(8, len(os.sched_getaffinity(0))))
COMMANDS = {
    "demo": [sys.executable, "-m", "cmae.train", "demo"],
    "test": [sys.executable, "-m", "pytest", "-n", WORKERS, "--dist", "worksteal"],
}
"""What `make demo` and `make test` run."""


def run(name: str, folder: Path) -> dict[str, Any]:
    """Run a command as a user would who has no terminal; one row of the result."""
    out = folder / "demo"
    extra = ["--out", str(out)] if name == "demo" else []
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "COLUMNS": "100", "PYTHONUNBUFFERED": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [*COMMANDS[name], *extra],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        # As `make demo` would print it, which writes to runs/demo.
        lines.append(line.rstrip().replace(str(out), "runs/demo"))
    code = process.wait()
    seconds = round(time.perf_counter() - started, 1)
    return {"command": name, "exit_code": code, "seconds": seconds, "output": lines}


def find_margin(output: list[str]) -> dict[str, float]:
    """Accuracies that the demo's table shows, in per cent, by kind of feature."""
    found = (re.match(r"│ (.+?) +│ +([\d.]+)% ", line) for line in output)
    return {match[1]: float(match[2]) for match in found if match}


def main() -> int:
    """Run the chosen commands; one result file for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=["demo"])
    worst = 0
    for name in parser.parse_args().commands:
        with tempfile.TemporaryDirectory() as folder:
            row = run(name, Path(folder))
        if name == "demo":
            row["accuracy_percent"] = find_margin(row["output"])
        write_result("commands", label=name, config={"command": COMMANDS[name][1:]}, rows=[row])
        worst = max(worst, row["exit_code"])
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
