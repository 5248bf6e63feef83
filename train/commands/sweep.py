"""`cmae sweep`: the same recipe with one setting changed at a time, several seeds, one table."""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from cmae.errors import CmaeError, require
from cmae.model.export.stored import list_checkpoints
from cmae.paths import expand_home
from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.bench.tables import markdown
from cmae.train.config_parser import RECIPES, load_recipe, nearest, recipe_names
from cmae.train.distributed import World
from cmae.train.evaluation.encoders import load_encoder
from cmae.train.evaluation.features import Features, Images, compute_features
from cmae.train.evaluation.knn import knn_accuracy
from cmae.train.evaluation.probes import ProbeData, logistic_probe
from cmae.train.monitor.console import PlainConsole
from cmae.train.monitor.plots import sweep_plot

METRICS = {"knn": "k-NN", "linear": "linear probe"}
"""Top-1 accuracy of frozen features (mean patch token): k 20 and temperature .07; logistic regression."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Raises:
        CmaeError: A value is not of its kind.
    """

    variants: dict[str, dict[str, Any]]
    """Settings by dotted key, by the name of the variant; the others are compared with the first one."""
    base: list[str] = field(default_factory=lambda: ["cmae_vit_b"])
    """Recipes of all."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of all, by dotted key."""
    train: str = ""
    """Labelled tars with indices: the bank of k-NN, and what the probe learns from."""
    val: str = ""
    """Labelled tars with indices to score."""
    centre_share: float = 0.875
    """Side of the centred square that is scored over the image's shorter side."""

    def __post_init__(self) -> None:
        """Refuse what is not of its kind."""
        require(len(self.variants) > 0, "variants", self.variants, "one or more")
        for name, one in self.variants.items():
            require(isinstance(one, dict), f"variants.{name}", one, "settings by dotted key, or {}")
        require(len({slug(name) for name in self.variants}) == len(self.variants), "variants",
                list(self.variants), "names that differ in letters or digits")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One variant over its seeds; shares, 0..1."""

    name: str
    metric: str
    values: list[float]
    """By seed."""
    mean: float
    deviation: float
    """Over the seeds; nan for one."""
    difference: float
    """Mean difference to the first variant, seed by seed."""
    error: float
    """Standard error of that; from the pooled deviation where there is one seed, nan where that is none."""


def run_sweep(
    file: str,
    *,
    seeds: int,
    out: Path | None,
    settings: Sequence[str],
    train: str | None,
    val: str | None,
    launcher: str,
) -> int:
    """Run what is not done yet, score it, write one table and one picture.

    Args:
        file: Sweep file, or the name of one that ships with the package.
        seeds: Number of seeds, from 0.
        out: Folder; None: runs/NAME.
        settings: More settings of all variants, as 'key=value'.
        train: Tars that override the file's.
        val: Tars that override the file's.
        launcher: Command before `-m cmae.train`, such as 'torchrun --nproc-per-node 8'; '' for this Python.

    Returns:
        Exit code: that of a run that stopped, else 0.

    Raises:
        CmaeError: The file or a setting is wrong, or a run failed.
    """
    require(seeds >= 1, "--seeds", seeds, ">= 1")
    sweep = read_sweep(file, settings)
    sweep_train, sweep_val = train or sweep.train, val or sweep.val
    require(bool(sweep_train), "train", sweep_train, "labelled tars, in the file or as --train")
    require(bool(sweep_val), "val", sweep_val, "labelled tars, in the file or as --val")
    for name in sweep.variants:  # a wrong key is found before hours are spent
        _config(sweep, name, seed=0, out=Path("x"))
    folder = expand_home(out) if out else Path("runs") / Path(file).stem
    console = PlainConsole(stderr=True)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sweep.variants}
    for seed in range(seeds):
        for name in sweep.variants:
            place = folder / slug(name) / f"seed-{seed}"
            console.print(f"{name}, seed {seed}: {place}", style="bold", soft_wrap=True)
            code = _train(sweep, name, seed, place, launcher)
            if code in (75, 130):
                return code
            if code:
                raise CmaeError(
                    f"{name}, seed {seed}, failed with exit code {code}: see above and {place}"
                )
            images = tuple(
                Images(
                    shards,
                    _config(sweep, name, seed=seed, out=place).model.img_size,
                    sweep.centre_share,
                )
                for shards in (sweep_train, sweep_val)
            )
            found[name].append(_score(place, images[0], images[1], folder / "features"))
            _write(folder, summarise(found), Path(file).stem)
    print((folder / "table.md").read_text(encoding="utf-8"), end="")
    console.print(f"wrote {folder / 'table.md'}, results.json, sweep.png", soft_wrap=True)
    return 0


def slug(name: str) -> str:
    """A folder's name for a variant."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def read_sweep(file: str, settings: Sequence[str] = ()) -> Sweep:
    """A sweep file's content, with more settings.

    Args:
        file: YAML file, or name of one that ships with the package.
        settings: Words 'key=value'.

    Raises:
        CmaeError: It is none, or holds unknown keys.
    """
    path = expand_home(file)
    source = path if path.is_file() else RECIPES / "sweeps" / f"{file}.yaml"
    if not source.is_file():
        names = recipe_names("sweeps")
        raise CmaeError(
            f"{file}: give a YAML file, or one of {', '.join(names)}{nearest(file, names)}"
        )
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeError, ValueError) as error:
        raise CmaeError(f"{file} is not YAML: {error}; correct it") from error
    if not isinstance(content, dict):
        raise CmaeError(f"{file} holds a {type(content).__name__}; it must hold `variants:`")
    known = Sweep.__dataclass_fields__.keys()
    if unknown := content.keys() - known:
        name = sorted(map(str, unknown))[0]
        raise CmaeError(
            f"{file}: {name} is no key{nearest(name, list(known))}; keys are {', '.join(known)}"
        )
    base = content.get("base", ["cmae_vit_b"])
    content["base"] = [base] if isinstance(base, str) else base
    content["settings"] = dict(content.get("settings") or {})
    for word in settings:
        key, equals, value = word.partition("=")
        if not equals:
            raise CmaeError(f"--set {word}: it must be key=value")
        content["settings"][key] = yaml.safe_load(value)
    content["variants"] = {
        str(name): one or {} for name, one in dict(content.get("variants") or {}).items()
    }
    return Sweep(**content)


