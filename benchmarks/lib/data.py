"""The images of the loader benchmarks: shards with indices, the same as files, the same downscaled."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset as wds
from lib.harness import ROOT
from PIL import Image

from cmae.pipeline import expand_shards
from cmae.pipeline.formats.shard_index import build_index, index_path, load_index, save_index
from cmae.pipeline.shards.image_folder import scan_image_folder
from cmae.pipeline.shards.write import write_shards
from cmae.train.commands.demo.data import PHOTOGRAPHS, load_photograph

MAX_UNPACKED = 20_000
"""Images that are unpacked to files for what cannot read tars; more would take minutes and gigabytes."""


class Data(NamedTuple):
    """What is compared on."""

    shards: list[str]
    """Tars, each with its index."""
    description: str
    num_images: int


def prepare_shards(pattern: str | None, folder: Path) -> Data:
    """Indexed shards; tars without an index are linked and indexed in `folder`.

    Without a pattern: the research sample in CMAE_DATA, or photographs of scikit-image where there is none.
    """
    if pattern is None:
        root = Path(os.environ.get("CMAE_DATA", ROOT.parent / "shared" / "data"))
        sample = root / "imagenet-sample"
        pattern = str(sample / "*.tar") if sample.is_dir() else write_photographs(folder)
    paths = expand_shards(pattern)
    if not all(index_path(path).exists() for path in paths):
        links = [folder / Path(path).name for path in paths]
        for link, path in zip(links, paths, strict=True):
            link.symlink_to(Path(path).resolve())
            save_index(build_index(link), index_path(link))
        paths = [str(link) for link in links]
    sizes = [int(size) for path in paths for size in load_index(path).size]
    mean = np.mean(sizes) / 1000
    description = f"{len(sizes)} JPEGs of {mean:.0f} kB ({Path(pattern).parent.name})"
    return Data(paths, description, len(sizes))


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


def write_photographs(folder: Path) -> str:
    """A stand-in where there is no ImageNet: 256 crops of 500 x 375 px from scikit-image's photographs."""
    rng = np.random.default_rng(0)
    path = folder / "photographs" / "photographs-000000.tar"
    path.parent.mkdir()
    with wds.TarWriter(str(path)) as tar:
        for number in range(256):
            image = Image.fromarray(load_photograph(PHOTOGRAPHS[number % len(PHOTOGRAPHS)]))
            image = image.resize((750, 750 * image.height // image.width))
            top = int(rng.integers(0, max(1, image.height - 375)))
            left = int(rng.integers(0, 250))
            crop = io.BytesIO()
            image.crop((left, top, left + 500, top + 375)).save(crop, "JPEG", quality=95)
            tar.write({"__key__": f"{number:04d}", "jpg": crop.getvalue(), "cls": str(number % 16)})
    return str(path)


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
