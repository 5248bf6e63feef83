"""The benchmarks of a machine, one command, within a time limit. `make bench` runs this.

    python -m lib.suites                           every CPU section, under 15 minutes on two cores
    python -m lib.suites --sections growth e2e     some of them
    python -m lib.suites --copy-to /somewhere      copy the result files there too

They need PYTHONPATH=benchmarks. Sections run in order, each in a process of its own and within its own
limit: one that fails or runs out of time leaves the others alone. The benchmarks write result files of their
own; the summary names them. Afterwards `cmae bench compare OLD NEW` tells whether something became slower,
and `make docs` draws the tables. The GPU's suite is gpu_suite.py, on the same machinery.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lib.data import default_shards
from lib.results import ROOT, write_result

PYTHON = sys.executable
BENCH = (PYTHON, "-m", "cmae.train", "bench")
TO_RESULTS = ("--out", "benchmarks/results")
VIT_TI = ("--model.embed_dim", "192", "--model.num_heads", "3", "--optim.precision", "fp32")
SHARDS = "{shards}"
"""Stands for the tars in a command."""
SECTIONS: dict[str, list[str]] = {
    "loader": [
        *(*BENCH, "loader", *TO_RESULTS, "--rounds", "5", "--steps", "3"),
        *("--colors", "[exact, none]", "--presized", "[512, 400]", "--data.shards", SHARDS),
    ],
    "reader": [PYTHON, "benchmarks/bench_reader.py"],
    "step": [PYTHON, "benchmarks/bench_step.py", "--rounds", "3"],
    "e2e": [
        *(*BENCH, "e2e", *TO_RESULTS, "--rounds", "3", "--batch_size", "4", *VIT_TI),
        *("--data.shards", SHARDS),
    ],
    "growth": [PYTHON, "benchmarks/bench_growth.py", "--rounds", "2"],
    "sweep": [PYTHON, "benchmarks/bench_sweep.py", "--rounds", "2"],
    "profile": [PYTHON, "benchmarks/bench_profile.py", "--budget-s", "60", "--verify", "2"],
    "memory": [
        *(PYTHON, "benchmarks/bench_memory.py", "--batches", "2000", "--batch-size", "4"),
        *("--every", "100"),
    ],
}
LIMITS_S = {
    "loader": 300,
    "reader": 120,
    "step": 150,
    "e2e": 120,
    "growth": 180,
    "sweep": 180,
    "profile": 170,
    "memory": 90,
}
"""Seconds that a section may take; without one, all that is left."""


def run_sections(
    sections: Mapping[str, Sequence[str]],
    names: Sequence[str],
    *,
    budget_s: float,
    limits_s: Mapping[str, float],
    known: Sequence[Mapping[str, Any]] = (),
    note: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Run the named sections in order; one row for each, whatever became of it.

    Args:
        sections: Commands by name.
        names: Those to run.
        budget_s: Seconds for all of them. A section that could not have half of its limit is not begun.
        limits_s: Longest time of a section.
        known: Rows of an earlier call; sections that came to an end there are not run again.
        note: Receiver of all rows after every section, so that a kill loses at most one.
    """
    deadline = time.perf_counter() + budget_s
    rows = [dict(row) for row in known if row["exit_code"] is not None]
    finished = {row["section"] for row in rows}
    for name in (name for name in names if name not in finished):
        left = deadline - time.perf_counter()
        script = next((word for word in sections[name] if word.endswith(".py")), None)
        if left < max(5, limits_s.get(name, 0) / 2):
            rows.append(_not_run(name, "no time left"))
        elif script is not None and not (ROOT / script).is_file():
            rows.append(_not_run(name, f"{script} is not there"))
        else:
            limit = min(left, limits_s.get(name, left))
            rows.append(run_section(name, sections[name], limit_s=limit))
        note(rows)
    return rows


def _not_run(name: str, why: str) -> dict[str, Any]:
    return {"section": name, "exit_code": None, "seconds": 0, "results": [], "end": why}


