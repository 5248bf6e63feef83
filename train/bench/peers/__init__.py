"""Other people's loaders on the same images, one file a peer."""

from __future__ import annotations

from cmae.train.bench.peers import (
    dali_reader,
    kornia_color,
    spdl_pipeline,
    torch_dataloader,
    webdataset_loader,
)
from cmae.train.bench.peers.contract import Absent, Job, Peer
from cmae.train.bench.peers.ffcv import FFCV


def find_peers(job: Job) -> list[Peer | Absent]:
    """Every peer for this colour mode: 'exact' has torchvision's colours, 'fast' DALI's."""
    if job.views.color == "fast":
        return [*dali_reader.find(job)]
    python = [*torch_dataloader.find(job), *webdataset_loader.find(job)]
    dali = [] if job.views.color == "exact" else [*dali_reader.find(job)]
    kornia = [*kornia_color.find(job)] if job.views.color == "exact" else []
    return [*python, *dali, *kornia, *spdl_pipeline.find(job), FFCV]
