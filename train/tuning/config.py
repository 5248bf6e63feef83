"""Settings of `cmae tune`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cmae.errors import require
from cmae.paths import expand_home


@dataclass(frozen=True)
class TuneConfig:
    """What `cmae tune` is asked for beside a run's configuration."""

    out: Path = Path("tuned.yaml")
    """Recipe to write."""
    budget_s: float = 150.0
    """Seconds for the whole search."""
    step_images_per_s: float | None = None
    """What one rank's training step takes; a loader that is 10 % faster is fast enough. null: not known."""
    local_ranks: int = 1
    """Ranks that will share this node: the search gets its part of the cores, as each of them will."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        object.__setattr__(self, "out", expand_home(self.out))
        require(self.budget_s >= 1, "budget_s", self.budget_s, "at least 1 second")
        rate = self.step_images_per_s
        require(rate is None or rate > 0, "step_images_per_s", rate, "> 0, or null for not known")
        cores = len(os.sched_getaffinity(0))
        allowed = f"1..{cores}, as each rank needs a core"
        require(1 <= self.local_ranks <= cores, "local_ranks", self.local_ranks, allowed)
