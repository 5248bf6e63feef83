"""Checkpoints: atomic, bounded in number, refused when they do not fit."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from cmae.model.export.stored import CheckpointError, list_checkpoints, load_checkpoint
from cmae.train.loop import checkpoint as checkpoint_module
from cmae.train.loop.checkpoint import (
    Checkpointer,
    find_checkpoint,
    hold_folder,
    set_aside_newer,
)


def write(folder: Path, *steps: int, **state: Any) -> list[Path]:
    writer = Checkpointer(folder, keep=100)
    paths = [writer.save(step, {"w": torch.ones(1000), **state}) for step in steps]
    writer.wait()
    return paths


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_checkpoint_holds_the_state_of_its_moment(tmp_path: Path, device: str) -> None:
    weight = torch.arange(1_000_000, dtype=torch.float32, device=device)
    expected = weight.cpu().clone()
    writer = Checkpointer(tmp_path)
    path = writer.save(3, {"w": weight, "lists": [weight[:5]]})
    weight.fill_(-1)  # the next step
    writer.wait()
    found = load_checkpoint(path)
    assert found["w"].device.type == "cpu"
    assert torch.equal(found["w"], expected)
    assert torch.equal(found["lists"][0], expected[:5])


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


def test_a_full_disk_is_a_warning_and_the_next_checkpoint_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def __init__(self, file: IO[bytes]) -> None:
            self._file = file
            self._left = 3000

        def write(self, data: bytes) -> int:
            self._left -= len(data)
            if self._left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    real_write = checkpoint_module.atomic_write

    @contextmanager
    def refuse(path: Path) -> Iterator[Any]:
        with real_write(path) as file:
            yield FullDisk(file)

    warnings: list[str] = []
    writer = Checkpointer(tmp_path, warn=warnings.append)
    first = writer.save(1, {"w": torch.ones(1000)})
    writer.wait()
    monkeypatch.setattr(checkpoint_module, "atomic_write", refuse)
    writer.save(2, {"w": torch.ones(1000)})
    monkeypatch.undo()
    third = writer.save(3, {"w": torch.ones(1000)})
    writer.wait()
    assert sorted(tmp_path.iterdir()) == [first, third]
    assert len(warnings) == 1
    assert "step-00000002.pt cannot be written: No space left on device" in warnings[0]
    assert "the run goes on" in warnings[0]


def test_a_file_system_that_cannot_sync_a_folder_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    (path,) = write(tmp_path, 1)
    assert load_checkpoint(path)["step"] == 1


@pytest.mark.parametrize("damage", ["cut off", "a lost block"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    older, newest = write(tmp_path, 1, 2)
    data = newest.read_bytes()
    middle = data.index(torch.ones(100).numpy().tobytes()) + 64
    lost = data[:middle] + bytes(512) + data[middle + 512 :]
    newest.write_bytes(data[:1500] if damage == "cut off" else lost)
    assert find_checkpoint("auto", tmp_path) == older
    assert [path.name for path in set_aside_newer(tmp_path, 1)] == ["step-00000002.pt"]
    older.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cut off or damaged.*another run\.out"):
        find_checkpoint("auto", tmp_path)


def test_what_is_set_aside_keeps_its_bytes_and_never_replaces_another(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    assert len(set_aside_newer(tmp_path, 1)) == 2
    write(tmp_path, 2, other=5)
    (moved,) = set_aside_newer(tmp_path, 1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001.pt"]
    assert moved == tmp_path / "set-aside" / "step-00000002.2.pt"
    assert load_checkpoint(moved)["other"] == 5
    assert "other" not in load_checkpoint(tmp_path / "set-aside" / "step-00000002.pt")


def test_a_named_checkpoint_is_left_for_what_descends_from_it_and_for_nothing_else(
    tmp_path: Path,
) -> None:
    (named,) = write(tmp_path / "a", 20)
    out = tmp_path / "b"
    write(out, 10, origin="")
    assert find_checkpoint(str(named), out) == named
    (newest,) = write(out, 25, origin=str(named.resolve()))
    assert find_checkpoint(str(named), out) == newest


def test_two_runs_cannot_hold_one_folder(tmp_path: Path) -> None:
    with (
        hold_folder(tmp_path),
        pytest.raises(CheckpointError, match=r"another run writes.*choose another run\.out"),
        hold_folder(tmp_path),
    ):
        pass
    with hold_folder(tmp_path):
        pass


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
