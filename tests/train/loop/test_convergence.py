"""One small run on real shards, computed in every way: the same losses, to the bit where only order changes.

The reference is eager, bf16, one micro-batch; 24 steps take its loss down by a third. Tolerances are for the
largest difference of a loss anywhere on the curve.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from support.loaders import loader_of
from support.tiny_runs import ALONE
from torch import Tensor

from cmae.model import Losses, ModelConfig, build_model, draw_mask
from cmae.pipeline import Batch, ViewConfig
from cmae.train.config import OptimConfig, SpeedConfig
from cmae.train.loop.step import TrainStep

MODEL = ModelConfig(
    img_size=32,
    patch_size=8,
    embed_dim=48,
    depth=2,
    num_heads=3,
    decoder_embed_dim=32,
    decoder_depth=2,
    decoder_num_heads=2,
    feature_decoder_depth=1,
    proj_hidden_dim=32,
    proj_dim=16,
    mask_ratio=0.5,
    mask_unit=1,
    head_norm="layer",  # batch norm would see how a batch is split
)
OPTIM = OptimConfig(global_batch_size=16, precision="bf16")
FP32 = replace(OPTIM, precision="fp32")
NUM_STEPS = 24
ROUNDING = (1e-5, 1e-5, 1e-4)  # of float32
COMPARED = [Losses._fields.index(name) for name in ("total", "reconstruction", "contrastive_raw")]


@pytest.fixture(scope="module")
def batches(small_shards: str) -> list[Batch]:
    """The first batches of a run."""
    with loader_of(
        small_shards,
        ViewConfig(img_size=32, source_crop_size=40, target_shift=8),
        batch_size=16,
        global_batch_size=16,
        draw_mask=lambda index, epoch: draw_mask(MODEL, index, seed=0, epoch=epoch),
        num_threads=1,
    ) as loader:
        return [next(loader) for _ in range(NUM_STEPS)]


def curve(
    batches: list[Batch], speed: SpeedConfig, optim: OptimConfig = OPTIM, *, parts: int = 1
) -> Tensor:
    """Losses of every step, (steps, 3)."""
    step = TrainStep(build_model(MODEL, seed=0), optim, speed, ALONE)
    rows = []
    for batch in batches:
        losses, taken = step(split(batch, parts), lr=3e-3, momentum=0.99)
        assert taken
        rows.append(losses[COMPARED])
    return torch.stack(rows)


def split(batch: Batch, parts: int) -> list[Batch]:
    names = ("online", "target", "ids_keep", "ids_mask")
    pieces = {name: getattr(batch, name).chunk(parts) for name in names}
    return [replace(batch, **{name: pieces[name][i] for name in names}) for i in range(parts)]


@pytest.fixture(scope="module")
def reference(batches: list[Batch]) -> Tensor:
    losses = curve(batches, SpeedConfig())
    assert losses[-4:, 0].mean() < 0.7 * losses[0, 0]
    return losses


@pytest.fixture(scope="module")
def fp32_reference(batches: list[Batch]) -> Tensor:
    return curve(batches, SpeedConfig(), FP32)


@pytest.mark.parametrize(
    "speed",
    [
        SpeedConfig(target_copy=True),
        SpeedConfig(sdpa="flash"),
    ],
    ids=["target_copy", "sdpa"],
)
def test_these_switches_leave_every_bit(
    batches: list[Batch], reference: Tensor, speed: SpeedConfig
) -> None:
    assert torch.equal(curve(batches, speed), reference)


def largest_difference(found: Tensor, expected: Tensor) -> list[float]:
    """Anywhere on the curves: of the total, of the pixel loss, of InfoNCE (its logits are cosines / .07)."""
    difference = (found - expected).abs().amax(dim=0)
    assert difference.max() > 0
    return [float(value) for value in difference]


def assert_within(found: Tensor, expected: Tensor, limits: tuple[float, float, float]) -> None:
    for value, limit in zip(largest_difference(found, expected), limits, strict=True):
        assert value < limit


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_differs_by_rounding(
    batches: list[Batch], fp32_reference: Tensor, parts: int
) -> None:
    found = curve(batches, SpeedConfig(), FP32, parts=parts)
    assert_within(found, fp32_reference, ROUNDING)


def test_bf16_follows_fp32(reference: Tensor, fp32_reference: Tensor) -> None:
    assert_within(reference, fp32_reference, (0.03, 0.01, 0.2))


def test_a_16_bit_residual_stream_follows_fp32(
    batches: list[Batch], fp32_reference: Tensor
) -> None:
    found = curve(batches, SpeedConfig(), replace(OPTIM, residual="16bit"))
    assert_within(found, fp32_reference, (0.04, 0.015, 0.3))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_compiled_graphs_differ_by_rounding(
    batches: list[Batch], fp32_reference: Tensor, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Real graphs, decomposed and partitioned, run by eager operators; a GPU generates code as well.
    backend = "inductor" if torch.cuda.is_available() else "aot_eager_decomp_partition"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    found = curve(batches, SpeedConfig(compile=mode), FP32)
    torch._dynamo.reset()
    assert_within(found, fp32_reference, ROUNDING)
