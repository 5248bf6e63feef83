"""`cmae evaluate` and `cmae finetune`: what an encoder is worth, rung by rung."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from cmae.errors import CmaeError, require
from cmae.paths import expand_home
from cmae.pipeline.formats.atomic import atomic_write
from cmae.train.distributed import World, join_world
from cmae.train.evaluation.encoders import load_encoder
from cmae.train.evaluation.features import Features, Images, compute_features
from cmae.train.evaluation.knn import knn_sweep
from cmae.train.evaluation.probes import (
    DEFAULT_DECAYS,
    DEFAULT_LRS,
    ProbeData,
    lars_probe,
    logistic_probe,
)
from cmae.train.finetune.config import FinetuneConfig
from cmae.train.finetune.plots import confusion_plot
from cmae.train.finetune.run import finetune, load_classifier, plain_settings, score_images
from cmae.train.finetune.trainer import Scores
from cmae.train.monitor.console import PlainConsole


@dataclass(frozen=True)
class EvalConfig:
    """What every rung on frozen features asks for."""

    train: str | list[str] = ""
    """Labelled WebDataset tars, with indices, to compare with or to learn from."""
    val: str | list[str] = ""
    """Labelled WebDataset tars, with indices, to score."""
    branch: str = "online"
    """'online', or 'target' for the moving average of a checkpoint."""
    pools: list[str] = field(default_factory=lambda: ["mean", "cls"])
    """'mean' of the patch tokens, 'cls' token."""
    img_size: int | None = None
    """Side of the images, px; position embeddings are interpolated. null: the encoder's."""
    centre_share: float = 0.875
    """Side of the centred square over the image's shorter side; 1 for images that are only objects."""
    max_samples: int | None = None
    """Only so many images of each set, the first ones. null: all."""
    batch_size: int = 128
    """Images of a rank at a time."""
    cache: Path | None = Path("runs/features")
    """Folder in which features are kept, by weights, data and settings. null: nowhere."""
    out: Path | None = None
    """JSON file for the result. null: `evaluation/KIND.json` in the run's folder, else in runs."""
    device: str = "auto"
    """'auto' takes CUDA when there is a GPU."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("cache", "out"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else expand_home(value))
        require(bool(self.train), "--train", self.train, "labelled tars")
        require(bool(self.val), "--val", self.val, "labelled tars")
        require(self.branch in ("online", "target"), "--branch", self.branch, "online or target")
        known = set(self.pools) <= {"mean", "cls"} and bool(self.pools)
        require(known, "--pools", self.pools, "mean, cls or both")
        require(0 < self.centre_share <= 1, "--centre_share", self.centre_share, "in (0, 1]")
        for name in ("img_size", "max_samples", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", value, ">= 1")


def evaluate_knn(
    encoder: str, config: EvalConfig, *, k: Sequence[int], temperature: Sequence[float]
) -> int:
    """k-nearest-neighbour accuracy for every pool, k and temperature.

    Args:
        encoder: Source of the encoder, see `load_encoder`.
        config: Images and pools.
        k: Numbers of neighbours.
        temperature: Temperatures of the votes' weights.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join_world(config.device))
        train, val, name = _features(encoder, config, world, last=1)
        if not world.is_main:
            return 0
        rows: list[dict[str, Any]] = []
        for pool in _pools(train, config):
            found = knn_sweep(
                train.by_pool[pool, 1].to(world.device),
                train.labels.to(world.device),
                val.by_pool[pool, 1].to(world.device),
                val.labels.to(world.device),
                num_classes=_num_classes(train, val),
                ks=[one for one in k if one <= len(train)] or [len(train)],
                temperatures=temperature,
            )
            for (neighbours, heat), accuracy in found.items():
                setting = {"pool": pool, "k": neighbours, "temperature": heat}
                rows.append(setting | {"accuracy": accuracy})
    best = max(rows, key=lambda row: float(row["accuracy"]))
    columns = {"pool": "pool", "k": "k", "temperature": "temperature", "accuracy": "top-1"}
    _tell(f"k-NN of {name}", columns, rows, best)
    _write(encoder, "knn", config, {"encoder": name, "rows": rows, "num_val": len(val)})
    return 0


