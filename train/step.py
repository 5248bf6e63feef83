"""One optimiser step: target keys of the whole batch, online passes against them, AdamW, EMA."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from cmae.model import CMAE, Losses
from cmae.model.heads import SyncedBatchNorm1d, set_all_reduce
from cmae.pipeline import Batch
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import Ranks, gather_rows, sum_over_ranks
from cmae.train.optim import build_optimizer

# The heads' running statistics are the same on every rank already. torch 2.14 renamed the switch.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class TrainStep:
    """Model, optimiser and loss scaler of one rank, and the step that moves them.

    The scaler also guards bf16 and fp32, with a scale of 1: a gradient that is not finite skips the step on
    every rank, since the gradients are already averaged over ranks when it looks at them.
    """

    def __init__(self, model: CMAE, optim: OptimConfig, speed: SpeedConfig, ranks: Ranks) -> None:
        check_precision(optim.precision, ranks.device)
        self.model = model
        self.ranks = ranks
        self.clip_grad = optim.clip_grad
        self.dtype = _DTYPES[optim.precision]
        self.optimizer = build_optimizer(model, optim)
        self.precision = optim.precision
        self.scaler = _build_scaler(optim.precision, ranks.device)
        self._scale = self.scaler.get_scale()
        _compile(model, speed.compile)
        self.network = _replicate(model, optim, ranks)

    def __call__(
        self, batches: Sequence[Batch], *, lr: float, momentum: float
    ) -> tuple[Tensor, bool]:
        """Take one step on the micro-batches of one global batch.

        Args:
            batches: this rank's micro-batches, in order.
            lr: learning rate of this step.
            momentum: of the target's moving average.

        Returns:
            The losses as a vector in the order of `Losses`, means over the micro-batches, on the device; and
            whether the step was taken. A skipped step leaves the weights, both branches, as they were.
        """
        losses = self.backward(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        scale = self.scaler.get_scale()  # the step's one host synchronisation
        taken, self._scale = scale >= self._scale, scale
        if not taken:
            self._recover()
        elif self.model.config.has_contrast:
            self.model.update_target(momentum)
        return losses, taken

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but the data."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; a loss scale of another precision is left behind."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["precision"] == self.precision:
            self.scaler.load_state_dict(state["scaler"])
            self._scale = self.scaler.get_scale()

    def _recover(self) -> None:
        """After a skipped step: a fixed scale back to 1, and no NaN in the heads' running statistics.

        Training does not read those statistics, but a checkpoint holds them and evaluation does.
        """
        if self.precision != "fp16":
            self.scaler.update(new_scale=1.0)
            self._scale = 1.0
        for module in self.model.modules():
            statistics = getattr(module, "running_var", None)
            if statistics is not None and not torch.isfinite(statistics).all():
                assert isinstance(module, SyncedBatchNorm1d)
                module.reset_running_stats()

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Add the (scaled) gradients of the global batch's mean loss; returns the mean losses.

        The bank of keys is that of the whole global batch, however it is cut into micro-batches.
        """
        keys = self._global_keys(batches)
        rank, world_size = self.ranks.rank, self.ranks.world_size
        means = torch.zeros(len(Losses._fields), device=self.ranks.device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            offset = (index * world_size + rank) * batch.online.shape[0]
            with self._reduce_gradients(is_last):
                with self._autocast():
                    losses = self.network(
                        batch.online,
                        batch.target,
                        batch.ids_keep,
                        ids_mask=batch.ids_mask,
                        keys=keys,
                        label_offset=offset,
                    )
                self.scaler.scale(losses.total / len(batches)).backward()
            means += torch.stack([value.detach().float() for value in losses]) / len(batches)
        return means

    def _global_keys(self, batches: Sequence[Batch]) -> Tensor | None:
        """Target keys of all micro-batches and ranks, in the order of the global batch."""
        if not self.model.config.has_contrast:
            return None
        keys = []
        for batch in batches:
            assert batch.target is not None  # Config asks for two views
            with self._autocast():
                own = self.model.target_keys(batch.target, batch.ids_keep)
            keys.append(gather_rows(own, self.ranks))
        return torch.cat(keys)

    def _reduce_gradients(self, is_last: bool) -> Any:
        if is_last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.ranks.device.type, dtype=self.dtype, enabled=enabled)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse fp16 on a CPU, which has no fast fp16.

    Raises:
        ValueError: as said.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError(
            "optim.precision is 'fp16' and the device is a CPU, which has no fast fp16; "
            "set optim.precision to 'bf16' or 'fp32'"
        )


def _build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    if precision == "fp16":
        return torch.amp.GradScaler(device.type)
    never = 2**31 - 1
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=never)


def _compile(model: CMAE, mode: str) -> None:
    if mode == "blocks":
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(fullgraph=True, dynamic=False)
    elif mode == "model":
        model.compile(fullgraph=True)  # shapes are static, but label_offset differs by micro-batch
        if model.target_encoder is not None:  # reached through target_keys, not through forward
            model.target_encoder.mean_tokens = torch.compile(  # type: ignore[method-assign]
                model.target_encoder.mean_tokens, fullgraph=True
            )


def _replicate(model: CMAE, optim: OptimConfig, ranks: Ranks) -> CMAE | DistributedDataParallel:
    if ranks.world_size == 1:
        return model
    set_all_reduce(model, sum_over_ranks)
    network = DistributedDataParallel(
        model,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **_NO_BUFFER_SYNC,
    )
    hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
    if optim.gradient_compression in hooks:
        network.register_comm_hook(None, hooks[optim.gradient_compression])
    return network
