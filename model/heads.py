"""Projector and predictor, and their batch norm synchronised over ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cmae.model.config import ModelConfig

AllReduce = Callable[[Tensor], Tensor]


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """Batch norm whose training statistics cover the rows of all ranks.

    Works on CPU and gloo, unlike `nn.SyncBatchNorm`, and knows no process group: `all_reduce` is
    a differentiable sum over ranks put there by `set_all_reduce`; None means this rank alone.
    Output and statistics are float32 under autocast.
    """

    all_reduce: AllReduce | None = None

    def forward(self, input: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Normalised rows; in training also moves the running statistics.

        Raises:
            ValueError: `input` is not (B, D), or there is one row in training without other ranks.
        """
        if input.ndim != 2:
            raise ValueError(
                f"input has shape {tuple(input.shape)}; expected (B, {self.num_features})."
            )
        x = input.to(self.running_mean.dtype) if self.running_mean is not None else input
        if self.all_reduce is None or not self.training:
            return super().forward(x)
        # One message carries both moments; float64 keeps E[x^2] - E[x]^2 free of cancellation.
        rows = x.double()
        moments = torch.stack([rows, rows.square(), torch.ones_like(rows)]).sum(dim=1)
        total, total_square, count = self.all_reduce(moments)
        mean = total / count
        variance = (total_square / count - mean.square()).clamp(min=0)
        self._track(mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        scale = self.weight * (variance + self.eps).rsqrt()
        normalised: Tensor = (rows - mean) * scale + self.bias
        return normalised.to(x.dtype)

    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), self.momentum)


def set_all_reduce(model: nn.Module, all_reduce: AllReduce | None) -> None:
    """Give every `SyncedBatchNorm1d` of `model` the sum over ranks (None: local statistics).

    Args:
        model: Module that holds them.
        all_reduce: Differentiable function from a tensor to its sum over all ranks.
    """
    for module in model.modules():
        if isinstance(module, SyncedBatchNorm1d):
            module.all_reduce = all_reduce


class Head(nn.Module):
    """Linear, norm, ReLU, linear without bias (MoCo v3's shape, no norm on the output)."""

    def __init__(self, config: ModelConfig, *, in_dim: int) -> None:
        super().__init__()
        hidden = config.proj_hidden_dim
        norm = SyncedBatchNorm1d if config.head_norm == "batch" else nn.LayerNorm
        self.fc1 = nn.Linear(in_dim, hidden)
        self.norm = norm(hidden, eps=1e-6)
        self.fc2 = nn.Linear(hidden, config.proj_dim, bias=False)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B P"]:
        """Projections, not normalised."""
        projected: Tensor = self.fc2(torch.relu(self.norm(self.fc1(x))))
        return projected
