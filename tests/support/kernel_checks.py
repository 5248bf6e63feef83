"""What every kernel must do, on a GPU or in Triton's interpreter; two test modules run these.

Gold is the torch reference in float64. The interpreter rounds to bf16 wrongly, so bf16 outputs and bf16
arithmetic are checked on a GPU alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cmae.kernels.backend import INTERPRETED
from cmae.kernels.block_mask import block_mask
from cmae.kernels.color_jitter import PARAMS, color_jitter
from cmae.kernels.info_nce import info_nce
from cmae.kernels.masked_mse import masked_mse
from cmae.kernels.patch_gather import patch_gather

DEVICE = "cpu" if INTERPRETED else "cuda"
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds to bf16 wrongly"),
)
DTYPES = [torch.float32, torch.float16, BF16]
# Largest relative error, in the Frobenius norm, by the dtype of the result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Of info_nce's gradients for float32 queries: logits of 14 carry 2^-20 of rounding into probabilities.
TOLERANCE_SOFTMAX_FP32 = 1e-5
# Of a float32 loss whose logits come from fp16 products: 2^-12 of each factor, averaged over a row.
TOLERANCE_FP16_DOT = 1e-3
CONSTANTS = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
OPS = ["patch_gather", "masked_mse", "info_nce", "block_mask", "color_jitter"]
SCALE = 65536.0  # of the loss, as GradScaler starts with


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pixels(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)


def patch_ids(batch: int, count: int, num_patches: int, dtype: torch.dtype = torch.int32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, num_patches, (batch, count), generator=generator).to(DEVICE, dtype)


def relative_error(value: Tensor, gold: Tensor) -> float:
    difference = (value.double() - gold.double()).norm()
    return float(difference / gold.double().norm().clamp_min(1e-300))


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN (or of the largest integer): a value that no kernel wrote shows."""

    def poisoned_value(dtype: torch.dtype) -> float:
        if dtype.is_floating_point:
            return float("nan")
        return 1 if dtype == torch.bool else torch.iinfo(dtype).max

    for owner, name in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        original: Callable[..., Tensor] = getattr(owner, name)

        def poisoned(
            *args: Any, _original: Callable[..., Tensor] = original, **kwargs: Any
        ) -> Tensor:
            out = _original(*args, **kwargs)
            return out.fill_(poisoned_value(out.dtype)) if type(out) is Tensor else out

        monkeypatch.setattr(owner, name, poisoned)


# -- patch_gather --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("patch_size", "rows", "columns", "count"),
    [(16, 2, 3, 5), (14, 2, 2, 3), (5, 3, 2, 37), (1, 4, 4, 2)],
)
def test_patch_gather_rows_of_bytes(dtype, patch_size, rows, columns, count):
    images = pixels(2, rows * patch_size, columns * patch_size)
    ids = patch_ids(2, count, rows * columns, torch.int64 if count == 5 else torch.int32)
    arguments = {"patch_size": patch_size, **CONSTANTS}
    mine = patch_gather(images, ids, out_dtype=dtype, backend="triton", **arguments)
    constants = (torch.tensor(CONSTANTS[name], device=DEVICE) for name in ("mean", "std"))
    shift, scale = (values.double() for values in constants)
    raw = patch_gather(
        images, ids, backend="torch", patch_size=patch_size, mean=(0, 0, 0), std=(1, 1, 1)
    )
    gold = ((raw.double().unflatten(-1, (-1, 3)) - shift) / scale).flatten(-2)
    assert mine.dtype == dtype
    assert relative_error(mine, gold) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_patch_gather_rows_of_floats_are_copies(dtype):
    images = rand(2, 3, 12, 20).to(dtype)
    ids = patch_ids(2, 7, 15)
    arguments = {"patch_size": 4, **CONSTANTS}
    mine = patch_gather(images, ids, backend="triton", **arguments)
    assert torch.equal(mine, patch_gather(images, ids, backend="torch", **arguments))


