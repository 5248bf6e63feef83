"""The bounds that docs/security.md states are in the code, under the names that it gives."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
NAMED = sorted(set(re.findall(r"`(cmae\.[\w.]+)\.([A-Z]\w+)`", PAGE.read_text(encoding="utf-8"))))


def test_the_page_names_bounds() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_a_bound_is_there_and_has_a_docstring_or_a_value(module: str, name: str) -> None:
    value = getattr(import_module(module), name)
    assert isinstance(value, type) or value > 0
