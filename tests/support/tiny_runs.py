"""The smallest models, batches and runs that several tests train."""

from __future__ import annotations

from pathlib import Path

import torch

from cmae.model import ModelConfig, draw_mask
from cmae.pipeline import Batch, LoaderState
from cmae.train.config import OptimConfig
from cmae.train.config_parser import parse_config
from cmae.train.distributed import World
from cmae.train.loop.pretrain import pretrain
from cmae.train.loop.training import Outcome

SMALL = ModelConfig(
    img_size=32,
    patch_size=8,
    embed_dim=24,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=2,
    decoder_num_heads=2,
    feature_decoder_depth=1,
    proj_hidden_dim=16,
    proj_dim=8,
    mask_ratio=0.5,
)
OPTIM = OptimConfig(global_batch_size=8, precision="fp32")
ALONE = World(0, 1, torch.device("cpu"))


def make_batch(
    config: ModelConfig, first: int, size: int, dtype: torch.dtype = torch.uint8
) -> Batch:
    index = torch.arange(first, first + size)
    pixels = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 64, 32, 32, 3), generator=pixels, dtype=torch.uint8)
    keep, mask = draw_mask(config, index, seed=0, epoch=0)
    online, target = images[:, first : first + size]
    if dtype is torch.float64:  # normalised floats, which keep the model's precision
        online, target = (
            (view.double().permute(0, 3, 1, 2) - 128) / 64 for view in (online, target)
        )
    return Batch(
        online=online,
        target=target,
        ids_keep=keep,
        ids_mask=mask,
        sample_id=index,
        label=torch.zeros(size, dtype=torch.int64),
        epoch=0,
        state=LoaderState(seed=0, epoch=0, offset=0, digest=""),
    )


MODEL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "feature_decoder_depth": 1,
    "proj_hidden_dim": 16,
    "proj_dim": 8,
    "mask_ratio": 0.5,
}


def arguments(shards: str, out: Path, **overrides: object) -> list[str]:
    settings: dict[str, object] = {
        "run.out": out,
        "run.log_every": 1,
        "run.checkpoint_every": 2,
        "run.progress": "false",
        "speed.device": "cpu",
        "data.num_threads": 2,
        "data.shards": shards,
        "data.views.source_crop_size": 40,
        "data.views.target_shift": 8,
        "optim.global_batch_size": 8,
        "optim.total_steps": 8,
        "optim.precision": "fp32",
        "optim.lr_per_256": 0.01,
        **{f"model.{key}": value for key, value in MODEL.items()},
        **overrides,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def run(shards: str, out: Path, **overrides: object) -> Outcome:
    return pretrain(parse_config(arguments(shards, out, **overrides)))
