"""A step of every rank of a run that is too large for this machine: shapes, memory, and who sends what when.

Tensors have shapes and no numbers (fake tensors), and messages go nowhere (torch's fake process group): all
the rest is the run's own step, on the reference path of a CPU.
"""

import gc
import multiprocessing
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmae.kernels import use_backend
from cmae.model import CMAE, ModelConfig, build_model
from cmae.pipeline import Batch, LoaderState
from cmae.train import sharding
from cmae.train.config import Config
from cmae.train.distributed import World
from cmae.train.loop import step as step_module
from cmae.train.loop.step import TrainStep
from cmae.train.machine import usable_cores
from cmae.train.monitor.console import PlainConsole

_LOOK_EVERY = 8
"""Operators between two looks at the memory."""

_SPACES = ("c10d::", "_c10d_functional::")

_NAMES = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "broadcast_": "broadcast",
}
"""What torch's operators are called elsewhere."""


@dataclass
class RankRun:
    """What a rank did in one step."""

    rank: int
    messages: list[tuple[str, int, str]] = field(default_factory=list)
    """Collective, length of the whole tensor that it makes or takes, its format; in order."""
    held_bytes: int = 0
    """Between two steps: weights, target, moments, DDP's buckets."""
    peak_bytes: int = 0

    @property
    def sent(self) -> dict[str, tuple[int, float]]:
        """Number and bytes by collective."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for name, numel, dtype in self.messages:
            counts[name] += 1
            sizes[name] += numel * getattr(torch, dtype).itemsize
        return {name: (count, sizes[name]) for name, count in counts.items()}


def run_rank(
    config: Config, *, rank: int, num_ranks: int, per_node: int, micro_batch_size: int
) -> RankRun:
    """One rank's step.

    Args:
        config: Configuration of the run; fp16 is counted as bf16, which a CPU has.
        rank: Place of the rank.
        num_ranks: All ranks.
        per_node: Ranks of a node.
        micro_batch_size: Images of a pass.
    """
    precision = config.optim.precision.replace("fp16", "bf16")
    optim = replace(config.optim, precision=precision)  # type: ignore[arg-type]
    speed = replace(config.speed, compile="none", sdpa="torch", kernels="torch", device="cpu")
    world = World(rank, num_ranks, torch.device("cpu"))
    found, watch = RankRun(rank), _Watch()
    with torch.device("meta"):
        model = build_model(config.model, seed=0)
    with _fake_world(world, per_node, watch), use_backend("torch"):
        _allocate(model)
        step = TrainStep(model, optim, speed, world, log=lambda line: None)
        accumulation = max(1, optim.global_batch_size // (num_ranks * micro_batch_size))
        batches = [_batch(config.model, micro_batch_size) for _ in range(accumulation)]
        _allocate_moments(step)
        watch.messages.clear()
        gc.collect()
        found.held_bytes = watch.peak_bytes = watch.live_bytes()
        step(batches, lr=1e-3, momentum=0.99, with_norm=True)
    found.messages, found.peak_bytes = list(watch.messages), watch.peak_bytes
    return found


def run_ranks(
    config: Config, *, num_ranks: int, per_node: int, micro_batch_size: int
) -> list[RankRun]:
    """Every rank's step, on the cores of this machine; see `run_rank`."""
    one = partial(
        run_rank,
        config,
        num_ranks=num_ranks,
        per_node=per_node,
        micro_batch_size=micro_batch_size,
    )
    workers = min(num_ranks, max(1, int(usable_cores())))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_single_thread) as pool:
        runs = [pool.submit(one, rank=rank) for rank in range(num_ranks)]
        with Progress(console=PlainConsole(stderr=True), transient=True) as progress:
            return [run.result() for run in progress.track(runs, description="dry run")]


def _single_thread() -> None:
    torch.set_num_threads(1)


def describe(runs: Sequence[RankRun], *, memory_gb: float) -> list[str]:
    """Lines about what the ranks did.

    Args:
        runs: All of them.
        memory_gb: What the cost model says of one.
    """
    difference = first_difference(runs)
    count = len(runs[0].messages)
    order = f"ORDER DIFFERS: {difference}" if difference else "the same order on every rank"
    if not count:
        order = "as there is nobody to send to"
    sent = ", ".join(
        f"{number} {name} ({size / 1e9:.2f} GB)" for name, (number, size) in runs[0].sent.items()
    )
    held, peak = (
        max(getattr(run, name) for run in runs) / 1e9 for name in ("held_bytes", "peak_bytes")
    )
    return [
        f"{len(runs)} rank(s), {count} collectives a step, {order}{': ' if sent else ''}{sent}",
        f"memory of a rank: {held:.1f} GB between steps, {peak:.1f} GB at most (the cost model: "
        f"{memory_gb:.1f} GB)",
    ]


