"""Every kernel in machine code for sm_80 and sm_90, without a GPU: no spills, tensor cores, wide accesses."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")

from support.kernel_builds import SHARED_LIMIT, Build, build, record_launches

from cmae.kernels.backend import INTERPRETED

# The package's names are the ops; here the modules are wanted.
block_mask, color_jitter, info_nce, masked_mse, patch_gather = (
    import_module(f"cmae.kernels.{name}")
    for name in ("block_mask", "color_jitter", "info_nce", "masked_mse", "patch_gather")
)

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile")

CAPABILITIES = [80, 90]
CONSTANTS = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def builds(monkeypatch, module, run, capability: int) -> list[Build]:
    found = [build(launch, capability) for launch in record_launches(monkeypatch, module, run)]
    assert found
    for one in found:
        assert one.spilled_bytes == 0, one.name
        assert one.count(r"\b(?:LDL|STL)\b") == 0, one.name
        assert one.shared_bytes <= SHARED_LIMIT[capability], one.name
    return found


def images_and_ids(patch_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    side = 224
    shape = (2, side, side, 3) if dtype == torch.uint8 else (2, 3, side, side)
    return torch.zeros(shape, dtype=dtype), torch.zeros(2, 68, dtype=torch.int32)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("patch_size", "dtype", "out_dtype", "load_bits", "store_bits"),
    [
        (16, torch.uint8, torch.float16, 64, 128),
        (16, torch.uint8, torch.bfloat16, 64, 128),
        (16, torch.uint8, torch.float32, 32, 128),
        (14, torch.uint8, torch.float16, 16, 64),  # lines of 42 bytes
        (16, torch.float32, torch.float16, 32, 128),  # channels lie far apart
    ],
)
def test_patch_gather(monkeypatch, capability, patch_size, dtype, out_dtype, load_bits, store_bits):
    images, ids = images_and_ids(patch_size, dtype)
    (kernel,) = builds(
        monkeypatch,
        patch_gather,
        lambda: patch_gather._launch(images, ids, patch_size, *CONSTANTS, out_dtype),
        capability,
    )
    assert kernel.shared_bytes == 0  # no value changes hands between load and store
    assert widths(kernel, "LDG") >= {load_bits}
    assert widths(kernel, "STG") == {store_bits}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("is_backward", [False, True])
@pytest.mark.parametrize(
    ("patch_size", "dtype", "pred_dtype", "load_bits"),
    [
        (16, torch.uint8, torch.float16, {64, 128}),
        (16, torch.uint8, torch.bfloat16, {64, 128}),
        (16, torch.uint8, torch.float32, {32, 128}),
        (14, torch.uint8, torch.float16, {64}),
        (16, torch.float32, torch.float32, {32, 128}),
    ],
)
def test_masked_mse(monkeypatch, capability, is_backward, patch_size, dtype, pred_dtype, load_bits):
    images, ids = images_and_ids(patch_size, dtype)
    pred = torch.zeros(2, 68, 3 * patch_size**2, dtype=pred_dtype)
    grad = torch.ones(()) if is_backward else None
    (kernel,) = builds(
        monkeypatch,
        masked_mse,
        lambda: masked_mse._launch(
            pred, images, ids, patch_size, *CONSTANTS, True, 1e-6, grad_loss=grad
        ),
        capability,
    )
    assert widths(kernel, "LDG") >= load_bits
    assert kernel.count(r"\bBAR\b") == 0  # a warp sums its own rows
    if is_backward:
        assert max(widths(kernel, "STG")) == (64 if patch_size == 14 else 128)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        (32, torch.float16),
        (128, torch.float16),
        (256, torch.float16),
        (256, torch.bfloat16),
        (512, torch.float16),
        (64, torch.float32),
        (128, torch.float32),
        (256, torch.float32),
    ],
)
def test_info_nce(monkeypatch, capability, with_keys, dim, dtype):
    query, keys, row = torch.zeros(128, dim, dtype=dtype), torch.zeros(4096, dim), torch.ones(128)

    def run() -> None:
        if with_keys:
            info_nce._grad_keys(torch.ones(()), query, keys, row, row, 0.07, 0)
        else:
            info_nce._forward(query, keys, 0.07, 0, True)

    found = {one.name: one for one in builds(monkeypatch, info_nce, run, capability)}
    main = found["_grad_keys_kernel" if with_keys else "_split_kernel"]
    assert main.count(r"\bH(?:G)?MMA\b") > 0
    if capability == 90 and dtype != torch.float32 and dim <= (128 if with_keys else 256):
        assert main.count(r"\bHGMMA\b") > 0
    assert main.count(r"\bLDGSTS\.E\.BYPASS\.128\b") > 0  # keys arrive while others are multiplied
    assert main.count(r"\bFFMA\b") < 600  # the products are not on the ordinary cores
    assert 128 in widths(found["_normalise_kernel"], "LDG")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("arguments", [(14, 14, 2, 17), (14, 14, 1, 49), (32, 32, 1, 256)])
def test_block_mask(monkeypatch, capability, arguments):
    builds(
        monkeypatch,
        block_mask,
        lambda: block_mask._launch(torch.arange(4), *arguments, 1, -5, 16),
        capability,
    )


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
@pytest.mark.parametrize(
    ("size", "exact"), [(224, True), (224, False), (222, True), (97, True), (32, True)]
)
def test_color_jitter(monkeypatch, capability, size, exact):
    if capability == 100 and size == 222:
        pytest.skip("spills 8 bytes; lines of whole words (a width that is a multiple of 4) do not")
    images, params = torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.zeros(2, 22)[:, -8:]
    *before, pixel, blur = builds(
        monkeypatch,
        color_jitter,
        lambda: color_jitter._launch(images, params, exact),
        capability,
    )
    for kernel in (*before, pixel):
        assert kernel.registers <= (64 if size % 2 == 0 else 72)  # half of the threads there can be
        assert kernel.count(r"\bI2F\b|\bF2I\b") <= 4  # levels take no slow conversions
        if size % 2 == 0:
            assert max(widths(kernel, "LDG")) >= 32
            assert 8 not in widths(kernel, "STG")
    assert blur.registers <= (168 if size == 224 else 255)
    assert blur.count(r"\bI2F\b") <= 40
    assert blur.count(r"\b(?:H(?:G)?MMA|UTCHMMA)\b") > 0
    assert blur.count(r"\bFFMA\b") < 200  # the products are not on the ordinary cores
    if size % 4 == 0:
        assert 8 not in widths(blur, "STG")
    if size % 16 == 0:
        assert widths(blur, "LDG") >= {128}  # 16 levels a load


@pytest.mark.parametrize("epoch", [0, 1, 16, 2**31])
def test_a_new_epoch_or_offset_is_no_new_kernel(epoch):
    """Triton compiles again for every argument that is 1 or divisible by 16, unless it is told not to."""
    for kernel, names in (
        (block_mask._mask_kernel, {"seed", "seed_high", "epoch"}),
        (info_nce._split_kernel, {"label_offset"}),
        (info_nce._combine_kernel, {"label_offset"}),
        (info_nce._grad_keys_kernel, {"label_offset"}),
    ):
        fixed = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert fixed == names
    assert -(2**31) <= block_mask._signed(epoch) < 2**31


def widths(kernel: Build, kind: str) -> set[int]:
    """Bits of each load (LDG) or store (STG) of global memory in a kernel."""
    bits = {"U8": 8, "S8": 8, "U16": 16, "64": 64, "128": 128}
    found = set()
    for match in re.findall(rf"\b{kind}((?:\.\w+)+)", kernel.sass):
        found.add(next((bits[part] for part in match.split(".") if part in bits), 32))
    return found
