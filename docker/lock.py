"""Write docker/locks/*.txt from pyproject.toml: `make lock`. Needs uv and the package index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DOCKER = Path(__file__).resolve().parent
LOCKS = DOCKER / "locks"
EXTRAS = ("demo", "s3", "gs", "wandb", "prometheus")
OLDEST_PYTHON = "3.11"
IMAGES = ("gpu", "cpu")  # nvidia takes cpu's: its base brings torch and all of CUDA


def main() -> int:
    """Write the lock of each image; the exit code."""
    for image in IMAGES:
        command = [
            sys.executable,
            "-m",
            "uv",
            "pip",
            "compile",
            str(DOCKER.parent / "pyproject.toml"),
        ]
        command += [word for extra in EXTRAS for word in ("--extra", extra)]
        command += ["--universal", "--python-version", OLDEST_PYTHON, "--no-annotate"]
        command += [
            "--constraint",
            str(LOCKS / "tested.in"),
            "--custom-compile-command",
            "make lock",
        ]
        without = LOCKS / f"{image}.without"
        if without.is_file():
            command += ["--excludes", str(without)]
        command += ["--upgrade", "--quiet", "--output-file", str(LOCKS / f"{image}.txt")]
        subprocess.run(command, check=True)
        print(f"wrote {LOCKS / image}.txt")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
