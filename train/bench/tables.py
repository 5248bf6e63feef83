"""Result files as tables, ready to paste: Markdown with the machine under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Result = dict[str, Any]
"""Contents of a result file."""


def loader_table(result: Result) -> list[list[str]]:
    """Loader rates per core and CPU cost, by colour mode."""
    rows = [["colour", "loader", "images/s per core", "CPU-s per 1000 images", "n"]]
    for row in result["rows"]:
        if "absent" in row:
            continue
        rate, cost = row["images_per_s_per_core"], row["cpu_s_per_1000_images"]
        rows.append([row["color"], _peer(row), spread(rate, 0), spread(cost, 1), str(rate["n"])])
    return rows


def loader_notes(result: Result) -> list[str]:
    """What the other loaders make, and which are absent, each once."""
    notes = []
    for row in result["rows"]:
        if "absent" in row:
            notes.append(f"{_peer(row)}: absent, {row['absent']}")
        elif "version" in row and not row["version"].startswith("cmae"):
            notes.append(f"{_peer(row)}, {row['color']} ({row['version']}): {row['views']}")
    return list(dict.fromkeys(notes))


def _peer(row: Result) -> str:
    # Results of 2026-11-23 have 'loader'; older ones say "host" and "pre-resized".
    return (
        str(row.get("peer", row.get("loader")))
        .replace(", host", ", cpu")
        .replace("pre-resized", "downscaled")
    )


def step_table(result: Result) -> list[list[str]]:
    """Step rates on synthetic data; utilisation and memory where the file has them."""
    rows = [["model", "method", "batch", "precision", "compile", "images/s", "TFLOP/s", "n"]]
    has_use = any("mfu_measured" in row for row in result["rows"])
    if has_use:
        rows[0] += ["of a matrix product's rate", "of the vendor's rate", "peak memory, GB"]
    for row in result["rows"]:
        head = [row["model"], row["method"], str(row["batch_size"]), row["precision"]]
        head.append(row["compile"])
        if "error" in row:
            rows.append([*head, row["error"], *["-"] * (len(rows[0]) - 6)])
            continue
        rate = row["images_per_s"]
        head += [spread(rate, 1), f"{row['tflops']:.3g}", str(rate["n"])]
        if has_use:
            memory = row["peak_memory_gb"]
            head += [_percent(row["mfu_measured"]), _percent(row["mfu_vendor"])]
            head.append(f"{memory:.1f}" if memory else "-")
        rows.append(head)
    return rows


def levers_table(result: Result) -> list[list[str]]:
    """Each switch of the step against the base, and where the time of a step goes."""
    parts = ["target", "encoder", "pixel decoder", "feature decoder", "heads and losses"]
    parts += ["backward", "optimiser", "EMA"]
    rows = [
        [
            *("switch", "batch", "images/s", "over the base", "n", "kernels together, ms"),
            *(f"{name}, ms" for name in parts),
        ]
    ]
    for row in result["rows"]:
        head = [row["name"], str(row["batch_size"])]
        if "error" in row:
            rows.append([*head, row["error"], *["-"] * (len(rows[0]) - 3)])
            continue
        rate, spans = row["images_per_s"], row["parts_ms"]
        times = [f"{spans[name]:.2f}" if name in spans else "-" for name in parts]
        kernels = f"{row['device_ms']:.1f}" if "device_ms" in row else "-"
        rows.append(
            [*head, spread(rate, 1), spread(row["gain"], 3), str(rate["n"]), kernels, *times]
        )
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def kernels_table(result: Result) -> list[list[str]]:
    """Times of each op by contender, and how near the hardware's floor they come."""
    rows = [
        ["op", "shape", "by", "forward, us", "of floor", "backward, us", "of floor", "launches"]
    ]
    rows[0] += ["peak MiB", "n"]
    for row in result["rows"]:
        cells = [row["op"], row["shape"], row["contender"]]
        for part in ("forward", "backward"):
            time_us = row.get(f"{part}_us")
            if time_us is None:
                cells += ["-", "-"]
                continue
            share = row[f"{part}_floor_us"] / time_us["median"]
            cells += [spread(time_us, 1), f"{100 * share:.0f} %"]
        tail = (row["launches"], row["peak_mib"], row["forward_us"]["n"])
        rows.append([*cells, *("-" if value is None else str(value) for value in tail)])
    return rows


def e2e_table(result: Result) -> list[list[str]]:
    """The step fed by the real loader, beside the same step on synthetic data."""
    rows = [["model", "batch", "real images/s", "synthetic images/s", "ratio", "waiting", "n"]]
    for row in result["rows"]:
        rates = [spread(row[name], 1) for name in ("images_per_s", "synthetic_images_per_s")]
        waiting = f"{row['wait_share']['median']:.1%}"
        ratio = row["ratio"]
        batch = str(result["config"]["batch_size"])
        rows.append([row["model"], batch, *rates, spread(ratio, 3), waiting, str(ratio["n"])])
    return rows


def spread(summary: dict[str, float], digits: int) -> str:
    """Median, and the range of the rounds."""
    median, low, high = (f"{summary[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


TABLES: dict[str, Callable[[Result], list[list[str]]]] = {
    "loader": loader_table,
    "step": step_table,
    "levers": levers_table,
    "kernels": kernels_table,
    "e2e": e2e_table,
}
NOTES: dict[str, Callable[[Result], list[str]]] = {"loader": loader_notes}
"""Lines under a table."""


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is its head."""
    head, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render(result: Result) -> str:
    """A result as a page to paste: table, notes, and the machine it comes from."""
    name, machine, config = result["benchmark"], result["machine"], result["config"]
    lines = [f"### {name}: {machine['device']}", "", markdown(TABLES[name](result)), ""]
    lines += [f"- {note}" for note in NOTES[name](result)] if name in NOTES else []
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items() if value)
    chosen = ", ".join(f"{key} {_short(value)}" for key, value in config.items())
    lines += [
        f"- Median (smallest to largest) of n interleaved rounds, {result['written'][:10]}; {chosen}.",
        f"- {machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB; driver "
        f"{machine['driver'] or '-'}, CUDA {machine['cuda'] or '-'}; {versions}; revision {machine['git']}"
        f"{' with changes' if machine['git_dirty'] else ''}.",
    ]
    if machine.get("gpu"):
        state = ", ".join(f"{key} {value:.4g}" for key, value in machine["gpu"].items())
        lines.append(f"- GPU after the last round: {state}.")
    return "\n".join(lines) + "\n"
