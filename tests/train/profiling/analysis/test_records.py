"""Profiles as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.profile_data import decode_bound, loader

from cmae.train.commands.main import main
from cmae.train.profiling.analysis.records import (
    Action,
    Component,
    Curve,
    Diagnosis,
    Estimate,
    Operation,
    Phase,
    Profile,
    load_profile,
)
from cmae.train.profiling.analysis.stages import loader_window
from cmae.train.profiling.analysis.upgrade import FORMAT

TEN = Estimate(10.0, 9.0, 11.0, n=5)
LOADER = loader()


V1 = Path(__file__).parents[3] / "data" / "v1"


def profile() -> Profile:
    return Profile(
        created="2026-01-01T00:00:00Z",
        machine={"device": "cpu"},
        config={"seed": 0},
        global_batch_size=8,
        world_size=1,
        phases=(Phase("full", "everything", TEN, TEN, LOADER, (9.0, 10.0, 11.0)),),
        step_ms=TEN,
        breakdown=(Component("model", TEN, "synthetic step"),),
        diagnosis=Diagnosis("The model is the bottleneck.", bottleneck="model", headroom=4.2),
        actions=(
            Action("more threads", {"data.num_threads": 4}, 12.0, "model"),
            Action("faster disk", {}, 13.0, "model", measured_images_per_s=TEN),
        ),
        curves=(Curve("threads", "threads", (1.0, 2.0), (5.0, 10.0), now=1.0),),
        slow_images=({"jpeg_kind": "baseline", "megapixels": 0.2, "items": 4, "ms": 2.0},),
        operations=(Operation("decode", TEN, TEN, 100.0),),
        notes=("no GPU",),
    )


def test_a_saved_profile_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.json"
    profile().save(path)
    assert load_profile(path) == profile()


@pytest.mark.parametrize("content", ["{}", "[]", "no json"])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is no profile"):
        load_profile(path)


def test_a_profile_of_an_older_format_reads_in_todays_words() -> None:
    found = load_profile(V1 / "profile_of_format_1.json")
    assert found.format == FORMAT
    assert found.diagnosis.bottleneck == "decode_augment"
    assert found.diagnosis.sentence.startswith("Bound by JPEG decode on 8 cores")
    components = {one.name: one.ms.value for one in found.breakdown}
    assert list(components) == [
        *("model", "host_to_device", "decode_augment", "prefetch", "read_warm", "read_cold"),
        *("interference", "residual"),
    ]
    assert components["decode_augment"] == 157.5
    assert [one.name for one in found.phases] == ["replay", "prefetch", "full"]
    assert [one.then_bottleneck for one in found.actions][:2] == ["model", "decode_augment"]
    assert found.operations[2].name == "crop"
    assert found.slow_images[2]["jpeg_kind"] == "PROGRESSIVE"
    stages = loader_window(found.phases[-1]).stages
    assert list(stages) == ["read", "decode_augment", "prefetch", "queue"]
    assert {name: one.name for name, one in stages.items()} == {name: name for name in stages}


def test_show_draws_a_profile_of_an_older_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, page = V1 / "profile_of_format_1.json", tmp_path / "x.html"
    assert main(["profile", "show", str(old), "--html", str(page)]) == 0
    assert "Bound by JPEG decode" in capsys.readouterr().out
    assert main(["profile", "diff", str(old), str(old)]) == 0


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((), "[" * 100_000),
        ((), "[]"),
        (("format",), "3"),
        (("phases",), []),
        (("phases", 0, "step_ms", "value"), "[/x]"),
        (("phases", 0, "loader"), {"stages": 1}),
        (("phases", -1, "loader", "stages", "read", "busy_s"), None),
        (("breakdown", 0, "ms"), 3),
        (("breakdown", 0, "ms", "value"), float("nan")),
        (("step_ms", "value"), 0),
        (("world_size",), 0),
        (("machine", "cores"), "[/x]"),
        (("actions", 0, "measured_images_per_s"), []),
        (("notes",), [3]),
        (("slow_images",), ["x"]),
    ],
    ids=str,
)
def test_a_damaged_profile_is_one_line(
    place: tuple[str | int, ...], value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    decode_bound().save(path)
    content = json.loads(path.read_text())
    part = content
    for name in place[:-1]:
        part = part[name]
    if place:
        part[place[-1]] = value
    path.write_text(json.dumps(content) if place else str(value))
    assert main(["profile", "show", str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"cmae profile show: error: {path} ")
    assert error.count("\n") == 1


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        load_profile(path)
