"""The loader's settings for this machine: explicit ones, those that `cmae tune` stored, or the defaults.

`cmae tune` keeps its findings in `$XDG_CACHE_HOME/cmae/tune.json` (or `~/.cache/cmae/tune.json`). An entry
holds the circumstances it was measured in, and is used in exactly these.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cmae.pipeline import expand_shards
from cmae.pipeline.index import atomic_write
from cmae.pipeline.urls import is_local
from cmae.train.config import Config
from cmae.train.distributed import threads_per_rank
from cmae.train.machine import cpu_name, package_version

FORMAT = 1
_PACKAGES = ("cmae", "torch", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "numpy")
_PLACE = ("cpu", "cores", "gpu", "shards")
"""Circumstances that tell machines and data apart; a difference in the others makes an entry stale."""


@dataclass(frozen=True)
class LoaderSettings:
    """What can be tuned. None of it changes what a batch holds."""

    num_threads: int
    """CPU threads that decode."""
    prefetch: int
    """Batches that are ready ahead of the training step."""
    num_readers: int
    """Batches that are read at the same time."""
    hw_decoder_load: float
    """Share of the JPEGs for the GPU's decoder unit; means nothing on a CPU."""

    def describe(self, names: Sequence[str]) -> str:
        """Some of the settings for people: '6 threads, prefetch 3'."""
        words = {
            "num_threads": _count(self.num_threads, "thread"),
            "prefetch": f"prefetch {self.prefetch}",
            "num_readers": _count(self.num_readers, "reader"),
            "hw_decoder_load": f"hw_decoder_load {self.hw_decoder_load:g}",
        }
        return ", ".join(words[name] for name in names)


class TunedEntry(NamedTuple):
    """What one `cmae tune` found."""

    circumstances: dict[str, Any]
    settings: LoaderSettings
    date: str
    measured: dict[str, float]
    """images_per_s and cpu_s_per_1000, of the settings and of the defaults."""


def default_settings() -> LoaderSettings:
    """A thread for each core of this rank, and the loader's defaults."""
    return LoaderSettings(threads_per_rank(), prefetch=2, num_readers=4, hw_decoder_load=0.65)


def tunable(device: torch.device) -> tuple[str, ...]:
    """Names of the settings that have an effect on this device."""
    names = ("num_threads", "prefetch", "num_readers")
    return (*names, "hw_decoder_load") if device.type == "cuda" else names


def loader_settings(config: Config, device: torch.device) -> tuple[LoaderSettings, str]:
    """Settings of a run, and one line that says what came from `cmae tune` ('' if nothing did).

    Explicit settings win over tuned ones, tuned ones over the defaults.
    """
    speed, default = config.speed, default_settings()
    open_names = [name for name in tunable(device) if getattr(speed, name) is None]
    entry, note = None, ""
    if speed.tuned == "auto" and open_names and config.data.shards:
        entry, note = find_tuned(tune_path(), describe_circumstances(config, device))
    base = default if entry is None else entry.settings
    chosen = {
        name: getattr(base, name) if getattr(speed, name) is None else getattr(speed, name)
        for name in asdict(default)
    }
    settings = LoaderSettings(**chosen)
    if entry is not None:
        note = f"tuned settings of {entry.date}: {settings.describe(open_names)}"
    return settings, note


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


# --- the file -------------------------------------------------------------------------------------


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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
