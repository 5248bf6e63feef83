"""How fast is the training step, where does its time go, and what does each switch give?

    python benchmarks/bench_step.py              methods x sizes x precisions x batch sizes
    python benchmarks/bench_step.py --levers     one switch at a time against a base

The step is the one of `cmae pretrain` (TrainStep), fed with synthetic batches. Utilisation is that of the
published multiply-adds, against a large matrix product measured in the same run and against the vendor's
number. Parts are timed in steps of their own, by CUDA events (by the clock on a CPU), after the timed rounds.

Predictions, written before the first run.
CPU (2 cores, ViT-S, CMAE): 3.3 images/s in fp32 for CMAE at 50 GFLOP/s a core, and twice that for MAE.
Levers there: `sdpa: math` 5 % slower, `sdpa: flash` is torch's own choice. Those that need 16 bits are
measured on a GPU alone: a CPU without bf16 instructions multiplies bf16 at 1 GFLOP/s a core, fp32 at 49.
H200, ViT-B, CMAE, fp16, B 128, from `cmae bench` (whose roofline no kernel can beat): eager reaches
35 % of the vendor's rate where the roofline says 55 %; compiled blocks +9 %, 16-bit residual +15 %, both
+20 %; pinned attention 0-3 %; CUDA graphs 3 % at B 128 and nothing at 512; target shadow 0-1 % (its refresh
moves what the casts moved, only launches are saved); fp8 target +8 %. ViT-L and H: 5-10 points nearer to the
ceiling than B.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lib.harness import Measurement, device_name, interleave, summarise, write_result
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.profiler import ProfilerActivity, profile

from cmae.model import ModelConfig, build_model, count_multiply_adds, draw_mask
from cmae.model.decoder import Decoder
from cmae.pipeline import Batch, ViewConfig, synthetic_batches
from cmae.train.commands.bench import GPUS, is_named, measure_matmul_tflops
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import World
from cmae.train.loop.step import WHOLE_BRANCHES, TrainStep

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = {
    "ti": (192, 12, 3, 16),
    "s": (384, 12, 6, 16),
    "b": (768, 12, 12, 16),
    "l": (1024, 24, 16, 16),
    "h": (1280, 32, 16, 14),
}

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
CPU_LEVERS = ["base", "sdpa: flash", "sdpa: math"]


@dataclass(frozen=True)
class Case:
    """One configuration of the step."""

    method: str
    size: str
    precision: str
    batch_size: int
    speed: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    img_size: int = 224

    @property
    def model(self) -> ModelConfig:
        """CMAE or MAE of a size."""
        width, depth, heads, patch = SIZES[self.size]
        config = ModelConfig(
            img_size=self.img_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            patch_size=patch,
        )
        if self.method == "mae":
            config = replace(
                config,
                contrastive_loss="none",
                mask_ratio=0.75,
                mask_unit=1,
                pos_embed_order="column",
            )
        return config

    def describe(self) -> dict[str, Any]:
        """The columns that identify a row."""
        return {
            "model": f"ViT-{self.size.upper()}",
            "batch_size": self.batch_size,
            "method": self.method,
            "precision": self.precision,
            "compile": self.speed.get("compile", "none"),
            "gmacs_per_image": count_multiply_adds(self.model)["training_step"] / 1e9,
        }


class Contender:
    """Model, optimiser and batch of one case, built once; a call is a measurement window of some steps."""

    def __init__(self, case: Case, *, steps: int) -> None:
        self.case, self.steps = case, steps
        started = time.perf_counter()
        before = allocated()
        config = case.model
        optim = OptimConfig(
            global_batch_size=case.batch_size, precision=case.precision, **case.optim
        )
        model = build_model(config, seed=0).to(DEVICE)
        self.step = TrainStep(
            model, optim, SpeedConfig(**{**PLAIN, **case.speed}), World(0, 1, DEVICE), log=print
        )
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
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(self.steps):
            self.take_step()
        synchronise()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if ON_GPU:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - others)
        return Measurement(self.steps * self.case.batch_size, wall, cpu)

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
        kernels = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
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
    cases: dict[str, Case], arguments: argparse.Namespace, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows of cases that are measured in turn; those that cannot run say why."""
    built: dict[str, Contender | str] = {}
    for name, case in cases.items():
        # Building compiles, which takes as long as it takes; leave the rest of the time for the rounds.
        is_late = built and time.perf_counter() > arguments.build_until
        built[name] = "no time left" if is_late else build(case, steps=arguments.steps)
    ready = {name: value for name, value in built.items() if isinstance(value, Contender)}
    try:
        measured = interleave(ready, rounds=arguments.rounds)
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
    contender: Contender, measured: Sequence[Measurement], ceilings: dict[str, float]
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
    cases: dict[str, Case],
    arguments: argparse.Namespace,
    ceilings: dict[str, float],
    *,
    note: Callable[[dict[str, Any]], None],
) -> None:
    """One lever at a time, in turn with the base; `note` gets its row as soon as there is one.

    Only two contenders are in memory at once, and a process that is stopped has told all it has measured.
    """
    base = build(cases["base"], steps=arguments.steps)
    for name, case in cases.items():
        row = {"name": name, **case.describe()}
        if isinstance(base, str) or time.perf_counter() > arguments.build_until:
            note({**row, "error": base if isinstance(base, str) else "no time left"})
            continue
        contender = base if name == "base" else build(case, steps=arguments.steps)
        if isinstance(contender, str):
            note({**row, "error": contender})
            continue
        try:
            measured = interleave({"base": base, name: contender}, rounds=arguments.rounds)
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
    case: Case, rates: Sequence[float], ceilings: dict[str, float]
) -> dict[str, float | None]:
    """Published operations a second, and their share of the measured and of the vendor's rate."""
    tflops = 2e-3 * case.describe()["gmacs_per_image"] * statistics.median(rates)
    device = device_name().lower()
    vendor = [gpu.tflops for gpu in GPUS.values() if is_named(gpu.name, device) and ON_GPU]
    return {
        "tflops": tflops,
        "matmul_tflops": ceilings[case.precision],
        "mfu_measured": tflops / ceilings[case.precision],
        "mfu_vendor": tflops / vendor[0] if vendor else None,
    }


