"""The whole model: losses at the start, who learns, the moving average, ablations, precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from cmae.model import CMAE, ModelConfig, build_model, draw_mask
from cmae.model.export.images import to_pixels, unpatchify

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL |= {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
SMALL |= {"proj_hidden_dim": 24, "proj_dim": 12}
ABLATIONS = {
    "recipe": {},
    "contrast off": {"contrastive_loss": "none"},
    "MAE": {"contrastive_loss": "none", "mask_ratio": 0.75, "mask_unit": 1},
    "reconstruction off": {"reconstruction_weight": 0.0},
    "BYOL loss": {"contrastive_loss": "byol"},
    "BYOL without predictor": {"contrastive_loss": "byol", "predictor": False},
    "target sees visible": {"target_input": "visible"},
    "shared decoders": {"feature_decoder": "shared"},
    "deeper feature decoder": {"feature_decoder_depth": 4},
    "no feature decoder": {"feature_decoder": "none"},
    "features alone": {"feature_decoder": "none", "reconstruction_weight": 0.0},
    "paper's weight": {"two_tau_factor": False, "contrastive_weight": 0.5},
    "tau": {"temperature": 0.2},
    "mask ratio and mask_unit": {"mask_ratio": 0.4, "mask_unit": 1},
    "target norm": {"target_final_norm": True},
    "layer norm heads": {"head_norm": "layer"},
    "raw pixels": {"norm_pix_loss": False},
    "other patches": {"img_size": 56, "patch_size": 14},
    "hybrid": {"encoder": "hybrid", "img_size": 64, "patch_size": 16},
    "hybrid, visible target": {
        **{"encoder": "hybrid", "img_size": 64, "patch_size": 16},
        **{"target_input": "visible", "target_final_norm": True},
    },
}


def build(**fields) -> CMAE:
    return build_model(ModelConfig(**SMALL | fields), seed=0)


def batch(config: ModelConfig, size: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, size, config.img_size, config.img_size, 3)
    views = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    ids_keep, _ = draw_mask(config, torch.arange(size), seed=0, epoch=0)
    return views[0], views[1], ids_keep


def masked_pixels(config: ModelConfig, ids_keep: torch.Tensor) -> torch.Tensor:
    """True, (B, H, W, 1), where a pixel was hidden from the encoder."""
    hidden = torch.ones(
        len(ids_keep), *config.grid, config.patch_size, config.patch_size, dtype=bool
    )
    hidden.flatten(1, 2)[torch.arange(len(ids_keep))[:, None], ids_keep.long()] = False
    return hidden.transpose(2, 3).reshape(-1, config.img_size, config.img_size, 1)


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_trains_every_parameter_and_lowers_its_loss(name):
    model = build(**ABLATIONS[name])
    online, target, ids_keep = batch(model.config)
    if not model.config.has_contrast:
        target = None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    first = model(online, target, ids_keep)
    first.total.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        losses = model(online, target, ids_keep)
        losses.total.backward()
    assert losses.total < first.total
    assert all(value.ndim == 0 and value.dtype == torch.float32 for value in losses)


@pytest.mark.parametrize("name", ABLATIONS)
def test_total_is_the_weighted_sum_of_its_parts(name):
    model = build(**ABLATIONS[name])
    config = model.config
    losses = model(*batch(config))
    is_info_nce = config.contrastive_loss == "info_nce"
    factor = 2 * config.temperature if config.two_tau_factor and is_info_nce else 1.0
    scaled = config.contrastive_weight * factor * losses.contrastive_raw
    torch.testing.assert_close(losses.contrastive, scaled)
    expected = config.reconstruction_weight * losses.reconstruction + scaled
    torch.testing.assert_close(losses.total, expected)
    assert config.has_contrast == bool(losses.contrastive_raw != 0)
    assert config.has_reconstruction == bool(losses.reconstruction != 0)


def test_losses_at_the_start_are_those_of_section_5():
    """0.14 * CE near .64 with 64 keys (CE about ln 64 + .40), pixel loss near 1.8."""
    config = ModelConfig(
        **{"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3},
        **{"decoder_embed_dim": 128, "decoder_depth": 4, "decoder_num_heads": 4},
    )
    excess, pixel = [], []
    for seed in range(3):
        with torch.no_grad():
            losses = build_model(config, seed=seed)(*batch(config, 64))
        excess.append(float(losses.contrastive_raw) - math.log(64))
        pixel.append(float(losses.reconstruction))
        assert 0.57 < float(losses.contrastive) < 0.71
        assert 0.04 < float(losses.feature_std) < 1 / math.sqrt(256)
    assert 0.1 < sum(excess) / 3 < 0.7
    assert sum(pixel) / 3 == pytest.approx(1.8, abs=0.15)


def test_target_starts_as_a_copy_and_gets_no_gradient():
    model = build()
    online = dict(model.named_parameters())
    for name, parameter in online.items():
        if name.startswith("target_"):
            assert torch.equal(parameter, online[name.removeprefix("target_")])
    model(*batch(model.config)).total.backward()
    followers = [p for n, p in online.items() if n.startswith("target_")]
    assert all(p.grad is None and not p.requires_grad for p in followers)


@pytest.mark.parametrize("change", ["double", "deepcopy", "load"])
def test_the_target_follows_the_model_that_it_belongs_to(change):
    """The pairs of parameters are looked up once; a copy or another dtype has pairs of its own."""
    model = build()
    model.update_target(0.5)
    other = copy.deepcopy(model) if change == "deepcopy" else model
    if change == "double":
        model.double()
    if change == "load":
        model.load_state_dict(build_model(model.config, seed=3).state_dict())
    weight = other.encoder.blocks[0].mlp.fc1.weight
    weight.data += 1
    before = other.target_encoder.blocks[0].mlp.fc1.weight.clone()
    untouched = model.target_encoder.blocks[0].mlp.fc1.weight.clone()
    other.update_target(0.25)
    found = other.target_encoder.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(found, 0.25 * before + 0.75 * weight)
    if change == "deepcopy":
        assert torch.equal(model.target_encoder.blocks[0].mlp.fc1.weight, untouched)


def test_target_after_k_updates_is_the_closed_form():
    model = build().double()
    online = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.clone() for n, p in model.named_parameters() if n.startswith("target_")}
    with torch.no_grad():
        for parameter in online.values():
            parameter += torch.randn_like(parameter)
    momentum, steps = 0.9, 7
    for _ in range(steps):
        model.update_target(momentum)
    kept = momentum**steps
    for name, parameter in model.named_parameters():
        if name.startswith("target_") and not name.endswith("pos_embed"):
            follows = online[name.removeprefix("target_")]
            torch.testing.assert_close(parameter, kept * start[name] + (1 - kept) * follows)


def test_update_leaves_buffers_and_position_embeddings_alone():
    model = build()
    model(*batch(model.config))
    fixed = {n: b.clone() for n, b in model.named_buffers()}
    position = model.target_encoder.pos_embed.clone()
    model.update_target(0.5)
    assert all(torch.equal(b, fixed[n]) for n, b in model.named_buffers())
    assert torch.equal(model.target_encoder.pos_embed, position)


def test_online_and_target_batch_norms_see_their_own_batches():
    model = build()
    online, target, ids_keep = batch(model.config)
    model(online, target, ids_keep)
    ours, theirs = model.projector.norm.running_mean, model.target_projector.norm.running_mean
    assert not torch.allclose(ours, theirs)
    assert theirs.abs().sum() > 0


def test_given_keys_replace_the_target_and_the_offset_finds_the_positives():
    model = build()
    online, target, ids_keep = batch(model.config)
    own = model.target_keys(target)
    assert own.dtype == torch.float32
    torch.testing.assert_close(own.norm(dim=1), torch.ones(6))
    alone = model(online, target, ids_keep)
    others = torch.nn.functional.normalize(torch.randn(4, 12), dim=1)
    bank = torch.cat([others, own])
    joined = model(online, None, ids_keep, keys=bank, label_offset=4)
    assert torch.equal(joined.positive_similarity, alone.positive_similarity)
    assert joined.contrastive_raw > alone.contrastive_raw
    rolled = model(online, None, ids_keep, keys=bank.roll(-4, 0))
    torch.testing.assert_close(rolled.contrastive_raw, joined.contrastive_raw)


def test_similarities_and_spread_are_those_of_the_cosine_matrix():
    model = build(head_norm="layer").eval()
    online, target, ids_keep = batch(model.config)
    keys = model.target_keys(target)
    grabbed = []
    model.predictor.register_forward_hook(lambda _module, _inputs, out: grabbed.append(out))
    losses = model(online, None, ids_keep, keys=keys)
    query = torch.nn.functional.normalize(grabbed[0], dim=1)
    cosine = query @ keys.T
    off = cosine[~torch.eye(6, dtype=torch.bool)].mean()
    torch.testing.assert_close(losses.positive_similarity, cosine.diagonal().mean())
    torch.testing.assert_close(losses.negative_similarity, off, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.feature_std, query.std(dim=0, correction=0).mean())
    expected = torch.nn.functional.cross_entropy(cosine / 0.07, torch.arange(6))
    torch.testing.assert_close(losses.contrastive_raw, expected)


def test_byol_loss_is_two_minus_two_cosines():
    model = build(contrastive_loss="byol", two_tau_factor=True)
    losses = model(*batch(model.config))
    torch.testing.assert_close(losses.contrastive, 2 - 2 * losses.positive_similarity)


def test_visible_target_hides_masked_pixels_and_full_target_does_not():
    for kind in ("visible", "full"):
        model = build(target_input=kind).eval()
        _, target, ids_keep = batch(model.config)
        hidden = masked_pixels(model.config, ids_keep)
        other = torch.where(hidden, 255 - target, target)
        same = torch.equal(model.target_keys(target, ids_keep), model.target_keys(other, ids_keep))
        assert same == (kind == "visible")


def test_masked_ids_follow_from_visible_ids():
    model = build(head_norm="layer")
    online, target, ids_keep = batch(model.config)
    _, ids_mask = draw_mask(model.config, torch.arange(6), seed=0, epoch=0)
    given = model(online, target, ids_keep, ids_mask=ids_mask)
    assert torch.equal(model(online, target, ids_keep).total, given.total)


def test_order_of_visible_ids_does_not_matter():
    model = build(head_norm="layer").double()
    online, target, ids_keep = batch(model.config)
    shuffled = ids_keep[:, torch.randperm(ids_keep.shape[1])]
    torch.testing.assert_close(
        model(online, target, shuffled).total, model(online, target, ids_keep).total
    )


def test_same_seed_gives_the_same_weights_and_leaves_torchs_random_state():
    state = torch.get_rng_state()
    first, second = build().state_dict(), build().state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    other = build_model(ModelConfig(**SMALL), seed=1)
    assert not torch.equal(other.encoder.cls_token, first["encoder.cls_token"])


def test_weights_start_as_the_method_says():
    model = build_model(ModelConfig(), seed=0)
    qkv = model.encoder.blocks[3].attn.qkv
    bound = math.sqrt(6 / (768 + 3 * 768))
    assert 0.999 * bound < float(qkv.weight.detach().abs().max()) <= bound
    patch = model.encoder.patch_embed.proj
    bound = math.sqrt(6 / (768 + 16 * 16 * 3))
    assert 0.999 * bound < float(patch.weight.detach().abs().max()) <= bound
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert all((bias == 0).all() for bias in biases)
    norms = [p for n, p in model.named_parameters() if "norm" in n and n.endswith("weight")]
    assert all((weight == 1).all() for weight in norms)
    tokens = torch.cat([model.encoder.cls_token, model.pixel_decoder.mask_token], dim=-1)
    assert float(tokens.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert (model.encoder.pos_embed[0, 0] == 0).all()
    assert not model.encoder.pos_embed.requires_grad


@pytest.mark.parametrize("name", ["recipe", "shared decoders", "hybrid", "BYOL loss"])
def test_bf16_autocast_gives_nearly_the_same_loss_and_fp32_losses(name):
    model = build(**ABLATIONS[name])
    exact = model(*batch(model.config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*batch(model.config))
    rounded.total.backward()
    assert all(value.dtype == torch.float32 for value in rounded)
    torch.testing.assert_close(rounded.reconstruction, exact.reconstruction, rtol=1e-2, atol=0)
    torch.testing.assert_close(rounded.contrastive_raw, exact.contrastive_raw, rtol=5e-2, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_forward_is_one_graph_with_the_same_loss_and_gradients():
    model, twin = build(), build()
    online, target, ids_keep = batch(model.config)
    compiled = torch.compile(twin, fullgraph=True, dynamic=False, backend="aot_eager")
    losses, expected = compiled(online, target, ids_keep), model(online, target, ids_keep)
    torch.testing.assert_close(losses.total, expected.total)
    losses.total.backward()
    expected.total.backward()
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe", "hybrid"])
def test_inductor_compiles_the_forward_as_one_graph(name):
    model = build(**ABLATIONS[name])
    online, target, ids_keep = batch(model.config)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = compiled(online, target, ids_keep)
        losses.total.backward()
        expected = model(online, target, ids_keep)
    torch.testing.assert_close(losses.total, expected.total, rtol=3e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpu_autocast_gives_nearly_the_cpus_loss(dtype):
    model = build()
    inputs = batch(model.config)
    expected = model(*inputs)
    model.cuda()
    with torch.autocast("cuda", dtype=dtype):
        losses = model(*(x.cuda() for x in inputs))
    losses.total.backward()
    torch.testing.assert_close(losses.total.cpu(), expected.total, rtol=2e-2, atol=0)


def test_pixels_that_are_predicted_perfectly_are_the_image():
    for norm_pix in (True, False):
        config = ModelConfig(**SMALL, norm_pix_loss=norm_pix)
        online, _, _ = batch(config)
        mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
        rows = ((online - mean) / std).view(6, 4, 8, 4, 8, 3).transpose(2, 3).reshape(6, 16, -1)
        torch.testing.assert_close(unpatchify(rows, config), (online - mean) / std)
        if norm_pix:
            variance, centre = torch.var_mean(rows, dim=-1, keepdim=True)
            rows = (rows - centre) / (variance + 1e-6).sqrt()
        torch.testing.assert_close(
            to_pixels(config, rows, online), online.float(), rtol=0, atol=1e-3
        )


def test_a_mask_of_pixels_covers_the_masked_share():
    model = build()
    _, _, ids_keep = batch(model.config)
    hidden = masked_pixels(model.config, ids_keep)
    assert hidden.shape == (6, 32, 32, 1)
    assert float(hidden.float().mean()) == model.config.num_mask / model.config.num_patches


BAD_CALLS = {
    "online": lambda o, t, k: (o[:, :16], t, k),
    "online has": lambda o, t, k: (o.permute(0, 3, 1, 2), t, k),
    "target": lambda o, t, k: (o, t[:, :16], k),
    "target has 0": lambda o, t, k: (o, None, k),
    "target has 3": lambda o, t, k: (o, t[:3], k),
    "ids_keep": lambda o, t, k: (o, t, k.float()),
    "ids_keep has": lambda o, t, k: (o, t, k[:3]),
    "ids_keep has 16": lambda o, t, k: (o, t, torch.arange(16).expand(6, -1)),
}


def test_masked_ids_that_do_not_fit_are_named():
    model = build()
    online, target, ids_keep = batch(model.config)
    with pytest.raises(ValueError, match="ids_mask has shape"):
        model(online, target, ids_keep, ids_mask=ids_keep)


@pytest.mark.parametrize("loss", ["info_nce", "byol"])
@pytest.mark.parametrize(
    ("keys", "offset"),
    [
        (torch.ones(6, 11), 0),
        (torch.ones(5, 12), 0),
        (torch.ones(12, 12), 7),
        (torch.ones(12, 12), -1),
    ],
)
def test_keys_that_do_not_fit_are_named(loss, keys, offset):
    model = build(contrastive_loss=loss)
    online, _, ids_keep = batch(model.config)
    with pytest.raises(ValueError, match="keys has shape"):
        model(online, None, ids_keep, keys=keys, label_offset=offset)


@pytest.mark.parametrize("named", BAD_CALLS)
def test_a_bad_argument_is_named(named):
    model = build()
    with pytest.raises(ValueError, match=named):
        model(*BAD_CALLS[named](*batch(model.config)))


def test_what_the_model_lacks_is_refused():
    mae, contrast_only = build(contrastive_loss="none"), build(reconstruction_weight=0.0)
    online, target, ids_keep = batch(mae.config)
    with pytest.raises(ValueError, match="contrastive_loss='none'"):
        mae.target_keys(target)
    with pytest.raises(ValueError, match="contrastive_loss='none'"):
        mae.update_target(0.5)
    with pytest.raises(ValueError, match="reconstruction_weight=0"):
        contrast_only.reconstruct(online, ids_keep)
    with pytest.raises(ValueError, match="momentum=2"):
        contrast_only.update_target(2)
    with pytest.raises(ValueError, match="pool='max'"):
        mae.features(online, "max")
    with pytest.raises(ValueError, match="ids_keep is None"):
        build(target_input="visible").target_keys(target)
