"""Reports drawn from a profile: terminal, HTML, Chrome trace, comparison."""

from __future__ import annotations

import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.profile_data import decode_bound, estimate, faster

from cmae.pipeline.stage_stats import Histogram
from cmae.train.commands.profile import profile_tools
from cmae.train.profiling.analysis.records import Curve, Part, Profile, Verdict
from cmae.train.profiling.analysis.stages import loader_phase, loader_window, stage_shares
from cmae.train.profiling.report.charts import (
    latency_histogram,
    line_chart,
    step_histogram,
    waterfall_rows,
)
from cmae.train.profiling.report.diff import Difference, describe_change, diff_profiles, print_diff
from cmae.train.profiling.report.html import write_diff_html, write_html
from cmae.train.profiling.report.terminal import format_number, print_profile
from cmae.train.profiling.report.trace import write_trace


def printed(profile: Profile, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_profile(profile, console)
    return console.file.getvalue()


def bare() -> Profile:
    """The least that a profile can be: no loader, no actions, no curves, no notes."""
    full = decode_bound()
    return replace(
        full,
        phases=(replace(full.phases[0], step_times_ms=()),),
        actions=(),
        curves=(),
        operations=(),
        tails=(),
        gpu={},
        notes=(),
    )


class TestTerminal:
    def test_operations_show_cost_and_share(self) -> None:
        row = next(line for line in printed(decode_bound()).splitlines() if "colour jitter" in line)
        assert [cell.strip() for cell in row.split("│")[2:7]] == [
            "0.900",
            "0.800 to 1.00",
            "12%",
            "0.120",
            "1,087",
        ]

    def test_the_verdict_comes_first(self) -> None:
        first = printed(decode_bound()).splitlines()[1]
        assert first.startswith("│ Bound by JPEG decode on 8 cores")

    @pytest.mark.parametrize("width", [80, 140])
    def test_every_part_shows_its_ms_and_interval(self, width: int) -> None:
        lines = printed(decode_bound(), width).splitlines()
        row = next(line for line in lines if line.startswith("│ decode "))
        assert [cell.strip() for cell in row.split("│")[2:5]] == ["157.5", "153.3 to 161.7", "59%"]

    def test_bars_of_the_account_lie_end_to_end(self) -> None:
        lines = printed(decode_bound()).splitlines()
        model, decode = (
            next(line for line in lines if line.startswith(f"│ {name} ")).split("│")[5]
            for name in ("model", "decode")
        )
        assert model.strip()
        assert decode.strip()
        assert len(model.rstrip()) - 1 <= len(decode) - len(decode.lstrip()) <= len(model.rstrip())

    def test_an_action_shows_prediction_measurement_and_error(self) -> None:
        text = printed(decode_bound())
        row = next(line for line in text.splitlines() if "JPEG unit" in line)
        assert "2,292" in row
        assert "2.40x" in row
        assert "2,205 (2,165 to 2,245)" in row
        assert "+4%" in row
        assert "--data.hw_decoder_load 0.6" in text

    def test_markup_in_names_is_printed_as_it_is(self) -> None:
        profile = replace(decode_bound(), notes=("see [data] in the recipe",))
        assert "see [data] in the recipe" in printed(profile)

    def test_a_bare_profile_prints(self) -> None:
        assert "Stages" not in printed(bare())

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0.00"),
            (0.0042, "0.004"),
            (3.14159, "3.14"),
            (99.96, "100.0"),
            (268.4, "268"),
            (12345.6, "12,346"),
            (float("nan"), "-"),
        ],
    )
    def test_numbers_have_three_digits(self, value: float, text: str) -> None:
        assert format_number(value) == text


class TestStages:
    def test_shares_are_of_all_threads(self) -> None:
        phase = loader_phase(decode_bound())
        assert phase is not None
        assert phase.name == "full"
        views = next(one for one in stage_shares(loader_window(phase)) if one.name == "views")
        assert (views.busy, views.starved, views.blocked) == pytest.approx((0.97, 0.01, 0.02))
        assert views.images_per_s == pytest.approx(960)
        assert views.capacity_images_per_s == pytest.approx(960 / 0.97)


