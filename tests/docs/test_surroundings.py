"""The table of what a run touches: every row names tests, and they exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "surroundings.md"
TOUCHED = (
    *("terminal", "pipe", "metrics", "TensorBoard", "W&B", "live status", "pictures", "ledger"),
    *("checkpoint folder", "HOME", "cache", "locale", "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"),
    *("SIGUSR2", "SIGXCPU", "/dev/shm", "clock"),
)
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
}


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").split("\n") if line.startswith("| ")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0].strip())
def test_every_row_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 3
    names = re.findall(r"`(\w+)`", row[2])
    assert names
    assert set(names) <= TESTS


@pytest.mark.parametrize("what", TOUCHED)
def test_everything_that_a_run_touches_has_a_row(what: str) -> None:
    assert any(what in row[0] for row in rows())
