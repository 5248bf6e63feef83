"""Parts of networks and losses written the long way in plain torch, on state dicts: an oracle in float64."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]

MMCV = ("ln1", "ln2", "ffn.layers.0.0", "ffn.layers.1")
TIMM = ("norm1", "norm2", "mlp.fc1", "mlp.fc2")


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last axis."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w + b


def linear(sd: State, key: str, x: Tensor) -> Tensor:
    """Linear layer `key`, with a bias where it has one."""
    out = x @ sd[key + ".weight"].T
    return out + sd[key + ".bias"] if key + ".bias" in sd else out


def gelu(x: Tensor) -> Tensor:
    """The exact one."""
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def block(sd: State, key: str, x: Tensor, heads: int, names: tuple[str, str, str, str]) -> Tensor:
    """Pre-norm transformer block with the names of its norms and MLP layers."""
    ln1, ln2, fc1, fc2 = (f"{key}.{name}" for name in names)
    batch, tokens, dim = x.shape
    h = layer_norm(x, sd[ln1 + ".weight"], sd[ln1 + ".bias"])
    qkv = linear(sd, key + ".attn.qkv", h).reshape(batch, tokens, 3, heads, dim // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / (dim // heads) ** 0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, tokens, dim)
    x = x + linear(sd, key + ".attn.proj", mixed)
    h = linear(sd, fc1, layer_norm(x, sd[ln2 + ".weight"], sd[ln2 + ".bias"]))
    return x + linear(sd, fc2, gelu(h))


def pixel_loss(
    pred: Tensor, images: Tensor, mask: Tensor, patch: int, norm_pix: bool = True
) -> Tensor:
    """Mean squared error of the patches that `mask` (B, N) marks with 1; images (B, 3, H, W)."""
    grid = images.shape[-1] // patch
    patches = images.reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
    target = patches.reshape(len(images), grid * grid, -1)
    if norm_pix:
        mean = target.mean(-1, keepdim=True)
        var = (target - mean).pow(2).sum(-1, keepdim=True) / (target.shape[-1] - 1)
        target = (target - mean) / (var + 1e-6).sqrt()
    error = (pred - target).pow(2).mean(-1)
    return (error * mask).sum() / mask.sum()


def info_nce(query: Tensor, key: Tensor) -> Tensor:
    """InfoNCE at temperature 0.07 without the factor 2 tau."""
    query = query / query.norm(dim=1, keepdim=True)
    key = key / key.norm(dim=1, keepdim=True)
    logits = query @ key.T / 0.07
    return (logits.logsumexp(1) - logits.diagonal()).mean()


def mlp_head(sd: State, key: str, x: Tensor) -> Tensor:
    """Linear, batch norm with the batch's statistics, ReLU, linear."""
    h = linear(sd, key + ".fc0", x)
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-6).sqrt()
    h = h * sd[key + ".bn0.weight"] + sd[key + ".bn0.bias"]
    return linear(sd, key + ".fc1", h.clamp(min=0))
