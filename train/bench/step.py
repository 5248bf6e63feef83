"""How fast is the training step, where does its time go, and what does each switch give?

The step is the one of `cmae pretrain` (TrainStep), fed with synthetic batches. Utilisation is that of the
published multiply-adds, against a large matrix product measured in the same run and against the vendor's
number. Parts are timed in steps of their own, by CUDA events (by the clock on a CPU), after the timed rounds.
"""

from __future__ import annotations

import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.profiler import ProfilerActivity, profile

from cmae.model import ModelConfig, build_model, count_multiply_adds, draw_mask
from cmae.model.decoder import Decoder
from cmae.pipeline import Batch, ViewConfig, synthetic_batches
from cmae.train.bench.config import BenchConfig
from cmae.train.bench.estimate import measure_matmul_tflops
from cmae.train.bench.harness import Measurement, Report, interleave, summarise
from cmae.train.config import Config, OptimConfig, SpeedConfig
from cmae.train.distributed import World
from cmae.train.gpus import vendor_tflops
from cmae.train.loop.step import WHOLE_BRANCHES, TrainStep
from cmae.train.machine import compute_capability

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# Each changes one thing; 'best' is what they should give together. What matters most comes first: the last
# are left out when time is short.
PLAIN = {"compile": "none", "sdpa": "torch"}
LEVERS: dict[str, dict[str, dict[str, Any]]] = {
    "base": {},
    "residual: 16bit": {"optim": {"residual": "16bit"}},
    "target_copy": {"speed": {"target_copy": True}},
    "sdpa: flash": {"speed": {"sdpa": "flash"}},
    "sdpa: cudnn": {"speed": {"sdpa": "cudnn"}},
    "compile: blocks": {"speed": {"compile": "blocks"}},
    "best": {
        "speed": {"compile": "blocks", "target_copy": True},
        "optim": {"residual": "16bit"},
    },
    "best, model_graphs": {
        "speed": {"compile": "model_graphs", "target_copy": True},
        "optim": {"residual": "16bit"},
    },
    "sdpa: auto": {"speed": {"sdpa": "auto"}},
    "sdpa: math": {"speed": {"sdpa": "math"}},
    "compile: model": {"speed": {"compile": "model"}},
    "compile: model_graphs": {"speed": {"compile": "model_graphs"}},
}


def levers_here() -> list[str]:
    """Names of the switches that this device has; those that need 16 bits are of a GPU alone."""
    return list(LEVERS) if ON_GPU else ["base", "sdpa: flash", "sdpa: math"]


@dataclass(frozen=True)
class Case:
    """One configuration of the step; `optim.global_batch_size` images in one pass."""

    name: str
    """Of the model, for instance 'ViT-B'."""
    model: ModelConfig
    optim: OptimConfig
    speed: SpeedConfig

    @property
    def batch_size(self) -> int:
        """Images of a step."""
        return self.optim.global_batch_size

    def switched(
        self, *, speed: Mapping[str, Any] | None = None, optim: Mapping[str, Any] | None = None
    ) -> Case:
        """The case with some switches set."""
        return replace(
            self,
            speed=replace(self.speed, **(speed or {})),
            optim=replace(self.optim, **(optim or {})),
        )

    def describe(self) -> dict[str, Any]:
        """The columns that identify a row."""
        return {
            "model": self.name,
            "batch_size": self.batch_size,
            "method": "cmae" if self.model.has_contrast else "mae",
            "precision": self.optim.precision,
            "compile": self.speed.compile,
            "gmacs_per_image": count_multiply_adds(self.model)["training_step"] / 1e9,
        }


@dataclass(frozen=True)
class Plan:
    """How often and how long the contenders of a group are measured."""

    steps: int
    """Timed, in a round."""
    rounds: int
    build_until: float = float("inf")
    """`time.perf_counter` after which nothing more is built: building compiles."""


