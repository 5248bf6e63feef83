"""The ops by the package's name: functions, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest

OPS = ["block_mask", "color_jitter", "info_nce", "masked_mse", "patch_gather"]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "import cmae.kernels.info_nce", "import cmae.model.cmae"])
def test_the_package_hands_out_functions(before: str) -> None:
    code = f"{before}\nfrom cmae.kernels import {', '.join(OPS)}\nprint(*map(callable, [{', '.join(OPS)}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * len(OPS)
