"""How the threads of the loader's stages spend their time, from its counters."""

from __future__ import annotations

from dataclasses import dataclass

from cmae.pipeline.stage_stats import LoaderSnapshot, StageSnapshot
from cmae.train.profiling.analysis.records import Phase, Profile

WHAT = {
    "read": "bytes from storage",
    "decode_augment": "decode, crop, colour",
    "prefetch": "masks, copy to the device",
    "queue": "queue in front of the training thread",
}
"""Each stage of the loader, for a reader who has not seen its code."""


@dataclass(frozen=True)
class StageShares:
    """One stage over a window: shares of its threads' time, and rates.

    What is missing to 1 was spent elsewhere: the thread that takes batches is in the training step.
    """

    stage: StageSnapshot
    busy: float
    starved: float
    """Waiting for input."""
    blocked: float
    """Waiting for room downstream."""
    images_per_s: float
    mb_per_s: float

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.stage.name

    @property
    def capacity_images_per_s(self) -> float:
        """What the stage would do if its threads were always busy; nan where nothing was done."""
        return self.images_per_s / self.busy if self.busy > 0 else float("nan")


def stage_shares(window: LoaderSnapshot) -> list[StageShares]:
    """Every stage of a window, in the order of the flow."""
    return [_shares(stage, window.time_s) for stage in window.stages.values()]


def _shares(stage: StageSnapshot, time_s: float) -> StageShares:
    available = max(stage.threads * time_s, 1e-9)
    return StageShares(
        stage,
        busy=stage.busy_s / available,
        starved=stage.starved_s / available,
        blocked=stage.blocked_s / available,
        images_per_s=stage.items / max(time_s, 1e-9),
        mb_per_s=stage.bytes / 1e6 / max(time_s, 1e-9),
    )


def loader_phase(profile: Profile) -> Phase | None:
    """The phase whose loader a report shows: the full run, else the last one that ran a loader."""
    with_loader = [phase for phase in profile.phases if phase.loader is not None]
    full = [phase for phase in with_loader if phase.name == "full"]
    return next(iter(full + with_loader[::-1]), None)


def loader_window(phase: Phase) -> LoaderSnapshot:
    """The counters of a phase that ran a loader."""
    if phase.loader is None:
        raise ValueError(f"phase {phase.name!r} ran no loader")
    return LoaderSnapshot.from_dict(phase.loader)