class Contender:
    """Model, optimiser and batch of one case, built once; a call is a measurement window of some steps."""

    def __init__(self, case: Case, *, steps: int) -> None:
        self.case, self.steps = case, steps
        started = time.perf_counter()
        before = allocated()
        config = case.model
        model = build_model(config, seed=0).to(DEVICE)
        self.step = TrainStep(model, case.optim, case.speed, World(0, 1, DEVICE), log=print)
        self.batch: Batch = next(
            synthetic_batches(
                ViewConfig(num_views=2 if config.has_contrast else 1, img_size=config.img_size),
                batch_size=case.batch_size,
                device=DEVICE,
                draw_mask=lambda index, epoch: draw_mask(config, index, seed=0, epoch=epoch),
                seed=0,
            )
        )
        self.take_step()
        synchronise()
        self.build_s = time.perf_counter() - started
        self.own_bytes = allocated() - before
        self.peak_bytes = 0
        self.is_warm = False

    def take_step(self) -> None:
        """One optimiser step."""
        self.step([self.batch], lr=1e-6, momentum=0.996)

    def __call__(self) -> Measurement:
        """The measurement window; the first call warms up."""
        if not self.is_warm and ON_GPU:
            for _ in range(3):
                self.take_step()
        self.is_warm = True
        synchronise()
        others = allocated() - self.own_bytes
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        measured = time_steps(self.take_step, steps=self.steps, images=self.case.batch_size)
        if ON_GPU:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - others)
        return measured

    def parts_ms(self) -> dict[str, float]:
        """Median milliseconds of each part over some more steps, and of the whole step."""
        spans = Spans()
        taken: dict[str, list[float]] = {}
        with spans.watching(self.step):
            for _ in range(self.steps if ON_GPU else 1):
                spans.clear()
                with spans.timed("step"):
                    self.take_step()
                for name, ms in spans.read().items():
                    taken.setdefault(name, []).append(ms)
        return {name: statistics.median(values) for name, values in taken.items()}

    def device_work(self) -> dict[str, Any]:
        """Milliseconds that kernels of a step run, and their number; the rest of a step, the device waits.

        The dearest kernels come by name, all launches of a step together.
        """
        if not ON_GPU:
            return {}
        synchronise()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            self.take_step()
            self.take_step()
            synchronise()
        kernels = [e for e in trace.events() if e.device_type == DeviceType.CUDA]
        total_ms: dict[str, float] = {}
        for kernel in kernels:
            total_ms[kernel.name] = total_ms.get(kernel.name, 0) + kernel.device_time_total / 2e3
        dearest = sorted(total_ms.items(), key=lambda item: -item[1])[:25]
        return {
            "device_ms": sum(total_ms.values()),
            "kernels": len(kernels) / 2,
            "dearest_ms": {name[:100]: round(ms, 3) for name, ms in dearest},
        }

    def host_work(self) -> dict[str, float]:
        """Milliseconds of the training thread in each Python function itself, of one step; the dearest."""
        profiler = cProfile.Profile()
        profiler.runcall(self.take_step)
        synchronise()
        rows = pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]
        own = {
            f"{Path(file).name}:{line} {name}": round(1e3 * values[2], 3)
            for (file, line, name), values in rows
        }
        return dict(sorted(own.items(), key=lambda item: -item[1])[:25])


