"""Reports drawn from a profile: what a reader relies on in the terminal, the HTML page and the comparison."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.profile_data import decode_bound, estimate, faster

from cmae.pipeline.stage_stats import Histogram
from cmae.train.commands.main import main
from cmae.train.monitor.console import PlainConsole
from cmae.train.profiling.analysis.records import Component, Curve, Diagnosis, Profile
from cmae.train.profiling.report.charts import (
    breakdown_chart,
    latency_histogram,
    line_chart,
    step_histogram,
)
from cmae.train.profiling.report.diff import Difference, describe_change, diff_profiles, print_diff
from cmae.train.profiling.report.html import write_diff_html, write_html
from cmae.train.profiling.report.terminal import print_profile

MARKUP = "<script>alert(1)</script> $x^2$ [red]"


def bare() -> Profile:
    """The least that a profile can be: no loader, no actions, no curves, no notes."""
    full = decode_bound()
    return replace(
        full,
        phases=(replace(full.phases[0], step_times_ms=()),),
        actions=(),
        curves=(),
        operations=(),
        slow_images=(),
        gpu={},
        notes=(),
    )


def printed(profile: Profile, width: int = 140) -> str:
    console = PlainConsole(file=io.StringIO(), width=width)
    print_profile(profile, console)
    return console.file.getvalue()


def written(profile: Profile, tmp_path: Path) -> str:
    write_html(profile, tmp_path / "deep" / "report.html")
    return (tmp_path / "deep" / "report.html").read_text()


class _Page(HTMLParser):
    """Collects tags, text and what would need a network."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.external: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.external.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += " " + " ".join(data.split())


def read_page(text: str) -> _Page:
    parser = _Page()
    parser.feed(text)
    parser.close()
    return parser


def everything(profile: Profile) -> list[str]:
    """Words and numbers that no report of a profile may leave out."""
    return [
        profile.diagnosis.sentence,
        *(one.name.replace("_", " ") for one in profile.breakdown),
        *("157.5", "153.3 to 161.7"),
        *(one.what for one in profile.actions),
        *("--data.hw_decoder_load 0.6", "2.40x", "2,205 (2,165 to 2,245)"),
        *(one.name for one in profile.operations),
        *("progressive", "13.2"),
        *(phase.name for phase in profile.phases),
        *profile.notes,
    ]


def test_the_terminal_leaves_nothing_out() -> None:
    text = printed(decode_bound(), width=200)
    for expected in everything(decode_bound()):
        assert expected in text


def test_a_narrow_terminal_still_shows_every_component_in_full() -> None:
    lines = printed(decode_bound(), 80).splitlines()
    row = next(one for one in lines if one.startswith("│ decode augment"))
    assert [cell.strip() for cell in row.split("│")[1:5]] == [
        *("decode augment", "157.5", "153.3 to 161.7", "59%"),
    ]


def test_markup_in_names_is_printed_as_it_is() -> None:
    profile = replace(decode_bound(), notes=("see [data] in the recipe",))
    assert "see [data] in the recipe" in printed(profile)


def test_a_bare_profile_has_no_empty_sections(tmp_path: Path) -> None:
    assert "Stages" not in printed(bare())
    headings = re.findall(r"<h2>(.*?)</h2>", written(bare(), tmp_path))
    assert headings == ["Breakdown of the step", "Phases"]


def test_the_page_leaves_nothing_out_and_needs_no_network(tmp_path: Path) -> None:
    found = read_page(written(decode_bound(), tmp_path))
    for expected in [*everything(decode_bound()), "data.prefetch", "Cores that decode"]:
        assert expected in found.text
    assert not found.external
    assert not {"script", "link", "img", "iframe"} & found.tags


def test_markup_in_a_profile_is_escaped_wherever_it_stands(tmp_path: Path) -> None:
    curve = Curve(MARKUP, MARKUP, (1.0, 2.0), (5.0, 10.0), now=1.0)
    profile = replace(
        decode_bound(),
        diagnosis=Diagnosis(MARKUP, MARKUP, 1.0),
        curves=(curve,),
        breakdown=(*decode_bound().breakdown, Component(MARKUP, estimate(1, 1), MARKUP)),
        config={MARKUP: MARKUP},
        notes=(MARKUP,),
    )
    text = written(profile, tmp_path)
    assert "<script" not in text
    assert read_page(text).text.count(MARKUP) >= 6
    assert MARKUP in map(unescape, chart_texts(line_chart(curve).svg))


