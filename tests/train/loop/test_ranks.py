"""However a global batch is shared out over ranks and micro-batches, a step is the same step."""

from __future__ import annotations

import os
import random
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from support.tiny_runs import ALONE, OPTIM, SMALL, make_batch
from torch import Tensor

from cmae.model import Losses, ModelConfig, build_model
from cmae.pipeline import Batch
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.distributed import World, join_world
from cmae.train.loop.step import TrainStep

NUM_CASES = 12
STEPS = 4
GLOBAL = 8


@dataclass(frozen=True)
class Case:
    """A model, an optimiser, a way to share the batch out, and a step whose data are rotten on one rank."""

    model: ModelConfig
    optim: OptimConfig
    micro: int
    rotten_step: int
    rotten_sample: int


def draw_cases(world_size: int) -> list[Case]:
    """All kinds of losses and objectives, the same for every process."""
    rng = random.Random(world_size)
    cases = []
    for number in range(NUM_CASES):
        loss = ("info_nce", "byol", "none")[number % 3]
        norm = rng.choice(["batch", "layer"])
        model = replace(
            SMALL,
            contrastive_loss=loss,
            head_norm=norm,
            reconstruction_weight=1.0 if loss == "none" else rng.choice([1.0, 0.0]),
            norm_pix_loss=rng.random() < 0.5,
            contrastive_weight=rng.choice([1.0, 0.3]),
            two_tau_factor=rng.random() < 0.5,
            mask_ratio=rng.choice([0.5, 0.75]),
        )
        optim = replace(
            OPTIM,
            clip_grad=rng.choice([None, 0.1]),
            weight_decay=rng.choice([0.0, 0.05]),
            decay_tokens=rng.random() < 0.5,
        )
        # Batch norm sees one micro-batch of every rank: only whole batches are the same to it.
        micro = 1 if norm == "batch" else rng.choice([1, GLOBAL // world_size])
        cases.append(Case(model, optim, micro, rng.randrange(STEPS), rng.randrange(GLOBAL)))
    return cases


def batches_of(case: Case, step: int, world: World, micro: int) -> list[Batch]:
    """This rank's micro-batches of a step, in float64."""
    size = GLOBAL // (world.world_size * micro)
    found = []
    for k in range(micro):
        first = (k * world.world_size + world.rank) * size
        batch = make_batch(case.model, GLOBAL * step + first, size, torch.float64)
        place = case.rotten_sample - first
        if step == case.rotten_step and 0 <= place < size:
            batch.online[place] = float("nan")
        found.append(batch)
    return found


def train(case: Case, world: World, micro: int) -> dict[str, Any]:
    """Losses of every step, which of them were taken, and all weights at the end."""
    # float64: at initialisation the features of 8 images are so alike that batch norm, which divides by
    # their spread, turns float32's rounding into a per cent of the gradient.
    model = build_model(case.model, seed=0).double()
    step = TrainStep(model, case.optim, SpeedConfig(), world)
    losses, taken = [], []
    for number in range(STEPS):
        batches = batches_of(case, number, world, micro)
        found, was_taken = step(batches, lr=1e-3, momentum=0.9, with_norm=True)
        losses.append(found.double())
        taken.append(was_taken)
    squares = {
        name: step.optimizer.state[value]["exp_avg_sq"].max().item()
        for name, value in model.named_parameters()
        if value in step.optimizer.state
    }
    # What batch norm takes away again, such as the bias before it, has a gradient of rounding alone, and
    # AdamW makes steps of full size of it.
    noise = {name for name, square in squares.items() if square < 1e-20}
    weights = dict(model.named_parameters())
    return {"losses": torch.stack(losses), "taken": taken, "model": weights, "noise": noise}


def run_rank(rank: int, world_size: int, port: int, out: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with join_world("cpu") as world:
        results = [train(case, world, case.micro) for case in draw_cases(world_size)]
        torch.save(results, out / f"rank{rank}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def world_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def results(
    world_size: int, tmp_path_factory: pytest.TempPathFactory
) -> list[list[dict[str, Any]]]:
    """By rank, then by case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(world_size, port, out), nprocs=world_size)
    return [torch.load(out / f"rank{rank}.pt") for rank in range(world_size)]


def mean_losses(losses: list[Tensor], names: list[str]) -> Tensor:
    places = [Losses._fields.index(name) for name in names]
    return torch.stack(losses).mean(0)[:, places]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_CASES))
def test_ranks_and_micro_batches_take_the_steps_of_one_process(
    results: list[list[dict[str, Any]]], world_size: int, number: int
) -> None:
    case = draw_cases(world_size)[number]
    expected = train(case, ALONE, 1)
    found = [rank[number] for rank in results]
    # A rotten image on one rank: all skip that step, no weight moves, and the target does not either.
    assert expected["taken"] == [step != case.rotten_step for step in range(STEPS)]
    assert all(one["taken"] == expected["taken"] for one in found)
    good = torch.tensor(expected["taken"])
    names = ["total", "reconstruction", "contrastive_raw", "contrastive"]
    torch.testing.assert_close(
        mean_losses([one["losses"] for one in found], names)[good],
        mean_losses([expected["losses"]], names)[good],
        rtol=1e-6,
        atol=1e-8,
    )
    for one in found:
        for name, value in expected["model"].items():
            atol = 1e-2 if name in expected["noise"] else 1e-9
            torch.testing.assert_close(one["model"][name], value, rtol=1e-6, atol=atol, msg=name)
            assert torch.equal(one["model"][name], found[0]["model"][name]), name


@pytest.mark.slow
def test_ranks_have_different_positives(results: list[list[dict[str, Any]]]) -> None:
    place = Losses._fields.index("contrastive_raw")
    first, second = (rank[0]["losses"] for rank in results[:2])  # the first case is InfoNCE
    assert (first[:, place] != second[:, place]).any()


def test_the_cases_are_of_all_kinds() -> None:
    cases = draw_cases(2) + draw_cases(4)
    assert {case.model.contrastive_loss for case in cases} == {"info_nce", "byol", "none"}
    assert {case.model.head_norm for case in cases} == {"batch", "layer"}
    assert {case.micro for case in cases} >= {1, 2, 4}
    noise = {name for case in cases[:3] for name in train(case, ALONE, 1)["noise"]}
    assert len(noise) <= 6, noise
    assert {case.model.reconstruction_weight for case in cases} == {0.0, 1.0}
