"""torch's DataLoader over the tars, with three ways to make the views."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch

from cmae.train.bench.images import image_places, read_image
from cmae.train.bench.peers.contract import Job, Pair, Peer
from cmae.train.bench.peers.pillow_views import NormalisedViews, PillowViews, describe_pillow


def find(job: Job) -> Iterator[Peer]:
    """Pillow's views; with colours also torchvision's on tensors, and the authors' floats."""
    pillow = describe_pillow(job.views)
    versions = f"torch {torch.__version__}, Pillow {version('pillow')}"
    yield Peer(
        "torch DataLoader, PIL",
        pillow,
        versions,
        "uint8 NHWC",
        lambda job: torch_dataloader(job, PillowViews(job.views)),
    )
    if job.views.color != "exact":
        return
    yield Peer(
        "torch DataLoader, PIL + torchvision v2 tensors",
        "Pillow geometry, torchvision v2 colours and 23-tap blur on uint8 tensors",
        f"{versions}, torchvision {version('torchvision')}",
        "uint8 NHWC",
        lambda job: torch_dataloader(job, PillowViews(job.views, tensor_color=True)),
    )
    yield Peer(
        "authors' loader, re-created from the recipe",
        f"{pillow}; both views normalised to float32 in the worker",
        versions,
        "float32 NCHW",
        lambda job: torch_dataloader(job, NormalisedViews(job.views)),
    )


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
    # Ends the workers.
    del batches


def _endless(loader: torch.utils.data.DataLoader[Pair]) -> Iterator[Any]:
    while True:
        yield from loader
