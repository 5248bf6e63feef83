"""Tables in Markdown from the newest result file of each benchmark, for docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lib.results import RESULTS

from cmae.train.bench import tables
from cmae.train.bench.tables import Result, spread


def newest(benchmark: str) -> list[tuple[Path, Result]]:
    """The newest result of a benchmark for each device and configuration label, by the time noted in it."""
    latest: dict[str, tuple[Path, Result]] = {}
    for path in RESULTS.glob(f"*_{benchmark}_*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        key = f"{result['machine']['device']} {result['label']}"
        if key not in latest or result["written"] > latest[key][1]["written"]:
            latest[key] = (path, result)
    return [latest[key] for key in sorted(latest)]


def presized_table(result: Result) -> list[list[str]]:
    """What downscaled shards save and cost."""
    rows = [["shorter side", "images touched", "bytes", "pixels", "error, levels", "PSNR, dB"]]
    for row in result["rows"]:
        touched = f"{row['touched']} of {row['images']}"
        shares = [f"{row[name]:.0%}" for name in ("bytes_of_original", "pixels_of_original")]
        errors = [spread(row["mean_error_levels"], 2), spread(row["psnr_db"], 1)]
        rows.append([f"{row['max_size']} px", touched, *shares, *errors])
    return rows


def writers_table(result: Result) -> list[list[str]]:
    """Writers of shards on the same files."""
    rows = [["writer", "images/s", "CPU an image, ms", "bytes an image", "n"]]
    for row in result["rows"]:
        rate, cost = row["images_per_s"], row["cpu_ms_per_image"]
        size = f"{row['bytes_per_image']:,.0f}"
        rows.append([row["writer"], spread(rate, 0), spread(cost, 2), size, str(rate["n"])])
    return rows


def observability_table(result: Result) -> list[list[str]]:
    """Steps that are watched beside bare ones."""
    rows = [["a step, ms: watched", "bare", "difference of pairs", "noting, ms", "n"]]
    for row in result["rows"]:
        times = [spread(row[name], 1) for name in ("watched_ms", "bare_ms", "difference_ms")]
        rows.append([*times, f"{row['noting_ms']:.2f}", str(row["watched_ms"]["n"])])
    return rows


def color_table(result: Result) -> list[list[str]]:
    """The colour chain of a batch on a GPU."""
    rows = [["colour", "images", "launches", "device, ms", "host, ms", "n"]]
    for row in result["rows"]:
        device, host = row["device_ms"], row["host_ms"]
        head = [row["contender"], str(row["batch_size"]), str(row.get("launches", "-"))]
        rows.append([*head, spread(device, 3), spread(host, 2), str(device["n"])])
    return rows


def growth_table(result: Result) -> list[list[str]]:
    """Costs that grow with the number of samples, and those that do not."""
    head = ["samples", "start-up, CPU-s", "epoch plan, CPU-s", "a batch's rows, us"]
    rows = [[*head, "peak of loading, MiB", "peak with the plan, MiB", "state, bytes"]]
    for row in result["rows"]:
        seconds = [spread(row[name], 3) for name in ("startup_s", "plan_s")]
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
        rows.append([f"{row[name]:g}", spread(rate, 1), f"{gain:.2f}x", str(rate["n"]), *peak])
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
        cells = [f"{before:.0f}", f"{predicted:.0f}", spread(measured, 0)]
        rows.append([row["action"], *cells, f"{row['error']:+.1%}", str(measured["n"])])
    return rows


TABLES: dict[str, Callable[[Result], list[list[str]]]] = {
    **tables.TABLES,
    "presized": presized_table,
    "writers": writers_table,
    "color": color_table,
    "observability": observability_table,
    "growth": growth_table,
    "sweep": sweep_table,
    "planted": planted_table,
    "profile": profile_table,
}


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
    table = tables.markdown(TABLES[name](result))
    data = f"; {result['config']['data']}" if "data" in result["config"] else ""
    notes = (
        "\n".join(f"- {note}" for note in tables.NOTES[name](result))
        if name in tables.NOTES
        else ""
    )
    return (
        f"{table}\n\n{notes}{notes and chr(10) * 2}Median (smallest to largest) of n interleaved rounds on "
        f"{result['machine']['device']}{data}; [result file]({link})."
    )
