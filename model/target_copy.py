"""A 16-bit copy of the target's matrices, so that a step does not cast them again."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from cmae.model.decoder import Decoder
from cmae.model.encoder import VisionTransformer
from cmae.model.heads import Head, SyncedBatchNorm1d
from cmae.model.hybrid import Encoder, HybridEncoder

Branch = TypeVar("Branch", bound=nn.Module)


class TargetCopy:
    """The target branch with its matrices in 16 bits; everything else is the target's own.

    Autocast does not keep the 16-bit form of weights without a gradient: it casts 87 M numbers in every
    forward pass of a ViT-B target. The copy holds that form, and `refresh` renews it after the target has
    moved. Norms, tokens and batch statistics are shared with the target, so the keys are autocast's, bit
    for bit. It is no part of the model's state: checkpoints hold the float32 target alone.

    Args:
        encoder: Target encoder; its copy lies on the same device.
        projector: Target projector.
        dtype: Number format of autocast.
    """

    encoder: Encoder
    projector: Head

    def __init__(self, encoder: Encoder, projector: Head, *, dtype: torch.dtype) -> None:
        self._originals: list[Tensor] = []
        self._copies: list[Tensor] = []
        self.encoder = self._copy_of(encoder, dtype)
        self.projector = self._copy_of(projector, dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the target as it is now; call it after every change of the target."""
        torch._foreach_copy_(self._copies, self._originals)

    def _copy_of(self, branch: Branch, dtype: torch.dtype) -> Branch:
        """A deep copy that shares everything but the matrices, with the biases beside them."""
        memo: dict[int, object] = {id(x): x for x in (*branch.parameters(), *branch.buffers())}
        for module in branch.modules():
            if isinstance(module, SyncedBatchNorm1d):
                memo[id(module)] = module
            elif isinstance(module, nn.Linear | nn.Conv2d):
                for parameter in module.parameters():
                    low = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
                    memo[id(parameter)] = low
                    self._originals.append(parameter)
                    self._copies.append(low)
        return copy.deepcopy(branch, memo)


def set_residual_dtype(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Run the residual streams of all encoders and decoders in a module in `dtype` under autocast.

    Args:
        module: Module that holds encoders or decoders, or is one.
        dtype: float16 or bfloat16; None: float32, as autocast has it.
    """
    for part in module.modules():
        if isinstance(part, VisionTransformer | HybridEncoder | Decoder):
            part.residual_dtype = dtype
