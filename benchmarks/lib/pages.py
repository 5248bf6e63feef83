"""Fill in what README and docs take from files: tables, numbers, keys of the configuration, printed output.

    python -m lib.pages            rewrite the pages and draw the plots
    python -m lib.pages --check    exit with 1 if a page does not match its sources

They need PYTHONPATH=benchmarks; `make docs` runs it. What is filled in stands between
`<!-- NAME:ARGUMENT -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from lib import summary
from lib.config_keys import render_sections, walk_sections
from lib.plots import PLOTS, draw_plots
from lib.results import RESULTS, ROOT
from lib.tables import newest, render

from cmae.train.config import Config
from cmae.train.loop.resume_rules import render_rules

BLOCKS: dict[str, Callable[[str, str], str]] = {
    "table": render,
    "numbers": lambda argument, results: summary.render_numbers(),
    "printed": lambda argument, results: summary.render_output(argument),
    "status": lambda argument, results: summary.render_status(),
    "walls": lambda argument, results: summary.render_walls(),
    "notes": lambda argument, results: list_notes(),
    "configuration": lambda argument, results: render_sections(Config),
    "resume": lambda argument, results: render_rules(
        [key.name for section in walk_sections(Config) for key in section.keys]
    ),
}
"""What writes a block, from its argument and the path from the page to benchmarks/results."""


def list_notes() -> str:
    """Number and title of every design note."""
    rows = []
    for path in sorted((ROOT / "docs" / "design").glob("0*.md")):
        number, title = path.read_text(encoding="utf-8").splitlines()[0][2:].split(" ", 1)
        rows.append(f"| [{number}]({path.name}) | {title} |")
    return "\n".join(["| note | about |", "| --- | --- |", *rows])


def find_pages() -> list[Path]:
    """README and everything under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def fill(text: str, page: Path) -> str:
    """The page with every block replaced by what its source says."""
    results = os.path.relpath(RESULTS, page.parent)

    def write(match: re.Match[str]) -> str:
        head, name, argument, tail = match.groups()
        return f"{head}\n{BLOCKS[name](argument or '', results)}\n{tail}"

    names = "|".join(BLOCKS)
    pattern = rf"(<!-- ({names})(?::([\w-]+))? -->)\n.*?(<!-- /\2 -->)"
    return re.sub(pattern, write, text, flags=re.DOTALL)


def main() -> int:
    """Rewrite or check the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = []
    for page in find_pages():
        text = page.read_text(encoding="utf-8")
        fresh = fill(text, page)
        if fresh != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(fresh, encoding="utf-8")
    if check:
        if stale:
            print(f"{', '.join(stale)} do not match their sources; run make docs", file=sys.stderr)
        return int(bool(stale))
    for path in draw_plots({name: newest(name) for name in PLOTS}, ROOT / "docs" / "images"):
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
