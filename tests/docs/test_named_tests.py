"""A page that names a test as its proof names one that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?")


def named_tests() -> list[tuple[str, str, str]]:
    return [
        (str(page.relative_to(ROOT)), path, name)
        for page in PAGES
        for path, name in NAMED.findall(page.read_text(encoding="utf-8"))
    ]


def test_pages_name_tests() -> None:
    assert len(named_tests()) > 10


@pytest.mark.parametrize(("page", "path", "name"), named_tests())
def test_a_named_test_exists(page: str, path: str, name: str) -> None:
    file = ROOT / path
    assert file.is_file(), f"{page} names {path}"
    if name:
        assert re.search(rf"^\s*def {name}\(", file.read_text(encoding="utf-8"), re.MULTILINE), page
