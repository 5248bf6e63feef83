"""Weights and optimiser in shards over ranks: FSDP2, ZeRO-1, and the whole states that checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from cmae.errors import CmaeError
from cmae.model import CMAE
from cmae.model.blocks import Block
from cmae.train.distributed import World, gather_values, ranks_of_a_node

_OUTSIDE_FORWARD = ("target_keys", "reconstruct", "features")
"""Methods of the model, beside `forward`, that read its weights."""

Groups = Iterable[dict[str, Any]]


def shard_model(
    model: CMAE, world: World, *, nodes_replicate: bool, wire: torch.dtype | None = None
) -> None:
    """Leave each rank its part of every weight of both branches, in place (FSDP2).

    A block's weights are gathered before it runs, and dropped after; the target's, which follow the same cut,
    too, so that its moving average needs no messages.

    Args:
        model: Model whose weights are the same on all ranks.
        world: Ranks that take part.
        nodes_replicate: Whether the ranks of a node share the weights out among themselves, with a copy on
            every node (hybrid sharding); else all ranks do.
        wire: Number format of gradients between ranks; None: that of the weights.

    Raises:
        CmaeError: The nodes have unequal numbers of ranks.
    """
    mesh = _build_mesh(world, nodes_replicate=nodes_replicate)
    policy = MixedPrecisionPolicy(reduce_dtype=wire)
    parts: list[nn.Module] = [part for part in model.modules() if isinstance(part, Block)]
    parts += [part for part in (model.encoder, model.target_encoder) if part is not None]
    for part in (*parts, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for name in _OUTSIDE_FORWARD:
        register_fsdp_forward_method(model, name)
    for encoder in (model.encoder, model.target_encoder):
        if encoder is not None:
            register_fsdp_forward_method(encoder, "mean_tokens")


def _build_mesh(world: World, *, nodes_replicate: bool) -> DeviceMesh:
    kind, size = world.device.type, world.world_size
    if not nodes_replicate:
        return init_device_mesh(kind, (size,))
    per_node = ranks_of_a_node(world)
    if per_node is None:
        raise CmaeError(
            "speed.parallel is 'hsdp', which shares the weights out inside each node, and the nodes have "
            "unequal numbers of ranks; start as many on each, or set speed.parallel=fsdp",
            key="speed.parallel",
        )
    shape = (size // per_node, per_node)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def place_like(value: Any, parameter: Tensor) -> Any:
    """A whole tensor as this rank's part of it, cut as `parameter` is; anything else as it was.

    Args:
        value: Weight or moment of `parameter`, the same on all ranks; or a counter.
        parameter: Sharded parameter, or a plain one.
    """
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor):
        return value
    if value.shape != parameter.shape:
        return value
    # Every rank has the whole: each cuts its own part out, and nothing is sent.
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor that may lie in shards. A collective where it does."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_part(value: Tensor) -> Tensor:
    """This rank's part of a tensor that may lie in shards."""
    return value.to_local() if isinstance(value, DTensor) else value


