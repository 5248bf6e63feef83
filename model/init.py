"""Initial weights (MAE's, which CMAE uses)."""

from __future__ import annotations

import torch
from torch import nn

_TOKEN_STD = 0.02
_TOKENS = ("cls_token", "mask_token")


def init_weights(module: nn.Module, generator: torch.Generator | None) -> None:
    """Xavier-uniform linear and patch weights, zero biases, unit norms, N(0, .02) tokens.

    Convolution weights are taken flat, (out, in * kernel area), as the matrices they are.

    Args:
        module: Module whose parameters are overwritten, in the order of its submodules.
        generator: CPU random state; None takes torch's global one.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.data.flatten(1), generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm | nn.BatchNorm1d):
            part.reset_parameters()
        for name in _TOKENS:
            token = part._parameters.get(name)
            if token is not None:
                nn.init.normal_(token, std=_TOKEN_STD, generator=generator)