class Spans:
    """Milliseconds between the starts and ends of named calls: CUDA events, or the clock on a CPU."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, Any, Any]] = []

    def clear(self) -> None:
        """Forget what was timed."""
        self._marks = []

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))

    @contextmanager
    def watching(self, step: TrainStep) -> Iterator[None]:
        """Wrap the methods that make up a step; parts inside a branch that is compiled whole have no span."""
        places: list[tuple[Any, str, str]] = [
            (step, "start_keys", "target"),
            (step, "update", "optimiser"),
            (step, "move_target", "EMA"),
            (step, "online_losses", "online"),
            (step, "differentiate", "backward"),
        ]
        if step.speed.compile not in WHOLE_BRANCHES:
            places += [(step.model.encoder, "forward", "encoder")]
            for name in ("pixel_decoder", "feature_decoder"):
                decoder = getattr(step.model, name)
                if isinstance(decoder, Decoder):
                    part = name.replace("_", " ")
                    calls = ("embed_tokens", "predict_last", "forward", "mean_patches")
                    places += [(decoder, call, part) for call in calls]
                    if name == "feature_decoder":
                        places.append((decoder.head, "forward", part))
        for owner, name, part in places:
            setattr(owner, name, self._wrap(getattr(owner, name), part))
        yield
        for owner, name, _ in places:
            delattr(owner, name)  # the class's own method comes back

    def read(self) -> dict[str, float]:
        """Milliseconds by name; what is left of the online pass are heads and losses, of the step 'other'."""
        synchronise()
        spans: dict[str, float] = {}
        for name, start, end in self._marks:
            ms = start.elapsed_time(end) if ON_GPU else 1e3 * (end - start)
            spans[name] = spans.get(name, 0.0) + ms
        online = spans.pop("online")
        inner = ("encoder", "pixel decoder", "feature decoder", "backward")
        known = sum(spans.get(name, 0.0) for name in inner)
        spans["heads and losses" if "encoder" in spans else "online forward"] = online - known
        spans["other"] = 2 * spans["step"] - sum(spans.values())
        return spans

    def _mark(self) -> Any:
        if not ON_GPU:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timed(part):
                return function(*args, **kwargs)

        return timed


def recipe_case(config: Config, bench: BenchConfig) -> Case:
    """The step of a recipe as one device of this machine takes it; on a CPU fp16 becomes fp32."""
    micro = config.speed.micro_batch_size
    own = micro if isinstance(micro, int) else (128 if ON_GPU else 4)
    optim = replace(config.optim, global_batch_size=bench.batch_size or own)
    if not ON_GPU and optim.precision == "fp16":
        print("a CPU has no fp16: the step is measured in fp32", file=sys.stderr)
        optim = replace(optim, precision="fp32", residual="fp32")
    speed = replace(config.speed.resolved(compute_capability(DEVICE)), micro_batch_size=None)
    if optim.precision == "fp32":
        speed = replace(speed, target_copy=False)
    model = config.model
    sizes = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H"}
    name = (
        f"ViT-{sizes.get(model.embed_dim, f'{model.embed_dim}x{model.depth}')}/{model.patch_size}"
    )
    return Case(name, model, optim, speed)


def bench_step(config: Config, bench: BenchConfig) -> Report:
    """The recipe's step, and MAE's as its public code does it; or the switches one at a time.

    Args:
        config: The recipe.
        bench: What to compare and how often.
    """
    base = recipe_case(config, bench)
    plan = Plan(bench.steps or (10 if ON_GPU else 1), bench.rounds or (5 if ON_GPU else 3))
    precision: str = base.optim.precision
    ceilings = {precision: measure_matmul_tflops(DEVICE, DTYPES[precision])}
    rows: list[dict[str, Any]] = []
    if bench.levers:
        plain = base.switched(speed=PLAIN)
        cases = {name: plain.switched(**LEVERS[name]) for name in levers_here()}
        measure_levers(cases, plan, ceilings, note=rows.append)
    else:
        modes = dict.fromkeys([base.speed.compile, *(["none", "blocks"] if ON_GPU else [])])
        cases = {mode: base.switched(speed={"compile": mode}) for mode in modes}
        rows = measure_group(cases, plan, ceilings)
        tidy()
        if bench.peers:
            rows += measure_peer(base, plan, ceilings, compile=base.speed.compile)
    settings: dict[str, Any] = {"batch_size": base.batch_size, "steps": plan.steps}
    settings |= {"rounds": plan.rounds, "precision": precision, "sdpa": base.speed.sdpa}
    label = f"{base.name.lower().replace('/', '-')}-b{base.batch_size}"
    return Report("levers" if bench.levers else "step", label, settings, rows)


class PeerContender:
    """MAE's step as its public code does it, on the same images; a call is a measurement window."""

    def __init__(self, case: Case, *, steps: int) -> None:
        from cmae.train.bench.peers.mae_step import MaeStep

        self.case, self.steps = case, steps
        self.step = MaeStep(case.model, case.optim, DEVICE)
        shape = (case.batch_size, case.model.img_size, case.model.img_size, 3)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)
        self.step(self.images)

    def __call__(self) -> Measurement:
        """The window of some steps."""
        synchronise()
        take_step = partial(self.step, self.images)
        return time_steps(take_step, steps=self.steps, images=self.case.batch_size)


def measure_peer(
    ours: Case, plan: Plan, ceilings: Mapping[str, float], *, compile: str
) -> list[dict[str, Any]]:
    """Rows of our step with MAE's objective and of MAE's own, in turn.

    Args:
        ours: The recipe.
        plan: How often and how long.
        ceilings: Rate of a matrix product by precision, TFLOP/s.
        compile: `speed.compile` of our step.
    """
    model = replace(ours.model, contrastive_loss="none", mask_ratio=0.75, mask_unit=1)
    case = replace(ours, model=model).switched(speed={"compile": compile})
    own = build(case, steps=plan.steps)
    if isinstance(own, str):
        return [{"name": "ours, MAE", **case.describe(), "error": own}]
    measured = interleave(
        {"ours, MAE": own, "public MAE code's step": PeerContender(case, steps=plan.steps)},
        rounds=plan.rounds,
    )
    return [
        {
            "name": name,
            **case.describe(),
            "method": name,
            "images_per_s": summarise([one.images_per_s for one in results]),
            **utilisation(case, [one.images_per_s for one in results], ceilings),
            "peak_memory_gb": own.peak_bytes / 1e9 if name == "ours, MAE" else 0.0,
            "gain": gain(results, measured["public MAE code's step"]),
        }
        for name, results in measured.items()
    ]


