"""Settings of `cmae profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmae.errors import CmaeError
from cmae.paths import expand_home


@dataclass(frozen=True)
class ProfileConfig:
    """How long to measure, and where the profile goes."""

    out: Path = Path("runs/profile")
    """Folder for profile.json and the reports."""
    budget_s: float = 240.0
    """Seconds to measure, after set-up; rounds and steps are fitted to it."""
    rounds: int | None = None
    """How often every phase is repeated. null: up to 12, as the budget allows."""
    steps: int | None = None
    """Timed steps of a phase in a round. null: about a second of them, at least 3."""
    verify: int = 0
    """Apply this many of the best actions that are settings, one by one, and measure them."""
    trials: bool = True
    """Measure what each operation on an image costs, and what other settings of the views would; off saves
    about a minute on slow machines."""

    def __post_init__(self) -> None:
        """Refuse sizes that measure nothing."""
        object.__setattr__(self, "out", expand_home(self.out))
        checks = {
            "budget_s": (self.budget_s > 0, "> 0"),
            "rounds": (self.rounds is None or self.rounds >= 2, ">= 2, or null"),
            "steps": (self.steps is None or self.steps >= 1, ">= 1, or null"),
            "verify": (self.verify >= 0, ">= 0"),
        }
        for name, (ok, allowed) in checks.items():
            if not ok:
                raise CmaeError(f"profile.{name} is {getattr(self, name)}; it must be {allowed}")
