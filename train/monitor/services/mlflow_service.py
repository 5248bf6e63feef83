"""MLflow: a tracking server, or a folder of its files."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param

_MAX_PARAMS = 100
"""That the service takes at once."""
_MAX_VALUE = 500
"""Characters of a parameter."""


class MlflowService:
    """One run there, gone on with when the folder's run is; sent from the client's own threads.

    MLflow keeps every value of a step. A run that continues from a checkpoint repeats steps bit by bit, so
    those that are there already are left out.
    """

    def __init__(self, uri: str, out: Path, config: dict[str, Any]) -> None:
        mlflow.set_tracking_uri(uri)
        self._client = mlflow.MlflowClient(uri)
        stored = out / "mlflow_run_id"
        if stored.is_file():
            self._run = stored.read_text(encoding="utf-8").strip()
            self._last = self._newest_step()
            return
        experiment = mlflow.set_experiment("cmae")
        self._run = self._client.create_run(experiment.experiment_id, run_name=out.name).info.run_id
        stored.write_text(self._run, encoding="utf-8")
        self._last = -1
        params = [Param(name, str(value)[:_MAX_VALUE]) for name, value in _flat(config)]
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + _MAX_PARAMS])

    def log(self, step: int, record: dict[str, float]) -> None:
        """Send a record, unless one of this step is there."""
        if step <= self._last:
            return
        self._last = step
        now = int(1000 * time.time())
        metrics = [
            Metric(name, value, now, step) for name, value in record.items() if math.isfinite(value)
        ]
        self._client.log_batch(self._run, metrics=metrics, synchronous=False)

    def close(self) -> None:
        """Wait for what is on its way."""
        mlflow.flush_async_logging()

    def _newest_step(self) -> int:
        history = self._client.get_metric_history(self._run, "total")
        return max((one.step for one in history), default=-1)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
