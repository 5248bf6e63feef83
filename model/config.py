"""What the model is: one frozen dataclass; every ablation of the method is one field."""

# Real annotations, no `from __future__ import annotations`: jsonargparse reads them.

from dataclasses import dataclass, replace
from typing import Literal

from cmae.errors import require

MAX_DEPTH = 1000
"""Most blocks; a configuration that asks for more is damaged, and building it would have no end."""
MAX_WIDTH = 1 << 16
"""Widest layer."""
MAX_GRID = 1 << 10
"""Most patches on a side."""

STANDARD_MEAN = (123.675, 116.28, 103.53)
STANDARD_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class ModelConfig:
    """CMAE ViT-B/16 with the values of the authors' code; override fields for everything else."""

    encoder: Literal["vit", "hybrid"] = "vit"
    """Encoder family: plain ViT, or convolutional stages before the transformer (ConvMAE)."""
    img_size: int = 224
    """Side of the square input, px; a multiple of patch_size."""
    patch_size: int = 16
    """Side of a patch, px; 16 for the hybrid encoder (4 * 2 * 2)."""
    embed_dim: int = 768
    """Width of the encoder; a multiple of 4 and of num_heads. S 384, B 768, L 1024, H 1280."""
    depth: int = 12
    """Transformer blocks of the encoder, >= 1. S and B 12, L 24, H 32, hybrid B 11."""
    num_heads: int = 12
    """Attention heads of the encoder. S 6, B 12, L and H 16."""
    mlp_ratio: float = 4.0
    """Hidden width of the encoder's MLPs over their input width, > 0."""
    decoder_embed_dim: int = 512
    """Width of both decoders; a multiple of 4 and of decoder_num_heads."""
    decoder_depth: int = 8
    """Blocks of the pixel decoder, >= 1."""
    decoder_num_heads: int = 16
    """Attention heads of both decoders."""
    decoder_mlp_ratio: float = 4.0
    """Hidden width of the decoders' MLPs over their input width, > 0."""
    feature_decoder: Literal["own", "shared", "none"] = "own"
    """'own': a second decoder; 'shared': the pixel decoder's blocks with a head of its own;
    'none': the mean of the visible encoder tokens goes to the projector."""
    feature_decoder_depth: int = 2
    """Blocks of the feature decoder, >= 1; used when feature_decoder is 'own'."""
    proj_hidden_dim: int = 1536
    """Hidden width of projector and predictor, >= 1."""
    proj_dim: int = 256
    """Width of the space in which similarity is measured, >= 1."""
    predictor: bool = True
    """Put a predictor after the online projector."""
    head_norm: Literal["batch", "layer"] = "batch"
    """Norm inside projector and predictor. 'batch' uses statistics of the micro-batch over all
    ranks; 'layer' uses none, so results do not depend on how a batch is split."""
    mask_ratio: float = 0.65
    """Share of mask units hidden from the online encoder, 0 < mask_ratio < 1. MAE .75."""
    mask_unit: int = 2
    """Side of a mask unit, patches: a square that is kept or hidden as one; divides img_size / patch_size.
    MAE 1."""
    contrastive_loss: Literal["info_nce", "byol", "none"] = "info_nce"
    """'info_nce': softmax over the bank of keys; 'byol': 2 - 2 cos with the positive only;
    'none': no target branch at all (MAE)."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss (lambda_c of the paper), >= 0."""
    two_tau_factor: bool = True
    """Multiply InfoNCE by 2 * temperature as the authors' code does (0.14 at .07); the paper's
    formula does not."""
    temperature: float = 0.07
    """Divides the cosines in InfoNCE, > 0."""
    reconstruction_weight: float = 1.0
    """Weight of the pixel loss, >= 0; at 0 the pixel decoder is not built."""
    norm_pix_loss: bool = True
    """Normalise each patch of the pixel target by its own mean and variance."""
    target_input: Literal["full", "visible"] = "full"
    """The target encoder sees all patches, or only those that the online encoder sees."""
    target_final_norm: bool = False
    """Give the target encoder the final LayerNorm that the online encoder has."""
    momentum: float = 0.996
    """Share of the old target kept in an update, 0..1 (at the first step of a schedule)."""
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    """'cosine' raises momentum to 1 at the last step."""
    pos_embed_order: Literal["row", "column"] = "row"
    """What the first half of a position embedding's channels encodes. CMAE row, MAE column."""
    pixel_mean: tuple[float, float, float] = STANDARD_MEAN
    """Mean per channel (R, G, B) in units of 0..255, subtracted from inputs and pixel targets."""
    pixel_std: tuple[float, float, float] = STANDARD_STD
    """Standard deviation per channel (R, G, B) in units of 0..255, > 0."""

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_geometry(self)
        _check_widths(self)
        _check_ranges(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return (self.img_size // self.patch_size,) * 2

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def num_keep_units(self) -> int:
        """Visible mask units: the authors' int(units * (1 - mask_ratio)), safe from float error."""
        units = self.num_patches // self.mask_unit**2
        return int(units * (1 - self.mask_ratio) + 1e-9)

    @property
    def num_keep(self) -> int:
        """Visible patches of an image."""
        return self.num_keep_units * self.mask_unit**2

    @property
    def num_mask(self) -> int:
        """Masked patches of an image."""
        return self.num_patches - self.num_keep

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patch tokens: the cls token of a ViT, none in the hybrid encoder."""
        return 1 if self.encoder == "vit" else 0

    @property
    def has_contrast(self) -> bool:
        """The contrastive branch (target, heads) exists."""
        return self.contrastive_loss != "none"

    @property
    def has_reconstruction(self) -> bool:
        """The pixel decoder exists."""
        return self.reconstruction_weight > 0


_CHOICES = {
    "encoder": ("vit", "hybrid"),
    "feature_decoder": ("own", "shared", "none"),
    "head_norm": ("batch", "layer"),
    "contrastive_loss": ("info_nce", "byol", "none"),
    "target_input": ("full", "visible"),
    "momentum_schedule": ("constant", "cosine"),
    "pos_embed_order": ("row", "column"),
}


def _require(holds: bool, config: ModelConfig, key: str, allowed: str) -> None:
    require(holds, key, getattr(config, key), allowed)


def _check_choices(config: ModelConfig) -> None:
    for key, choices in _CHOICES.items():
        _require(getattr(config, key) in choices, config, key, f"one of {choices}")
    _require(
        config.has_contrast or config.has_reconstruction,
        config,
        "reconstruction_weight",
        "> 0 with contrastive_loss='none', or nothing is left to learn",
    )
    _require(
        config.feature_decoder != "shared" or config.has_reconstruction,
        config,
        "feature_decoder",
        "'own' or 'none' with reconstruction_weight=0, which removes the pixel decoder",
    )


def _check_geometry(config: ModelConfig) -> None:
    side = config.img_size // max(config.patch_size, 1)
    _require(config.patch_size >= 1, config, "patch_size", "an integer >= 1")
    _require(
        config.img_size >= 1 and config.img_size % config.patch_size == 0,
        config,
        "img_size",
        f"a positive multiple of patch_size={config.patch_size}",
    )
    _require(
        config.encoder == "vit" or config.patch_size == 16,
        config,
        "patch_size",
        "16 with encoder='hybrid', whose stages make patches of 16 px",
    )
    _require(
        config.mask_unit >= 1 and side % config.mask_unit == 0,
        config,
        "mask_unit",
        f"a divisor of the {side} patches per side (img_size / patch_size)",
    )
    _require(side <= MAX_GRID, config, "img_size", f"at most {MAX_GRID} patches of patch_size")
    _require(0 < config.mask_ratio < 1, config, "mask_ratio", "> 0 and < 1")
    _require(
        0 < config.num_keep < config.num_patches,
        config,
        "mask_ratio",
        f"such that of {(side // config.mask_unit) ** 2} mask units one is kept and one is hidden",
    )


def _check_widths(config: ModelConfig) -> None:
    for key in (
        *("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth"),
        *("decoder_num_heads", "feature_decoder_depth", "proj_hidden_dim", "proj_dim"),
    ):
        _require(getattr(config, key) >= 1, config, key, "an integer >= 1")
    for key in ("depth", "decoder_depth", "feature_decoder_depth"):
        _require(getattr(config, key) <= MAX_DEPTH, config, key, f"<= {MAX_DEPTH}")
    for key in ("embed_dim", "decoder_embed_dim", "proj_hidden_dim", "proj_dim"):
        _require(getattr(config, key) <= MAX_WIDTH, config, key, f"<= {MAX_WIDTH}")
    for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
        _require(
            getattr(config, width) % 4 == 0,
            config,
            width,
            "a multiple of 4, which the 2-D sin-cos position embedding needs",
        )
        _require(
            getattr(config, width) % getattr(config, heads) == 0,
            config,
            heads,
            f"a divisor of {width}={getattr(config, width)}",
        )
    _require(
        config.encoder == "vit" or config.embed_dim % 6 == 0,
        config,
        "embed_dim",
        "a multiple of 6: the hybrid stages have embed_dim / 3 and embed_dim / 2 channels",
    )


def _check_ranges(config: ModelConfig) -> None:
    for key in ("mlp_ratio", "decoder_mlp_ratio", "temperature"):
        _require(getattr(config, key) > 0, config, key, "a number > 0")
    for key in ("contrastive_weight", "reconstruction_weight"):
        _require(getattr(config, key) >= 0, config, key, "a number >= 0")
    _require(0 <= config.momentum <= 1, config, "momentum", "between 0 and 1")
    for key in ("pixel_mean", "pixel_std"):
        _require(len(getattr(config, key)) == 3, config, key, "three numbers (R, G, B)")
    _require(min(config.pixel_std) > 0, config, "pixel_std", "three numbers > 0")


_MAE = ModelConfig(mask_ratio=0.75, mask_unit=1, contrastive_loss="none", pos_embed_order="column")

PRESETS: dict[str, ModelConfig] = {
    "cmae_vit_s": ModelConfig(embed_dim=384, num_heads=6),
    "cmae_vit_b": ModelConfig(),
    "cmae_vit_b_paper": ModelConfig(mask_ratio=0.75, mask_unit=1, two_tau_factor=False),
    "cmae_vit_l": ModelConfig(embed_dim=1024, depth=24, num_heads=16),
    "cmae_vit_h": ModelConfig(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
    "mae_vit_b": _MAE,
    "mae_vit_l": replace(_MAE, embed_dim=1024, depth=24, num_heads=16),
}
"""Network, mask and losses of the recipes of the same names."""
