from .backend import use_backend
from .block_mask import block_mask
from .color_jitter import color_jitter
from .info_nce import info_nce
from .masked_mse import masked_mse
from .patch_gather import patch_gather

__all__ = [
    "block_mask",
    "color_jitter",
    "info_nce",
    "masked_mse",
    "patch_gather",
    "use_backend",
]
