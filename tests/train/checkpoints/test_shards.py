"""Checkpoints in shards: the same runs as with single files, on any ranks, and no harm that goes unseen."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from campaigns.trial import differences
from support.ranks import end_ranks, start_two_ranks
from support.tiny_runs import arguments, run

from cmae.errors import CmaeError
from cmae.model import load_model
from cmae.model.export.shards import METADATA, shards_of
from cmae.model.export.stored import CheckpointError, list_checkpoints, load_checkpoint
from cmae.train.checkpoints import shards as writing
from cmae.train.checkpoints.folder import SET_ASIDE, fault_of
from cmae.train.commands.main import main
from cmae.train.commands.weights.checkpoints import join

SHARDED = {"run.checkpoint_shards": "true"}


def files(out: Path) -> list[Path]:
    return list_checkpoints(out / "checkpoints")


@pytest.fixture(scope="module")
def whole(small_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of single files."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(small_shards, out)
    return out


@pytest.fixture
def sharded(small_shards: str, tmp_path: Path) -> Path:
    """A run in shards, stopped after six of its eight steps."""
    run(small_shards, tmp_path / "run", **SHARDED, **{"run.stop_at_step": 6})
    return tmp_path / "run"


def test_a_run_goes_on_from_shards_to_the_same_end(
    small_shards: str, sharded: Path, whole: Path
) -> None:
    assert [path.name for path in files(sharded)] == [f"step-0000000{n}.pt" for n in (2, 4, 6)]
    run(small_shards, sharded, **SHARDED)
    assert differences(sharded, whole) == []
    # Those that went took their shards along.
    assert sorted(path.name for path in (sharded / "checkpoints").glob("*.shards")) == [
        path.with_suffix(".shards").name for path in files(sharded)
    ]
    model, expected = load_model(sharded), load_model(whole)
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_single_files_and_shards_take_turns(small_shards: str, sharded: Path, whole: Path) -> None:
    run(small_shards, sharded, **{"run.stop_at_step": 7})
    assert not shards_of(files(sharded)[-1]).exists()
    run(small_shards, sharded, **SHARDED)
    assert shards_of(files(sharded)[-1]).is_dir()
    assert differences(sharded, whole) == []


def test_one_file_is_made_of_shards_and_a_run_goes_on_from_it(
    small_shards: str, sharded: Path, whole: Path, tmp_path: Path
) -> None:
    joined = tmp_path / "joined" / "six.pt"
    assert main(["checkpoint", "join", str(files(sharded)[-1]), str(joined)]) == 0
    assert fault_of(joined) == ""
    run(small_shards, tmp_path / "other", **{"run.resume": joined})
    ends = [load_checkpoint(files(out)[-1]) for out in (tmp_path / "other", whole)]
    for name, value in ends[1]["model"].items():
        assert torch.equal(ends[0]["model"][name], value), name
    assert main(["checkpoint", "join", str(joined), str(tmp_path / "again.pt")]) == 1


@pytest.mark.parametrize("harm", ["bit", "short", "missing", "table", "folder"])
def test_a_damaged_shard_is_found_and_the_checkpoint_before_it_taken(
    small_shards: str,
    sharded: Path,
    whole: Path,
    harm: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    newest = files(sharded)[-1]
    folder = shards_of(newest)
    part = folder / (METADATA if harm == "table" else "__0_0.distcp")
    data = bytearray(part.read_bytes())
    if harm == "folder":
        folder.rename(folder.with_name("elsewhere"))
    elif harm == "missing":
        part.unlink()
    else:
        data[len(data) // 2] ^= 1
        part.write_bytes(data[:-1] if harm == "short" else data)
    assert main(["checkpoint", "verify", str(sharded)]) == 1
    assert f"{folder.name}/" in capsys.readouterr().out
    with pytest.raises(CmaeError, match=r"is (damaged|incomplete): step-00000006\.shards/"):
        join(newest, sharded / "one.pt")
    run(small_shards, sharded, **SHARDED)
    aside = sharded / "checkpoints" / SET_ASIDE
    assert (aside / newest.name).exists()
    assert (aside / folder.name).exists() == (harm != "folder")
    assert differences(sharded, whole) == []


class Trap:
    """Pickles as a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_table_of_shards_cannot_have_anything_called(sharded: Path, tmp_path: Path) -> None:
    newest = files(sharded)[-1]
    (shards_of(newest) / METADATA).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(newest)
    assert not (tmp_path / "sprung").exists()


def test_a_write_that_fails_is_told_and_the_next_one_tries_again(
    small_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, calls = writing.save, []

    def save(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(writing, "save", save)
    outcome = run(small_shards, tmp_path / "run", **SHARDED)
    assert outcome.step == 8
    assert [path.name for path in files(tmp_path / "run")] == [
        f"step-0000000{n}.pt" for n in (2, 6, 8)
    ]
    assert "step-00000004.pt cannot be written: [Errno 28]" in capsys.readouterr().err
    calls.clear()
    with pytest.raises(CheckpointError, match="Errno 28"):
        run(small_shards, tmp_path / "short", **SHARDED, **{"run.checkpoint_patience_min": 0})


def test_what_a_killed_run_left_half_written_is_no_checkpoint(
    small_shards: str, sharded: Path, whole: Path
) -> None:
    newest = files(sharded)[-1]
    newest.unlink()  # the file comes last: shards without it are half a checkpoint
    run(small_shards, sharded, **SHARDED)
    assert differences(sharded, whole) == []


def test_prune_deletes_shards_too(sharded: Path) -> None:
    assert main(["checkpoint", "prune", str(sharded), "--keep", "1"]) == 0
    assert [path.name for path in sorted((sharded / "checkpoints").glob("step-*"))] == [
        "step-00000006.pt",
        "step-00000006.shards",
    ]


def test_a_mirror_is_refused(small_shards: str, tmp_path: Path) -> None:
    with pytest.raises(CmaeError, match=r"run\.checkpoint_shards"):
        run(small_shards, tmp_path, **SHARDED, **{"run.mirror": "s3://bucket/x"})


@pytest.mark.slow
def test_two_ranks_write_shards_that_any_other_run_goes_on_from(
    small_shards: str, tmp_path: Path
) -> None:
    """FSDP2 on two ranks, then ZeRO-1, then one process: beside two ranks of DDP with single files."""

    def train(out: Path, **settings: object) -> None:
        process = start_two_ranks("pretrain", *arguments(small_shards, out, **settings))
        try:
            _, errors = process.communicate(timeout=200)
        finally:
            end_ranks(process)
        assert process.returncode == 0, errors

    out, plain = tmp_path / "sharded", tmp_path / "plain"
    train(plain)
    train(out, **SHARDED, **{"speed.parallel": "fsdp", "run.stop_at_step": 3})
    (first, *_) = files(out)
    assert len(list(shards_of(first).glob("*.distcp"))) == 2
    train(out, **SHARDED, **{"speed.parallel": "zero1", "run.stop_at_step": 5})
    run(small_shards, out, **SHARDED)
    # Batch norm and AdamW make much of float32's rounding, so weights are compared in float64 elsewhere.
    assert differences(out, plain, rounding=1e-3) == []
