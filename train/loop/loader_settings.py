"""The loader's settings for this machine: those of the configuration, else the defaults."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from cmae.pipeline import LoaderConfig
from cmae.pipeline.loader.factory import decode_for
from cmae.pipeline.views.decode_check import WAYS, DecodeChoice
from cmae.train.distributed import World, gather_values, threads_per_rank


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


def default_settings(device_type: str = "cpu") -> LoaderSettings:
    """The threads of this rank's share of the cores, and the loader's defaults."""
    return loader_settings(LoaderConfig(), device_type)


def tunable(device: torch.device) -> tuple[str, ...]:
    """Names of the settings that have an effect on this device."""
    names = ("num_threads", "prefetch", "num_readers")
    return (*names, "hw_decoder_load") if device.type == "cuda" else names


def loader_settings(data: LoaderConfig, device_type: str = "cpu") -> LoaderSettings:
    """Settings of a run; the threads are this rank's share of the cores where they are not given."""
    chosen = {field.name: getattr(data, field.name) for field in fields(LoaderSettings)}
    return LoaderSettings(
        **{**chosen, "num_threads": data.num_threads or threads_per_rank(device_type)}
    )


def agree_on_decode(data: LoaderConfig, world: World) -> DecodeChoice:
    """How all ranks decode JPEGs: the first rank of each node tries, and what works on every node is taken.

    Ranks must agree: the ways differ by a level here and there.
    """
    tries = os.environ.get("LOCAL_RANK", "0") == "0"
    own = decode_for(data, world.device) if tries else None
    choices = [choice for choice in gather_values(own, world) if choice is not None]
    chosen: DecodeChoice = max(choices, key=lambda choice: WAYS.index(choice.way))
    return chosen


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
