"""torch's DataLoader for the geometry, kornia's augmentations for the colours, on the device."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version

import torch

from cmae.train.bench.peers.contract import Absent, Job, Pair, Peer
from cmae.train.bench.peers.pillow_views import PillowViews
from cmae.train.bench.peers.torch_dataloader import torch_dataloader


def find(job: Job) -> Iterator[Peer | Absent]:
    """kornia, where it is installed."""
    name = "torch DataLoader, PIL + kornia on the device"
    try:
        importlib.import_module("kornia.augmentation")
    except ImportError as error:
        yield Absent(name, f"needs kornia: {error}")
        return
    yield Peer(
        name,
        "Pillow geometry, kornia jitter, grayscale and 23-tap blur on float batches",
        f"torch {torch.__version__}, kornia {version('kornia')}",
        "uint8 NHWC",
        kornia_color,
    )


@contextlib.contextmanager
def kornia_color(job: Job) -> Iterator[Iterator[Pair]]:
    """Workers decode and crop; colours of a whole batch on the device, each image its own."""
    from kornia import augmentation as kornia

    views, device = job.views, torch.device(job.device)
    color = torch.nn.Sequential(
        kornia.ColorJitter(
            views.brightness, views.contrast, views.saturation, views.hue, p=views.jitter_prob
        ),
        kornia.RandomGrayscale(p=views.grayscale_prob),
        kornia.RandomGaussianBlur(
            (23, 23), (views.blur_sigma_min, views.blur_sigma_max), p=views.blur_prob
        ),
    ).to(device)

    def paint(target: torch.Tensor) -> torch.Tensor:
        pixels = target.to(device).permute(0, 3, 1, 2).float() / 255
        painted: torch.Tensor = 255 * color(pixels)
        return painted.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()

    plain = replace(job, views=replace(views, color="none"))
    with torch_dataloader(plain, PillowViews(plain.views)) as pairs:
        yield ((online.to(device), paint(target)) for online, target in pairs)
