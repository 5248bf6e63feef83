"""The 16-bit copy of the target: autocast's keys to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cmae.model import CMAE, ModelConfig, build_model
from cmae.model.target_copy import TargetCopy

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
HYBRID = replace(SMALL, encoder="hybrid", img_size=64, patch_size=16)


def moved_model(config: ModelConfig) -> CMAE:
    """A model whose target differs from its online branch."""
    model = build_model(config, seed=0)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.update_target(0.5)
    return model


def copy_target(model: CMAE, dtype: torch.dtype = torch.bfloat16) -> TargetCopy:
    assert model.target_encoder is not None
    assert model.target_projector is not None
    return TargetCopy(model.target_encoder, model.target_projector, dtype=dtype)


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
def test_a_16_bit_copy_gives_the_keys_of_autocast_bit_for_bit(config: ModelConfig) -> None:
    model = moved_model(config)
    target_copy = copy_target(model)
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


def test_no_matrix_of_a_copy_is_cast_in_the_target_pass() -> None:
    model = moved_model(SMALL)
    target_copy = copy_target(model)
    target = (model.target_encoder, model.target_projector)
    shapes = {m.weight.shape for part in target for m in part.modules() if isinstance(m, nn.Linear)}
    with _Casts(shapes) as by_autocast:
        keys(model, None)
    with _Casts(shapes) as with_copy:
        keys(model, target_copy)
    assert by_autocast.count == 4 * SMALL.depth + 3  # blocks, patch embedding, projector
    assert with_copy.count == 0


def test_a_copy_is_no_part_of_the_state_and_shares_norms_and_statistics() -> None:
    model = moved_model(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    target_copy = copy_target(model)
    assert {name: value.dtype for name, value in model.state_dict().items()} == {
        name: value.dtype for name, value in before.items()
    }
    assert target_copy.projector.norm is model.target_projector.norm
    norm, own = target_copy.encoder.blocks[0].norm1, model.target_encoder.blocks[0].norm1
    assert norm.weight is own.weight
    keys(model, target_copy)
    assert model.target_projector.norm.num_batches_tracked == 1
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_copy_gives_the_keys_of_autocast_on_a_gpu(dtype: torch.dtype) -> None:
    model = moved_model(SMALL).cuda()
    target_copy = copy_target(model, dtype)
    with torch.autocast("cuda", dtype=dtype):
        own = model.target_keys(images(SMALL).cuda())
        found = model.target_keys(images(SMALL).cuda(), target_copy=target_copy)
    assert torch.equal(own, found)