def gather_state(value: Any, world: World) -> Any:
    """A nested state with whole tensors in host memory on the first rank; without them on the others.

    One tensor at a time is whole on the device. A collective.

    Args:
        value: Nested dicts and lists of tensors, sharded ones among them, and plain values.
        world: Ranks that take part.
    """
    if isinstance(value, Tensor):
        whole = whole_tensor(value.detach())
        return whole.to("cpu", copy=True) if world.is_main else None
    if isinstance(value, Mapping):
        return {name: gather_state(item, world) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [gather_state(item, world) for item in value]
    return value


class ZeroOptimizer(torch.optim.Optimizer):
    """An optimiser of which each rank holds the state of some parameters alone (ZeRO, stage 1).

    Every parameter belongs to one rank, which moves it and sends it to the others. Results are those of the
    optimiser inside, bit for bit. Source: arXiv 1910.02054, section 5.1.

    torch's ZeroRedundancyOptimizer does the same and is not taken: docs/design/0026.

    Args:
        groups: Groups of parameters with their options.
        build: Function that makes the optimiser of this rank's parameters, of groups like these.
        world: Ranks that take part.
    """

    _step_supports_amp_scaling = True
    """GradScaler hands `found_inf` over instead of waiting for it."""

    def __init__(
        self, groups: Groups, build: Callable[[Groups], torch.optim.Optimizer], world: World
    ) -> None:
        groups = list(groups)
        parameters = [one for group in groups for one in group["params"]]
        self._world = world
        self._owner = share_out(parameters, world.world_size)
        self._inside = build(
            {**group, "params": [one for one in group["params"] if self.is_own(one)]}
            for group in groups
        )
        super().__init__(groups, self._inside.defaults)
        by_message: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for one in parameters:
            by_message.setdefault((self._owner[id(one)], one.dtype), []).append(one)
        # One rank after the other, in the same order on all.
        self._messages = sorted(by_message.items(), key=lambda item: item[0][0])

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the own parameters, and take the others from their owners."""
        for outer, inner in zip(self.param_groups, self._inside.param_groups, strict=True):
            inner.update({name: value for name, value in outer.items() if name != "params"})
        handed_over = [name for name in ("grad_scale", "found_inf") if hasattr(self, name)]
        for name in handed_over:
            setattr(self._inside, name, getattr(self, name))
        self._inside.step()
        for name in handed_over:
            delattr(self._inside, name)
        self._spread()

    def state_dict(self) -> dict[str, Any]:
        """The state of the own parameters under their numbers among all; `gather` completes it."""
        mine = self._inside.state
        numbers = {parameter: number for number, parameter in enumerate(self._all())}
        state = {numbers[one]: dict(values) for one, values in mine.items() if values}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the own parameters' part of a whole state, such as that of an optimiser without shards."""
        everything = self._all()
        own = [number for number, one in enumerate(everything) if self.is_own(one)]
        place = {number: index for index, number in enumerate(own)}
        groups, state = state_dict["param_groups"], state_dict["state"]
        for group, stored in zip(self.param_groups, groups, strict=True):
            group.update({name: value for name, value in stored.items() if name != "params"})
        inner_groups = []
        for stored, mine in zip(groups, self._inside.state_dict()["param_groups"], strict=True):
            inner_groups.append({**stored, "params": mine["params"]})
        # Inside, parameters are numbered group by group, as the own ones are here.
        inner_state = {place[number]: state[number] for number in own if number in state}
        self._inside.load_state_dict({"state": inner_state, "param_groups": inner_groups})

    def is_own(self, parameter: Tensor) -> bool:
        """Whether this rank keeps a parameter's state."""
        return self._owner[id(parameter)] == self._world.rank

    def gather(self) -> dict[str, Any]:
        """The whole state in host memory on the first rank, {} on the others. A collective."""
        own = self.state_dict()
        shapes = gather_values(_shapes(own["state"]), self._world)
        state: dict[int, dict[str, Tensor]] = {}
        for rank, found in enumerate(shapes):
            for number, values in found.items():
                received = {
                    name: self._bring(own["state"].get(number, {}).get(name), rank, shape, dtype)
                    for name, (shape, dtype) in values.items()
                }
                if self._world.is_main:
                    state[number] = received
        if not self._world.is_main:
            return {}
        return {"state": dict(sorted(state.items())), "param_groups": own["param_groups"]}

    def _bring(
        self, value: Tensor | None, rank: int, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """One tensor of a rank, on the first rank's host."""
        device = self._world.device
        if rank != 0:
            if self._world.rank == rank:
                assert value is not None
                dist.send(value.to(device).contiguous(), dst=0)
            elif self._world.is_main:
                value = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(value, src=rank)
        return value.to("cpu", copy=True) if self._world.is_main and value is not None else _NOTHING

    def _all(self) -> list[Tensor]:
        return [one for group in self.param_groups for one in group["params"]]

    @torch.no_grad()
    def _spread(self) -> None:
        """One message of each rank and number format with all that it has moved."""
        for (rank, _), moved in self._messages:
            flat = torch.cat([one.reshape(-1) for one in moved])
            dist.broadcast(flat, src=rank)
            if rank != self._world.rank:
                parts = flat.split([one.numel() for one in moved])
                torch._foreach_copy_(
                    moved, [part.view_as(one) for part, one in zip(parts, moved, strict=True)]
                )


_NOTHING = torch.empty(0)


def _shapes(state: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, Any]]:
    return {
        number: {name: (value.shape, value.dtype) for name, value in values.items()}
        for number, values in state.items()
    }


def share_out(parameters: Sequence[Tensor], num_ranks: int) -> dict[int, int]:
    """Rank of each parameter, by `id`: the largest first, each to the rank that has the least so far."""
    load = [0] * num_ranks
    owner = {}
    for one in sorted(parameters, key=Tensor.numel, reverse=True):
        rank = load.index(min(load))
        owner[id(one)] = rank
        load[rank] += one.numel()
    return owner
