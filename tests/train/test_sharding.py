"""Weights and optimiser in shards: the steps of DDP, and whole states that every way goes on from."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from filelock import FileLock
from support.tiny_runs import ALONE, OPTIM, SMALL, make_batch
from torch import Tensor

from cmae.errors import CmaeError
from cmae.model import ModelConfig, build_model
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import World, join_world
from cmae.train.loop.step import TrainStep, check_step
from cmae.train.sharding import local_part, share_out

WAYS = ("ddp", "zero1", "fsdp", "hsdp")
STEPS = 4
GLOBAL = 8
HALFWAY = 2

# Layer norm: micro-batches are the same to it. 24 channels over 4 ranks and 5 blocks: cuts of unequal parts.
MODELS: dict[str, ModelConfig] = {
    "info_nce": replace(SMALL, head_norm="layer", embed_dim=20, num_heads=2, depth=3),
    "batch norm": SMALL,
    "byol": replace(SMALL, head_norm="layer", contrastive_loss="byol", target_final_norm=True),
    "mae": replace(SMALL, contrastive_loss="none"),
    "contrast only": replace(SMALL, reconstruction_weight=0.0, head_norm="layer"),
    "hybrid": replace(SMALL, encoder="hybrid", patch_size=16, mask_unit=1, head_norm="layer"),
}
STOPPED = ("info_nce", "batch norm")
"""Models whose runs are also stopped and go on."""
FEW = ("info_nce", "byol")
"""Models that four ranks train."""
CLIP: OptimConfig = replace(OPTIM, clip_grad=0.1, decay_tokens=True)


def start(model: ModelConfig, world: World, way: str, **speed: Any) -> TrainStep:
    weights = build_model(model, seed=0).double()
    return TrainStep(weights, CLIP, SpeedConfig(parallel=way, **speed), world)  # type: ignore[arg-type]


def go(step: TrainStep, first: int, last: int, *, micro: int = 1, rotten: int = -1) -> list[Tensor]:
    """Take steps; in step `rotten` the last sample of the batch is not a number."""
    world, losses = step.world, []
    size = GLOBAL // (world.world_size * micro)
    for number in range(first, last):
        batches = []
        for k in range(micro):
            begin = (k * world.world_size + world.rank) * size
            batch = make_batch(step.model.config, GLOBAL * number + begin, size, torch.float64)
            if number == rotten and begin + size == GLOBAL:
                batch.online[-1] = float("nan")
            batches.append(batch)
        found, taken = step(batches, lr=1e-3, momentum=0.9, with_norm=True)
        assert taken == (number != rotten)
        if taken:
            losses.append(found.double())
    return losses


def trial(name: str, world: World, way: str, out: Path) -> dict[str, Any]:
    """A run; the same run with a stop in its middle, from which every way goes on; recomputed blocks."""
    model, micro = MODELS[name], 1 if MODELS[name].head_norm == "batch" else 2
    if GLOBAL // world.world_size < micro:
        micro = 1
    step = start(model, world, way)
    losses = go(step, 0, STEPS, micro=micro, rotten=1)
    vitals = step.vitals()
    found = {"losses": torch.stack(losses), "state": step.state_dict(), "vitals": vitals}
    found["held"] = sum(local_part(one).numel() for one in step.model.parameters())
    optimizer = step.optimizer
    inside = getattr(optimizer, "_inside", optimizer)
    found["moments"] = sum(
        local_part(value).numel()
        for values in inside.state.values()
        for name, value in values.items()
        if name != "step"
    )
    if name not in STOPPED:
        return found
    first = start(model, world, way, recompute="blocks")
    go(first, 0, HALFWAY, micro=micro, rotten=1)
    middle = first.state_dict()
    path = out / f"{name}-{way}.pt"
    if world.is_main:
        torch.save(middle, path)
    torch.distributed.barrier()
    for other in WAYS:
        again = start(model, world, other)
        again.load_state_dict(torch.load(path))
        go(again, HALFWAY, STEPS, micro=micro)
        found[f"on as {other}"] = again.state_dict()
    return found


def models_of(world_size: int) -> tuple[str, ...]:
    return tuple(MODELS) if world_size == 2 else FEW


def run_rank(rank: int, world_size: int, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        found = {
            (name, way): trial(name, world, way, out)
            for name in models_of(world_size)
            for way in WAYS
        }
        torch.save(found, out / f"rank{rank}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By rank, then by model and way; trained once, whichever of pytest's workers ask for it."""
    size, out = request.param, tmp_path_factory.mktemp("sharding")
    if "PYTEST_XDIST_WORKER" in os.environ:
        out = tmp_path_factory.getbasetemp().parent / f"sharding-{size}"
        out.mkdir(exist_ok=True)
    with FileLock(out / "lock"):
        if not (out / f"rank{size - 1}.pt").is_file():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            mp.spawn(run_rank, args=(size, port, out), nprocs=size)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(size)]


