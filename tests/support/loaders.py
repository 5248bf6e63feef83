"""A loader of small views over any shards."""

from __future__ import annotations

from pathlib import Path

from cmae.pipeline import Loader, ViewConfig, build_loader
from support.pipeline_data import toy_mask

VIEWS = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)


def open_loader(shards: str | Path, **options: object) -> Loader:
    settings = {"batch_size": 8, "global_batch_size": 16, "num_threads": 2, "seed": 5}
    return build_loader(shards, VIEWS, draw_mask=toy_mask, **(settings | options))
