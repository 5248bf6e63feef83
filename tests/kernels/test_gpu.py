"""The kernels on a GPU: the checks of `kernel_checks.py`, and what only a GPU can show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from support import kernel_checks
from support.kernel_checks import *  # noqa: F403  (the checks are collected here)

from cmae.kernels import backend
from cmae.kernels.block_mask import block_mask
from cmae.model import ModelConfig, build_model, draw_mask

pytestmark = pytest.mark.gpu


def test_ops_replay_in_a_cuda_graph(monkeypatch):
    monkeypatch.undo()  # the poison would be a kernel of the graph
    calls = kernel_checks.op_calls()
    learnt = [arguments[0] for _, arguments in (calls["masked_mse"], calls["info_nce"])]

    def run() -> list[torch.Tensor]:
        outputs = [op(*arguments) for op, arguments in calls.values()]
        flat = [x for out in outputs for x in (out if isinstance(out, tuple) else (out,))]
        loss = outputs[1] + outputs[2][0]
        return [*flat, *torch.autograd.grad(loss, learnt)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for out in captured:
        out.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    for out, value in zip(captured, expected, strict=True):
        assert torch.equal(out, value)


def test_auto_takes_the_kernels_and_never_waits_for_the_gpu(caplog):
    """`set_sync_debug_mode` turns every wait of the host for the device into an error."""
    config = ModelConfig(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, mask_unit=1)
    model = build_model(config, seed=0).cuda()
    images = kernel_checks.pixels(4, 32, 32)
    samples = torch.arange(4, device="cuda")
    backend._log_once.cache_clear()
    for step in range(2):  # the first step compiles and loads kernels
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            with caplog.at_level("INFO", "cmae.kernels"), torch.autocast("cuda", torch.float16):
                ids_keep, ids_mask = draw_mask(config, samples, seed=0, epoch=step)
                losses = model(images, images, ids_keep, ids_mask=ids_mask)
            (losses.total * 1024).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(messages) == [
        f"{op}: backend 'auto' takes the Triton kernel"
        for op in ("block_mask", "info_nce", "masked_mse", "patch_gather")
    ]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_where_their_tensors_are():
    samples = torch.arange(3, device="cuda:1")
    arguments = {"grid": (4, 4), "mask_unit": 1, "num_keep_units": 5, "seed": 0, "epoch": 0}
    mine = block_mask(samples, backend="triton", **arguments)
    assert torch.equal(mine[0].cpu(), block_mask(samples.cpu(), **arguments)[0])


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).is_file():
        pytest.skip("compute-sanitizer is not installed")
    tests = Path(__file__).resolve().parents[1]
    code = (
        "import torch; from support.kernel_checks import op_calls\n"
        "for op, arguments in op_calls().values():\n"
        "    out = op(*arguments)\n"
        "    loss = out[0] if isinstance(out, tuple) else out\n"
        "    if loss.requires_grad: loss.backward()\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tests), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
