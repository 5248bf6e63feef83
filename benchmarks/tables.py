"""Write the README's tables from the newest result file of each benchmark.

    python benchmarks/tables.py            rewrite the tables
    python benchmarks/tables.py --check    exit with 1 if the README does not match the results

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

README = ROOT / "README.md"
Result = dict[str, Any]


def newest(benchmark: str) -> tuple[Path, Result] | None:
    """The newest result of a benchmark, by the time noted in it."""
    found = [
        (path, json.loads(path.read_text(encoding="utf-8")))
        for path in RESULTS.glob(f"*_{benchmark}_*.json")
    ]
    return max(found, key=lambda entry: str(entry[1]["written"]), default=None)


def loader_table(result: Result) -> list[list[str]]:
    """Loader rates per core and CPU cost, by colour mode."""
    rows = [["colour", "loader", "images/s per core", "CPU-s per 1000 images", "n"]]
    for row in result["rows"]:
        rate, cost = row["images_per_s_per_core"], row["cpu_s_per_1000_images"]
        rows.append(
            [row["color"], row["loader"], _spread(rate, 0), _spread(cost, 1), str(rate["n"])]
        )
    return rows


def step_table(result: Result) -> list[list[str]]:
    """Step rates on synthetic data."""
    rows = [["method", "precision", "compile", "images/s", "TFLOP/s", "n"]]
    for row in result["rows"]:
        rate = row["images_per_s"]
        head = [row["method"], row["precision"], row["compile"]]
        rows.append([*head, _spread(rate, 1), f"{row['tflops']:.3g}", str(rate["n"])])
    return rows


TABLES: dict[str, Callable[[Result], list[list[str]]]] = {
    "loader": loader_table,
    "step": step_table,
}


def render(name: str) -> str:
    """Markdown of one table with the machine and the result file under it."""
    found = newest(name)
    if found is None:
        return "*not measured yet*"
    path, result = found
    head, *body = TABLES[name](result)
    lines = [head, ["---"] * len(head), *body]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    machine = result["machine"]
    return (
        f"{table}\n\nMedian (smallest to largest) of n interleaved rounds on {machine['device']}; "
        f"[{path.name}](benchmarks/results/{path.name})."
    )


def rewrite(text: str) -> str:
    """The README with every table replaced by what the results say."""
    return re.sub(
        r"(<!-- table:(\w+) -->\n).*?(\n<!-- /table -->)",
        lambda match: match[1] + render(match[2]) + match[3],
        text,
        flags=re.DOTALL,
    )


def _spread(summary: dict[str, float], digits: int) -> str:
    median, low, high = (f"{summary[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def main() -> int:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    fresh = rewrite(text)
    if check and fresh != text:
        print(
            "README.md does not match benchmarks/results; run python benchmarks/tables.py",
            file=sys.stderr,
        )
        return 1
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