def first_difference(runs: Sequence[RankRun]) -> str:
    """Where ranks send in another order, in a line; '' where all agree."""
    first = runs[0]
    for one in runs[1:]:
        for place in range(max(len(first.messages), len(one.messages))):
            pair = [run.messages[place : place + 1] for run in (first, one)]
            if pair[0] != pair[1]:
                shown = [" ".join(map(str, *each)) if each else "nothing" for each in pair]
                return (
                    f"collective {place + 1} of a step: rank {first.rank} has {shown[0]}, rank "
                    f"{one.rank} has {shown[1]}"
                )
    return ""


class _Watch(TorchDispatchMode):
    """Notes collectives, and how much memory is in use at most."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int, str]] = []
        self.peak_bytes = 0
        self._live: dict[int, Callable[[], Any]] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # its parts come here one by one
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith(_SPACES) and "wait" not in name:
            self.note(name.split("::")[1], [x for x in tree_leaves(args) if isinstance(x, Tensor)])
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._live.setdefault(storage._cdata, weakref.ref(storage))
        self._count += 1
        if self._count % _LOOK_EVERY == 0:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result

    def note(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Note one collective."""
        if tensors:
            dtype = str(tensors[0].dtype).removeprefix("torch.")
            self.messages.append(
                (_NAMES.get(name, name), max(one.numel() for one in tensors), dtype)
            )

    def live_bytes(self) -> int:
        """Bytes of all storages that are in use."""
        total = 0
        for key, reference in list(self._live.items()):
            storage = reference()
            if storage is None:
                del self._live[key]
            else:
                total += storage.nbytes()
        return total


class _NoWait:
    """Stands for `HostFlag`: nothing has a value to wait for, and no step is skipped."""

    def __init__(self, flags: Any) -> None:
        torch.stack([flag.reshape(()) for flag in flags]).sum()

    def wait(self) -> bool:
        return False


@contextmanager
def _fake_world(world: World, per_node: int, watch: _Watch) -> Iterator[None]:
    """A process group that sends nothing, tensors without numbers, and stand-ins for what needs values."""

    class Replica(DistributedDataParallel):
        """DDP that compares nothing at its start, and whose messages are noted."""

        def __init__(self, module: CMAE, **options: Any) -> None:
            super().__init__(module, init_sync=False, **options)
            super().register_comm_hook(watch, _reduce)

        def register_comm_hook(self, state: object, hook: Callable[..., Any]) -> None:
            """The format on the wire is not looked at."""

    def build_mesh(*arguments: Any, **options: Any) -> DeviceMesh:
        with unset_fake_temporarily():
            return init_device_mesh(*arguments, **options)

    dist.init_process_group("fake", rank=world.rank, world_size=world.world_size, store=FakeStore())
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.object(step_module, "HostFlag", _NoWait))
            stack.enter_context(patch.object(step_module, "DistributedDataParallel", Replica))
            stack.enter_context(patch.object(sharding, "init_device_mesh", build_mesh))
            stack.enter_context(patch.object(sharding, "ranks_of_a_node", lambda world: per_node))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(watch)
            yield
    finally:
        dist.destroy_process_group()


def _reduce(watch: _Watch, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own all-reduce of a bucket, whose result is there at once."""
    watch.note("allreduce_", [bucket.buffer()])
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _allocate(model: CMAE) -> None:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    model._apply(lambda one: torch.empty(one.shape, dtype=one.dtype, device="cpu"))
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def _allocate_moments(step: TrainStep) -> None:
    """An update before the first step; a second step would not do, in which DDP sorts its buckets."""
    for parameter in step.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    step.scaler.scale(torch.zeros(()))  # makes the scale, which updates ask for
    step.update(0.0)


def _batch(config: ModelConfig, size: int) -> Batch:
    """A batch of the shapes that the loader hands out."""
    images = torch.zeros(size, config.img_size, config.img_size, 3, dtype=torch.uint8)
    ids = torch.zeros(size, config.num_patches, dtype=torch.int32)
    return Batch(
        online=images,
        target=images.clone() if config.has_contrast else None,
        ids_keep=ids[:, : config.num_keep],
        ids_mask=ids[:, config.num_keep :],
        sample_id=torch.zeros(size, dtype=torch.int64),
        label=torch.zeros(size, dtype=torch.int64),
        epoch=0,
        state=LoaderState(seed=0, epoch=0, offset=0, digest=""),
    )
