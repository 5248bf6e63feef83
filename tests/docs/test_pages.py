"""What pages take from files matches those files; links lead somewhere."""

# ruff: noqa: E402  benchmarks/ is no package: its scripts import each other from their own folder

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from lib import config_keys, pages, summary, tables

PAGES = pages.find_pages()


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_filled_in_parts_match_their_sources(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert pages.fill(text, page) == text, "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    paths = [target for target in targets if "://" not in target]
    assert [path for path in paths if not (page.parent / path).exists()] == []


def test_every_table_stands_on_a_page() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert set(re.findall(r"<!-- table:(\w+) -->", text)) == tables.TABLES.keys()


@dataclass
class Inner:
    """Inside."""

    share: float | None = None
    """Between 0
    and 1."""


@dataclass
class Base:
    """Below."""

    size: int = 3
    """In px."""


@dataclass
class Outer(Base):
    """Outside."""

    path: Path = Path("a|b")
    """A | B."""
    inner: Inner | None = field(default_factory=Inner)
    """The inner one."""


def test_settings_are_found_in_bases_and_nested_sections() -> None:
    outer, inner = config_keys.walk_sections(Outer)
    assert [key.name for key in outer.keys] == ["size", "path"]
    assert inner.keys == [("inner.share", "float or null", "null", "Between 0 and 1.")]
    assert "| `path` | path | `a\\|b` | A \\| B. |" in config_keys.render_sections(Outer)


def test_a_setting_without_docstring_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Silent\.count has no docstring"):
        list(config_keys.walk_sections(Silent))


@dataclass
class Silent:
    """Says nothing."""

    count: int = 1


def test_only_result_files_put_a_gpu_into_the_status() -> None:
    body = summary.render_status().splitlines()[2:]
    assert len(body) == len(summary.WHAT)
    assert all(line.count("|") == 4 for line in body)


def test_printed_output_keeps_commands_ends_of_progress_and_the_table() -> None:
    steps = [f"step {n}/3  9 images/s  pos 0.1" for n in (1, 2, 3)]
    lines = ["1. Write", "   4 s", "2. Train", *steps, "3. Score", "┏━━┓", "│ a │ b │", "", "PASS"]
    short = ["step 1/3  9 images/s", "...", "step 3/3  9 images/s"]
    expected = ["1. Write", "2. Train", *short, "3. Score", "  a   b", "PASS"]
    assert summary._shorten(lines) == expected
