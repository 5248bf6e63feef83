"""`cmae checkpoint ls | verify | prune | join`: what a run has kept, whether it is whole, and what may go."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from cmae.errors import CmaeError, require
from cmae.model.export.shards import SHARDS
from cmae.model.export.stored import list_checkpoints, load_checkpoint
from cmae.paths import check_output, expand_home
from cmae.train.checkpoints.digest import DIGEST
from cmae.train.checkpoints.folder import (
    SET_ASIDE,
    WHY_FILE,
    Retention,
    fault_of,
    remove_checkpoint,
    size_of,
    step_of,
)
from cmae.train.checkpoints.lock import hold_folder
from cmae.train.checkpoints.writer import write_checkpoint
from cmae.train.monitor.console import PlainConsole


def ls(run: Path) -> int:
    """List the checkpoints of a run, and what was set aside.

    Args:
        run: Folder of a run, or its folder `checkpoints`.
    """
    folder = _folder_of(run)
    table = Table("checkpoint", "step", "MiB", "written", title=str(folder), title_justify="left")
    stored = list_checkpoints(folder)
    aside = sorted((folder / SET_ASIDE).glob("*.pt"))
    for path in (*stored, *aside):
        status = path.stat()
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.st_mtime))
        name = str(path.relative_to(folder))
        step = str(step_of(path)) if path in stored else "-"
        table.add_row(name, step, f"{size_of(path) / 2**20:.1f}", written)
    console = PlainConsole()
    console.print(table)
    why = folder / SET_ASIDE / WHY_FILE
    if why.is_file():
        for line in why.read_text(encoding="utf-8", errors="replace").splitlines():
            console.print(line, soft_wrap=True, markup=False)
    return 0


def verify(paths: list[Path]) -> int:
    """Read checkpoints to their end and compare them with their digests; exit code 1 if one is not whole.

    Args:
        paths: Folders of runs, or checkpoints.
    """
    console = PlainConsole()
    num_bad = num_checked = 0
    for path in _named(paths):
        fault = fault_of(path)
        num_bad, num_checked = num_bad + bool(fault), num_checked + 1
        has_digest = not fault and DIGEST in load_checkpoint(path, whole=False)
        good = "whole" if has_digest else "whole by its archive's checksums; it has no digest"
        console.print(f"{path}: {fault or good}", soft_wrap=True, markup=False)
    verdict = f"{num_bad} of {num_checked} are not whole" if num_bad else "all are whole"
    console.print(verdict)
    return 1 if num_bad else 0


def join(checkpoint: Path, out: Path) -> int:
    """Make one file of a checkpoint whose weights and moments lie in shards; runs go on from it as well.

    Args:
        checkpoint: File `step-00001000.pt`, beside which its shards lie.
        out: File to write.
    """
    checkpoint, out = expand_home(checkpoint), expand_home(out)
    check_output(out, key="OUT")
    if fault := fault_of(checkpoint):
        raise CmaeError(f"{checkpoint} is {fault}: take another one", key="CHECKPOINT")
    state = load_checkpoint(checkpoint)
    if SHARDS not in state:
        raise CmaeError(f"{checkpoint} is one file already: copy it", key="CHECKPOINT")
    state = {name: value for name, value in state.items() if name not in (SHARDS, DIGEST)}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(out, state)
    PlainConsole().print(f"{out}: {size_of(out) / 2**20:.1f} MiB", soft_wrap=True)
    return 0


def prune(
    run: Path,
    *,
    keep: int = 3,
    keep_every: int | None = None,
    keep_hours: float | None = None,
    set_aside: bool = False,
    dry_run: bool = False,
) -> int:
    """Delete checkpoints that no rule keeps. The newest whole one always stays.

    Args:
        run: Folder of a run that is not going on, or its folder `checkpoints`.
        keep: Number of the newest that stay.
        keep_every: Period in steps of those that stay; null keeps none for that.
        keep_hours: Age up to which all stay; null means no matter how old.
        set_aside: Delete what was set aside too.
        dry_run: Only say what would go.
    """
    require(keep >= 1, "--keep", keep, ">= 1")
    require(keep_every is None or keep_every >= 1, "--keep_every", keep_every, ">= 1, or null")
    folder = _folder_of(run)
    console = PlainConsole()
    with hold_folder(folder):
        stored = list_checkpoints(folder)
        going = Retention(keep, keep_every, keep_hours).retired(stored)
        kept = [path for path in stored if path not in going]
        if going and all(fault_of(path) for path in kept):
            raise CmaeError(
                f"none of the {len(kept)} newest checkpoints of {folder} is whole: nothing is deleted. Look "
                "with `cmae checkpoint verify`, and keep more with --keep"
            )
        going += sorted((folder / SET_ASIDE).glob("*.pt")) if set_aside else []
        size = sum(size_of(path) for path in going)
        for path in going:
            console.print(f"{'would delete' if dry_run else 'deleted'} {path}", soft_wrap=True)
            if not dry_run:
                remove_checkpoint(path)
    told = "would be free" if dry_run else "free now"
    console.print(f"{len(going)} checkpoint(s), {size / 2**20:.1f} MiB {told}; {len(kept)} stay")
    return 0


def _folder_of(run: Path) -> Path:
    run = expand_home(run)
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    if not folder.is_dir() or not (list_checkpoints(folder) or (folder / SET_ASIDE).is_dir()):
        raise CmaeError(f"{run} holds no checkpoints: give the folder of a run (its run.out)")
    return folder


def _named(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in map(expand_home, paths):
        found += [path] if path.is_file() else list_checkpoints(_folder_of(path))
    return found
