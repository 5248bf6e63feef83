"""Vision transformer encoder that sees only the patches it is given.

State keys are timm's, so weights move both ways without renaming.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmae.kernels.images import Images
from cmae.kernels.patch_gather import patch_gather
from cmae.model.blocks import LayerNorm, MeanBlock, build_blocks, enter_residual
from cmae.model.config import ModelConfig
from cmae.model.pixels import to_config_normalisation
from cmae.model.pos_embed import sincos_pos_embed


class PatchEmbed(nn.Module):
    """A convolution's weight, applied as a matrix product to gathered patches."""

    def __init__(self, config: ModelConfig, *, patch_size: int, dim: int) -> None:
        super().__init__()
        self.config = config
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Images, ids: Int[Tensor, "B K"]) -> Float[Tensor, "B K D"]:
        """Embeddings of the patches `ids`."""
        config = self.config
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*3), rows' order
        rows = patch_gather(
            to_config_normalisation(images, config),
            ids,
            patch_size=self.patch_size,
            mean=config.pixel_mean,
            std=config.pixel_std,
            out_dtype=_product_dtype(weight),
        )
        return F.linear(rows, weight, self.proj.bias)


class VisionTransformer(nn.Module):
    """ViT with a cls token and fixed position embeddings (method of MAE, section 3).

    Args:
        config: Sizes.
        final_norm: Whether a LayerNorm ends it; CMAE's target encoder has none.
    """

    residual_dtype: torch.dtype | None = None
    """Number format of the residual stream under autocast; None: float32."""

    def __init__(self, config: ModelConfig, *, final_norm: bool = True) -> None:
        super().__init__()
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config, patch_size=config.patch_size, dim=dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = sincos_pos_embed(dim, config.grid, order=config.pos_embed_order)
        self.pos_embed = nn.Parameter(table, requires_grad=False)  # a parameter: timm has its key
        self.blocks = build_blocks(
            dim,
            config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            last=MeanBlock,
        )
        self.norm = LayerNorm(dim) if final_norm else nn.Identity()

    def forward(
        self, images: Images, ids: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Cls token and the patches `ids` (all when None) after the blocks and the final norm."""
        x = self._embed(images, ids)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def mean_tokens(
        self, images: Images, ids: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B D"]:
        """Mean of the patch tokens of `forward`, at less cost where there is no final norm."""
        if not isinstance(self.norm, nn.Identity):
            return self(images, ids)[:, 1:].mean(dim=1)  # type: ignore[no-any-return]
        x = self._embed(images, ids)
        for block in self.blocks[:-1]:
            x = block(x)
        mean: Tensor = self.blocks[-1](x, mean_from=1)
        return mean

    def _embed(self, images: Images, ids: Int[Tensor, "B K"] | None) -> Float[Tensor, "B T D"]:
        if ids is None:
            ids = all_ids(images, self.pos_embed.shape[1] - 1)
        x = self.patch_embed(images, ids) + self.pos_embed[0, 1:][ids.long()]
        cls_token = self.cls_token + self.pos_embed[:, :1]
        tokens = torch.cat([cls_token.expand(len(x), -1, -1), x], dim=1)
        return enter_residual(tokens, self.residual_dtype)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What a product with `weight` is computed in: rows made in it need no second pass to round them."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def all_ids(images: Images, num_patches: int) -> Int[Tensor, "B N"]:
    """Every patch number, for every image."""
    return torch.arange(num_patches, device=images.device).expand(len(images), -1)
