"""How a step's images are shared out over ranks and passes, and how many of them a device holds at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cmae.errors import CmaeError
from cmae.model import ModelConfig
from cmae.model.analysis.operations import FULL, HALF, Precision
from cmae.model.analysis.roofline import Memory, Shards, count_memory
from cmae.train.config import Config
from cmae.train.distributed import World, largest, ranks_of_a_node
from cmae.train.machine import compute_capability

RESERVE = 0.08
"""Share of a GPU's memory for the CUDA context, cuBLAS and the allocator's fragments."""
LOADER_RESERVE_BYTES = 2e9
"""Device memory that is left to decoders and to finished batches."""
HOST_SHARE = 0.5
"""Share of a host's free memory that a run on a CPU takes."""


@dataclass(frozen=True)
class BatchSplit:
    """How one optimiser step's images are shared out."""

    micro_batch_size: int
    accumulation: int

    @classmethod
    def of(
        cls, global_batch_size: int, micro_batch_size: int | None, world_size: int
    ) -> BatchSplit:
        """Split a global batch evenly over ranks and micro-batches.

        Raises:
            CmaeError: the global batch does not divide.
        """
        share = _share(global_batch_size, world_size)
        micro = min(micro_batch_size or share, share)
        if share % micro:
            divisor = divisors(share, micro)[-1]
            raise CmaeError(
                f"speed.micro_batch_size is {micro}, which does not divide the {share} images of "
                f"each rank ({global_batch_size} / {world_size}); use for instance {divisor}"
            )
        return cls(micro, share // micro)


def split_batch(
    config: Config,
    world: World,
    *,
    num_ranks: int | None = None,
    before: int | None = None,
    log: Callable[[str], None] | None = None,
    free_bytes: float | None = None,
) -> BatchSplit:
    """Split the global batch as configured, or by what fits. A collective where it is 'auto'.

    Args:
        config: Configuration of the run.
        world: This process among all.
        num_ranks: Ranks that share the batch; None = those of `world`.
        before: Micro-batch of the run that is continued: 'auto' keeps it where it still fits.
        log: Gets a line about what was chosen.
        free_bytes: Memory for the step; None = what the device says.

    Raises:
        CmaeError: The global batch does not divide, not one image fits, or a pass has too few for the heads.
    """
    chosen, total = config.speed.micro_batch_size, config.optim.global_batch_size
    num_ranks = num_ranks or world.world_size
    if chosen != "auto":
        split = BatchSplit.of(total, chosen, num_ranks)
        check_norm_rows(config.model, split, num_ranks)
        return split
    share = _share(total, num_ranks)
    memory = step_memory(config, world.device, shards_of(config, num_ranks, ranks_of_a_node(world)))
    free = _free_bytes(world.device) if free_bytes is None else free_bytes
    # Ranks on unlike cards take what fits on the smallest.
    fits = -largest(-memory.largest_batch(free), world)
    least = 2 if _has_batch_norm(config.model) and num_ranks == 1 else 1
    sizes = [one for one in divisors(share, fits) if one >= least]
    if not sizes:
        raise CmaeError(
            f"speed.micro_batch_size is 'auto', and the memory model finds no pass that fits: weights, "
            f"gradients and AdamW take {memory.fixed / 1e9:.1f} GB, a checkpoint's copy "
            f"{memory.snapshot / 1e9:.1f} GB, an image {memory.activations_per_image / 1e9:.2f} GB, and "
            f"{free / 1e9:.1f} GB are free on "
            f"{world.device}; choose a smaller model, free the device, or try a number",
            key="speed.micro_batch_size",
        )
    micro = before if before in sizes else sizes[-1]
    split = BatchSplit(micro, share // micro)
    if log is not None:
        kept = ", as before" if micro == before else ""
        limit = "the whole share" if micro == share else f"the model of memory allows {fits}"
        log(
            f"speed.micro_batch_size: auto takes {micro} images a pass{kept}, {split.accumulation} pass(es) "
            f"a step ({limit}; about {memory.total(micro) / 1e9:.1f} of {free / 1e9:.1f} GB "
            f"free, {memory.snapshot / 1e9:.1f} of which a checkpoint takes)"
        )
    return split


def shards_of(config: Config, num_ranks: int, per_node: int | None) -> Shards:
    """Ranks among which speed.parallel shares out what each would hold.

    Args:
        config: Configuration of the run.
        num_ranks: All ranks.
        per_node: Ranks of a node; None where nodes differ, which 'hsdp' refuses.
    """
    inside = min(per_node or num_ranks, num_ranks)
    ways = {
        "ddp": Shards(),
        "zero1": Shards(weights=1, moments=num_ranks),
        "fsdp": Shards(weights=num_ranks, moments=num_ranks),
        "hsdp": Shards(weights=inside, moments=inside),
    }
    return ways[config.speed.parallel]


def step_memory(config: Config, device: torch.device, shards: Shards | None = None) -> Memory:
    """Memory of a step by the cost model: what autocast keeps on a GPU, twice that in fp32."""
    precision = step_precision(config, compute_capability(device))
    num_keys = config.optim.global_batch_size
    memory = count_memory(config.model, precision, num_keys=num_keys, shards=shards)
    if config.optim.precision == "fp32":
        wide = memory.activations_per_image * FULL / HALF
        return replace(memory, activations_per_image=wide, cast_weights=0)
    return memory


def step_precision(config: Config, capability: tuple[int, int] | None) -> Precision:
    """The number formats of a run on a GPU of this compute capability, as the cost model knows them."""
    return Precision(
        residual_bytes=HALF if config.optim.residual == "16bit" else FULL,
        fused=config.speed.resolved(capability).compile != "none",
        target_copy=config.speed.target_copy,
        recompute=config.speed.recompute == "blocks",
    )


def check_norm_rows(model: ModelConfig, split: BatchSplit, world_size: int) -> None:
    """Refuse batches of one image where a batch norm needs two.

    Args:
        model: The model, whose heads may have one.
        split: Shares of the global batch.
        world_size: Number of ranks, whose rows the norm sees together.

    Raises:
        CmaeError: One image is all that the norm would see.
    """
    if _has_batch_norm(model) and split.micro_batch_size * world_size < 2:
        name = "optim.global_batch_size" if split.accumulation == 1 else "speed.micro_batch_size"
        raise CmaeError(
            f"{name} is 1 and there is one rank, but the heads' batch norm needs 2 images or more in a pass: "
            f"raise {name}, or set model.head_norm=layer",
            key=name,
        )


def divisors(share: int, limit: int) -> list[int]:
    """Sizes of equal micro-batches of a share, up to a limit, the smallest first."""
    return [size for size in range(1, min(limit, share) + 1) if share % size == 0]


def _has_batch_norm(model: ModelConfig) -> bool:
    return model.has_contrast and model.head_norm == "batch"


def _share(global_batch_size: int, world_size: int) -> int:
    """Images of one rank.

    Raises:
        CmaeError: They do not divide.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest or not share:
        fit = max(world_size, round(global_batch_size / world_size) * world_size)
        raise CmaeError(
            f"optim.global_batch_size is {global_batch_size}, which {world_size} ranks cannot "
            f"share equally; use a multiple of {world_size}, for instance {fit}"
        )
    return share


def _free_bytes(device: torch.device) -> float:
    """What a run may take: of a GPU all but the reserves, of a host half of what is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - RESERVE * total - LOADER_RESERVE_BYTES
    import psutil

    available: int = psutil.virtual_memory().available
    return HOST_SHARE * available
