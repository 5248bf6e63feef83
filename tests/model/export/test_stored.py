"""A trained model from a run's folder, a checkpoint or an exported file: the same features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_runs import SMALL

from cmae.model import CMAE, build_model, load_model, to_timm
from cmae.model.export.stored import CheckpointError, load_checkpoint
from cmae.train.loop.weights import save_model


@pytest.fixture(scope="module")
def model() -> CMAE:
    return build_model(SMALL, seed=0).eval()


@pytest.fixture
def run_folder(model: CMAE, tmp_path: Path) -> Path:
    """A run with two checkpoints, of which the newer holds `model`."""
    save_model(build_model(SMALL, seed=1), tmp_path / "checkpoints" / "step-00000009.pt")
    save_model(model, tmp_path / "checkpoints" / "step-00000010.pt")
    return tmp_path


def images(num: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 32, 32, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000010.pt"])
def test_a_run_its_folder_and_its_newest_checkpoint_give_the_same_features(
    model: CMAE, run_folder: Path, place: str
) -> None:
    loaded = load_model(run_folder / place)
    assert not loaded.training
    assert loaded.config == SMALL
    features = loaded.features(images())
    assert (features.shape, features.dtype) == ((2, SMALL.embed_dim), torch.float32)
    assert torch.equal(features, model.features(images()))


def test_an_exported_encoder_gives_the_features_of_its_model(tmp_path: Path) -> None:
    model = build_model(replace(SMALL, embed_dim=64, num_heads=1), seed=0).eval()
    out = tmp_path / "encoder.pth"
    torch.save(to_timm(model), out)
    loaded = load_model(out)
    assert loaded.target_encoder is None
    torch.testing.assert_close(loaded.features(images()), model.features(images()))


@pytest.mark.parametrize("place", ["nothing-here", "checkpoints/nothing.pt"])
def test_a_missing_place_is_named(run_folder: Path, place: str) -> None:
    with pytest.raises(CheckpointError, match=place):
        load_model(run_folder / place)


def test_a_folder_without_checkpoints_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match=r"no checkpoint.*metrics\.jsonl"):
        load_model(tmp_path)


def test_fields_of_older_versions_are_read_when_they_mean_the_same(
    run_folder: Path, tmp_path: Path
) -> None:
    path = run_folder / "checkpoints" / "step-00000010.pt"
    state = load_checkpoint(path)
    stored = state["config"]["model"]
    stored["mask_cell"] = stored.pop("mask_unit")
    stored |= {"conv_depth": 2, "feature_dim": None}
    torch.save(state, tmp_path / "old.pt")
    assert load_model(tmp_path / "old.pt").config == SMALL
    stored["conv_depth"] = 3
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="conv_depth=3"):
        load_model(tmp_path / "other.pt")
