"""`cmae plan`: hours, memory and what binds of a run on GPUs that nobody has rented yet."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from cmae.errors import CmaeError, require
from cmae.model import count_parameters
from cmae.train.batch_split import divisors, shards_of
from cmae.train.bench.estimate import Estimate, estimate_step, find_measured
from cmae.train.config import Config
from cmae.train.config_parser import load_recipe
from cmae.train.gpus import GPUS, Gpu
from cmae.train.monitor.console import PlainConsole

IMAGENET = 1_281_167
"""Training images of ImageNet-1k."""

_UPDATE = ("optimiser", "EMA")
"""Parts of a step that come once, however many micro-batches it has."""

_FORWARD_OF_TRAINED = 1 / 3
"""Share of the trained parts' time that is their forward pass; the rest is the backward."""


@dataclass(frozen=True)
class Cluster:
    """GPUs, and what connects and feeds them."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    link_gb_per_s: float = 200.0
    network_gb_per_s: float = 25.0
    overlap: float = 0.8
    cores_per_gpu: float = 16.0
    images_per_core_s: float = 450.0
    storage_gb_per_s: float = 2.0
    image_kb: float = 110.0

    @property
    def num_nodes(self) -> int:
        """Nodes, the last one perhaps not full."""
        return math.ceil(self.num_gpus / self.gpus_per_node)


OPTIONS = {
    "gpus_per_node": "GPUs in a node",
    "link_gb_per_s": "all-reduce inside a node, for each GPU; NVLink of an A100: 300 each way by data sheet",
    "network_gb_per_s": "of each node to the others; InfiniBand HDR: 200 Gbit/s",
    "overlap": "share of the backward pass beside which gradients travel",
    "cores_per_gpu": "CPU cores for each GPU",
    "images_per_core_s": "images that a core reads, Huffman-decodes and hands to the GPU in a second",
    "storage_gb_per_s": "what a node reads from its disk or store",
    "image_kb": "mean size of an image; ImageNet: 110",
}
"""Fields of `Cluster` that are options, and what they mean."""


@dataclass(frozen=True)
class Plan:
    """One run on a cluster."""

    name: str
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    compute_ms: float
    """Kernels of a step by the cost model, times the correction."""
    communication_ms: float
    """Gradients, shards of weights and keys."""
    exposed_ms: float
    """What of it does not hide behind the backward pass."""
    loader_ms: float
    """What the loader needs for the images of a step, beside the training."""
    storage_ms: float
    steps: int
    memory_gb: float
    largest_micro_batch: int
    correction: float
    """Measured time over the model's; 1 without a measurement, or without --calibrate."""
    measured: str
    """Result file of the nearest measurement, and its ratio; '' without one."""

    @property
    def step_ms(self) -> float:
        """The longest of what runs side by side."""
        return max(self.compute_ms + self.exposed_ms, self.loader_ms, self.storage_ms)

    @property
    def binds(self) -> str:
        """What the step waits for."""
        times = {
            "GPU": self.compute_ms,
            "network": self.exposed_ms,
            "loader": self.loader_ms,
            "storage": self.storage_ms,
        }
        if self.compute_ms + self.exposed_ms >= max(self.loader_ms, self.storage_ms):
            return "GPU" if times["GPU"] >= times["network"] else "network"
        return "loader" if self.loader_ms >= self.storage_ms else "storage"

    @property
    def margin(self) -> float:
        """How many times faster what comes next could go."""
        sides = sorted((self.compute_ms + self.exposed_ms, self.loader_ms, self.storage_ms))
        return sides[-1] / sides[-2]

    @property
    def images_per_s(self) -> float:
        """Of all GPUs."""
        return 1e3 * self.global_batch_size / self.step_ms

    @property
    def hours(self) -> float:
        """Whole schedule, without start-up, checkpoints and repeats."""
        return self.steps * self.step_ms / 3.6e6


def parse_gpus(text: str) -> tuple[int, Gpu]:
    """Number and kind of '32xa100'.

    Raises:
        CmaeError: It is neither a number and a GPU's name nor a name alone.
    """
    match = re.fullmatch(r"(?:(\d{1,6})x)?([\w-]+)", text.strip().lower())
    if match is None or match[2] not in GPUS or match[1] == "0":
        raise CmaeError(
            f"--gpus is {text!r}; it must be a number and a GPU such as 32xa100: one of {', '.join(GPUS)}",
            key="--gpus",
        )
    return int(match[1] or 1), GPUS[match[2]]


