"""What keeps the house in order: width of folders, imports, comments, docstrings, README, design notes."""

# ruff: noqa: E402  benchmarks/ is no package: its scripts import each other from their own folder

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.scars import find_scars

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from lib import house

MAX_FILES = {"model": 13}
"""Source files side by side, where it may be more than ten."""
README_BYTES = 8000
TAILS = {"as", "at", "beside", "between", "by", "for", "from", "if", "in", "of", "on", "per", "see"}
TAILS |= {"than", "that", "to", "told", "under", "when", "where", "which", "whose", "with"}
"""First words of an argument's docstring that lacks its head: 'of this process', 'See there'."""
NOTES = ROOT / "docs" / "design"


def python_files() -> list[Path]:
    folders = [ROOT / "benchmarks", ROOT / "tests"]
    return [*house.source_files(ROOT), *(path for one in folders for path in one.rglob("*.py"))]


def test_a_folder_holds_about_ten_files() -> None:
    counts = house.files_by_folder(ROOT).items()
    assert [(folder, n) for folder, n in counts if n > MAX_FILES.get(folder, 10)] == []


def test_imports_have_no_cycles_and_none_goes_up() -> None:
    edges = house.imports(ROOT)
    assert house.cycles(edges) == []
    assert house.upward(edges, house.read_layers(ROOT)) == []


def test_the_rules_find_a_cycle_and_an_import_that_goes_up() -> None:
    edges = {"loader.a": {"formats.b"}, "formats.b": {"loader.a"}}
    assert len(house.cycles(edges)) == 1
    assert house.upward(edges, {"": [["loader"], ["formats"]]}) == [("formats.b", "loader.a")]


def test_no_trailing_comment_spreads_a_line() -> None:
    scars = {
        str(path.relative_to(ROOT)): rows
        for path in python_files()
        if (rows := find_scars(path.read_text(encoding="utf-8")))
    }
    assert scars == {}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("x = f(\n    a, b\n)  # why\n", [3]),
        ("x = (\n    a  # why\n)\n", [2]),
        ("x = [\n    a,  # why\n]\n", [2]),
        ("def f(\n    a: int,\n) -> int:  # why\n    return a\n", [3]),
        ("x = [\n    a,  # the first\n    b,  # the second\n]\n", []),
        ("# why\nx = f(a, b)\n", []),
        ("x = f(a)  # why\n", []),
        (f"x = f(\n    {'a' * 60}, {'b' * 60}\n)  # too long for one line\n", []),
    ],
)
def test_scars_are_told_from_comments_on_elements(text: str, rows: list[int]) -> None:
    assert find_scars(text) == rows


def argument_entries(path: Path) -> Iterator[tuple[str, str]]:
    """(name, first line of its text) of every entry under 'Args:'."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            block = re.search(
                r"^Args:\n((?: {4}.*\n?|\n)+)", ast.get_docstring(node) or "", re.MULTILINE
            )
            if block:
                yield from re.findall(
                    r"^ {4}(\*{0,2}\w+)(?: \([^)]*\))?: *(.*)$", block[1], re.MULTILINE
                )


def test_every_argument_is_described_by_a_phrase_with_a_head() -> None:
    tails = [
        f"{path.relative_to(ROOT)}: {name}: {text}"
        for path in python_files()
        for name, text in argument_entries(path)
        if re.match(r"\w*", text)[0].lower() in TAILS
    ]
    assert tails == []


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= README_BYTES


def test_design_notes_are_numbered_without_holes_and_listed() -> None:
    names = sorted(path.name for path in NOTES.glob("0*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    index = (NOTES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((0\d{3}-[\w-]+\.md)\)", index) == names


def test_design_notes_that_are_named_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {
        (str(path.relative_to(ROOT)), name)
        for path in [*python_files(), *pages]
        for name in re.findall(r"design/(0\d{3}[\w-]*(?:\.md)?)", path.read_text(encoding="utf-8"))
    }
    assert [(path, name) for path, name in named if not list(NOTES.glob(f"{name}*"))] == []
