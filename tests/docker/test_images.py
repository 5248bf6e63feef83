"""Images: one list of dependencies, pins that meet it, a base whose own builds stay."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
LOCKS = DOCKER / "locks"
LOCKED = ("gpu", "cpu")
EXTRAS = ("demo", "s3", "gs", "wandb")


def declared() -> list[Requirement]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in EXTRAS:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def pins(image: str) -> dict[str, list[str]]:
    """Versions by name; several where they depend on the Python."""
    found: dict[str, list[str]] = {}
    for line in (LOCKS / f"{image}.txt").read_text().splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            need = Requirement(line)
            (pin,) = need.specifier
            assert pin.operator == "==", line
            found.setdefault(canonicalize_name(need.name), []).append(pin.version)
    return found


def left_out(image: str) -> set[str]:
    path = LOCKS / f"{image}.without"
    lines = path.read_text().splitlines() if path.is_file() else []
    return {canonicalize_name(line) for line in lines if line and not line.startswith("#")}


@pytest.mark.parametrize("image", LOCKED)
def test_pins_are_what_pyproject_declares(image: str) -> None:
    """A dependency that is added, or whose bound moves, needs `make lock`."""
    found, missing = pins(image), []
    for need in declared():
        name = canonicalize_name(need.name)
        if name in left_out(image):
            assert name not in found
        elif not found.get(name) or not all(need.specifier.contains(one) for one in found[name]):
            missing.append(f"{need} (pinned: {found.get(name)})")
    assert not missing, f"run `make lock`: docker/locks/{image}.txt does not meet {missing}"


def test_only_the_image_for_gpus_carries_cuda_for_torch() -> None:
    """What DALI and the codecs need stays everywhere."""
    codecs = {
        "nvidia-dali-cuda130",
        "nvidia-libnvcomp-cu13",
        "nvidia-ml-py",
        "nvidia-nvimgcodec-cu13",
    }
    codecs |= {"nvidia-nvjpeg", "nvidia-nvjpeg2k-cu13", "nvidia-nvtiff-cu13"}
    found = {name for name in pins("cpu") if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert found == codecs
    assert {"triton", "nvidia-nccl-cu13", "torch"} <= set(pins("gpu"))
    assert {"torch", "sympy"} <= set(pins("cpu"))


@pytest.fixture
def fake_uv(tmp_path: Path) -> Path:
    """A `uv` that notes what it is asked to install."""
    (tmp_path / "uv").mkdir()
    (tmp_path / "uv" / "__init__.py").touch()
    (tmp_path / "uv" / "__main__.py").write_text(
        "import json, os, pathlib, sys\n"
        "args = sys.argv[1:]\n"
        "named = [args[i + 1] for i, word in enumerate(args) if word == '--requirements']\n"
        "files = [pathlib.Path(name).read_text() for name in named]\n"
        f"with open({str(tmp_path / 'calls.jsonl')!r}, 'a') as out:\n"
        "    line = {'args': args, 'files': files, 'backend': os.environ.get('UV_TORCH_BACKEND')}\n"
        "    out.write(json.dumps(line) + '\\n')\n"
    )
    return tmp_path


def install(
    image: str, fake: Path, installed: dict[str, str]
) -> tuple[list[dict[str, Any]], str, int]:
    """Run the installer in an environment that has these packages."""
    site = fake / "site"
    site.mkdir()
    for name, version in installed.items():
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    venv = fake / "venv" / "bin"
    venv.mkdir(parents=True)
    python = venv / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        [sys.executable, str(DOCKER / "install.py"), image, str(venv.parent)],
        env={**os.environ, "PYTHONPATH": str(fake), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    noted = fake / "calls.jsonl"
    calls = [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []
    return calls, done.stdout, done.returncode


def test_a_bases_own_builds_stay(fake_uv: Path) -> None:
    base = {"torch": "2.14.0a0+nv26.10", "torchvision": "0.29.0a0", "pytorch-triton": "3.6.0"}
    base |= {"nvidia-dali-cuda130": "2.3.0", "rich": "1.0"}
    calls, printed, _ = install("nvidia", fake_uv, base)
    wanted = calls[0]["files"][0]
    assert not re.search(r"^(torch|torchvision|triton)==", wanted, re.MULTILINE)
    assert "nvidia-dali-cuda130==" not in wanted
    assert re.search(r"^rich==", wanted, re.MULTILINE)  # anything else comes from the lock
    assert "nvidia-dali-cuda130==2.3.0" in printed
    assert "torch==2.14.0a0+nv26.10" in printed
    assert all("--no-deps" in call["args"] for call in calls)


def test_the_cpu_image_asks_for_the_cpu_build_of_torch(fake_uv: Path) -> None:
    calls, _, _ = install("cpu", fake_uv, {})
    assert calls[0]["backend"] == "cpu"
    assert re.search(r"^torch==", calls[0]["files"][0], re.MULTILINE)


def test_a_base_without_torch_is_not_nvidias(fake_uv: Path) -> None:
    calls, _, code = install("nvidia", fake_uv, {"numpy": "2.1"})
    assert code != 0
    assert calls == []


def test_an_image_that_lacks_what_is_declared_is_not_built(fake_uv: Path) -> None:
    """The fake installs nothing, so the comparison at the end must fail."""
    assert install("gpu", fake_uv, {})[2] != 0


def test_the_image_runs_as_a_user_and_its_program_gets_the_signals() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert re.search(r"^USER 1000:1000$", text, re.MULTILINE)
    assert 'ENTRYPOINT ["cmae-entrypoint"]' in text
    assert re.search(r'^HEALTHCHECK .* CMD \["cmae", "doctor", "--quick"\]$', text, re.MULTILINE)
    entrypoint = (DOCKER / "entrypoint.sh").read_text()
    programs = [line for line in entrypoint.splitlines() if "cmae.train" in line]
    assert programs
    assert all("exec python3" in line for line in programs)


def test_trying_images_without_an_engine_is_skipped_with_a_reason(tmp_path: Path) -> None:
    for name in ("bash", "dirname", "env"):
        (tmp_path / name).symlink_to(Path("/usr/bin") / name)
    done = subprocess.run(
        [str(DOCKER / "try.sh")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 77, done.stderr
    assert done.stdout.startswith("skipped: neither docker")


@pytest.mark.parametrize("script", ["try.sh", "entrypoint.sh", "slurm.sbatch"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(DOCKER / script)], check=True)
