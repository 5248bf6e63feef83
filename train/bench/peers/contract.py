"""What a peer is: other people's loader on the same images, making the two views that it can.

A peer is a context manager that gives endless (online, target) batches. It says what its views are, where
they differ from ours, and its version; a peer that cannot run here is named with the reason.

    geometry   source crop by RandomResizedCrop, flip; online crop at (0, 0), target crop shifted
    colours    on the target: jitter (p .8), grayscale (p .2), Gaussian blur (p .5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from cmae.pipeline import ViewConfig

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet, in levels: what a peer that normalises takes out."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Online and target views of a batch."""


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
