"""The loader's settings for this machine: those of the configuration, else the defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from cmae.pipeline import LoaderConfig
from cmae.train.distributed import threads_per_rank


@dataclass(frozen=True)
class LoaderSettings:
    """What `cmae tune` searches. None of it changes what a batch holds."""

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
    return loader_settings(LoaderConfig())


def tunable(device: torch.device) -> tuple[str, ...]:
    """Names of the settings that have an effect on this device."""
    names = ("num_threads", "prefetch", "num_readers")
    return (*names, "hw_decoder_load") if device.type == "cuda" else names


def loader_settings(data: LoaderConfig) -> LoaderSettings:
    """Settings of a run; the threads are this rank's share of the cores where they are not given."""
    chosen = {field.name: getattr(data, field.name) for field in fields(LoaderSettings)}
    return LoaderSettings(**{**chosen, "num_threads": data.num_threads or threads_per_rank()})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
