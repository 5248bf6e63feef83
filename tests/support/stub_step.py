"""Run one training step on fake CUDA tensors in every configuration; prints what it launched, as JSON.

python -m support.stub_step [configuration ...]        on the stub of support.cuda_stub
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmae.kernels import use_backend
from cmae.model import ModelConfig, build_model
from cmae.pipeline import Batch, LoaderState
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import World
from cmae.train.loop import step as step_module
from cmae.train.loop.step import TrainStep

GPU = torch.device("cuda", 0)
BATCH = 8
PLAIN = {"compile": "none"}


@dataclass(frozen=True)
class Case:
    """One configuration of the step, with ViT-B's widths and few blocks unless it says more."""

    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1


MAE = {"contrastive_loss": "none", "mask_ratio": 0.75, "mask_unit": 1}
FEW = {"depth": 2, "decoder_depth": 1, "feature_decoder_depth": 1}
FULL = {"depth": 12, "decoder_depth": 8, "feature_decoder_depth": 2}
CASES = {
    "vit_b": Case(model=FULL),
    "mae_vit_b": Case(model={**FULL, **MAE}),
    "default": Case(),
    "torch kernels": Case(speed={"kernels": "torch"}),
    "16-bit residual": Case(optim={"residual": "16bit"}),
    "target copy": Case(speed={"target_copy": True}),
    "two micro-batches": Case(micro_batches=2),
    "bf16": Case(optim={"precision": "bf16"}),
    "fp32": Case(optim={"precision": "fp32"}),
    "byol, visible": Case(model={"contrastive_loss": "byol", "target_input": "visible"}),
    "shared decoder": Case(model={"feature_decoder": "shared"}),
    "hybrid": Case(model={"encoder": "hybrid"}),
    "mae": Case(model=MAE),
    "contrast only": Case(model={"reconstruction_weight": 0.0}),
    "clip": Case(optim={"clip_grad": 1.0}),
}
_NO_LAUNCH = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
}
_NO_LAUNCH |= {"detach", "_unsafe_view", "is_same_size", "_local_scalar_dense", "record_stream"}


class Recorder(TorchDispatchMode):
    """Counts what reaches the device, by phase, and collects what must not happen."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.casts: Counter[str] = Counter()
        self.faults: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.rpartition("::")
        if space == "prim":
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._note(name, func, inputs, outputs)
        return result

    def _note(
        self, name: str, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        devices = {one.device.type for one in (*inputs, *outputs) if one.dim()}
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim"):
            self.faults.append(f"{self.phase}: {name} waits for the device")
        if len(devices) > 1:
            self.faults.append(f"{self.phase}: {name} between {sorted(devices)}")
        if "cuda" not in devices and not any(one.is_cuda for one in (*inputs, *outputs)):
            return
        if _is_view(func) or name in _NO_LAUNCH:
            return
        self.launches[self.phase] += 1
        self.bytes[self.phase] += sum(one.numel() * one.element_size() for one in inputs + outputs)
        if "scaled_dot_product" in name:
            self.attention[name] += 1
        if name in ("mm", "addmm", "bmm", "convolution"):
            self.products[str(inputs[-1].dtype).removeprefix("torch.")] += 1
        if name == "_to_copy":
            self.casts[self.phase] += 1


def _is_view(func: Any) -> bool:
    aliases = [one.alias_info for one in func._schema.returns]
    return any(one is not None and not one.is_write for one in aliases)


@contextmanager
def phases(step: TrainStep, recorder: Recorder) -> Iterator[None]:
    """Name the parts of a step while it runs."""
    names = {
        "start_keys": "target",
        "online_losses": "forward",
        "differentiate": "backward",
        "update": "optimiser",
        "move_target": "EMA",
    }
    for method, phase in names.items():
        setattr(step, method, _in_phase(getattr(step, method), phase, recorder))
    yield


def _in_phase(function: Callable[..., Any], phase: str, recorder: Recorder) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        before, recorder.phase = recorder.phase, phase
        try:
            return function(*args, **kwargs)
        finally:
            recorder.phase = before

    return named


def make_batch(config: ModelConfig) -> Batch:
    """Zeros of the shapes that the loader hands out."""
    images = torch.zeros(BATCH, config.img_size, config.img_size, 3, dtype=torch.uint8, device=GPU)
    num_keep = config.num_keep
    ids = torch.zeros(BATCH, config.num_patches, dtype=torch.int32, device=GPU)
    return Batch(
        online=images,
        target=images.clone() if config.has_contrast else None,
        ids_keep=ids[:, :num_keep],
        ids_mask=ids[:, num_keep:],
        sample_id=torch.zeros(BATCH, dtype=torch.int64, device=GPU),
        label=torch.zeros(BATCH, dtype=torch.int64, device=GPU),
        epoch=0,
        state=LoaderState(seed=0, epoch=0, offset=0, digest=""),
    )


def run(case: Case) -> dict[str, Any]:
    """One step after a first one, whose one-time work does not count."""
    config = ModelConfig(**{**FEW, **case.model})
    optim = OptimConfig(global_batch_size=BATCH * case.micro_batches, **case.optim)
    speed = SpeedConfig(**{**PLAIN, **case.speed})
    recorder = Recorder()
    with torch.device("meta"):
        model = build_model(config, seed=0)
    with FakeTensorMode(), use_backend(speed.kernels):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        model._apply(lambda one: torch.empty(one.shape, dtype=one.dtype, device=GPU))
        step = TrainStep(model, optim, speed, World(0, 1, GPU))
        batches = [make_batch(config) for _ in range(case.micro_batches)]
        step(batches, lr=1e-3, momentum=0.99)
        waits_before = FakeFlag.waits
        with phases(step, recorder), recorder:
            step(batches, lr=1e-3, momentum=0.99)
    return {
        "launches": dict(recorder.launches),
        "bytes": dict(recorder.bytes),
        "attention": dict(recorder.attention),
        "products": dict(recorder.products),
        "casts": dict(recorder.casts),
        "faults": sorted(set(recorder.faults)),
        "waits": FakeFlag.waits - waits_before,
    }


class FakeFlag:
    """Stands for `HostFlag`, the step's one wait: fake tensors have no value to wait for."""

    waits = 0

    def __init__(self, flags: Any) -> None:
        torch.stack([flag.reshape(()) for flag in flags]).sum()

    def wait(self) -> bool:
        FakeFlag.waits += 1
        return False


def planted_faults() -> list[str]:
    """Faults that the recorder reports of a pass that waits, copies from the host and mixes devices."""
    recorder = Recorder()
    with FakeTensorMode(), recorder:
        values = torch.ones(4, 4, device=GPU)
        values.add_(torch.ones(4, 4).to(GPU))
        values.cpu()
        try:
            values.sum().item()
        except RuntimeError:  # fake tensors have no value; on a GPU this waits
            recorder.faults.append("item")
    return sorted(recorder.faults)


def main() -> None:
    """Run the configurations that are named, or all; or 'planted', what the recorder must find."""
    step_module.HostFlag = FakeFlag  # type: ignore[assignment,misc]
    chosen = sys.argv[1:] or list(CASES)
    if chosen == ["planted"]:
        print(json.dumps(planted_faults()))
        return
    print(json.dumps({name: run(CASES[name]) for name in chosen}))


if __name__ == "__main__":
    main()
