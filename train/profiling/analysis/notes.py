"""What a reader should know beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cmae.train.profiling.analysis.records import Component, Diagnosis
from cmae.train.profiling.analysis.verdict import NEIGHBOUR_CORES, Facts

UNEXPLAINED = 0.05
"""Share of the step above which the residual is reported."""


@dataclass(frozen=True)
class Circumstances:
    """What was so while the phases ran."""

    resident: float | None = None
    """Share of the files that the full run found in the page cache; None where no one can tell."""
    ranks: Sequence[dict[str, Any]] = ()
    """`Profile.ranks`."""
    unused_switches: Sequence[str] = ()
    """Switches of the step that are off, as they are typed."""


def build_notes(facts: Facts, diagnosis: Diagnosis, found: Circumstances) -> list[str]:
    """One line for each thing that is worth a word.

    Args:
        facts: What the diagnosis was made from.
        diagnosis: The diagnosis.
        found: What was so meanwhile.
    """
    notes = note_residual(facts.breakdown)
    if diagnosis.bottleneck == "model" and found.unused_switches:
        notes.append(
            "the model is the bottleneck; switches of the step that are off: "
            f"{', '.join(found.unused_switches)}. benchmarks/bench_step.py measures what each brings"
        )
    if found.resident is not None:
        percent = 100 * found.resident
        notes.append(f"the full run found {percent:.0f} % of its files in the page cache")
    if facts.others_cores >= NEIGHBOUR_CORES:
        notes.append(f"other processes took {facts.others_cores:.1f} CPU cores meanwhile")
    if found.ranks:
        slowest = max(found.ranks, key=lambda one: float(one["step_ms"]))
        waits = ", ".join(f"{one['wait_ms']:.1f}" for one in found.ranks)
        notes.append(
            f"rank {slowest['rank']} is the slowest alone, {slowest['step_ms']:.1f} ms a step; waits for "
            f"data by rank: {waits} ms"
        )
    return notes


def note_residual(breakdown: Sequence[Component]) -> list[str]:
    """A line where much of the step is not explained, else none."""
    total = sum(one.ms.value for one in breakdown)
    residual = next(one.ms.value for one in breakdown if one.name == "residual")
    if abs(residual) <= UNEXPLAINED * total:
        return []
    return [
        f"{residual:+.1f} ms, {100 * abs(residual) / total:.0f} % of the step, are not explained: phases "
        "differed more from round to round than their differences; measure more rounds, or look for other "
        "work on the machine"
    ]
