from .analysis.flops import count_multiply_adds, count_parameters
from .cmae import CMAE, build_model, create_model
from .config import PRESETS, ModelConfig
from .export.checkpoints import from_authors, from_mae, to_timm
from .export.convmae import from_convmae, to_convmae
from .export.stored import load_model
from .heads import set_all_reduce
from .losses import Losses
from .masking import draw_mask

__all__ = [
    "CMAE",
    "PRESETS",
    "Losses",
    "ModelConfig",
    "build_model",
    "count_multiply_adds",
    "count_parameters",
    "create_model",
    "draw_mask",
    "from_authors",
    "from_convmae",
    "from_mae",
    "load_model",
    "set_all_reduce",
    "to_convmae",
    "to_timm",
]
