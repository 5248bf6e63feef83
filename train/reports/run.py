"""What a run's folder tells: curves, evaluations, health, configuration; several runs beside each other."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cmae.errors import CmaeError
from cmae.model import draw_mask, load_model
from cmae.model.export.stored import list_checkpoints
from cmae.pipeline.bad_samples import LEDGER_FILE, read_ledger
from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.evaluation.encoders import load_encoder
from cmae.train.evaluation.knn import EvalImages, load_eval_images
from cmae.train.monitor.bands import Band, load_bands
from cmae.train.monitor.images import draw_reconstructions
from cmae.train.monitor.metrics import read_metrics
from cmae.train.monitor.plots import PANELS
from cmae.train.reports.charts import curve_chart
from cmae.train.reports.pictures import attention_picture, feature_map, neighbours_picture

Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run has left behind."""

    folder: Path
    records: list[dict[str, float]]
    config: Settings
    evaluations: list[tuple[str, str, float]]
    """Kind, setting, accuracy."""
    num_bad: int
    checkpoints: list[Path]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def last(self) -> dict[str, float]:
        """The newest value of every metric."""
        merged: dict[str, float] = {}
        for record in self.records:
            merged |= record
        return merged


def read_run(folder: Path) -> Run:
    """Read a run's folder; parts that are missing are empty.

    Raises:
        CmaeError: It has no metrics.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise CmaeError(f"{folder} holds no metrics.jsonl: name the folder of a run (run.out)")
    records = read_metrics(path)
    if not records:
        raise CmaeError(f"{path} holds no record yet: a run writes one every run.log_every steps")
    config: Settings = {}
    with suppress(OSError, yaml.YAMLError):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    ledger = folder / LEDGER_FILE
    num_bad = sum(1 for _ in read_ledger(ledger)) if ledger.is_file() else 0
    return Run(
        folder,
        records,
        config,
        read_evaluations(folder),
        num_bad,
        list_checkpoints(folder / "checkpoints"),
    )


def read_evaluations(folder: Path) -> list[tuple[str, str, float]]:
    """Kind, setting and accuracy of what `cmae evaluate`, `finetune` and `sweep` left in a run's folder."""
    found: list[tuple[str, str, float]] = []
    for path in sorted((folder / "evaluation").glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
                names = ("method", "pool", "k", "temperature", "blocks")
                how = ", ".join(f"{name} {row[name]}" for name in names if name in row)
                found.append((path.stem, how, float(row["accuracy"])))
    for name, keys in {"scores.json": ("knn", "linear"), "result.json": ("val_top1",)}.items():
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            found += [(key, name, float(content[key])) for key in keys]
    return found


def write_report(run: Run, path: Path, *, shards: str | None, max_images: int = 600) -> None:
    """Write the page of one run.

    Args:
        run: What `read_run` found.
        path: HTML file.
        shards: Labelled tars whose images the encoder is shown; None: no pictures of it.
        max_images: Images of them that are used.

    Raises:
        CmaeError: The shards hold no labelled image, or there is no checkpoint to show them to.
    """
    pictures = _pictures(run, shards, max_images) if shards else []
    for name, title in {
        "first_batch.png": "First batch: what the network was shown in its first step",
    }.items():
        file = run.folder / name
        if file.is_file():
            pictures.append((title, "", data_uri(file.read_bytes())))
    last = run.last
    _write(
        "run.html.j2",
        path,
        run=run,
        facts=_facts(run),
        charts=_charts([run]),
        pictures=pictures,
        waiting=last.get("data_wait_pct"),
        config=yaml.safe_dump(run.config, sort_keys=False),
    )


def write_comparison(runs: Sequence[Run], path: Path) -> None:
    """Write the page of several runs: curves over each other, scores, and the settings that differ.

    Raises:
        CmaeError: There are fewer than two, or more than six.
    """
    if not 2 <= len(runs) <= 6:
        raise CmaeError(f"{len(runs)} run(s) were given; two to six stand beside each other")
    _write(
        "compare.html.j2",
        path,
        runs=runs,
        names=labels_of(runs),
        charts=_charts(runs),
        metrics=last_metrics(runs),
        evaluations=joined_evaluations(runs),
        settings=different_settings(runs),
    )


def labels_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its folder's, or its whole path where two are alike."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [str(run.folder) for run in runs]


def last_metrics(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    """The newest value of each metric in each run."""
    keys = dict.fromkeys(key for run in runs for key in run.last if key != "step")
    return [(key, [run.last.get(key) for run in runs]) for key in ["step", *keys]]


def joined_evaluations(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    """Accuracies by kind and setting in each run."""
    tables = [{f"{kind}: {how}": value for kind, how, value in run.evaluations} for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [(key, [table.get(key) for table in tables]) for key in keys]


def different_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Dotted keys whose values differ, with each run's."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [(key, [repr(one.get(key, "-")) for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "run.out"]


def data_uri(png: bytes) -> str:
    """A picture inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _flatten(content: Settings, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """Name, value, remark."""
    last = run.last
    optim, model = run.config.get("optim", {}), run.config.get("model", {})
    method = "MAE" if model.get("contrastive_loss") == "none" else "CMAE"
    facts = [
        ("method", method, f"{model.get('embed_dim')} wide, {model.get('depth')} blocks"),
        ("steps", f"{last['step']:.0f}", f"of {optim.get('global_batch_size')} images"),
        ("total loss", f"{last['total']:.4f}", ""),
        ("images/s", f"{last['images_per_s']:.4g}", f"waiting {last['data_wait_pct']:.1f} %"),
        ("bad samples", f"{run.num_bad}", "listed in the ledger" if run.num_bad else "none met"),
    ]
    if run.evaluations:
        kind, how, best = max(run.evaluations, key=lambda one: one[2])
        facts.append((f"best {kind}", f"{best:.1%}", how))
    elif "knn_online" in last:
        facts.append(("k-NN while training", f"{last['knn_online']:.1%}", "online encoder"))
    return facts


def _charts(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    charts = []
    names = labels_of(runs)
    bands = _bands(runs[0]) if len(runs) == 1 else {}
    for panel in PANELS:
        lines: dict[str, list[tuple[float, float]]] = {}
        band = bands.get(next(iter(panel.keys)), [])  # of the first line: the online encoder's
        for run, name in zip(runs, names, strict=True):
            for key, label in panel.keys.items():
                points = [(one["step"], one[key]) for one in run.records if key in one]
                if any(value for _, value in points):
                    title = label if len(runs) == 1 else name
                    title += f", {label}" if len(runs) > 1 and len(panel.keys) > 1 else ""
                    lines[title] = points
        if lines and len(lines) <= 6:
            chart = curve_chart(lines, from_zero=panel.from_zero, band=band)
            charts.append((panel.title + ", with the expected range" * bool(band), chart))
    return charts


def _bands(run: Run) -> dict[str, Band]:
    """Ranges that are expected of a run; none where the file is gone."""
    with suppress(CmaeError):
        return load_bands(str(run.config.get("run", {}).get("bands") or ""))
    return {}


def _pictures(run: Run, shards: str, max_images: int) -> list[tuple[str, str, str]]:
    """Title, remark and address of each picture of the newest checkpoint's encoder."""
    if not run.checkpoints:
        raise CmaeError(f"{run.folder} has no checkpoint to show images to: leave --shards out")
    encoder = load_encoder(run.checkpoints[-1])
    images = load_eval_images(shards, encoder.img_size, max_samples=max_images)
    with torch.no_grad():
        parts = [encoder(part)["mean", 1] for part in images.images.split(64)]
    features = torch.cat(parts)
    found = [
        (
            "Reconstructions",
            "original, masked input, reconstruction",
            _reconstructions(run.checkpoints[-1], images),
        ),
        (
            "Nearest neighbours",
            "first the query; green: the same class, red: another",
            data_uri(neighbours_picture(images.images, images.labels, features)),
        ),
        (
            "Map of the features",
            "first two principal components, spread by rank; a frame's colour is its class",
            data_uri(feature_map(images.images, features, images.labels)),
        ),
    ]
    with suppress(ValueError):
        found.insert(
            2,
            (
                "Attention",
                "what the cls token attends to in the last block, mean of its heads",
                data_uri(attention_picture(encoder, images.images)),
            ),
        )
    return [one for one in found if one[2]]


def _reconstructions(checkpoint: Path, images: EvalImages) -> str:
    model = load_model(checkpoint)
    if model.pixel_decoder is None:
        return ""
    rows = torch.linspace(0, len(images.images) - 1, min(8, len(images.images))).long()
    ids_keep, _ = draw_mask(model.config, rows, seed=0, epoch=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.png"
        draw_reconstructions(model, images.images[rows], ids_keep, path)
        return data_uri(path.read_bytes())


def _write(template: str, path: Path, **values: Any) -> None:
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("cmae.train.reports"), PackageLoader("cmae.train.profiling.report")]
        ),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))
