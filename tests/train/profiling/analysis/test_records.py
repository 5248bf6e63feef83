"""Profiles as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmae.train.profiling.analysis.records import (
    Action,
    Curve,
    Estimate,
    Operation,
    Part,
    Phase,
    Profile,
    Verdict,
    load_profile,
)

TEN = Estimate(10.0, 9.0, 11.0, n=5)


def profile() -> Profile:
    return Profile(
        created="2026-01-01T00:00:00Z",
        machine={"device": "cpu"},
        config={"seed": 0},
        global_batch_size=8,
        world_size=1,
        phases=(Phase("full", "everything", TEN, TEN, {"batches": 3}, (9.0, 10.0, 11.0)),),
        step_ms=TEN,
        parts=(Part("model", TEN, "synthetic step"),),
        verdict=Verdict("The model binds.", binds="model", headroom=4.2),
        actions=(
            Action("more threads", {"data.num_threads": 4}, 12.0, "model"),
            Action("faster disk", {}, 13.0, "model", measured_images_per_s=TEN),
        ),
        curves=(Curve("threads", "threads", (1.0, 2.0), (5.0, 10.0), now=1.0),),
        tails=({"kind": "baseline", "megapixels": 0.2, "items": 4, "ms": 2.0},),
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


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        load_profile(path)
