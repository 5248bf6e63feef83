"""Every kernel in machine code of five GPU generations, without a GPU.

No spills, shared memory that fits, enough warps side by side, tensor cores, wide accesses.
"""

from __future__ import annotations

import re
from importlib import import_module, metadata

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

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
    pytest.mark.skipif(
        tuple(map(int, metadata.version("triton").split(".")[:2])) < (3, 8),
        reason="what is asked of the machine code is what Triton 3.8 makes; older ones use other registers",
    ),
]

SLOW = [pytest.param(capability, marks=pytest.mark.slow) for capability in (86, 89, 100)]
CAPABILITIES = [80, 90, *SLOW]
RESIDENT_WARPS = {
    "_gather_kernel": 16,
    "_mse_kernel": 14,
    "_normalise_kernel": 16,
    "_split_kernel": 8,
    "_combine_kernel": 32,
    "_grad_keys_kernel": 8,
    "_mask_kernel": 16,
    "_gray_kernel": 32,
    "_pixel_kernel": 28,
    "_blur_kernel": 8,
}
"""Fewest warps that a multiprocessor runs of a kernel at a time, which hide each other's waits for memory."""
TENSOR_CORES = r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b"
CONSTANTS = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def builds(monkeypatch, module, run, capability: int, *, spilled: int = 0) -> list[Build]:
    found = [build(launch, capability) for launch in record_launches(monkeypatch, module, run)]
    assert found
    for one in found:
        assert one.spilled_bytes <= spilled, one.name
        assert one.count(r"\b(?:LDL|STL)\b") == 0 or spilled, one.name
        assert one.shared_bytes <= SHARED_LIMIT[capability], one.name
        assert one.resident_warps >= RESIDENT_WARPS[one.name], one.name
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

    # Gradients for keys in fp16 take a few registers more than there are: bytes in local memory.
    known = {(100, 512): 24, (86, 128): 32, (89, 128): 32}
    spilled = known.get((capability, dim), 0) if with_keys and dtype == torch.float16 else 0
    made = builds(monkeypatch, info_nce, run, capability, spilled=spilled)
    found = {one.name: one for one in made}
    main = found["_grad_keys_kernel" if with_keys else "_split_kernel"]
    assert main.count(TENSOR_CORES) > 0
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
    # On Blackwell, where lines are not whole words (a width that is no multiple of 4).
    spilled = 8 if capability == 100 and size == 222 else 0
    images, params = torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.zeros(2, 22)[:, -8:]
    *before, pixel, blur = builds(
        monkeypatch,
        color_jitter,
        lambda: color_jitter._launch(images, params, exact),
        capability,
        spilled=spilled,
    )
    for kernel in (*before, pixel):
        assert kernel.registers <= (64 if size % 2 == 0 else 72)  # half of the threads there can be
        assert kernel.count(r"\bI2F\b|\bF2I\b") <= 4  # levels take no slow conversions
        if size % 2 == 0:
            assert max(widths(kernel, "LDG")) >= 32
            assert 8 not in widths(kernel, "STG")
    assert blur.registers <= (168 if size == 224 else 255)
    assert blur.count(r"\bI2F\b") <= 40
    assert blur.count(TENSOR_CORES) > 0
    assert blur.count(r"\bFFMA\b") < 200  # the products are not on the ordinary cores
    if size % 4 == 0:
        assert 8 not in widths(blur, "STG")
    if size % 16 == 0:
        assert widths(blur, "LDG") >= {128}  # 16 levels a load


GRAD = torch.ones(())
QUERY, KEYS, ROW = torch.zeros(128, 256), torch.zeros(4096, 256), torch.ones(128)
IMAGES, IDS = images_and_ids(16, torch.uint8)
PRED = torch.zeros(2, 68, 768, dtype=torch.float16)


@pytest.mark.parametrize(
    ("module", "run", "most"),
    [
        (patch_gather, lambda: patch_gather._launch(IMAGES, IDS, 16, *CONSTANTS, torch.half), 1),
        (
            masked_mse,
            lambda: masked_mse._launch(
                PRED, IMAGES, IDS, 16, *CONSTANTS, True, 1e-6, grad_loss=None
            ),
            1,
        ),
        (
            masked_mse,
            lambda: masked_mse._launch(
                PRED, IMAGES, IDS, 16, *CONSTANTS, True, 1e-6, grad_loss=GRAD
            ),
            1,
        ),
        (info_nce, lambda: info_nce._forward(QUERY, KEYS, 0.07, 0, True), 4),
        (info_nce, lambda: info_nce._grad_keys(GRAD, QUERY, KEYS, ROW, ROW, 0.07, 0), 3),
        (block_mask, lambda: block_mask._launch(torch.arange(4), 14, 14, 2, 17, 1, -5, 16), 1),
    ],
    ids=["gather", "mse", "mse backward", "info_nce", "info_nce of keys", "mask"],
)
def test_each_op_is_few_launches(monkeypatch, module, run, most):
    """One pass over its data each: more launches are more passes. For colour see test_color_jitter.py."""
    assert 0 < len(record_launches(monkeypatch, module, run)) <= most


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
