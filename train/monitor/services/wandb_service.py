"""Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb


class WandbService:
    """One run there, gone on with when the folder's run is."""

    def __init__(self, project: str, out: Path, config: dict[str, Any]) -> None:
        # An id of its own: two runs may have folders of one name.
        stored = out / "wandb_id"
        if not stored.is_file():
            stored.write_text(wandb.util.generate_id(), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            dir=str(out),
            name=out.name,
            id=stored.read_text(encoding="utf-8"),
            config=config,
            resume="allow",
        )

    def log(self, step: int, record: dict[str, float]) -> None:
        """Send a record; the client leaves out steps that it has."""
        self._run.log(record, step=step)

    def close(self) -> None:
        """Wait for what is on its way."""
        self._run.finish()
