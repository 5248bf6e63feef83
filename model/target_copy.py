"""Low-precision copies of the target's matrices, so that a step does not cast them again."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from cmae.model.cmae import CMAE, Encoder
from cmae.model.decoder import Decoder
from cmae.model.encoder import VisionTransformer
from cmae.model.heads import Head, SyncedBatchNorm1d
from cmae.model.hybrid import HybridEncoder

Branch = TypeVar("Branch", bound=nn.Module)
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_FP8_MULTIPLE = 16  # cuBLAS multiplies fp8 matrices whose widths are multiples of this


class TargetCopy:
    """The target branch with its matrices in 16 bits or fp8; everything else is the target's own.

    Autocast does not keep the 16-bit form of weights without a gradient: it casts 87 M numbers in every
    forward pass of a ViT-B target. The copy holds that form, and `refresh` renews it after the target has
    moved. Norms, tokens and batch statistics are shared with the target, so 16-bit keys are autocast's, bit
    for bit. It is no part of the model's state: checkpoints hold the float32 target alone.

    Args:
        model: with a target branch; the copy lies where it lies.
        dtype: of autocast.
        fp8: also hold the linear layers of the encoder's blocks in fp8, for `Fp8Linear`.

    Raises:
        ValueError: the model has no target branch, or fp8 does not fit its widths.
    """

    encoder: Encoder
    projector: Head

    def __init__(self, model: CMAE, *, dtype: torch.dtype, fp8: bool = False) -> None:
        if model.target_encoder is None or model.target_projector is None:
            raise ValueError("contrastive_loss='none': this model has no target branch to copy.")
        self._originals: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._layers: list[tuple[Fp8Linear, nn.Linear]] = []
        self.encoder = self._copy_of(model.target_encoder, dtype)
        self.projector = self._copy_of(model.target_projector, dtype)
        if fp8:
            self._use_fp8(model.target_encoder)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the target as it is now; call it after every change of the target."""
        torch._foreach_copy_(self._copies, self._originals)
        for layer, original in self._layers:
            layer.load(original)

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

    def _use_fp8(self, target: Encoder) -> None:
        for name, original in list(target.blocks.named_modules()):
            if not isinstance(original, nn.Linear):
                continue
            parent, _, leaf = name.rpartition(".")
            layer = Fp8Linear(self.encoder.blocks.get_submodule(name))
            setattr(self.encoder.blocks.get_submodule(parent), leaf, layer)
            self._layers.append((layer, original))


class Fp8Linear(nn.Module):
    """A linear layer whose input and weight are rounded to fp8 (e4m3), each with one scale.

    The input's scale is taken from the input itself, so nothing has to be calibrated. On CUDA (sm_89 on)
    `torch._scaled_mm` multiplies in fp8; on a CPU the rounded numbers are multiplied in float32, which
    differs by the order of summation alone.

    Args:
        linear: gives the bias, and with its dtype the output's.

    Raises:
        ValueError: a width is no multiple of 16.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        for width in linear.weight.shape:
            if width % _FP8_MULTIPLE:
                raise ValueError(
                    f"a linear layer of the target is {linear.in_features} -> {linear.out_features}; fp8 "
                    f"needs multiples of {_FP8_MULTIPLE}. Change the width, or leave fp8 off."
                )
        self.bias = linear.bias
        self.register_buffer("weight", linear.weight.detach().to(FP8))
        self.register_buffer("scale", linear.weight.new_ones((), dtype=torch.float32))

    def load(self, linear: nn.Linear) -> None:
        """Take the weight of `linear`, float32, with a new scale."""
        rounded, scale = to_fp8(linear.weight)
        self.weight.copy_(rounded)
        self.scale.copy_(scale)

    def forward(self, x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """Output rows in the dtype of the bias."""
        rows, scale = to_fp8(x.flatten(0, -2))
        dtype = self.bias.dtype
        if x.is_cuda:
            out = torch._scaled_mm(
                rows, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=dtype
            )
        else:
            with torch.autocast(x.device.type, enabled=False):
                product = F.linear(rows.float(), self.weight.float()) * (scale * self.scale)
                out = (product + self.bias.float()).to(dtype)
        output: Tensor = out.unflatten(0, x.shape[:-1])
        return output


def to_fp8(x: Tensor) -> tuple[Tensor, Float[Tensor, ""]]:
    """`x` divided by a scale and rounded to e4m3, and the scale, float32: the largest value becomes 448."""
    scale = x.abs().amax().float().clamp(min=1e-12) / FP8_MAX
    # Division can end a hair above 448, which e4m3 has no number for.
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def set_residual_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Run the residual streams of all encoders and decoders in `model` in `dtype` under autocast.

    Args:
        model: any module that holds encoders or decoders, or is one.
        dtype: float16 or bfloat16; None: float32, as autocast has it.
    """
    for module in model.modules():
        if isinstance(module, VisionTransformer | HybridEncoder | Decoder):
            module.residual_dtype = dtype
