"""Transformer decoder over visible and masked tokens.

Tokens stay in the order [cls, visible, masked] and position embeddings are gathered by patch
number: attention does not care about order, so nothing is ever put back in place and the masked
tokens are one slice.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cmae.model.blocks import LastTokensBlock, LayerNorm, build_blocks, enter_residual
from cmae.model.config import ModelConfig
from cmae.model.pos_embed import sincos_pos_embed


class Decoder(nn.Module):
    """Linear, mask token, fixed position embeddings, blocks, LayerNorm, linear head.

    Args:
        config: Sizes.
        depth: Number of blocks.
        out_dim: Width of the head.
    """

    pos_embed: Tensor
    residual_dtype: torch.dtype | None = None
    """Number format of the residual stream under autocast; None: float32."""

    def __init__(self, config: ModelConfig, *, depth: int, out_dim: int) -> None:
        super().__init__()
        dim = config.decoder_embed_dim
        self.num_prefix_tokens = config.num_prefix_tokens
        self.embed = nn.Linear(config.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = sincos_pos_embed(
            dim,
            config.grid,
            order=config.pos_embed_order,
            num_prefix_tokens=config.num_prefix_tokens,
        )
        self.register_buffer("pos_embed", table)
        self.blocks = build_blocks(
            dim,
            depth,
            num_heads=config.decoder_num_heads,
            mlp_ratio=config.decoder_mlp_ratio,
            last=LastTokensBlock,
        )
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)

    def embed_tokens(
        self,
        latent: Float[Tensor, "B T D"],
        ids_keep: Int[Tensor, "B K"],
        ids_mask: Int[Tensor, "B M"],
    ) -> Float[Tensor, "B N d"]:
        """[prefix, visible, masked] tokens with their position embeddings."""
        prefix, table = self.pos_embed[0].split(
            [self.num_prefix_tokens, self.pos_embed.shape[1] - self.num_prefix_tokens]
        )
        prefix = prefix.expand(len(latent), -1, -1)
        seen = self.embed(latent) + torch.cat([prefix, table[ids_keep.long()]], dim=1)
        tokens = torch.cat([seen, self.mask_token + table[ids_mask.long()]], dim=1)
        return enter_residual(tokens, self.residual_dtype)

    def forward(self, x: Float[Tensor, "B N d"]) -> Float[Tensor, "B N d"]:
        """Tokens of `embed_tokens` after all blocks and the norm."""
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.norm(x)
        return normed

    def predict_last(self, x: Float[Tensor, "B N d"], num_tokens: int) -> Float[Tensor, "B M out"]:
        """Head's output for the last (masked) tokens; the last block computes no others."""
        for block in self.blocks[:-1]:
            x = block(x)
        predicted: Tensor = self.head(self.norm(self.blocks[-1](x, num_tokens)))
        return predicted

    def mean_patches(self, decoded: Float[Tensor, "B N d"]) -> Float[Tensor, "B d"]:
        """Mean over all patches of the tokens of `forward`; a linear head may follow it."""
        return decoded[:, self.num_prefix_tokens :].mean(dim=1)
