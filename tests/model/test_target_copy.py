"""The low-precision copy of the target: autocast's keys to the bit, fp8's within its rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cmae.model import CMAE, ModelConfig, build_model
from cmae.model.target_copy import FP8, Fp8Linear, TargetCopy, to_fp8

SMALL = ModelConfig(
    img_size=32,
    patch_size=8,
    embed_dim=48,
    depth=3,
    num_heads=3,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    feature_decoder_depth=1,
    proj_hidden_dim=32,
    proj_dim=16,
    mask_ratio=0.5,
)
HYBRID = replace(SMALL, encoder="hybrid", img_size=64, patch_size=16, conv_depth=1)


def moved_model(config: ModelConfig) -> CMAE:
    """A model whose target differs from its online branch."""
    model = build_model(config, seed=0)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.update_target(0.5)
    return model


def images(config: ModelConfig, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (size, config.img_size, config.img_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def keys(model: CMAE, target_copy: TargetCopy | None) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.target_keys(images(model.config), target_copy=target_copy)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, head_norm="layer"),
        replace(SMALL, target_final_norm=True),
        HYBRID,
    ],
)
def test_a_16_bit_shadow_gives_the_keys_of_autocast_bit_for_bit(config: ModelConfig) -> None:
    model = moved_model(config)
    target_copy = TargetCopy(model, dtype=torch.bfloat16)
    assert torch.equal(keys(model, target_copy), keys(model, None))
    model.update_target(0.1)
    assert not torch.equal(keys(model, target_copy), keys(model, None))
    target_copy.refresh()
    assert torch.equal(keys(model, target_copy), keys(model, None))


class _Casts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts float32 matrices that are cast to 16 bits."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "_to_copy" in str(func) and out.dtype == torch.bfloat16:
            self.count += args[0].shape in self.shapes
        return out


def test_no_matrix_of_a_shadow_is_cast_in_the_target_pass() -> None:
    model = moved_model(SMALL)
    target_copy = TargetCopy(model, dtype=torch.bfloat16)
    target = (model.target_encoder, model.target_projector)
    shapes = {m.weight.shape for part in target for m in part.modules() if isinstance(m, nn.Linear)}
    with _Casts(shapes) as by_autocast:
        keys(model, None)
    with _Casts(shapes) as with_shadow:
        keys(model, target_copy)
    assert by_autocast.count == 4 * SMALL.depth + 3  # blocks, patch embedding, projector
    assert with_shadow.count == 0


def test_a_shadow_is_no_part_of_the_state_and_shares_norms_and_statistics() -> None:
    model = moved_model(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target_copy = TargetCopy(model, dtype=torch.bfloat16, fp8=True)
    assert {name: value.dtype for name, value in model.state_dict().items()} == {
        name: value.dtype for name, value in before.items()
    }
    assert target_copy.projector.norm is model.target_projector.norm
    norm, own = target_copy.encoder.blocks[0].norm1, model.target_encoder.blocks[0].norm1
    assert norm.weight is own.weight
    keys(model, target_copy)
    assert model.target_projector.norm.num_batches_tracked == 1
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_an_fp8_layer_equals_float64_arithmetic_on_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(5, 7, 64)
    reference = nn.Linear(64, 32).to(torch.bfloat16)
    with torch.no_grad():
        reference.bias.copy_(linear.bias)
    layer = Fp8Linear(reference)
    layer.load(linear)

    def rounded(value: Tensor) -> Tensor:
        scale = value.abs().max().double() / 448
        return (value.double() / scale).float().to(FP8).double() * scale

    expected = rounded(x) @ rounded(linear.weight).T + linear.bias.double()
    found = layer(x).double()
    assert found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() < 4e-3  # the output is bfloat16
    exact = linear(x).double()
    assert 1e-3 < (found - exact).norm() / exact.norm() < 0.06  # e4m3 keeps 3 bits of fraction


def test_fp8_rounds_by_at_most_one_sixteenth_and_survives_zeros() -> None:
    x = torch.logspace(-2, 0, 1000) * 3.7
    rounded, scale = to_fp8(x)
    assert ((rounded.float() * scale - x).abs() <= x / 16 + 1e-7).all()
    zeros, _ = to_fp8(torch.zeros(3))
    assert torch.equal(zeros.float(), torch.zeros(3))


def test_fp8_keys_stay_near_those_of_autocast() -> None:
    model = moved_model(SMALL)
    own = keys(model, None)
    fp8 = keys(model, TargetCopy(model, dtype=torch.bfloat16, fp8=True))
    cosine = (own * fp8).sum(dim=1)
    assert cosine.min() > 0.97
    assert not torch.equal(own, fp8)


def test_widths_that_fp8_cannot_multiply_are_named() -> None:
    model = build_model(replace(SMALL, embed_dim=24, num_heads=2), seed=0)
    with pytest.raises(ValueError, match=r"24 -> 72.*multiples of 16"):
        TargetCopy(model, dtype=torch.bfloat16, fp8=True)


def test_a_model_without_a_target_has_no_shadow() -> None:
    with pytest.raises(ValueError, match="no target branch"):
        TargetCopy(build_model(replace(SMALL, contrastive_loss="none")), dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_shadow_gives_the_keys_of_autocast_on_a_gpu(dtype: torch.dtype) -> None:
    model = moved_model(SMALL).cuda()
    target_copy = TargetCopy(model, dtype=dtype)
    with torch.autocast("cuda", dtype=dtype):
        own = model.target_keys(images(SMALL).cuda())
        found = model.target_keys(images(SMALL).cuda(), target_copy=target_copy)
    assert torch.equal(own, found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_on_a_gpu_multiplies_what_the_cpu_emulates(dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need compute capability 8.9")
    torch.manual_seed(0)
    linear, x = nn.Linear(768, 2304), torch.randn(4, 197, 768, dtype=dtype)
    layer = Fp8Linear(nn.Linear(768, 2304).to(dtype))
    layer.load(linear)
    with torch.no_grad():
        expected = layer(x).double()
        found = layer.cuda()(x.cuda()).double().cpu()
    assert (found - expected).norm() / expected.norm() < 5e-3
