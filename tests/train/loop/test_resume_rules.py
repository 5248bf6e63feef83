"""Every setting has an answer on resume: applied and in force, free, or refused by its name."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from support.pipeline_data import write_photo_shards
from support.tiny_runs import arguments, run

from cmae.model import build_model
from cmae.model.export.stored import CheckpointError, load_checkpoint, model_config
from cmae.pipeline import LoaderState
from cmae.pipeline.formats.dataset_index import build_indices
from cmae.pipeline.sources.difference import ShardFacts, describe_difference, file_name
from cmae.train.commands.main import main
from cmae.train.config import Config
from cmae.train.loop.optim import parameter_groups
from cmae.train.loop.resume_rules import RULES, check_changes, render_rules, rule_of

BASE = Config()


def settings(config: object = BASE, prefix: str = "") -> list[str]:
    names = []
    for field in fields(config):
        value = getattr(config, field.name)
        inner = settings(value, f"{prefix}{field.name}.") if is_dataclass(value) else None
        names += inner if inner is not None else [prefix + field.name]
    return names


def checkpoint(config: dict[str, Any], *, offset: int = 0) -> dict[str, Any]:
    state = LoaderState(0, epoch=2, offset=offset, digest="x")
    return {"loader": state.to_dict(), "config": config}


def changed(name: str, value: object, *, offset: int = 0) -> list[str]:
    """The lines of a run whose checkpoint has another value of one setting."""
    stored = BASE.to_dict()
    *path, last = name.split(".")
    section = stored
    for word in path:
        section = section[word]
    section[last] = value
    return check_changes(Path("x.pt"), checkpoint(stored, offset=offset), BASE)


def test_every_setting_has_a_rule_and_every_rule_a_setting() -> None:
    names = settings()
    assert all(rule_of(name).why for name in names)
    sections = {f"{name.rsplit('.', 1)[0]}.*" for name in names}
    assert RULES.keys() <= {*names, *sections}


@pytest.mark.parametrize("name", settings())
def test_each_setting_is_applied_free_or_refused_by_its_name(name: str) -> None:
    value, rule = "something else", rule_of(name)
    if name == "init_from":  # it may be left out
        assert changed(name, value) == []
        return
    if rule.kind == "refused":
        with pytest.raises(CheckpointError, match=f"{name}: something else in the checkpoint"):
            changed(name, value)
    elif rule.kind == "between epochs":
        assert changed(name, value) in ([], [f"{name}: {value} in the checkpoint, {now(name)} now"])
    elif rule.kind == "free":
        assert changed(name, value) == []
    else:
        (line,) = changed(name, value)
        assert line.startswith(f"{name}: something else in the checkpoint, ")


def now(name: str) -> object:
    value: object = BASE
    for word in name.split("."):
        value = getattr(value, word)
    return value


def test_another_order_is_refused_inside_an_epoch_alone() -> None:
    with pytest.raises(CheckpointError, match=r"inside epoch 2, 512 samples.*\n  data\.shuffle_b"):
        changed("data.shuffle_block", 8, offset=512)
    with pytest.raises(CheckpointError, match=r"last_batch: pad in the checkpoint, drop now"):
        changed("data.last_batch", "pad", offset=512)
    # Which blocks of one sample do not care about.
    assert changed("data.shuffle_window", 16, offset=512) == []
    assert changed("data.shuffle_block", 8) == [
        "data.shuffle_block: 8 in the checkpoint, 1 now",
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("model.contrastive_loss", "none"), ("model.reconstruction_weight", 0.0)],
)
def test_a_loss_that_takes_a_part_of_the_model_with_it_is_refused(name: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=name):
        changed(name, value)


def test_all_refused_settings_come_in_one_message() -> None:
    stored = BASE.to_dict()
    stored["seed"], stored["model"]["depth"] = 7, 24
    with pytest.raises(CheckpointError) as caught:
        check_changes(Path("x.pt"), checkpoint(stored), BASE)
    assert "seed: 7 in the checkpoint, 0 now" in str(caught.value)
    assert "model.depth: 24 in the checkpoint, 12 now" in str(caught.value)
    assert "--init_from" in str(caught.value)


def test_settings_that_older_runs_could_change_count_only_where_they_were_changed() -> None:
    stored = BASE.to_dict()
    stored["optim"] |= {"target_fp8": False, "min_lr": 0.0}
    assert check_changes(Path("x.pt"), checkpoint(stored), BASE) == []
    stored["optim"]["target_fp8"] = True
    assert check_changes(Path("x.pt"), checkpoint(stored), BASE) == [
        "optim.target_fp8: True in the checkpoint, None now"
    ]


def test_other_initial_weights_are_refused_in_the_middle_of_a_run() -> None:
    config = replace(BASE, init_from=Path("b.pt"))
    stored = checkpoint({**BASE.to_dict(), "init_from": "a.pt"})
    with pytest.raises(CheckpointError, match=r"init_from: a\.pt in the checkpoint, b\.pt now"):
        check_changes(Path("x.pt"), stored, config)


def test_a_checkpoint_from_before_a_setting_has_its_default() -> None:
    stored = BASE.to_dict()
    del stored["data"]["gpu_decode"], stored["optim"]["residual"]
    assert check_changes(Path("x.pt"), checkpoint(stored), BASE) == []
    newer = replace(BASE, optim=replace(BASE.optim, residual="16bit"))
    assert check_changes(Path("x.pt"), checkpoint(stored), newer) == [
        "optim.residual: fp32 in the checkpoint, 16bit now"
    ]


def test_choices_are_judged_as_they_are_typed() -> None:
    """A new value of a choice must not slip through: the rules go by name, not by value."""
    hints = get_type_hints(type(BASE.optim))
    assert "bf16" in get_args(hints["precision"])
    assert changed("optim.precision", "bf16") == [
        "optim.precision: bf16 in the checkpoint, fp16 now"
    ]


# ---- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    paths = write_photo_shards(folder, sizes=[20, 20], edge=40)
    build_indices([str(path) for path in paths])
    return str(folder)


@pytest.fixture(scope="module")
def half_way(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half")
    run(shards, out, **{"run.stop_at_step": 4})
    return out


def copy_of(run_folder: Path, out: Path) -> Path:
    (out / "checkpoints").mkdir(parents=True)
    for path in (run_folder / "checkpoints").glob("*.pt"):
        (out / "checkpoints" / path.name).write_bytes(path.read_bytes())
    return out


def test_what_is_applied_is_in_force(shards: str, half_way: Path, tmp_path: Path) -> None:
    out = copy_of(half_way, tmp_path / "run")
    new = {"optim.weight_decay": 0.3, "optim.betas": "[0.8, 0.9]", "optim.lr_per_256": 1e-2}
    outcome = run(shards, out, **new)
    groups = load_checkpoint(outcome.checkpoint)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [tuple(group["betas"]) for group in groups] == [(0.8, 0.9)] * 2
    untouched = run(shards, copy_of(half_way, tmp_path / "same"))
    weights = [load_checkpoint(one.checkpoint)["model"] for one in (outcome, untouched)]
    assert any(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_tokens_that_change_their_group_keep_their_moments(
    shards: str, half_way: Path, tmp_path: Path
) -> None:
    out = copy_of(half_way, tmp_path / "run")
    outcome = run(shards, out, **{"optim.decay_tokens": "true", "run.stop_at_step": 5})
    before = load_checkpoint(sorted((half_way / "checkpoints").glob("*.pt"))[-1])
    after = load_checkpoint(outcome.checkpoint)
    sizes = [
        [len(group["params"]) for group in one["optimizer"]["param_groups"]]
        for one in (before, after)
    ]
    assert sizes[1][0] > sizes[0][0]
    assert sum(sizes[0]) == sum(sizes[1])
    for name, one in moments(after).items():
        # One step further, each moment is mostly what it was: a mix-up would give it another's shape or size.
        assert one.shape == moments(before)[name].shape
        if moments(before)[name].norm() > 0:
            likeness = torch.cosine_similarity(
                one.flatten(), moments(before)[name].flatten(), dim=0
            )
            assert likeness > 0.3, name


def moments(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """First moments by parameter: the order of the groups is that of the parameters' names."""
    config = Config().optim
    sizes = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    model = build_model(model_config(Path("x"), state["config"]["model"]), seed=0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for decay_tokens in (False, True):
        groups = parameter_groups(
            model.named_parameters(), replace(config, decay_tokens=decay_tokens)
        )
        if [len(group["params"]) for group in groups] == sizes:
            ordered = [names[id(one)] for group in groups for one in group["params"]]
    found = state["optimizer"]["state"]
    return {name: found[number]["exp_avg"] for number, name in enumerate(ordered)}


def test_a_checkpoint_beyond_the_schedule_is_an_error(
    shards: str, half_way: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy_of(half_way, tmp_path / "run")
    assert main(["pretrain", *arguments(shards, out, **{"optim.total_steps": 2})]) == 1
    error = capsys.readouterr().err
    assert "is at step 4, and the schedule has only 2 steps now" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "value"),
    [("optim.global_batch_size", 16), ("optim.impl", "apex"), ("seed", 3)],
)
def test_what_cannot_be_applied_is_refused_by_name(
    shards: str, half_way: Path, tmp_path: Path, capsys, name: str, value: object
) -> None:
    out = copy_of(half_way, tmp_path / "run")
    assert main(["pretrain", *arguments(shards, out, **{name: value})]) == 1
    error = capsys.readouterr().err
    assert f"{name}: " in error
    assert "--init_from" in error
    assert "Traceback" not in error


