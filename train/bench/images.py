"""The images of the loader's benchmark: places in shards, the same as files, the same downscaled."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmae.pipeline.formats.shard_index import build_index, index_path, load_index, save_index
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.write import write_shards

MAX_UNPACKED = 20_000
"""Images that are unpacked to files for what cannot read tars; more would take minutes and gigabytes."""


class Data(NamedTuple):
    """What is compared on."""

    shards: list[str]
    """Tars, each with its index."""
    description: str
    num_images: int


def with_indices(paths: Sequence[str], folder: Path) -> Data:
    """The shards with their indices; tars that have none are linked and indexed in `folder`."""
    shards = list(paths)
    if not all(index_path(path).exists() for path in shards):
        links = [folder / Path(path).name for path in shards]
        for link, path in zip(links, shards, strict=True):
            link.symlink_to(Path(path).resolve())
            save_index(build_index(link), index_path(link))
        shards = [str(link) for link in links]
    sizes = [int(size) for path in shards for size in load_index(path).size]
    mean = float(np.mean(sizes)) / 1000
    where = Path(paths[0]).resolve().parent.name
    return Data(shards, f"{len(sizes)} JPEGs of {mean:.0f} kB ({where})", len(sizes))


def unpack_images(shards: list[str], folder: Path) -> Path:
    """Write the decodable images of the shards as files into `folder`/images/all; return `folder`/images."""
    root = folder / "images"
    (root / "all").mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        index, data = load_index(shard), np.memmap(shard, dtype=np.uint8, mode="r")
        for row in np.flatnonzero(index.valid):
            start = index.byte_offset[row]
            path = root / "all" / f"{number:04d}-{row:06d}.jpg"
            path.write_bytes(data[start : start + index.size[row]].tobytes())
    return root


def write_presized(images: Path, folder: Path, *, max_size: int) -> list[str]:
    """Shards of the unpacked images, downscaled as `cmae shards write --max-size` does, five tars."""
    source = scan_image_folder(images)
    out = folder / f"presized-{max_size}"
    per_shard = -(-len(source.images) // 5)
    write_shards(source, out, samples_per_shard=per_shard, max_size=max_size)
    return [str(path) for path in sorted(out.glob("*.tar"))]


class Place(NamedTuple):
    """Where a JPEG lies, and its size in pixels."""

    shard: str
    byte_offset: int
    num_bytes: int
    height: int
    width: int


def image_places(shards: list[str]) -> Iterator[Place]:
    """Every decodable image of the shards."""
    for shard in shards:
        index = load_index(shard)
        columns = (index.byte_offset, index.size, index.height, index.width)
        for row in np.flatnonzero(index.valid):
            yield Place(shard, *(int(column[row]) for column in columns))


def read_image(place: Place) -> bytes:
    """The bytes of a JPEG."""
    descriptor = os.open(place.shard, os.O_RDONLY)
    try:
        return os.pread(descriptor, place.num_bytes, place.byte_offset)
    finally:
        os.close(descriptor)
