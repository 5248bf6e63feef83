"""What the README says in three lines, from result files: numbers, printed output, what has run where."""

from __future__ import annotations

import json
import re
from typing import Any

from lib.results import RESULTS
from lib.tables import newest

Result = dict[str, Any]

WHAT = {
    "loader": "two views from shards, beside other loaders",
    "reader": "reading by index",
    "remote": "shards behind https",
    "step": "training step",
    "e2e": "step fed by the loader",
    "kernels": "Triton kernels, timed",
    "levers": "switches of the step",
    "color": "colour of a batch, fused and not",
    "decode": "decoders against Pillow",
    "memory": "memory over thousands of batches",
    "planted": "`cmae profile` on planted bottlenecks",
    "profile": "`cmae profile`, predictions applied",
    "commands": "`make demo`, `make test`",
}
"""Benchmarks that the status table lists."""


def render_numbers() -> str:
    """Three numbers; a benchmark without a result is left out."""
    lines = [_loader_number(), _planted_number(), _demo_number()]
    return "\n".join(f"- {line}" for line in lines if line)


def _first(benchmark: str, label: str = "") -> Result | None:
    return next((r for _, r in newest(benchmark) if r["label"] == label), None)


def _loader_number() -> str | None:
    result = _first("loader")
    if result is None:
        return None
    rates = {
        row.get("peer", row.get("loader")): row["images_per_s_per_core"]["median"]
        for row in result["rows"]
        if row["color"] == "exact" and "absent" not in row
    }
    ours = next(rate for name, rate in rates.items() if name.startswith("cmae indexed"))
    pillow = rates["torch DataLoader, PIL"]
    return (
        f"**{ours:.0f} images/s a core**, two views with exact colours from real JPEGs; a torch "
        f"DataLoader with Pillow makes {pillow:.0f} on the same cores ({result['machine']['device']})."
    )


def _planted_number() -> str | None:
    result = _first("planted")
    if result is None:
        return None
    right = sum(row["right"] for row in result["rows"])
    return (
        f"**{right} of {len(result['rows'])} planted bottlenecks** are named by `cmae profile`, among "
        "them slow disks, too few threads, a slow rank and a noisy neighbour."
    )


def _demo_number() -> str | None:
    result = _first("commands", "demo")
    if result is None:
        return None
    (row,) = result["rows"]
    found = row["accuracy_percent"]
    best, untrained = next(iter(found.values())), found["encoder with random weights"]
    mae = f", {found['MAE']:.1f} % for MAE" if "MAE" in found else ""
    return (
        f"**{best:.1f} % against {untrained:.1f} %**{mae}: k-NN accuracy after and before "
        f"the {row['seconds'] / 60:.0f} minutes of `make demo` on {result['machine']['device']}."
    )


def render_output(name: str) -> str:
    """What a command printed, as a code block: of the demo a short form, of the tests the last line."""
    result = _first("commands", name)
    if result is None:
        return "*not run yet*"
    (row,) = result["rows"]
    lines = _shorten(row["output"]) if name == "demo" else row["output"][-1:]
    minutes = max(1, round(row["seconds"] / 60))
    took = f"{minutes} minute{'s' if minutes > 1 else ''} on {result['machine']['device']}"
    return "\n".join(["```", *lines, "```", "", f"({took}, revision {result['machine']['git']})"])


def _shorten(lines: list[str]) -> list[str]:
    """The demo's commands, its first and last line of progress, its table without the frame, its end."""
    steps = [line.split("  pos ")[0] for line in lines if re.match(r"step \d+/", line)]
    table = [re.sub(r"[│┃]", " ", line).rstrip() for line in lines if re.match("[│┃]", line)]
    heads = [line for line in lines if re.match(r"\d\. |   cmae ", line)]
    kept = [*heads[:-1], *steps[:1], "...", *steps[-1:], heads[-1]] if steps else heads
    return [*kept, *table, *(line for line in lines if re.match("PASS|FAIL", line))]


def render_status() -> str:
    """For each benchmark the CPUs and GPUs that have a result file, with the newest date."""
    found: dict[str, dict[str, str]] = {name: {} for name in WHAT}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["benchmark"] in found:
            machine = result["machine"]
            where = "CPU" if machine["device"].startswith(machine["cpu"]) else "GPU"
            found[result["benchmark"]][where] = f"{machine['device']}, {result['written'][:10]}"
    rows = [
        f"| {WHAT[name]} | {places.get('CPU', 'never')} | {places.get('GPU', 'never')} |"
        for name, places in found.items()
    ]
    return "\n".join(["| what | on a CPU | on a GPU |", "| --- | --- | --- |", *rows])


def render_walls() -> str:
    """How the house was kept before it got its walls, and how it is kept now."""
    columns = [_house("before"), _house("after")]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [f"| {name} | {' | '.join(str(c.get(name, '-')) for c in columns)} |" for name in names]
    return "\n".join(["| | before | after |", "| --- | --- | --- |", *rows])


def _house(label: str) -> dict[str, Any]:
    result = _first("house", label)
    return {row["measure"]: row["value"] for row in result["rows"]} if result else {}