def test_other_shards_are_named(
    half_way: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_photo_shards(tmp_path / "more", sizes=[20, 20, 10], edge=40)
    build_indices([str(path) for path in paths])
    out = copy_of(half_way, tmp_path / "run")
    assert main(["pretrain", *arguments(str(tmp_path / "more"), out)]) == 1
    error = capsys.readouterr().err
    assert f"not there before: {paths[2].name} (10 samples)" in error
    assert "digest" not in error


# ---- differences of shards ------------------------------------------------------------------------


def facts(*names: str) -> list[ShardFacts]:
    return [ShardFacts(name, 10, f"digest of {name}") for name in names]


def test_shards_that_came_went_changed_or_moved_are_named() -> None:
    before = [list(one) for one in facts("a.tar", "b.tar")]
    assert describe_difference(before, facts("a.tar", "b.tar")) == ""
    assert describe_difference(before, facts("a.tar")) == "missing now: b.tar (10 samples)"
    assert "not there before: c.tar" in describe_difference(
        before, facts("a.tar", "b.tar", "c.tar")
    )
    assert "shard 0 was a.tar" in describe_difference(before, facts("b.tar", "a.tar"))
    other = [*facts("a.tar"), ShardFacts("b.tar", 9, "y")]
    assert describe_difference(before, other) == (
        "changed: b.tar (10 samples) before, b.tar (9 samples) now"
    )
    many = [list(one) for one in facts(*(f"{i}.tar" for i in range(40)))]
    assert describe_difference(many, facts("x.tar")).endswith("and 31 more")


def test_names_of_shards_hold_no_secret() -> None:
    assert file_name("https://x.org/a/b.tar?X-Amz-Signature=secret") == "b.tar"
    assert file_name("pipe:curl -H 'key: secret' https://x.org/a.tar") == "pipe:"
    assert file_name("/data/a.tar") == "a.tar"


def test_the_table_holds_every_setting_once() -> None:
    table = render_rules(settings())
    assert all(table.count(f"`{name}`") == 1 for name in settings())
