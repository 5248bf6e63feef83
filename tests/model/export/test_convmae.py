"""Hybrid models against a plain float64 implementation with the names of Alpha-VL/ConvMAE.

The oracle computes every position of every map, multiplies by the keep-mask before each depthwise
convolution, and gathers the visible tokens before the blocks, as the method (section 6) is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.oracle import (
    TIMM,
    State,
    block,
    gelu,
    info_nce,
    layer_norm,
    linear,
    mlp_head,
    pixel_loss,
)
from torch import Tensor

from cmae.errors import CmaeError
from cmae.model import CMAE, build_model, draw_mask, from_convmae, load_model, to_convmae
from cmae.model.export.checkpoints import published_heads
from cmae.train.commands.main import main
from cmae.train.evaluation.encoders import Encoder, from_model, load_encoder
from cmae.train.finetune.classifier import Classifier, layer_of, parameter_groups
from cmae.train.loop.weights import save_model

IMG, PATCH, DIM, HEADS, DEPTH, BATCH = 64, 16, 48, 3, 2, 5
GRID, N = IMG // PATCH, (IMG // PATCH) ** 2
DIMS = (DIM // 3, DIM // 2)
DEC, DEC_HEADS, DEC_DEPTH = 16, 2, 2
OVERRIDES = {"num_heads": HEADS, "decoder_num_heads": DEC_HEADS}
STAGE_EPS = 1e-5


def conv(sd: State, key: str, x: Tensor, **options: Any) -> Tensor:
    return F.conv2d(x, sd[f"{key}.weight"], sd[f"{key}.bias"], **options)


def channel_norm(sd: State, key: str, x: Tensor) -> Tensor:
    normed = layer_norm(
        x.permute(0, 2, 3, 1), sd[f"{key}.weight"], sd[f"{key}.bias"], eps=STAGE_EPS
    )
    return normed.permute(0, 3, 1, 2)


def embed(sd: State, key: str, x: Tensor, stride: int) -> Tensor:
    return gelu(channel_norm(sd, f"{key}.norm", conv(sd, f"{key}.proj", x, stride=stride)))


def conv_block(sd: State, key: str, x: Tensor, keep: Tensor) -> Tensor:
    inner = keep * conv(sd, f"{key}.conv1", channel_norm(sd, f"{key}.norm1", x))
    mixed = conv(sd, f"{key}.attn", inner, padding=2, groups=x.shape[1])
    x = x + conv(sd, f"{key}.conv2", mixed)
    hidden = gelu(conv(sd, f"{key}.mlp.fc1", channel_norm(sd, f"{key}.norm2", x)))
    return x + conv(sd, f"{key}.mlp.fc2", hidden)


def encode(sd: State, images: Tensor, mask: Tensor) -> Tensor:
    """Visible tokens in ascending order; `mask` (B, N) is 1 where removed."""
    keep = 1 - mask.view(-1, 1, GRID, GRID)

    def visible(x: Tensor) -> Tensor:
        return torch.stack([rows[row == 0] for rows, row in zip(x, mask, strict=True)])

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    x = embed(sd, "patch_embed1", images, 4)
    for i in range(2):
        x = conv_block(sd, f"blocks1.{i}", x, keep.repeat_interleave(4, 2).repeat_interleave(4, 3))
    first = tokens(conv(sd, "stage1_output_decode", x, stride=4))
    x = embed(sd, "patch_embed2", x, 2)
    for i in range(2):
        x = conv_block(sd, f"blocks2.{i}", x, keep.repeat_interleave(2, 2).repeat_interleave(2, 3))
    second = tokens(conv(sd, "stage2_output_decode", x, stride=2))
    x = tokens(embed(sd, "patch_embed3", x, 2))
    x = visible(linear(sd, "patch_embed4", x) + sd["pos_embed"])
    for i in range(DEPTH):
        x = block(sd, f"blocks3.{i}", x, HEADS, TIMM)
    x = x + visible(first) + visible(second)
    return layer_norm(x, sd["norm.weight"], sd["norm.bias"]) if "norm.weight" in sd else x


def decode(sd: State, latent: Tensor, mask: Tensor) -> Tensor:
    x = linear(sd, "decoder_embed", latent)
    full = sd["mask_token"].expand(len(x), N, -1).clone()
    full[mask == 0] = x.reshape(-1, DEC)
    x = full + sd["decoder_pos_embed"]
    depth = len({key.split(".")[1] for key in sd if key.startswith("decoder_blocks.")})
    for i in range(depth):
        x = block(sd, f"decoder_blocks.{i}", x, DEC_HEADS, TIMM)
    x = layer_norm(x, sd["decoder_norm.weight"], sd["decoder_norm.bias"])
    return linear(sd, "decoder_pred", x)


def convmae_state(seed: int = 0) -> State:
    """Random weights under the public names."""
    shapes: dict[str, tuple[int, ...]] = {}
    pairs: dict[str, tuple[int, ...]] = {"norm": (DIM,), "patch_embed4": (DIM, DIM)}
    for number, (width_in, width, size) in enumerate(
        ((3, DIMS[0], 4), (DIMS[0], DIMS[1], 2), (DIMS[1], DIM, 2)), start=1
    ):
        pairs[f"patch_embed{number}.proj"] = (width, width_in, size, size)
        pairs[f"patch_embed{number}.norm"] = (width,)
    for stage, (width, size) in enumerate(zip(DIMS, (4, 2), strict=True), start=1):
        pairs[f"stage{stage}_output_decode"] = (DIM, width, size, size)
        for i in range(2):
            key = f"blocks{stage}.{i}."
            pairs |= {f"{key}norm{n}": (width,) for n in (1, 2)}
            pairs |= {f"{key}conv{n}": (width, width, 1, 1) for n in (1, 2)}
            pairs[f"{key}attn"] = (width, 1, 5, 5)
            pairs[f"{key}mlp.fc1"] = (4 * width, width, 1, 1)
            pairs[f"{key}mlp.fc2"] = (width, 4 * width, 1, 1)
    for prefix, width, depth in (("blocks3.", DIM, DEPTH), ("decoder_blocks.", DEC, DEC_DEPTH)):
        for i in range(depth):
            own = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width)}
            own |= {"attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
            own |= {"mlp.fc2": (width, 4 * width)}
            pairs |= {f"{prefix}{i}.{name}": shape for name, shape in own.items()}
    pairs |= {"decoder_embed": (DEC, DIM), "decoder_norm": (DEC,)}
    pairs["decoder_pred"] = (PATCH**2 * 3, DEC)
    for key, shape in pairs.items():
        shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    shapes |= {"pos_embed": (1, N, DIM), "decoder_pos_embed": (1, N, DEC)}
    shapes["mask_token"] = (1, 1, DEC)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        state[key] = value + 1 if key.endswith(".weight") and len(shape) == 1 else value
    return state


def images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, IMG, IMG, generator=generator, dtype=torch.float64)


def mask_of(ids_mask: Tensor) -> Tensor:
    return torch.zeros(len(ids_mask), N, dtype=torch.float64).scatter(1, ids_mask.long(), 1.0)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float(((value.detach().double() - expected.detach()) / expected.detach()).abs())


def leaves(state: State) -> State:
    return {
        key: value.clone().requires_grad_("pos_embed" not in key) for key, value in state.items()
    }


def gradients(model: CMAE) -> State:
    """Gradients of the encoder and pixel decoder under the public names, in their shapes."""
    twin = CMAE(model.config).double()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, parameter in twin.named_parameters():
            grad = own[name].grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    return to_convmae(twin)


def check_gradients(model: CMAE, oracle: State, tolerance: float) -> None:
    found = gradients(model)
    compared = 0
    for key, leaf in oracle.items():
        if leaf.requires_grad:
            assert leaf.grad is not None, key
            error = (found[key].double() - leaf.grad).norm() / leaf.grad.norm()
            assert error <= tolerance, (key, float(error))
            compared += 1
    assert compared == len(found) - 2  # all but the position embeddings


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_imported_model_has_the_originals_loss_and_gradients(
    dtype: torch.dtype, tolerance: float, norm_pix: bool
) -> None:
    state = convmae_state()
    stored = {"model": {key: value.to(dtype) for key, value in state.items()}}
    model = from_convmae(stored, norm_pix_loss=norm_pix, **OVERRIDES)
    ids_keep, ids_mask = draw_mask(model.config, torch.arange(BATCH), seed=3, epoch=0)
    assert ids_keep.shape == (BATCH, 4)
    losses = model(images(1).to(dtype), None, ids_keep)
    losses.total.backward()
    oracle, mask = leaves(state), mask_of(ids_mask)
    pred = decode(oracle, encode(oracle, images(1), mask), mask)
    expected = pixel_loss(pred, images(1), mask, PATCH, norm_pix)
    expected.backward()
    assert relative_error(losses.total, expected) <= tolerance
    check_gradients(model, oracle, tolerance)


def test_the_contrastive_objective_is_that_of_the_method_without_a_cls_token() -> None:
    """Both losses of a hybrid CMAE, its heads and feature decoder written out here."""
    base = from_convmae(convmae_state(), **OVERRIDES).config
    config = replace(
        base, contrastive_loss="info_nce", mask_ratio=0.5, proj_hidden_dim=24, proj_dim=12
    )
    config = replace(config, feature_decoder_depth=1)
    model = build_model(config, seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    assert model.target_encoder is not None
    ids_keep, ids_mask = draw_mask(config, torch.arange(BATCH), seed=3, epoch=0)
    online, target, mask = images(1), images(2), mask_of(ids_mask)
    losses = model(online, target, ids_keep)
    losses.total.backward()

    own = {key: value.detach().clone() for key, value in model.state_dict().items()}
    oracle = leaves(to_convmae(model))
    latent = encode(oracle, online, mask)
    pixel = pixel_loss(decode(oracle, latent, mask), online, mask, PATCH)
    feature = {  # the feature decoder, under the names of a pixel decoder
        f"decoder_{name}": value
        for key, value in own.items()
        if (name := key.removeprefix("feature_decoder.")) != key
    }
    feature |= {"mask_token": feature["decoder_mask_token"]}
    feature |= {
        f"decoder_pred.{kind}": feature[f"decoder_head.{kind}"] for kind in ("weight", "bias")
    }
    heads = {
        key.replace(".fc1", ".fc0").replace(".norm", ".bn0").replace(".fc2", ".fc1"): value
        for key, value in own.items()
        if "projector" in key or "predictor" in key
    }
    query = mlp_head(
        heads, "predictor", mlp_head(heads, "projector", decode(feature, latent, mask).mean(1))
    )
    whole = encode(to_convmae(model, branch="target"), target, torch.zeros_like(mask))
    contrast = info_nce(query, mlp_head(heads, "target_projector", whole.mean(1)))
    total = pixel + 2 * 0.07 * contrast
    total.backward()
    torch.testing.assert_close(losses.reconstruction, pixel.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(losses.contrastive_raw, contrast.detach(), rtol=1e-9, atol=0)
    check_gradients(model, oracle, 1e-8)


@pytest.mark.parametrize("fuse", [True, False])
def test_masked_pixels_reach_neither_values_nor_gradients_of_visible_features(fuse: bool) -> None:
    model = from_convmae(convmae_state(), **OVERRIDES)
    if not fuse:
        model.encoder.drop_features()
    ids_keep, ids_mask = draw_mask(model.config, torch.arange(BATCH), seed=3, epoch=0)
    pixels = images(1).requires_grad_()
    tokens = model.encoder(pixels, ids_keep)
    tokens.pow(2).sum().backward()
    seen = mask_of(ids_mask).view(BATCH, 1, GRID, 1, GRID, 1) == 0
    assert pixels.grad is not None
    touched = pixels.grad.view(BATCH, 3, GRID, PATCH, GRID, PATCH) != 0
    assert touched[seen.expand_as(touched)].all()
    assert not touched[~seen.expand_as(touched)].any()
    filled = torch.where(
        seen.expand_as(touched),
        pixels.detach().view_as(touched),
        torch.full((), torch.nan).double(),
    )
    assert torch.equal(model.encoder(filled.view_as(pixels), ids_keep), tokens)


def test_a_model_goes_out_and_comes_back_unchanged() -> None:
    state = convmae_state()
    again = to_convmae(from_convmae(state, **OVERRIDES))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_sizes_are_read_from_the_weights_and_heads_are_the_published_ones() -> None:
    config = from_convmae(convmae_state(), **OVERRIDES).config
    assert (config.encoder, config.img_size, config.embed_dim, config.depth) == (
        "hybrid",
        64,
        48,
        2,
    )
    assert (config.decoder_embed_dim, config.decoder_depth, config.mlp_ratio) == (16, 2, 4.0)
    assert published_heads(768, 11) == 12


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("blocks1.1.conv2.bias"), r"blocks1\.1\.conv2\.bias"),
        (lambda s: s.update({"blocks2.2.attn.bias": torch.ones(3)}), r"blocks2\.2\.attn\.bias"),
        (lambda s: s.pop("pos_embed"), "pos_embed"),
        (lambda s: s.update({"mask_token": torch.ones(1, 1, 3)}), "mask_token"),
    ],
)
def test_a_key_that_does_not_fit_is_named(change: Any, named: str) -> None:
    state = convmae_state()
    change(state)
    with pytest.raises(CmaeError, match=named):
        from_convmae(state, **OVERRIDES)


class TestFiles:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        path = tmp_path / "convmae.pth"
        torch.save({"model": {k: v.float() for k, v in convmae_state().items()}}, path)
        return path

    def test_a_file_is_imported_and_exported_without_loss(
        self, weights: Path, tmp_path: Path
    ) -> None:
        ours, out = tmp_path / "ours.pt", tmp_path / "again.safetensors"
        heads = ["--num_heads", "3", "--decoder_num_heads", "2"]
        assert main(["import", str(weights), str(ours), "--layout", "convmae", *heads]) == 0
        assert main(["export", str(ours), str(out), "--to", "convmae"]) == 0
        pixels = images(1).float()
        expected = load_model(ours).features(pixels)
        torch.testing.assert_close(load_model(out).features(pixels), expected)
        assert "ConvMAE" in out.with_name(f"{out.name}.md").read_text() or out.exists()
        u8 = torch.randint(0, 256, (2, IMG, IMG, 3), dtype=torch.uint8)
        found = load_encoder(str(out))(u8)
        assert set(found) == {("mean", 1)}
        torch.testing.assert_close(
            found["mean", 1], load_model(ours).features(u8), rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("to", ["torch_export", "onnx"])
    def test_programs_are_exported_and_checked(
        self, weights: Path, tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        if to == "onnx":
            pytest.importorskip("onnxscript")
            pytest.importorskip("onnxruntime")
        ours, out = tmp_path / "ours.pt", tmp_path / ("x.pt2" if to == "torch_export" else "x.onnx")
        heads = ["--num_heads", "3", "--decoder_num_heads", "2"]
        assert main(["import", str(weights), str(ours), "--layout", "convmae", *heads]) == 0
        assert main(["export", str(ours), str(out), "--to", to]) == 0
        assert "checked: differs by" in capsys.readouterr().err

    def test_an_encoder_alone_gives_features_and_says_that_it_cannot_be_pretrained(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = {k: v.float() for k, v in convmae_state().items()}
        alone = {k: v for k, v in whole.items() if "decode" not in k and k != "mask_token"}
        torch.save(alone, tmp_path / "alone.pth")
        model = from_convmae(alone, num_heads=HEADS)
        assert model.pixel_decoder is None
        mean = model.features(images(1).float())
        expected = from_convmae(whole, **OVERRIDES)
        expected.encoder.drop_features()
        torch.testing.assert_close(mean, expected.features(images(1).float()))
        words = [
            "import",
            str(tmp_path / "alone.pth"),
            str(tmp_path / "x.pt"),
            "--layout",
            "convmae",
        ]
        assert main([*words, "--num_heads", "3"]) == 1
        assert "an encoder without decoder" in capsys.readouterr().err

    def test_a_hybrid_has_no_timm_names_and_a_vit_none_of_convmae(self, tmp_path: Path) -> None:
        vit = build_model(replace(from_convmae(convmae_state(), **OVERRIDES).config, encoder="vit"))
        with pytest.raises(CmaeError, match="to_timm"):
            to_convmae(vit)
        path = tmp_path / "hybrid.pt"
        save_model(from_convmae(convmae_state(), **OVERRIDES).float(), path)
        assert main(["export", str(path), str(tmp_path / "x.pth")]) == 1


def hybrid_encoder(**options: Any) -> Encoder:
    state = {key: value.float() for key, value in convmae_state().items()}
    return from_model(from_convmae(state, **OVERRIDES), name="hybrid", **options)


class TestFinetuning:
    def test_tokens_are_those_of_the_public_fine_tuning_network(self) -> None:
        """No stage features, mean of all tokens, a norm of the head's own."""
        model = Classifier(hybrid_encoder(), 7).double()
        sd = convmae_state()
        for number in (1, 2):
            for kind in ("weight", "bias"):
                sd[f"stage{number}_output_decode.{kind}"].zero_()
        del sd["norm.weight"]
        pooled = encode(sd, images(1), torch.zeros(BATCH, N)).mean(1)
        torch.testing.assert_close(
            model(images(1)), model.fc(model.norm(pooled)), rtol=1e-5, atol=1e-9
        )

    def test_layer_decay_puts_the_stages_with_the_embeddings(self) -> None:
        """The public `lr_decay.py`: patch_embed*, pos_embed, blocks1, blocks2 at 0, blocks3.i at i + 1."""
        model = Classifier(hybrid_encoder(), 7)
        names = {id(p): name for name, p in model.named_parameters()}
        assert not any("fuse" in name for name in names.values())
        groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
        found = {
            names[id(p)]: (group["lr_scale"], group["weight_decay"])
            for group in groups
            for p in group["params"]
        }
        assert found.keys() == set(names.values())
        for name, expected in {
            "encoder.vit.pos_embed": (0.125, 0.0),
            "encoder.vit.patch_embed.proj.weight": (0.125, 0.05),
            "encoder.vit.stages.1.0.depthwise.weight": (0.125, 0.05),
            "encoder.vit.merge.1.weight": (0.125, 0.05),
            "encoder.vit.embed.weight": (0.125, 0.05),
            "encoder.vit.embed_norm.2.weight": (0.125, 0.0),
            "encoder.vit.blocks.1.mlp.fc1.weight": (0.5, 0.05),
            "norm.weight": (1.0, 0.0),
            "fc.weight": (1.0, 0.05),
        }.items():
            assert found[name] == expected, name
        assert layer_of("encoder.vit.norm.weight", 2) == 3

    def test_stochastic_depth_grows_over_all_blocks(self) -> None:
        vit: Any = hybrid_encoder(drop_path_rate=0.5).vit
        conv_rates = [getattr(b.drop_path, "drop_prob", 0.0) for s in vit.stages for b in s]
        rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in vit.blocks]
        assert [*conv_rates, *rates] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])

    def test_another_image_size_interpolates_positions(self) -> None:
        encoder = hybrid_encoder(img_size=96)
        assert encoder.img_size == 96
        small = hybrid_encoder()
        table: Any = small.vit.pos_embed
        square = table.reshape(1, GRID, GRID, DIM).permute(0, 3, 1, 2)
        expected = F.interpolate(square, size=(6, 6), mode="bicubic", align_corners=False)
        torch.testing.assert_close(
            encoder.vit.pos_embed, expected.permute(0, 2, 3, 1).flatten(1, 2)
        )
        assert encoder(torch.zeros(2, 96, 96, 3, dtype=torch.uint8))["mean", 1].shape == (2, DIM)
