"""Other people's loaders on the same images, each making the two views that it can.

A peer is a context manager that gives endless (online, target) batches. It says what its views are, where
they differ from ours, and its version; a peer that cannot run here is named with the reason.

    geometry   RandomResizedCrop to the master, flip, online crop at (0, 0), target crop shifted by 0..31 px
    colours    on the target: jitter (p .8), grayscale (p .2), Gaussian blur (p .5)
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image, ImageFilter
from torch.utils.dlpack import from_dlpack
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from cmae.pipeline import ViewConfig
from cmae.pipeline.formats.shard_index import load_index

Pair = tuple[torch.Tensor, torch.Tensor]
"""Online and target views of a batch."""

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Job:
    """What every loader is asked for."""

    shards: list[str]
    images: Path | None
    """Folder with the same images as files; None = not unpacked."""
    views: ViewConfig
    batch_size: int
    threads: int
    """Threads or worker processes."""
    device: str


class Peer(NamedTuple):
    """A loader that runs here."""

    name: str
    views: str
    """What exactly it makes."""
    version: str
    layout: str
    """'uint8 NHWC', or 'float32 NCHW' with ImageNet's mean and deviation taken out."""
    open: Callable[[Job], AbstractContextManager[Iterator[Pair]]]


class Absent(NamedTuple):
    """A loader that does not run here."""

    name: str
    reason: str


# --- views made image by image in Python ----------------------------------------------------------


class PillowViews:
    """Pillow makes the geometry; the colours come from Pillow too, or from torchvision v2 on tensors."""

    def __init__(self, views: ViewConfig, *, tensor_color: bool = False) -> None:
        self.views = views
        self.tensor_color = tensor_color
        self.master = v2.Compose(
            [
                v2.RandomResizedCrop(
                    views.source_crop_size,
                    scale=(views.min_area, views.max_area),
                    ratio=(views.min_aspect, views.max_aspect),
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.RandomHorizontalFlip(views.hflip_prob),
            ]
        )
        sigma = (views.blur_sigma_min, views.blur_sigma_max)
        blur = v2.GaussianBlur(23, sigma) if tensor_color else self.blur
        jitter = v2.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
        self.color = v2.Compose(
            [
                v2.RandomApply([jitter], views.jitter_prob),
                v2.RandomGrayscale(views.grayscale_prob),
                v2.RandomApply([blur], views.blur_prob),
            ]
        )

    def blur(self, image: Image.Image) -> Image.Image:
        """Pillow's blur: torchvision's is a float convolution, several times slower on a CPU."""
        sigma = random.uniform(self.views.blur_sigma_min, self.views.blur_sigma_max)
        return image.filter(ImageFilter.GaussianBlur(sigma))

    def __call__(self, data: bytes) -> Pair:
        """Both views of a JPEG, uint8 (H, W, 3)."""
        return self.cut(self.master(Image.open(io.BytesIO(data)).convert("RGB")))

    def cut(self, master: Image.Image) -> Pair:
        """Both views of a master."""
        side, shift = self.views.img_size, self.views.target_shift
        top, left = random.randint(0, shift), random.randint(0, shift)
        online = master.crop((0, 0, side, side))
        target: Any = master.crop((left, top, left + side, top + side))
        if self.tensor_color:
            target = torch.from_numpy(np.array(target)).permute(2, 0, 1)
        if self.views.color != "none":
            target = self.color(target)
        if self.tensor_color:
            return _to_tensor(online), target.permute(1, 2, 0).contiguous()
        return _to_tensor(online), _to_tensor(target)


class NormalisedViews(PillowViews):
    """The authors' loader as their paper and recipe describe it: both views leave the worker as floats."""

    def cut(self, master: Image.Image) -> Pair:
        """Both views of a master, float32 (3, H, W), mean and deviation of ImageNet taken out."""
        online, target = (tv.to_dtype(_chw(view), torch.float32) for view in super().cut(master))
        return tv.normalize(online, MEAN, STD), tv.normalize(target, MEAN, STD)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def _chw(view: torch.Tensor) -> torch.Tensor:
    return view.permute(2, 0, 1)


class TarImages(torch.utils.data.Dataset[Pair]):
    """The images of the tars by their offsets."""

    def __init__(self, shards: list[str], make_views: Callable[[bytes], Pair]) -> None:
        self.places = list(image_places(shards))
        self.make_views = make_views

    def __len__(self) -> int:
        """Images in all shards."""
        return len(self.places)

    def __getitem__(self, index: int) -> Pair:
        """Both views of one image."""
        return self.make_views(read_image(self.places[index]))


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


# --- torch DataLoader, webdataset -----------------------------------------------------------------


@contextlib.contextmanager
def torch_dataloader(job: Job, make_views: Callable[[bytes], Pair]) -> Iterator[Iterator[Pair]]:
    """A map-style data set over the tars, one worker process for each core."""
    loader = torch.utils.data.DataLoader(
        TarImages(job.shards, make_views),
        batch_size=job.batch_size,
        shuffle=True,
        num_workers=job.threads,
        drop_last=True,
        persistent_workers=True,
    )
    batches = _endless(loader)
    yield ((online, target) for online, target in batches)
    del batches  # ends the workers


@contextlib.contextmanager
def webdataset_loader(job: Job) -> Iterator[Iterator[Pair]]:
    """The webdataset library's own reader and shuffle in the workers of a DataLoader."""
    make_views = PillowViews(job.views)
    # Shards are drawn with replacement: any number of workers can share any number of shards.
    dataset = wds.WebDataset(job.shards, resampled=True, shardshuffle=False)
    dataset = dataset.shuffle(256).to_tuple("jpg;jpeg").map(lambda sample: make_views(sample[0]))
    loader = wds.WebLoader(
        dataset.batched(job.batch_size, partial=False), batch_size=None, num_workers=job.threads
    )
    batches = iter(loader)
    yield ((online, target) for online, target in batches)
    del batches


def _endless(loader: torch.utils.data.DataLoader[Pair]) -> Iterator[Any]:
    while True:
        yield from loader


# --- DALI's own readers ---------------------------------------------------------------------------


@contextlib.contextmanager
def dali_reader(job: Job, reader: str) -> Iterator[Iterator[Pair]]:
    """A DALI pipeline from its reader to the views, as its examples are written."""
    pipeline = _dali_pipeline(job, reader)
    pipeline.build()

    def batches() -> Iterator[Pair]:
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
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=2,
        seed=1,
    )
    def graph() -> Any:
        if reader == "file":
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
        master = fn.decoders.image_random_crop(
            encoded,
            device="mixed" if on_gpu else "cpu",
            random_area=[views.min_area, views.max_area],
            random_aspect_ratio=[views.min_aspect, views.max_aspect],
            num_attempts=10,
            adjust_orientation=False,
        )
        side = [views.source_crop_size] * 2
        cubic = types.DALIInterpType.INTERP_CUBIC
        master = fn.resize(master, size=side, interp_type=cubic, antialias=True)
        master = fn.flip(master, horizontal=fn.random.coin_flip(probability=views.hflip_prob))
        shift = fn.random.uniform(range=[0, views.target_shift + 1], shape=[2])
        shift = fn.cast(dali_math.floor(shift), dtype=types.DALIDataType.INT32)
        shape = [views.img_size] * 2
        online = fn.slice(master, start=[0, 0], shape=shape, axes=[0, 1])
        target = fn.slice(master, start=shift, shape=shape, axes=[0, 1])
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


