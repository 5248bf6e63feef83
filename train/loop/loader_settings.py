"""The loader's settings for this machine: explicit ones, those that `cmae tune` stored, or the defaults.

`cmae tune` keeps its findings in `$XDG_CACHE_HOME/cmae/tune.json` (or `~/.cache/cmae/tune.json`). An entry
holds the circumstances it was measured in, and is used in exactly these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from cmae.train.config import Config
from cmae.train.distributed import threads_per_rank


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
    from cmae.train.tuning.tuned import describe_circumstances, find_tuned, tune_path

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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
