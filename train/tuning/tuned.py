"""What `cmae tune` stored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cmae.pipeline import expand_shards
from cmae.pipeline.formats.atomic import atomic_write
from cmae.pipeline.remote.schemes import is_local
from cmae.train.config import Config
from cmae.train.distributed import threads_per_rank
from cmae.train.loop.loader_settings import LoaderSettings
from cmae.train.machine import cpu_name, package_version

FORMAT = 1

_PACKAGES = ("cmae", "torch", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "numpy")

_PLACE = ("cpu", "cores", "gpu", "shards")
"""Circumstances that tell machines and data apart; a difference in the others makes an entry stale."""


class TunedEntry(NamedTuple):
    """What one `cmae tune` found."""

    circumstances: dict[str, Any]
    settings: LoaderSettings
    date: str
    measured: dict[str, float]
    """images_per_s and cpu_s_per_1000, of the settings and of the defaults."""


def describe_circumstances(config: Config, device: torch.device) -> dict[str, Any]:
    """Everything that an optimum may depend on, as plain JSON values."""
    data = config.data
    paths = expand_shards(data.shards, storage_options=data.storage_options)
    return {
        "cpu": cpu_name(),
        "cores": threads_per_rank(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "shards": shards_digest(paths),
        "source": data.source,
        "remote": data.remote,
        "view_backend": config.speed.view_backend,
        "views": asdict(config.loader_views),
        "versions": {name: package_version(name) for name in _PACKAGES},
    }


def shards_digest(paths: Sequence[str]) -> str:
    """16 hex digits over names and sizes of the shards; of URLs, over the URLs. Nothing is opened."""
    digest = hashlib.sha256()
    for path in paths:
        local = is_local(path)
        line = f"{Path(path).name} {os.path.getsize(path)}" if local else path
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def tune_path() -> Path:
    """`$XDG_CACHE_HOME/cmae/tune.json`, or `~/.cache/cmae/tune.json`."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "cmae" / "tune.json"


def find_tuned(path: Path, circumstances: dict[str, Any]) -> tuple[TunedEntry | None, str]:
    """The entry for these circumstances; else None, and a line where one was found and does not fit."""
    try:
        entries = _read_entries(path)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"{path} is ignored: {error}. `cmae tune` writes it again"
    here = [entry for entry in entries if _same(entry.circumstances, circumstances, _PLACE)]
    for entry in here:
        if entry.circumstances == circumstances:
            return entry, ""
    if not here:
        return None, ""
    latest = max(here, key=lambda entry: entry.date)
    changes = ", ".join(_changes(latest.circumstances, circumstances))
    return None, f"tuned settings of {latest.date} are ignored: {changes}; run `cmae tune` again"


def store_tuned(path: Path, entry: TunedEntry) -> None:
    """Add an entry; it replaces one of the same circumstances.

    Raises:
        OSError: The file cannot be written; says what to do instead.
    """
    try:
        entries = _read_entries(path)
    except (OSError, ValueError):  # absent, or unreadable: then it is worth nothing
        entries = []
    kept = [one for one in entries if one.circumstances != entry.circumstances]
    content = {"format": FORMAT, "entries": [_to_json(one) for one in (*kept, entry)]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1).encode() + b"\n")
    except OSError as error:
        flags = " ".join(
            f"--speed.{name} {value}" for name, value in asdict(entry.settings).items()
        )
        raise OSError(
            f"cannot store the settings in {path}: {error.strerror}. Set XDG_CACHE_HOME to a folder that "
            f"can be written, or give them to each run: {flags}"
        ) from error


def _read_entries(path: Path) -> list[TunedEntry]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}, which this version reads")
    try:
        return [
            TunedEntry(
                one["circumstances"],
                LoaderSettings(**one["settings"]),
                str(one["date"]),
                one["measured"],
            )
            for one in content["entries"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"an entry is incomplete ({error})") from error


def _to_json(entry: TunedEntry) -> dict[str, Any]:
    return {**entry._asdict(), "settings": asdict(entry.settings)}


def _same(one: dict[str, Any], other: dict[str, Any], names: Sequence[str]) -> bool:
    return all(one.get(name) == other.get(name) for name in names)


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new, f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name} was {old} and is {new}")
    return changes
