"""AdamW with the recipes' parameter groups."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from cmae.errors import CmaeError
from cmae.train.config import OptimConfig

NEVER_DECAYED = ("pos_embed",)

TOKENS = ("cls_token", "mask_token")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> list[dict[str, object]]:
    """Two groups: matrices with weight decay; norms, biases, embeddings and tokens without.

    Source: the authors' recipe; with `decay_tokens`, MAE's public code, where only 1-D tensors escape.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        leaf = name.rsplit(".", 1)[-1]
        is_free = parameter.ndim <= 1 or leaf in NEVER_DECAYED
        is_free |= leaf in TOKENS and not config.decay_tokens
        (free if is_free else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the model's trained parameters.

    Raises:
        CmaeError: `optim.impl` is 'apex' and NVIDIA's apex is not installed.
    """
    groups = parameter_groups(model.named_parameters(), config)
    if config.impl == "apex":
        return _build_fused_adam(groups, config)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)


def _build_fused_adam(
    groups: list[dict[str, object]], config: OptimConfig
) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedAdam

        optimizer: torch.optim.Optimizer = FusedAdam(
            groups, lr=0.0, betas=config.betas, adam_w_mode=True
        )
    except (ImportError, RuntimeError) as error:  # RuntimeError: built without its CUDA extensions
        raise CmaeError(
            f"optim.impl is 'apex', but NVIDIA's apex does not work here ({error}). The package called "
            "`apex` on PyPI is another project: `pip uninstall apex`, then build NVIDIA's from source "
            "with its CUDA extensions or use NVIDIA's PyTorch container; or set optim.impl=torch_fused"
        ) from error
    return optimizer
