"""Names that somebody else chose are shown as they are, and can neither forge a line nor end a command."""

from __future__ import annotations

import io
import json
import logging
import re
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table
from support.pipeline_data import jpeg
from support.profile_data import decode_bound
from support.tiny_runs import arguments

from cmae.errors import CmaeError
from cmae.pipeline.bad_samples import BadSample, Health, NoGoodSamplesError, describe_bad
from cmae.train.commands.main import main
from cmae.train.monitor.console import PlainConsole, labelled
from cmae.train.monitor.metrics import Display
from cmae.train.profiling.analysis.records import Component, Diagnosis

ROOT = Path(__file__).resolve().parents[3]
FORGED = "no problem in 5 samples"
HOSTILE = f"[/x][bold]:car:\x1b[2J\x9b1m\n{FORGED}\r\u202e\u2066\x07"
"""Markup that would end a command, an emoji code, escape sequences, a line of its own, turned writing."""
SPELLED = r"[/x][bold]:car:\x1b[2J\x9b1m\n"


def photo(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    return jpeg(pixels)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder of shards whose keys, classes and settings are hostile."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(16):
            data = photo(number) if number else b"no image"
            for name, content in (
                (f"{HOSTILE}{number}.jpg", data),
                (f"{HOSTILE}{number}.cls", b"0"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        tar.addfile(tarfile.TarInfo(f"{HOSTILE}.heic"))
    (folder / "classes.json").write_text(json.dumps([HOSTILE, "b"]))
    facts = {"settings": {"max_size": HOSTILE}, "presized": {HOSTILE: 3}, "num_samples": 16}
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


def check(captured: pytest.CaptureResult[str]) -> str:
    """All that was printed, in which no line is anybody else's."""
    text = captured.out + captured.err
    for line in text.split("\n"):
        # rich's own styles, of which a captured stream gets none, would be seen here too.
        assert line.isprintable(), line
        assert not line.startswith(FORGED), line
    return text


def test_the_shard_commands_show_hostile_names_as_they_are(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shards", "index", str(hostile)]) == 0
    check(capsys.readouterr())
    assert main(["shards", "verify", str(hostile)]) == 1
    assert SPELLED in check(capsys.readouterr())
    assert main(["shards", "inspect", str(hostile), "--sheet", str(tmp_path / "x.png")]) == 0
    # Cells are folded, so the name stands in several lines.
    assert "[/x][bold]:car:" in re.sub(r"[│\s]", "", check(capsys.readouterr()))
    assert main(["shards", "repair", str(hostile), str(tmp_path / "clean")]) == 0
    check(capsys.readouterr())


def test_a_run_and_top_show_hostile_names_as_they_are(
    hostile: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "[exp1]" / HOSTILE.replace("/", "|")
    overrides = {"optim.total_steps": 1, "data.source": "stream", "data.max_bad_fraction": 1}
    assert main(["pretrain", *arguments(str(hostile), out, **overrides)]) == 0
    text = check(capsys.readouterr())
    start = f"{tmp_path}/[exp1]/[|x][bold]:car:"
    assert f"done: step 1, {start}" in text
    assert "not the original files:" in text
    assert all(message.isprintable() for message in caplog.messages)
    path = out / "live" / "rank-0000.json"
    status = json.loads(path.read_text())
    stage = {**status["window"]["stages"]["read"], "name": HOSTILE}
    status |= {"host": HOSTILE, "device": HOSTILE, "state": "failed", "error": HOSTILE}
    status["window"]["stages"] |= {HOSTILE: stage}
    path.write_text(json.dumps(status))
    assert main(["top", str(out), "--once"]) == 1
    assert f"Failed: rank 0: {SPELLED}" in check(capsys.readouterr()).replace("\n", "")


def test_profiles_show_hostile_names_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = decode_bound()
    profile = replace(
        whole,
        created=HOSTILE,
        machine={"device": HOSTILE},
        config={HOSTILE: HOSTILE},
        phases=tuple(replace(one, what=HOSTILE) for one in whole.phases),
        breakdown=(*whole.breakdown, Component(HOSTILE, whole.step_ms, HOSTILE)),
        diagnosis=Diagnosis(HOSTILE, HOSTILE, 1.0),
        actions=tuple(
            replace(one, what=HOSTILE, overrides={HOSTILE: HOSTILE}) for one in whole.actions
        ),
        operations=tuple(replace(one, name=HOSTILE) for one in whole.operations),
        slow_images=({HOSTILE: HOSTILE},),
        gpu={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )
    path, other = tmp_path / "[x].json", tmp_path / "other.json"
    profile.save(path)
    whole.save(other)
    assert main(["profile", "show", str(path)]) == 0
    assert SPELLED in check(capsys.readouterr())
    assert main(["profile", "diff", str(path), str(other), "--html", str(tmp_path / "[y]")]) == 0
    assert SPELLED in check(capsys.readouterr())


@pytest.mark.parametrize("command", [["top"], ["profile", "show"], ["shards", "verify"]])
def test_an_error_shows_hostile_names_as_they_are(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(tmp_path / HOSTILE)]) == 1
    assert r"\x1b[2J" in check(capsys.readouterr())


def test_lines_of_the_log_and_warnings_are_printable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cmae.train.commands import registry

    def build(parser: object) -> registry.Run:
        def run(parsed: object) -> int:
            # As without pytest, which has set up logging.
            assert logging.lastResort is not None
            record = logging.LogRecord("x", logging.WARNING, "", 0, HOSTILE, (), None)
            logging.lastResort.handle(record)
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                print(warnings.formatwarning(HOSTILE, UserWarning, "file", 1, ""))
            raise CmaeError(f"two\n  lines of {HOSTILE}")

        return run

    monkeypatch.setitem(registry.COMMANDS, "doctor", registry.Command("", build))
    assert main(["doctor"]) == 1
    text = check(capsys.readouterr())
    assert text.count(r"\x1b[2J") == 3
    assert "cmae doctor: error: two\n    lines of [/x]" in text


def test_the_ledger_keeps_what_the_log_spells_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = BadSample(HOSTILE, HOSTILE, 0, HOSTILE, 0)
    health = Health(ledger=tmp_path / "ledger", limit=None)
    health.add(1, [bad])
    assert json.loads((tmp_path / "ledger").read_text())["key"] == HOSTILE
    assert all(message.isprintable() for message in caplog.messages)
    assert describe_bad(bad).isprintable()
    assert NoGoodSamplesError("", [bad]).bad == (bad,)


def test_a_console_reads_no_markup_anywhere() -> None:
    console = PlainConsole(file=io.StringIO(), width=300)
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    console.print(HOSTILE, table, labelled("x", HOSTILE))
    text = console.file.getvalue()
    assert text.count("[/x][bold]:car:") == 6
    assert all(line.isprintable() for line in text.split("\n"))


def test_the_display_prints_a_message_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(1, live=False) as display:
        display.log(HOSTILE)
    assert capsys.readouterr().err.count("\n") == 1


def test_no_command_makes_a_console_that_reads_markup() -> None:
    """rich's own console would: `[/x]` in a path ends the command, `[exp1]` vanishes."""
    own = ROOT / "train" / "monitor" / "console.py"
    for path in (ROOT / "train").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path == own or not re.search(r"(?<!Plain)\bConsole\(|rich\.markup|from_markup", text)
        assert not re.search(r"\[/\]|\[(bold|dim|red|green|yellow)[ \]]", text), path