def evaluate_linear(
    encoder: str, config: EvalConfig, *, blocks: Sequence[int], methods: Sequence[str]
) -> int:
    """Linear probes of every pool and of the last blocks together.

    Args:
        encoder: Source of the encoder, see `load_encoder`.
        config: Images and pools.
        blocks: Numbers of last blocks whose features are put side by side.
        methods: 'logistic' (L-BFGS), 'lars' (MAE's protocol, on kept features).
    """
    unknown = set(methods) - {"logistic", "lars"}
    require(not unknown, "--methods", list(methods), "logistic, lars or both")
    require(all(one >= 1 for one in blocks), "--blocks", list(blocks), ">= 1")
    with ExitStack() as stack:
        world = stack.enter_context(join_world(config.device))
        train, val, name = _features(encoder, config, world, last=max(blocks))
        if not world.is_main:
            return 0
        console = PlainConsole(stderr=True)
        rows: list[dict[str, Any]] = []
        for pool in _pools(train, config):
            for count in blocks:
                data = _probe_data(train, val, pool, count, world)
                for method in methods:
                    probe = logistic_probe if method == "logistic" else lars_probe
                    console.print(f"{method}, {pool} of the last {count}:", soft_wrap=True)
                    result = probe(data, tell=lambda line: console.print(f"  {line}"))
                    row = {"method": method, "pool": pool, "blocks": count}
                    row |= {"setting": result.chosen.setting, "held_out": result.chosen.held_out}
                    row |= {"accuracy": result.chosen.accuracy, "top5": result.chosen.top5}
                    rows.append({**row, "all": [asdict(one) for one in result.rows]})
    best = max(rows, key=lambda row: float(row["held_out"]))
    columns = {"method": "method", "pool": "pool", "blocks": "blocks", "setting": "decay or lr"}
    columns |= {"held_out": "held out", "accuracy": "top-1", "top5": "top-5"}
    _tell(f"linear probes of {name}", columns, rows, best)
    content = {"encoder": name, "rows": rows, "num_val": len(val)}
    content |= {"decays": DEFAULT_DECAYS, "lrs": DEFAULT_LRS}
    _write(encoder, "linear", config, content)
    return 0


def evaluate_partial(config: FinetuneConfig, blocks: Sequence[float]) -> int:
    """Fine-tune the last blocks alone, for several numbers of them; each has a folder in `config.out`.

    Args:
        config: Recipe of fine-tuning.
        blocks: Numbers of last blocks; 0 is the head alone, 0.5 the last block's MLP with it.
    """
    rows = []
    for count in blocks:
        outcome = finetune(replace(config, blocks=count, out=config.out / f"blocks-{count:g}"))
        if outcome.exit_code:
            return outcome.exit_code
        path = config.out / f"blocks-{count:g}" / "result.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        rows.append(
            {"blocks": f"{count:g}", "accuracy": result["val_top1"], "top5": result["val_top5"]}
        )
    columns = {"blocks": "blocks trained", "accuracy": "top-1", "top5": "top-5"}
    _tell(f"partial fine-tuning of {config.encoder}", columns, rows, None)
    _dump(config.out / "partial.json", {"encoder": config.encoder, "rows": rows})
    return 0


def classify(
    classifier: Path,
    shards: list[str],
    *,
    out: Path | None,
    device: str,
    centre_share: float | None,
) -> int:
    """Score a fine-tuned classifier on labelled shards: top-1, top-5, per class, confusion picture.

    Args:
        classifier: Folder of `cmae finetune`, or a checkpoint in it.
        shards: Labelled tars, with indices.
        out: Folder for `scores.json` and `confusion.png`; None: `classify` in the run's folder.
        device: 'auto' takes CUDA when there is a GPU.
        centre_share: Side of the square over the image's shorter side; None: as in its run.
    """
    with join_world(device) as world:
        model, stored = load_classifier(classifier)
        share = centre_share or float(stored["finetune"]["centre_share"])
        images = Images(shards, model.encoder.img_size, share)
        count = int(stored["num_classes"])
        scores = score_images(model.to(world.device), images, world, count)
        if not world.is_main:
            return 0
    folder = out or (classifier if classifier.is_dir() else classifier.parent) / "classify"
    folder.mkdir(parents=True, exist_ok=True)
    _print_scores(scores, images)
    names = _class_names(shards, count)
    confusion_plot(scores.confusion, names, folder / "confusion.png")
    per_class = dict(zip(names, scores.per_class.tolist(), strict=True))
    content: dict[str, Any] = {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss}
    content |= {"num_images": scores.num_images, "per_class": per_class}
    _dump(folder / "scores.json", content | {"confusion": scores.confusion.tolist()})
    return 0


