"""timm transformer blocks, and last blocks that skip what nothing reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` with the eps of vision transformers, 1e-6, that keeps a 16-bit input 16-bit.

    Autocast on a GPU would answer in float32 and double the traffic of a 16-bit residual stream. The
    statistics are float32 inside torch's kernel either way.
    """

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__(dim, eps=1e-6, **factory)

    def forward(self, input: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalised rows in the dtype of `input`; float32 input is treated as by `nn.LayerNorm`."""
        if input.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(input)
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class Block(TimmBlock):
    """timm's block, whose attention kernel can be pinned."""

    sdpa: SDPBackend | None = None
    """What computes softmax(q k) v; None leaves the choice to torch. `pin_sdpa` sets it."""

    recomputes: bool = False
    """Whether only the input is kept for the backward pass, which then runs the block again."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Output of `forward`; see `recomputes`."""
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(super().__call__, *arguments, use_reentrant=False, **options)
        return super().__call__(*arguments, **options)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:  # type: ignore[override]
        """Output tokens."""
        with self.pinned():
            out: Tensor = super().forward(x)
        return out

    def pinned(self) -> AbstractContextManager[Any]:
        """While it lasts, torch has no other attention kernel to choose."""
        return nullcontext() if self.sdpa is None else sdpa_kernel(self.sdpa)


@contextmanager
def unpinned(model: nn.Module) -> Iterator[None]:
    """Leave the choice of attention kernels to torch for a while: the pinned one may not know float32."""
    pins = [(block, block.sdpa) for block in model.modules() if isinstance(block, Block)]
    pin_sdpa((block for block, _ in pins), None)
    try:
        yield
    finally:
        for block, backend in pins:
            block.sdpa = backend


def pin_sdpa(blocks: Iterable[nn.Module], backend: SDPBackend | None) -> None:
    """Pin the attention kernel of every `Block` among `blocks`; None unpins it."""
    for block in blocks:
        if isinstance(block, Block):
            block.sdpa = backend


def enter_residual(x: Float[Tensor, "B N D"], dtype: torch.dtype | None) -> Float[Tensor, "B N D"]:
    """Tokens as they enter the blocks: in `dtype` under autocast, unchanged when None or outside.

    The first tokens decide the number format of the whole residual stream: a 16-bit branch added to
    16-bit tokens stays 16-bit, added to float32 tokens it becomes float32.
    """
    if dtype is None or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


class LastTokensBlock(Block):
    """A block that can compute its last tokens alone."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B N D"], num_tokens: int | None = None
    ) -> Float[Tensor, "B T D"]:
        """Output for the last `num_tokens` tokens (all when None).

        Queries and MLP are computed for those tokens only, keys and values for all.
        """
        if num_tokens is None:
            return super().forward(x)
        attn, dim = self.attn, x.shape[-1]
        assert isinstance(attn, Attention)
        weight, bias = attn.qkv.weight, attn.qkv.bias
        normed = self.norm1(x)
        query = F.linear(normed[:, -num_tokens:], weight[:dim], bias[:dim])
        key, value = F.linear(normed, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        heads = [
            part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
        ]
        with self.pinned():
            mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x[:, -num_tokens:] + attn.proj(mixed)
        output: Tensor = x + self.mlp(self.norm2(x))
        return output


class MeanBlock(Block):
    """A block that can compute the mean of its output tokens alone."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "B N D"], mean_from: int | None = None
    ) -> Float[Tensor, "B N D"] | Float[Tensor, "B D"]:
        """Output tokens, or the mean of those from number `mean_from` on.

        The mean is taken before the MLP's last layer, which is linear: a third of the block's
        multiply-adds are saved and the result is the same.
        """
        if mean_from is None:
            return super().forward(x)
        with self.pinned():
            x = (x + self.attn(self.norm1(x)))[:, mean_from:]
        mlp = self.mlp
        assert isinstance(mlp, Mlp)
        hidden: Tensor = mlp.act(mlp.fc1(self.norm2(x)))
        mean: Tensor = x.mean(dim=1) + mlp.fc2(hidden.mean(dim=1))
        return mean


def build_blocks(
    dim: int, depth: int, *, num_heads: int, mlp_ratio: float, last: type[Block] = Block
) -> nn.ModuleList:
    """Pre-LN blocks with qkv bias, GELU, and neither dropout nor stochastic depth.

    Args:
        dim: Width.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLP over `dim`.
        last: Kind of the last block; the keys of its weights are those of any block.
    """
    kinds = [Block] * (depth - 1) + [last]
    return nn.ModuleList(
        kind(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
        for kind in kinds
    )
