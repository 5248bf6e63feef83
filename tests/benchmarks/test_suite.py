"""The benchmark suite: sections run apart, results compare, tables and plots are drawn from files."""

# ruff: noqa: E402  benchmarks/ is no package: its scripts import each other from their own folder

from __future__ import annotations

import json
import sys
import tarfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_growth
import gpu_suite
from lib import plots, results, suites, tables

from cmae.errors import CmaeError
from cmae.train.bench import compare


def summary(median: float, spread: float = 0.01, n: int = 3) -> dict[str, float]:
    return {"median": median, "min": median * (1 - spread), "max": median * (1 + spread), "n": n}


def result(rate: float = 100.0, cost: float = 5.0, **changes: Any) -> dict[str, Any]:
    machine = {"device": "card", "git": "abc", "versions": {"torch": "2.14"}}
    rows = [
        {
            "loader": "ours",
            "batch_size": 8,
            "images_per_s": summary(rate),
            "cpu_s_per_1000_images": summary(cost),
        }
    ]
    values = {"benchmark": "loader", "label": "", "machine": machine, "config": {"rounds": 3}}
    return values | {"rows": rows} | changes


def findings(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    return {one.measurement: one.finding(0.05) for one in compare.compare(before, after)}


class TestCompare:
    def test_a_lower_rate_is_a_regression_and_a_lower_cost_is_not(self) -> None:
        assert findings(result(), result(rate=90.0, cost=4.0)) == {
            "images_per_s": "REGRESSION",
            "cpu_s_per_1000_images": "faster",
        }
        assert findings(result(), result(rate=110.0, cost=6.0)) == {
            "images_per_s": "faster",
            "cpu_s_per_1000_images": "REGRESSION",
        }

    def test_what_lies_within_the_spread_is_the_same(self) -> None:
        wide = result()
        wide["rows"][0]["images_per_s"] = summary(100.0, spread=0.3)
        assert findings(wide, result(rate=80.0))["images_per_s"] == "same"

    def test_a_loss_below_the_threshold_is_told_but_tolerated(self) -> None:
        assert findings(result(), result(rate=97.0))["images_per_s"] == "slower"

    def test_rows_that_come_and_go_are_told(self) -> None:
        other = deepcopy(result())
        other["rows"][0]["loader"] = "theirs"
        found = [one.finding(0.05) for one in compare.compare(result(), other)]
        assert found == ["gone", "gone", "new", "new"]

    def test_a_version_in_a_row_does_not_make_it_another_row(self) -> None:
        old, new = result(), result()
        old["rows"][0]["version"], new["rows"][0]["version"] = "1.0", "2.0"
        assert set(findings(old, new).values()) == {"same"}

    def test_two_devices_are_not_compared_unless_told(self) -> None:
        machine = {"device": "another", "git": "abc", "versions": {"torch": "2.15"}}
        other = result(machine=machine)
        with pytest.raises(compare.NotComparableError, match="--any_device"):
            compare.check_comparable(result(), other, any_device=False)
        notes = compare.check_comparable(result(), other, any_device=True)
        assert notes == ["torch 2.14, then 2.15"]

    def test_two_benchmarks_are_never_compared(self) -> None:
        with pytest.raises(compare.NotComparableError, match="benchmark"):
            compare.check_comparable(result(), result(benchmark="step"), any_device=True)

    def test_other_settings_are_not_compared(self) -> None:
        with pytest.raises(compare.NotComparableError, match="batches"):
            compare.check_comparable(result(), result(config={"batches": 5}), any_device=False)
        notes = compare.check_comparable(result(), result(config={"rounds": 5}), any_device=False)
        assert notes == ["rounds: 3, then 5"]

    @pytest.mark.parametrize(
        ("rate", "device", "code"), [(99.5, "card", 0), (80.0, "card", 1), (99.5, "other", 2)]
    )
    def test_the_exit_code_tells_a_script(
        self,
        rate: float,
        device: str,
        code: int,
        tmp_path: Path,
    ) -> None:
        new = result(rate=rate)
        new["machine"]["device"] = device
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, content in zip(paths, (result(), new), strict=True):
            path.write_text(json.dumps(content))
        if code == 2:
            with pytest.raises(CmaeError, match="do not compare: measured on card and on other"):
                compare.compare_files(*paths, threshold=0.05, any_device=False)
        else:
            assert compare.compare_files(*paths, threshold=0.05, any_device=False) == code


class TestSuite:
    def test_a_section_that_fails_leaves_the_others_alone(self) -> None:
        sections = {
            "bad": [sys.executable, "-c", "raise SystemExit(3)"],
            "good": [sys.executable, "-c", "print('wrote benchmarks/results/x.json')"],
            "absent": [sys.executable, "benchmarks/no_such_script.py"],
        }
        rows = suites.run_sections(sections, list(sections), budget_s=60, limits_s={})
        assert [row["exit_code"] for row in rows] == [3, 0, None]
        assert rows[1]["results"] == ["benchmarks/results/x.json"]
        assert rows[2]["end"] == "benchmarks/no_such_script.py is not there"

    def test_a_section_out_of_time_is_stopped_with_its_children(self, tmp_path: Path) -> None:
        note = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
        child = f"import os, time; {note}; time.sleep(60)"
        parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        started = time.monotonic()
        row = suites.run_section("slow", [sys.executable, "-c", parent], limit_s=3)
        assert row["exit_code"] == 124
        assert time.monotonic() - started < 30
        pid = int((tmp_path / "pid").read_text())
        for _ in range(100):  # an orphan stays a zombie until its new parent reaps it
            if not _is_alive(pid):
                break
            time.sleep(0.05)
        assert not _is_alive(pid)

    def test_without_time_left_nothing_is_started(self) -> None:
        sections = {"one": [sys.executable, "-c", "raise SystemExit(3)"]}
        (row,) = suites.run_sections(sections, ["one"], budget_s=1, limits_s={})
        assert (row["exit_code"], row["end"]) == (None, "no time left")

    def test_a_section_that_could_not_have_half_of_its_limit_is_not_begun(self) -> None:
        code = "import time; time.sleep(0.2)"
        sections = {name: [sys.executable, "-c", code] for name in ("long", "short")}
        limits = {"long": 100.0, "short": 20.0}
        rows = suites.run_sections(sections, list(sections), budget_s=30, limits_s=limits)
        assert [row["exit_code"] for row in rows] == [None, 0]

    def test_a_later_call_goes_on_where_the_first_one_stopped(self, tmp_path: Path) -> None:
        runs = tmp_path / "runs"
        code = f"open({str(runs)!r}, 'a').write('x')"
        sections = {name: [sys.executable, "-c", code] for name in ("one", "two")}
        noted: list[list[str]] = []

        def note(rows: list[dict[str, Any]]) -> None:
            noted.append([row["section"] for row in rows])

        first = suites.run_sections(sections, ["one"], budget_s=60, limits_s={}, note=note)
        late = suites.run_sections(sections, ["two"], budget_s=1, limits_s={}, known=first)
        assert [row["exit_code"] for row in late] == [0, None]
        rows = suites.run_sections(
            sections, ["one", "two"], budget_s=60, limits_s={}, known=late, note=note
        )
        assert [(row["section"], row["exit_code"]) for row in rows] == [("one", 0), ("two", 0)]
        assert runs.read_text() == "xx"
        assert noted == [["one"], ["one", "two"]]

    def test_a_section_that_is_stopped_has_shown_what_it_printed(self) -> None:
        code = "import time; print('measured 1', flush=True); time.sleep(60)"
        sections = {"slow": [sys.executable, "-c", code]}
        (row,) = suites.run_sections(sections, ["slow"], budget_s=20, limits_s={"slow": 2})
        assert row["exit_code"] == 124
        assert row["end"].startswith("measured 1\n")
        # Asked first: pytest then tells what has failed so far.
        assert "KeyboardInterrupt" in row["end"]

    def test_a_section_sees_the_callers_packages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PYTHONPATH", "/packages")
        code = "import os; print(os.environ['PYTHONPATH'])"
        row = suites.run_section("path", [sys.executable, "-c", code], limit_s=20)
        assert row["end"].strip().split(":") == [str(ROOT / "benchmarks"), "/packages"]

    def test_results_are_packed_into_one_archive(self, tmp_path: Path) -> None:
        summary, file = tmp_path / "summary.json", tmp_path / "x.json"
        for path in (summary, file):
            path.write_text("{}")
        suites.copy_results(summary, [file], tmp_path / "out", pack=True)
        with tarfile.open(tmp_path / "out" / "summary.tar.gz") as archive:
            assert archive.getnames() == ["summary.json", "x.json"]
        assert len(list((tmp_path / "out").iterdir())) == 2

    def test_the_gpu_suites_groups_hold_every_section_once_and_tests_leave_out_the_slow(
        self,
    ) -> None:
        assert gpu_suite.choose(["no-dali", "dali"]) == list(gpu_suite.SECTIONS)
        assert gpu_suite.LIMITS_S.keys() == gpu_suite.SECTIONS.keys()
        for command in gpu_suite.SECTIONS.values():
            if "pytest" in command:
                assert {"-vv", "gpu and not slow"} <= set(command)
            files = [word for word in command if word.endswith(".py")]
            assert all((ROOT / word).is_file() for word in files)

    def test_if_every_section_took_its_limit_four_calls_would_hold_them_all(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a simulated clock: nine minutes a call, each going on where the one before it stopped."""
        now, begun = [0.0], []

        def run_section(name: str, command: object, *, limit_s: float) -> dict[str, Any]:
            begun.append(name)
            wanted = gpu_suite.LIMITS_S[name]
            now[0] += min(wanted, limit_s)
            code = 0 if limit_s >= wanted else 124
            return {"section": name, "exit_code": code, "seconds": wanted, "results": []}

        monkeypatch.setattr(suites, "run_section", run_section)
        monkeypatch.setattr(suites.time, "perf_counter", lambda: now[0])
        rows: list[dict[str, Any]] = []
        for _ in range(4):
            started = now[0]
            names = list(gpu_suite.SECTIONS)
            rows = suites.run_sections(
                gpu_suite.SECTIONS, names, budget_s=540, limits_s=gpu_suite.LIMITS_S, known=rows
            )
            assert now[0] - started <= 540
        assert begun == names  # the order of the questions, none twice
        assert all(row["exit_code"] is not None for row in rows)

    @pytest.mark.parametrize("name", gpu_suite.SECTIONS)
    def test_commands_of_the_gpu_suite_are_understood(self, name: str) -> None:
        command = suites.with_shards({name: gpu_suite.SECTIONS[name]}, "x.tar")[name]
        if command[1:4] != [*suites.BENCH[1:]]:
            return
        from cmae.train.commands.main import main

        with pytest.raises(SystemExit) as stopped:
            main([*command[3:], "--print_config"])
        assert stopped.value.code in (0, None)

    def test_limits_of_the_cpu_suite_fit_under_fifteen_minutes(self) -> None:
        assert suites.LIMITS_S.keys() <= suites.SECTIONS.keys()
        parser = suites.build_parser("", suites.SECTIONS, budget_s=870)
        assert parser.parse_args([]).budget_s < 900

    def test_sections_of_the_gpu_suite_are_commands_by_name(self) -> None:
        for name, command in gpu_suite.SECTIONS.items():
            assert isinstance(name, str)
            assert all(isinstance(word, str) for word in command)
        assert gpu_suite.LIMITS_S.keys() <= gpu_suite.SECTIONS.keys()

    def test_the_suite_writes_a_summary_and_copies_results(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (results, suites):
            monkeypatch.setattr(module, "ROOT", tmp_path)
        monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
        code = "open('x.json', 'w').write('{}'); print('wrote x.json')"
        sections = {"one": [sys.executable, "-c", code]}
        parser = suites.build_parser("", sections, budget_s=60)
        arguments = parser.parse_args(["--copy-to", str(tmp_path / "copies")])
        assert suites.run_suite("suite", sections, arguments, limits_s={}) == 0
        copies = sorted(path.name for path in (tmp_path / "copies").iterdir())
        assert copies[-1] == "x.json"
        written = json.loads((tmp_path / "copies" / copies[0]).read_text())
        assert written["rows"][0]["section"] == "one"


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def growth() -> dict[str, Any]:
    names = (
        "startup_s",
        "plan_s",
        "positions_us_per_batch",
        "index_mib",
        "peak_mib",
        "state_bytes",
    )
    rows = [
        {"samples": 10**power} | {name: summary(2.0**power) for name in names}
        for power in (3, 4, 5)
    ]
    return result(benchmark="growth", rows=rows)


def sweep() -> dict[str, Any]:
    rows: list[dict[str, Any]] = [
        {"threads": float(n), "images_per_s": summary(90.0 * n)} for n in (1, 2, 4)
    ]
    rows.append({"threads": 8.0, "error": "out of memory"})
    return result(benchmark="sweep", label="threads", rows=rows)


class TestTables:
    def test_growth_has_a_row_for_each_size(self) -> None:
        head, *body = tables.growth_table(growth())
        assert [row[0] for row in body] == ["1,000", "10,000", "100,000"]
        assert all(len(row) == len(head) for row in body)

    def test_a_sweep_is_told_against_its_first_value(self) -> None:
        _, *body = tables.sweep_table(sweep())
        assert [(row[0], row[2]) for row in body] == [
            ("1", "1.00x"),
            ("2", "2.00x"),
            ("4", "4.00x"),
            ("8", "-"),
        ]
        assert body[3][1] == "out of memory"

    def test_plots_are_drawn_from_results(self, tmp_path: Path) -> None:
        found = {
            "growth": [(Path("2026-01-01_growth_card_abc.json"), growth())],
            "sweep": [(Path("2026-01-01_sweep_card_abc_threads.json"), sweep())],
        }
        drawn = plots.draw_plots(found, tmp_path)
        assert [path.name for path in drawn] == [
            "bench_growth_card.png",
            "bench_sweep_threads_card.png",
        ]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_growth_measures_an_index_of_its_own_making(tmp_path: Path) -> None:
    paths = bench_growth.write_shards(tmp_path, 12_000)
    assert len(paths) == 2
    found = bench_growth.measure(tmp_path)
    assert 0 < found["state_bytes"] < 100
    assert found["plan_s"] > 0