def plan_run(
    name: str,
    config: Config,
    cluster: Cluster,
    *,
    images: int = IMAGENET,
    results: Path = Path("benchmarks/results"),
    calibrate: bool = False,
) -> Plan:
    """Predict one run.

    Args:
        name: Name of the recipe.
        config: Configuration of the run.
        cluster: GPUs and what is around them.
        images: Images of an epoch.
        results: Folder of measured steps.
        calibrate: Whether to correct the model by the nearest measurement.

    Raises:
        CmaeError: The global batch does not divide, or does not fit.
    """
    total = config.optim.global_batch_size
    share, rest = divmod(total, cluster.num_gpus)
    if rest or not share:
        raise CmaeError(
            f"optim.global_batch_size is {total}, which {cluster.num_gpus} GPUs cannot share equally; name a "
            "number of GPUs that divides it",
            key="--gpus",
        )
    shards = shards_of(config, cluster.num_gpus, cluster.gpus_per_node)
    largest = estimate_step(config, cluster.gpu, batch_size=1, shards=shards).largest_batch
    chosen = config.speed.micro_batch_size
    wanted = min(chosen, share) if isinstance(chosen, int) else share
    sizes = divisors(share, min(wanted, largest))
    if not sizes:
        raise CmaeError(
            f"{name}: not one image fits into the {cluster.gpu.memory_gb:g} GB of {cluster.gpu.name}; take "
            f"GPUs with more memory{_milder(config)}",
            key="--gpus",
        )
    micro = sizes[-1]
    estimate = estimate_step(config, cluster.gpu, batch_size=micro, shards=shards)
    correction, measured = _correction(config, cluster.gpu, results)
    factor = correction if calibrate else 1.0
    compute = factor * _compute_ms(estimate, share // micro)
    beside, after = _communication_ms(config, cluster, share // micro)
    beside += _keys_ms(config, cluster, share)
    passes = _passes_beside(config, share // micro)
    room = cluster.overlap * factor * passes * _backward_ms(estimate)
    per_node = share * min(cluster.gpus_per_node, cluster.num_gpus)
    cores = cluster.cores_per_gpu * cluster.images_per_core_s
    steps = config.optim.total_steps or config.optim.epochs * (images // total)
    return Plan(
        name=name,
        global_batch_size=total,
        micro_batch_size=micro,
        accumulation=share // micro,
        compute_ms=compute,
        communication_ms=beside + after,
        exposed_ms=max(0.0, beside - room) + after,
        loader_ms=1e3 * share / cores,
        storage_ms=per_node * cluster.image_kb / cluster.storage_gb_per_s / 1e3,
        steps=steps,
        memory_gb=estimate.memory_gb,
        largest_micro_batch=largest,
        correction=factor,
        measured=measured,
    )


def _compute_ms(estimate: Estimate, accumulation: int) -> float:
    passes = sum(part.ms for part in estimate.parts if part.part not in _UPDATE)
    return accumulation * passes + (estimate.step_ms - passes)


def _milder(config: Config) -> str:
    """Settings that need less memory, as the end of a sentence."""
    settings = []
    if config.speed.parallel in ("ddp", "zero1"):
        settings.append("speed.parallel=fsdp")
    if config.speed.recompute == "none":
        settings.append("speed.recompute=blocks")
    return f", or --set {' '.join(settings)}" if settings else ""


def _backward_ms(estimate: Estimate) -> float:
    """Of one micro-batch, beside which gradients travel."""
    trained = [part for part in estimate.parts if part.part not in (*_UPDATE, "target")]
    return (1 - _FORWARD_OF_TRAINED) * sum(part.ms for part in trained)


def _passes_beside(config: Config, accumulation: int) -> float:
    """Backward passes of a step beside which messages travel.

    DDP sends once a step, beside the last of them. Shards are gathered for every pass, the forward one too.
    """
    if config.speed.parallel in ("ddp", "zero1"):
        return 1.0
    return accumulation / (1 - _FORWARD_OF_TRAINED)


def _communication_ms(config: Config, cluster: Cluster, accumulation: int) -> tuple[float, float]:
    """Rings in each node and among nodes: what travels beside the passes, and what after the optimiser.

    An all-reduce sends twice what an all-gather or a reduce-scatter does.
    """
    counts = count_parameters(config.model)
    width = 4 if config.optim.gradient_compression == "none" else 2
    gradients, weights = width * counts["online"], 4 * counts["online"]
    # For the forward and for the backward pass; the target has the former alone.
    gathered = accumulation * (2 * weights + 4 * counts["target"] + gradients)
    after = 0.0
    if config.speed.parallel in ("ddp", "zero1"):
        beside = _ring_ms(cluster, 2 * gradients, 2 * gradients)
        if config.speed.parallel == "zero1":
            after = _ring_ms(cluster, weights, weights)
    elif config.speed.parallel == "fsdp":
        beside = _ring_ms(cluster, gathered, gathered)
    else:
        beside = _ring_ms(cluster, gathered, 2 * accumulation * gradients)
    return beside, after


def _ring_ms(cluster: Cluster, inside_bytes: float, between_bytes: float) -> float:
    """Milliseconds of a ring in each node and of one among nodes."""
    nodes, inside = cluster.num_nodes, min(cluster.num_gpus, cluster.gpus_per_node)
    seconds = (inside - 1) / inside * inside_bytes / (1e9 * cluster.link_gb_per_s)
    seconds += (nodes - 1) / nodes * between_bytes / (1e9 * cluster.network_gb_per_s)
    return 1e3 * seconds


def _keys_ms(config: Config, cluster: Cluster, share: int) -> float:
    """The gather of the keys."""
    number = cluster.num_gpus
    if not config.model.has_contrast:
        return 0.0
    keys = 4 * share * number * config.model.proj_dim
    speed = cluster.network_gb_per_s if cluster.num_nodes > 1 else cluster.link_gb_per_s
    return 1e3 * (number - 1) / number * keys / (1e9 * speed)


def _correction(config: Config, gpu: Gpu, results: Path) -> tuple[float, str]:
    """Measured time over the model's, of the largest batch that was measured on this or a like GPU."""
    kinds = [gpu, *(one for one in GPUS.values() if one.name != gpu.name)]
    for kind in kinds:
        rows = [
            (size, row)
            for size in (512, 256, 128)
            for row in find_measured(results, config.model, kind.name, size)
            if row.get("method", "cmae") == ("cmae" if config.model.has_contrast else "mae")
        ]
        if rows:
            size, row = rows[0]
            plain = replace(config, speed=replace(config.speed, compile=row.get("compile", "none")))
            model = estimate_step(plain, kind, batch_size=size).images_per_s
            ratio = model / row["images_per_s"]["median"]
            return ratio, f"{row['file']}: {ratio:.2f} times the model's time"
    return 1.0, ""


def show_plans(
    plans: Sequence[Plan],
    cluster: Cluster,
    *,
    as_json: bool,
    calibrate: bool = False,
    dry_runs: Sequence[list[str]],
) -> int:
    """Print plans as a table, or as JSON; and what the dry run of each found."""
    dry_run_of = list(zip(plans, dry_runs, strict=True))
    if as_json:
        found = [_as_dict(plan) | {"dry_run": lines} for plan, lines in dry_run_of]
        print(json.dumps(found, indent=1))
        return 0
    title = f"{cluster.num_gpus} x {cluster.gpu.name}, {cluster.num_nodes} node(s)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("recipe", "batch", "ms", "network", "images/s", "GB", "binds", "hours", "GPU-h"):
        is_text = column in ("recipe", "binds")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    for plan in plans:
        passes = "" if plan.accumulation == 1 else f"{plan.accumulation}x"
        table.add_row(
            plan.name,
            f"{passes}{plan.micro_batch_size}",
            f"{plan.step_ms:.0f}",
            f"{plan.exposed_ms:.0f}",
            f"{plan.images_per_s:.0f}",
            f"{plan.memory_gb:.0f}",
            f"{plan.binds} {plan.margin:.1f}x",
            f"{plan.hours:.1f}",
            f"{plan.hours * cluster.num_gpus:.0f}",
        )
    console = PlainConsole()
    console.print(table)
    for plan, lines in dry_run_of:
        for line in lines:
            console.print(f"{plan.name}, dry run: {line}", soft_wrap=True)
    for line in _assumptions(plans, cluster, calibrate=calibrate):
        console.print(line, soft_wrap=True)
    return 0


def _assumptions(plans: Sequence[Plan], cluster: Cluster, *, calibrate: bool) -> list[str]:
    lines = [
        "Everything is a model but what names a result file: kernels by `cmae bench` (a roofline), links of "
        f"{cluster.link_gb_per_s:g} GB/s in a node and {cluster.network_gb_per_s:g} GB/s between nodes, "
        f"{100 * cluster.overlap:.0f} % of the backward pass beside the gradients, "
        f"{cluster.images_per_core_s:g} images/s a core on {cluster.cores_per_gpu:g} cores a GPU, "
        f"{cluster.storage_gb_per_s:g} GB/s of storage a node, {cluster.image_kb:g} kB an image.",
        "batch: passes of a step x images in one. ms: a step. network: what of it is waited for, beside the "
        f"backward pass. GB: of {cluster.gpu.memory_gb:g}. binds: what a step waits for, and how much faster "
        "what comes next could go.",
        "Not in it: start-up, checkpoints, the host's launches, repeated steps, and in what lies in shards "
        "(speed.parallel) the waits of a block for its weights.",
    ]
    for measured in dict.fromkeys(plan.measured for plan in plans if plan.measured):
        used = "taken into account" if calibrate else "--calibrate multiplies by it"
        lines.append(f"measured: {measured} ({used}).")
    if not any(plan.measured for plan in plans):
        lines.append("measured: nothing of these models; benchmarks/bench_step.py does.")
    return lines


def _as_dict(plan: Plan) -> dict[str, Any]:
    made = {
        name: getattr(plan, name)
        for name in ("step_ms", "images_per_s", "binds", "margin", "hours")
    }
    return asdict(plan) | made


def plan_recipes(parsed: Any) -> int:
    """Run the command.

    Args:
        parsed: Its options by name.

    Raises:
        CmaeError: An option is out of range, or a recipe does not fit the GPUs.
    """
    number, gpu = parse_gpus(parsed.gpus)
    cluster = Cluster(gpu, number, **{name: getattr(parsed, name) for name in OPTIONS})
    check_cluster(cluster)
    require(parsed.images >= 1, "--images", parsed.images, ">= 1")
    require(parsed.epochs is None or parsed.epochs >= 1, "--epochs", parsed.epochs, ">= 1")
    overrides: dict[str, Any] = {} if parsed.epochs is None else {"optim.epochs": parsed.epochs}
    for word in parsed.set:
        key, equals, value = word.partition("=")
        require(bool(equals), "--set", word, "key=value, such as speed.parallel=fsdp")
        overrides[key] = value
    configs = [load_recipe(name, overrides=overrides) for name in parsed.recipe]
    plans = [
        plan_run(
            Path(name).stem,
            config,
            cluster,
            images=parsed.images,
            results=parsed.results,
            calibrate=parsed.calibrate,
        )
        for name, config in zip(parsed.recipe, configs, strict=True)
    ]
    dry_runs: list[tuple[list[str], bool]] = [([], True)] * len(plans)
    if parsed.dry_run:
        dry_runs = [
            _dry_run(config, cluster, plan) for config, plan in zip(configs, plans, strict=True)
        ]
    lines = [lines for lines, _ in dry_runs]
    show_plans(plans, cluster, as_json=parsed.json, calibrate=parsed.calibrate, dry_runs=lines)
    return int(not all(agree for _, agree in dry_runs))


def _dry_run(config: Config, cluster: Cluster, plan: Plan) -> tuple[list[str], bool]:
    """Lines about a step of every rank, and whether all send the same in the same order."""
    from cmae.train.commands.plan.dry_run import describe, first_difference, run_ranks

    runs = run_ranks(
        config,
        num_ranks=cluster.num_gpus,
        per_node=min(cluster.gpus_per_node, cluster.num_gpus),
        micro_batch_size=plan.micro_batch_size,
    )
    return describe(runs, memory_gb=plan.memory_gb), not first_difference(runs)


def check_cluster(cluster: Cluster) -> None:
    """Refuse numbers that are not positive.

    Raises:
        CmaeError: Names the option.
    """
    for name, value in asdict(cluster).items():
        if isinstance(value, int | float):
            require(value > 0, f"--{name}", value, "> 0")
    require(cluster.overlap <= 1, "--overlap", cluster.overlap, "between 0 and 1")
