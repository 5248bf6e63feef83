"""Tar shards in, batches of views and masks out. Knows no model; rank and world size are integers to it."""

from cmae.pipeline.batch import Batch, LoaderState
from cmae.pipeline.counters import LoaderSnapshot, StageSnapshot
from cmae.pipeline.health import DataError
from cmae.pipeline.loader import Loader, build_loader
from cmae.pipeline.plan import EpochPlan
from cmae.pipeline.remote import FillProgress, RemoteConfig, RemoteError
from cmae.pipeline.synthetic import synthetic_batches
from cmae.pipeline.urls import expand_shards
from cmae.pipeline.views import ViewConfig, ViewParams, draw_view_params

__all__ = [
    "Batch",
    "DataError",
    "EpochPlan",
    "FillProgress",
    "Loader",
    "LoaderSnapshot",
    "LoaderState",
    "RemoteConfig",
    "RemoteError",
    "StageSnapshot",
    "ViewConfig",
    "ViewParams",
    "build_loader",
    "draw_view_params",
    "expand_shards",
    "synthetic_batches",
]
