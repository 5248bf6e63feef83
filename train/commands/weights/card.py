"""A model card: where weights come from, how to read them, what they reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cmae.model import CMAE
from cmae.model.export.stored import is_checkpoint, read_file
from cmae.train.machine import package_version

_PACKAGES = ("cmae", "torch", "timm", "numpy")


def model_card(checkpoint: Path, model: CMAE, *, branch: str, file: str, how: str) -> str:
    """Markdown about an exported encoder.

    Args:
        checkpoint: File that it comes from; its run's metrics and evaluations are read where they are.
        model: The model in it.
        branch: Exported encoder.
        file: Name of what was written.
        how: Lines of Python that read it, with '{file}'.
    """
    state = read_file(checkpoint)
    stored: dict[str, Any] = state if is_checkpoint(state) else {}
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
    config = model.config
    encoder = model.encoder if branch == "online" else model.target_encoder
    count = sum(p.numel() for p in encoder.parameters()) if encoder is not None else 0
    method = "CMAE" if config.has_contrast else "MAE"
    lines = [
        "---",
        "library_name: cmae",
        f"tags: [self-supervised, masked-autoencoder{', contrastive' if config.has_contrast else ''}]",
        "---",
        "",
        f"# {method} encoder, {config.embed_dim} wide, {config.depth} blocks, patch {config.patch_size}",
        "",
        f"{count / 1e6:.2f} M parameters ({branch} encoder), images of {config.img_size} px, pretrained "
        f"without labels by {method} (arXiv {'2207.13532' if config.has_contrast else '2111.06377'}).",
        "",
        "## Use",
        "",
        "```python",
        *how.format(file=file).splitlines(),
        "```",
        "",
        "Images are RGB, resized so that the centre square fills the input, normalised with the mean and "
        "deviation of ImageNet. Features for k-NN and linear probes: the mean of the patch tokens after the "
        "final norm.",
        "",
        "## Training",
        "",
        *_training(stored),
        "",
        "## Results",
        "",
        *(_results(run) or ["None stand in the run's folder; `cmae evaluate` writes them."]),
        "",
        "## Versions",
        "",
        "- " + ", ".join(f"{name} {package_version(name)}" for name in _PACKAGES),
        "",
    ]
    return "\n".join(lines)


def _training(stored: dict[str, Any]) -> list[str]:
    sections = stored.get("config")
    if not isinstance(sections, dict) or "data" not in sections:
        return ["The file holds weights alone: nothing is known of its training."]
    loader, optim = stored.get("loader") or {}, sections.get("optim") or {}
    data = sections["data"]
    shards = stored.get("shards") or []
    lines = [
        f"- {stored.get('step')} steps of {optim.get('global_batch_size')} images, seed "
        f"{sections.get('seed')}",
        f"- data: {data.get('shards')} ({len(shards)} shards, digest {loader.get('digest', '-')})",
        "",
        "```yaml",
    ]
    kept = {name: sections[name] for name in ("model", "optim") if name in sections}
    kept["data"] = {"views": data.get("views")}
    return [*lines, *yaml.safe_dump(kept, sort_keys=False).splitlines(), "```"]


def _results(run: Path | None) -> list[str]:
    """The best row of each evaluation in the run's folder."""
    lines: list[str] = []
    if run is None:
        return lines
    for path in sorted((run / "evaluation").glob("*.json")) if run.is_dir() else []:
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            by = "held_out" if "held_out" in rows[0] else "accuracy"
            best = max(rows, key=lambda row: row[by])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        names = ("method", "pool", "k", "blocks", "setting")
        how = ", ".join(f"{name} {best[name]}" for name in names if name in best)
        lines.append(f"- {path.stem}: {best['accuracy']:.2%} top-1 ({how})")
    scores = run / "scores.json"
    if scores.is_file():
        found = json.loads(scores.read_text(encoding="utf-8"))
        for name, label in (("knn", "k-NN (k 20)"), ("linear", "logistic probe")):
            if name in found:
                lines.append(f"- {label}: {found[name]:.2%} top-1")
    return lines
