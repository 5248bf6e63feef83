"""Install a lock file and this project into the image's environment; run by the Dockerfile.

What the base image brings of torch, CUDA, NCCL, Triton, DALI and numpy stays: those are built for each
other, and a wheel of the same name would lack the base's NCCL or its CUDA. Everything else comes from the
lock, as it is written. At the end the environment is compared with what pyproject.toml declares.

    python docker/install.py IMAGE VENV        IMAGE: gpu, cpu or nvidia
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

KEPT = re.compile(r"(pytorch-)?(torch|triton)|nvidia-|cuda-|numpy$|apex$")
"""Beginnings of the names of packages that a base's own build is kept of."""
SOURCE = Path(__file__).resolve().parent.parent
LOCKS = SOURCE / "docker" / "locks"
LOCK_OF = {"gpu": "gpu", "cpu": "cpu", "nvidia": "cpu"}
"""Lock of each image; NVIDIA's base brings torch and all of CUDA, so it takes the one without them."""
BROUGHT = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "triton": ("triton", "pytorch-triton"),
}
"""What the base of the image `nvidia` must bring, under one of these names."""
IMPORTED = "torch, torchvision, timm, webdataset, nvidia.dali, cmae.model, cmae.pipeline"

_LIST = """
import json
from importlib.metadata import distributions
print(json.dumps({d.name: d.version for d in distributions()}))
"""
_DECLARED = """
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement
left_out, extras, bad = set(sys.argv[1].split()), ("", "demo", "s3", "gs", "prometheus"), []
for line in requires("cmae"):
    need = Requirement(line)
    if need.name in left_out or not any(
        need.marker is None or need.marker.evaluate({"extra": extra}) for extra in extras
    ):
        continue
    try:
        found = version(need.name)
    except PackageNotFoundError:
        bad.append(f"{need.name}: missing, declared {need.specifier or 'any version'}")
        continue
    if not need.specifier.contains(found.split("+")[0].split("a0")[0], prereleases=True):
        bad.append(f"{need.name}: {found}, declared {need.specifier}")
sys.exit("\\n".join(["the image is not what pyproject.toml declares:", *bad]) if bad else 0)
"""


def main(image: str, venv: Path) -> None:
    """Install, then compare; an error ends the build."""
    python = str(venv / "bin" / "python")
    listed = subprocess.run([python, "-c", _LIST], check=True, capture_output=True, text=True)
    base = {normal(name): version for name, version in json.loads(listed.stdout).items()}
    kept = {name: version for name, version in base.items() if KEPT.match(name)}
    if kept:
        print(
            "kept from the base:", *(f"{name}=={version}" for name, version in sorted(kept.items()))
        )
    missing = [name for name, names in BROUGHT.items() if not any(one in kept for one in names)]
    if image == "nvidia" and missing:
        sys.exit(f"the base brings no {', '.join(missing)}: give NVIDIA's PyTorch image as BASE")
    lines = (LOCKS / f"{LOCK_OF[image]}.txt").read_text().splitlines()
    wanted = [line for line in lines if (name := name_of(line)) and name not in kept]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as file:
        file.write("\n".join(wanted) + "\n")
    install = [sys.executable, "-m", "uv", "pip", "install", "--python", python, "--no-deps"]
    if image == "cpu":
        os.environ.setdefault("UV_TORCH_BACKEND", "cpu")
    subprocess.run([*install, "--requirements", file.name], check=True)
    subprocess.run([*install, str(SOURCE)], check=True)
    without = LOCKS / f"{image}.without"
    lines = without.read_text().splitlines() if without.is_file() else []
    left_out = {name_of(line) for line in lines}
    if "pytorch-triton" in kept:
        left_out.add("triton")
    subprocess.run([python, "-c", _DECLARED, " ".join(sorted(left_out))], check=True)
    # What was kept has needs of its own.
    subprocess.run([python, "-c", f"import {IMPORTED}"], check=True)


def normal(name: str) -> str:
    """A package's name as indices compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(line: str) -> str:
    """Name in a line of a lock; '' for comments."""
    found = re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line)
    return normal(found[0]) if found else ""


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
