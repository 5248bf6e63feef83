"""`cmae shards write | index | verify | repair | inspect`: functions that print, and return an exit code.

What does the work is imported where it is done: `--help` loads none of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmae.errors import CmaeError, require
from cmae.paths import check_output
from cmae.pipeline.formats.images.jpeg import Decode
from cmae.printable import MAX_LINE, printable

if TYPE_CHECKING:
    from rich.table import Table

    from cmae.pipeline.remote.cache import ShardCache
    from cmae.pipeline.remote.client import RemoteFile
    from cmae.pipeline.shards.originals.source import ImageSource
    from cmae.pipeline.shards.statistics import ShardStatistics
    from cmae.pipeline.shards.verify import Problem
    from cmae.pipeline.shards.write import WriteReport

_MAX_LINES = 20
"""Problems that are printed; the rest are counted."""

_UPLOAD_DEADLINE_S = 1800.0
"""Longest time for one shard to reach the store, retries included."""

_INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def write(
    images: Path,
    out: Path,
    *,
    list_file: Path | None = None,
    devkit: Path | None = None,
    layout: Literal["auto", "classes", "flat"] = "auto",
    samples_per_shard: int = 1000,
    max_shard_mib: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    strict: bool = False,
    max_size: int | None = None,
    quality: int = 95,
    workers: int | None = None,
    num_parts: int | None = None,
    part: int = 0,
    on: Literal["here", "ray"] = "here",
    upload: str | None = None,
    storage_options: dict[str, Any] | None = None,
) -> int:
    """Copy the JPEGs of a folder, one subfolder a class, or of a tar, into shards with their indices.

    The bytes are copied as they are; only --max_size has large images encoded again, and labels them.
    Stop it at any time: the same command continues.

    Args:
        images: Folder with one subfolder for each class; or with images only, for a set without labels. Or a
            tar of such a folder, or of one tar for each class, such as ILSVRC2012_img_train.tar.
        out: Folder of its own for the shards. They are named after it: shards/train -> train-000000.tar.
        list_file: Lines `path<TAB or space>label` to write instead of all images; paths start at `images`.
        devkit: ILSVRC2012_devkit_t12.tar.gz: labels for the images of ILSVRC2012_img_val.tar.
        layout: One class a subfolder (classes), or all images without labels (flat). With auto the folder
            decides, and images beside subfolders are an error that names both.
        samples_per_shard: Largest number of images in a shard.
        max_shard_mib: Largest size of a shard in MiB; null means no limit.
        seed: Seed of the shuffle.
        shuffle: Mix the classes over all shards, so that a few shards are a fair sample.
        strict: Stop at the first file that is no JPEG we can decode, instead of listing it in skipped.jsonl.
        max_size: Downscale images whose shorter side exceeds this many pixels, where that makes the file
            smaller; null copies every file.
        quality: JPEG quality, 1..100, of the images that are downscaled.
        workers: Threads; null means one for each CPU core, at most 16.
        num_parts: Number of machines that write to `out`, each a part, such as a Slurm array's size; the
            shards do not depend on it. Null means one; with --on ray, one for each node.
        part: This machine's part, from 0, such as $SLURM_ARRAY_TASK_ID or $JOB_COMPLETION_INDEX.
        on: This machine, or all nodes of a running Ray cluster (ray), which share `images` and `out`.
        upload: Folder of a store, such as s3://bucket/train, that gets every shard as soon as it is written;
            `out` keeps them too.
        storage_options: Options of fsspec's file system for `upload`.
    """
    from cmae.pipeline.remote.client import RemoteConfig
    from cmae.pipeline.remote.folder import RemoteFolder
    from cmae.pipeline.shards.on_ray import write_shards_on_ray
    from cmae.pipeline.shards.originals.find import find_images
    from cmae.pipeline.shards.write import write_shards
    from cmae.train.monitor.console import PlainConsole

    if on == "ray" and part:
        raise CmaeError(
            "--part is for machines that are started one by one: leave it out with --on ray"
        )
    start = time.perf_counter()
    find = {"list_file": list_file, "devkit": devkit, "layout": layout}
    settings = {
        "samples_per_shard": samples_per_shard,
        "max_shard_bytes": None if max_shard_mib is None else max_shard_mib * 2**20,
        "seed": seed,
        "shuffle": shuffle,
        "strict": strict,
        "max_size": max_size,
        "quality": quality,
    }
    remote = RemoteConfig(storage_options=storage_options or {}, deadline_s=_UPLOAD_DEADLINE_S)
    publisher = None if upload is None else RemoteFolder(upload, remote)
    with PlainConsole(stderr=True).status("looking for images"):
        source = find_images(images, **find)  # type: ignore[arg-type]
    num_images = len(source.images) // (1 if on == "ray" else max(1, num_parts or 1))
    try:
        with _progress("writing images", num_images) as advance:
            if on == "ray":
                report = write_shards_on_ray(
                    images,
                    out,
                    find=find,
                    write=settings,
                    upload=upload,
                    remote=remote,
                    num_parts=num_parts,
                    workers=workers,
                    progress=advance,
                )
            else:
                report = write_shards(
                    source,
                    out,
                    **settings,  # type: ignore[arg-type]
                    workers=workers,
                    num_parts=1 if num_parts is None else num_parts,
                    part=part,
                    publisher=publisher,
                    progress=advance,
                )
    except KeyboardInterrupt:
        _report(
            f"interrupted; finished shards stay in {out}: run the same command again to continue"
        )
        return _INTERRUPTED
    except OSError as error:
        raise CmaeError(f"cannot write shards of {images} to {out}: {error}") from error
    _print_written(report, source, out, seconds=time.perf_counter() - start)
    if report.num_missing:
        _print(
            f"part {part} of {num_parts} is done; other parts have yet to write "
            f"{_count(report.num_missing, 'shard')}, and the last to end writes dataset.json"
        )
    if publisher is not None:
        _print(f"all of it is in {publisher.shown} too")
    return 0


def _print_written(report: WriteReport, source: ImageSource, out: Path, *, seconds: float) -> None:
    from cmae.pipeline.formats.dataset_folder import SKIPPED_FILE
    from cmae.pipeline.formats.presized import downscaled_line

    classes = f", {len(source.classes)} classes" if source.classes else ""
    _print(
        f"{_count(report.num_samples, 'image')}{classes} in {_count(report.num_shards, 'shard')}, "
        f"{_gib(report.num_bytes)}, {seconds:.1f} s: {out}"
    )
    if report.downscaled:
        _print(downscaled_line(report.downscaled, report.num_samples))
    if report.num_already_written:
        _print(f"{_count(report.num_already_written, 'shard')} written before")
    _print(report.files.line("files"))
    if report.num_skipped:
        _print(
            f"{_count(report.num_skipped, 'file')} skipped, no usable JPEG: see {out / SKIPPED_FILE}"
        )


def index(
    shards: str | list[str],
    *,
    rebuild: bool = False,
    workers: int | None = None,
    cache_dir: Path | None = None,
    storage_options: dict[str, Any] | None = None,
) -> int:
    """Index WebDataset tars made elsewhere, so that they can be read at random; the tars stay as they are.

    The index of a remote shard is written to `cache_dir`, where `cmae pretrain` looks for it with the same
    data.cache_dir; the shard is copied there too, as far as the disk has room.

    Args:
        shards: Tar file, folder, quoted glob, braces such as train-{000000..000099}.tar, or several of them.
        rebuild: Also make indices again that are fresh.
        workers: Threads; null means one for each CPU core, at most 16.
        cache_dir: Folder for remote shards and their indices; s3, gs and http(s) URLs need it.
        storage_options: Options of fsspec's file system, such as {anon: true}, for URLs.
    """
    from cmae.pipeline.formats.dataset_index import build_indices
    from cmae.pipeline.formats.members.member_counts import sum_members
    from cmae.pipeline.remote.index import build_remote_indices
    from cmae.pipeline.sources.expand import expand_shards

    start = time.perf_counter()
    paths = expand_shards(shards, storage_options=storage_options)
    with _progress("indexing shards", len(paths)) as advance:
        if remote := _remote_cache(paths, cache_dir, storage_options):
            results = build_remote_indices(
                *remote, rebuild=rebuild, workers=workers, progress=advance
            )
        else:
            results = build_indices(paths, rebuild=rebuild, workers=workers, progress=advance)
    failed = [result for result in results if result.error is not None]
    built = sum(result.built for result in results)
    members = sum_members(result.members for result in results)
    bad = sum(result.num_bad for result in results)
    _print(
        f"{_count(sum(result.num_samples for result in results), 'sample')} in "
        f"{_count(len(results), 'shard')}: {built} indexed, "
        f"{len(results) - built - len(failed)} fresh already, {time.perf_counter() - start:.1f} s"
    )
    if bad:
        _print(
            f"{_count(bad, 'image')} left out, cannot be decoded: `cmae shards verify` says which"
        )
    if members.total:
        _print(members.line())
    _report_lines([f"left out: {line}" for line in members.lost_lines()])
    if empty := sum(result.error is None and not result.num_samples for result in results):
        _print(f"{_count(empty, 'shard')} without a sample")
    _report_lines([f"{result.error}" for result in failed])
    if failed:
        _print(f"{_count(len(failed), 'shard')} without an index")
    return 1 if failed else 0


def verify(
    shards: str | list[str],
    *,
    decode: Decode = "none",
    workers: int | None = None,
    cache_dir: Path | None = None,
    storage_options: dict[str, Any] | None = None,
) -> int:
    """Read every byte of the shards and compare it with their indices; exit code 1 if anything is wrong.

    Remote shards are copied to `cache_dir`/unchecked as they are, and the copies are checked.

    Args:
        shards: Tar file, folder, quoted glob, braces such as train-{000000..000099}.tar, or several of them.
        decode: Also decode every image, with Pillow (pil) or nvImageCodec (nvimgcodec), on the CPU.
        workers: Threads; null means one for each CPU core, at most 16.
        cache_dir: Folder for copies of remote shards, with room for all of them.
        storage_options: Options of fsspec's file system, such as {anon: true}, for URLs.
    """
    from cmae.pipeline.shards.verify import verify_shards

    start = time.perf_counter()
    paths = _local_copies(shards, cache_dir, storage_options, unchecked=True)
    with _progress("verifying shards", len(paths)) as advance:
        report = verify_shards(paths, decode=decode, workers=workers, progress=advance)
    _report_lines([problem_line(problem) for problem in report.problems])
    verdict = _count(len(report.problems), "problem") if report.problems else "no problem"
    _print(
        f"{verdict} in {_count(report.num_samples, 'sample')}, {_count(report.num_shards, 'shard')}, "
        f"{_gib(report.num_bytes)}, {time.perf_counter() - start:.1f} s"
    )
    _print(report.members.line())
    _report_lines(
        [
            f"suspected, not counted as a problem: {Path(one.shard).name}, {one.key}: {one.what}"
            for one in report.suspects
        ]
    )
    for note in report.notes:
        _print(f"note: {note}")
    return 0 if report.ok else 1


def repair(
    shards: str | list[str],
    out: Path,
    *,
    duplicates: Literal["rename", "drop"] = "rename",
    unlabelled: Literal["keep", "drop"] = "keep",
    reencode: bool = False,
    decode: Decode = "none",
    drop_suspect: bool = False,
    workers: int | None = None,
    cache_dir: Path | None = None,
    storage_options: dict[str, Any] | None = None,
) -> int:
    """Write clean copies of shards: good records keep their bytes, the others are left out and listed.

    Damaged tars are read on from the next whole header, and parts of a sample that lie apart are joined. What
    is only suspected stays. The result is verified. Stop it at any time: the same command continues.

    Args:
        shards: Tar file, folder, quoted glob, braces such as train-{000000..000099}.tar, or a list of them.
        out: Folder of its own for the clean shards, which keep their names; repaired.jsonl says what changed.
        duplicates: A key that occurs again with another image gets a new name (rename) or is dropped.
        unlabelled: Records without a label that can be read, where others have one, are kept or dropped.
        reencode: Make JPEGs of PNG, WebP and other images that Pillow reads, instead of dropping them.
        decode: Also decode every image, with Pillow (pil) or nvImageCodec (nvimgcodec), and drop what fails.
        drop_suspect: Also drop images with a sign of damage that is no proof.
        workers: Threads; null means one for each CPU core, at most 16.
        cache_dir: Folder for copies of remote shards, with room for all of them.
        storage_options: Options of fsspec's file system, such as {anon: true}, for URLs.
    """
    from cmae.pipeline.shards.repair import REPAIRED_FILE, RepairPolicy, repair_shards

    start = time.perf_counter()
    paths = _local_copies(shards, cache_dir, storage_options, unchecked=True)
    policy = RepairPolicy(duplicates, unlabelled, reencode, decode, drop_suspect)
    try:
        with _progress("repairing shards", 3 * len(paths)) as advance:
            report = repair_shards(paths, out, policy, workers=workers, progress=advance)
    except KeyboardInterrupt:
        _report(
            f"interrupted; finished shards stay in {out}: run the same command again to continue"
        )
        return _INTERRUPTED
    _print(
        f"{_count(report.num_samples, 'sample')} in {_count(report.num_shards, 'shard')}, "
        f"{time.perf_counter() - start:.1f} s: {out}"
    )
    changes = {
        "dropped": report.num_dropped,
        "renamed": report.num_renamed,
        "encoded again": report.num_reencoded,
        "joined": report.num_joined,
        "kept though suspected": report.num_suspect,
        "damaged stretches passed over": report.num_damages,
    }
    changed = [f"{number} {what}" for what, number in changes.items() if number]
    _print(
        f"{', '.join(changed)}: see {out / REPAIRED_FILE}"
        if changed
        else "nothing had to be changed"
    )
    _print(report.members.line())
    left = [problem_line(problem) for problem in report.problems]
    _report_lines([f"left as it was: {line}" for line in left])
    _print(
        f"verified: {_count(len(left), 'problem')} left" if left else "verified: no problem is left"
    )
    return 0


def inspect(
    shards: str | list[str],
    *,
    sheet: Path | None = None,
    num_images: int = 40,
    columns: int = 8,
    cache_dir: Path | None = None,
    storage_options: dict[str, Any] | None = None,
) -> int:
    """Print what the shards hold, from their indices, and draw a contact sheet.

    Remote shards are copied to `cache_dir` first.

    Args:
        shards: Tar file, folder, quoted glob, braces such as train-{000000..000099}.tar, or several of them.
        sheet: Also draw images spread evenly over the shards to this .png file.
        num_images: Images on the sheet.
        columns: Images in a row of the sheet.
        cache_dir: Folder for copies of remote shards, with room for all of them.
        storage_options: Options of fsspec's file system, such as {anon: true}, for URLs.
    """
    from cmae.pipeline.formats.dataset_folder import load_classes
    from cmae.pipeline.shards.contact_sheet import contact_sheet
    from cmae.pipeline.shards.statistics import shard_statistics
    from cmae.train.monitor.console import PlainConsole

    if sheet is not None:
        check_output(sheet, key="--sheet", suffixes=(".png",))
    for name, value in (("num_images", num_images), ("columns", columns)):
        require(value >= 1, f"--{name}", value, ">= 1")
    paths = _local_copies(shards, cache_dir, storage_options)
    statistics = shard_statistics(paths)
    console = PlainConsole(highlight=True)
    console.print(_count_table(statistics, load_classes(Path(paths[0]).parent)))
    console.print(_percentile_table(statistics))
    if statistics.members.total:
        _print(statistics.members.line())
    _report_lines([f"left out: {line}" for line in statistics.members.lost_lines()])
    if sheet is not None:
        contact_sheet(paths, sheet, num_images=num_images, columns=columns)
        _print(f"contact sheet: {sheet}")
    return 0


def problem_line(problem: Problem) -> str:
    """Shard, key and what is wrong."""
    key = f", {problem.key}" if problem.key else ""
    return f"{Path(problem.shard).name}{key}: {problem.what}"


def _local_copies(
    shards: str | list[str],
    cache_dir: Path | None,
    storage_options: dict[str, Any] | None,
    *,
    unchecked: bool = False,
) -> list[str]:
    """Paths of local shards; of remote ones, those of their copies in the cache.

    Unchecked copies, damaged ones among them, lie in a folder of their own, where no run looks for shards.
    """
    from cmae.pipeline.formats.parallel import run_threads
    from cmae.pipeline.remote.index import copy_shard, copy_unchecked
    from cmae.pipeline.sources.expand import expand_shards

    paths = expand_shards(shards, storage_options=storage_options)
    if unchecked and cache_dir is not None:
        cache_dir = cache_dir / "unchecked"
    remote = _remote_cache(paths, cache_dir, storage_options)
    if remote is None:
        return paths
    files, cache = remote
    copy = partial(copy_unchecked if unchecked else copy_shard, cache=cache, keep=files)
    with _progress("copying shards", len(files)) as advance:
        copies = run_threads(copy, files, workers=4, progress=advance)
    return [str(copy) for copy in copies]


def _remote_cache(
    paths: list[str], cache_dir: Path | None, storage_options: dict[str, Any] | None
) -> tuple[list[RemoteFile], ShardCache] | None:
    """Remote shards and the cache for them; None where all shards are local."""
    from cmae.pipeline.remote.client import Remote, RemoteConfig
    from cmae.pipeline.remote.index import open_cache
    from cmae.pipeline.remote.schemes import is_local, is_remote, redact

    strange = [path for path in paths if not is_local(path)]
    if not strange:
        return None
    if len(strange) < len(paths) or not all(map(is_remote, strange)):
        raise CmaeError(
            f"shards={redact(strange[0])!r} is a pipe, or stands among local files: copy the shards to a "
            "disk first, or give local and remote ones apart"
        )
    if cache_dir is None:
        raise CmaeError(
            f"shards={redact(strange[0])!r} is not a local file: name a folder on a disk with --cache_dir, "
            "where the shards are copied, or copy the shards to a disk first"
        )
    config = RemoteConfig(cache_dir=cache_dir, storage_options=storage_options or {})
    remote = Remote(config)
    return [remote.file(path) for path in paths], open_cache(config)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; gives the function that advances it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from cmae.train.monitor.console import PlainConsole

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=PlainConsole(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


def _print(line: str) -> None:
    """Print a line with names from files or stores in it."""
    print(printable(line, limit=MAX_LINE))


def _report(line: str) -> None:
    print(printable(line, limit=MAX_LINE), file=sys.stderr)


def _report_lines(lines: Sequence[str]) -> None:
    for line in lines[:_MAX_LINES]:
        _report(line)
    if len(lines) > _MAX_LINES:
        _report(f"... and {len(lines) - _MAX_LINES} more")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _count_table(facts: ShardStatistics, classes: list[str] | None) -> Table:
    from rich.table import Table
    from rich.text import Text

    from cmae.pipeline.formats.presized import downscaled_line

    table = Table(title="Shards", show_header=False, title_justify="left")
    smallest, largest = facts.samples_per_shard
    table.add_row("shards", f"{facts.num_shards} with {smallest}..{largest} samples")
    table.add_row("samples", f"{facts.num_samples}")
    if facts.num_bad:
        table.add_row("left out", Text(f"{facts.num_bad} images cannot be decoded", "red"))
    mean = facts.image_bytes / max(facts.num_samples, 1)
    table.add_row("image bytes", f"{_gib(facts.image_bytes)}, {mean / 1e3:.1f} kB an image")
    if facts.downscaled:
        line = downscaled_line(facts.downscaled, facts.num_samples)
        table.add_row("downscaled", Text(printable(line)))
    table.add_row("kinds", ", ".join(f"{count} {kind}" for kind, count in facts.kinds.items()))
    turned = [f"{count} stored as {o}" for o, count in facts.orientations.items() if o != 1]
    table.add_row("EXIF orientation", ", ".join(turned) or "all upright")
    table.add_row("labels", Text(printable(_label_line(facts, classes))))
    return table


def _label_line(facts: ShardStatistics, classes: list[str] | None) -> str:
    if not facts.class_counts:
        return "none"

    def name(label: int) -> str:
        return f"{label} {classes[label]}" if classes and label < len(classes) else f"{label}"

    rarest = min(facts.class_counts, key=facts.class_counts.__getitem__)
    commonest = max(facts.class_counts, key=facts.class_counts.__getitem__)
    fewest, most = facts.class_counts[rarest], facts.class_counts[commonest]
    spread = (
        f"{fewest} ({name(rarest)}) to {most} ({name(commonest)})" if fewest < most else f"{most}"
    )
    line = f"{len(facts.class_counts)} classes with {spread} images"
    return line + (f", {facts.num_unlabelled} without a label" if facts.num_unlabelled else "")


def _percentile_table(facts: ShardStatistics) -> Table:
    from rich.table import Table

    table = Table(title="Images, by percentile", title_justify="left")
    table.add_column("")
    for percentile in facts.percentiles:
        name = {0: "min", 50: "median", 100: "max"}.get(percentile, f"{percentile} %")
        table.add_column(name, justify="right")
    table.add_row("kB", *(f"{value / 1e3:.1f}" for value in facts.bytes_at))
    table.add_row("megapixels", *(f"{value:.3f}" for value in facts.megapixels_at))
    table.add_row("width", *map(str, facts.width_at))
    table.add_row("height", *map(str, facts.height_at))
    return table