class _Page(HTMLParser):
    """Checks nesting, and collects what would need a network."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.external: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("#"):
                self.external.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(text: str) -> _Page:
    parser = _Page()
    parser.feed(text)
    parser.close()
    assert not parser.open
    return parser


def written(profile: Profile, tmp_path: Path) -> str:
    write_html(profile, tmp_path / "deep" / "report.html")
    return (tmp_path / "deep" / "report.html").read_text()


class TestHtml:
    def test_one_file_that_needs_no_network(self, tmp_path: Path) -> None:
        text = written(decode_bound(), tmp_path)
        found = page(text)
        assert not found.external
        assert not {"script", "link", "img", "iframe"} & set(found.tags)
        assert "@import" not in text
        assert set(re.findall(r"url\(([^)]*)\)", text)) == {"#starved", "#blocked"}

    def test_everything_in_the_profile_is_on_the_page(self, tmp_path: Path) -> None:
        profile = decode_bound()
        text = re.sub(r"\s+", " ", written(profile, tmp_path)).replace("&#39;", "'")
        assert profile.verdict.sentence in text
        for part in profile.parts:
            assert part.note in text
        for action in profile.actions:
            assert action.what in text
        for curve in profile.curves:
            assert curve.title in text
        for expected in (
            *profile.notes,
            "157.5",
            "153.3 to 161.7",
            "mean.decoder pct",
            "data.prefetch",
        ):
            assert expected in text

    def test_plots_say_in_words_what_they_show(self, tmp_path: Path) -> None:
        text = written(decode_bound(), tmp_path)
        pictures = re.findall(r"<svg[^>]*>", text)
        assert all("aria-label" in one or "aria-hidden" in one for one in pictures)
        assert 'aria-label="views: busy 97 %, starved 1 %, blocked 2 %"' in text

    def test_markup_in_a_profile_is_escaped(self, tmp_path: Path) -> None:
        profile = replace(decode_bound(), verdict=Verdict("<script>x</script>", "model", 1.0))
        text = written(profile, tmp_path)
        assert "<script>" not in text
        assert "&lt;script&gt;" in text

    def test_a_bare_profile_has_no_empty_sections(self, tmp_path: Path) -> None:
        text = written(bare(), tmp_path)
        page(text)
        headings = re.findall(r"<h2>(.*?)</h2>", text)
        assert headings == ["Account of the step", "Phases"]

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrast_is_accessible(self, scheme: str, tmp_path: Path) -> None:
        """WCAG 2: 4.5 for text, 3 for graphics, on the page and on the cards."""
        style = written(decode_bound(), tmp_path).split("</style>")[0]
        light, dark = style.split("@media (prefers-color-scheme: dark)")[:2]
        block = light if scheme == "light" else dark.split("* {")[0]
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        assert len(colours) == 11
        for ground in ("page", "card"):
            for name in ("text", "muted", "good", "bad"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
            for name in ("busy", "starved", "blocked", "rest"):
                assert contrast(colours[name], colours[ground]) >= 3, (name, ground)


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


class TestCharts:
    def test_waterfall_ends_where_the_step_ends(self) -> None:
        parts = (Part("model", estimate(60, 2), ""), Part("decode", estimate(40, 5), ""))
        first, second = waterfall_rows(parts, 100)
        scale = 1 / 105  # the last interval reaches past the step
        assert (first.bar.left, first.bar.width) == pytest.approx((0, 60 * scale))
        assert (second.bar.left, second.bar.width) == pytest.approx((60 * scale, 40 * scale))
        assert second.interval.left == pytest.approx(95 * scale)
        assert second.interval.width == pytest.approx(10 * scale)

    def test_a_negative_residual_runs_back_and_stays_inside(self) -> None:
        parts = (Part("model", estimate(100, 1), ""), Part("residual", estimate(-10, 120), ""))
        for row in waterfall_rows(parts, 90):
            for span in (row.bar, row.interval):
                assert -1e-9 <= span.left <= span.left + span.width <= 1 + 1e-9
        assert row.bar.width > 0

    def test_step_histogram_holds_every_step(self) -> None:
        chart = step_histogram("x", [10.0, 10.0, 10.0, 10.0, 11.0])
        assert chart is not None
        assert chart.summary.startswith("n 5")
        assert [height for _, _, height in chart.bars] == pytest.approx([1.0, 1 / 4])
        assert "logarithmic" not in chart.x_label

    def test_a_long_tail_gets_a_logarithmic_axis(self) -> None:
        assert "logarithmic" in step_histogram("x", [10.0, 11.0, 12.0, 13.0, 400.0]).x_label

    def test_equal_steps_make_one_bar(self) -> None:
        assert len(step_histogram("x", [5.0] * 9).bars) == 1

    def test_latencies_lie_where_their_bins_are(self) -> None:
        counts = {"60": 10, "80": 10}  # bins that begin at 1 ms and at 10 ms
        chart = latency_histogram("x", Histogram.from_dict(counts))
        assert chart is not None
        assert [tick.label for tick in chart.x_ticks] == ["1", "2", "5", "10"]
        assert chart.bars[0][0] == 0
        assert chart.bars[1][0] == pytest.approx(20 / 21)

    def test_too_few_values_have_no_plot(self) -> None:
        assert latency_histogram("x", Histogram()) is None
        assert step_histogram("x", [1.0] * 4) is None

    def test_a_curve_shows_today(self) -> None:
        chart = line_chart(Curve("x", "threads", (2.0, 4.0), (100.0, 200.0), now=3.0))
        assert chart.now[0] == pytest.approx(0.5)
        assert chart.now[1] == pytest.approx(0.75)
        assert chart.summary == "now 3: 150 images/s; best at 4: 200 images/s"

    def test_doublings_are_evenly_spaced(self) -> None:
        x = (1.0, 2.0, 4.0, 8.0, 16.0)
        chart = line_chart(Curve("x", "threads", x, (1.0, 2.0, 3.0, 4.0, 5.0), now=4.0))
        assert [left for left, _ in chart.points] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
        assert [tick.label for tick in chart.x_ticks] == ["1", "2", "4", "8", "16"]
        assert chart.now[0] == pytest.approx(0.5)


class TestTrace:
    @pytest.fixture
    def trace(self, tmp_path: Path) -> dict[str, Any]:
        write_trace(decode_bound(), tmp_path / "trace.json")
        content: dict[str, Any] = json.loads(
            (tmp_path / "trace.json").read_text(), parse_constant=pytest.fail
        )
        return content

    def test_events_have_the_fields_of_the_format(self, trace: dict[str, Any]) -> None:
        assert trace["displayTimeUnit"] in ("ms", "ns")
        for event in trace["traceEvents"]:
            assert isinstance(event["name"], str)
            assert event["ph"] in ("X", "M")
            assert all(isinstance(event[key], int) for key in ("pid", "tid"))
            if event["ph"] == "X":
                assert event["ts"] >= 0
                assert event["dur"] >= 0
            else:
                assert event["name"] in (
                    *("process_name", "process_sort_index", "thread_name", "thread_sort_index"),
                )
                assert len(event["args"]) == 1

    def test_spans_of_a_track_do_not_overlap(self, trace: dict[str, Any]) -> None:
        tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
        for event in trace["traceEvents"]:
            if event["ph"] == "X":
                span = (event["ts"], event["ts"] + event["dur"])
                tracks.setdefault((event["pid"], event["tid"]), []).append(span)
        assert (
            len(tracks) == 2 + 6 + 4 * 4
        )  # account, steps of six phases, four stages in four of them
        for spans in tracks.values():
            spans.sort()
            for (_, end), (start, _) in itertools.pairwise(spans):
                assert start >= end - 1e-3

    def test_every_track_is_named(self, trace: dict[str, Any]) -> None:
        events = trace["traceEvents"]
        used = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"}
        named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
        assert used <= named

    def test_steps_are_there_one_by_one(self, trace: dict[str, Any]) -> None:
        full = decode_bound().phases[-1]
        names = {
            e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"
        }
        process = next(pid for pid, name in names.items() if name.startswith("full"))
        steps = [
            e["dur"] for e in trace["traceEvents"] if e["pid"] == process and e["name"] == "step"
        ]
        assert steps == pytest.approx([1000 * ms for ms in full.step_times_ms])


class TestDiff:
    def test_the_interval_of_a_change_comes_from_both(self) -> None:
        change = Difference("x", "ms", estimate(10, 3), estimate(20, 4)).change
        assert change is not None
        assert (change.value, change.low, change.high) == pytest.approx((10, 5, 15))

    def test_skewed_intervals_keep_their_sides(self) -> None:
        before = replace(
            estimate(10, 0), high=16.0
        )  # it may have been larger: the change may be smaller
        change = Difference("x", "ms", before, estimate(20, 0)).change
        assert change is not None
        assert (change.low, change.high) == pytest.approx((4, 10))

    def test_only_what_changed_is_significant(self) -> None:
        diff = diff_profiles(decode_bound(), faster())
        findings = {row.name: describe_change(row) for row in (*diff.parts, diff.step)}
        assert findings.pop("decode") == "faster"
        assert findings.pop("step") == "faster"
        assert set(findings.values()) == {"within noise"}
        back = diff_profiles(faster(), decode_bound())
        assert describe_change(back.step) == "slower"

    def test_a_part_that_only_one_has_is_said_so(self) -> None:
        after = replace(faster(), parts=(*faster().parts, Part("straggler", estimate(5, 1), "")))
        findings = {
            row.name: describe_change(row) for row in diff_profiles(decode_bound(), after).parts
        }
        assert findings["straggler"] == "only now"

    def test_an_operation_that_costs_less_is_found(self) -> None:
        before = decode_bound()
        decode = replace(before.operations[0], cpu_ms=estimate(3.0, 0.2))
        after = replace(before, operations=(decode, *before.operations[1:]))
        diff = diff_profiles(before, after)
        findings = {row.name: describe_change(row) for row in diff.operations}
        assert findings.pop("decode") == "faster"
        assert set(findings.values()) == {"within noise"}

    def test_settings_that_differ_are_listed(self) -> None:
        assert diff_profiles(decode_bound(), faster()).settings == (("data.num_threads", 8, 16),)

    def test_it_prints_and_draws_both_verdicts(self, tmp_path: Path) -> None:
        diff = diff_profiles(decode_bound(), faster())
        console = Console(file=io.StringIO(), width=120)
        print_diff(diff, console)
        write_diff_html(diff, tmp_path / "diff.html")
        html = (tmp_path / "diff.html").read_text()
        assert not page(html).external
        for text in (console.file.getvalue(), html):
            assert "JPEG decode on 8 cores" in text
            assert "the loader has 1.1x head-room" in text


class TestCommands:
    def test_other_arguments_are_left_to_the_profiler(self) -> None:
        assert profile_tools([]) is None
        assert profile_tools(["--recipe", "demo"]) is None

    def test_show_prints_and_writes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        decode_bound().save(tmp_path / "profile.json")
        html, trace = tmp_path / "x.html", tmp_path / "x.json"
        arguments = [str(tmp_path / "profile.json"), "--html", str(html), "--trace", str(trace)]
        assert profile_tools(["show", *arguments]) == 0
        assert "Bound by JPEG decode" in capsys.readouterr().out
        assert html.stat().st_size > 10_000
        assert json.loads(trace.read_text())["traceEvents"]

    def test_diff_exits_with_zero(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        decode_bound().save(tmp_path / "a.json")
        faster().save(tmp_path / "b.json")
        arguments = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
        assert profile_tools(["diff", *arguments, "--html", str(tmp_path / "d.html")]) == 0
        assert "data.num_threads" in capsys.readouterr().out
        assert (tmp_path / "d.html").is_file()