# --- SPDL -----------------------------------------------------------------------------------------


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
        return views.cut(Image.fromarray(_spdl_master(place, views)))

    def stack(pairs: list[Pair]) -> Pair:
        online, target = zip(*pairs, strict=True)
        return torch.stack(online), torch.stack(target)

    builder = PipelineBuilder().add_source(source()).pipe(make, concurrency=job.threads)
    builder = builder.aggregate(job.batch_size, drop_last=True).pipe(stack).add_sink(2)
    pipeline = builder.build(num_threads=job.threads)
    with pipeline.auto_stop():
        yield pipeline.get_iterator()


def _spdl_master(place: Place, views: PillowViews) -> np.ndarray:
    import spdl.io

    crop, _ = views.master.transforms
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
    return spdl.io.to_numpy(buffer)


# --- the list -------------------------------------------------------------------------------------


def find_peers(job: Job) -> list[Peer | Absent]:
    """Every peer for this colour mode: 'exact' has torchvision's colours, 'fast' DALI's."""
    if job.views.color == "fast":
        return [*_dali_peers(job)]
    color = job.views.color == "exact"
    pillow = "Pillow geometry" + (", torchvision jitter and blur by Pillow" if color else "")
    torch_version = f"torch {torch.__version__}, Pillow {version('pillow')}"
    peers: list[Peer | Absent] = [
        Peer(
            "torch DataLoader, PIL",
            pillow,
            torch_version,
            "uint8 NHWC",
            lambda job: torch_dataloader(job, PillowViews(job.views)),
        ),
    ]
    if color:
        peers.append(
            Peer(
                "torch DataLoader, PIL + torchvision v2 tensors",
                "Pillow geometry, torchvision v2 colours and 23-tap blur on uint8 tensors",
                f"{torch_version}, torchvision {version('torchvision')}",
                "uint8 NHWC",
                lambda job: torch_dataloader(job, PillowViews(job.views, tensor_color=True)),
            )
        )
        peers.append(
            Peer(
                "authors' loader, re-created from the recipe",
                f"{pillow}; both views normalised to float32 in the worker",
                torch_version,
                "float32 NCHW",
                lambda job: torch_dataloader(job, NormalisedViews(job.views)),
            )
        )
    peers.append(
        Peer(
            "webdataset + DataLoader, PIL",
            f"{pillow}; shards drawn with replacement, window shuffle",
            f"webdataset {version('webdataset')}",
            "uint8 NHWC",
            webdataset_loader,
        )
    )
    if not color:
        peers += _dali_peers(job)
    return [*peers, _spdl_peer(pillow), _FFCV]


