"""A run of small views whose model is never built, opened for the profiler."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from cmae.model import ModelConfig
from cmae.pipeline import ViewConfig
from cmae.train.config import Config, DataConfig, OptimConfig, SpeedConfig
from cmae.train.distributed import World
from cmae.train.profiling.measure.subject import Subject, open_subject

CPU = torch.device("cpu")


def quick_config(shards: str) -> Config:
    """Batches of 8 images of 32 px, one decoding thread."""
    views = ViewConfig(img_size=32, source_crop_size=40, target_shift=8, color="none")
    return Config(
        speed=SpeedConfig(device="cpu", num_threads=1),
        data=DataConfig(shards=shards, views=views),
        model=ModelConfig(img_size=32, patch_size=8),
        optim=OptimConfig(global_batch_size=8, precision="fp32"),
    )


def open_quick(shards: str, **options: Any) -> AbstractContextManager[Subject]:
    """The subject of such a run; its step does nothing unless `step` is given."""
    step = options.pop("step", lambda batches: None)
    return open_subject(quick_config(shards), World(0, 1, CPU), step, **options)
