"""The command `cmae`: what it costs to ask for help, and what it says of errors."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import cmae
from cmae.errors import CmaeError
from cmae.train.commands import registry
from cmae.train.commands.main import main
from cmae.train.commands.registry import COMMANDS, Command


def cpu_seconds(*arguments: str) -> float:
    """CPU time of `cmae`, user and system; the least of two, for a first one may compile modules."""
    costs = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "cmae.train", *arguments],
            capture_output=True,
            check=True,
            timeout=120,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(costs)


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [
        (["--help"], 0.3),
        (["shards", "--help"], 0.3),
        (["shards", "index", "--help"], 1.0),
        (["top", "--help"], 1.0),
        (["import", "--help"], 1.0),
        (["pretrain", "--help"], 2.0),
        (["tune", "--help"], 2.0),
        (["profile", "--help"], 2.0),
    ],
)
def test_help_costs_little(arguments: list[str], limit: float) -> None:
    assert cpu_seconds(*arguments) < limit


def leaves(commands: dict[str, Command]) -> list[list[str]]:
    return [
        [name, *rest]
        for name, command in commands.items()
        for rest in (leaves(command.commands) or [[]])
    ]


@pytest.mark.parametrize(
    "words", [*leaves(COMMANDS), ["profile", "show"], ["profile", "diff"], ["shards"]], ids=" ".join
)
def test_every_command_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    assert f"usage: cmae {' '.join(words)}" in capsys.readouterr().out


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"cmae {cmae.__version__}\n"


def test_an_unknown_command_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "did you mean 'pretrain'" in capsys.readouterr().err
    assert main(["shards", "indx"]) == 2
    assert "did you mean 'index'" in capsys.readouterr().err


def test_a_missing_argument_is_an_error_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cmae top: error: ")
    assert "see `cmae top --help`" in error


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def build(parser: object) -> registry.Run:
        def run(parsed: object) -> int:
            raise error

        return run

    monkeypatch.setitem(COMMANDS, "doctor", Command("", build))


def test_an_error_of_ours_is_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, CmaeError(key="a.b", found=3, allowed="< 3", repair="take 2"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err == "cmae doctor: error: a.b is 3; it must be < 3: take 2\n"


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("x"), OSError("x"), KeyError("x")])
def test_every_other_exception_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["doctor"])


def test_one_rank_prints_what_all_have_met(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class EverywhereError(CmaeError):
        is_on_every_rank = True

    line = "cmae doctor: error: lost\n"
    # A rank that was left in the shell is no reason for silence.
    for world_size, rank, printed in (("2", "0", line), ("2", "1", ""), ("1", "1", line)):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        monkeypatch.setenv("RANK", rank)
        fail_with(monkeypatch, EverywhereError("lost"))
        assert main(["doctor"]) == 1
        assert capsys.readouterr().err == printed


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "cmae doctor: interrupted\n"


SHOW = [sys.executable, "-m", "cmae.train", "bench", "--recipe", "demo", "--json"]


def test_a_reader_that_has_enough_ends_a_command_that_only_shows() -> None:
    process = subprocess.Popen(SHOW, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (1, "")


def test_an_answer_that_a_full_disk_loses_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(SHOW, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "cmae bench: error: [Errno 28] No space left on device\n",
    )


def test_closed_standard_streams_get_no_other_files_output(tmp_path: Path) -> None:
    program = (
        "import os\n"
        "for number in (0, 1, 2): os.close(number)\n"
        "import sys\n"
        "sys.stdout = sys.stderr = None\n"
        "from cmae.train.commands.main import main\n"
        "code = main(['bench', '--recipe', 'demo'])\n"
        f"first = os.open({str(tmp_path / 'first')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "os._exit(code if first > 2 else 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0


def test_an_error_names_the_command_inside_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "inspect", "/no/such.tar"]) == 1
    assert capsys.readouterr().err.startswith("cmae shards inspect: error: ")
