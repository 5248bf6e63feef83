"""Exports for others compute what ours computes, and their cards say where they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import SMALL, run

from cmae.model import build_model, draw_mask, load_model
from cmae.model.pixels import renormalisation
from cmae.train.commands.main import main
from cmae.train.loop.weights import save_model

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with constants of their own, which the export has to fold in."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    config = replace(SMALL, pixel_mean=(128.0, 120.0, 110.0), pixel_std=(60.0, 50.0, 70.0))
    save_model(build_model(config, seed=0), path)
    return path


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 32, 32, 3), generator=generator, dtype=torch.uint8)


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() - mean) / std


def tokens_of(checkpoint: Path, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(checkpoint).encoder(images)


def test_vit_model_has_our_tokens(checkpoint: Path, images: torch.Tensor, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(checkpoint), str(tmp_path / "vit"), "--to", "huggingface"]) == 0
    model, info = transformers.ViTModel.from_pretrained(
        tmp_path / "vit", add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "vit")
    pixels = processor(list(images.permute(0, 3, 1, 2)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, normalised(images), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found = model.eval()(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, tokens_of(checkpoint, images), rtol=1e-3, atol=1e-4)


def test_vit_mae_has_our_predictions_and_loss(
    checkpoint: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "mae"
    assert main(["export", str(checkpoint), str(out), "--to", "huggingface_mae"]) == 0
    model, info = transformers.ViTMAEForPreTraining.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = load_model(checkpoint)
    config = replace(ours.config, mask_unit=1)
    ids_keep, _ = draw_mask(config, torch.arange(3), seed=0, epoch=0)
    # Its masks keep the smallest of random numbers.
    noise = torch.ones(3, config.num_patches)
    order = torch.arange(ids_keep.shape[1]) / 1000
    noise.scatter_(1, ids_keep.long(), order.expand(3, -1))
    with torch.no_grad():
        found = model.eval()(pixel_values=normalised(images), noise=noise)
        expected = ours.reconstruct(images, ids_keep)
    masked = found.mask.bool()
    torch.testing.assert_close(found.logits[masked], expected[masked], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["online", "target"])
def test_onnx_has_our_tokens(
    branch: str, checkpoint: Path, images: torch.Tensor, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    out = tmp_path / "x.onnx"
    words = ["export", str(checkpoint), str(out), "--to", "onnx", "--branch", branch]
    assert main(words) == 0
    assert "checked: differs by" in capsys.readouterr().err
    session = runtime.InferenceSession(str(out))
    found = torch.from_numpy(session.run(None, {"images": normalised(images).numpy()})[0])
    if branch == "online":
        torch.testing.assert_close(found, tokens_of(checkpoint, images), rtol=1e-3, atol=1e-4)


def test_a_program_of_torch_has_our_tokens(
    checkpoint: Path, images: torch.Tensor, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "x.pt2"
    assert main(["export", str(checkpoint), str(out), "--to", "torch_export"]) == 0
    assert "checked: differs by" in capsys.readouterr().err
    found = torch.export.load(out).module()(normalised(images))
    torch.testing.assert_close(found, tokens_of(checkpoint, images), rtol=1e-3, atol=1e-4)


def test_constants_of_a_model_are_folded_into_its_patches(checkpoint: Path) -> None:
    scale, shift = renormalisation(load_model(checkpoint).config)
    assert max(abs(1 - value) for value in scale) > 0.05
    assert max(abs(value) for value in shift) > 0.01


def test_a_card_says_what_it_was_trained_on_and_what_it_reached(
    small_shards: str, tmp_path: Path
) -> None:
    run(small_shards, tmp_path / "run", **{"optim.total_steps": 2})
    words = ["--train", small_shards, "--val", small_shards, "--cache", "null"]
    assert main(["evaluate", "knn", str(tmp_path / "run"), *words, "--k", "1"]) == 0
    out = tmp_path / "encoder.safetensors"
    assert main(["export", str(tmp_path / "run"), str(out)]) == 0
    card = (tmp_path / "encoder.safetensors.md").read_text()
    assert "2 steps of 8 images, seed 0" in card
    assert small_shards in card
    assert "- knn: 100.00% top-1" in card
    assert "lr_per_256: 0.01" in card
    weights_alone = tmp_path / "alone.pt"
    save_model(build_model(SMALL, seed=0), weights_alone)
    assert main(["export", str(weights_alone), str(tmp_path / "b.pth")]) == 0
    assert "nothing is known of its training" in (tmp_path / "b.pth.md").read_text()


@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("onnx", "x.bin", "has the suffix .onnx"),
        ("torch_export", "x.bin", "has the suffix .pt2"),
        ("huggingface", "file", "is a file; a folder is written"),
    ],
)
def test_a_place_that_does_not_fit_is_refused(
    to: str, name: str, message: str, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "file").touch()
    assert main(["export", str(checkpoint), str(tmp_path / name), "--to", to]) == 1
    assert message in capsys.readouterr().err


def test_a_target_without_final_norm_is_no_vit_model(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    words: list[Any] = ["export", str(checkpoint), str(tmp_path / "x"), "--branch", "target"]
    assert main([*words, "--to", "huggingface"]) == 1
    assert "has no final norm" in capsys.readouterr().err
