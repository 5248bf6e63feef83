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

from cmae.model import ModelConfig, build_model, load_model
from cmae.train.commands.main import main
from cmae.train.loop.weights import save_model

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
