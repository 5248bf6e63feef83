"""Features of every image of labelled shards, computed once and kept."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cmae.errors import CmaeError, require
from cmae.kernels import color_jitter
from cmae.pipeline import Loader, LoaderConfig, ViewConfig, build_loader, expand_shards
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.formats.members.labels import NO_LABEL
from cmae.pipeline.formats.shard_index import index_path, load_index
from cmae.pipeline.remote.schemes import is_local
from cmae.train.distributed import World, gather_values, threads_per_rank
from cmae.train.evaluation.encoders import Encoder
from cmae.train.monitor.console import PlainConsole

Pool = tuple[str, int]
"""'mean' or 'cls', and the block counted from the last one, which is 1."""


@dataclass(frozen=True)
class Images:
    """Labelled images, one centred square each."""

    shards: str | list[str]
    """WebDataset tars with labels and indices."""
    img_size: int
    """Side of the result, px."""
    centre_share: float = 0.875
    """Side of the centred square over the image's shorter side."""
    max_samples: int | None = None
    """Only so many, the first ones. None: all."""


@dataclass(frozen=True)
class Features:
    """Features and labels of all images that could be read, in the order of the shards."""

    by_pool: dict[Pool, Float[Tensor, "N D"]]
    """float16, on the CPU."""
    labels: Int64[Tensor, " N"]
    ids: Int64[Tensor, " N"]
    """`Batch.sample_id`."""
    num_left_out: int
    """Images that could not be read or decoded."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return int(self.labels.max()) + 1


def open_images(
    images: Images, *, batch_size: int, world: World, num_threads: int | None = None
) -> Loader:
    """A loader that gives every image once, in order; what is left of the last batch is padded.

    Raises:
        CmaeError: There is no such shard, or one without an index.
    """
    views = ViewConfig(
        img_size=images.img_size,
        source_crop_size=images.img_size,
        num_views=1,
        window="centre",
        centre_share=images.centre_share,
        hflip_prob=0.0,
    )
    size = max(1, min(batch_size, count_images(images.shards) // world.world_size))
    config = LoaderConfig(
        images.shards,
        views=views,
        source="indexed",
        batch_size=size,
        global_batch_size=size * world.world_size,
        shuffle=False,
        last_batch="pad",
        max_bad_fraction=1.0,  # they are counted, and told with the result
        num_threads=num_threads or threads_per_rank(world.device.type),
    )
    return build_loader(
        config,
        rank=world.rank,
        world_size=world.world_size,
        device=world.device,
        color_op=color_jitter,
    )


def count_images(shards: str | Sequence[str]) -> int:
    """Images of all shards by their indices, the broken ones too.

    Raises:
        CmaeError: A shard has no index.
    """
    return sum(len(load_index(path)) for path in _indexed(shards))


def _indexed(shards: str | Sequence[str]) -> list[str]:
    paths = expand_shards(shards)
    for path in paths:
        if is_local(path) and not index_path(path).exists():
            raise CmaeError(
                f"{path} has no index, and evaluation takes every image once: make one with `cmae shards "
                f"index {path}`"
            )
    return paths


def read_labels(shards: str | Sequence[str]) -> Int64[Tensor, " N"]:
    """Labels of all samples, from the shards' indices.

    Raises:
        CmaeError: A shard has no index, or no sample has a label.
    """
    paths = _indexed(shards)
    joined = torch.cat([torch.from_numpy(load_index(path).label.astype("int64")) for path in paths])
    joined = joined[joined != NO_LABEL]
    if not len(joined):
        raise CmaeError(
            f"shards={shards!r}: no sample has a label; evaluation needs a `.cls` file each"
        )
    return joined


@torch.no_grad()
def compute_features(
    encoder: Encoder,
    images: Images,
    *,
    world: World,
    last: int = 1,
    batch_size: int = 128,
    cache: Path | None = None,
    what: str = "images",
) -> Features:
    """Features of all images; every rank computes its share, and all get all. A collective.

    Args:
        encoder: Network on the world's device.
        images: What to read.
        world: This process among all.
        last: How many of the last blocks.
        batch_size: Images of a rank at a time.
        cache: Folder for results, by weights, data and settings; None: they are not kept.
        what: Noun for the progress bar.

    Raises:
        CmaeError: No image, or one without label.
    """
    with open_images(images, batch_size=batch_size, world=world) as loader:
        path = None
        if cache is not None:
            key = [encoder.digest(), loader.state.digest, asdict(images), last]
            name = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:24]
            path = cache / f"features-{name}.safetensors"
            if path.is_file() and (kept := _read(path)) is not None:
                return kept
        own = _compute(encoder, loader, images, world=world, last=last, what=what)
        total = min(count_images(images.shards), images.max_samples or sys.maxsize)
    features = _join(gather_values(own, world), total)
    if path is not None and world.is_main:
        _write(path, features)
    return features


def _compute(
    encoder: Encoder, loader: Loader, images: Images, *, world: World, last: int, what: str
) -> dict[str, Any]:
    parts: dict[Pool, list[Tensor]] = {}
    ids, labels = [], []
    steps, size = loader.steps_per_epoch or 0, loader.num_samples or 0
    if images.max_samples is not None and size:
        steps = min(steps, -(-steps * images.max_samples // size))
    device = world.device
    half = device.type == "cuda"
    with Progress(console=PlainConsole(stderr=True), disable=not world.is_main) as progress:
        for _ in progress.track(range(steps), description=f"features of {what}"):
            batch = next(loader)
            with torch.autocast(device.type, dtype=torch.float16, enabled=half):
                pooled = encoder(batch.online, last=last)
            for pool, values in pooled.items():
                parts.setdefault(pool, []).append(values.half().cpu())
            ids.append(batch.sample_id.cpu())
            labels.append(batch.label.cpu())
    joined = {pool: torch.cat(values) for pool, values in parts.items()}
    empty = torch.zeros(0, dtype=torch.int64)
    return {
        "pools": joined,
        "ids": torch.cat(ids) if ids else empty,
        "labels": torch.cat(labels) if labels else empty,
    }


def first_rows(ids: Int64[Tensor, " N"], total: int) -> Int64[Tensor, " M"]:
    """Rows of at most `total` samples in the order of their ids, each once: padding and stand-ins repeat."""
    order = ids.argsort(stable=True)
    is_first = torch.ones(len(order), dtype=torch.bool)
    is_first[1:] = ids[order][1:] != ids[order][:-1]
    return order[is_first][:total]


def _join(parts: list[dict[str, Any]], total: int) -> Features:
    """All ranks' shares in the order of the shards, each image once: padding and stand-ins come twice."""
    ids, labels = (torch.cat([part[name] for part in parts]) for name in ("ids", "labels"))
    require(len(ids) > 0, "images", 0, "1 or more")
    rows = first_rows(ids, total)
    if (labels[rows] == NO_LABEL).any():
        count = int((labels[rows] == NO_LABEL).sum())
        raise CmaeError(
            f"{count} of {len(rows)} images have no label; evaluation needs a `.cls` file beside every "
            "image, as `cmae shards write` makes them from class folders"
        )
    pools = {
        pool: torch.cat([part["pools"][pool] for part in parts])[rows] for pool in parts[0]["pools"]
    }
    return Features(pools, labels[rows], ids[rows], total - len(rows))


def _write(path: Path, features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{pool}.{block}": value for (pool, block), value in features.by_pool.items()}
    tensors |= {"labels": features.labels, "ids": features.ids}
    with atomic_write(path) as file:
        file.write(save(tensors, {"num_left_out": str(features.num_left_out)}))


def _read(path: Path) -> Features | None:
    """Kept features; None where the file is damaged, and they are computed again."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            left_out = int(file.metadata()["num_left_out"])
    except (SafetensorError, KeyError, ValueError, OSError):
        return None
    labels, ids = tensors.pop("labels"), tensors.pop("ids")
    pools = {(name.split(".")[0], int(name.split(".")[1])): one for name, one in tensors.items()}
    return Features(pools, labels, ids, left_out)
