"""AdamW with the recipes' parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cmae.errors import CmaeError
from cmae.train.config import OptimConfig
from cmae.train.distributed import World
from cmae.train.sharding import ZeroOptimizer, place_like

NEVER_DECAYED = ("pos_embed",)

TOKENS = ("cls_token", "mask_token")

SPIKES_AFTER, SPIKES_OVER = 100, 50
"""Steps that are taken before one can be a spike, and those over which norms are averaged."""


class SpikeGuard:
    """Says which steps to skip because their gradients are far larger than those of the steps before.

    It judges on the device and waits for nothing. Ranks agree, as they have the same norm.

    Args:
        factor: How many times the running mean of the norms is too much.
        device: Device of the norms.
    """

    def __init__(self, factor: float, device: torch.device) -> None:
        self.factor = factor
        self.mean = torch.zeros((), device=device)
        """Running mean of the norms of the steps that were taken."""
        self.count = torch.zeros((), device=device)
        """Number of those steps."""
        self.norm = torch.zeros((), device=device)
        """Of the last step."""

    @torch.no_grad()
    def judge(self, norm: Tensor, *, is_bad: Tensor) -> Tensor:
        """1 where a step is to be skipped for its norm, else 0; float32, on the device.

        Args:
            norm: Norm of all its gradients.
            is_bad: Above 0 where they are not finite, so that the step is skipped anyway.
        """
        self.norm = norm.float()
        is_spike = (self.count >= SPIKES_AFTER) & (self.norm > self.factor * self.mean)
        counts = ~is_spike & (is_bad <= 0) & torch.isfinite(self.norm)
        # The mean of the first steps is plain, so that it does not begin at 0.
        share = torch.clamp(1 / (self.count + 1), min=1 / SPIKES_OVER)
        moved = torch.lerp(self.mean, self.norm, share)
        self.mean = torch.where(counts, moved, self.mean)
        self.count = self.count + counts
        return is_spike.float()

    def state_dict(self) -> dict[str, Tensor]:
        """What the next step depends on."""
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self.mean, self.count = (state[name].to(self.mean) for name in ("mean", "count"))


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


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, shared_by: World | None = None
) -> torch.optim.Optimizer:
    """AdamW over the model's trained parameters.

    Args:
        model: Model whose parameters it moves.
        config: Settings of the run.
        shared_by: Ranks each of which holds the state of a share of the parameters; None: this one of all.

    Raises:
        CmaeError: `optim.impl` is 'apex' and NVIDIA's apex is not installed.
    """
    groups = parameter_groups(model.named_parameters(), config)

    def build(groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        if config.impl == "apex":
            return _build_fused_adam(list(groups), config)
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)

    return build(groups) if shared_by is None else ZeroOptimizer(groups, build, shared_by)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Any],
    *,
    model: nn.Module,
    config: OptimConfig,
) -> None:
    """Load an optimiser's moments; rates, betas and decay stay those of this run, groups too.

    Args:
        optimizer: Optimiser that `build_optimizer` made from `model` and `config`.
        stored: Its `state_dict` in a checkpoint, of any `decay_tokens`.
        model: Model whose parameters it moves.
        config: Settings of this run.

    Raises:
        CmaeError: The state belongs to other parameters.
    """
    old = _stored_order(stored, model, config)
    groups = [
        {**then, **_options(now), "params": now["params"]}
        for then, now in zip(
            stored["param_groups"], optimizer.state_dict()["param_groups"], strict=True
        )
    ]
    new = [value for group in optimizer.param_groups for value in group["params"]]
    numbers = [number for group in groups for number in group["params"]]
    state = {
        number: {name: place_like(value, parameter) for name, value in moments.items()}
        for number, parameter in zip(numbers, new, strict=True)
        if (moments := stored["state"].get(old[id(parameter)])) is not None
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def moment_templates(
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Any],
    sizes: Mapping[str, tuple[torch.Size, torch.dtype]],
    *,
    model: nn.Module,
    config: OptimConfig,
) -> dict[str, Tensor]:
    """Empty tensors for this rank's part of the moments in a checkpoint's shards, by their names there.

    Args:
        optimizer: Optimiser that `build_optimizer` made from `model` and `config`.
        stored: Its groups in the checkpoint, of any `decay_tokens`.
        sizes: Shape and number format of everything in the shards.
        model: Model whose parameters it moves.
        config: Settings of this run.

    Raises:
        CmaeError: The state belongs to other parameters.
    """
    old = _stored_order(stored, model, config)
    parameters = {old[id(one)]: one for group in optimizer.param_groups for one in group["params"]}
    found: dict[str, Tensor] = {}
    for key, (size, dtype) in sizes.items():
        part, _, rest = key.partition(".")
        if part != "optimizer":
            continue
        parameter = parameters[int(rest.partition(".")[0])]
        if isinstance(optimizer, ZeroOptimizer) and not optimizer.is_own(parameter):
            continue
        is_moment = size == parameter.shape
        found[key] = (
            torch.zeros_like(parameter, dtype=dtype)
            if is_moment
            else torch.empty(size, dtype=dtype)
        )
    return found


def _stored_order(
    stored: Mapping[str, Any], model: nn.Module, config: OptimConfig
) -> dict[int, int]:
    """Number of each parameter (by `id`) in a stored state: `decay_tokens` decides it, sizes show which."""
    sizes = [len(group["params"]) for group in stored["param_groups"]]
    for decay_tokens in (config.decay_tokens, not config.decay_tokens):
        groups = parameter_groups(
            model.named_parameters(), replace(config, decay_tokens=decay_tokens)
        )
        members: list[list[nn.Parameter]] = [group["params"] for group in groups]  # type: ignore[misc]
        if [len(one) for one in members] == sizes:
            numbers = [number for group in stored["param_groups"] for number in group["params"]]
            parameters = [id(parameter) for one in members for parameter in one]
            return dict(zip(parameters, numbers, strict=True))
    raise CmaeError(
        f"the checkpoint's optimiser has groups of {sizes} parameters, not this model's; start a new run "
        "from the weights: --init_from CHECKPOINT with another run.out"
    )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration says of a group of parameters."""
    return {name: group[name] for name in ("betas", "eps", "weight_decay", "lr") if name in group}


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
