"""What `cmae tune` found, as a recipe of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from cmae.errors import CmaeError
from cmae.pipeline.formats.atomic import atomic_write
from cmae.printable import MAX_LINE, printable
from cmae.train.tuning.search import Phase


@dataclass(frozen=True)
class Circumstances:
    """What an optimum depends on: read it before the recipe is used elsewhere."""

    machine: dict[str, Any]
    """What `describe_machine` says."""
    shards: str
    """Value of data.shards, without secrets."""
    local_ranks: int
    """Ranks that share the node's cores."""
    names: tuple[str, ...]
    """Settings that have an effect here."""


def check_writable(path: Path) -> None:
    """Refuse a recipe that could not be written when the search is done.

    Raises:
        CmaeError: The file is there already, or its folder cannot be written to.
    """
    if path.exists():
        raise CmaeError(
            f"{path} is there already; delete it, or name another file with --out", key="out"
        )
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CmaeError(
            f"{folder} is no folder that can be written to; name another file with --out", key="out"
        )


def write_tuned(path: Path, around: Circumstances, phases: list[Phase], *, is_done: bool) -> None:
    """Write what the phases so far have chosen, and what it was measured on.

    Args:
        path: File to write; one that is there is replaced.
        around: Circumstances of the search.
        phases: Finished phases, at least one.
        is_done: Whether the last phase compared the winner with the defaults.
    """
    settings = phases[-1].chosen
    chosen = {name: getattr(settings, name) for name in around.names}
    lines = (
        printable(line, limit=MAX_LINE) for line in _head(path, around, phases, is_done=is_done)
    )
    text = "\n".join(f"# {line}".rstrip() for line in lines)
    with atomic_write(path) as file:
        file.write(f"{text}\n{yaml.safe_dump({'data': chosen}, sort_keys=False)}".encode())


def _head(path: Path, around: Circumstances, phases: list[Phase], *, is_done: bool) -> list[str]:
    machine = around.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        "Loader settings of one machine, found by `cmae tune`.",
        "",
        f"command   cmae pretrain --recipe RECIPE --recipe {path} ...",
        f"machine   {machine['device']}, {machine['cores']:g} cores, {around.local_ranks} rank(s)",
        f"versions  {versions}",
        f"shards    {around.shards}",
        f"date      {date.today().isoformat()}",
        "measured",
        *[f"  {line}" for line in _measured(around, phases, is_done=is_done)],
    ]


def _measured(around: Circumstances, phases: list[Phase], *, is_done: bool) -> list[str]:
    lines = [f"{phase.name}: {phase.why}" for phase in phases]
    if not is_done:
        lines.append("stopped early: not compared with the defaults")
    lines += [
        f"{trial.settings.describe(around.names)}: {trial.images_per_s:.0f} images/s for each rank, "
        f"{trial.cpu_s_per_1000:.2f} CPU-s per 1000"
        for trial in phases[-1].trials
    ]
    return lines
