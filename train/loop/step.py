"""One optimiser step: target keys of the whole batch, online passes against them, AdamW, EMA."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import _dynamo as dynamo
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from cmae.errors import CmaeError
from cmae.model import CMAE, Losses, set_all_reduce
from cmae.model.blocks import Block
from cmae.model.export.checkpoints import check_finite
from cmae.model.export.shards import fill, flatten, nest, read_sizes, reason_of
from cmae.model.heads import SyncedBatchNorm1d
from cmae.model.target_copy import TargetCopy, set_residual_dtype
from cmae.pipeline import Batch
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import RowGatherer, World, from_main, sum_over_ranks
from cmae.train.loop.optim import (
    SpikeGuard,
    build_optimizer,
    load_optimizer,
    moment_templates,
)
from cmae.train.loop.sdpa import pin_attention
from cmae.train.machine import compute_capability
from cmae.train.sharding import (
    ZeroOptimizer,
    gather_state,
    local_part,
    place_like,
    shard_model,
    whole_tensor,
)

logger = logging.getLogger(__name__)

# The heads' running statistics are the same on every rank already. torch 2.14 renamed the switch.
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers"
    if "forward_sync_buffers" in signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers": False
}
_RECOMPILE_LIMIT = 32
# Values of speed.compile that compile each branch as a whole, and the mode of torch.compile they mean.
WHOLE_BRANCHES = {"model": None, "model_graphs": "reduce-overhead"}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class TrainStep:
    """Model, optimiser and loss scaler of one rank, and the step that moves them.

    The scaler also guards bf16 and fp32, with a scale of 1: a gradient that is not finite skips the step on
    every rank, since the gradients are already averaged over ranks when it looks at them.

    Args:
        model: Model on the device of `world`.
        optim: Precision, optimiser and what else changes results.
        speed: Settings of how the step is computed.
        world: Place of this process among all.
        log: Function that gets a line for each choice that was made by measurement.

    Raises:
        CmaeError: Settings do not fit each other or the device.
    """

    def __init__(
        self,
        model: CMAE,
        optim: OptimConfig,
        speed: SpeedConfig,
        world: World,
        *,
        log: Callable[[str], None] = logger.info,
    ) -> None:
        check_step(optim, speed, world)
        speed = speed.resolved(compute_capability(world.device))
        self.model = model
        self.world = world
        self.speed = speed
        self.optim = optim
        self.clip_grad = optim.clip_grad
        self.dtype = _DTYPES[optim.precision]
        self.precision = optim.precision
        self.scaler = _build_scaler(optim.precision, world.device)
        self.target_copy = _build_target_copy(model, speed, self.dtype)
        _set_residual(model, self.target_copy, self.dtype if optim.residual == "16bit" else None)
        _set_recompute(model, speed.recompute)
        whole_pass = _compile(model, self.target_copy, speed.compile)
        self.network = _distribute(model, optim, speed.parallel, world)
        self._target_pass = whole_pass or model.target_keys
        is_shared = speed.parallel == "zero1" and world.world_size > 1
        self.optimizer = build_optimizer(model, optim, shared_by=world if is_shared else None)
        self.is_sharded = speed.parallel != "ddp" and world.world_size > 1
        """Whether the state is whole on no rank, so that all have to take part in `state_dict`."""
        self.spikes = None
        if optim.spike_factor is not None:
            self.spikes = SpikeGuard(optim.spike_factor, world.device)
        self.grad_norm: Tensor | None = None
        """Norm of all gradients before clipping, of the last step that was asked for it; on the device."""
        self._part_norms: dict[str, Tensor] = {}
        self._clipped: Tensor | None = None
        self._num_since = 0
        self._log = log
        self._is_pinned = False

    def __call__(
        self,
        batches: Sequence[Batch],
        *,
        lr: float,
        momentum: float,
        meanwhile: Callable[[], None] | None = None,
        with_norm: bool = False,
    ) -> tuple[Tensor, bool]:
        """Take one step on the micro-batches of one global batch.

        Args:
            batches: Micro-batches of this rank, in order.
            lr: Learning rate of this step.
            momentum: Share of the old target that its moving average keeps.
            meanwhile: Called when the optimiser's work is queued, before this process waits for it.
            with_norm: Whether to take the norm of the gradients for `grad_norm`, one more pass over them.

        Returns:
            The losses as a vector in the order of `Losses`, means over the micro-batches, on the device; and
            whether the step was taken. A skipped step leaves the weights, both branches, as they were.
        """
        losses = self.backward(batches)
        taken = self.update(lr, meanwhile=meanwhile, with_norm=with_norm)
        if not taken:
            self._recover()
        elif self.model.config.has_contrast:
            self.move_target(momentum)
        return losses, taken

    def update(
        self,
        lr: float,
        *,
        meanwhile: Callable[[], None] | None = None,
        with_norm: bool = False,
    ) -> bool:
        """Let the optimiser take the gradients, unless they spike or are not finite; says whether it did."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        if with_norm:
            self._part_norms = _norms_of_parts(self.model)
        if with_norm or self.clip_grad is not None or self.spikes is not None:
            self.grad_norm = self._total_norm()
        bad = list(self.scaler._found_inf_per_device(self.optimizer).values())
        is_spike = None
        if self.spikes is not None and self.grad_norm is not None:
            is_spike = self.spikes.judge(self.grad_norm, is_bad=bad[0])
            for flag in bad:
                flag.add_(is_spike)
        # The optimiser and this process learn of a bad gradient apart: the former on the device, the latter
        # by a copy that is asked for now and awaited when the optimiser's work is queued behind it.
        skipped = HostFlag(bad)
        if self.clip_grad is not None and self.grad_norm is not None:
            self._clip(self.clip_grad, self.grad_norm)
        self.scaler.step(self.optimizer)
        if is_spike is not None:  # which says nothing against the loss scale
            for flag in bad:
                flag.sub_(is_spike)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if meanwhile is not None:
            meanwhile()
        return not skipped.wait()  # the step's one host synchronisation

    def _total_norm(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return whole_tensor(torch.nn.utils.get_total_norm(gradients))

    def _clip(self, most: float, norm: Tensor) -> None:
        """Scale gradients whose norm is above `most`; count how often."""
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), most, norm)
        is_above = (norm > most).float()
        self._clipped = is_above if self._clipped is None else self._clipped + is_above
        self._num_since += 1

    def why_skipped(self) -> str:
        """Reason for which the last step was not taken; waits for the device."""
        guard = self.spikes
        if guard is None or not bool(torch.isfinite(guard.norm)):
            return "gradients are not finite"
        return (
            f"gradients have a norm of {guard.norm.item():.3g}, {(guard.norm / guard.mean).item():.1f} times "
            f"the mean of the steps before (optim.spike_factor {guard.factor:g})"
        )

    @contextmanager
    def without_collectives(self) -> Iterator[None]:
        """Steps of this rank alone, as if there were no other: what is left when nobody is waited for.

        The bank of keys is this rank's own meanwhile; gradients stay on the rank, so that weights drift apart
        unless the learning rate is 0.
        """
        world, network = self.world, self.network
        self.world, self.network = World(0, 1, world.device), self.model
        set_all_reduce(self.model, lambda value: value)
        try:
            yield
        finally:
            set_all_reduce(self.model, sum_over_ranks)
            self.world, self.network = world, network

    def move_target(self, momentum: float) -> None:
        """Moving average of the target, and its 16-bit copy."""
        self.model.update_target(momentum)
        if self.target_copy is not None:
            self.target_copy.refresh()

    def vitals(self) -> dict[str, float]:
        """Norms of the gradients of the last step that took them, over all and of each part of the model.

        Also the share of steps since the last call whose gradients were clipped, and in fp16 `loss_scale`.
        Waits for the device once or twice.
        """
        values = {} if self.grad_norm is None else {"grad_norm": self.grad_norm}
        values |= {f"grad_norm_{name}": norm for name, norm in self._part_norms.items()}
        if self._clipped is not None:
            values["clipped_pct"] = 100 * self._clipped / self._num_since
            self._clipped, self._num_since = None, 0
        found = {}
        if values:
            numbers = torch.stack([value.float() for value in values.values()]).tolist()
            found = dict(zip(values, numbers, strict=True))
        if self.precision == "fp16":
            found["loss_scale"] = self.scaler.get_scale()
        return found

    def state_dict(self, *, with_tensors: bool = True) -> dict[str, Any]:
        """Everything that the next step depends on, but the data; the same however it is sharded.

        Where it is (`is_sharded`) this is a collective, which gives whole tensors in host memory to the first
        rank and none to the others.

        Args:
            with_tensors: Whether weights and moments are in it; else `tensors` has them.
        """
        spikes = {} if self.spikes is None else {"spikes": self.spikes.state_dict()}
        rest = {"scaler": self.scaler.state_dict(), "precision": self.precision, **spikes}
        optimizer = self.optimizer
        if not with_tensors:
            groups = optimizer.state_dict()["param_groups"]
            return {"optimizer": {"param_groups": groups}, **rest}
        model = self.model.state_dict()
        if self.is_sharded:
            model = gather_state(model, self.world)
        if isinstance(optimizer, ZeroOptimizer):
            moments = optimizer.gather()
        elif self.is_sharded:
            moments = gather_state(optimizer.state_dict(), self.world)
        else:
            moments = optimizer.state_dict()
        return {"model": model, "optimizer": moments, **rest}

    def tensors(self) -> dict[str, Tensor]:
        """This rank's part of weights and moments, by name, where they are."""
        return flatten(self.model.state_dict(), self.optimizer.state_dict()["state"])

    def _read_shards(self, state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """This rank's part of the tensors of a checkpoint in shards, however many ranks wrote it.

        Raises:
            CmaeError: They are damaged, or another model's.
        """
        own = self.model.state_dict()
        parts = {f"model.{name}": torch.empty_like(value) for name, value in own.items()}
        try:
            sizes = read_sizes(folder)
            parts |= moment_templates(
                self.optimizer, state["optimizer"], sizes, model=self.model, config=self.optim
            )
            fill(parts, folder)
        except CmaeError:
            raise
        # torch wraps what a disk or a file says in errors of its own.
        except Exception as error:
            raise CmaeError(
                f"{folder} cannot be read, or is not of this model ({reason_of(error)}); `cmae checkpoint "
                "verify` says whether it is whole"
            ) from error
        found = nest(parts)
        own_parts = {name: local_part(value) for name, value in found["model"].items()}
        check_finite(own_parts, str(folder))
        return found

    def load_state_dict(self, state: dict[str, Any], *, shards: Path | None = None) -> None:
        """Continue from `state_dict`; a loss scale of another precision is left behind.

        Args:
            state: What a checkpoint holds.
            shards: Folder of its tensors, where they are not in it; each rank reads its part.
        """
        if shards is not None:
            found = self._read_shards(state, shards)
            optimizer = {**state["optimizer"], **found["optimizer"]}
            state = {**state, "model": found["model"], "optimizer": optimizer}
        own = self.model.state_dict()
        whole = {
            name: place_like(value, own[name]) if name in own else value
            for name, value in state["model"].items()
        }
        self.model.load_state_dict(whole)
        load_optimizer(self.optimizer, state["optimizer"], model=self.model, config=self.optim)
        if self.spikes is not None and "spikes" in state:
            self.spikes.load_state_dict(state["spikes"])
        if state["precision"] == self.precision:
            self.scaler.load_state_dict(state["scaler"])
        if self.target_copy is not None:
            self.target_copy.refresh()

    def _recover(self) -> None:
        """After a skipped step: a fixed scale back to 1, and no NaN in the heads' running statistics.

        Training does not read those statistics, but a checkpoint holds them and evaluation does.
        """
        if self.precision != "fp16":
            self.scaler.update(new_scale=1.0)
        for module in self.model.modules():
            statistics = getattr(module, "running_var", None)
            if statistics is not None and not torch.isfinite(statistics).all():
                assert isinstance(module, SyncedBatchNorm1d)
                module.reset_running_stats()

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Add the (scaled) gradients of the global batch's mean loss; returns the mean losses.

        The bank of keys is that of the whole global batch, however it is split into micro-batches.

        Raises:
            CmaeError: Several micro-batches with speed.compile model_graphs.
        """
        self._prepare(batches)
        bank = self.start_keys(batches)
        rank, world_size = self.world.rank, self.world.world_size
        means = torch.zeros(len(Losses._fields), device=self.world.device)
        for index, batch in enumerate(batches):
            is_last = index == len(batches) - 1
            offset = (index * world_size + rank) * batch.online.shape[0]
            with self._reduce_gradients(is_last):
                losses = self._online_pass(batch, bank, offset, divisor=len(batches))
            means += losses / len(batches)
        return means

    def start_keys(self, batches: Sequence[Batch]) -> RowGatherer | None:
        """Target keys of all micro-batches, on their way to all ranks; in the order of the global batch."""
        if not self.model.config.has_contrast:
            return None
        bank = RowGatherer(self.world)
        for batch in batches:
            assert batch.target is not None  # Config asks for two views
            bank.add(self.target_keys(batch.target, batch.masks[0]))
        return bank

    def target_keys(self, target: Tensor, ids_keep: Tensor) -> Tensor:
        """Keys of one micro-batch of this rank, (B, P)."""
        with self._autocast():
            return self._target_pass(target, ids_keep, target_copy=self.target_copy)

    def _prepare(self, batches: Sequence[Batch]) -> None:
        """What must precede the first pass, or every one."""
        if self.speed.compile == "model_graphs":
            if len(batches) > 1:
                raise CmaeError(
                    f"speed.compile is 'model_graphs' and a step has {len(batches)} micro-batches; the "
                    "gradients of one lie in memory that the next overwrites: set it to 'model', or "
                    "speed.micro_batch_size to null"
                )
            torch.compiler.cudagraph_mark_step_begin()
        if not self._is_pinned:
            pin_attention(
                self.model,
                self.speed.sdpa,
                target_copy=self.target_copy,
                batch_size=len(batches[0].online),
                dtype=self.dtype,
                device=self.world.device,
                log=self._log,
                agree=lambda choice: str(from_main(choice, self.world)),
            )
            self._is_pinned = True

    def _online_pass(
        self, batch: Batch, bank: RowGatherer | None, offset: int, *, divisor: int
    ) -> Tensor:
        """`online_losses` with the keys of the whole batch, of which this micro-batch's begin at `offset`."""
        keys: Tensor | Callable[[], Tensor] | None = None if bank is None else bank.wait
        if bank is not None and self.speed.compile in WHOLE_BRANCHES:
            # Code of a whole branch is specialised on the offset: each micro-batch's own keys come first.
            keys, offset = bank.wait().roll(-offset, dims=0), 0
        return self.online_losses(
            batch.online,
            *batch.masks,
            keys=keys,
            label_offset=offset,
            divisor=divisor,
        )

    def online_losses(
        self,
        online: Tensor,
        ids_keep: Tensor,
        ids_mask: Tensor,
        *,
        keys: Tensor | Callable[[], Tensor] | None = None,
        label_offset: int = 0,
        divisor: int = 1,
    ) -> Tensor:
        """Losses of one micro-batch, in the order of `Losses`; its gradients over `divisor` are added."""
        with self._autocast():
            losses = self.network(
                online, None, ids_keep, ids_mask=ids_mask, keys=keys, label_offset=label_offset
            )
        self.differentiate(losses.total / divisor)
        return torch.stack([value.detach().float() for value in losses])

    def differentiate(self, loss: Tensor) -> None:
        """Backward pass of the scaled loss."""
        self.scaler.scale(loss).backward()

    def _reduce_gradients(self, is_last: bool) -> Any:
        if is_last or not isinstance(self.network, DistributedDataParallel):
            return nullcontext()
        return self.network.no_sync()

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.world.device.type, dtype=self.dtype, enabled=enabled)


