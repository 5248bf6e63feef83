"""A run whose checkpoints go to a store too: another machine goes on from there alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.remote_servers import FaultyServer, serve, serve_s3
from support.tiny_runs import run

from cmae.model.export.stored import CheckpointError, list_checkpoints
from cmae.pipeline.remote.client import RemoteConfig
from cmae.pipeline.remote.folder import RemoteFolder
from cmae.train.checkpoints import mirror
from cmae.train.checkpoints.mirror import fetch_newest, read_listing
from tests.campaigns.trial import differences


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "store").mkdir()
    with serve(tmp_path / "store") as server:
        yield server


def folder_of(server: FaultyServer, deadline_s: float = 20) -> RemoteFolder:
    return RemoteFolder(f"{server.url}/run", RemoteConfig(deadline_s=deadline_s))


def names(server: FaultyServer) -> list[str]:
    return [one.name for one in read_listing(folder_of(server))]


def assert_same_end(one: Path, other: Path) -> None:
    assert differences(one, other) == []
    records = map(json.loads, (one / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records] == list(range(1, 9))


def test_another_machine_ends_the_run_as_one_machine_would_have(
    small_shards: str, tmp_path: Path, server: FaultyServer
) -> None:
    settings = {"run.mirror": f"{server.url}/run", "run.keep_checkpoints": 2}
    run(small_shards, tmp_path / "first", **settings, **{"run.stop_at_step": 5})
    assert names(server)[-1] == "step-00000005.pt"
    assert not list((tmp_path / "first").rglob(".mirror-*"))
    server.fail("GET", "truncated")
    server.fail("checkpoints/", "reset")
    run(small_shards, tmp_path / "second", **settings)
    run(small_shards, tmp_path / "straight")
    assert_same_end(tmp_path / "second", tmp_path / "straight")
    assert names(server)[-1] == "step-00000008.pt"


def test_a_damaged_copy_is_passed_over_and_a_lost_one_named(
    small_shards: str, tmp_path: Path, server: FaultyServer, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"run.mirror": f"{server.url}/run"}
    for step in (4, 6):
        run(small_shards, tmp_path / "first", **settings, **{"run.stop_at_step": step})
    newest = server.folder / "run" / "checkpoints" / "step-00000006.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    notes: list[str] = []
    found = fetch_newest(folder_of(server), tmp_path / "second", note=notes.append)
    assert found is not None
    assert found.name == "step-00000004.pt"
    assert "step-00000006.pt is damaged, and passed over" in notes[0]
    for path in newest.parent.iterdir():
        path.write_bytes(b"rot")
    with pytest.raises(CheckpointError, match=r"newer checkpoints of .* are damaged"):
        fetch_newest(folder_of(server), tmp_path / "third")
    (server.folder / "run" / "checkpoints.json").write_text("{]")
    with pytest.raises(CheckpointError, match=r"checkpoints\.json is damaged"):
        fetch_newest(folder_of(server), tmp_path / "third")


def test_a_store_out_of_reach_never_makes_a_run_begin_anew(
    small_shards: str, tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_DEADLINE_S", 1.0)
    server.fail("checkpoints.json", "503", times=99)
    settings = {"run.mirror": f"{server.url}/run"}
    with pytest.raises(CheckpointError, match=r"run\.mirror cannot be read.*begin at step 0"):
        run(small_shards, tmp_path / "out", **settings)
    run(small_shards, tmp_path / "out", **{"run.stop_at_step": 3})
    notes: list[str] = []
    assert fetch_newest(folder_of(server, 1.0), tmp_path / "out", note=notes.append) is None
    assert "goes on from step-00000003.pt" in notes[0]
    run(small_shards, tmp_path / "out", **settings)  # the store takes nothing: the run ends well
    assert list_checkpoints(tmp_path / "out" / "checkpoints")[-1].name == "step-00000008.pt"


def test_a_branch_that_was_left_is_not_gone_on_with(
    small_shards: str, tmp_path: Path, server: FaultyServer
) -> None:
    settings = {"run.mirror": f"{server.url}/run", "run.keep_checkpoints": 9}
    for step in (2, 8):
        run(small_shards, tmp_path / "out", **settings, **{"run.stop_at_step": step})
    assert names(server)[-1] == "step-00000008.pt"
    start = tmp_path / "out" / "checkpoints" / "step-00000002.pt"
    shutil.copy(start, tmp_path / start.name)
    settings |= {"run.resume": tmp_path / start.name, "run.stop_at_step": 3}
    run(small_shards, tmp_path / "out", **settings)
    assert names(server) == ["step-00000002.pt", "step-00000003.pt"]


def test_what_is_here_is_newer_than_the_mirror(
    small_shards: str, tmp_path: Path, server: FaultyServer
) -> None:
    settings = {"run.mirror": f"{server.url}/run"}
    run(small_shards, tmp_path / "out", **settings, **{"run.stop_at_step": 3})
    run(small_shards, tmp_path / "out", **{"run.stop_at_step": 5})
    assert fetch_newest(folder_of(server), tmp_path / "out") is None


def test_a_mirror_in_s3(small_shards: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with serve_s3(tmp_path / "empty", "bucket") as options:
        words = {f"data.storage_options.{name}": value for name, value in options.items()}
        settings = {"run.mirror": "s3://bucket/runs/x", "run.keep_checkpoints": 1, **words}
        run(small_shards, tmp_path / "first", **settings, **{"run.stop_at_step": 5})
        folder = RemoteFolder("s3://bucket/runs/x", RemoteConfig(storage_options=options))
        assert [one.name for one in read_listing(folder)] == ["step-00000005.pt"]
        assert folder.read("checkpoints/step-00000004.pt", limit=1 << 30) is None  # deleted
        run(small_shards, tmp_path / "second", **settings)
    run(small_shards, tmp_path / "straight")
    assert_same_end(tmp_path / "second", tmp_path / "straight")
