"""Convolutional stages, then a transformer (ConvMAE, arXiv 2205.03892).

Two stages of convolution blocks at strides 4 and 8, tokens at stride 16 for the transformer, no
cls token. Everything but the depthwise convolutions stays within its own patch, so the stages work
on the visible patches alone, (B, K, s, s, C) with s positions a side; a depthwise convolution sees
them put in place on a map that is 0 elsewhere, which is ConvMAE's multiplication with the
keep-mask. Visible tokens never depend on masked pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from cmae.kernels.images import Images
from cmae.model.blocks import LayerNorm, MeanBlock, build_blocks, enter_residual
from cmae.model.config import ModelConfig
from cmae.model.encoder import PatchEmbed, VisionTransformer, all_ids
from cmae.model.pixels import to_config_normalisation
from cmae.model.pos_embed import sincos_pos_embed

FIRST_STRIDE = 4  # px; the two other stages halve the resolution
CONV_DEPTH = 2  # blocks of each convolutional stage, in all of ConvMAE's published models


def stage_dims(config: ModelConfig) -> tuple[int, int]:
    """Channels of the two convolutional stages: 256 and 384 at embed_dim 768."""
    return config.embed_dim // 3, config.embed_dim // 2


class ConvBlock(nn.Module):
    """x + W2 depthwise5x5(W1 LN x), then x + MLP(LN x), on visible patches."""

    def __init__(self, dim: int, *, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)  # ConvMAE leaves eps at 1e-5 in these stages
        self.fc1 = nn.Linear(dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, kernel_size=5, padding=2, groups=dim)
        self.fc2 = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path: nn.Module = nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B K s s C"],
        ids: Int[Tensor, "B K"] | None,
        grid: tuple[int, int],
    ) -> Float[Tensor, "B K s s C"]:
        """`ids` are the numbers of the visible patches; None: all of them, in order."""
        dense = _to_map(self.fc1(self.norm1(x)), ids, grid)
        mixed: Tensor = self.depthwise(dense.permute(0, 3, 1, 2))
        x = x + self.drop_path(self.fc2(_from_map(mixed.permute(0, 2, 3, 1), ids, grid)))
        return x + self.drop_path(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]


class HybridEncoder(nn.Module):
    """ConvMAE's encoder; the same calls as `VisionTransformer`, without a cls token.

    Args:
        config: Sizes; `depth` counts transformer blocks.
        final_norm: Whether a LayerNorm ends it.
    """

    residual_dtype: torch.dtype | None = None
    """Number format of the transformer's residual stream under autocast; None: float32."""
    num_prefix_tokens = 0

    def __init__(self, config: ModelConfig, *, final_norm: bool = True) -> None:
        super().__init__()
        first, second = stage_dims(config)
        dim, ratio = config.embed_dim, config.mlp_ratio
        self.config, self.embed_dim = config, dim
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
        self.fuse: nn.ModuleList | None = nn.ModuleList(
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
        normed: Tensor = self.norm(x if fused is None else x + fused)
        return normed

    def forward_features(self, images: Images) -> Float[Tensor, "B N D"]:
        """Tokens of all patches, under the name that timm has for it."""
        return self(images)  # type: ignore[no-any-return]

    def drop_features(self) -> None:
        """Leave the stages' features out of the sum from now on, as ConvMAE does after pretraining."""
        self.fuse = None

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
        return mean if fused is None else mean + fused.mean(dim=1)

    def _stages(
        self, images: Images, ids: Int[Tensor, "B K"] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Transformer input and fused stage features of the chosen patches, both (B, K, D)."""
        grid = self.config.grid
        if ids is None and images.is_floating_point():  # nothing to skip, and torch.export knows it
            pixels = to_config_normalisation(images, self.config)
            x = _from_map(self.patch_embed.proj(pixels).permute(0, 2, 3, 1), None, grid)
        else:
            x = self.patch_embed(images, _parts(images, ids, grid)).unflatten(1, (-1, 4, 4))
        x = nn.functional.gelu(self.embed_norm[0](x))
        fused: Tensor | None = None
        for stage in range(2):
            blocks = self.stages[stage]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, ids, grid)
            if self.fuse is not None:
                own = _within(self.fuse[stage], x).flatten(1, 3)
                fused = own if fused is None else fused + own
            x = nn.functional.gelu(self.embed_norm[stage + 1](_within(self.merge[stage], x)))
        table = self.pos_embed if ids is None else self.pos_embed[0][ids.long()]
        return enter_residual(self.embed(x.flatten(1, 3)) + table, self.residual_dtype), fused


def set_drop_path(encoder: HybridEncoder, rate: float) -> None:
    """Stochastic depth that grows over convolution and transformer blocks from 0 to `rate`."""
    conv = [block for blocks in encoder.stages for block in blocks]  # type: ignore[attr-defined]
    rates = torch.linspace(0, rate, len(conv) + len(encoder.blocks)).tolist()
    for block, own in zip([*conv, *encoder.blocks], rates, strict=True):
        for name in ("drop_path",) if block in conv else ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(own) if own else nn.Identity())


Encoder = VisionTransformer | HybridEncoder
"""Either encoder; both have the same calls."""


def _parts(
    images: Images, ids: Int[Tensor, "B K"] | None, grid: tuple[int, int]
) -> Int[Tensor, "B n"]:
    """Numbers of the 4 px squares of the patches `ids`, 16 a patch, row by row within it."""
    rows, columns = grid
    if ids is None:
        ids = all_ids(images, rows * columns)
    inner = torch.arange(4, device=ids.device)
    row = 4 * (ids // columns)[..., None, None] + inner[:, None]
    column = 4 * (ids % columns)[..., None, None] + inner
    return (row * 4 * columns + column).flatten(1)


def _to_map(
    x: Float[Tensor, "B K s s C"], ids: Int[Tensor, "B K"] | None, grid: tuple[int, int]
) -> Float[Tensor, "B H W C"]:
    """Patches put in their places, 0 elsewhere."""
    side, width = x.shape[3:]
    flat = x.flatten(2)
    if ids is not None:
        empty = flat.new_zeros(x.shape[0], grid[0] * grid[1], flat.shape[2])
        flat = empty.scatter(1, ids.long()[:, :, None].expand_as(flat), flat)
    squares = flat.view(x.shape[0], *grid, side, side, width).transpose(2, 3)
    return squares.reshape(x.shape[0], grid[0] * side, grid[1] * side, width)


def _from_map(
    dense: Float[Tensor, "B H W C"], ids: Int[Tensor, "B K"] | None, grid: tuple[int, int]
) -> Float[Tensor, "B K s s C"]:
    """The patches `ids` (all when None) of a map."""
    side, width = dense.shape[1] // grid[0], dense.shape[3]
    squares = dense.reshape(dense.shape[0], grid[0], side, grid[1], side, width).transpose(2, 3)
    flat = squares.reshape(dense.shape[0], grid[0] * grid[1], side * side * width)
    if ids is not None:
        flat = flat.gather(1, ids.long()[:, :, None].expand(-1, -1, flat.shape[2]))
    return flat.view(dense.shape[0], -1, side, side, width)


def _within(convolution: nn.Module, x: Float[Tensor, "B K s s C"]) -> Tensor:
    """A convolution whose stride is its kernel's size, which never leaves a patch, as a matrix product."""
    assert isinstance(convolution, nn.Conv2d)
    batch, patches, side, _, width = x.shape
    size = convolution.kernel_size[0]
    count = side // size
    rows = x.view(batch, patches, count, size, count, size, width).transpose(3, 4).flatten(4)
    weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # (D, size*size*C), the rows' order
    return nn.functional.linear(rows, weight, convolution.bias)
