"""SPDL's thread pipeline."""

from __future__ import annotations

import contextlib
import importlib
import io
import random
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import torch
from PIL import Image

from cmae.train.bench.images import Place, image_places, read_image
from cmae.train.bench.peers.contract import Absent, Job, Pair, Peer
from cmae.train.bench.peers.pillow_views import PillowViews, describe_pillow


def find(job: Job) -> Iterator[Peer | Absent]:
    """SPDL, where it and an FFmpeg that it knows are installed."""
    name = "SPDL"
    try:
        importlib.import_module("spdl.pipeline")
        importlib.import_module("spdl.io").demux_image(_tiny_jpeg())
    # RuntimeError: it found no FFmpeg that it knows.
    except (ImportError, RuntimeError) as error:
        yield Absent(name, f"needs spdl, spdl_io and FFmpeg 4-9: {str(error)[:120]}")
        return
    colors = describe_pillow(job.views).removeprefix("Pillow geometry")
    yield Peer(
        name,
        f"FFmpeg decode, crop, bicubic scale and flip in threads{colors}",
        f"spdl_io {version('spdl_io')}",
        "uint8 NHWC",
        spdl_pipeline,
    )


@contextlib.contextmanager
def spdl_pipeline(job: Job) -> Iterator[Iterator[Pair]]:
    """SPDL's thread pipeline; its FFmpeg decodes, crops, resizes and flips, Pillow does the colours."""
    from spdl.pipeline import PipelineBuilder

    views = PillowViews(job.views)
    places = list(image_places(job.shards))

    def source() -> Iterator[Place]:
        while True:
            yield from random.sample(places, len(places))

    def make(place: Place) -> Pair:
        return views.crop(Image.fromarray(_decode_source_crop(place, views)))

    def stack(pairs: list[Pair]) -> Pair:
        online, target = zip(*pairs, strict=True)
        return torch.stack(online), torch.stack(target)

    builder = PipelineBuilder().add_source(source()).pipe(make, concurrency=job.threads)
    builder = builder.aggregate(job.batch_size, drop_last=True).pipe(stack).add_sink(2)
    pipeline = builder.build(num_threads=job.threads)
    with pipeline.auto_stop():
        yield pipeline.get_iterator()


def _decode_source_crop(place: Place, views: PillowViews) -> np.ndarray:
    import spdl.io

    crop, _ = views.source_crop.transforms
    image_size = torch.empty(0, place.height, place.width)  # only its shape is looked at
    window = crop.make_params([image_size])
    side = views.views.source_crop_size
    steps = [
        "crop=w={width}:h={height}:x={left}:y={top}:exact=1".format(**window),
        f"scale=w={side}:h={side}:flags=bicubic",
        *(["hflip"] if random.random() < views.views.hflip_prob else []),
        "format=pix_fmts=rgb24",
    ]
    buffer = spdl.io.load_image(read_image(place), filter_desc=",".join(steps))
    pixels: np.ndarray = spdl.io.to_numpy(buffer)
    return pixels


def _tiny_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()
