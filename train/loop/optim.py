"""AdamW with the recipes' parameter groups, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from cmae.train.config import OptimConfig

NEVER_DECAYED = ("pos_embed",)
TOKENS = ("cls_token", "mask_token")

Schedule = Callable[[int], float]


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
        ValueError: `optim.impl` is 'apex' and NVIDIA's apex is not installed.
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
        raise ValueError(
            f"optim.impl is 'apex', but NVIDIA's apex does not work here ({error}). The package called "
            "`apex` on PyPI is another project: `pip uninstall apex`, then build NVIDIA's from source "
            "with its CUDA extensions or use NVIDIA's PyTorch container; or set optim.impl=torch_fused"
        ) from error
    return optimizer


def build_schedule(
    config: OptimConfig, *, total_steps: int, steps_per_epoch: int | None
) -> Schedule:
    """Learning rate by optimiser step: linear warmup, then half a cosine, both per iteration.

    Args:
        config: rates for 256 images; they are scaled by global_batch_size / 256.
        total_steps: length of the schedule.
        steps_per_epoch: unit of `warmup_epochs`; None takes total_steps / epochs.
    """
    scale = config.global_batch_size / 256
    peak, floor = config.lr_per_256 * scale, config.min_lr * scale
    epoch = total_steps / config.epochs if steps_per_epoch is None else steps_per_epoch
    warmup = min(round(config.warmup_epochs * epoch), total_steps)

    def rate(step: int) -> float:
        if step < warmup:
            start = config.warmup_start
            return peak * (start + (1 - start) * step / warmup)
        done = (step - warmup) / max(1, total_steps - warmup)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return rate
