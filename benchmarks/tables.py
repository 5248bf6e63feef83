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


def newest(benchmark: str) -> list[tuple[Path, Result]]:
    """The newest result of a benchmark for each device and configuration label, by the time noted in it."""
    latest: dict[str, tuple[Path, Result]] = {}
    for path in RESULTS.glob(f"*_{benchmark}_*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = f"{result['machine']['device']} {result['label']}"
        if key not in latest or result["written"] > latest[key][1]["written"]:
            latest[key] = (path, result)
    return [latest[key] for key in sorted(latest)]


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
    rows = [["model", "method", "batch", "precision", "compile", "images/s", "TFLOP/s", "n"]]
    for row in result["rows"]:
        rate = row["images_per_s"]
        head = [row["model"], row["method"], str(row["batch_size"]), row["precision"]]
        tail = [_spread(rate, 1), f"{row['tflops']:.3g}", str(rate["n"])]
        rows.append([*head, row["compile"], *tail])
    return rows


def kernels_table(result: Result) -> list[list[str]]:
    """Times of each op by contender, and how near the hardware's floor they come."""
    rows = [
        ["op", "shape", "by", "forward, us", "of floor", "backward, us", "of floor", "launches"]
    ]
    rows[0] += ["peak MiB", "n"]
    for row in result["rows"]:
        cells = [row["op"], row["shape"], row["contender"]]
        for part in ("forward", "backward"):
            spread = row.get(f"{part}_us")
            if spread is None:
                cells += ["-", "-"]
                continue
            share = row[f"{part}_floor_us"] / spread["median"]
            cells += [_spread(spread, 1), f"{100 * share:.0f} %"]
        tail = (row["launches"], row["peak_mib"], row["forward_us"]["n"])
        rows.append([*cells, *(str(value) for value in tail)])
    return rows


TABLES: dict[str, Callable[[Result], list[list[str]]]] = {
    "loader": loader_table,
    "step": step_table,
    "kernels": kernels_table,
}


def render(name: str) -> str:
    """Markdown of the newest tables of a benchmark, each with its machine and result file under it."""
    found = newest(name)
    if not found:
        return "*not measured yet*"
    return "\n\n".join(_render_one(name, path, result) for path, result in found)


def _render_one(name: str, path: Path, result: Result) -> str:
    head, *body = TABLES[name](result)
    lines = [head, ["---"] * len(head), *body]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    data = f"; {result['config']['data']}" if "data" in result["config"] else ""
    return (
        f"{table}\n\nMedian (smallest to largest) of n interleaved rounds on "
        f"{result['machine']['device']}{data}; [{path.name}](benchmarks/results/{path.name})."
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
