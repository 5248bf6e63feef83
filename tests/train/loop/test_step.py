"""One optimiser step: the same gradients however the global batch is shared out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_runs import ALONE, OPTIM, SMALL, make_batch
from torch import Tensor

from cmae.errors import CmaeError
from cmae.model import Losses, ModelConfig, build_model
from cmae.pipeline import Batch
from cmae.train.config import SpeedConfig
from cmae.train.distributed import World
from cmae.train.loop.step import TrainStep


def backward(
    config: ModelConfig, world: World, batches: list[Batch]
) -> tuple[Tensor, dict[str, Tensor]]:
    # float64: at initialisation the features of 8 images are so alike that batch norm, which divides by their
    # spread, turns float32's rounding into a per cent of the gradient.
    step = TrainStep(build_model(config, seed=0).double(), OPTIM, SpeedConfig(), world)
    losses = step.backward(batches)
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in step.model.named_parameters()
        if parameter.grad is not None
    }
    return losses, gradients


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-10, msg=name)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_see_the_bank_of_the_whole_batch(parts: int) -> None:
    # BatchNorm would see smaller batches; everything else must be the same.
    config = replace(SMALL, head_norm="layer")
    whole_losses, whole = backward(config, ALONE, [make_batch(config, 0, 8, torch.float64)])
    size = 8 // parts
    split = [make_batch(config, first, size, torch.float64) for first in range(0, 8, size)]
    losses, gradients = backward(config, ALONE, split)
    places = [Losses._fields.index(name) for name in ("total", "reconstruction", "contrastive_raw")]
    torch.testing.assert_close(losses[places], whole_losses[places], rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients, whole)


def test_the_target_moves_by_the_average_alone() -> None:
    step = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE)
    before = {name: value.clone() for name, value in step.model.target_encoder.named_parameters()}
    _, taken = step([make_batch(SMALL, 0, 8)], lr=1e-2, momentum=0.9)
    assert taken
    online = dict(step.model.encoder.named_parameters())
    for name, value in step.model.target_encoder.named_parameters():
        assert value.grad is None
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * online[name])


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    step = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE)
    batch = make_batch(SMALL, 0, 8)
    step([batch], lr=1e-3, momentum=0.9)
    step.model.encoder.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = {name: value.clone() for name, value in step.model.named_parameters()}
    for _ in range(3):
        _, taken = step([batch], lr=1e-3, momentum=0.9)
        assert not taken
    for name, value in step.model.named_parameters():
        assert torch.equal(value, before[name]), name
    assert step.scaler.get_scale() == 1.0


def test_an_image_that_is_not_finite_leaves_no_nan_in_a_checkpoint() -> None:
    step = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE)
    batch = make_batch(SMALL, 0, 8)
    poison = torch.full((8, 3, 32, 32), float("nan"))
    _, taken = step([replace(batch, online=poison, target=poison)], lr=1e-3, momentum=0.9)
    assert not taken
    for name, value in step.state_dict()["model"].items():
        assert torch.isfinite(value).all(), name
    assert step([batch], lr=1e-3, momentum=0.9)[1]


def test_another_precision_resumes_with_a_loss_scale_of_its_own() -> None:
    stored = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE).state_dict()
    stored["scaler"]["scale"] = 65536.0
    stored["precision"] = "fp16"
    step = TrainStep(build_model(SMALL, seed=1), OPTIM, SpeedConfig(), ALONE)
    step.load_state_dict(stored)
    assert step.scaler.get_scale() == 1.0
    assert step([make_batch(SMALL, 0, 8)], lr=1e-3, momentum=0.9)[1]


def test_the_norm_of_the_gradients_is_told_where_asked_and_changes_nothing() -> None:
    steps = [TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE) for _ in range(3)]
    clipped = replace(OPTIM, clip_grad=1e9)
    steps[2] = TrainStep(build_model(SMALL, seed=0), clipped, SpeedConfig(), ALONE)
    norms = []
    for step, with_norm in zip(steps, (False, True, False), strict=True):
        step([make_batch(SMALL, 0, 8)], lr=1e-3, momentum=0.9, with_norm=with_norm)
        norms.append(step.vitals().get("grad_norm"))
    assert norms[0] is None
    twin = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE)
    twin.backward([make_batch(SMALL, 0, 8)])
    expected = sum(
        p.grad.double().square().sum() for p in twin.model.parameters() if p.grad is not None
    )
    assert norms[1] == pytest.approx(float(expected) ** 0.5, rel=1e-5)
    assert norms[2] == norms[1]
    for name, value in steps[0].model.state_dict().items():
        assert torch.equal(value, steps[1].model.state_dict()[name]), name


def test_steps_lower_the_loss() -> None:
    step = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE)
    batch = make_batch(SMALL, 0, 8)
    totals = [step([batch], lr=3e-3, momentum=0.996)[0][0].item() for _ in range(30)]
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "model"])
def test_compiled_and_eager_steps_have_the_same_loss(mode: str) -> None:
    batch = make_batch(SMALL, 0, 8)
    eager = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE)
    compiled = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(compile=mode), ALONE)
    for _ in range(2):
        expected, _ = eager([batch], lr=1e-3, momentum=0.9)
        found, _ = compiled([batch], lr=1e-3, momentum=0.9)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_steps_lower_the_loss_on_a_gpu(precision: str) -> None:
    device = torch.device("cuda")
    optim = replace(OPTIM, precision=precision)
    step = TrainStep(
        build_model(SMALL, seed=0).to(device), optim, SpeedConfig(), World(0, 1, device)
    )
    batch = make_batch(SMALL, 0, 8)
    moved = replace(
        batch,
        online=batch.online.to(device),
        target=batch.target.to(device),
        ids_keep=batch.ids_keep.to(device),
        ids_mask=batch.ids_mask.to(device),
    )
    totals = [step([moved], lr=3e-3, momentum=0.996)[0][0].item() for _ in range(40)]
    assert min(totals[-5:]) < 0.8 * totals[0]


def test_norms_of_the_parts_are_those_of_the_whole_and_clipped_steps_are_counted() -> None:
    step = TrainStep(build_model(SMALL, seed=0), OPTIM, SpeedConfig(), ALONE)
    step([make_batch(SMALL, 0, 8)], lr=1e-3, momentum=0.9, with_norm=True)
    found = step.vitals()
    parts = {name: value for name, value in found.items() if name.startswith("grad_norm_")}
    assert {"grad_norm_encoder", "grad_norm_pixel_decoder"} <= parts.keys()
    assert not any("target" in name for name in parts)
    whole = sum(value**2 for value in parts.values()) ** 0.5
    assert whole == pytest.approx(found["grad_norm"], rel=1e-5)
    assert "clipped_pct" not in found
    norm = found["grad_norm"]
    step = TrainStep(
        build_model(SMALL, seed=0), replace(OPTIM, clip_grad=norm / 2), SpeedConfig(), ALONE
    )
    step([make_batch(SMALL, 0, 8)], lr=0.0, momentum=0.9)
    assert step.vitals()["clipped_pct"] == 100
    step.clip_grad = 1e9
    for _ in range(3):
        step([make_batch(SMALL, 0, 8)], lr=0.0, momentum=0.9)
    step.clip_grad = norm / 2
    step([make_batch(SMALL, 0, 8)], lr=0.0, momentum=0.9)
    assert step.vitals()["clipped_pct"] == 25


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder", ["vit", "hybrid"])
def test_blocks_that_are_computed_again_change_nothing(precision: str, encoder: str) -> None:
    config = SMALL
    if encoder == "hybrid":
        config = replace(SMALL, encoder="hybrid", img_size=64, patch_size=16)
    optim = replace(OPTIM, precision=precision)
    results = []
    for recompute in ("none", "blocks"):
        speed = SpeedConfig(recompute=recompute)
        step = TrainStep(build_model(config, seed=0), optim, speed, ALONE)
        batch = make_batch(config, 0, 8)
        if encoder == "hybrid":
            big = batch.online.repeat(1, 2, 2, 1)
            batch = replace(batch, online=big, target=big.flip(0))
        losses = [step([batch], lr=1e-3, momentum=0.9)[0] for _ in range(3)]
        results.append((torch.stack(losses), step.model.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_blocks_that_are_computed_again_and_a_compiled_branch_do_not_go_together() -> None:
    with pytest.raises(CmaeError, match=r"speed\.recompute.*speed\.compile to 'blocks'"):
        TrainStep(
            build_model(SMALL, seed=0),
            OPTIM,
            SpeedConfig(recompute="blocks", compile="model"),
            ALONE,
        )
