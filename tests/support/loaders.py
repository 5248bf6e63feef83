"""A loader of small views over any shards, its configuration and its place given as plain options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from cmae.pipeline import Loader, LoaderConfig, ViewConfig, build_loader
from support.pipeline_data import toy_mask

VIEWS = ViewConfig(img_size=32, source_crop_size=40, target_shift=8)


def loader_of(
    shards: str | Path | Sequence[str | Path], views: ViewConfig, **options: object
) -> Loader:
    """The loader of shards; options are fields of LoaderConfig and arguments of `build_loader`."""
    names = {field.name for field in fields(LoaderConfig)}
    given = {name: options.pop(name) for name in names & options.keys()}
    several = not isinstance(shards, str | Path)
    paths = [str(one) for one in shards] if several else str(shards)
    return build_loader(LoaderConfig(shards=paths, views=views, **given), **options)


def open_loader(shards: str | Path | Sequence[str | Path], **options: object) -> Loader:
    settings = {"batch_size": 8, "global_batch_size": 16, "num_threads": 2, "seed": 5}
    return loader_of(shards, VIEWS, **{"draw_mask": toy_mask} | settings | options)
