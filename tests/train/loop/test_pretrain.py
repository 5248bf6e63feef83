"""Whole runs: resume bit for bit, kill at any moment, stop on signals, refuse what does not fit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from support.tiny_runs import MODEL, arguments, run

from cmae.model import ModelConfig, build_model, load_model
from cmae.model.export.stored import list_checkpoints, load_checkpoint
from cmae.pipeline.shards.originals.image_folder import scan_image_folder
from cmae.pipeline.shards.write import write_shards
from cmae.train.checkpoints.lock import hold_folder
from cmae.train.commands.main import main
from cmae.train.loop.training import StopSignals
from cmae.train.loop.weights import save_model
from cmae.train.monitor.metrics import read_metrics


def losses(out: Path) -> list[tuple[float, float, float]]:
    records = read_metrics(out / "metrics.jsonl")
    return [(record["step"], record["total"], record["lr"]) for record in records]


@pytest.fixture(scope="module")
def whole_run(small_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps over 5-step epochs that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    outcome = run(small_shards, out)
    assert (outcome.step, outcome.exit_code) == (8, 0)
    return out


def assert_same_run(out: Path, whole_run: Path) -> None:
    assert losses(out) == losses(whole_run)
    found = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    expected = load_checkpoint(list_checkpoints(whole_run / "checkpoints")[-1])
    assert found["loader"] == expected["loader"]
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name


def test_a_run_leaves_what_the_readme_says(whole_run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "first_batch.png", "loss.png"):
        assert (whole_run / name).stat().st_size > 0
    assert list((whole_run / "tensorboard").iterdir())
    assert [step for step, _, _ in losses(whole_run)] == list(range(1, 9))


@pytest.mark.parametrize("cut", [3, 5])  # inside the first epoch, and at its end
def test_a_resumed_run_continues_bit_for_bit(
    small_shards: str, whole_run: Path, tmp_path: Path, cut: int
) -> None:
    first = run(small_shards, tmp_path, **{"run.stop_at_step": cut})
    assert first.step == cut
    assert run(small_shards, tmp_path).step == 8
    assert_same_run(tmp_path, whole_run)


def test_a_finished_run_has_nothing_to_do(small_shards: str, whole_run: Path) -> None:
    outcome = run(small_shards, whole_run)
    assert (outcome.step, outcome.checkpoint) == (8, None)


def test_another_architecture_is_refused(
    small_shards: str, whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["pretrain", *arguments(small_shards, whole_run, **{"model.depth": 2})])
    assert code == 1
    error = capsys.readouterr().err
    assert "model.depth: 1 in the checkpoint, 2 now" in error
    assert "Traceback" not in error


def test_a_batch_larger_than_the_data_is_refused(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"optim.global_batch_size": 64}
    assert main(["pretrain", *arguments(small_shards, tmp_path, **overrides)]) == 1
    error = capsys.readouterr().err
    assert "64" in error
    assert "40" in error


def test_mae_trains_on_one_view(small_shards: str, tmp_path: Path) -> None:
    outcome = run(
        small_shards,
        tmp_path,
        **{
            "model.contrastive_loss": "none",
            "data.views.num_views": 1,
            "optim.total_steps": 2,
        },
    )
    assert outcome.step == 2
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["contrastive_raw"] == 0
    assert records[-1]["total"] == pytest.approx(records[-1]["reconstruction"])
    record = records[-1]
    assert record["grad_norm"] > 0
    assert record["host_gib"] > 0
    assert record["images_per_s_per_rank"] == record["images_per_s"]
    assert record["tflops_per_rank"] > 0
    assert "mfu_pct" not in record  # nobody states a CPU's rate
    assert "loss_scale" not in record


def start(shards: str, out: Path, *launcher: str, **overrides: object) -> subprocess.Popen[str]:
    command = [*(launcher or (sys.executable, "-m", "cmae.train"))]
    command += ["pretrain", *arguments(shards, out, **overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(process: subprocess.Popen[str], out: Path) -> None:
    deadline = time.monotonic() + 180
    while not list_checkpoints(out / "checkpoints"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_nine_loses_nothing_but_time(
    small_shards: str, whole_run: Path, tmp_path: Path
) -> None:
    process = start(small_shards, tmp_path, **{"run.checkpoint_every": 1})
    wait_for_checkpoint(process, tmp_path)
    process.kill()
    process.wait()
    run(small_shards, tmp_path)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 75),
        (signal.SIGHUP, 75),
        (signal.SIGUSR1, 75),
        (signal.SIGUSR2, 75),
        (signal.SIGXCPU, 75),
    ],
)
def test_signals_write_a_checkpoint_and_exit_for_requeue(
    small_shards: str, tmp_path: Path, number: int, code: int
) -> None:
    process = start(small_shards, tmp_path, **{"optim.total_steps": 100000})
    wait_for_checkpoint(process, tmp_path)
    process.send_signal(number)
    try:
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()  # one that goes on would take the time of all other tests
    assert process.returncode == code, error
    assert "run the same command again" in error
    last = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert last["step"] == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.number == signal.SIGUSR2
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_a_run_outlives_its_terminal(small_shards: str, tmp_path: Path) -> None:
    process = start(small_shards, tmp_path)
    process.stderr.close()  # as a `tee` does that Ctrl-C has ended
    assert process.wait(timeout=180) == 0
    assert load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])["step"] == 8
    printed = (tmp_path / "output.log").read_text()
    assert "the terminal or pipe is gone" in printed
    assert "done: step 8" in printed


def steps(out: Path) -> list[int]:
    return [load_checkpoint(path)["step"] for path in list_checkpoints(out / "checkpoints")]


def test_a_roll_back_keeps_what_it_writes_and_sets_aside_what_it_leaves(
    small_shards: str, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    often = {"run.checkpoint_every": 1, "run.keep_checkpoints": 3}
    run(small_shards, tmp_path, **often)
    assert steps(tmp_path) == [6, 7, 8]
    back = often | {"run.resume": tmp_path / "checkpoints" / "step-00000006.pt"}
    capsys.readouterr()
    outcome = run(small_shards, tmp_path, **back, **{"run.stop_at_step": 7})
    assert outcome.checkpoint.is_file()
    assert steps(tmp_path) == [6, 7]
    aside = tmp_path / "checkpoints" / "set-aside"
    assert [path.name for path in list_checkpoints(aside)] == [
        "step-00000007.pt",
        "step-00000008.pt",
    ]
    assert capsys.readouterr().err.count("set aside") == 2
    # The same command again goes on with its own, and a plain one as well.
    assert run(small_shards, tmp_path, **back, **{"run.stop_at_step": 7}).checkpoint is None
    assert "it comes from" in capsys.readouterr().err
    run(small_shards, tmp_path, **often)
    assert steps(tmp_path) == [6, 7, 8]
    assert len(list_checkpoints(aside)) == 2
    assert_same_run(tmp_path, whole_run)


def test_a_truncated_newest_checkpoint_does_not_stop_a_restart(
    small_shards: str, whole_run: Path, tmp_path: Path
) -> None:
    run(small_shards, tmp_path, **{"run.stop_at_step": 4})
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:5000])
    assert run(small_shards, tmp_path).step == 8
    assert_same_run(tmp_path, whole_run)


def test_a_second_run_in_one_folder_is_refused(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold_folder(tmp_path / "checkpoints"):
        assert main(["pretrain", *arguments(small_shards, tmp_path)]) == 1
    assert "another run (process" in capsys.readouterr().err


def test_pictures_that_cannot_be_drawn_cost_a_warning(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").write_text("in the way")
    outcome = run(small_shards, tmp_path, **{"run.image_every": 2, "optim.total_steps": 4})
    assert outcome.step == 4
    assert capsys.readouterr().err.count("images: output failed") == 1


def test_weights_alone_start_a_run_but_do_not_resume_one(
    small_shards: str, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.pt"
    trained = load_model(list_checkpoints(whole_run / "checkpoints")[-1])
    save_model(trained, weights)
    overrides = {"run.resume": weights, "run.out": tmp_path / "a"}
    assert main(["pretrain", *arguments(small_shards, tmp_path, **overrides)]) == 1
    assert "--init_from" in capsys.readouterr().err
    # Another temperature is another loss, not another network.
    changed = {"init_from": weights, "model.temperature": 0.2, "optim.total_steps": 1}
    run(small_shards, tmp_path / "b", **changed, **{"optim.lr_per_256": 1e-12})
    started = load_checkpoint(list_checkpoints(tmp_path / "b" / "checkpoints")[-1])["model"]
    for name, value in trained.encoder.state_dict().items():
        torch.testing.assert_close(started[f"encoder.{name}"], value, msg=name)


def test_mae_weights_start_a_cmae_run_with_a_target_of_their_own(
    small_shards: str, tmp_path: Path
) -> None:
    model = build_model(ModelConfig(**MODEL, contrastive_loss="none"), seed=5)
    save_model(model, tmp_path / "mae.pt")
    changed = {"init_from": tmp_path / "mae.pt", "optim.total_steps": 1}
    run(small_shards, tmp_path / "run", **changed, **{"optim.lr_per_256": 1e-12})
    started = load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])["model"]
    weight = model.encoder.blocks[0].attn.qkv.weight
    torch.testing.assert_close(started["target_encoder.blocks.0.attn.qkv.weight"], weight)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_of_them_alike(small_shards: str, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    launcher = (*torchrun, "--nproc-per-node", "2", "-m", "cmae.train")
    overrides = {"optim.total_steps": 100000, "data.num_threads": 1}
    process = start(small_shards, tmp_path, *launcher, **overrides)
    wait_for_checkpoint(process, tmp_path)
    ranks = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "cmae.train" in child.cmdline()
    ]
    ranks[1].send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert re.search(r"exitcode\s*: 75", error), error
    assert "run the same command again" in error  # said by the rank that got no signal
    last = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    assert last["step"] == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]


@pytest.mark.slow
def test_two_ranks_continue_a_run_of_one(
    small_shards: str, whole_run: Path, tmp_path: Path
) -> None:
    run(small_shards, tmp_path, **{"run.stop_at_step": 4})
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    launcher = (*torchrun, "--nproc-per-node", "2", "-m", "cmae.train")
    process = start(small_shards, tmp_path, *launcher, **{"data.num_threads": 1})
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    found = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    expected = load_checkpoint(list_checkpoints(whole_run / "checkpoints")[-1])
    assert found["loader"] == expected["loader"]
    for (_, total, _), (_, expected_total, _) in zip(
        losses(tmp_path), losses(whole_run), strict=True
    ):
        assert total == pytest.approx(expected_total, rel=1e-3)


def test_a_run_on_pre_resized_shards_says_so_at_its_start(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "train"
    write_shards(scan_image_folder(images), shards, max_size=20, quality=50)
    run(str(shards), tmp_path / "run", **{"optim.total_steps": 1})
    opening = capsys.readouterr().err.split("step 1/1")[0].replace("\n", " ")
    assert "not the original files: 24 of 24 images downscaled (max_size 20, quality 50)" in opening
