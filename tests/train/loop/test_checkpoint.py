"""Checkpoints: atomic, bounded in number, refused when they do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmae.model.export.stored import CheckpointError, list_checkpoints, load_checkpoint
from cmae.pipeline import LoaderState
from cmae.train.loop.checkpoint import (
    Checkpointer,
    changed_settings,
    check_model_fits,
    check_same_order,
    find_checkpoint,
)


def test_a_saved_state_reads_back_the_same(tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path)
    state = {"model": {"w": torch.arange(6.0)}, "lr": [0.1, 0.2], "none": None, "name": "x"}
    path = writer.save(7, state)
    writer.wait()
    loaded = load_checkpoint(path)
    assert loaded["step"] == 7
    assert torch.equal(loaded["model"]["w"], torch.arange(6.0))
    assert (loaded["lr"], loaded["none"], loaded["name"]) == ([0.1, 0.2], None, "x")


def test_the_snapshot_does_not_see_later_changes(tmp_path: Path) -> None:
    weight = torch.zeros(1000)
    writer = Checkpointer(tmp_path)
    path = writer.save(1, {"w": weight})
    weight.fill_(1)
    writer.wait()
    assert load_checkpoint(path)["w"].sum() == 0


def test_only_the_newest_and_the_chosen_ones_are_kept(tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        writer.save(step, {})
    writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000004.pt",
        "step-00000008.pt",
        "step-00000009.pt",
        "step-00000010.pt",
    ]


def test_a_file_left_by_a_kill_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path)
    first.save(3, {"w": torch.ones(2)})
    first.wait()
    killed = (
        "import os\n"
        "from cmae.pipeline.formats.atomic import atomic_write\n"
        f"with atomic_write({str(tmp_path / 'step-00000009.pt')!r}) as file:\n"
        "    file.write(b'half')\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    newest = find_checkpoint("auto", tmp_path)
    assert newest == tmp_path / "step-00000003.pt"
    Checkpointer(tmp_path)
    assert list(tmp_path.iterdir()) == [newest]


def test_a_failed_write_is_raised_on_the_training_thread(tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    writer.save(1, {})
    with pytest.raises(CheckpointError, match=r"gone.*No such file"):
        writer.wait()


def test_a_truncated_checkpoint_is_named_with_the_repair(tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path)
    path = writer.save(1, {"w": torch.ones(1000)})
    writer.wait()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(
        CheckpointError, match=r"step-00000001\.pt cannot be read as a checkpoint.*delete it"
    ):
        load_checkpoint(path)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(CheckpointError, match=r"notes\.txt cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_weights_of_another_project_are_sent_to_import(tmp_path: Path) -> None:
    path = tmp_path / "mae.pth"
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="cmae import"):
        load_checkpoint(path)


def test_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    assert find_checkpoint("never", tmp_path) is None
    writer = Checkpointer(tmp_path)
    writer.save(1, {})
    writer.wait()
    with pytest.raises(CheckpointError, match=r"run\.resume is 'never'"):
        find_checkpoint("never", tmp_path)


def test_another_architecture_is_refused_key_by_key(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.depth: 12 in the checkpoint, 6 now"):
        check_model_fits(tmp_path / "x.pt", {"depth": 12, "width": 4}, {"depth": 6, "width": 4})


def test_another_order_is_refused_inside_an_epoch_alone() -> None:
    data = {"shuffle": True, "shuffle_block": 1, "shuffle_window": 64, "last_batch": "drop"}

    def check(offset: int, **changed: object) -> None:
        stored = {
            "loader": LoaderState(0, epoch=2, offset=offset, digest="x").to_dict(),
            "config": {"data": data},
        }
        check_same_order(Path("x.pt"), stored, data | changed)

    with pytest.raises(
        CheckpointError, match=r"inside epoch 2, 512 samples.*\n  data\.shuffle_block: 1 in the"
    ):
        check(512, shuffle_block=8)
    with pytest.raises(CheckpointError, match=r"last_batch: drop in the checkpoint, pad now"):
        check(512, last_batch="pad")
    check(512, shuffle_window=16)  # which blocks of one sample do not care about
    check(0, shuffle_block=8)


def test_changed_settings_are_listed() -> None:
    stored = {"seed": 0, "data": {"views": {"hue": 0.1}}, "optim": {"lr": 1}}
    current = {"seed": 1, "data": {"views": {"hue": 0.2}}, "optim": {"lr": 1}}
    assert changed_settings(stored, current) == [
        "seed: 0 in the checkpoint, 1 now",
        "data.views.hue: 0.1 in the checkpoint, 0.2 now",
    ]


def test_settings_that_older_runs_could_change_count_only_where_they_were_changed() -> None:
    current = {"seed": 0, "data": {}, "optim": {"epochs": 1}}
    stored = {**current, "optim": {"epochs": 1, "target_fp8": False, "min_lr": 0.0}}
    assert changed_settings(stored, current) == []
    stored["optim"] = {**stored["optim"], "target_fp8": True}
    assert changed_settings(stored, current) == [
        "optim.target_fp8: True in the checkpoint, None now"
    ]
