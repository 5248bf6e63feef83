"""Losses and every gradient against a plain float64 implementation of the published method.

The oracle below does everything the long way: all patches embedded, tokens put back in place, all
decoder tokens through every layer, heads before means, binary masks. It works on state dicts with
the original projects' key names, so that it checks the importers too.
"""

from __future__ import annotations

import re

import pytest
import torch
from support.oracle import (
    MMCV,
    TIMM,
    State,
    block,
    info_nce,
    layer_norm,
    linear,
    mlp_head,
    pixel_loss,
)
from torch import Tensor

from cmae.model import ModelConfig, draw_mask, from_authors, from_mae
from cmae.model.export.checkpoints import published_heads

IMG, PATCH, DIM, HEADS, DEPTH = 32, 8, 32, 2, 2
DEC, DEC_HEADS, DEC_DEPTH, FEATURE_DEPTH, HIDDEN, PROJ = 16, 2, 3, 2, 24, 12
GRID = IMG // PATCH
N = GRID * GRID
BATCH = 6
MEAN = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64)
STD = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64)
OVERRIDES = {"num_heads": HEADS, "decoder_num_heads": DEC_HEADS}

# ---- the oracle ---------------------------------------------------------------------------------


def encode(sd: State, images: Tensor, mask: Tensor, spec: dict) -> Tensor:
    """Cls and visible tokens in ascending order; `mask` (B, N) is 1 where removed."""
    p = spec["prefix"]
    w, b = sd[p + spec["conv"] + ".weight"], sd[p + spec["conv"] + ".bias"]
    x = torch.nn.functional.conv2d(images, w, b, stride=PATCH).flatten(2).transpose(1, 2)
    x = x + sd[p + "pos_embed"][:, 1:]
    x = torch.stack([tokens[row == 0] for tokens, row in zip(x, mask, strict=True)])
    cls = (sd[p + "cls_token"] + sd[p + "pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1)
    for i in range(DEPTH):
        x = block(sd, f"{p}{spec['blocks']}.{i}", x, HEADS, spec["names"])
    norm = p + spec["norm"]
    if norm + ".weight" in sd:
        x = layer_norm(x, sd[norm + ".weight"], sd[norm + ".bias"])
    return x


def decode(sd: State, latent: Tensor, mask: Tensor, prefix: str, depth: int, spec: dict) -> Tensor:
    """Head output for all N patches in image order."""
    x = linear(sd, prefix + "decoder_embed", latent)
    full = sd[prefix + "mask_token"].expand(len(x), N, -1).clone()
    full[mask == 0] = x[:, 1:].reshape(-1, DEC)
    x = torch.cat([x[:, :1], full], 1) + sd[prefix + "decoder_pos_embed"]
    for i in range(depth):
        x = block(sd, f"{prefix}decoder_blocks.{i}", x, DEC_HEADS, spec["names"])
    norm = prefix + spec["decoder_norm"]
    x = layer_norm(x, sd[norm + ".weight"], sd[norm + ".bias"])
    return linear(sd, prefix + "decoder_pred", x)[:, 1:]


AUTHORS = {
    "prefix": "backbone.",
    "conv": "patch_embed.projection",
    "blocks": "layers",
    "norm": "ln1",
    "decoder_norm": "ln1",
    "names": MMCV,
}
MAE = {
    "prefix": "",
    "conv": "patch_embed.proj",
    "blocks": "blocks",
    "norm": "norm",
    "decoder_norm": "decoder_norm",
    "names": TIMM,
}


def cmae_losses(sd: State, online: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel loss and InfoNCE (without the 2 tau factor) of the authors' method."""
    latent = encode(sd, online, mask, AUTHORS)
    pred = decode(sd, latent, mask, "pixel_decoder.", DEC_DEPTH, AUTHORS)
    feature = decode(sd, latent, mask, "feature_decoder.", FEATURE_DEPTH, AUTHORS).mean(1)
    query = mlp_head(sd, "head.predictor", mlp_head(sd, "projector", feature))
    whole = encode(sd, target, torch.zeros_like(mask), AUTHORS | {"prefix": "target_backbone."})
    key = mlp_head(sd, "target_projector", whole[:, 1:].mean(1)).detach()
    return pixel_loss(pred, online, mask, PATCH), info_nce(query, key)


def mae_loss(sd: State, images: Tensor, mask: Tensor, norm_pix: bool = True) -> Tensor:
    pred = decode(sd, encode(sd, images, mask, MAE), mask, "", DEC_DEPTH, MAE)
    return pixel_loss(pred, images, mask, PATCH, norm_pix)


# ---- random weights in the originals' names -------------------------------------------------------


def _block_shapes(prefix: str, dim: int, names: tuple[str, str, str, str]) -> dict[str, tuple]:
    ln1, ln2, fc1, fc2 = names
    pairs = {ln1: (dim,), ln2: (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    pairs |= {fc1: (4 * dim, dim), fc2: (dim, 4 * dim)}
    return {f"{prefix}.{name}": shape for name, shape in pairs.items()}


def _shapes(spec: dict, decoders: dict[str, int], encoders: dict[str, bool]) -> dict[str, tuple]:
    pairs, single = {}, {}
    for p, has_norm in encoders.items():
        single |= {p + "cls_token": (1, 1, DIM), p + "pos_embed": (1, N + 1, DIM)}
        pairs[p + spec["conv"]] = (DIM, 3, PATCH, PATCH)
        for i in range(DEPTH):
            pairs |= _block_shapes(f"{p}{spec['blocks']}.{i}", DIM, spec["names"])
        if has_norm:
            pairs[p + spec["norm"]] = (DIM,)
    for p, depth in decoders.items():
        single |= {p + "mask_token": (1, 1, DEC), p + "decoder_pos_embed": (1, N + 1, DEC)}
        pairs |= {p + "decoder_embed": (DEC, DIM), p + spec["decoder_norm"]: (DEC,)}
        pairs[p + "decoder_pred"] = (PATCH**2 * 3 if p in ("", "pixel_decoder.") else DIM, DEC)
        for i in range(depth):
            pairs |= _block_shapes(f"{p}decoder_blocks.{i}", DEC, spec["names"])
    for key, shape in pairs.items():
        single |= {key + ".weight": shape, key + ".bias": shape[:1]}
    return single


def _randomise(shapes: dict[str, tuple], seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        is_scale = key.endswith(".weight") and len(shape) == 1
        state[key] = value + 1 if is_scale else value
    return state


def authors_state(seed: int = 0) -> State:
    shapes = _shapes(
        AUTHORS,
        {"pixel_decoder.": DEC_DEPTH, "feature_decoder.": FEATURE_DEPTH},
        {"backbone.": True, "target_backbone.": False},
    )
    heads = {"projector": DIM, "target_projector": DIM, "head.predictor": PROJ}
    for key, width in heads.items():
        shapes |= {f"{key}.fc0.weight": (HIDDEN, width), f"{key}.fc0.bias": (HIDDEN,)}
        shapes |= {f"{key}.bn0.weight": (HIDDEN,), f"{key}.bn0.bias": (HIDDEN,)}
        shapes |= {f"{key}.fc1.weight": (PROJ, HIDDEN)}
    state = _randomise(shapes, seed)
    for key in heads:
        state[f"{key}.bn0.running_mean"] = torch.zeros(HIDDEN, dtype=torch.float64)
        state[f"{key}.bn0.running_var"] = torch.ones(HIDDEN, dtype=torch.float64)
        state[f"{key}.bn0.num_batches_tracked"] = torch.tensor(0)
    return state


def mae_state(seed: int = 0) -> State:
    return _randomise(_shapes(MAE, {"": DEC_DEPTH}, {"": True}), seed)


def our_name(key: str, *, mae: bool = False) -> str:
    """Our parameter for an original key, written without the importer's tables."""
    if mae:
        inner = re.match(r"decoder_(embed|pos_embed|blocks|norm)(.*)", key)
        if inner:
            return "pixel_decoder." + inner[1] + inner[2]
        if key == "mask_token" or key.startswith("decoder_pred"):
            return "pixel_decoder." + key.replace("decoder_pred", "head")
        return "encoder." + key
    module, rest = re.match(r"(head\.predictor|\w+)\.(.*)", key).groups()
    if "predictor" in module or "projector" in module:
        rest = {"fc0": "fc1", "bn0": "norm", "fc1": "fc2"}[rest[:3]] + rest[3:]
        return f"{module.removeprefix('head.')}.{rest}"
    for theirs, ours in (
        ("ffn.layers.0.0", "mlp.fc1"),
        ("ffn.layers.1", "mlp.fc2"),
        ("patch_embed.projection", "patch_embed.proj"),
        ("decoder_pred", "head"),
        ("decoder_", ""),
        ("layers", "blocks"),
    ):
        rest = rest.replace(theirs, ours)
    rest = re.sub(r"^ln1", "norm", rest)
    rest = re.sub(r"ln([12])", r"norm\1", rest)
    return f"{module.replace('target_backbone', 'target_encoder').replace('backbone', 'encoder')}.{rest}"


# ---- comparisons ----------------------------------------------------------------------------------


def images_u8(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (BATCH, IMG, IMG, 3), dtype=torch.uint8, generator=generator)


def normalised(images: Tensor, channel_order: str) -> Tensor:
    """Float64 NCHW as the original network gets it: always with the mean and std of RGB."""
    pixels = images.double() if channel_order == "rgb" else images.double().flip(-1)
    return ((pixels - MEAN) / STD).permute(0, 3, 1, 2).contiguous()


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.detach().double() - expected.detach()).norm() / expected.detach().norm())


def mask_of(ids_mask: Tensor) -> Tensor:
    return torch.zeros(len(ids_mask), N, dtype=torch.float64).scatter(1, ids_mask.long(), 1.0)


def leaves(state: State) -> State:
    fixed = ("pos_embed", "running", "num_batches", "target_")
    return {
        key: value.clone().requires_grad_(not any(part in key for part in fixed))
        for key, value in state.items()
    }


def check_gradients(model, oracle: State, tolerance: float, *, bgr: bool = False, mae=False):
    """Each gradient within `tolerance` of the oracle's, relative to its own norm.

    Batch norm makes some gradients exactly 0 (biases before it); rounding is all that is left of
    them, and it is compared with the whole gradient.
    """
    parameters = dict(model.named_parameters())
    whole = torch.stack([x.grad.norm() for x in oracle.values() if x.requires_grad]).norm()
    compared = set()
    for key, leaf in oracle.items():
        if not leaf.requires_grad:
            continue
        name = our_name(key, mae=mae)
        gradient = parameters[name].grad
        if bgr and "patch_embed" in name and gradient.ndim == 4:
            gradient = gradient[:, [2, 1, 0]]
        if bgr and name.startswith("pixel_decoder.head"):
            order = torch.arange(PATCH**2 * 3).view(-1, 3)[:, [2, 1, 0]].flatten()
            gradient = gradient[order]
        scale = leaf.grad.norm() if leaf.grad.norm() > 1e-9 * whole else whole
        error = (gradient.double() - leaf.grad).norm() / scale
        assert error <= tolerance, (name, float(error))
        compared.add(name)
    assert compared == {name for name, p in parameters.items() if p.requires_grad}


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_imported_authors_model_has_the_originals_losses_and_gradients(
    channel_order, dtype, tolerance, as_bytes
):
    state = authors_state()
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    model = from_authors(stored, channel_order=channel_order, **OVERRIDES)
    oracle = leaves(state)
    online, target = images_u8(1), images_u8(2)
    ids_keep, ids_mask = draw_mask(model.config, torch.arange(BATCH), seed=3, epoch=0)
    assert ids_keep.shape == (BATCH, 4)
    if as_bytes:  # pixels are normalised in float32, whatever the dtype of the weights
        tolerance = max(tolerance, 1e-6)
    inputs = (
        [online, target] if as_bytes else [normalised(x, "rgb").to(dtype) for x in (online, target)]
    )
    losses = model(*inputs, ids_keep)
    losses.total.backward()
    views = (normalised(x, channel_order) for x in (online, target))
    pixel, contrast = cmae_losses(oracle, *views, mask_of(ids_mask))
    total = pixel + 2 * 0.07 * contrast
    total.backward()
    assert relative_error(losses.reconstruction, pixel) <= tolerance
    assert relative_error(losses.contrastive_raw, contrast) <= tolerance
    assert relative_error(losses.contrastive, 0.14 * contrast) <= tolerance
    assert relative_error(losses.total, total) <= tolerance
    check_gradients(model, oracle, tolerance, bgr=channel_order == "bgr")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_imported_mae_has_the_originals_loss_and_gradients(dtype, tolerance, norm_pix):
    state = mae_state()
    stored = {"model": {k: v.to(dtype) for k, v in state.items()}}
    model = from_mae(stored, norm_pix_loss=norm_pix, **OVERRIDES)
    oracle = leaves(state)
    images = normalised(images_u8(1), "rgb")
    ids_keep, ids_mask = draw_mask(model.config, torch.arange(BATCH), seed=3, epoch=0)
    assert ids_keep.shape == (BATCH, 4)
    losses = model(images.to(dtype), None, ids_keep)
    losses.total.backward()
    expected = mae_loss(oracle, images, mask_of(ids_mask), norm_pix)
    expected.backward()
    assert relative_error(losses.reconstruction, expected) <= tolerance
    assert losses.total == losses.reconstruction
    check_gradients(model, oracle, tolerance, mae=True)


def test_skipping_what_nothing_reads_changes_neither_loss_nor_gradients():
    state = authors_state(seed=5)
    model = from_authors(state, channel_order="rgb", **OVERRIDES)
    oracle = leaves(state)
    views = [normalised(images_u8(seed), "rgb") for seed in (1, 2)]
    ids_keep, ids_mask = draw_mask(model.config, torch.arange(BATCH), seed=7, epoch=1)
    losses = model(*views, ids_keep, ids_mask=ids_mask)
    losses.total.backward()
    pixel, contrast = cmae_losses(oracle, *views, mask_of(ids_mask))
    (pixel + 0.14 * contrast).backward()
    assert relative_error(losses.total, pixel + 0.14 * contrast) <= 1e-12
    check_gradients(model, oracle, 1e-10)


def test_reconstruct_predicts_every_patch_in_image_order():
    state = mae_state()
    model = from_mae(state, **OVERRIDES)
    images = normalised(images_u8(1), "rgb")
    ids_keep, ids_mask = draw_mask(model.config, torch.arange(BATCH), seed=3, epoch=0)
    mask = mask_of(ids_mask)
    expected = decode(state, encode(state, images, mask, MAE), mask, "", DEC_DEPTH, MAE)
    assert relative_error(model.reconstruct(images, ids_keep), expected) < 1e-12


def test_bgr_import_gives_on_rgb_images_what_the_original_gave_on_bgr():
    state = authors_state()
    model = from_authors(state, channel_order="bgr", **OVERRIDES)
    mask = torch.zeros(BATCH, N, dtype=torch.float64)
    expected = encode(state, normalised(images_u8(1), "bgr"), mask, AUTHORS)
    rgb = normalised(images_u8(1), "rgb")
    assert relative_error(model.features(rgb), expected[:, 1:].mean(1)) < 1e-12
    assert relative_error(model.features(rgb, pool="cls"), expected[:, 0]) < 1e-12
    assert relative_error(model.features(images_u8(1)), expected[:, 1:].mean(1)) < 1e-6


def test_import_reads_every_size_from_the_weights():
    config = from_authors(authors_state(), channel_order="rgb", **OVERRIDES).config
    assert config == ModelConfig(
        img_size=IMG,
        patch_size=PATCH,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        decoder_embed_dim=DEC,
        decoder_depth=DEC_DEPTH,
        decoder_num_heads=DEC_HEADS,
        feature_decoder_depth=FEATURE_DEPTH,
        proj_hidden_dim=HIDDEN,
        proj_dim=PROJ,
    )


def test_import_takes_wrapped_and_prefixed_checkpoints():
    plain = authors_state()
    wrapped = {"meta": {"epoch": 1}, "state_dict": {f"module.{k}": v for k, v in plain.items()}}
    model = from_authors(wrapped, channel_order="rgb", **OVERRIDES)
    expected = from_authors(plain, channel_order="rgb", **OVERRIDES).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_import_keeps_a_target_norm_that_the_checkpoint_has():
    state = authors_state()
    state |= {
        f"target_backbone.ln1.{kind}": state[f"backbone.ln1.{kind}"] for kind in ("weight", "bias")
    }
    model = from_authors(state, channel_order="rgb", **OVERRIDES)
    assert model.config.target_final_norm
    assert torch.equal(model.target_encoder.norm.weight, state["backbone.ln1.weight"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("backbone.layers.1.ln2.bias"), "backbone.layers.1.ln2.bias"),
        (lambda s: s.pop("head.predictor.bn0.running_mean"), "head.predictor.bn0.running_mean"),
        (
            lambda s: s.pop("pixel_decoder.decoder_embed.weight"),
            "pixel_decoder.decoder_embed.weight",
        ),
        (lambda s: s.update({"backbone.surprise": torch.ones(1)}), "backbone.surprise"),
        (
            lambda s: s.update({"feature_decoder.mask_token": torch.ones(1, 1, 3)}),
            "feature_decoder.mask_token",
        ),
    ],
)
def test_import_names_the_key_that_does_not_fit(change, named):
    state = authors_state()
    change(state)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        from_authors(state, channel_order="rgb", **OVERRIDES)


def test_import_refuses_an_unknown_channel_order():
    with pytest.raises(ValueError, match="channel_order='grb'"):
        from_authors(authors_state(), channel_order="grb", **OVERRIDES)


def test_import_asks_for_the_heads_that_weights_cannot_tell():
    with pytest.raises(ValueError, match="num_heads"):
        from_authors(authors_state(), channel_order="rgb", decoder_num_heads=DEC_HEADS, num_heads=5)


def test_import_takes_the_published_number_of_heads():
    heads = {(384, 12): 6, (768, 12): 12, (768, 8): 8, (1024, 24): 16, (1280, 32): 16}
    assert {size: published_heads(*size) for size in heads} == heads


@pytest.mark.parametrize("family", ["mae", "authors"])
def test_every_weight_of_a_checkpoint_moves_the_model(family):
    """Two checkpoints that differ everywhere give models that differ everywhere."""
    if family == "mae":
        first, second = (from_mae(mae_state(s), **OVERRIDES) for s in (0, 1))
    else:
        first, second = (
            from_authors(authors_state(s), channel_order="bgr", **OVERRIDES) for s in (0, 1)
        )
    other = dict(second.named_parameters())
    assert all(not torch.equal(p, other[name]) for name, p in first.named_parameters())
