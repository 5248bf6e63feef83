"""`cmae launch`: where the command begins, and exit codes that torchrun would hide."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from support.ranks import start_two_ranks
from support.tiny_runs import arguments
from torch.distributed.run import get_args_parser

from cmae.train.commands.launch import command_place
from cmae.train.commands.main import main


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("pretrain --recipe demo", 0),
        ("--nproc-per-node 8 pretrain --recipe demo", 2),
        ("--nproc-per-node=8 pretrain", 1),
        ("--nnodes 2 --node_rank 1 --standalone pretrain", 5),
        ("--standalone finetune --nproc-per-node 3", 1),
        ("--nproc-per-node 8", None),
        ("", None),
    ],
)
def test_the_command_begins_after_torchruns_flags(words: str, place: int | None) -> None:
    assert command_place(words.split(), get_args_parser()._option_string_actions) == place


def test_a_command_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--nproc-per-node", "2"]) == 1
    assert "name a command after torchrun's flags" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wrong_flag_ends_with_2_as_without_it() -> None:
    process = start_two_ranks("pretrain", "--no.such", "1")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "there is no option --no.such" in errors
    assert "exit code 2" in errors.splitlines()[-1]


@pytest.mark.slow
def test_a_stopped_run_ends_with_75(small_shards: str, tmp_path: Path) -> None:
    words = arguments(small_shards, tmp_path, **{"optim.total_steps": 1_000_000})
    process = start_two_ranks("pretrain", *words)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert list((tmp_path / "checkpoints").glob("step-*.pt"))
