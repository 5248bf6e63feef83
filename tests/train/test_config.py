"""Recipes, overrides, and the errors of a wrong configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cmae.errors import CmaeError
from cmae.model import ModelConfig
from cmae.train.commands.main import main
from cmae.train.config import Config
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


# --- recipes of strangers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:touch MARK",
        "{pipe,pipe}:touch MARK",
        "{pi,pi}pe:touch MARK",
        "file:pipe:touch MARK",
        "file://pipe:touch MARK",
    ],
)
def test_a_pipe_in_a_recipe_needs_a_word_on_the_command_line(tmp_path: Path, pattern: str) -> None:
    recipe = tmp_path / "r.yaml"
    for shards in (pattern, ["/data/a.tar", pattern]):
        recipe.write_text(json.dumps({"data": {"shards": shards}}))
        with pytest.raises(CmaeError, match=r"r\.yaml.*add --allow_pipe") as caught:
            load_recipe(recipe)
        assert "MARK" not in str(caught.value)
        assert load_recipe(recipe, allow_pipe=True).data.shards == shards
        assert load_recipe(recipe, overrides={"data.shards": "a.tar"}).data.shards == "a.tar"
        assert parse("--recipe", str(recipe), "--allow_pipe").data.shards == shards


def test_a_pipe_given_by_hand_is_the_users() -> None:
    assert parse("--data.shards", "pipe:cat a.tar").data.shards == "pipe:cat a.tar"


def test_no_recipe_allows_itself_a_pipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("allow_pipe: true\ndata: {shards: 'pipe:cat a.tar'}\n")
    with pytest.raises(CmaeError, match="allow_pipe can only be given on the command line"):
        load_recipe(recipe)


SPEC = "class_path: planted.Thing"


@pytest.mark.parametrize(
    "text",
    [
        f"data: {{storage_options: {{{SPEC}}}}}",
        f"data: {{storage_options: {{client_kwargs: {{a: [{{{SPEC}}}]}}}}}}",
        f"data: {{storage_options: '{{{SPEC}}}'}}",
        'data: {storage_options: "{\\x63lass_path: planted.Thing}"}',
        f"model: {{{SPEC}}}",
        f"data: {{views: {{{SPEC}, init_args: {{}}}}}}",
        f"{SPEC}",
    ],
)
def test_a_recipe_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(CmaeError, match=r"r\.yaml.*class_path"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "alias of itself"),
        ("a: &a {b: *a}", "alias of itself"),
        ("a: " + "[" * 40 + "]" * 40, "levels"),
        ("a: " + "[" * 5000 + "]" * 5000, "is not YAML"),
        (
            "\n".join(
                f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 1}]" for i in range(9)
            ),
            "more than 100000 values",
        ),
        ("a: 2026-99-99", "is not YAML"),
        ("1: 2", "key 1, which is no word"),
        ("? [a]\n: 2", "is not YAML"),
        ("x: " + "1" * (1 << 20), "a recipe has at most"),
        ("data: {storage_options: {a: !!python/object:os.x {}}}", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)
def test_a_recipe_has_limits(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    with pytest.raises(CmaeError, match=rf"r\.yaml.*{message}"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    "words",
    [
        ["--data.storage_options", "{secret: SECRET"],
        ["--data.storage_options", "SECRET"],
        ["--data.storage_option", "{secret: SECRET}"],
        ["--data.shards", "https://u:SECRET@h/a.tar?x=SECRET", "https://u:SECRET@h/b?y=SECRET"],
    ],
)
def test_errors_of_options_show_no_secret(words: list[str]) -> None:
    with pytest.raises(CmaeError) as caught:
        parse(*words)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "data: {storage_option: {secret: SECRET}}",
        "data: {storage_options: [SECRET]}",
        "data: {storage_options: SECRET}",
        "storage_options: {key: SECRET}",
        "seed: 'https://h/?k=SECRET'",
    ],
)
def test_errors_of_recipes_show_no_secret(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(CmaeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert "SECRET" not in str(caught.value)


def test_what_is_stored_of_a_run_holds_no_secret_and_says_so_when_it_is_read(
    tmp_path: Path,
) -> None:
    data = {
        "shards": ["https://h/a.tar?pwd=SECRET", "pipe:curl -u SECRET https://h/b.tar"],
        "storage_options": {
            "connection_string": "SECRET",
            "anon": False,
            "headers": {"A": "SECRET"},
        },
    }
    stored = load_recipe(overrides={f"data.{key}": value for key, value in data.items()}).to_dict()
    assert "SECRET" not in json.dumps(stored)
    assert stored["data"]["storage_options"] == {
        "connection_string": "***",
        "anon": False,
        "headers": "***",
    }
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"data": {key: stored["data"][key] for key in data}})
    )
    with pytest.raises(CmaeError, match=r"data\.shards.*give it again"):
        load_recipe(tmp_path / "config.yaml", allow_pipe=True)
    options = {"data.shards": data["shards"]}
    with pytest.raises(CmaeError, match=r"data\.storage_options.*give it again"):
        load_recipe(tmp_path / "config.yaml", overrides=options)
