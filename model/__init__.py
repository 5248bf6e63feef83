"""Tensors in, tensors out: the CMAE and MAE models."""

from cmae.model.analysis.flops import count_multiply_adds, count_parameters
from cmae.model.cmae import CMAE, build_model
from cmae.model.config import ModelConfig
from cmae.model.export.checkpoints import from_authors, from_mae, to_timm
from cmae.model.heads import set_all_reduce
from cmae.model.losses import Losses
from cmae.model.masking import draw_mask

__all__ = [
    "CMAE",
    "Losses",
    "ModelConfig",
    "build_model",
    "count_multiply_adds",
    "count_parameters",
    "draw_mask",
    "from_authors",
    "from_mae",
    "set_all_reduce",
    "to_timm",
]
