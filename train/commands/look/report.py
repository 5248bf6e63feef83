"""`cmae report` and `cmae compare`: pages of runs, and what differs in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cmae.train.monitor.bands import make_bands, write_bands
from cmae.train.monitor.console import PlainConsole
from cmae.train.reports.run import (
    different_settings,
    joined_evaluations,
    labels_of,
    read_run,
    write_comparison,
    write_report,
)


def report(folder: Path, *, shards: str | None, out: Path | None) -> int:
    """Write the page of a run.

    Args:
        folder: Folder of the run (run.out).
        shards: Labelled tars whose images its encoder is shown; None: no pictures of it.
        out: HTML file; None: report.html in the run's folder.
    """
    path = out or folder / "report.html"
    write_report(read_run(folder), path, shards=shards)
    PlainConsole(stderr=True).print(f"wrote {path}", soft_wrap=True)
    return 0


def compare(folders: Sequence[Path], *, out: Path | None, bands: Path | None = None) -> int:
    """Print what differs between runs; write a page of it where asked.

    Args:
        folders: Folders of the runs.
        out: HTML file; None: no page.
        bands: YAML file for the range of each metric over the runs, for `run.bands`; None: none.
    """
    runs = [read_run(folder) for folder in folders]
    names, console = labels_of(runs), PlainConsole(highlight=False)
    for title, rows in (
        ("settings that differ", different_settings(runs)),
        (
            "top-1",
            [
                (key, ["-" if value is None else f"{value:.2%}" for value in values])
                for key, values in joined_evaluations(runs)
            ],
        ),
        (
            "at the end",
            [
                (key, [f"{run.last[key]:.5g}" if key in run.last else "-" for run in runs])
                for key in ("step", "total", "reconstruction", "contrastive_raw", "images_per_s")
            ],
        ),
    ):
        if rows:
            table = Table(title=title, title_justify="left")
            table.add_column("")
            for name in names:
                table.add_column(name, justify="right", overflow="fold")
            for key, values in rows:
                table.add_row(key, *values)
            console.print(table)
    if out is not None:
        write_comparison(runs, out)
        PlainConsole(stderr=True).print(f"wrote {out}", soft_wrap=True)
    if bands is not None:
        write_bands(make_bands([run.records for run in runs]), bands)
        PlainConsole(stderr=True).print(f"wrote {bands}", soft_wrap=True)
    return 0
