"""Checkpoints: atomic, bounded in number, refused when they do not fit."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from cmae.model.export.stored import CheckpointError, list_checkpoints, load_checkpoint
from cmae.train.checkpoints import lock
from cmae.train.checkpoints import writer as writer_module
from cmae.train.checkpoints.folder import Retention, fault_of, find_checkpoint, set_aside_newer
from cmae.train.checkpoints.lock import hold_folder
from cmae.train.checkpoints.writer import Checkpointer


def write(folder: Path, *steps: int, **state: Any) -> list[Path]:
    writer = Checkpointer(folder, retention=Retention(100))
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
    writer = Checkpointer(tmp_path, retention=Retention(2, 4))
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
    writer = Checkpointer(tmp_path / "gone", patience_s=0, warn=lambda line: None)
    (tmp_path / "gone").rmdir()
    writer.save(1, {})
    with pytest.raises(CheckpointError, match=r"gone.*No such file"):
        writer.wait()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """While its one item is True, every file is refused after 3000 bytes."""

    class FullDisk:
        def __init__(self, file: IO[bytes]) -> None:
            self._file = file
            self._left = 3000

        def write(self, data: bytes) -> int:
            self._left -= len(data)
            if self._left < 0 and is_full[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    real_write = writer_module.atomic_write

    @contextmanager
    def refuse(path: Path) -> Iterator[Any]:
        with real_write(path) as file:
            yield FullDisk(file)

    is_full = [False]
    monkeypatch.setattr(writer_module, "atomic_write", refuse)
    monkeypatch.setattr(writer_module, "RETRY_S", 0.2)
    yield is_full
    is_full[0] = False


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_disk_is_told_each_minute_and_the_newest_state_is_written_when_there_is_room(
    tmp_path: Path, full_disk: list[bool]
) -> None:
    warnings: list[str] = []
    writer = Checkpointer(tmp_path, warn=warnings.append)
    first = writer.save(1, {"w": torch.ones(1000)})
    writer.wait()
    full_disk[0] = True
    writer.save(2, {"w": torch.ones(1000)})
    until(lambda: len(warnings) >= 2)
    start = time.monotonic()
    third = writer.save(3, {"w": torch.full([1000], 3.0)})  # the training is not kept
    fourth = writer.save(4, {"w": torch.full([1000], 4.0)})
    assert time.monotonic() - start < 5
    until(lambda: any("step-00000004" in one for one in warnings))
    full_disk[0] = False
    writer.wait()
    assert [*sorted(tmp_path.iterdir())] == [first, fourth]
    assert not third.exists()
    assert load_checkpoint(fourth)["w"][0] == 4
    assert "step-00000002.pt cannot be written: No space left on device" in warnings[0]
    assert "The run goes on, and this is tried again" in warnings[0]
    writer.save(5, {})
    writer.wait()
    assert len(list_checkpoints(tmp_path)) == 3


def test_a_disk_that_stays_full_ends_the_run_after_the_stated_time(
    tmp_path: Path, full_disk: list[bool]
) -> None:
    full_disk[0] = True
    writer = Checkpointer(tmp_path, patience_s=1, warn=lambda line: None)
    start = time.monotonic()
    writer.save(1, {"w": torch.ones(1000)})
    with pytest.raises(CheckpointError, match="No space left on device"):
        writer.wait()
    assert 0.9 < time.monotonic() - start < 10
    writer.save(2, {"w": torch.ones(1000)})
    until(lambda: writer._error is not None)
    with pytest.raises(CheckpointError, match="No space left on device"):
        writer.save(3, {})


def test_after_an_error_nobody_waits_for_a_full_disk(tmp_path: Path, full_disk: list[bool]) -> None:
    full_disk[0] = True
    start = time.monotonic()

    def interrupted() -> None:
        with Checkpointer(tmp_path, warn=lambda line: None) as writer:
            writer.save(1, {"w": torch.ones(1000)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 10


def test_storage_that_hangs_keeps_the_training_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write, hangs = writer_module.write_atomically, threading.Event()

    def hang(path: Path, state: dict[str, Any]) -> None:
        if path.name == "step-00000001.pt":
            hangs.wait(30)
        real_write(path, state)

    monkeypatch.setattr(writer_module, "write_atomically", hang)
    monkeypatch.setattr(writer_module, "STALL_S", 0.2)
    warnings: list[str] = []
    writer = Checkpointer(tmp_path, warn=warnings.append)
    start = time.monotonic()
    for step in (1, 2, 3):
        writer.save(step, {"w": torch.ones(10)})
    assert time.monotonic() - start < 5
    assert len(warnings) == 2
    assert "hangs. The run goes on" in warnings[0]
    hangs.set()
    writer.wait()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000001.pt",
        "step-00000003.pt",
    ]


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
    notes: list[str] = []
    assert find_checkpoint("auto", tmp_path, note=notes.append) == older
    moved = tmp_path / "set-aside" / "step-00000002.pt"
    (note,) = notes
    assert str(moved) in note
    assert "damaged" in note
    assert "step-00000002.pt: " in (tmp_path / "set-aside" / "why.txt").read_text()
    assert list_checkpoints(tmp_path) == [older]
    older.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cut off or damaged.*another run\.out"):
        find_checkpoint("auto", tmp_path)


def test_what_is_foreign_or_named_wrongly_is_set_aside(tmp_path: Path) -> None:
    (older,) = write(tmp_path, 1)
    torch.save({"model": {}}, tmp_path / "step-00000002.pt")  # another program's
    (tmp_path / "step-00000003.pt").write_bytes(older.read_bytes())
    notes: list[str] = []
    assert find_checkpoint("auto", tmp_path, note=notes.append) == older
    assert [note.split(":")[0] for note in notes] == [
        "set aside, named otherwise than its step, 1",
        "set aside, not of this program",
    ]


def test_a_damaged_checkpoint_of_an_earlier_version_has_its_archive_checked(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1)
    state = load_checkpoint(path)
    del state["digest"]
    torch.save(state, path)
    assert fault_of(path) == ""
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(100).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert fault_of(path) == "cut off or damaged"


def test_a_digest_finds_what_the_archive_does_not(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 1, config={"seed": 0})
    assert fault_of(path) == ""
    state = load_checkpoint(path)
    state["w"][500] += 1e-7
    torch.save(state, path)  # a whole archive with good checksums
    assert "digest" in fault_of(path)
    state = {**load_checkpoint(write(tmp_path, 1, config={"seed": 0})[0]), "config": {"seed": 1}}
    torch.save(state, path)
    assert "digest" in fault_of(path)


def test_a_file_that_cannot_be_read_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, newest = write(tmp_path, 1, 2)
    real_open = open

    def refuse(path: Any, *arguments: Any, **options: Any) -> Any:
        if path == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_open(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"step-00000002.*Input/output error.*lose steps"):
        find_checkpoint("auto", tmp_path)
    assert newest.exists()


def test_what_is_young_stays(tmp_path: Path) -> None:
    paths = [tmp_path / f"step-{step:08d}.pt" for step in range(1, 7)]
    for age, path in zip((9, 8, 5, 3, 2, 1), paths, strict=True):
        path.touch()
        os.utime(path, (0, 100_000 - 3600 * age))
    rule = Retention(2, 3, 6.0)
    retired = rule.retired(paths, now=100_000)
    assert [path.name for path in retired] == ["step-00000001.pt", "step-00000002.pt"]
    assert Retention(2).retired(paths) == paths[:4]


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
        pytest.raises(CheckpointError, match=r"another run.* writes.*choose another run\.out"),
        hold_folder(tmp_path),
    ):
        pass
    with hold_folder(tmp_path):
        pass


@pytest.fixture
def other_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], object]]:
    """Makes locks fail, as on file systems without them, and the next caller be another machine."""
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "WATCH_S", 1.0)

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    return lambda: monkeypatch.setattr(lock, "machine", lambda: "node-b boot-b")


def test_a_run_on_another_node_is_seen_where_there_are_no_locks(
    tmp_path: Path, other_machine: Callable[[], object]
) -> None:
    with hold_folder(tmp_path):
        until(lambda: (tmp_path / ".holder").exists())
        other_machine()
        (tmp_path / ".holder").write_text("node-a boot-a 77 abcd 1\n")
        with (
            pytest.raises(CheckpointError, match=r"another run \(process .*\) writes"),
            hold_folder(tmp_path),
        ):
            pass
    assert not (tmp_path / ".holder").exists()


def test_a_holder_that_was_killed_on_another_node_is_waited_for_and_followed(
    tmp_path: Path, other_machine: Callable[[], object]
) -> None:
    for left in ("node-a boot-a 77 abcd 1\n", "\0\xff garbage"):
        (tmp_path / ".holder").write_text(left)
        start = time.monotonic()
        with hold_folder(tmp_path):
            assert 0.9 < time.monotonic() - start < 5


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
