"""Switches that must not change the step: attention kernels, compiled code, ranks."""

from __future__ import annotations

import functools
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from support.tiny_runs import ALONE, OPTIM, SMALL, make_batch
from torch import Tensor
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.utils import counters

from cmae.model import ModelConfig, build_model
from cmae.model.blocks import pin_sdpa
from cmae.pipeline import Batch
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import World, join_world
from cmae.train.loop import sdpa as attention
from cmae.train.loop.sdpa import AttentionShape, attention_shapes, pin_attention
from cmae.train.loop.step import HostFlag, TrainStep, check_step

BF16 = replace(OPTIM, precision="bf16")


def build(
    speed: SpeedConfig,
    optim: OptimConfig = OPTIM,
    *,
    config: ModelConfig = SMALL,
    world: World = ALONE,
) -> TrainStep:
    return TrainStep(build_model(config, seed=0).to(world.device), optim, speed, world)


def run(step: TrainStep, micro_batches: int, *, num_steps: int = 4) -> Tensor:
    """Losses of some steps on batches of 8 images that differ from step to step."""
    size = 8 // micro_batches
    losses = []
    for number in range(num_steps):
        firsts = range(8 * number, 8 * number + 8, size)
        batches = [move(make_batch(step.model.config, first, size), step) for first in firsts]
        losses.append(step(batches, lr=1e-3, momentum=0.9)[0])
    return torch.stack(losses)


def move(batch: Batch, step: TrainStep) -> Batch:
    device = step.world.device
    names = ("online", "target", "ids_keep", "ids_mask")
    return replace(batch, **{name: getattr(batch, name).to(device) for name in names})