def time_steps(take_step: Callable[[], None], *, steps: int, images: int) -> Measurement:
    """A window of some steps of so many images each, to the end of the device's work."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        take_step()
    synchronise()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Measurement(steps * images, wall, cpu)


def allocated() -> int:
    """Bytes of live tensors on the GPU."""
    return torch.cuda.memory_allocated() if ON_GPU else 0


def synchronise() -> None:
    """Wait for the GPU."""
    if ON_GPU:
        torch.cuda.synchronize()


def build(case: Case, *, steps: int) -> Contender | str:
    """The contender, or why there is none: memory, or a device that cannot do it."""
    try:
        return Contender(case, steps=steps)
    except torch.OutOfMemoryError:
        return "out of memory"
    except (ValueError, RuntimeError, FailOnRecompileLimitHit) as error:
        return str(error).splitlines()[0]  # an OOM inside a capture arrives as a failed capture


def measure_group(
    cases: Mapping[str, Case], plan: Plan, ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Rows of cases that are measured in turn; those that cannot run say why.

    Args:
        cases: What is compared, by name; the gain is over the one named 'base'.
        plan: How often and how long.
        ceilings: Rate of a matrix product by precision, TFLOP/s.
    """
    built: dict[str, Contender | str] = {}
    for name, case in cases.items():
        # Building compiles, which takes as long as it takes; leave the rest of the time for the rounds.
        is_late = built and time.perf_counter() > plan.build_until
        built[name] = "no time left" if is_late else build(case, steps=plan.steps)
    ready = {name: value for name, value in built.items() if isinstance(value, Contender)}
    try:
        measured = interleave(ready, rounds=plan.rounds)
        parts = {name: contender.parts_ms() for name, contender in ready.items()}
        works = {
            name: contender.device_work() | {"host_ms": contender.host_work()}
            for name, contender in ready.items()
        }
    except torch.OutOfMemoryError:
        measured, parts, works = {}, {}, {}
    rows = []
    for name, case in cases.items():
        contender = built[name]
        if not isinstance(contender, Contender) or name not in measured:
            reason = contender if isinstance(contender, str) else "out of memory"
            rows.append({"name": name, **case.describe(), "error": reason})
            continue
        rows.append(
            {"name": name, **case.describe(), **describe_run(contender, measured[name], ceilings)}
        )
        rows[-1]["parts_ms"] = parts[name]
        rows[-1] |= works[name]
        if "base" in measured:
            rows[-1]["gain"] = gain(measured[name], measured["base"])
    return rows


def describe_run(
    contender: Contender, measured: Sequence[Measurement], ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """Rates, memory and seconds of building (the first step, with its compilation) of a contender."""
    rates = [m.images_per_s for m in measured]
    return {
        "images_per_s": summarise(rates),
        **utilisation(contender.case, rates, ceilings),
        "peak_memory_gb": contender.peak_bytes / 1e9,
        "build_s": round(contender.build_s, 3),
    }


def gain(measured: Sequence[Measurement], base: Sequence[Measurement]) -> dict[str, Any]:
    """Rate over the base's of the same round."""
    pairs = zip(measured, base, strict=True)
    return summarise([one.images_per_s / other.images_per_s for one, other in pairs])


def measure_levers(
    cases: Mapping[str, Case],
    plan: Plan,
    ceilings: Mapping[str, float],
    *,
    note: Callable[[dict[str, Any]], None],
) -> None:
    """One lever at a time, in turn with the base; `note` gets its row as soon as there is one.

    Only two contenders are in memory at once, and a process that is stopped has told all it has measured.
    """
    base = build(cases["base"], steps=plan.steps)
    for name, case in cases.items():
        row = {"name": name, **case.describe()}
        if isinstance(base, str) or time.perf_counter() > plan.build_until:
            note({**row, "error": base if isinstance(base, str) else "no time left"})
            continue
        contender = base if name == "base" else build(case, steps=plan.steps)
        if isinstance(contender, str):
            note({**row, "error": contender})
            continue
        try:
            measured = interleave({"base": base, name: contender}, rounds=plan.rounds)
            row |= describe_run(contender, measured[name], ceilings)
            row |= {
                "parts_ms": contender.parts_ms(),
                "gain": gain(measured[name], measured["base"]),
                **contender.device_work(),
                "host_ms": contender.host_work(),
            }
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        note(row)
        del contender
        tidy()


def tidy() -> None:
    """Give back memory, and forget what was compiled: torch's limit of compilations counts them all."""
    gc.collect()
    torch.compiler.reset()
    if ON_GPU:
        torch.cuda.empty_cache()


def utilisation(
    case: Case, rates: Sequence[float], ceilings: Mapping[str, float]
) -> dict[str, float | None]:
    """Published operations a second, and their share of the measured and of the vendor's rate."""
    tflops = 2e-3 * case.describe()["gmacs_per_image"] * statistics.median(rates)
    ceiling, vendor = ceilings[case.optim.precision], vendor_tflops(DEVICE)
    return {
        "tflops": tflops,
        "matmul_tflops": ceiling,
        "mfu_measured": tflops / ceiling,
        "mfu_vendor": tflops / vendor if vendor else None,
    }
