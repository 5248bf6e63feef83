"""Encoders: timm's features from our weights, position embeddings, and no leaks in the hybrid."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import Tensor

from cmae.model import ModelConfig, build_model, to_timm
from cmae.model.pos_embed import sincos_pos_embed

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
SMALL |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
SMALL |= {"proj_hidden_dim": 24, "proj_dim": 12}
HYBRID = SMALL | {"encoder": "hybrid", "patch_size": 16, "img_size": 64, "depth": 2}
MEAN = torch.tensor([123.675, 116.28, 103.53])
STD = torch.tensor([58.395, 57.12, 57.375])


def images(size: int, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)


def normalised(pixels: Tensor) -> Tensor:
    return ((pixels - MEAN) / STD).permute(0, 3, 1, 2)


def small_timm(**kwargs) -> torch.nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0, **kwargs
    )


@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"pixel_mean": (103.53, 116.28, 123.675), "pixel_std": (57.375, 57.12, 58.395)},
        {"pixel_mean": (127.5, 127.5, 127.5), "pixel_std": (127.5, 127.5, 127.5)},
    ],
)
def test_timm_gives_the_features_of_our_encoder(constants):
    model = build_model(ModelConfig(**SMALL | constants), seed=0)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    twin = small_timm()
    twin.load_state_dict(to_timm(model), strict=True)
    pixels = images(32)
    tokens = twin.forward_features(normalised(pixels))
    for ours in (pixels, normalised(pixels)):
        torch.testing.assert_close(model.encoder(ours), tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.features(pixels), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.features(pixels, "cls"), tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_the_published_vit_b_loads_in_timm_by_name():
    twin = timm.create_model("vit_base_patch16_224", num_classes=0)
    expected = {key: value.shape for key, value in twin.state_dict().items()}
    with torch.device("meta"):
        ours = build_model(ModelConfig()).encoder.state_dict()
    assert {key: value.shape for key, value in ours.items()} == expected


def test_target_branch_exports_without_the_norm_it_lacks():
    model = build_model(ModelConfig(**SMALL), seed=0)
    small_timm(final_norm=False).load_state_dict(to_timm(model, branch="target"), strict=True)
    with pytest.raises(ValueError, match="branch='target'"):
        to_timm(build_model(ModelConfig(**SMALL, contrastive_loss="none")), branch="target")


def test_mean_of_target_tokens_equals_the_mean_of_all_tokens():
    model = build_model(ModelConfig(**SMALL), seed=0).double()
    pixels = normalised(images(32)).double()
    encoder = model.target_encoder
    expected = encoder(pixels)[:, 1:].mean(dim=1)
    torch.testing.assert_close(encoder.mean_tokens(pixels), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["row", "column"])
def test_first_half_of_the_position_embedding_encodes_the_named_axis(order):
    dim, grid = 16, (3, 5)
    table = sincos_pos_embed(dim, grid, order=order)[0]
    assert (table[0] == 0).all()
    for row in range(3):
        for column in range(5):
            first, second = (row, column) if order == "row" else (column, row)
            expected = []
            for position in (first, second):
                angles = [position / 10000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(table[1 + row * 5 + column], torch.tensor(expected))


@pytest.mark.parametrize("fields", [SMALL, HYBRID])
def test_visible_tokens_do_not_depend_on_masked_pixels(fields):
    config = ModelConfig(**fields, mask_unit=1, mask_ratio=0.5)
    model = build_model(config, seed=0)
    ids_keep = torch.stack([torch.randperm(config.num_patches)[:5].sort().values for _ in range(3)])
    pixels = images(config.img_size)
    grid, patch = config.grid[0], config.patch_size
    keep = torch.zeros(3, config.num_patches, dtype=torch.bool).scatter(1, ids_keep, True)
    keep = keep.view(3, grid, grid).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    other = torch.where(keep[..., None], pixels, 255 - pixels)
    assert torch.equal(model.encoder(pixels, ids_keep), model.encoder(other, ids_keep))
    assert not torch.equal(model.encoder(pixels), model.encoder(other))


def test_hybrid_without_mask_equals_the_hybrid_with_all_ids():
    model = build_model(ModelConfig(**HYBRID), seed=0).double()
    pixels = normalised(images(64)).double()
    every = torch.arange(16).expand(3, -1)
    for encoder in (model.encoder, model.target_encoder):
        torch.testing.assert_close(encoder(pixels), encoder(pixels, every))
        torch.testing.assert_close(encoder.mean_tokens(pixels), encoder(pixels).mean(dim=1))


def test_hybrid_stage_is_the_convolution_of_the_image():
    """The stride-4 embedding, computed from gathered rows, equals a convolution with its weight."""
    model = build_model(ModelConfig(**HYBRID), seed=0)
    embed = model.encoder.patch_embed
    pixels = images(64)
    rows = embed(pixels, torch.arange(256).expand(3, -1))
    expected = torch.nn.functional.conv2d(
        normalised(pixels), embed.proj.weight, embed.proj.bias, stride=4
    )
    torch.testing.assert_close(rows, expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


def plain_hybrid(encoder, x: Tensor, ids_keep: Tensor) -> Tensor:
    """Section 6 of the method in channels-first layout: (B, 3, H, W) to (B, K, D)."""
    side = x.shape[-1] // 16
    keep = torch.zeros(len(x), side * side, dtype=x.dtype).scatter(1, ids_keep, 1.0)
    keep = keep.view(-1, 1, side, side)

    def linear(layer, z):
        return torch.nn.functional.conv2d(z, layer.weight[:, :, None, None], layer.bias)

    def norm(layer, z):
        return layer(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def chosen(z):
        tokens = z.flatten(2).transpose(1, 2)
        return torch.stack([row[ids] for row, ids in zip(tokens, ids_keep, strict=True)])

    gelu, fused = torch.nn.functional.gelu, 0
    x = gelu(norm(encoder.embed_norm[0], encoder.patch_embed.proj(x)))
    for stage, scale in ((0, 4), (1, 2)):
        mask = torch.nn.functional.interpolate(keep, scale_factor=scale, mode="nearest")
        for block in encoder.stages[stage]:
            inner = block.depthwise(mask * linear(block.fc1, norm(block.norm1, x)))
            x = x + linear(block.fc2, inner)
            hidden = gelu(linear(block.mlp.fc1, norm(block.norm2, x)))
            x = x + linear(block.mlp.fc2, hidden)
        fused = fused + chosen(encoder.fuse[stage](x))
        x = gelu(norm(encoder.embed_norm[stage + 1], encoder.merge[stage](x)))
    position = encoder.pos_embed.transpose(1, 2).unflatten(2, (side, side))
    x = chosen(linear(encoder.embed, x) + position)
    for block in encoder.blocks:
        x = block(x)
    return encoder.norm(x + fused)


def test_hybrid_equals_its_formula_in_channels_first_layout():
    config = ModelConfig(**HYBRID, mask_unit=1, mask_ratio=0.5)
    encoder = build_model(config, seed=0).double().encoder
    ids_keep = torch.stack([torch.randperm(16)[:7] for _ in range(3)])
    pixels = normalised(images(64)).double()
    expected = plain_hybrid(encoder, pixels, ids_keep)
    torch.testing.assert_close(encoder(pixels, ids_keep), expected, rtol=1e-10, atol=1e-10)


def test_hybrid_has_no_cls_token_and_no_timm_form():
    model = build_model(ModelConfig(**HYBRID), seed=0)
    with pytest.raises(ValueError, match="pool='cls'"):
        model.features(images(64), "cls")
    with pytest.raises(ValueError, match="encoder='hybrid'"):
        to_timm(model)