def summarise(found: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Row]:
    """Means, deviations, and differences to the first variant by seed.

    Args:
        found: Scores by metric, of each seed, by variant; seeds that are not done yet are left out.
    """
    rows = []
    for metric in METRICS:
        values = {name: [one[metric] for one in scores] for name, scores in found.items() if scores}
        if not values:
            continue
        first = next(iter(values.values()))
        spreads = [statistics.variance(one) for one in values.values() if len(one) > 1]
        pooled = math.sqrt(statistics.mean(spreads)) if spreads else math.nan
        for name, own in values.items():
            pairs = [a - b for a, b in zip(own, first, strict=False)]
            count = len(pairs)
            error = (
                statistics.stdev(pairs) / math.sqrt(count) if count > 1 else pooled * math.sqrt(2)
            )
            deviation = statistics.stdev(own) if len(own) > 1 else math.nan
            rows.append(
                Row(
                    name,
                    metric,
                    own,
                    statistics.mean(own),
                    deviation,
                    statistics.mean(pairs),
                    error,
                )
            )
    return rows


def _config(sweep: Sweep, name: str, *, seed: int, out: Path) -> Any:
    return load_recipe(*sweep.base, overrides=_overrides(sweep, name, seed=seed, out=out))


def _overrides(sweep: Sweep, name: str, *, seed: int, out: Path) -> dict[str, Any]:
    return {**sweep.settings, **sweep.variants[name], "seed": seed, "run.out": str(out)}


def _train(sweep: Sweep, name: str, seed: int, place: Path, launcher: str) -> int:
    """Run or continue one pretraining; its exit code."""
    words = [word for recipe in sweep.base for word in ("--recipe", recipe)]
    for key, value in _overrides(sweep, name, seed=seed, out=place).items():
        plain = value if isinstance(value, str) else json.dumps(value)
        words.append(f"--{key}={plain}")
    before = shlex.split(launcher) if launcher else [sys.executable]
    return subprocess.run([*before, "-m", "cmae.train", "pretrain", *words], check=False).returncode


def _score(place: Path, train: Images, val: Images, cache: Path) -> dict[str, float]:
    """Scores of a finished run; kept beside it by the name of its checkpoint."""
    checkpoint = list_checkpoints(place / "checkpoints")[-1]
    path = place / "scores.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("checkpoint") == checkpoint.name:
            return {metric: kept[metric] for metric in METRICS}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder, world = load_encoder(checkpoint).to(device), World(0, 1, device)
    known, asked = (
        compute_features(encoder, images, world=world, cache=cache, what=what)
        for images, what in ((train, "train"), (val, "val"))
    )
    scores = _accuracies(known, asked, device)
    with atomic_write(path) as file:
        file.write(json.dumps({"checkpoint": checkpoint.name, **scores}).encode())
    return scores


def _accuracies(train: Features, val: Features, device: torch.device) -> dict[str, float]:
    x, y = (one.by_pool["mean", 1].float().to(device) for one in (train, val))
    labels, wanted = train.labels.to(device), val.labels.to(device)
    count = max(train.num_classes, val.num_classes)
    knn = knn_accuracy(x, labels, y, wanted, num_classes=count, k=min(20, len(train)))
    probe = logistic_probe(ProbeData(x, labels, y, wanted, count))
    return {"knn": knn, "linear": probe.chosen.accuracy}


def _write(folder: Path, rows: list[Row], title: str) -> None:
    """Table, results and picture of what is done so far."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(row.name for row in rows))
    by_place = {(row.name, row.metric): row for row in rows}
    head = ["variant", *(f"{label}, %" for label in METRICS.values())]
    head += [*(f"{label}: to the first" for label in METRICS.values()), "seeds"]
    lines = [head]
    for name in names:
        own = [by_place[name, metric] for metric in METRICS]
        means = [_plus_minus(row.mean, row.deviation, sign="") for row in own]
        steps = [
            "-" if name == names[0] else _plus_minus(r.difference, r.error, sign="+") for r in own
        ]
        lines.append([name, *means, *steps, str(len(own[0].values))])
    note = (
        "Top-1 accuracy of frozen features (mean patch token) in percent, with its deviation over the seeds; "
        "differences seed by seed, with their standard error."
    )
    with atomic_write(folder / "table.md") as file:
        file.write(f"## {title}\n\n{markdown(lines)}\n\n{note}\n".encode())
    with atomic_write(folder / "results.json") as file:
        file.write((json.dumps([vars(row) for row in rows], indent=1) + "\n").encode())
    sweep_plot(
        {
            label: {row.name: row.values for row in rows if row.metric == metric}
            for metric, label in METRICS.items()
        },
        folder / "sweep.png",
    )


def _plus_minus(value: float, spread: float, *, sign: str) -> str:
    text = f"{100 * value:{sign}.2f}"
    return text if math.isnan(spread) else f"{text} ± {100 * spread:.2f}"
