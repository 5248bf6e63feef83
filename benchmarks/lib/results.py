"""The folder of result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmae.train.bench import harness

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def write_result(
    benchmark: str, *, label: str = "", config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> Path:
    """Write `results/<date>_<benchmark>_<device>_<sha>.json`; README tables are made from these."""
    report = harness.Report(benchmark, label, dict(config), [dict(row) for row in rows])
    path = harness.write_report(RESULTS, report)
    print(f"wrote {path.relative_to(ROOT)}")
    return path
