"""Prometheus: the newest metrics behind a port, for whoever scrapes."""

from __future__ import annotations

import math
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, start_http_server


class PrometheusService:
    """Gauges `cmae_step`, `cmae_total`, `cmae_images_per_s` and so on, with the run's folder as label."""

    def __init__(self, port: int, out: Path) -> None:
        self._registry = CollectorRegistry()
        self._run = out.name
        self._gauges: dict[str, Gauge] = {}
        self._server, self._thread = start_http_server(port, registry=self._registry)

    def log(self, step: int, record: dict[str, float]) -> None:
        """Show a record from now on."""
        for name, value in {"step": step, **record}.items():
            if name not in self._gauges:
                plain = "cmae_" + re.sub(r"\W", "_", name)
                text = f"{name} of the newest record"
                self._gauges[name] = Gauge(plain, text, ["run"], registry=self._registry)
            self._gauges[name].labels(self._run).set(value if math.isfinite(value) else math.nan)

    def close(self) -> None:
        """Give the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
