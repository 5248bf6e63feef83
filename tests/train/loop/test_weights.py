"""`cmae import`, `cmae export`, `cmae reconstruct`: weights in, weights out, an image grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from cmae.model import CMAE, ModelConfig, build_model, load_model, to_timm
from cmae.model.export.stored import CheckpointError
from cmae.train.commands.main import main
from cmae.train.loop.weights import load_initial_weights, save_model

# The encoder of timm's vit_tiny_patch16_224, which is small enough for a test.
TINY = ModelConfig(
    embed_dim=192,
    num_heads=3,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=2,
    feature_decoder_depth=1,
    proj_hidden_dim=16,
    proj_dim=8,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    save_model(build_model(TINY, seed=0), path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_export_loads_strictly_into_timm_with_the_same_features(
    checkpoint: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"encoder{suffix}"
    assert main(["export", str(checkpoint), str(out)]) == 0
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    state = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    network.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = network.eval().forward_features(images)[:, 1:].mean(1)
    torch.testing.assert_close(
        load_model(checkpoint).features(images), expected, rtol=1e-4, atol=1e-5
    )


def test_mae_weights_go_through_import(tmp_path: Path) -> None:
    config = replace(
        TINY, contrastive_loss="none", mask_ratio=0.75, mask_unit=1, pos_embed_order="column"
    )
    model = build_model(config, seed=1)
    foreign = dict(model.encoder.state_dict())
    for name, value in model.pixel_decoder.state_dict().items():
        foreign[MAE_DECODER.get(name.split(".")[0], name.split(".")[0]) + rest(name)] = value
    torch.save({"model": foreign}, tmp_path / "mae.pth")
    out = tmp_path / "imported.pt"
    code = main(["import", str(tmp_path / "mae.pth"), str(out), "--layout", "mae"])
    assert code == 0
    imported = load_model(out)
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(imported.encoder.state_dict()[name], value), name


MAE_DECODER = {
    "embed": "decoder_embed",
    "pos_embed": "decoder_pos_embed",
    "blocks": "decoder_blocks",
    "norm": "decoder_norm",
    "head": "decoder_pred",
}


def rest(name: str) -> str:
    return name[len(name.split(".")[0]) :]


def test_a_wrong_layout_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import", str(checkpoint), str(tmp_path / "out.pt")]) == 1
    error = capsys.readouterr().err
    assert "layout='authors'" in error
    assert "Traceback" not in error


def test_a_file_with_other_objects_asks_for_trust(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.pth"
    torch.save({"state_dict": {}, "log": Path("x")}, path)
    assert main(["import", str(path), str(tmp_path / "out.pt")]) == 1
    assert "--trust true" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not weights"])
def test_import_names_a_file_that_torch_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    assert main(["import", str(path), str(tmp_path / "out.pt")]) == 1
    error = capsys.readouterr().err
    assert "broken.pth cannot be read" in error
    assert "Traceback" not in error


def test_reconstruct_names_a_file_that_is_no_image(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "note.jpg"
    path.write_text("hello")
    assert main(["reconstruct", str(checkpoint), str(path)]) == 1
    assert "note.jpg" in capsys.readouterr().err


def test_reconstruct_draws_several_files(checkpoint: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (50, 80, 3), dtype=np.uint8)).save(path)
    out = tmp_path / "grid.png"
    assert main(["reconstruct", str(checkpoint), *map(str, paths), "--out", str(out)]) == 0
    with Image.open(out) as grid:  # three columns, and one row for each file
        assert 3 * 224 < grid.width < 4 * 224
        assert 2 * 224 < grid.height < 3 * 224


# ---- weights that a run starts from ---------------------------------------------------------------

SMALL = replace(TINY, img_size=64, patch_size=16, embed_dim=48, num_heads=3, depth=2, mask_unit=1)


def start_from(state: dict, path: Path, config: ModelConfig = SMALL) -> tuple[CMAE, str]:
    torch.save(state, path)
    model = build_model(config, seed=9)
    return model, load_initial_weights(model, path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_heads": 4}, "num_heads"),
        ({"depth": 1}, "depth"),
        ({"pos_embed_order": "column"}, "pos_embed_order"),
        ({"patch_size": 32}, "patch_size"),
        ({"decoder_num_heads": 4}, "decoder_num_heads"),
        ({"head_norm": "layer"}, "head_norm"),
        ({"pixel_std": (1.0, 1.0, 1.0)}, "pixel_std"),
    ],
)
def test_weights_of_another_function_are_refused_by_the_fields(
    tmp_path: Path, changes: dict, field: str
) -> None:
    save_model(build_model(replace(SMALL, **changes), seed=0), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=rf"model\.{field} is .* there, .* here \(--model"):
        load_initial_weights(build_model(SMALL, seed=1), tmp_path / "other.pt")


def test_losses_masks_and_the_size_of_the_image_may_differ(tmp_path: Path) -> None:
    source = build_model(replace(SMALL, mask_ratio=0.5, temperature=0.2, momentum=0.9), seed=0)
    save_model(source, tmp_path / "source.pt")
    model = build_model(replace(SMALL, img_size=96), seed=1)
    load_initial_weights(model, tmp_path / "source.pt")
    fresh = build_model(replace(SMALL, img_size=96), seed=2).state_dict()
    for name, value in model.state_dict().items():
        expected = fresh[name] if name.endswith("pos_embed") else source.state_dict()[name]
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("wrapped", ["plain", "timm", "ddp", "compiled", "lightning", "nested"])
def test_an_encoder_alone_starts_a_run(tmp_path: Path, wrapped: str) -> None:
    source = build_model(SMALL, seed=0)
    encoder = dict(to_timm(source))
    state = {
        "plain": encoder,
        "timm": encoder | {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)},
        "ddp": {"model": {f"module.{name}": value for name, value in encoder.items()}},
        "compiled": {f"module._orig_mod.{name}": value for name, value in encoder.items()},
        "lightning": {"state_dict": {f"model.{name}": value for name, value in encoder.items()}},
        "nested": {
            "state_dict": {
                f"module.model.{name.replace('blocks.', '_orig_mod.blocks.')}": value
                for name, value in encoder.items()
            }
        },
    }[wrapped]
    model, words = start_from(state, tmp_path / "encoder.pth")
    for name, value in encoder.items():
        assert torch.equal(model.encoder.state_dict()[name], value), name
        if name != "norm.weight" and name in model.target_encoder.state_dict():
            assert torch.equal(model.target_encoder.state_dict()[name], value), name
    assert "freshly initialised: feature_decoder, pixel_decoder, predictor, projector" in words
    assert "number of heads is not in the file: 3" in words
    assert ("not used: head.bias, head.weight" in words) == (wrapped == "timm")


def test_an_encoder_of_mae_has_the_other_order_of_positions(tmp_path: Path) -> None:
    source = build_model(replace(SMALL, pos_embed_order="column"), seed=0)
    with pytest.raises(CheckpointError, match="pos_embed_order is column there, row here"):
        start_from(dict(to_timm(source)), tmp_path / "mae.pth")
    model, _ = start_from(
        dict(to_timm(source)), tmp_path / "mae.pth", replace(SMALL, pos_embed_order="column")
    )
    assert torch.equal(model.encoder.cls_token, source.encoder.cls_token)


def test_learned_positions_are_refused(tmp_path: Path) -> None:
    encoder = dict(to_timm(build_model(SMALL, seed=0)))
    encoder["pos_embed"] = torch.randn_like(encoder["pos_embed"])
    with pytest.raises(CheckpointError, match=r"encoder\.pos_embed is not the fixed sine-cosine"):
        start_from(encoder, tmp_path / "learned.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = build_model(SMALL, seed=0)
    model.encoder.blocks[1].mlp.fc1.weight.data[0, :2] = value
    save_model(model, tmp_path / "broken.pt")
    named = r"encoder\.blocks\.1\.mlp\.fc1\.weight \(2 of \d+ values\)"
    with pytest.raises(CheckpointError, match=named):
        load_initial_weights(build_model(SMALL, seed=1), tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.weight \(2 of"):
        to_timm(model)


def test_import_says_that_it_guesses_heads_and_takes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        TINY, contrastive_loss="none", mask_ratio=0.75, mask_unit=1, pos_embed_order="column"
    )
    model = build_model(config, seed=1)
    foreign = dict(model.encoder.state_dict())
    for name, value in model.pixel_decoder.state_dict().items():
        foreign[MAE_DECODER.get(name.split(".")[0], name.split(".")[0]) + rest(name)] = value
    torch.save(foreign, tmp_path / "mae.pth")
    words = ["import", str(tmp_path / "mae.pth"), str(tmp_path / "out.pt"), "--layout", "mae"]
    assert main(words) == 0
    assert "num_heads: 3, as in the published models; the file does not say" in (
        capsys.readouterr().err
    )
    assert main([*words, "--num_heads", "12", "--decoder_num_heads", "4"]) == 0
    assert "the file does not say" not in capsys.readouterr().err
    imported = load_model(tmp_path / "out.pt").config
    assert (imported.num_heads, imported.decoder_num_heads) == (12, 4)


def test_a_pickle_is_refused_without_the_advice_to_trust_it(tmp_path: Path) -> None:
    torch.save({"state": Path("x")}, tmp_path / "pickle.pt")
    with pytest.raises(CheckpointError) as caught:
        load_initial_weights(build_model(SMALL, seed=1), tmp_path / "pickle.pt")
    assert "weights_only" not in str(caught.value)
    assert "it holds more than tensors" in str(caught.value)