def skip_others(name: str, results: Any) -> None:
    if name not in models_of(len(results)):
        pytest.skip("two ranks train it")


def assert_same(found: Any, expected: Any, *, where: str = "", exact: bool = False) -> None:
    """Nested states, tensor by tensor."""
    if isinstance(expected, Tensor):
        # What batch norm takes away again, such as the bias before it, has a gradient of rounding alone.
        bounds = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-8}
        torch.testing.assert_close(found, expected, **bounds, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            assert_same(found[name], expected[name], where=f"{where}.{name}", exact=exact)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, where=f"{where}.{number}", exact=exact)
    else:
        assert found == expected, where


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_every_way_takes_the_steps_of_ddp(results: Any, name: str, way: str) -> None:
    skip_others(name, results)
    plain, found = results[0][name, "ddp"], results[0][name, way]
    exact = way in ("ddp", "zero1")  # the sums of the others have another order
    for one in results:
        assert_same(one[name, way]["losses"], one[name, "ddp"]["losses"], exact=exact)
        for norm, value in plain["vitals"].items():
            assert one[name, way]["vitals"][norm] == pytest.approx(value, rel=1e-6), norm
    assert_same(found["state"], plain["state"], exact=exact)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_each_rank_holds_its_share(results: Any, way: str) -> None:
    size = sum(one.numel() for one in build_model(MODELS["byol"]).parameters())
    held = [one["byol", way]["held"] for one in results]
    moments = [one["byol", way]["moments"] for one in results]
    shares = {"ddp": 1, "zero1": 1, "fsdp": len(results), "hsdp": 2}
    if way in ("fsdp", "hsdp"):
        assert sum(held) == size * len(results) / shares[way]
        assert max(held) <= 1.3 * size / shares[way]
    trained = sum(
        one.numel() for one in build_model(MODELS["byol"]).parameters() if one.requires_grad
    )
    copies = {"ddp": len(results), "zero1": 1, "fsdp": 1, "hsdp": len(results) / 2}[way]
    assert sum(moments) == 2 * trained * copies
    assert max(moments) <= 2.7 * trained * copies / len(results)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STOPPED)
def test_a_state_goes_on_in_any_way(results: Any, name: str, way: str) -> None:
    skip_others(name, results)
    found = results[0][name, way]
    # DDP sorts its buckets anew after the first step of a process, which three and more ranks add up in
    # another order.
    keeps_order = len(results) == 2 or way in ("fsdp", "hsdp")
    for other in WAYS:
        exact = other == way and keeps_order
        assert_same(found[f"on as {other}"], found["state"], where=other, exact=exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_process_takes_the_same_steps(results: Any, name: str) -> None:
    skip_others(name, results)
    if MODELS[name].head_norm == "batch":
        pytest.skip("two micro-batches are other batches to batch norm")
    alone = start(MODELS[name], ALONE, "fsdp")  # with one rank there is nothing to share out
    go(alone, 0, STEPS, rotten=1)
    assert_same(results[0][name, "fsdp"]["state"]["model"], alone.state_dict()["model"])


def test_parameters_are_shared_out_evenly() -> None:
    parameters = [torch.empty(size) for size in (7, 5, 5, 4, 1, 1, 1)]
    owner = share_out(parameters, 3)
    load = [sum(one.numel() for one in parameters if owner[id(one)] == rank) for rank in range(3)]
    assert sorted(load) == [7, 8, 9]


@pytest.mark.parametrize(
    ("speed", "optim", "key"),
    [
        ({"parallel": "zero1"}, {"impl": "apex"}, "optim.impl"),
        ({"parallel": "fsdp"}, {"impl": "apex"}, "optim.impl"),
        ({"parallel": "fsdp", "target_copy": True}, {"precision": "bf16"}, "speed.target_copy"),
        ({"parallel": "hsdp", "compile": "model"}, {}, "speed.compile"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(
    speed: dict[str, Any], optim: dict[str, Any], key: str
) -> None:
    two = World(0, 2, torch.device("cpu"))
    settings = replace(OPTIM, **optim), SpeedConfig(**speed)
    with pytest.raises(CmaeError, match=key):
        check_step(*settings, two)
    if optim.get("impl") != "apex":
        check_step(*settings, ALONE)
