"""DALI's own readers and its own geometry."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

from torch.utils.dlpack import from_dlpack

from cmae.pipeline import ViewConfig
from cmae.train.bench.peers.contract import Absent, Job, Pair, Peer


def find(job: Job) -> Iterator[Peer | Absent]:
    """DALI from tars, and from files where the images are unpacked."""
    views = "DALI geometry (image_random_crop, antialiased cubic)"
    if job.views.color != "none":
        views += ", color_twist in a fixed order (grey = no saturation), gaussian_blur"
    for reader, why_not in (
        ("webdataset", None),
        ("file", "it reads files, and the images were not unpacked" if not job.images else None),
    ):
        name = f"DALI, readers.{reader}"
        try:
            dali_version = importlib.import_module("nvidia.dali").__version__
        except ImportError as error:
            why_not = f"import nvidia.dali: {error}"
        if why_not:
            yield Absent(name, why_not)
            continue
        backend = "mixed decode on the GPU" if job.device == "cuda" else "CPU graph"
        yield Peer(
            name,
            f"{views}; {backend}",
            f"DALI {dali_version}",
            "uint8 NHWC",
            partial(dali_reader, reader=reader),
        )


@contextlib.contextmanager
def dali_reader(job: Job, reader: str) -> Iterator[Iterator[Pair]]:
    """A DALI pipeline from its reader to the views, as its examples are written."""
    pipeline = _dali_pipeline(job, reader)
    pipeline.build()

    def batches() -> Generator[Pair]:
        while True:
            online, target = (from_dlpack(output.as_tensor()) for output in pipeline.run())
            yield online, target

    running = batches()
    yield running
    running.close()
    del pipeline


def _dali_pipeline(job: Job, reader: str) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali import math as dali_math
    from nvidia.dali.pipeline import pipeline_def

    views, on_gpu = job.views, job.device == "cuda"

    @pipeline_def(
        batch_size=job.batch_size,
        num_threads=job.threads,
        device_id=0 if on_gpu else None,  # type: ignore[arg-type]  # None: no GPU
        prefetch_queue_depth=2,
        seed=1,
    )
    def graph() -> Any:
        encoded: Any
        if reader == "file":
            assert job.images is not None, "the images were not unpacked"
            files = sorted(str(path) for path in job.images.rglob("*.jpg"))
            encoded, _ = fn.readers.file(files=files, random_shuffle=True, name="reader")
        else:
            encoded = fn.readers.webdataset(
                paths=job.shards,
                ext=["jpg;jpeg"],
                missing_component_behavior="error",
                random_shuffle=True,
                name="reader",
            )
        source_crop: Any = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if on_gpu else "cpu",
            random_area=[views.min_area, views.max_area],
            random_aspect_ratio=[views.min_aspect, views.max_aspect],
            num_attempts=10,
            adjust_orientation=False,
        )
        side = [views.source_crop_size] * 2
        cubic = types.DALIInterpType.INTERP_CUBIC
        source_crop = fn.resize(source_crop, size=side, interp_type=cubic, antialias=True)
        source_crop = fn.flip(
            source_crop, horizontal=fn.random.coin_flip(probability=views.hflip_prob)
        )
        shift = fn.random.uniform(range=[0, views.target_shift + 1], shape=[2])
        shift = fn.cast(dali_math.floor(shift), dtype=types.DALIDataType.INT32)
        shape = [views.img_size] * 2
        online = fn.slice(source_crop, start=[0, 0], shape=shape, axes=[0, 1])
        target = fn.slice(source_crop, start=shift, shape=shape, axes=[0, 1])
        return online, target if views.color == "none" else _dali_colors(target, views)

    return graph()


def _dali_colors(target: Any, views: ViewConfig) -> Any:
    """DALI's closest: one colour twist in a fixed order (grey = no saturation), one blur."""
    from nvidia.dali import fn

    def chance(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability)

    def factor(strength: float) -> Any:
        return 1 + jitter * fn.random.uniform(range=[-strength, strength])

    jitter = chance(views.jitter_prob)
    turn = 360 * views.hue
    target = fn.color_twist(
        target,
        brightness=factor(views.brightness),
        contrast=factor(views.contrast),
        saturation=factor(views.saturation) * (1 - chance(views.grayscale_prob)),
        hue=jitter * fn.random.uniform(range=[-turn, turn]),
    )
    sigma = fn.random.uniform(range=[views.blur_sigma_min, views.blur_sigma_max])
    # A blur cannot be left out for one image of a batch: .01 px is three taps that change nothing.
    blurred = chance(views.blur_prob)
    return fn.gaussian_blur(target, sigma=blurred * sigma + (1 - blurred) * 0.01)