def chart_texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_charts_follow_the_page_into_the_dark(tmp_path: Path) -> None:
    charts = re.findall(
        r'<svg role="img" aria-label="[^"]+: .*?</svg>', written(decode_bound(), tmp_path), re.S
    )
    drawn = [one for one in charts if "matplotlib" in one or "axes_1" in one]
    assert len(drawn) == 1 + 2 + 6
    for svg in drawn:
        assert "var(--" in svg
        assert not re.search(r"(fill|stroke): #", svg)


def test_ticks_of_small_values_can_be_told_apart() -> None:
    chart = line_chart(Curve("x", "share", (0.0, 1.0), (2.2, 0.4), now=0.0))
    labels = [text for text in chart_texts(chart.svg) if re.fullmatch(r"[\d.,]+", text)]
    upright = labels[labels.index("1.0") + 1 :]
    assert len(upright) >= 3
    assert len(set(map(float, upright))) == len(upright)


def test_charts_say_in_words_what_they_show() -> None:
    chart = line_chart(Curve("x", "threads", (2.0, 4.0), (100.0, 200.0), now=3.0))
    assert chart.summary == "now 3: 150 images/s; best at 4: 200 images/s"
    steps = step_histogram("x", [10.0, 10.0, 10.0, 10.0, 400.0])
    assert steps is not None
    assert steps.summary.startswith("n 5, p50 10.0 ms")
    parts = (
        Component("model", estimate(100, 1), ""),
        Component("residual", estimate(-10, 120), ""),
    )
    assert breakdown_chart(parts).summary == "model 100 ms, residual -10.0 ms"


def test_too_few_values_have_no_histogram() -> None:
    assert latency_histogram("x", Histogram()) is None
    assert step_histogram("x", [1.0] * 4) is None
    assert step_histogram("x", [5.0] * 9) is not None


def test_the_interval_of_a_change_comes_from_both_and_keeps_its_sides() -> None:
    change = Difference("x", "ms", estimate(10, 3), estimate(20, 4)).change
    assert change is not None
    assert (change.value, change.low, change.high) == pytest.approx((10, 5, 15))
    # It may have been larger, so the change may be smaller.
    skewed = replace(estimate(10, 0), high=16.0)
    change = Difference("x", "ms", skewed, estimate(20, 0)).change
    assert change is not None
    assert (change.low, change.high) == pytest.approx((4, 10))


def test_only_what_changed_is_significant() -> None:
    diff = diff_profiles(decode_bound(), faster())
    findings = {row.name: describe_change(row) for row in (*diff.breakdown, diff.step)}
    assert findings.pop("decode_augment") == "faster"
    assert findings.pop("step") == "faster"
    assert set(findings.values()) == {"within noise"}
    assert describe_change(diff_profiles(faster(), decode_bound()).step) == "slower"


def test_what_only_one_profile_has_is_said_so() -> None:
    straggler = Component("straggler", estimate(5, 1), "")
    after = replace(faster(), breakdown=(*faster().breakdown, straggler))
    rows = diff_profiles(decode_bound(), after).breakdown
    assert {row.name: describe_change(row) for row in rows}["straggler"] == "only now"


def test_the_comparison_shows_both_sentences_and_what_else_differs(tmp_path: Path) -> None:
    diff = diff_profiles(decode_bound(), faster())
    assert diff.settings == (("data.num_threads", 8, 16),)
    console = PlainConsole(file=io.StringIO(), width=120)
    print_diff(diff, console)
    write_diff_html(diff, tmp_path / "diff.html")
    page = read_page((tmp_path / "diff.html").read_text())
    assert not page.external
    for text in (console.file.getvalue(), page.text):
        for expected in ("JPEG decode on 8 cores", "1.1x head-room", "data.num_threads"):
            assert expected in text


def test_show_and_diff_print_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    decode_bound().save(Path(before))
    faster().save(Path(after))
    assert main(["profile", "show", before, "--html", str(tmp_path / "x.html")]) == 0
    assert "Bound by JPEG decode" in capsys.readouterr().out
    assert main(["profile", "diff", before, after, "--html", str(tmp_path / "d.html")]) == 0
    assert "data.num_threads" in capsys.readouterr().out
    assert (tmp_path / "x.html").is_file()
    assert (tmp_path / "d.html").is_file()
