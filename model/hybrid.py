"""Convolutional stages, then a transformer (ConvMAE, arXiv 2205.03892).

Two stages of convolution blocks at strides 4 and 8, tokens at stride 16 for the transformer, no
cls token. The keep-mask multiplies the input of every depthwise convolution, the only operation
that looks beyond its own patch, so visible tokens never depend on masked pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from cmae.kernels.images import Images
from cmae.model.blocks import LayerNorm, MeanBlock, build_blocks, enter_residual
from cmae.model.config import ModelConfig
from cmae.model.encoder import PatchEmbed, VisionTransformer, all_ids
from cmae.model.pos_embed import sincos_pos_embed

FIRST_STRIDE = 4  # px; the two other stages halve the resolution
CONV_DEPTH = 2  # blocks of each convolutional stage, in all of ConvMAE's published models


def stage_dims(config: ModelConfig) -> tuple[int, int]:
    """Channels of the two convolutional stages: 256 and 384 at embed_dim 768."""
    return config.embed_dim // 3, config.embed_dim // 2


class ConvBlock(nn.Module):
    """x + W2 depthwise5x5(keep * W1 LN x), then x + MLP(LN x); channels last."""

    def __init__(self, dim: int, *, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)  # ConvMAE leaves eps at 1e-5 in these stages
        self.fc1 = nn.Linear(dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=5, padding=2, groups=dim)
        self.fc2 = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Float[Tensor, "B H W C"], keep: Float[Tensor, "B H W 1"] | None
    ) -> Float[Tensor, "B H W C"]:
        """`keep` is 1 at visible and 0 at masked positions; None when all are visible."""
        inner = self.fc1(self.norm1(x))
        if keep is not None:
            inner = inner * keep
        x = x + self.fc2(_on_channels_first(self.depthwise, inner))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class HybridEncoder(nn.Module):
    """ConvMAE's encoder; the same calls as `VisionTransformer`, without a cls token.

    Args:
        config: Sizes; `depth` counts transformer blocks.
        final_norm: Whether a LayerNorm ends it.
    """

    residual_dtype: torch.dtype | None = None
    """Number format of the transformer's residual stream under autocast; None: float32."""

    def __init__(self, config: ModelConfig, *, final_norm: bool = True) -> None:
        super().__init__()
        first, second = stage_dims(config)
        dim, ratio = config.embed_dim, config.mlp_ratio
        self.grid = config.grid
        self.patch_embed = PatchEmbed(config, patch_size=FIRST_STRIDE, dim=first)
        self.embed_norm = nn.ModuleList(nn.LayerNorm(width) for width in (first, second, dim))
        self.merge = nn.ModuleList(
            nn.Conv2d(width, width_out, kernel_size=2, stride=2)
            for width, width_out in ((first, second), (second, dim))
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvBlock(width, mlp_ratio=ratio) for _ in range(CONV_DEPTH))
            for width in (first, second)
        )
        self.fuse = nn.ModuleList(
            nn.Conv2d(width, dim, kernel_size=side, stride=side)
            for width, side in ((first, 4), (second, 2))
        )
        self.embed = nn.Linear(dim, dim)
        table = sincos_pos_embed(
            dim, config.grid, order=config.pos_embed_order, num_prefix_tokens=0
        )
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = build_blocks(
            dim, config.depth, num_heads=config.num_heads, mlp_ratio=ratio, last=MeanBlock
        )
        self.norm = LayerNorm(dim) if final_norm else nn.Identity()

    def forward(
        self, images: Images, ids: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K D"]:
        """Patches `ids` (all when None) after the blocks, plus the stages' features, and norm."""
        x, fused = self._stages(images, ids)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x + fused)
        return normed

    def mean_tokens(
        self, images: Images, ids: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B D"]:
        """Mean of the tokens of `forward`, at less cost where there is no final norm."""
        if not isinstance(self.norm, nn.Identity):
            return self(images, ids).mean(dim=1)  # type: ignore[no-any-return]
        x, fused = self._stages(images, ids)
        for block in self.blocks[:-1]:
            x = block(x)
        mean: Tensor = self.blocks[-1](x, mean_from=0)
        return mean + fused.mean(dim=1)

    def _stages(self, images: Images, ids: Int[Tensor, "B K"] | None) -> tuple[Tensor, Tensor]:
        """Transformer input and fused stage features of the chosen patches, both (B, K, D)."""
        side = self.grid[0] * 4
        x = self.patch_embed(images, all_ids(images, side * side)).unflatten(1, (side, side))
        x = nn.functional.gelu(self.embed_norm[0](x))
        fused: Tensor | float = 0.0
        for stage in range(2):
            keep = None if ids is None else self._keep_mask(ids, 4 >> stage, x.dtype)
            x = self._conv_blocks(stage, x, keep)
            fused = fused + _on_channels_first(self.fuse[stage], x)
            x = _on_channels_first(self.merge[stage], x)
            x = nn.functional.gelu(self.embed_norm[stage + 1](x))
        x = enter_residual(self.embed(x.flatten(1, 2)) + self.pos_embed, self.residual_dtype)
        assert isinstance(fused, Tensor)
        fused = fused.flatten(1, 2)
        if ids is None:
            return x, fused
        rows = ids.long()[:, :, None].expand(-1, -1, x.shape[-1])
        return x.gather(1, rows), fused.gather(1, rows)

    def _conv_blocks(self, stage: int, x: Tensor, keep: Tensor | None) -> Tensor:
        blocks = self.stages[stage]
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            x = block(x, keep)
        return x

    def _keep_mask(
        self, ids: Int[Tensor, "B K"], scale: int, dtype: torch.dtype
    ) -> Float[Tensor, "B H W 1"]:
        """1 where a position belongs to a visible patch, at `scale` positions per patch side."""
        grid_h, grid_w = self.grid
        keep = torch.zeros(len(ids), grid_h * grid_w, dtype=dtype, device=ids.device)
        keep = keep.scatter(1, ids.long(), 1.0).view(-1, grid_h, 1, grid_w, 1)
        keep = keep.expand(-1, -1, scale, -1, scale)
        return keep.reshape(-1, grid_h * scale, grid_w * scale, 1)


Encoder = VisionTransformer | HybridEncoder
"""Either encoder; both have the same calls."""


def _on_channels_first(convolution: nn.Module, x: Float[Tensor, "B H W C"]) -> Tensor:
    """Apply a 2-D convolution to a channels-last tensor."""
    convolved: Tensor = convolution(x.permute(0, 3, 1, 2))
    return convolved.permute(0, 2, 3, 1)