def _features(
    encoder: str, config: EvalConfig, world: World, *, last: int
) -> tuple[Features, Features, str]:
    loaded = load_encoder(encoder, branch=config.branch, img_size=config.img_size)  # type: ignore[arg-type]
    loaded = loaded.to(world.device)
    found = []
    for what in ("train", "val"):
        images = Images(
            getattr(config, what), loaded.img_size, config.centre_share, config.max_samples
        )
        found.append(
            compute_features(
                loaded,
                images,
                world=world,
                last=last,
                batch_size=config.batch_size,
                cache=config.cache,
                what=what,
            )
        )
        if found[-1].num_left_out and world.is_main:
            PlainConsole(stderr=True).print(
                f"{what}: {found[-1].num_left_out} image(s) could not be read and are left out; `cmae shards "
                "verify` names them",
                soft_wrap=True,
            )
    name = loaded.name + ("" if config.branch == "online" else f", {config.branch}")
    return found[0], found[1], name


def _pools(features: Features, config: EvalConfig) -> list[str]:
    """The pools asked for that the encoder has."""
    found = [pool for pool in config.pools if (pool, 1) in features.by_pool]
    if not found:
        raise CmaeError(f"--pools is {config.pools}, and this encoder has no cls token: take mean")
    return found


def _num_classes(*sets: Features) -> int:
    return max(one.num_classes for one in sets)


def _probe_data(train: Features, val: Features, pool: str, count: int, world: World) -> ProbeData:
    def join(features: Features) -> torch.Tensor:
        have = max(block for name, block in features.by_pool if name == pool)
        if count > have:
            raise CmaeError(
                f"--blocks holds {count}, and {have} block(s) of this encoder can be had"
            )
        parts = [features.by_pool[pool, block].float() for block in range(1, count + 1)]
        return torch.cat(parts, dim=1).to(world.device)

    return ProbeData(
        join(train),
        train.labels.to(world.device),
        join(val),
        val.labels.to(world.device),
        _num_classes(train, val),
    )


def _tell(
    title: str, columns: dict[str, str], rows: list[dict[str, Any]], best: dict[str, Any] | None
) -> None:
    table = Table(title=title, title_justify="left")
    for name in columns.values():
        table.add_column(name, justify="right")
    for row in rows:
        cells = [_cell(name, row[name]) for name in columns]
        table.add_row(*cells, style="bold" if row is best else "")
    PlainConsole(highlight=False).print(table)


def _cell(name: str, value: Any) -> str:
    if name in ("accuracy", "top5", "held_out"):
        return f"{value:.2%}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _print_scores(scores: Scores, images: Images) -> None:
    console = PlainConsole(highlight=False)
    console.print(
        f"top-1 {scores.top1:.2%}  top-5 {scores.top5:.2%}  loss {scores.loss:.4f}  of "
        f"{scores.num_images} images of {images.shards}",
        soft_wrap=True,
    )


def _class_names(shards: list[str], count: int) -> list[str]:
    """Names from `classes.json` beside the shards, else numbers."""
    for shard in shards:
        path = Path(shard).parent / "classes.json"
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            names = content if isinstance(content, list) else list(content)
            if len(names) == count:
                return [str(name) for name in names]
    return [str(number) for number in range(count)]


def _write(encoder: str, kind: str, config: EvalConfig, content: dict[str, Any]) -> None:
    path = config.out
    if path is None:
        source = Path(encoder)
        folder = source if source.is_dir() else Path("runs")
        path = folder / "evaluation" / f"{kind}.json"
    _dump(path, {**content, "config": plain_settings(config)})


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
    PlainConsole(stderr=True).print(f"wrote {path}", soft_wrap=True)
