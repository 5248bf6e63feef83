"""`cmae checkpoint ls | verify | prune` on the checkpoints of a real run."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_runs import run

from cmae.model.export.stored import list_checkpoints
from cmae.train.checkpoints.lock import hold_folder
from cmae.train.commands.main import main


@pytest.fixture
def trained(small_shards: str, tmp_path: Path) -> Path:
    run(small_shards, tmp_path / "run", **{"run.keep_checkpoints": 9})
    return tmp_path / "run"


def names(folder: Path) -> list[int]:
    return [int(path.stem[-8:]) for path in list_checkpoints(folder / "checkpoints")]


def test_checkpoints_are_listed_verified_and_pruned(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "verify", str(trained)]) == 0
    assert "all are whole" in capsys.readouterr().out
    damaged = trained / "checkpoints" / "step-00000008.pt"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 4
    damaged.write_bytes(data)
    assert main(["checkpoint", "verify", str(trained), str(damaged)]) == 1
    printed = capsys.readouterr().out
    assert "step-00000008.pt: " in printed
    assert "2 of 5 are not whole" in printed
    assert main(["checkpoint", "ls", str(trained)]) == 0
    assert "step-00000006.pt" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(trained), "--keep", "1"]) == 1
    assert "nothing is deleted" in capsys.readouterr().err
    assert main(["checkpoint", "prune", str(trained), "--keep", "2", "--dry_run", "true"]) == 0
    assert names(trained) == [2, 4, 6, 8]
    assert main(["checkpoint", "prune", str(trained), "--keep", "2", "--keep_every", "4"]) == 0
    assert names(trained) == [4, 6, 8]
    assert "1 checkpoint(s)" in capsys.readouterr().out


def test_a_run_that_goes_on_is_not_pruned(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold_folder(trained / "checkpoints"):
        assert main(["checkpoint", "prune", str(trained), "--keep", "1"]) == 1
    assert "another run" in capsys.readouterr().err
    assert len(names(trained)) == 4


def test_a_folder_without_checkpoints_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["ls"], ["verify"], ["prune"]):
        assert main(["checkpoint", *words, str(tmp_path)]) == 1
        assert "holds no checkpoints" in capsys.readouterr().err