def run_section(name: str, command: Sequence[str], *, limit_s: float) -> dict[str, Any]:
    """Run one section; its output is shown as it comes, its end is kept.

    Returns:
        section, exit_code (124: out of time), seconds, results (files it has written), end (of the output).
    """
    print(f"=== {name} (at most {limit_s:.0f} s)", flush=True)
    started = time.perf_counter()
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        # For `harness`, which safe mode would not find.
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, so that its children can be stopped with it
    )
    lines: list[str] = []
    reader = threading.Thread(target=_show, args=(process.stdout, lines), daemon=True)
    reader.start()
    code = _wait(process, limit_s)
    reader.join(timeout=5)
    output = "".join(lines)
    return {
        "section": name,
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "results": re.findall(r"^wrote (\S+\.json)\b", output, flags=re.MULTILINE),
        "end": output[-3000:],
    }


def _show(stream: IO[str], lines: list[str]) -> None:
    for line in stream:
        lines.append(line)
        print(line, end="", flush=True)


def _wait(process: subprocess.Popen[str], limit_s: float) -> int:
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # Ctrl-C first: pytest then tells which tests have failed so far, and why.
        for word, patience_s in ((signal.SIGINT, 10), (signal.SIGKILL, None)):
            os.killpg(process.pid, word)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
                break
        return 124


def build_parser(
    description: str | None, sections: Mapping[str, Sequence[str]], *, budget_s: float
) -> argparse.ArgumentParser:
    """The arguments that both suites take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument(
        "--budget-s", type=float, default=budget_s, help="for all sections together"
    )
    parser.add_argument("--copy-to", type=Path, help="copy the result files there too")
    parser.add_argument(
        "--resume",
        type=Path,
        help="kept after every section; what has ended in it is not run again",
    )
    parser.add_argument(
        "--pack", action="store_true", help="copy as one archive beside the summary"
    )
    return parser


def run_suite(
    benchmark: str,
    sections: Mapping[str, Sequence[str]],
    arguments: argparse.Namespace,
    *,
    limits_s: Mapping[str, float],
) -> int:
    """Run the chosen sections, write the summary, copy what was written.

    Returns:
        The largest exit code of a section, 0 when all went well.
    """
    resume: Path | None = arguments.resume
    known = json.loads(resume.read_text()) if resume is not None and resume.is_file() else []

    def note(rows: list[dict[str, Any]]) -> None:
        if resume is not None:
            resume.parent.mkdir(parents=True, exist_ok=True)
            resume.write_text(json.dumps(rows, indent=1))

    rows = run_sections(
        sections,
        arguments.sections,
        budget_s=arguments.budget_s,
        limits_s=limits_s,
        known=known,
        note=note,
    )
    summary = write_result(benchmark, config={"budget_s": arguments.budget_s}, rows=rows)
    if arguments.copy_to is not None:
        names = dict.fromkeys(name for row in rows for name in row["results"])
        files = [path for path in (ROOT / name for name in names) if path.is_file()]
        copy_results(summary, files, arguments.copy_to, pack=arguments.pack)
    for row in rows:
        why = row["end"] if row["exit_code"] is None else ""
        print(f"{row['section']:<16} exit {row['exit_code']}  {row['seconds']} s  {why}")
    return max((row["exit_code"] or 0 for row in rows), default=0)


def copy_results(summary: Path, files: Sequence[Path], folder: Path, *, pack: bool) -> None:
    """Copy the summary and the files, or the summary and one archive of all."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [summary] if pack else [summary, *files]:
        shutil.copy(path, folder)
    if pack:
        with tarfile.open(folder / f"{summary.stem}.tar.gz", "w:gz") as archive:
            for path in [summary, *files]:
                archive.add(path, arcname=path.name)


def with_shards(sections: Mapping[str, Sequence[str]], shards: str | None) -> dict[str, list[str]]:
    """The commands, with the images that they read.

    Args:
        sections: Commands by name.
        shards: Tars; None = the research sample, or photographs where there is none.
    """
    needed = any(SHARDS in command for command in sections.values())
    found = shards or (default_shards() if needed else "")
    return {
        name: [found if word == SHARDS else word for word in command]
        for name, command in sections.items()
    }


def main() -> int:
    """Run the CPU sections."""
    arguments = build_parser(__doc__, SECTIONS, budget_s=870).parse_args()
    chosen = {name: SECTIONS[name] for name in arguments.sections}
    return run_suite("suite", with_shards(chosen, None), arguments, limits_s=LIMITS_S)


if __name__ == "__main__":
    raise SystemExit(main())
