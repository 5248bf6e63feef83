"""Parameters and multiply-adds of the published models, to the digits published."""

from __future__ import annotations

import pytest
import torch

from cmae.model import ModelConfig, build_model, count_multiply_adds, count_parameters

MAE = {"contrastive_loss": "none", "mask_ratio": 0.75, "mask_unit": 1}


def test_vit_b_has_the_published_numbers_of_parameters():
    millions = {key: value / 1e6 for key, value in count_parameters(ModelConfig()).items()}
    expected = {
        "encoder": "85.80",
        "pixel_decoder": "26.01",
        "feature_decoder": "7.09",
        "projector": "1.58",
        "predictor": "0.79",
    }
    assert {key: f"{millions[key]:.2f}" for key in expected} == expected
    assert f"{millions['online']:.1f}" == "121.3"
    assert f"{millions['target']:.1f}" == "87.4"


def test_vit_b_needs_the_published_multiply_adds():
    cmae, mae = count_multiply_adds(ModelConfig()), count_multiply_adds(ModelConfig(**MAE))
    giga = {
        "197 tokens": cmae["target"],
        "69 tokens": cmae["encoder"],
        "50 tokens": mae["encoder"],
        "8-block decoder": cmae["pixel_decoder"],
        "2-block decoder": cmae["feature_decoder"],
    }
    assert {key: f"{value / 1e9:.2f}" for key, value in giga.items()} == {
        "197 tokens": "17.56",
        "69 tokens": "6.06",
        "50 tokens": "4.41",
        "8-block decoder": "5.43",
        "2-block decoder": "1.47",
    }
    assert f"{cmae['training_step'] / 1e9:.1f}" == "56.5"
    assert f"{mae['training_step'] / 1e9:.1f}" == "29.5"


def test_parameter_counts_are_those_of_a_built_model():
    config = ModelConfig(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, feature_decoder="none"
    )
    counts, model = count_parameters(config), build_model(config, seed=0)
    assert counts["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert counts["feature_decoder"] == 0
    assert counts["online"] + counts["target"] == sum(p.numel() for p in model.parameters())


class _MultiplyAdds(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what really runs: every matrix product and convolution that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm"):
            self.total += args[0].numel() * args[1].shape[-1]
        elif name == "aten::addmm":
            self.total += args[1].numel() * args[2].shape[-1]
        elif name == "aten::convolution":
            self.total += out.numel() * args[1][0].numel()
        elif "attention" in name:
            query, key, value = args[:3]
            self.total += query.numel() * key.shape[-2]
            self.total += query.numel() // query.shape[-1] * value.shape[-2] * value.shape[-1]
        return out


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"contrastive_loss": "none"},
        {"reconstruction_weight": 0.0},
        {"feature_decoder": "shared"},
        {"feature_decoder": "none"},
        {"target_input": "visible"},
        {"target_final_norm": True},
        {"predictor": False},
        {"encoder": "hybrid", "patch_size": 16, "img_size": 64, "embed_dim": 48},
    ],
)
def test_multiply_adds_that_are_not_as_published_are_those_that_run(change):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    small |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
    config = ModelConfig(**small | {"proj_hidden_dim": 24, "proj_dim": 12} | change)
    model = build_model(config, seed=0)
    size, batch = config.img_size, 2
    images = torch.zeros(batch, size, size, 3, dtype=torch.uint8)
    ids_keep = torch.arange(config.num_keep).expand(batch, -1)
    with _MultiplyAdds() as counter, torch.no_grad():
        model(images, images, ids_keep)
    counts = count_multiply_adds(config, as_published=False)
    forward = sum(value for key, value in counts.items() if key != "training_step")
    similarities = batch * batch * config.proj_dim if config.contrastive_loss == "info_nce" else 0
    assert counter.total - similarities == pytest.approx(batch * forward, rel=1e-9)
