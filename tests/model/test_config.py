"""Geometry and refusals of the configuration; masks and momentum that follow from it."""

from __future__ import annotations

import math

import pytest
import torch

from cmae.model import ModelConfig, draw_mask
from cmae.train.loop.schedules import ema_momentum

MAE = {"contrastive_loss": "none", "mask_ratio": 0.75, "mask_unit": 1, "pos_embed_order": "column"}


def test_authors_recipe_keeps_68_and_masks_128_patches():
    config = ModelConfig()
    assert (config.num_keep, config.num_mask, config.num_patches) == (68, 128, 196)
    ids_keep, ids_mask = draw_mask(config, torch.arange(4), seed=0, epoch=0)
    assert (ids_keep.shape, ids_mask.shape) == ((4, 68), (4, 128))


def test_mae_keeps_49_and_masks_147_patches():
    config = ModelConfig(**MAE)
    assert (config.num_keep, config.num_mask) == (49, 147)
    ids_keep, ids_mask = draw_mask(config, torch.arange(4), seed=0, epoch=0)
    assert (ids_keep.shape, ids_mask.shape) == ((4, 49), (4, 147))


@pytest.mark.parametrize(
    ("ratio", "img_size", "patch_size", "kept"),
    [
        (0.9, 80, 8, 10),  # 100 * (1 - .9) is 9.999999999999998 in floating point
        (0.6, 80, 8, 40),
        (0.65, 80, 8, 35),
        (0.75, 224, 16, 49),
        (0.75, 224, 14, 64),
        (0.99, 112, 8, 1),
    ],
)
def test_number_of_visible_patches_is_free_of_float_error(ratio, img_size, patch_size, kept):
    config = ModelConfig(img_size=img_size, patch_size=patch_size, mask_ratio=ratio, mask_unit=1)
    assert config.num_keep == kept


def test_mask_is_made_of_whole_units():
    ids_keep, _ = draw_mask(ModelConfig(), torch.arange(8), seed=0, epoch=0)
    kept = torch.zeros(8, 196).scatter(1, ids_keep.long(), 1.0)
    units = kept.view(8, 7, 2, 7, 2).sum(dim=(2, 4))
    assert ((units == 0) | (units == 4)).all()
    assert ((units == 4).sum(dim=(1, 2)) == 17).all()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"img_size": 225}, "img_size is 225"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"img_size": 112, "patch_size": 16}, "mask_unit is 2"),
        ({"mask_unit": 0}, "mask_unit is 0"),
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0"),
        ({"mask_ratio": 1.0}, "mask_ratio is 1.0"),
        ({"mask_ratio": 0.999}, "mask_ratio is 0.999"),
        ({"num_heads": 7}, "num_heads is 7"),
        ({"embed_dim": 30, "num_heads": 3}, "embed_dim is 30"),
        ({"decoder_num_heads": 3}, "decoder_num_heads is 3"),
        ({"depth": 0}, "depth is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"momentum": 1.5}, "momentum is 1.5"),
        ({"contrastive_weight": -1.0}, "contrastive_weight is -1.0"),
        ({"contrastive_loss": "simclr"}, "contrastive_loss is 'simclr'"),
        (
            {"contrastive_loss": "none", "reconstruction_weight": 0.0},
            "reconstruction_weight is 0.0",
        ),
        (
            {"feature_decoder": "shared", "reconstruction_weight": 0.0},
            "feature_decoder is 'shared'",
        ),
        ({"pixel_std": (1.0, 0.0, 1.0)}, "pixel_std"),
        ({"encoder": "hybrid", "patch_size": 14}, "patch_size is 14"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig(**fields)


def test_constant_momentum_does_not_move():
    config = ModelConfig()
    assert {ema_momentum(config, step, 100) for step in range(101)} == {0.996}


def test_cosine_momentum_goes_from_its_value_to_one():
    config = ModelConfig(momentum_schedule="cosine", momentum=0.9)
    assert ema_momentum(config, 0, 80) == pytest.approx(0.9)
    assert ema_momentum(config, 20, 80) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)
    assert ema_momentum(config, 40, 80) == pytest.approx(0.95)
    assert ema_momentum(config, 80, 80) == 1


@pytest.mark.parametrize("step", [-1, 11])
def test_momentum_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match=f"step={step}"):
        ema_momentum(ModelConfig(), step, 10)