def _norms_of_parts(model: CMAE) -> dict[str, Tensor]:
    """Norm of the gradients of each part that is trained; on the device."""
    found = {}
    for name, part in model.named_children():
        gradients = [value.grad for value in part.parameters() if value.grad is not None]
        if gradients:
            found[name] = whole_tensor(torch.nn.utils.get_total_norm(gradients))
    return found


class HostFlag:
    """Whether any of some device flags is set, on its way to the host while the device works on."""

    def __init__(self, flags: Iterable[Tensor]) -> None:
        total = torch.stack([flag.reshape(()) for flag in flags]).sum()
        self._event: torch.cuda.Event | None = None
        self._value = total
        if total.is_cuda:
            self._value = torch.empty_like(total, device="cpu", pin_memory=True)
            self._value.copy_(total, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> bool:
        """The answer, as soon as what was queued before this flag is done."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value.item() > 0)


def check_step(optim: OptimConfig, speed: SpeedConfig, world: World) -> None:
    """Refuse settings that the step cannot obey on this machine, before anything is built.

    Raises:
        CmaeError: A setting does not fit; names the key and the repair.
    """
    device = world.device
    if optim.precision == "fp16" and device.type == "cpu":
        raise CmaeError(
            "optim.precision is 'fp16' and the device is a CPU, which has no fast fp16; "
            "set optim.precision to 'bf16' or 'fp32'"
        )
    if speed.target_copy and optim.precision == "fp32":
        raise CmaeError(
            "speed.target_copy is true, but with optim.precision fp32 there is nothing to cast; set it to "
            "false, or optim.precision to fp16 or bf16"
        )
    if speed.recompute != "none" and speed.compile in WHOLE_BRANCHES:
        raise CmaeError(
            f"speed.recompute is {speed.recompute!r} and speed.compile {speed.compile!r}, which decides by "
            "itself what is kept: set speed.compile to 'blocks' or 'none'"
        )
    _check_parallel(optim, speed, world)
    if speed.compile == "model_graphs" and device.type != "cuda":
        raise CmaeError(
            f"speed.compile is 'model_graphs', but this run is on {device.type}, which has no CUDA graphs; "
            "set it to 'model' or 'blocks'"
        )


def _check_parallel(optim: OptimConfig, speed: SpeedConfig, world: World) -> None:
    """Refuse what does not go with shards.

    Raises:
        CmaeError: Names the key.
    """
    chosen = speed.parallel
    if chosen == "ddp" or world.world_size == 1:
        return
    if optim.impl == "apex":
        raise CmaeError(
            f"speed.parallel is {chosen!r}, and optim.impl 'apex', which knows no shards: set "
            "optim.impl=torch_fused, or speed.parallel=ddp",
            key="speed.parallel",
        )
    if chosen == "zero1":
        return
    if speed.target_copy:
        raise CmaeError(
            f"speed.parallel is {chosen!r}, and speed.target_copy would keep all of the target on each rank: "
            "set it to false, or speed.parallel to ddp or zero1",
            key="speed.target_copy",
        )
    if speed.compile in WHOLE_BRANCHES:
        raise CmaeError(
            f"speed.parallel is {chosen!r}, which gathers weights block by block, and speed.compile "
            f"{speed.compile!r} compiles a branch as a whole: set it to 'blocks' or 'none'",
            key="speed.compile",
        )


def _build_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    if precision == "fp16":
        return torch.amp.GradScaler(device.type)
    never = 2**31 - 1
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=never)


def _build_target_copy(model: CMAE, speed: SpeedConfig, dtype: torch.dtype) -> TargetCopy | None:
    if not speed.target_copy or model.target_encoder is None or model.target_projector is None:
        return None
    return TargetCopy(model.target_encoder, model.target_projector, dtype=dtype)


def _set_residual(model: CMAE, target_copy: TargetCopy | None, dtype: torch.dtype | None) -> None:
    set_residual_dtype(model, dtype)
    if target_copy is not None:
        set_residual_dtype(target_copy.encoder, dtype)


def _set_recompute(model: CMAE, choice: str) -> None:
    """Blocks of the online branch; the target has no backward pass, whose blocks ask for nothing."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputes = choice == "blocks"


def _compile(
    model: CMAE, target_copy: TargetCopy | None, choice: str
) -> Callable[..., Float[Tensor, "B P"]] | None:
    """Compile in place; returns what computes the target's keys, where that is compiled as a whole."""
    # DDP would have dynamo cut each block at its buckets. Blocks are units of backward already.
    dynamo.config.optimize_ddp = choice != "blocks"
    if choice == "blocks":
        # All blocks share one Python frame. Each kind of block, shape and grad mode is one entry in its
        # cache: CMAE needs seven, torch allows eight.
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
        for branch in (model, None if target_copy is None else target_copy.encoder):
            for module in () if branch is None else branch.modules():
                if isinstance(module, Block):
                    module.compile(fullgraph=True, dynamic=False)
    if choice not in WHOLE_BRANCHES:
        return None
    mode = WHOLE_BRANCHES[choice]
    model.compile(fullgraph=True, dynamic=False, mode=mode)
    keys: Callable[..., Tensor] = torch.compile(
        model.target_keys, fullgraph=True, dynamic=False, mode=mode
    )
    return keys


def _distribute(
    model: CMAE, optim: OptimConfig, parallel: str, world: World
) -> CMAE | DistributedDataParallel:
    """What the online pass is called on."""
    if world.world_size == 1:
        return model
    set_all_reduce(model, sum_over_ranks)
    if parallel in ("fsdp", "hsdp"):
        wire = _DTYPES.get(optim.gradient_compression)
        shard_model(model, world, nodes_replicate=parallel == "hsdp", wire=wire)
        return model
    network = DistributedDataParallel(
        model,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **_NO_BUFFER_SYNC,
    )
    hooks = {"fp16": default_hooks.fp16_compress_hook, "bf16": default_hooks.bf16_compress_hook}
    if optim.gradient_compression in hooks:
        network.register_comm_hook(None, hooks[optim.gradient_compression])
    return network
