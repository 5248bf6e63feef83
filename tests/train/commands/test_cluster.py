"""`cmae doctor --all_ranks`: differences between machines, a folder that is not shared, rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.ranks import start_two_ranks

from cmae.train.commands.cluster import RankReport, all_reduce_rate, find_problems
from cmae.train.commands.main import main
from cmae.train.distributed import World

FACTS = {"torch": "2.14.1", "driver": "580.1", "GPU": "A100", "cores": "64", "/dev/shm": "32.0 GiB"}


def report(
    host: str, rank: int, *, read: float | None = None, runs: str = "", **facts: str
) -> RankReport:
    return RankReport(host, rank, FACTS | facts, read, runs)


def test_equal_nodes_have_no_problems() -> None:
    assert find_problems([report("a", 0, read=900.0), report("b", 1, read=800.0)]) == ([], [])


def test_versions_must_agree_and_sizes_should() -> None:
    failures, warnings = find_problems(
        [report("a", 0), report("b", 1, torch="2.13.0"), report("c", 2, cores="32")]
    )
    assert failures == ["torch differs: 2.14.1 on a, c; 2.13.0 on b"]
    assert warnings == ["cores differs: 64 on a, b; 32 on c"]


def test_a_node_that_reads_slowly_is_named() -> None:
    reports = [report("a", 0, read=900.0), report("b", 1, read=880.0), report("c", 2, read=200.0)]
    assert find_problems(reports)[1] == ["c, rank 2 reads 200 MB/s, the median is 880"]


def test_a_folder_that_is_not_shared_is_a_failure() -> None:
    (failure,) = find_problems(
        [report("a", 0), report("b", 1, runs="cannot be written: Read-only")]
    )[0]
    assert failure == "b, rank 1: the folder of runs cannot be written: Read-only"


def test_one_rank_has_no_all_reduce() -> None:
    assert all_reduce_rate(World(0, 1, torch.device("cpu"))) is None


def test_flags_of_all_ranks_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--runs", "/tmp"]) == 1
    assert "--all_ranks" in capsys.readouterr().err


def test_alone_it_looks_at_this_machine(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["doctor", "--all_ranks", "--shards", small_shards, "--runs", str(tmp_path / "runs")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "1 ranks" in printed
    assert "MB/s" in printed
    assert printed.rstrip().endswith("ready")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_two_ranks_measure_their_all_reduce_and_share_a_folder(tmp_path: Path) -> None:
    process = start_two_ranks("doctor", "--all_ranks", "--runs", str(tmp_path))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "over gloo" in printed
    assert "GB/s" in printed
    assert list(tmp_path.iterdir()) == []