def assert_same_state(step: TrainStep, expected: TrainStep) -> None:
    for name, value in expected.model.state_dict().items():
        assert torch.equal(step.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("speed", "optim", "world", "key"),
    [
        (SpeedConfig(compile="model_graphs"), OPTIM, ALONE, "speed.compile is 'model_graphs'.*cpu"),
        (SpeedConfig(target_copy=True), OPTIM, ALONE, "speed.target_copy"),
        (SpeedConfig(), replace(OPTIM, precision="fp16"), ALONE, "optim.precision"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    speed: SpeedConfig, optim: OptimConfig, world: World, key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        check_step(optim, speed, world)


def test_low_precision_parts_need_a_low_precision() -> None:
    with pytest.raises(ValueError, match=r"optim.residual is '16bit'.*optim.precision"):
        OptimConfig(precision="fp32", residual="16bit")


def test_a_host_flag_is_set_when_any_part_is() -> None:
    assert HostFlag([torch.zeros(1), torch.ones(1)]).wait()
    assert not HostFlag([torch.zeros(1), torch.zeros(())]).wait()


# ---- attention kernels ----------------------------------------------------------------------------


class _Operators(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_a_pinned_kernel_is_the_one_that_runs() -> None:
    losses, flash = {}, {}
    for choice in ("torch", "flash", "math"):
        step = build(SpeedConfig(sdpa=choice), replace(BF16, gradient_compression="none"))
        with _Operators() as seen:
            losses[choice] = step.backward([make_batch(SMALL, 0, 8)])
        flash[choice] = any("flash_attention" in name for name in seen.names)
    assert flash == {"torch": True, "flash": True, "math": False}
    assert torch.equal(losses["flash"], losses["torch"])
    torch.testing.assert_close(losses["math"], losses["torch"], rtol=2e-2, atol=2e-2)


def test_a_kernel_that_the_device_lacks_is_refused() -> None:
    step = build(SpeedConfig(sdpa="cudnn"))
    with pytest.raises(ValueError, match=r"speed.sdpa is 'cudnn'.*'auto' or 'torch'"):
        step.backward([make_batch(SMALL, 0, 8)])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"contrastive_loss": "none"},
        {"target_input": "visible"},
        {"feature_decoder": "shared"},
        {"feature_decoder": "none", "target_final_norm": True},
        {"encoder": "hybrid", "patch_size": 16, "img_size": 64, "embed_dim": 48, "num_heads": 4},
    ],
)
def test_attention_shapes_are_those_that_run(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, **change)
    model = build_model(config, seed=0)
    seen: set[AttentionShape] = set()
    original = F.scaled_dot_product_attention

    def watch(query, key, value, **options):
        batch, heads, num_queries, width = query.shape
        shape = (batch, heads, num_queries, key.shape[2], width, query.requires_grad)
        seen.add(AttentionShape(*shape))
        return original(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    pixels = torch.zeros(4, config.img_size, config.img_size, 3, dtype=torch.uint8)
    model(pixels, pixels, torch.arange(config.num_keep).expand(4, -1))
    expected = {shape for blocks, shape in attention_shapes(model, None, 4) if blocks}
    assert seen == expected


def test_auto_pins_the_fastest_kernel_of_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"flash": 3.0, "math": 2.0}  # the kernels that a CPU has
    monkeypatch.setattr(attention, "_time", lambda shape, name, inputs: times[name])
    lines: list[str] = []
    model = build_model(SMALL, seed=0)
    monkeypatch.setattr(attention, "BACKENDS", {n: attention.BACKENDS[n] for n in times})
    shape = next(attention_shapes(model, None, 2))[1]
    measured = attention._measure(shape, torch.float32, torch.device("cpu"))
    assert measured == times
    monkeypatch.setattr(attention, "_measure", lambda *_: measured)
    fake_gpu = torch.device("cuda")
    options = {"target_copy": None, "batch_size": 2, "dtype": torch.float32, "log": lines.append}
    pin_attention(model, "auto", device=fake_gpu, **options)
    assert model.encoder.blocks[0].sdpa is attention.BACKENDS["math"]
    assert "math (flash 3.000 ms, math 2.000 ms)" in lines[0]
    pin_attention(model, "auto", device=fake_gpu, agree=lambda choice: "flash", **options)
    assert model.encoder.blocks[0].sdpa is attention.BACKENDS["flash"]  # another rank's choice
    pin_sdpa(model.encoder.blocks, None)
    pin_attention(model, "auto", device=torch.device("cpu"), **options)
    assert model.encoder.blocks[0].sdpa is None


# ---- compiled code --------------------------------------------------------------------------------


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile without code generation: graphs, guards and recompilations are the real ones."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("quick_compiler")
def test_recorded_branches_take_one_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmae.train.loop.step.check_step", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    step = build(SpeedConfig(compile="model_graphs"))
    with pytest.raises(ValueError, match=r"model_graphs.*2 micro-batches.*micro_batch_size"):
        step.backward([make_batch(SMALL, 0, 4)] * 2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    ("mode", "sdpa", "num_graphs"), [("blocks", "math", 7), ("model", "torch", 2)]
)
def test_micro_batches_and_steps_share_what_the_first_one_compiled(
    mode: str, sdpa: str, num_graphs: int
) -> None:
    config = replace(SMALL, head_norm="layer")  # batch norm over two rows magnifies rounding
    eager = build(SpeedConfig(sdpa=sdpa), config=config)
    compiled = build(SpeedConfig(compile=mode, sdpa=sdpa), config=config)
    compiled.backward([make_batch(SMALL, 0, 2)] * 4)
    compiled.optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == num_graphs
    # Each micro-batch must find its own keys, though the code knows one label offset.
    torch.testing.assert_close(run(compiled, 4), run(eager, 4), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == num_graphs


# ---- collectives ----------------------------------------------------------------------------------


def run_modes(rank: int, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with join_world("cpu") as world:
        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # of this process
        modes = {mode: SpeedConfig(compile=mode) for mode in ("none", "blocks", "model")}
        modes["fsdp, blocks"] = SpeedConfig(compile="blocks", parallel="fsdp")
        for mode, speed in modes.items():
            with counted_calls(DDPOptimizer, ["compile_fn"]) as splits:
                step = build(speed, world=world)
                losses = run(step, 2)
                with counted_calls(Tensor, READS_BY_THE_HOST) as reads:
                    run(step, 2, num_steps=1)
            found[mode] = {"losses": losses, "splits": splits, "reads": reads}
    torch.save(found, out / f"rank{rank}.pt")


READS_BY_THE_HOST = ["item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"]


@contextmanager
def counted_calls(kind: type, names: list[str]) -> Iterator[Counter[str]]:
    """Count calls of methods."""
    calls: Counter[str] = Counter()

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return method(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(kind, name, counted(name, getattr(kind, name)))
        yield calls


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(run_modes, args=(port, out), nprocs=2)
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_get_the_same_losses_however_the_step_is_compiled(
    of_two_ranks: list[dict[str, Any]],
) -> None:
    for found in of_two_ranks:
        for mode in ("blocks", "model", "fsdp, blocks"):
            torch.testing.assert_close(
                found[mode]["losses"], found["none"]["losses"], rtol=1e-3, atol=1e-4
            )


@pytest.mark.slow
def test_blocks_are_not_cut_at_the_buckets_of_ddp(of_two_ranks: list[dict[str, Any]]) -> None:
    """Their gradients come block by block as it is; the whole model is cut, to overlap at all."""
    for found in of_two_ranks:
        assert found["blocks"]["splits"].total() == 0
        assert found["model"]["splits"].total() > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "blocks", "model"])
def test_a_step_of_two_ranks_is_read_by_the_host_once(
    mode: str, of_two_ranks: list[dict[str, Any]]
) -> None:
    """Each read waits for all that the device has been given; the one is of the losses' flag."""
    for found in of_two_ranks:
        assert found[mode]["reads"] == {"item": 1}


# ---- on a GPU -------------------------------------------------------------------------------------


def gpu() -> World:
    return World(0, 1, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["none", "blocks"])
def test_equal_steps_have_equal_bits_on_a_gpu(compile: str) -> None:
    config = replace(SMALL, embed_dim=128, decoder_embed_dim=64)  # heads as wide as in real models
    steps = []
    for _ in range(2):
        speed = SpeedConfig(compile=compile)
        steps.append(build(speed, replace(OPTIM, precision="fp16"), config=config, world=gpu()))
        run(steps[-1], 1)
    for name, value in steps[0].model.state_dict().items():
        assert torch.equal(value, steps[1].model.state_dict()[name]), name


@pytest.mark.gpu
def test_recorded_and_eager_steps_have_the_same_losses_on_a_gpu() -> None:
    optim = replace(OPTIM, precision="fp16")
    eager = build(SpeedConfig(), optim, world=gpu())
    recorded = build(SpeedConfig(compile="model_graphs"), optim, world=gpu())
    expected, found = (run(step, 1, num_steps=8) for step in (eager, recorded))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert eager.scaler.get_scale() == recorded.scaler.get_scale()


@pytest.mark.gpu
def test_every_attention_kernel_gives_the_same_losses_on_a_gpu() -> None:
    optim = replace(OPTIM, precision="fp16")
    # Heads of 64 and 32, as in the published models: cuDNN and flash have shapes of their own.
    config = replace(SMALL, embed_dim=128, decoder_embed_dim=64)
    expected = run(build(SpeedConfig(), optim, config=config, world=gpu()), 1)
    for choice in ("auto", "flash", "efficient", "math", "cudnn"):
        step = build(SpeedConfig(sdpa=choice), optim, config=config, world=gpu())
        torch.testing.assert_close(run(step, 1), expected, rtol=5e-3, atol=5e-3, msg=choice)


@pytest.mark.gpu
def test_a_step_waits_for_the_gpu_once() -> None:
    step = build(SpeedConfig(), replace(OPTIM, precision="fp16"), world=gpu())
    batch = move(make_batch(SMALL, 0, 8), step)
    for _ in range(2):
        step([batch], lr=1e-3, momentum=0.9)
    torch.cuda.set_sync_debug_mode("error")  # the flag's event is not among what this forbids
    try:
        step([batch], lr=1e-3, momentum=0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_an_overflow_on_a_gpu_changes_nothing() -> None:
    step = build(SpeedConfig(), replace(OPTIM, precision="fp16"), world=gpu())
    batch = move(make_batch(SMALL, 0, 8), step)
    step([batch], lr=1e-3, momentum=0.9)
    step.model.encoder.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in step.model.named_parameters()}
    scale = step.scaler.get_scale()
    assert not step([batch], lr=1e-3, momentum=0.9)[1]
    assert step.scaler.get_scale() == scale / 2
    for name, value in step.model.named_parameters():
        assert torch.equal(value, before[name]), name
