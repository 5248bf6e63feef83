"""Result files say where they come from; scripts say how they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_results_say_where_and_how_they_were_measured() -> None:
    paths = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert paths
    for path in paths:
        result = json.loads(path.read_text())
        assert {"benchmark", "written", "machine", "config", "rows"} <= result.keys(), path.name
        assert {"device", "driver", "versions", "git"} <= result["machine"].keys(), path.name


@pytest.mark.slow
def test_every_script_explains_itself() -> None:
    """Runs all of them with --help, in one process: most of the time is torch's import."""
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    done = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HELP, *sorted(scripts)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    help_texts = json.loads(done.stdout.splitlines()[-1])
    assert help_texts.keys() == scripts
    silent = {
        name for name, text in help_texts.items() if f"python benchmarks/{name}.py" not in text
    }
    assert not silent, f"{silent} do not show how they are called"


ASK_FOR_HELP = """
import contextlib, io, json, runpy, sys
texts = {}
for name in sys.argv[1:]:
    sys.argv = [f"benchmarks/{name}.py", "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stopped:
            assert stopped.code == 0, name
    texts[name] = shown.getvalue()
print(json.dumps(texts))
"""
