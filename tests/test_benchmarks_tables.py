"""README tables come from result files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readme_tables_match_the_newest_results() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
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
