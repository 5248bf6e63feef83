"""Tar shards in, batches of views and masks out. Knows no model; rank and world size are integers to it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmae.pipeline.batch import Batch, LoaderState
    from cmae.pipeline.errors import DataError, RemoteError
    from cmae.pipeline.loader.factory import build_loader
    from cmae.pipeline.loader.loader import Loader
    from cmae.pipeline.loader.synthetic import synthetic_batches
    from cmae.pipeline.remote.client import RemoteConfig
    from cmae.pipeline.remote.progress import FillProgress
    from cmae.pipeline.sampling.epoch_plan import EpochPlan
    from cmae.pipeline.sources.expand import expand_shards
    from cmae.pipeline.stage_stats import LoaderSnapshot, StageSnapshot
    from cmae.pipeline.views.config import ViewConfig
    from cmae.pipeline.views.params import ViewParams, draw_view_params

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

_MODULES = {
    "batch": ("Batch", "LoaderState"),
    "errors": ("DataError", "RemoteError"),
    "loader.factory": ("build_loader",),
    "loader.loader": ("Loader",),
    "loader.synthetic": ("synthetic_batches",),
    "remote.client": ("RemoteConfig",),
    "remote.progress": ("FillProgress",),
    "sampling.epoch_plan": ("EpochPlan",),
    "sources.expand": ("expand_shards",),
    "stage_stats": ("LoaderSnapshot", "StageSnapshot"),
    "views.config": ("ViewConfig",),
    "views.params": ("ViewParams", "draw_view_params"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
