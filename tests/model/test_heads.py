"""Batch norm of the heads: torch's on one rank, the joined batch's over two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cmae.model import ModelConfig, build_model, set_all_reduce
from cmae.model.heads import SyncedBatchNorm1d

DIM = 5


def build(kind: type[nn.BatchNorm1d], dtype: torch.dtype = torch.float64) -> nn.BatchNorm1d:
    norm = kind(DIM, eps=1e-6).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=generator)
    return norm


def batch(rows: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows, DIM, dtype=torch.float64, generator=generator) * 3 + 100


def run(norm: nn.BatchNorm1d, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, running statistics, and gradients of a loss that treats every row differently."""
    x = x.clone().requires_grad_()
    out = norm(x)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    (out * weights).sum().backward()
    return {
        "out": out.detach(),
        "input gradient": x.grad,
        "weight gradient": norm.weight.grad,
        "bias gradient": norm.bias.grad,
        "running mean": norm.running_mean,
        "running variance": norm.running_var,
        "batches": norm.num_batches_tracked,
    }


@pytest.mark.parametrize("all_reduce_fn", [None, lambda moments: moments])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_rank_gives_torchs_batch_norm(all_reduce_fn, dtype):
    mine, expected = build(SyncedBatchNorm1d, dtype), build(nn.BatchNorm1d)
    set_all_reduce(mine, all_reduce_fn)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    want = run(expected, batch())
    for name, value in run(mine, batch().to(dtype)).items():
        torch.testing.assert_close(
            value.double(), want[name].double(), rtol=tolerance, atol=30 * tolerance, msg=name
        )
    mine.eval(), expected.eval()
    torch.testing.assert_close(
        mine(batch().to(dtype)).double(), expected(batch()), rtol=tolerance, atol=30 * tolerance
    )


def test_statistics_are_float32_under_autocast():
    norm = build(SyncedBatchNorm1d, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(batch().to(torch.bfloat16))
    assert out.dtype == torch.float32
    assert abs(float(out.detach().mean(0).sub(norm.bias.detach()).abs().max())) < 1e-5


class _SumOverRanks(torch.autograd.Function):
    """The sum's gradient on a rank is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _SumOverRanks.forward(ctx, gradient)


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    norm = build(SyncedBatchNorm1d)
    set_all_reduce(norm, _SumOverRanks.apply)
    x = batch()
    split = (x[:5], x[5:])[rank].clone().requires_grad_()  # unequal on purpose
    out = norm(split)
    weights = torch.arange(x.numel(), dtype=x.dtype).view_as(x).sin()
    (out * (weights[:5], weights[5:])[rank]).sum().backward()
    torch.save(
        {
            "out": out.detach(),
            "input gradient": split.grad,
            "weight gradient": norm.weight.grad,
            "bias gradient": norm.bias.grad,
            "running mean": norm.running_mean,
            "running variance": norm.running_var,
            "batches": norm.num_batches_tracked,
        },
        Path(folder) / f"{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_batch_norm_of_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = run(build(nn.BatchNorm1d), batch())
    joined = {name: torch.cat([first[name], second[name]]) for name in ("out", "input gradient")}
    joined |= {name: first[name] + second[name] for name in ("weight gradient", "bias gradient")}
    joined |= {name: first[name] for name in ("running mean", "running variance", "batches")}
    for name, value in joined.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)
    assert torch.equal(first["running mean"], second["running mean"])


def test_set_all_reduce_reaches_online_and_target_heads():
    config = ModelConfig(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = build_model(config, seed=0)

    def sum_over_ranks(moments: torch.Tensor) -> torch.Tensor:
        return moments

    set_all_reduce(model, sum_over_ranks)
    heads = (model.projector, model.predictor, model.target_projector)
    assert all(head.norm.all_reduce is sum_over_ranks for head in heads)


def test_rows_that_are_no_rows_are_refused():
    with pytest.raises(ValueError, match="input has shape"):
        build(SyncedBatchNorm1d)(torch.zeros(2, 3, DIM, dtype=torch.float64))


def test_layer_norm_heads_treat_every_row_alone():
    config = ModelConfig(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, head_norm="layer"
    )
    head = build_model(config, seed=0).projector
    rows = torch.randn(4, 32)
    torch.testing.assert_close(head(rows)[:1], head(rows[:1]))
