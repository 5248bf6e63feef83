"""Tables in Markdown from the newest result file of each benchmark, for docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.harness import RESULTS

Result = dict[str, Any]


def newest(benchmark: str) -> list[tuple[Path, Result]]:
    """The newest result of a benchmark for each device and configuration label, by the time noted in it."""
    latest: dict[str, tuple[Path, Result]] = {}
    for path in RESULTS.glob(f"*_{benchmark}_*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = f"{result['machine']['device']} {result['label']}"
        if key not in latest or result["written"] > latest[key][1]["written"]:
            latest[key] = (path, result)
    return [latest[key] for key in sorted(latest)]


def loader_table(result: Result) -> list[list[str]]:
    """Loader rates per core and CPU cost, by colour mode."""
    rows = [["colour", "loader", "images/s per core", "CPU-s per 1000 images", "n"]]
    for row in result["rows"]:
        if "absent" in row:
            continue
        rate, cost = row["images_per_s_per_core"], row["cpu_s_per_1000_images"]
        rows.append([row["color"], _peer(row), _spread(rate, 0), _spread(cost, 1), str(rate["n"])])
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
        head += [_spread(rate, 1), f"{row['tflops']:.3g}", str(rate["n"])]
        if has_use:
            memory = row["peak_memory_gb"]
            head += [_percent(row["mfu_measured"]), _percent(row["mfu_vendor"])]
            head.append(f"{memory:.1f}" if memory else "-")
        rows.append(head)
    return rows


def presized_table(result: Result) -> list[list[str]]:
    """What downscaled shards save and cost."""
    rows = [["shorter side", "images touched", "bytes", "pixels", "error, levels", "PSNR, dB"]]
    for row in result["rows"]:
        touched = f"{row['touched']} of {row['images']}"
        shares = [f"{row[name]:.0%}" for name in ("bytes_of_original", "pixels_of_original")]
        errors = [_spread(row["mean_error_levels"], 2), _spread(row["psnr_db"], 1)]
        rows.append([f"{row['max_size']} px", touched, *shares, *errors])
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
            [*head, _spread(rate, 1), _spread(row["gain"], 3), str(rate["n"]), kernels, *times]
        )
    return rows


def color_table(result: Result) -> list[list[str]]:
    """The colour chain of a batch on a GPU."""
    rows = [["colour", "images", "launches", "device, ms", "host, ms", "n"]]
    for row in result["rows"]:
        device, host = row["device_ms"], row["host_ms"]
        head = [row["contender"], str(row["batch_size"]), str(row.get("launches", "-"))]
        rows.append([*head, _spread(device, 3), _spread(host, 2), str(device["n"])])
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
            spread = row.get(f"{part}_us")
            if spread is None:
                cells += ["-", "-"]
                continue
            share = row[f"{part}_floor_us"] / spread["median"]
            cells += [_spread(spread, 1), f"{100 * share:.0f} %"]
        tail = (row["launches"], row["peak_mib"], row["forward_us"]["n"])
        rows.append([*cells, *(str(value) for value in tail)])
    return rows


def e2e_table(result: Result) -> list[list[str]]:
    """The step fed by the real loader, beside the same step on synthetic data."""
    rows = [["model", "batch", "real images/s", "synthetic images/s", "ratio", "waiting", "n"]]
    for row in result["rows"]:
        rates = [_spread(row[name], 1) for name in ("images_per_s", "synthetic_images_per_s")]
        waiting = f"{row['wait_share']['median']:.1%}"
        ratio = row["ratio"]
        batch = str(result["config"]["batch_size"])
        rows.append([row["model"], batch, *rates, _spread(ratio, 3), waiting, str(ratio["n"])])
    return rows


def growth_table(result: Result) -> list[list[str]]:
    """Costs that grow with the number of samples, and those that do not."""
    head = ["samples", "start-up, CPU-s", "epoch plan, CPU-s", "a batch's rows, us"]
    rows = [[*head, "peak of loading, MiB", "peak with the plan, MiB", "state, bytes"]]
    for row in result["rows"]:
        seconds = [_spread(row[name], 3) for name in ("startup_s", "plan_s")]
        small = [f"{row[name]['median']:.0f}" for name in ("positions_us_per_batch", "index_mib")]
        sizes = [f"{row[name]['median']:.0f}" for name in ("peak_mib", "state_bytes")]
        rows.append([f"{row['samples']:,}", *seconds, *small, *sizes])
    return rows


def sweep_table(result: Result) -> list[list[str]]:
    """One setting against the rate."""
    name = result["label"].replace("-", "_")
    rows = [[name.replace("_", " "), "images/s", "of the first", "n"]]
    has_peak = any("peak_gib" in row for row in result["rows"])
    rows[0] += ["peak, GiB"][:has_peak]
    measured = [row for row in result["rows"] if "images_per_s" in row]
    for row in result["rows"]:
        if row not in measured:
            rows.append([f"{row[name]:g}", row["error"], *["-"] * (len(rows[0]) - 2)])
            continue
        rate = row["images_per_s"]
        gain = rate["median"] / measured[0]["images_per_s"]["median"]
        peak = [f"{row['peak_gib']:.1f}"] if has_peak else []
        rows.append([f"{row[name]:g}", _spread(rate, 1), f"{gain:.2f}x", str(rate["n"]), *peak])
    return rows


def planted_table(result: Result) -> list[list[str]]:
    """Bottlenecks that were put there, what the profiler named, and how its predictions came out."""
    rows = [["planted", "how", "named", "of the step unexplained", "applied: predicted, measured"]]
    for row in result["rows"]:
        named = row["named"] if row["right"] else f"{row['named']} (wrong)"
        applied = [
            f"{one['action']}: {one['predicted']:.0f}, {one['measured']:.0f} images/s"
            for one in row["what_if"]
        ]
        unexplained = f"{abs(row['residual_percent']):.1f}%"
        rows.append([row["planted"], row["what"], named, unexplained, "; ".join(applied) or "-"])
    return rows


def profile_table(result: Result) -> list[list[str]]:
    """Predictions of `cmae profile` beside what the change brought."""
    rows = [["change", "images/s before", "predicted", "measured", "error", "n"]]
    for row in result["rows"]:
        before, predicted = row["images_per_s_before"], row["predicted_images_per_s"]
        measured = row["measured_images_per_s"]
        cells = [f"{before:.0f}", f"{predicted:.0f}", _spread(measured, 0)]
        rows.append([row["action"], *cells, f"{row['error']:+.1%}", str(measured["n"])])
    return rows


TABLES: dict[str, Callable[[Result], list[list[str]]]] = {
    "loader": loader_table,
    "step": step_table,
    "presized": presized_table,
    "levers": levers_table,
    "kernels": kernels_table,
    "color": color_table,
    "e2e": e2e_table,
    "growth": growth_table,
    "sweep": sweep_table,
    "planted": planted_table,
    "profile": profile_table,
}
NOTES: dict[str, Callable[[Result], list[str]]] = {"loader": loader_notes}
"""Lines under a table."""


def render(name: str, results: str) -> str:
    """Markdown of the newest tables of a benchmark, each with its machine and result file under it.

    Args:
        name: Benchmark, a key of `TABLES`.
        results: Path from the page to the folder of result files, for the links.
    """
    found = newest(name)
    if not found:
        return "*not measured yet*"
    return "\n\n".join(
        _render_one(name, f"{results}/{path.name}", result) for path, result in found
    )


def _render_one(name: str, link: str, result: Result) -> str:
    head, *body = TABLES[name](result)
    lines = [head, ["---"] * len(head), *body]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    data = f"; {result['config']['data']}" if "data" in result["config"] else ""
    notes = "\n".join(f"- {note}" for note in NOTES[name](result)) if name in NOTES else ""
    return (
        f"{table}\n\n{notes}{notes and chr(10) * 2}Median (smallest to largest) of n interleaved rounds on "
        f"{result['machine']['device']}{data}; [result file]({link})."
    )


def _spread(summary: dict[str, float], digits: int) -> str:
    median, low, high = (f"{summary[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"
