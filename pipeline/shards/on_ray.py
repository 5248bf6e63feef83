"""Write shards on the machines of a Ray cluster, a part each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cmae.errors import CmaeError
from cmae.pipeline.formats.parallel import MAX_WORKERS, no_progress
from cmae.pipeline.remote.client import RemoteConfig
from cmae.pipeline.remote.folder import RemoteFolder
from cmae.pipeline.shards.originals.find import find_images
from cmae.pipeline.shards.write import WriteReport, write_shards


def write_shards_on_ray(
    images: Path,
    out: Path,
    *,
    find: Mapping[str, Any],
    write: Mapping[str, Any],
    upload: str | None = None,
    remote: RemoteConfig | None = None,
    num_parts: int | None = None,
    workers: int | None = None,
    progress: Callable[[int], None] = no_progress,
) -> WriteReport:
    """Write every part as a task of the Ray cluster that runs here; the shards are those of one machine.

    Tasks that a node takes down with it are begun again elsewhere and go on with the shard.

    Args:
        images: What `find_images` takes; all nodes see it at this path.
        out: Folder for the shards, which all nodes share.
        find: Other settings of `find_images`.
        write: Other settings of `write_shards`.
        upload: URL of a folder that gets copies of all files; None keeps them in `out` alone.
        remote: How to reach `upload`.
        num_parts: Number of tasks; None means one for each node.
        workers: Threads of each task; None means one for each core of the smallest node, at most 16.
        progress: Called with the images of each part when it is done.

    Raises:
        CmaeError: Ray is not installed, no cluster runs, or what `find_images` and `write_shards` refuse.
    """
    ray = _connect()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not nodes:
        raise CmaeError("no node of the Ray cluster has a CPU to give: start nodes with --num-cpus")
    cores = int(min(node["Resources"]["CPU"] for node in nodes))
    workers = min(workers or MAX_WORKERS, cores)
    num_parts = num_parts or len(nodes)
    task = ray.remote(num_cpus=workers, scheduling_strategy="SPREAD")(_write_part)
    start = partial(
        task.remote,
        str(images.absolute()),
        str(out.absolute()),
        {name: _whole_path(value) for name, value in find.items()},
        {**write, "workers": workers, "num_parts": num_parts},
        upload,
        remote,
    )
    waiting = [start(part) for part in range(num_parts)]
    num_done = 0
    last: WriteReport | None = None
    try:
        while waiting:
            (ready, *_), waiting = ray.wait(waiting)
            report = ray.get(ready)
            num_images = report.num_samples + report.num_skipped
            if not report.num_missing:  # of all parts, from the one that ended last
                last, num_images = report, num_images - num_done
            progress(num_images)
            num_done += num_images
    except ray.exceptions.RayTaskError as error:
        raise CmaeError(f"a part failed on the Ray cluster: {error.cause}") from error
    finally:
        for one in waiting:
            ray.cancel(one)
    if last is None:
        raise CmaeError(
            f"all {num_parts} parts are done and none saw the shards of all others in {out}: give a folder "
            "that the nodes share"
        )
    return last


def _connect() -> Any:
    try:
        import ray
    except ImportError as error:
        raise CmaeError("--on ray needs Ray: pip install 'cmae[ray]', on every node") from error
    try:
        ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
    except ConnectionError as error:
        raise CmaeError(
            "no Ray cluster runs here: start one with `ray start --head` (and `ray start --address` on the "
            "other nodes), or name it in RAY_ADDRESS"
        ) from error
    return ray


def _write_part(
    images: str,
    out: str,
    find: Mapping[str, Any],
    write: Mapping[str, Any],
    upload: str | None,
    remote: RemoteConfig | None,
    part: int,
) -> WriteReport:
    publisher = RemoteFolder(upload, remote or RemoteConfig()) if upload else None
    return write_shards(find_images(images, **find), out, **write, part=part, publisher=publisher)


def _whole_path(value: Any) -> Any:
    return value.absolute() if isinstance(value, Path) else value