def parse_arguments() -> argparse.Namespace:
    """The command line; defaults are small on a CPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--levers", nargs="*", choices=LEVERS, help="compare switches; all by default"
    )
    parser.add_argument("--methods", nargs="+", default=["cmae", "mae"], choices=["cmae", "mae"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["b"] if ON_GPU else ["ti"])
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[128, 256, 512] if ON_GPU else [2]
    )
    parser.add_argument("--steps", type=int, default=10 if ON_GPU else 1, help="timed, per round")
    parser.add_argument("--rounds", type=int, default=5 if ON_GPU else 3)
    precisions = ["fp16", "bf16"] if ON_GPU else ["fp32"]
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=precisions)
    modes = ["none", "blocks"] if ON_GPU else ["none"]
    parser.add_argument("--compile", nargs="+", choices=["none", "blocks", "model"], default=modes)
    parser.add_argument(
        "--budget-s", type=float, default=3600, help="groups after that are left out"
    )
    return parser.parse_args()


def main() -> None:
    """Measure and write the result file."""
    arguments = parse_arguments()
    config = vars(arguments).copy()
    arguments.build_until = time.perf_counter() + 0.8 * arguments.budget_s
    ceilings = {name: measure_matmul_tflops(DEVICE, DTYPES[name]) for name in arguments.precisions}
    rows: list[dict[str, Any]] = []
    name = "step" if arguments.levers is None else "levers"
    chosen = [*arguments.sizes, *(f"b{size}" for size in arguments.batch_sizes)]
    if arguments.levers is not None:
        chosen += [arguments.methods[0], arguments.precisions[0]]
    label = "vit-" + "-".join(chosen)

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        told = f"{row['gain']['median']:.3f} of the base" if "gain" in row else row["error"]
        if "device_ms" in row:
            told += f", {row['kernels']:.0f} kernels of {row['device_ms']:.1f} ms together"
        print(f"{row['name']:<20} B {row['batch_size']:<4} {told}", flush=True)
        write_result(name, label=label, config=config, rows=rows)

    for size in arguments.sizes:
        for batch_size in arguments.batch_sizes:
            if time.perf_counter() > arguments.build_until:
                print(f"no time left for ViT-{size.upper()}, {batch_size} images")
                continue
            cases = cases_of(size, batch_size, arguments)
            if arguments.levers is None:
                rows += measure_group(cases, arguments, ceilings)
                write_result(name, label=label, config=config, rows=rows)
            else:
                measure_levers(cases, arguments, ceilings, note=note)
            tidy()


def cases_of(size: str, batch_size: int, arguments: argparse.Namespace) -> dict[str, Case]:
    """What is compared within one group."""
    if arguments.levers is None:
        return {
            f"{method} {precision} {mode}": Case(
                method, size, precision, batch_size, speed={"compile": mode}
            )
            for method in arguments.methods
            for precision in arguments.precisions
            for mode in arguments.compile
        }
    precision = arguments.precisions[0]
    names = arguments.levers or (list(LEVERS) if ON_GPU else CPU_LEVERS)
    names = ["base", *(name for name in names if name != "base")]
    return {
        name: Case(arguments.methods[0], size, precision, batch_size, **LEVERS[name])
        for name in names
    }


if __name__ == "__main__":
    main()
