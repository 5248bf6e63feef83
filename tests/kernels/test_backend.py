"""Who runs an op: the choice, its log, its refusals, and life without Triton."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from cmae.kernels import backend
from cmae.kernels.backend import use_backend, use_triton
from cmae.kernels.block_mask import block_mask

MASK = {"grid": (4, 4), "mask_unit": 1, "num_keep_units": 5, "seed": 0, "epoch": 0}
CPU = torch.device("cpu")
no_interpreter = pytest.mark.skipif(backend.INTERPRETED, reason="TRITON_INTERPRET=1 is set")


def test_auto_takes_the_reference_on_a_cpu_and_says_so_once(caplog):
    backend._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "cmae.kernels"):
        for _ in range(3):
            block_mask(torch.arange(2), **MASK)
    assert [record.getMessage() for record in caplog.records] == [
        "block_mask: backend 'auto' takes the torch reference: the tensors are on the CPU"
    ]


@no_interpreter
def test_triton_on_a_cpu_raises_and_names_the_variable():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        block_mask(torch.arange(2), backend="triton", **MASK)


@no_interpreter
def test_a_default_backend_holds_for_calls_that_name_none_and_ends_with_its_block():
    with use_backend("triton"):
        with pytest.raises(ValueError, match="backend='triton'"):
            block_mask(torch.arange(2), **MASK)
        block_mask(torch.arange(2), backend="torch", **MASK)
        with use_backend("torch"):
            block_mask(torch.arange(2), **MASK)
    block_mask(torch.arange(2), **MASK)


def test_what_a_kernel_cannot_do_goes_to_the_reference_or_raises():
    assert not use_triton("op", "auto", CPU, unsupported="x has dtype float64")
    assert not use_triton("op", "torch", CPU, unsupported="x has dtype float64")
    with pytest.raises(ValueError, match="x has dtype float64"):
        use_triton("op", "triton", CPU, unsupported="x has dtype float64")


@pytest.mark.parametrize("name", ["cuda", ""])
def test_unknown_backends_are_refused(name):
    with pytest.raises(ValueError, match="choose 'auto', 'torch' or 'triton'"):
        use_triton("op", name, CPU, unsupported=None)
    with pytest.raises(ValueError, match="use_backend"), use_backend(name):
        pass


@pytest.mark.slow
def test_the_references_work_where_triton_is_absent():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "import cmae.model\n"
        "from cmae.kernels.block_mask import block_mask\n"
        f"arguments = {MASK!r}\n"
        "print(block_mask(torch.arange(2), **arguments)[0].shape)\n"
        "block_mask(torch.arange(2), backend='triton', **arguments)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch.Size([2, 5])" in done.stdout
    assert "Triton is not installed" in done.stderr.splitlines()[-1]


def test_the_choice_compiles_into_one_graph():
    def masks(samples: torch.Tensor) -> torch.Tensor:
        return block_mask(samples, **MASK)[0]

    samples = torch.arange(3)
    compiled = torch.compile(masks, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(samples), masks(samples))