@pytest.mark.parametrize(
    "make", ["crop", "channels first", "floats, channels last", "expanded ids"]
)
def test_patch_gather_follows_strides_without_a_copy(make):
    images, ids = pixels(2, 20, 20), patch_ids(2, 4, 9)
    if make == "crop":
        images = images[:, 3:15, 5:17]
    elif make == "channels first":
        images = images[:, :12, :12].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif make == "floats, channels last":
        images = rand(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    else:
        images, ids = images[:, :12, :12], torch.arange(9, device=DEVICE).expand(2, -1)
    arguments = {"patch_size": 4, **CONSTANTS}
    mine = patch_gather(images, ids, backend="triton", **arguments)
    assert relative_error(mine, patch_gather(images, ids, backend="torch", **arguments)) <= 1e-6


def test_patch_gather_answers_nan_to_numbers_that_are_no_patch():
    ids = torch.tensor([[0, -1, 6, 5]], dtype=torch.int32, device=DEVICE)
    rows = patch_gather(pixels(1, 8, 12), ids, patch_size=4, backend="triton", **CONSTANTS)
    assert rows.isnan().all(dim=2).tolist() == [[False, True, True, False]]
    assert not rows[0, [0, 3]].isnan().any()


def test_patch_gather_of_nothing_is_empty():
    rows = patch_gather(
        pixels(2, 8, 8), patch_ids(2, 0, 4), patch_size=4, backend="triton", **CONSTANTS
    )
    assert rows.shape == (2, 0, 48)


def test_patch_gather_refuses_a_gradient():
    images = rand(1, 3, 8, 8).requires_grad_()
    with pytest.raises(ValueError, match="gradient"):
        patch_gather(images, patch_ids(1, 2, 4), patch_size=4, backend="triton", **CONSTANTS)
    rows = torch.ops.cmae.patch_gather(
        images, patch_ids(1, 2, 4), 4, [0] * 3, [1] * 3, torch.float32
    )
    with pytest.raises(RuntimeError, match="no gradient"):
        rows.sum().backward()


# -- masked_mse ----------------------------------------------------------------------------------------


def pixel_case(patch_size: int, dtype: torch.dtype, *, is_bytes: bool = True) -> dict[str, Any]:
    images = pixels(2, 2 * patch_size, 3 * patch_size)
    if not is_bytes:
        images = rand(2, 3, 2 * patch_size, 3 * patch_size).to(dtype)
    pred = rand(2, 5, 3 * patch_size**2, seed=3).to(dtype)
    return {"pred": pred, "images": images, "ids_mask": patch_ids(2, 5, 6)}


def loss_and_grads(
    op: Callable[..., Tensor],
    case: dict[str, Any],
    learnt: tuple[str, ...],
    dtype: Any,
    **options: Any,
) -> list[Tensor]:
    """Loss and gradients (times SCALE) with the learnt arguments in a dtype."""
    leaves = {
        n: case[n].detach().clone().to(dtype or case[n].dtype).requires_grad_() for n in learnt
    }
    loss = op(**{**case, **leaves}, **options)
    grads = torch.autograd.grad(loss * SCALE, list(leaves.values()))
    return [loss.detach(), *grads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize(
    ("patch_size", "is_bytes"), [(16, True), (14, True), (5, True), (4, False)]
)
def test_masked_mse_and_its_gradient(dtype, norm_pix, patch_size, is_bytes):
    case = pixel_case(patch_size, dtype, is_bytes=is_bytes)
    options = {"patch_size": patch_size, "norm_pix": norm_pix, **CONSTANTS}
    mine = loss_and_grads(masked_mse, case, ("pred",), None, backend="triton", **options)
    torchs = loss_and_grads(masked_mse, case, ("pred",), None, backend="torch", **options)
    if not is_bytes:
        case["images"] = case["images"].double()
    gold = loss_and_grads(masked_mse, case, ("pred",), torch.float64, backend="torch", **options)
    assert mine[0].dtype == torch.float32
    assert relative_error(mine[0], gold[0]) <= TOLERANCE[torch.float32]
    assert mine[1].dtype == dtype
    assert relative_error(mine[1], gold[1]) <= TOLERANCE[dtype]
    assert relative_error(mine[1], gold[1]) <= relative_error(torchs[1], gold[1]) + 1e-7


def test_masked_mse_follows_strides_and_survives_a_flat_patch():
    images = torch.full((2, 8, 12, 3), 200, dtype=torch.uint8, device=DEVICE)
    pred = rand(5, 2, 48, 2)[..., 0].transpose(0, 1)
    options = {"patch_size": 4, "mean": (0, 0, 0), "std": (1, 1, 1)}
    loss = masked_mse(pred, images, patch_ids(2, 5, 6), backend="triton", **options)
    assert relative_error(loss, pred.square().mean()) <= 1e-6


def test_masked_mse_gradient_is_scaled_before_it_is_rounded():
    """Without that, gradients of 1e-8 (a full batch) would be zeros or subnormal numbers in fp16."""
    case = pixel_case(4, torch.float16)
    pred = case.pop("pred").requires_grad_()
    loss = masked_mse(pred, **case, patch_size=4, backend="triton", **CONSTANTS)
    (grad,) = torch.autograd.grad(loss * 1e-7, pred, retain_graph=True)
    assert (grad == 0).all()
    (scaled,) = torch.autograd.grad(loss * 1e-7 * 2.0**30, pred)
    plain = masked_mse(pred.detach().float().requires_grad_(), **case, patch_size=4, **CONSTANTS)
    assert plain > 0
    assert (scaled != 0).float().mean() > 0.99


def test_masked_mse_answers_nan_to_numbers_that_are_no_patch():
    case = pixel_case(4, torch.float32)
    case["ids_mask"][1, 2] = 6
    case["pred"].requires_grad_()
    loss = masked_mse(**case, patch_size=4, backend="triton", **CONSTANTS)
    loss.backward()
    assert loss.isnan()
    bad = case["pred"].grad.isnan().any(dim=2)
    assert bad.nonzero().tolist() == [[1, 2]]


def test_masked_mse_refuses_a_second_derivative():
    case = pixel_case(4, torch.float32)
    case["pred"].requires_grad_()
    loss = masked_mse(**case, patch_size=4, backend="triton", **CONSTANTS)
    (grad,) = torch.autograd.grad(loss, case["pred"], create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        grad.square().sum().backward()


# -- info_nce ------------------------------------------------------------------------------------------


def softmax_case(
    num_queries: int, num_keys: int, dim: int, offset: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Queries of some length that are similar to their keys, about as after some training."""
    keys = rand(num_keys, dim, seed=4)
    positives = keys[offset : offset + num_queries]
    query = 3 * (rand(num_queries, dim, seed=5) + 0.4 * positives)
    return {"query": query.to(dtype), "keys": keys, "label_offset": offset}


def check_softmax(case: dict[str, Any], *, temperature: float, limit: float) -> None:
    learnt = ("query", "keys")
    mine = loss_and_grads(info_nce, case, learnt, None, temperature=temperature, backend="triton")
    gold = loss_and_grads(
        info_nce, case, learnt, torch.float64, temperature=temperature, backend="torch"
    )
    assert mine[0].dtype == torch.float32
    is_exact = case["query"].dtype == torch.float32
    loss_limit = limit if is_exact else TOLERANCE_FP16_DOT
    assert relative_error(mine[0], gold[0]) <= loss_limit
    for grad, expected, name in zip(mine[1:], gold[1:], learnt, strict=True):
        assert grad.dtype == case[name].dtype
        assert relative_error(grad, expected) <= limit, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.03, 0.07])
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "dim", "offset"),
    [(5, 130, 40, 100), (66, 70, 64, 3), (17, 33, 256, 16)],
)
def test_info_nce_and_its_gradients(dtype, temperature, num_queries, num_keys, dim, offset):
    limit = TOLERANCE_SOFTMAX_FP32 if dtype == torch.float32 else 2 * TOLERANCE[torch.float16]
    limit = max(limit, TOLERANCE[dtype] if dtype == torch.bfloat16 else 0)
    check_softmax(
        softmax_case(num_queries, num_keys, dim, offset, dtype),
        temperature=temperature,
        limit=limit,
    )


def test_info_nce_tells_near_duplicates_apart():
    """A second key that differs from the positive by a thousandth of its length."""
    case = softmax_case(6, 24, 64, 0, torch.float32)
    case["keys"][6:12] = case["keys"][:6] + 1e-3 * rand(6, 64, seed=6)
    check_softmax(case, temperature=0.03, limit=1e-4)


def test_info_nce_keeps_a_vanishing_loss():
    """Queries that equal their keys: a loss of 1e-9 is still right, where 1 - p would be 0."""
    case = softmax_case(6, 24, 256, 0, torch.float32)
    case["query"] = case["keys"][:6].clone()
    # 1e-5 of rounding in a cosine is 3e-4 in exp(cosine / 0.03).
    check_softmax(case, temperature=0.03, limit=5e-4)


def test_info_nce_with_the_positive_alone_is_zero():
    query = rand(1, 8).requires_grad_()
    loss = info_nce(query, rand(1, 8, seed=1), temperature=0.07, backend="triton")
    loss.backward()
    assert loss == 0
    assert (query.grad == 0).all()


def test_info_nce_of_a_zero_query_is_finite_and_of_a_nan_is_nan():
    case = softmax_case(3, 9, 16, 0, torch.float32)
    case["query"][1] = 0
    mine, gold = (
        loss_and_grads(info_nce, case, ("query",), dtype, temperature=0.07, backend=backend)
        for dtype, backend in ((None, "triton"), (torch.float64, "torch"))
    )
    assert relative_error(mine[1], gold[1]) <= 1e-5
    case["keys"][7, 3] = float("nan")
    assert info_nce(**case, temperature=0.07, backend="triton").isnan()


def test_info_nce_follows_strides():
    case = softmax_case(5, 40, 24, 2, torch.float32)
    strided = {
        "query": case["query"].T.contiguous().T,
        "keys": torch.stack([case["keys"]] * 2, dim=2)[..., 1],
    }
    expected = info_nce(**case, temperature=0.07, backend="triton")
    found = info_nce(**{**case, **strided}, temperature=0.07, backend="triton")
    # Other strides are other loads, and their layout changes the order of a row's sum.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_info_nce_gives_the_same_loss_without_gradients():
    case = softmax_case(5, 200, 24, 2, torch.float16)
    plain = info_nce(**case, temperature=0.07, backend="triton")
    case["query"].requires_grad_()
    assert torch.equal(plain, info_nce(**case, temperature=0.07, backend="triton").detach())


def test_info_nce_refuses_a_second_derivative():
    case = softmax_case(3, 9, 16, 0, torch.float32)
    case["query"].requires_grad_()
    loss = info_nce(**case, temperature=0.07, backend="triton")
    (grad,) = torch.autograd.grad(loss, case["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient"):
        grad.square().sum().backward()


@pytest.mark.parametrize("name", ["query", "keys"])
def test_info_nce_kernel_refuses_float64(name):
    case = softmax_case(3, 9, 16, 0, torch.float32)
    case[name] = case[name].double()
    with pytest.raises(ValueError, match=rf"{name} has dtype torch.float64"):
        info_nce(**case, temperature=0.07, backend="triton")


# -- block_mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "mask_unit", "num_keep", "seed", "epoch"),
    [
        ((14, 14), 2, 17, 0, 0),
        ((14, 14), 1, 49, 2**63 + 12345, 799),
        ((4, 6), 2, 2, 7, 2**32 - 1),
        ((3, 3), 1, 0, 1, 1),
        ((3, 3), 1, 9, 2**64 - 1, 16),
    ],
)
def test_block_mask_has_the_bits_of_the_reference(grid, mask_unit, num_keep, seed, epoch):
    samples = torch.tensor([0, 1, (5 << 32) | 77, 2**62 + 3, -5], device=DEVICE)
    arguments = {
        "grid": grid,
        "mask_unit": mask_unit,
        "num_keep_units": num_keep,
        "seed": seed,
        "epoch": epoch,
    }
    mine = block_mask(samples, backend="triton", **arguments)
    for part, expected in zip(mine, block_mask(samples, backend="torch", **arguments), strict=True):
        assert part.dtype == torch.int32
        assert torch.equal(part, expected)
    every_second = block_mask(samples[::2], backend="triton", **arguments)
    assert torch.equal(every_second[0], mine[0][::2])


def test_block_mask_refuses_grids_that_one_program_cannot_hold():
    arguments = {"grid": (40, 40), "mask_unit": 2, "num_keep_units": 17, "seed": 0, "epoch": 0}
    with pytest.raises(ValueError, match=r"grid=\(40, 40\)"):
        block_mask(torch.arange(2, device=DEVICE), backend="triton", **arguments)


# -- color_jitter --------------------------------------------------------------------------------------


def color_params(batch: int, **columns: Any) -> Tensor:
    """Rows that change nothing, but for the named columns."""
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
    params = torch.zeros(batch, len(PARAMS))
    for index, name in enumerate(PARAMS):
        params[:, index] = torch.as_tensor(columns.get(name, neutral.get(name, 0.0)))
    return params.to(DEVICE)


def color_images(batch: int, height: int, width: int) -> Tensor:
    """Noise, and among it a black, a white, a grey and a saturated image."""
    images = pixels(batch, height, width)
    for index, level in enumerate([0, 255, 77]):
        images[index::8] = level
    images[3::8] = images[3::8] // 128 * 255
    return images


def check_color(images: Tensor, params: Tensor, mode: str, *, is_rounded: bool) -> Tensor:
    """The kernel's result; jitter has the reference's bits, blur and matrix round alike but for ties."""
    before = images.clone()
    mine = color_jitter(images, params, mode=mode, backend="triton")
    expected = color_jitter(images, params, mode=mode, backend="torch")
    assert torch.equal(images, before)
    assert mine.dtype == torch.uint8
    assert mine.shape == images.shape
    error = (mine.int() - expected.int()).abs()
    if INTERPRETED and not is_rounded:
        assert error.max() == 0
    assert error.max() <= 2
    assert error.float().mean() < 1e-3
    return mine


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (2, 3), (9, 16), (30, 33), (33, 30), (44, 68)]
)
def test_color_jitter_in_all_orders(mode, height, width):
    draw = rand(24, 4, seed=3).cpu().tanh()
    params = color_params(
        24,
        jitter=torch.arange(24) % 7 != 6,
        brightness=1 + 0.4 * draw[:, 0],
        contrast=1 + 0.4 * draw[:, 1],
        saturation=1 + 0.4 * draw[:, 2],
        hue=0.1 * draw[:, 3],
        order=torch.arange(24),
        grayscale=torch.arange(24) % 5 == 4,
    )
    images = color_images(24, height, width)
    check_color(images, params, mode, is_rounded=mode == "fast")
    params[:, 7] = torch.linspace(-0.5, 2.0, 24)
    check_color(images, params, mode, is_rounded=True)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("brightness", [0.0, 0.6, 1.0, 1.4, 2.0]),
        ("contrast", [0.0, 0.6, 1.0, 1.4, 2.0]),
        ("saturation", [0.0, 0.6, 1.0, 1.4, 2.0]),
        ("hue", [-0.5, -0.1, 0.0, 0.1, 0.5]),
        ("grayscale", [0.0, 1.0]),
    ],
)
def test_color_jitter_of_one_operation(name, values):
    images = color_images(8, 24, 20).repeat(len(values), 1, 1, 1)
    column = torch.tensor(values).repeat_interleave(8)
    params = color_params(
        len(images), jitter=1.0, order=torch.arange(len(images)) % 24, **{name: column}
    )
    made = check_color(images, params, "exact", is_rounded=False)
    neutral = column == (0 if name in ("hue", "grayscale") else 1)
    assert torch.equal(made[neutral], images[neutral])
    assert name == "hue" or not torch.equal(made[~neutral], images[~neutral])


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (2, 5), (12, 31), (33, 40), (70, 36), (32, 96)]
)
def test_color_jitter_blurs(height, width):
    sigma = torch.tensor([0.1, 0.3, 0.34, 1.0, 1.9, 2.0, 2.75, 9.0])
    images = color_images(8, height, width)
    made = check_color(images, color_params(8, blur_sigma=sigma), "exact", is_rounded=True)
    assert torch.equal(made[:3], images[:3])  # one level everywhere


def test_color_jitter_leaves_rows_without_an_operation_alone():
    images = color_images(6, 20, 24)
    params = color_params(6, brightness=0.5, hue=0.3, order=17, grayscale=torch.arange(6) == 4)
    made = check_color(images, params, "exact", is_rounded=False)
    assert (made != images).flatten(1).any(1).tolist() == [False] * 4 + [True, False]


def test_color_jitter_takes_columns_of_a_matrix_and_images_at_any_address():
    draw = {"jitter": 1.0, "brightness": 0.7, "contrast": 1.3, "hue": 0.1, "order": 21}
    params = color_params(3, **draw, blur_sigma=torch.tensor([0.0, 1.5, 0.0]))
    wide = torch.full((3, 22), float("nan"), device=DEVICE)
    wide[:, -8:] = params
    images = color_images(3, 12, 16)
    expected = color_jitter(images, params, backend="triton")
    assert torch.equal(color_jitter(images, wide[:, -8:], backend="triton"), expected)
    odd = torch.empty(images.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:].view(images.shape)
    odd.copy_(images)
    assert torch.equal(color_jitter(odd, params, backend="triton"), expected)


def test_color_jitter_of_nothing_is_empty():
    made = color_jitter(pixels(0, 8, 8), color_params(0), backend="triton")
    assert made.shape == (0, 8, 8, 3)


def test_color_jitter_kernel_refuses_images_that_are_not_contiguous():
    images = pixels(2, 8, 12)
    with pytest.raises(ValueError, match="strides"):
        color_jitter(images[:, :, ::2], color_params(2), backend="triton")
    with pytest.raises(ValueError, match="neighbours"):
        color_jitter(images, color_params(2).T.contiguous().T, backend="triton")


# -- all ops -------------------------------------------------------------------------------------------


def op_calls() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Each op with arguments that make it work hard enough to show disorder."""
    pixel = pixel_case(4, torch.float16)
    softmax = softmax_case(5, 200, 24, 7, torch.float16)
    softmax["query"].requires_grad_()
    constants = (list(CONSTANTS["mean"]), list(CONSTANTS["std"]))
    ops = torch.ops.cmae
    return {
        "patch_gather": (
            ops.patch_gather,
            (pixel["images"], pixel["ids_mask"], 4, *constants, torch.float16),
        ),
        "masked_mse": (
            ops.masked_mse,
            (
                pixel["pred"].requires_grad_(),
                pixel["images"],
                pixel["ids_mask"],
                4,
                *constants,
                True,
                1e-6,
            ),
        ),
        "info_nce": (
            ops.info_nce,
            (softmax["query"], softmax["keys"].requires_grad_(), 0.07, 7, True),
        ),
        "block_mask": (
            ops.block_mask,
            (torch.arange(3, device=DEVICE), 4, 6, 2, 3, 1, -5, 16),
        ),
        "color_jitter": (
            ops.color_jitter,
            (
                color_images(5, 37, 44),
                color_params(
                    5, jitter=1.0, contrast=0.7, hue=0.1, order=14, blur_sigma=torch.arange(5) / 2
                ),
                True,
            ),
        ),
    }


@pytest.mark.parametrize("name", OPS)
def test_op_obeys_the_rules_of_custom_ops(name, monkeypatch):
    monkeypatch.undo()  # opcheck looks at whole outputs, and info_nce leaves none unwritten
    op, arguments = op_calls()[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", OPS)
def test_op_repeats_its_bits(name):
    op, arguments = op_calls()[name]
    learnt = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]

    def run() -> list[Tensor]:
        out = op(*arguments)
        outputs = list(out) if isinstance(out, tuple) else [out]
        grads = torch.autograd.grad(outputs[0], learnt) if learnt else ()
        return [x.detach() for x in (*outputs, *grads)]

    first = run()
    for _ in range(2 if INTERPRETED else 100):
        for before, now in zip(first, run(), strict=True):
            assert torch.equal(before, now)


def test_ops_compile_into_one_graph(monkeypatch):
    monkeypatch.undo()  # the compiler traces new_empty
    images, ids = pixels(2, 8, 12), patch_ids(2, 5, 6)
    weight, keys = rand(48, 48, seed=8).requires_grad_(), rand(30, 240, seed=9)

    def losses(weight: Tensor, offset: int) -> Tensor:
        keep, _ = block_mask(
            ids[:, 0].long(),
            grid=(2, 3),
            mask_unit=1,
            num_keep_units=5,
            seed=0,
            epoch=3,
            backend="triton",
        )
        arguments = {"patch_size": 4, "backend": "triton", **CONSTANTS}
        rows = patch_gather(images, keep, **arguments) @ weight
        reconstruction = masked_mse(rows, images, ids, **arguments)
        return reconstruction + info_nce(
            rows.flatten(1), keys, temperature=0.07, label_offset=offset, backend="triton"
        )

    compiled = torch.compile(
        losses, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor"
    )
    for offset in (0, 3, 4):
        eager, graph = losses(weight, offset), compiled(weight, offset)
        assert relative_error(graph.detach(), eager.detach()) <= 1e-6
        (expected,) = torch.autograd.grad(eager, weight)
        (grad,) = torch.autograd.grad(graph, weight)
        assert relative_error(grad, expected) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_leaves_the_kernels_alone(dtype):
    case = softmax_case(5, 40, 24, 2, dtype)
    plain = info_nce(**case, temperature=0.07, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(info_nce(**case, temperature=0.07, backend="triton"), plain)
