"""Settings of `cmae bench loader`, `step`, `kernels`, `e2e` and `all`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cmae.errors import require
from cmae.paths import expand_home


@dataclass(frozen=True)
class BenchConfig:
    """What a measurement is asked for beside a run's configuration."""

    out: Path = Path("runs/bench")
    """Folder for a JSON file and a Markdown table of each benchmark."""
    batch_size: int | None = None
    """Images in one pass. null: the recipe's speed.micro_batch_size, else 128 on a GPU, 64 for the loader and
    4 for the step on a CPU."""
    rounds: int | None = None
    """Rounds in which all contenders are measured in turn. null: 5, and 3 of the step on a CPU."""
    steps: int | None = None
    """Timed steps or batches of a contender in a round. null: enough for a second or more."""
    peers: bool = True
    """Whether to measure other people's loaders and MAE step beside ours, where they are installed."""
    colors: list[Literal["exact", "fast", "none"]] = field(default_factory=list)
    """Colour modes of the loader to compare: exact, fast, none. Empty: the recipe's."""
    presized: list[int] = field(default_factory=list)
    """Also read copies of the images downscaled to these shorter sides, px."""
    levers: bool = False
    """Measure the step's switches one at a time against the recipe, instead of the recipe beside MAE."""
    compare: Path | None = None
    """Result file of an earlier run (of the same benchmark) to compare with; exit code 1 on a regression."""
    threshold: float = 0.05
    """How much worse a median may be, where the ranges do not overlap, before it is a regression."""
    any_device: bool = False
    """Compare with a result of another device or other settings all the same."""
    json: bool = False
    """Print the result files' contents instead of tables."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        object.__setattr__(self, "out", expand_home(self.out))
        for name in ("batch_size", "rounds", "steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", value, ">= 1, or null")
        require(all(size >= 32 for size in self.presized), "--presized", self.presized, ">= 32 px")
        require(self.threshold >= 0, "--threshold", self.threshold, ">= 0")
