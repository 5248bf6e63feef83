"""Settings of older versions: renamed, dropped, or refused, wherever they stand."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from cmae.errors import CmaeError
from cmae.train.config import Config
from cmae.train.config_parser import load_recipe, parse_config
from cmae.train.old_keys import OLD_KEYS, Dropped, Moved, update_keys


def current_keys(section: Any, prefix: str = "") -> set[str]:
    found = set()
    for field in fields(section):
        value = getattr(section, field.name)
        key = f"{prefix}{field.name}"
        found |= current_keys(value, f"{key}.") if is_dataclass(value) else {key}
    return found


def harmless(key: str) -> Any:
    old = OLD_KEYS[key]
    if isinstance(old, Dropped):
        return 1 if old.only is None else old.only[0]
    default: Any = Config()
    for name in old.to.split("."):
        default = getattr(default, name)
    return default


def test_old_keys_are_gone_and_new_ones_are_there() -> None:
    keys = current_keys(Config())
    assert not keys & OLD_KEYS.keys()
    assert {old.to for old in OLD_KEYS.values() if isinstance(old, Moved)} <= keys


@pytest.mark.parametrize("key", OLD_KEYS)
def test_a_recipe_with_an_old_key_loads_with_one_warning(tmp_path: Path, key: str) -> None:
    *sections, name = key.split(".")
    value = harmless(key)
    text = "null" if value is None else str(value)
    (tmp_path / "old.yaml").write_text(
        "".join(f"{section}: {{" for section in sections) + f"{name}: {text}" + "}" * len(sections)
    )
    with pytest.warns(UserWarning, match=key) as caught:
        assert load_recipe(tmp_path / "old.yaml") == Config()
    assert len(caught) == 1


@pytest.mark.parametrize("key", OLD_KEYS)
def test_an_old_key_on_the_command_line_loads_with_one_warning(key: str) -> None:
    value = harmless(key)
    with pytest.warns(UserWarning, match=key) as caught:
        assert parse_config([f"--{key}", "null" if value is None else str(value)]) == Config()
    assert len(caught) == 1


def test_a_moved_key_sets_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("model: {mask_cell: 1}\n")
    with pytest.warns(UserWarning, match="model.mask_cell is model.mask_unit now"):
        assert load_recipe(tmp_path / "old.yaml").model.mask_unit == 1
    with pytest.warns(UserWarning, match="mask_cell"):
        assert parse_config(["--model.mask_cell", "1"]).model.mask_unit == 1


def test_what_changed_results_is_refused() -> None:
    with pytest.raises(CmaeError, match="warmup starts from 1e-4"):
        parse_config(["--optim.warmup_start", "0.1"])


def test_a_stored_configuration_comes_in_the_names_of_today() -> None:
    stored = {"model": {"mask_cell": 2, "depth": 3}, "optim": {"min_lr": 0.5, "epochs": 2}}
    updated = update_keys(stored)
    assert updated.settings == {
        "model": {"mask_unit": 2, "depth": 3},
        "optim": {"min_lr": 0.5, "epochs": 2},
    }
    assert updated.notes == ["model.mask_cell is model.mask_unit now"]
    assert "optim.min_lr=0.5" in updated.refused[0]
    assert stored["model"] == {"mask_cell": 2, "depth": 3}


def test_a_new_key_wins_over_its_old_one() -> None:
    both = {"model": {"mask_cell": 1, "mask_unit": 2}}
    assert update_keys(both).settings == {"model": {"mask_unit": 2}}
