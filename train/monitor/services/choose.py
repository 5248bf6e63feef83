"""Services that a run's metrics go to, besides its own files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cmae.errors import CmaeError
from cmae.train.config import RunConfig


class Service(Protocol):
    """Somebody else's place for metrics, by their own client."""

    def log(self, step: int, record: dict[str, float]) -> None:
        """Take the metrics of a step; never twice those of one that it has."""

    def close(self) -> None:
        """Send what is left."""


def choose_services(run: RunConfig, config: dict[str, Any]) -> dict[str, Callable[[], Service]]:
    """What opens each service that the configuration asks for, by its name.

    Args:
        run: Section `run` of the configuration.
        config: The whole configuration, without secrets, for services that show it.

    Raises:
        CmaeError: A service's package is not installed.
    """
    found: dict[str, Callable[[], Service]] = {}
    if run.wandb_project:
        _require("wandb", "wandb", "run.wandb_project", run.wandb_project)
        found["Weights & Biases"] = partial(_open_wandb, run.wandb_project, run.out, config)
    if run.mlflow_uri:
        _require("mlflow", "mlflow", "run.mlflow_uri", run.mlflow_uri)
        found["MLflow"] = partial(_open_mlflow, run.mlflow_uri, run.out, config)
    if run.prometheus_port is not None:
        _require("prometheus_client", "prometheus", "run.prometheus_port", run.prometheus_port)
        found["Prometheus"] = partial(_open_prometheus, run.prometheus_port, run.out)
    return found


def _require(package: str, extra: str, key: str, value: object) -> None:
    if find_spec(package) is None:
        raise CmaeError(
            f"{key} is {value!r}, but the package {package} is not installed; `pip install 'cmae[{extra}]'`, "
            "or leave the key out"
        )


def _open_wandb(project: str, out: Path, config: dict[str, Any]) -> Service:
    from cmae.train.monitor.services.wandb_service import WandbService

    return WandbService(project, out, config)


def _open_mlflow(uri: str, out: Path, config: dict[str, Any]) -> Service:
    from cmae.train.monitor.services.mlflow_service import MlflowService

    return MlflowService(uri, out, config)


def _open_prometheus(port: int, out: Path) -> Service:
    from cmae.train.monitor.services.prometheus_service import PrometheusService

    return PrometheusService(port, out)