def _dali_peers(job: Job) -> Iterator[Peer | Absent]:
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
            lambda job, reader=reader: dali_reader(job, reader),
        )


def _spdl_peer(pillow: str) -> Peer | Absent:
    name = "SPDL"
    try:
        importlib.import_module("spdl.pipeline")
        importlib.import_module("spdl.io").demux_image(_tiny_jpeg())
    except (ImportError, RuntimeError) as error:  # RuntimeError: it found no FFmpeg that it knows
        return Absent(name, f"needs spdl, spdl_io and FFmpeg 4-9: {str(error)[:120]}")
    colors = pillow.removeprefix("Pillow geometry")
    return Peer(
        name,
        f"FFmpeg decode, crop, bicubic scale and flip in threads{colors}",
        f"spdl_io {version('spdl_io')}",
        "uint8 NHWC",
        spdl_pipeline,
    )


_FFCV = Absent(
    "FFCV",
    "1.0.2 (2023) has no wheel, and its source build stops where pkg-config does not find opencv and "
    "libturbojpeg; it reads no tars, so the images would be written again as .beton",
)


def _tiny_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    return file.getvalue()


# --- do the views hold what they say? -------------------------------------------------------------


def check_peer(peer: Peer, job: Job, *, expected_mean: float, batches: int = 3) -> None:
    """Assert shapes, types, statistics, and without colours that the target is a shifted crop.

    Args:
        peer: whose first batches are looked at.
        job: what it is asked for.
        expected_mean: of our online views, in levels.
        batches: to look at.

    Raises:
        AssertionError: Names the peer and what does not hold.
    """
    with peer.open(job) as pairs:
        found = [next(pairs) for _ in range(batches)]
    online, target = (torch.cat([_to_uint8_nhwc(pair[i], peer) for pair in found]) for i in (0, 1))
    side = job.views.img_size
    shape = (batches * job.batch_size, side, side, 3)
    for name, view in (("online", online), ("target", target)):
        assert view.shape == shape, f"{peer.name}: {name} is {tuple(view.shape)}, not {shape}"
        mean, deviation = view.float().mean().item(), view.float().std().item()
        assert abs(mean - expected_mean) < 12, f"{peer.name}: {name} mean {mean:.1f} levels"
        assert deviation > 20, f"{peer.name}: {name} deviation {deviation:.1f} levels"
    if job.views.color == "none":
        shifts = [_find_shift(a, b, job.views) for a, b in zip(online, target, strict=True)]
        assert None not in shifts, f"{peer.name}: a target is no shifted crop of its master"
        assert len(set(shifts)) > 1, f"{peer.name}: every target is shifted alike"
    else:
        changed = (online[:, : side // 2] != target[:, : side // 2]).any((1, 2, 3))
        assert changed.any(), f"{peer.name}: no target differs from its online view"
    flat = online.flatten(1).float()
    assert len(torch.unique(flat.mean(1))) > len(flat) // 2, f"{peer.name}: images repeat"


def _to_uint8_nhwc(view: torch.Tensor, peer: Peer) -> torch.Tensor:
    dtype = peer.layout.split()[0]
    assert view.dtype == getattr(torch, dtype), f"{peer.name}: {view.dtype}, not {dtype}"
    if peer.layout == "float32 NCHW":
        scale, shift = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
        view = (view * scale + shift).round().to(torch.uint8).permute(0, 2, 3, 1)
    return view.cpu()


def _find_shift(
    online: torch.Tensor, target: torch.Tensor, views: ViewConfig
) -> tuple[int, int] | None:
    """(y, x) by which the target lies further down and right in the master; None if there is none."""
    side, limit = views.img_size, views.target_shift + 1
    for top in range(limit):
        for left in range(limit):
            is_row = torch.equal(online[top, left:], target[0, : side - left])  # saves the rest
            if is_row and torch.equal(online[top:, left:], target[: side - top, : side - left]):
                return top, left
    return None
