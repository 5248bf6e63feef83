"""One process or many: the process group, and the collectives that the loop needs."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from cmae.errors import CmaeError
from cmae.printable import MAX_LINE, printable
from cmae.train.config import COLLECTIVE_TIMEOUT_S
from cmae.train.machine import usable_cores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def threads_per_rank(device_type: str = "cpu") -> int:
    """Threads that decode: this process's share of the cores that its node's ranks may use together.

    On a GPU two of them are left to the threads that launch its work: the step's and the views'. With a
    thread for each of 16 cores they ran a quarter slower (H100, November 2026).
    """
    local = _number_from_environment("LOCAL_WORLD_SIZE", 1) if _announced_size() > 1 else 1
    share = int(usable_cores()) // max(1, local)
    left_free = min(2, share // 3) if device_type == "cuda" else 0
    return max(1, share - left_free)


def ranks_of_a_node(world: World) -> int | None:
    """Ranks on each node, as launchers say; None where nodes differ. A collective."""
    found = set(gather_values(_number_from_environment("LOCAL_WORLD_SIZE", 1), world))
    return found.pop() if len(found) == 1 else None


_LAUNCHER = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets beside WORLD_SIZE."""

_PATIENCE_S = 10.0
"""Seconds without the other ranks before a line says so."""


def _number_from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, "").strip() or str(default)
    if not value.isascii() or not value.isdecimal():
        raise CmaeError(
            f"{name} is {value!r} in the environment; it must be a whole number, which torchrun sets: "
            f"`unset {name}` to run alone",
            key=name,
        )
    return int(value)


def _announced_size() -> int:
    """Number of ranks that a launcher announces.

    Raises:
        CmaeError: The environment is that of no launcher, such as one left over in a shell.
    """
    world_size = _number_from_environment("WORLD_SIZE", 1)
    if world_size <= 1:
        return 1
    alone = (
        f"start the ranks with torchrun, or `unset WORLD_SIZE {' '.join(_LAUNCHER)}` to run alone"
    )
    missing = [name for name in _LAUNCHER if not os.environ.get(name, "").strip()]
    if missing:
        raise CmaeError(
            f"WORLD_SIZE is {world_size} in the environment, but {', '.join(missing)} not set: {alone}",
            key="WORLD_SIZE",
        )
    rank, port = (_number_from_environment(name, 0) for name in ("RANK", "MASTER_PORT"))
    if rank >= world_size or not 0 < port < 1 << 16:
        raise CmaeError(
            f"RANK is {rank}, WORLD_SIZE {world_size} and MASTER_PORT {port} in the environment, which no "
            f"launcher sets: {alone}",
            key="WORLD_SIZE",
        )
    return world_size


