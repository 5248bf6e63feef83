"""Recipes, overrides, and the errors of a wrong configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cmae.errors import CmaeError
from cmae.model import ModelConfig
from cmae.train.commands.main import main
from cmae.train.config import BatchSplit, Config
from cmae.train.config_parser import (
    RECIPES,
    Parser,
    add_config,
    load_recipe,
    parse_config,
    recipe_names,
)
from cmae.train.monitor.run_log import write_config


def parse(*arguments: str) -> Config:
    return parse_config(arguments)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["pretrain", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_says_command_hardware_and_expectation(name: str) -> None:
    config = parse("--recipe", name)
    assert config.data.views.img_size == config.model.img_size
    head = (RECIPES / f"{name}.yaml").read_text()
    assert all(word in head for word in ("command", "hardware", "expected"))


def test_the_authors_recipe_is_the_default_of_the_base_model() -> None:
    config = parse("--recipe", "cmae_vit_b")
    assert config.model == ModelConfig()
    assert (config.model.num_keep, config.model.num_mask) == (68, 128)
    assert (config.data.views.online_shift, config.data.views.target_shift) == (0, 31)
    assert (config.optim.global_batch_size, config.optim.lr_per_256) == (4096, 1.5e-4)


def test_the_paper_recipe_differs_where_the_paper_does() -> None:
    config = parse("--recipe", "cmae_vit_b_paper")
    assert not config.model.two_tau_factor
    assert (config.data.views.online_shift, config.data.views.target_shift) == (30, 30)
    assert (config.model.mask_unit, config.model.num_keep) == (1, 49)


def test_mae_recipe_has_one_view_and_no_target() -> None:
    config = parse("--recipe", "mae_vit_l")
    assert (config.data.views.num_views, config.data.views.source_crop_size) == (1, 224)
    assert not config.model.has_contrast
    assert (config.model.num_keep, config.model.num_mask) == (49, 147)


ABLATIONS = [
    ("model.contrastive_loss", "none"),
    ("model.reconstruction_weight", "0"),
    ("data.views.online_shift", "31"),
    ("data.views.target_shift", "0"),
    ("data.views.target_crop", "random_resized"),
    ("data.views.color", "none"),
    ("model.contrastive_loss", "byol"),
    ("model.target_input", "visible"),
    ("model.feature_decoder", "shared"),
    ("model.feature_decoder_depth", "8"),
    ("model.feature_decoder", "none"),
    ("model.contrastive_weight", "0.5"),
    ("model.two_tau_factor", "false"),
    ("model.temperature", "0.2"),
    ("model.mask_ratio", "0.75"),
    ("model.mask_unit", "1"),
    ("model.target_final_norm", "true"),
    ("model.momentum", "0.99"),
    ("model.momentum_schedule", "cosine"),
    ("model.encoder", "hybrid"),
    ("model.embed_dim", "1536"),
]


@pytest.mark.parametrize(("key", "value"), ABLATIONS)
def test_every_ablation_is_one_override(key: str, value: str) -> None:
    config = parse("--recipe", "cmae_vit_b", f"--{key}", value)
    found = config
    for name in key.split("."):
        found = getattr(found, name)
    assert str(found).lower() == value.lower() or float(found) == float(value)


def test_a_written_config_reads_back_the_same(tmp_path: Path) -> None:
    config = parse("--recipe", "cmae_vit_s", "--model.img_size", "96", "--data.shards", "[a, b]")
    write_config(config, tmp_path / "config.yaml")
    assert parse("--recipe", str(tmp_path / "config.yaml")) == config


def test_an_unknown_key_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'model.temperature'" in failure(capsys, "--model.temprature", "0.1")
    assert "'optim.global_batch_size'" in failure(capsys, "--optim.batch_size", "8")


def test_an_unknown_key_in_a_file_names_the_nearest_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("optim: {weight_decai: 0.1}\n")
    assert "'optim.weight_decay'" in failure(capsys, "--recipe", str(recipe))


def test_an_unknown_recipe_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'cmae_vit_b'" in failure(capsys, "--recipe", "cmae_vitb")


def test_empty_shards_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, "--run.out", str(tmp_path), "--optim.precision", "fp32")
    assert "data.shards is empty" in error
    assert "cmae shards write" in error


def test_missing_shards_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = str(tmp_path / "nothing-*.tar")
    arguments = ("--data.shards", pattern, "--run.out", str(tmp_path / "run"))
    assert pattern in failure(capsys, *arguments, "--optim.precision", "fp32")


def test_values_out_of_range_name_key_value_and_range(capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, "--optim.lr_per_256", "-1")
    assert "optim.lr_per_256 is -1" in error
    assert "> 0" in error


def test_errors_of_the_model_name_the_key_with_its_section(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "model.mask_ratio is 2.0" in failure(capsys, "--model.mask_ratio", "2")
    assert "data.views.hue is 3.0" in failure(capsys, "--data.views.hue", "3")


def test_pictures_without_a_decoder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, "--run.image_every", "5", "--model.reconstruction_weight", "0")
    assert "run.image_every is 5" in error


def test_one_view_with_a_contrastive_loss_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data.views.num_views is 1" in failure(capsys, "--data.views.num_views", "1")


def test_fp16_on_a_cpu_is_refused_with_the_repair(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--speed.device", "cpu", "--data.shards", small_shards)
    error = failure(capsys, *arguments, "--run.out", str(tmp_path))
    assert "optim.precision" in error
    assert "bf16" in error


def test_a_batch_that_ranks_cannot_share_is_refused_with_one_that_they_can() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size is 100.*3 ranks.*99"):
        BatchSplit.of(100, None, 3)
    with pytest.raises(ValueError, match=r"micro_batch_size is 5.*use for instance 4"):
        BatchSplit.of(64, 5, 4)
    assert BatchSplit.of(4096, 128, 8) == BatchSplit(128, 4)
    assert BatchSplit.of(4096, None, 32) == BatchSplit(128, 1)


@pytest.mark.parametrize(
    "word", ["--optim.weight-decay=0.2", "--optim.weight_decay=0.2", "--optim.weight-decay"]
)
def test_options_may_be_typed_with_hyphens(word: str) -> None:
    value = [] if "=" in word else ["0.2"]
    assert parse(word, *value).optim.weight_decay == 0.2
    shards = "--data.shards=a-b/x-{0..3}.tar"
    assert parse(word, *value, shards).data.shards == "a-b/x-{0..3}.tar"


def test_later_recipes_and_options_override_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("optim: {epochs: 3, weight_decay: 0.2}\nseed: 4\n")
    (tmp_path / "two.yaml").write_text("optim: {epochs: 5}\n")
    one, two = (("--recipe", str(tmp_path / f"{name}.yaml")) for name in ("one", "two"))
    found = parse("--recipe", "cmae_vit_s", *one, *two)
    assert (found.model.embed_dim, found.seed) == (384, 4)
    assert (found.optim.epochs, found.optim.weight_decay) == (5, 0.2)
    assert parse(*two, *one).optim.epochs == 3
    assert parse(*two, "--optim.epochs", "7").optim.epochs == 7


def test_a_recipe_loads_in_one_line(tmp_path: Path) -> None:
    from cmae.train import Config, load_recipe

    assert load_recipe("cmae_vit_b") == parse("--recipe", "cmae_vit_b")
    (tmp_path / "mine.yaml").write_text("seed: 4\nmodel: {pixel_mean: [1, 2, 3]}\n")
    found = load_recipe(
        "cmae_vit_s",
        tmp_path / "mine.yaml",
        overrides={"data.shards": ["a", "b"], "run.out": tmp_path, "optim.total_steps": None},
    )
    assert isinstance(found, Config)
    assert (found.seed, found.model.embed_dim, found.model.pixel_mean) == (4, 384, (1, 2, 3))
    assert (found.data.shards, found.run.out) == (["a", "b"], tmp_path)
    assert load_recipe() == Config()
    with pytest.raises(CmaeError, match=r"'optim.epochs'") as caught:
        load_recipe(overrides={"optim.epoch": 3})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {epochs: many}", r"optim\.epochs is 'many'"),
        ("optim: 3", r"optim is a section, and holds 3"),
        ("seed: {a: 1}", r"seed is \{'a': 1\}"),
        ("- a", r"holds a list"),
        ("a: [", r"is not YAML"),
        ("optim: {min_lr: 0.5}", r"optim\.min_lr=0\.5 is not possible.*ends at 0"),
    ],
)
def test_errors_of_a_recipe_name_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(CmaeError, match=rf"{path}.*{message}"):
        parse("--recipe", str(path))


def test_a_config_error_knows_its_parts() -> None:
    with pytest.raises(CmaeError) as caught:
        parse("--model.mask_ratio", "2")
    error = caught.value
    assert (error.key, error.found, error.allowed) == ("model.mask_ratio", 2.0, "> 0 and < 1")


@pytest.mark.parametrize("name", ["config", "config_parser", "old_keys"])
def test_the_configuration_loads_neither_torch_nor_dali(name: str) -> None:
    code = f"import sys, cmae.train.{name}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "nvidia.dali", "webdataset", "numpy"} & set(run.stdout.split())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("batch_size", "speed.micro_batch_size"),
        ("global_batch_size", "optim.global_batch_size"),
        ("seed", "seed"),
    ],
)
def test_what_the_loader_takes_from_the_run_is_refused_by_name_and_hidden(
    tmp_path: Path, name: str, source: str
) -> None:
    (tmp_path / "r.yaml").write_text(f"data: {{{name}: 4}}\n")
    with pytest.raises(CmaeError, match=rf"data\.{name} is 4; .* follows {source}"):
        load_recipe(tmp_path / "r.yaml")
    parser = Parser(prog="x")
    add_config(parser)
    assert f"--data.{name} " not in parser.format_help()
    assert name not in Config().to_dict()["data"]
