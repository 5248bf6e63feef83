"""Models by name: the recipes' own, built by one call; names that are loaded when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cmae.model import PRESETS, create_model
from cmae.train.config_parser import load_recipe, recipe_names

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_model_of_the_recipe_of_its_name(name: str) -> None:
    assert load_recipe(name).model == PRESETS[name]


def test_every_recipe_but_those_of_small_data_sets_has_a_preset() -> None:
    assert set(recipe_names()) - {"demo", "tiny_imagenet", "imagenette_vit_s"} == set(PRESETS)


def test_fields_override_a_preset_and_a_seed_fixes_the_weights() -> None:
    first, second = (create_model("cmae_vit_b", seed=3, **TINY) for _ in range(2))
    assert (first.config.depth, first.config.mask_ratio) == (1, 0.65)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_an_unknown_name_is_refused_with_the_nearest_and_all_others() -> None:
    with pytest.raises(ValueError, match="did you mean 'cmae_vit_b'") as caught:
        create_model("cmae_vitb")
    assert all(name in str(caught.value) for name in PRESETS)


@pytest.mark.parametrize("code", ["import cmae.model", "from cmae.model import ModelConfig"])
def test_a_configuration_needs_no_torch(code: str) -> None:
    check = f"import sys\n{code}\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
