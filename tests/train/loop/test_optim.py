"""Parameter groups and the learning rate."""

from __future__ import annotations

import math

import pytest
from torch import nn

from cmae.model import ModelConfig, build_model
from cmae.train.config import OptimConfig
from cmae.train.loop.optim import build_optimizer, parameter_groups
from cmae.train.loop.schedules import build_schedule

SMALL = ModelConfig(
    img_size=32,
    patch_size=8,
    embed_dim=24,
    depth=1,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
    feature_decoder_depth=1,
    proj_hidden_dim=16,
    proj_dim=8,
    mask_ratio=0.5,
)


def decayed_names(config: OptimConfig) -> set[str]:
    model = build_model(SMALL, seed=0)
    decayed = {id(p) for p in parameter_groups(model.named_parameters(), config)[0]["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in decayed}


def test_norms_biases_positions_and_tokens_are_not_decayed() -> None:
    decayed = decayed_names(OptimConfig())
    expected = {
        name
        for name, parameter in build_model(SMALL, seed=0).named_parameters()
        if parameter.requires_grad
        and not name.endswith(("bias", "cls_token", "mask_token", "pos_embed"))
        and "norm" not in name
        and parameter.ndim > 1
    }
    assert decayed == expected
    assert "encoder.patch_embed.proj.weight" in decayed


def test_mae_decays_tokens_but_no_one_dimensional_tensor() -> None:
    extra = decayed_names(OptimConfig(decay_tokens=True)) - decayed_names(OptimConfig())
    assert extra == {
        "encoder.cls_token",
        "pixel_decoder.mask_token",
        "feature_decoder.mask_token",
    }


def test_every_trained_parameter_is_in_one_group_and_no_target_parameter_is() -> None:
    model = build_model(SMALL, seed=0)
    groups = parameter_groups(model.named_parameters(), OptimConfig())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    target = {id(p) for p in model.target_encoder.parameters()}
    assert not target & set(grouped)


def test_schedule_follows_the_authors_recipe() -> None:
    config = OptimConfig(global_batch_size=4096, epochs=300, warmup_epochs=40, lr_per_256=1.5e-4)
    rate = build_schedule(config, total_steps=300 * 312, steps_per_epoch=312)
    peak, warmup = 1.5e-4 * 16, 40 * 312
    assert rate(0) == pytest.approx(peak * 1e-4)
    assert rate(warmup // 2) == pytest.approx(peak * (1e-4 + (1 - 1e-4) / 2))
    assert rate(warmup) == pytest.approx(peak)
    middle = warmup + (300 * 312 - warmup) // 2
    assert rate(middle) == pytest.approx(peak / 2)
    quarter = warmup + (300 * 312 - warmup) // 4
    assert rate(quarter) == pytest.approx(peak * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(300 * 312) == pytest.approx(0, abs=1e-12)


def test_the_schedule_never_divides_by_an_empty_decay() -> None:
    config = OptimConfig(epochs=2, warmup_epochs=40)
    rate = build_schedule(config, total_steps=10, steps_per_epoch=5)
    assert all(math.isfinite(rate(step)) for step in range(12))


def test_missing_apex_is_named_with_the_repair() -> None:
    pytest.importorskip("torch")
    try:
        import apex.optimizers  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"optim\.impl.*PyPI.*torch_fused"):
            build_optimizer(nn.Linear(2, 2), OptimConfig(impl="apex"))
    else:
        pytest.skip("NVIDIA's apex is installed here")
