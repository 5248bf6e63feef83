"""Kubernetes manifests as `kubectl apply -k` sends them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker" / "kubernetes"
OVERLAYS = ("base", "one-node", "bucket")


def rendered(overlay: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` sends."""
    if shutil.which("kubectl") is None:
        if overlay != "base":
            pytest.skip("kubectl, which renders overlays, is not installed")
        texts = [(FOLDER / "base" / name).read_text() for name in _resources()]
    else:
        command = ["kubectl", "kustomize", str(FOLDER / overlay)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        texts = [done.stdout]
    return [found for text in texts for found in yaml.safe_load_all(text) if found]


def _resources() -> list[str]:
    names: list[str] = yaml.safe_load((FOLDER / "base" / "kustomization.yaml").read_text())[
        "resources"
    ]
    return names


def job_of(overlay: str) -> dict[str, Any]:
    """The Job of an overlay."""
    (job,) = (one for one in rendered(overlay) if one["kind"] == "Job")
    return job


def container_of(overlay: str) -> dict[str, Any]:
    """Its only container."""
    (container,) = job_of(overlay)["spec"]["template"]["spec"]["containers"]
    return container  # type: ignore[no-any-return]


def environment_of(overlay: str) -> dict[str, str]:
    """Variables that the container gets; '' for what the cluster fills in."""
    return {one["name"]: one.get("value", "") for one in container_of(overlay)["env"]}
