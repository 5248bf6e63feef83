"""The machine around a command: home folder, encoding, what launchers leave in a shell, files to write."""

from __future__ import annotations

import io
import itertools
import json
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.profile_data import decode_bound
from support.tiny_runs import arguments, run

from cmae.errors import CmaeError
from cmae.model import build_model
from cmae.model.export.stored import list_checkpoints
from cmae.paths import expand_home
from cmae.pipeline import LoaderConfig
from cmae.pipeline.remote.client import RemoteConfig
from cmae.pipeline.remote.index import open_cache
from cmae.train import distributed
from cmae.train.batch_split import BatchSplit, check_norm_rows
from cmae.train.commands.main import main
from cmae.train.config import RunConfig
from cmae.train.config_parser import parse_config, read_recipe
from cmae.train.distributed import join_world, threads_per_rank
from cmae.train.loop.training import TrainingError
from cmae.train.loop.weights import save_model
from cmae.train.monitor.metrics import read_metrics
from cmae.train.tuning.config import TuneConfig

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user number without an account, as containers have it, and no HOME."""

    def unknown(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


class TestHome:
    @pytest.mark.usefixtures("no_home")
    def test_a_run_needs_no_home(self, small_shards: str, tmp_path: Path) -> None:
        outcome = run(small_shards, tmp_path, **{"optim.total_steps": 1, "run.image_every": 1})
        assert outcome.step == 1

    @pytest.mark.usefixtures("no_home")
    def test_a_path_in_a_home_that_is_not_there_is_one_line(
        self, small_shards: str, tmp_path: Path, capsys: Capture
    ) -> None:
        assert main(["pretrain", *arguments(small_shards, tmp_path), "--run.out=~/x"]) == 1
        error = capsys.readouterr().err
        assert "begins with ~, the home folder, but HOME is not set" in error
        assert error.count("\n") == 1
        with pytest.raises(CmaeError, match=r"or name one with data\.cache_dir"):
            open_cache(RemoteConfig())

    def test_a_tilde_means_the_home_in_every_path(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "r.yaml").write_text("run:\n  out: ~/runs\n  resume: ~/a.pt\n")
        assert read_recipe("~/r.yaml")["run"]["out"] == "~/runs"
        words = ["--recipe", "~/r.yaml", "--data.cache_dir", "~/cache", "--init_from=~/w.pt"]
        config = parse_config(words)
        assert config.run == RunConfig(out=tmp_path / "runs", resume=str(tmp_path / "a.pt"))
        assert config.init_from == tmp_path / "w.pt"
        assert config.data.cache_dir == tmp_path / "cache"
        assert LoaderConfig(cache_dir=Path("~/c")).cache_dir == tmp_path / "c"
        assert TuneConfig(out=Path("~/t.yaml")).out == tmp_path / "t.yaml"
        assert expand_home("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")

    def test_a_tilde_means_the_home_in_the_paths_of_commands(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        for words in (["top", "~/gone"], ["profile", "show", "~/gone"], ["export", "~/gone", "x"]):
            assert main(words) == 1
            assert str(tmp_path / "gone") in capsys.readouterr().err
        assert not (tmp_path / "~").exists()


class TestSinks:
    @pytest.mark.parametrize(
        ("name", "is_folder", "warning"),
        [
            ("config.yaml", True, "config.yaml cannot be written"),
            ("metrics.jsonl", True, "metrics.jsonl cannot be written"),
            ("tensorboard", False, "TensorBoard: output failed"),
            ("live", False, "`cmae top` has no news of this run"),
            ("images", False, "images: output failed"),
            ("loss.png", True, "images: output failed"),
            ("output.log", True, ""),
        ],
    )
    def test_what_training_does_not_need_costs_one_warning(
        self,
        name: str,
        is_folder: bool,
        warning: str,
        small_shards: str,
        tmp_path: Path,
        capsys: Capture,
    ) -> None:
        obstacle = tmp_path / name
        if is_folder:
            obstacle.mkdir()
        else:
            obstacle.write_text("in the way")
        outcome = run(small_shards, tmp_path, **{"optim.total_steps": 3, "run.image_every": 1})
        assert outcome.step == 3
        assert list_checkpoints(tmp_path / "checkpoints")
        error = capsys.readouterr().err
        assert error.count("warning:") == bool(warning)
        assert warning in error

    def test_a_folder_that_takes_no_checkpoint_is_refused_at_the_start(
        self, small_shards: str, tmp_path: Path, capsys: Capture
    ) -> None:
        (tmp_path / "checkpoints").write_text("in the way")
        assert main(["pretrain", *arguments(small_shards, tmp_path)]) == 1
        error = capsys.readouterr().err
        assert str(tmp_path / "checkpoints") in error
        assert error.count("\n") == 1

    def test_a_clock_that_runs_backwards_changes_nothing(
        self, small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(small_shards, tmp_path / "a", **{"optim.total_steps": 3})
        start = time.time()
        ticks = itertools.count()
        monkeypatch.setattr(time, "time", lambda: start - 3600.0 * next(ticks))
        run(small_shards, tmp_path / "b", **{"optim.total_steps": 3})
        monkeypatch.undo()
        totals = [
            [record["total"] for record in read_metrics(tmp_path / name / "metrics.jsonl")]
            for name in "ab"
        ]
        assert totals[0] == totals[1]


ASCII = {"PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class TestEncoding:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "command",
        ["doctor", "top", "bench", "shards inspect", "shards verify", "pretrain", "profile show"],
    )
    def test_every_command_runs_in_an_ascii_locale(
        self, command: str, small_shards: str, tmp_path: Path
    ) -> None:
        """A folder's name is UTF-8 here: in that locale Python has no characters for it."""
        out = tmp_path / "räum█"
        folder = tmp_path / "daten→"
        folder.symlink_to(Path(small_shards).parent)
        rest: dict[str, Callable[[], list[str]]] = {
            "doctor": list,
            "bench": lambda: ["--recipe", "demo"],
            "pretrain": lambda: arguments(str(folder), out, **{"optim.total_steps": 1}),
            "shards inspect": lambda: [str(folder)],
            "shards verify": lambda: [str(folder)],
            "top": lambda: [str(out), "--once"],
            "profile show": lambda: [str(out / "profile.json"), "--html", str(out / "ü.html")],
        }
        if command == "top":
            run(small_shards, out, **{"optim.total_steps": 1})
        if command == "profile show":
            decode_bound().save(out / "profile.json")
        words = [sys.executable, "-m", "cmae.train", *command.split(), *rest[command]()]
        done = subprocess.run(
            words,
            capture_output=True,
            env={**os.environ, **ASCII, "LC_ALL": "C"},
            check=False,
            timeout=300,
        )
        printed = (done.stdout + done.stderr).decode("ascii")
        assert done.returncode == 0, printed
        assert "Traceback" not in printed

    def test_a_terminal_without_blocks_gets_other_characters(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decode_bound().save(tmp_path / "profile.json")
        shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
        monkeypatch.setattr(sys, "stdout", shown)
        assert main(["profile", "show", str(tmp_path / "profile.json")]) == 0
        assert shown.errors == "strict"  # as it was before
        shown.seek(0)
        text = shown.read()
        assert "####" in text
        assert "\\u" not in text

    def test_a_path_that_is_no_utf_8_is_a_path(self) -> None:
        name = os.fsdecode(b"runs/\xff\xfe")
        assert parse_config(["--run.out", name]).run.out == Path(name)


class TestLauncher:
    @pytest.fixture(autouse=True)
    def bare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (
            "WORLD_SIZE",
            "RANK",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            monkeypatch.delenv(name, raising=False)

    @pytest.mark.parametrize(
        ("left", "match"),
        [
            ({"WORLD_SIZE": "4"}, "but RANK, MASTER_ADDR, MASTER_PORT not set: start the ranks"),
            ({"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "a"}, "but MASTER_PORT not set"),
            ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four' in the environment; it must be a whole"),
            (
                {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
                "RANK is 2, WORLD_SIZE 2",
            ),
            (
                {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "99999"},
                "MASTER_PORT 99999",
            ),
        ],
    )
    def test_what_no_launcher_sets_is_refused_at_once(
        self, left: dict[str, str], match: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in left.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(CmaeError, match=match), join_world("cpu"):
            pass

    def test_ranks_that_do_not_come_are_named_while_and_when_nobody_waits_any_more(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        left = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        for name, value in left.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "_PATIENCE_S", 0.05)
        with (
            pytest.raises(CmaeError, match=r"rank 1 waits for 1 other.*They did not come"),
            join_world("cpu", timeout_s=1.0),
        ):
            pass
        assert any("unset them" in message for message in caplog.messages)

    def test_a_single_rank_looks_at_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "7")
        with join_world("cpu") as world:
            assert (world.rank, world.world_size) == (0, 1)
        assert threads_per_rank() == len(os.sched_getaffinity(0))


class TestBeforeTheWork:
    @pytest.mark.parametrize(
        "words",
        [
            ["reconstruct", "{weights}", "{image}", "--out", "{tmp}/pic"],
            ["shards", "inspect", "{shards}", "--sheet", "{tmp}/pic.jpg"],
        ],
        ids=" ".join,
    )
    def test_a_picture_without_the_ending_is_refused(
        self, words: list[str], small_shards: str, tmp_path: Path, capsys: Capture
    ) -> None:
        names = {"weights": "w.pt", "image": "i.png", "shards": small_shards, "tmp": tmp_path}
        assert main([word.format(**names) for word in words]) == 1
        assert "the name must end in .png, for instance" in capsys.readouterr().err

    @pytest.mark.parametrize("place", ["folder", "file/below"])
    @pytest.mark.parametrize(
        "words",
        [
            ["profile", "show", "gone", "--html", "{place}"],
            ["export", "gone", "{place}"],
            ["import", "gone", "{place}"],
        ],
        ids=" ".join,
    )
    def test_a_file_that_cannot_be_written_is_refused(
        self, words: list[str], place: str, tmp_path: Path, capsys: Capture
    ) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("")
        assert main([word.format(place=tmp_path / place) for word in words]) == 1
        error = capsys.readouterr().err
        assert "a folder: name a file in it" in error or "no folder that can be written" in error

    def test_one_image_is_too_few_for_a_batch_norm(
        self, small_shards: str, tmp_path: Path, capsys: Capture
    ) -> None:
        one = arguments(small_shards, tmp_path, **{"speed.micro_batch_size": 1})
        assert main(["pretrain", *one]) == 1
        assert "speed.micro_batch_size is 1 and there is one rank" in capsys.readouterr().err
        assert main(["profile", *one]) == 1
        assert "speed.micro_batch_size is 1 and there is one rank" in capsys.readouterr().err
        layer = {"speed.micro_batch_size": 1, "model.head_norm": "layer", "optim.total_steps": 1}
        assert run(small_shards, tmp_path, **layer).step == 1
        model = parse_config(one).model
        check_norm_rows(model, BatchSplit(1, 4), 2)
        with pytest.raises(CmaeError, match=r"optim\.global_batch_size is 1"):
            check_norm_rows(model, BatchSplit(1, 1), 1)

    @pytest.mark.parametrize(
        ("words", "match"),
        [
            (["bench", "--recipe", "demo", "--batch_size", "0"], "--batch_size is 0; it must be"),
            (["top", "x", "--every_s", "-1"], "--every_s is -1.0; it must be between"),
            (["shards", "index", "{shards}", "--workers", "0"], "workers is 0; it must be >= 1"),
            (["shards", "inspect", "{shards}", "--columns", "0"], "--columns is 0; it must be"),
            (["shards", "inspect", "{shards}", "--num_images", "0"], "--num_images is 0; it"),
        ],
    )
    def test_a_nought_is_refused_by_name(
        self, words: list[str], match: str, small_shards: str, capsys: Capture
    ) -> None:
        assert main([word.format(shards=small_shards) for word in words]) == 1
        assert match in capsys.readouterr().err

    @pytest.mark.parametrize("gpu", ["H100", "h100"])
    def test_a_gpu_is_known_in_any_case(self, gpu: str, tmp_path: Path, capsys: Capture) -> None:
        words = ["bench", "--recipe", "demo", "--gpu", gpu, "--results", str(tmp_path)]
        assert main(words) == 0
        assert "on h100:" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "content",
        [
            "{",
            "[" * 100_000,
            "[]",
            '{"machine": {"device": "NVIDIA H100 80GB"}, "rows": 3}',
            '{"machine": {"device": "NVIDIA H100 80GB"}, "rows": [3]}',
            '{"machine": {"device": "NVIDIA H100 80GB"}, '
            '"rows": [{"batch_size": 128, "images_per_s": 3}]}',
        ],
        ids=lambda content: content[-20:],
    )
    def test_a_broken_result_file_is_one_line(
        self, content: str, tmp_path: Path, capsys: Capture
    ) -> None:
        path = tmp_path / "2026_step_x.json"
        path.write_text(content)
        assert main(["bench", "--recipe", "demo", "--results", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert f"{path} is no result of `cmae bench step`" in error
        assert error.count("\n") == 1


class TestNotFinite:
    """Weights that are not finite: no gradient is."""

    @pytest.fixture
    def broken(self, small_shards: str, tmp_path: Path) -> list[str]:
        config = parse_config(arguments(small_shards, tmp_path))
        model = build_model(config.model, seed=0)
        model.encoder.norm.weight.data.fill_(3e38)  # finite, but no product with it is
        save_model(model, tmp_path / "broken.pt")
        changes = {"optim.max_skipped_steps": 2, "init_from": tmp_path / "broken.pt"}
        return arguments(small_shards, tmp_path / "run", **changes)

    def test_the_advice_names_no_checkpoint_that_is_not_there(
        self, broken: list[str], tmp_path: Path, capsys: Capture
    ) -> None:
        assert main(["pretrain", *broken]) == 1
        error = capsys.readouterr().err
        assert (
            "There is no checkpoint of it yet: start again with a lower optim.lr_per_256" in error
        )
        skipped = (tmp_path / "run" / "skipped_steps.rank0.jsonl").read_text().splitlines()
        assert [json.loads(line)["after_step"] for line in skipped] == [0, 0]

    def test_the_advice_names_the_checkpoint_that_is(
        self, small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from cmae.train.loop.step import TrainStep

        step = TrainStep.backward

        def backward(self: TrainStep, batches: object) -> object:
            losses = step(self, batches)
            if list_checkpoints(tmp_path / "checkpoints"):
                next(self.model.parameters()).grad.fill_(float("nan"))
            return losses

        monkeypatch.setattr(TrainStep, "backward", backward)
        with pytest.raises(
            TrainingError, match=r"checkpoint, .*/step-\d+\.pt, is from before"
        ) as stop:
            run(small_shards, tmp_path, **{"optim.max_skipped_steps": 2})
        assert str(list_checkpoints(tmp_path / "checkpoints")[-1]) in str(stop.value)