@contextmanager
def join_world(device: str = "auto", *, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> Iterator[World]:
    """Join the process group that torchrun announces; without one, run alone and without a group.

    Args:
        device: Name 'auto', 'cpu' or 'cuda'.
        timeout_s: Seconds that a collective waits for the other ranks.

    Raises:
        CmaeError: The device is not one of these, or is not there; the environment is that of no launcher; or
            the other ranks do not come.
    """
    world_size = _announced_size()
    if world_size == 1:
        yield World(0, 1, _choose_device(device, 0))
        return
    chosen = _choose_device(device, _number_from_environment("LOCAL_RANK", 0))
    on_gpu = chosen.type == "cuda"
    with _meeting(world_size):
        # Control numbers and objects travel over gloo: NCCL would make the host wait for the device's queue.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if on_gpu else None,
        )
    try:
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    finally:
        dist.destroy_process_group()


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because a rank that takes part is gone or does not answer."""
    text = str(error)
    is_gloo = "gloo" in text and ("peer" in text or "imed out" in text)
    return isinstance(error, dist.DistError) or is_gloo


@contextmanager
def _meeting(world_size: int) -> Iterator[None]:
    """Say what is waited for, when the other ranks are late.

    Raises:
        CmaeError: They do not come.
    """
    rank, address, port = (os.environ[name] for name in _LAUNCHER)
    what = (
        f"rank {rank} waits for {world_size - 1} other rank(s) at {address}:{port}, as WORLD_SIZE, RANK, "
        "MASTER_ADDR and MASTER_PORT in the environment say; where no launcher has set them, unset them"
    )
    timer = threading.Timer(_PATIENCE_S, logger.warning, ("%s", printable(what, limit=MAX_LINE)))
    timer.daemon = True
    timer.start()
    try:
        yield
    except dist.DistError as error:
        reason = str(error).split("\n")[0]
        raise CmaeError(f"{what}. They did not come: {reason}", key="WORLD_SIZE") from error
    finally:
        timer.cancel()


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise CmaeError(key="speed.device", found=device, allowed="'auto', 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise CmaeError(
            "speed.device is 'cuda', but torch sees no GPU; run `cmae doctor` to learn why, "
            "or set speed.device=cpu"
        )
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise CmaeError(
            f"rank {local_rank} of this machine has no GPU: torch sees {torch.cuda.device_count()}; "
            "start torchrun with --nproc-per-node equal to the number of GPUs"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen


# torch 2.14 renamed it.
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class RowGatherer:
    """Rows of all ranks in one tensor, gathered while the caller goes on; without gradient.

    Args:
        world: Ranks that take part; each must call `add` equally often, with equal shapes.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._gathered: list[Tensor] = []
        self._under_way: list[tuple[dist.Work, Tensor]] = []

    def add(self, rows: Float[Tensor, "B D"]) -> None:
        """Start to gather this rank's rows."""
        if self._world.world_size == 1:
            self._gathered.append(rows)
            return
        rows = rows.contiguous()
        gathered = rows.new_empty(self._world.world_size * len(rows), rows.shape[1])
        work = _ALL_GATHER(gathered, rows, async_op=True)
        assert work is not None
        self._under_way.append((work, rows))  # NCCL still reads `rows`
        self._gathered.append(gathered)

    def wait(self) -> Float[Tensor, "G D"]:
        """All rows: call after call of `add`, in rank order within a call.

        On a GPU the stream waits, not the host.
        """
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()
        if len(self._gathered) > 1:
            self._gathered = [torch.cat(self._gathered)]
        return self._gathered[0]


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


def sum_over_ranks(value: Tensor) -> Tensor:
    """Differentiable sum of a tensor over all ranks; needs a process group."""
    total: Tensor = _SumOverRanks.apply(value)
    return total


def mean_over_ranks(value: Tensor, world: World) -> Tensor:
    """Mean of a tensor over all ranks, without gradient."""
    if world.world_size > 1:
        dist.all_reduce(value)
        value /= world.world_size
    return value


def largest(number: int, world: World) -> int:
    """The largest of all ranks' numbers, on every rank."""
    return max(number for (number,) in Gathering([number], world).wait())


class Gathering:
    """A few numbers of every rank, on their way to every rank while the caller goes on.

    They travel from host to host: nothing waits for a device, nor for what is queued on it.

    Args:
        numbers: This rank's; equally many on every rank.
        world: Ranks that take part.
    """

    def __init__(self, numbers: Sequence[int], world: World) -> None:
        own = torch.tensor(numbers, dtype=torch.int64)
        self._rows = [own]
        self._work: dist.Work | None = None
        if world.world_size > 1:
            self._rows = [torch.empty_like(own) for _ in range(world.world_size)]
            self._work = dist.all_gather(self._rows, own, async_op=True)

    def wait(self) -> list[list[int]]:
        """All numbers, in rank order."""
        if self._work is not None:
            self._work.wait()
        return [row.tolist() for row in self._rows]


def gather_values(value: Any, world: World) -> list[Any]:
    """Every rank's value, in rank order, on every rank; anything that pickles."""
    if world.world_size == 1:
        return [value]
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any, world: World) -> Any:
    """The first rank's value, on every rank; anything that pickles."""
    if world.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
