"""Contrastive loss of queries against a bank of keys, in one direction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cmae.kernels.backend import Backend, jit, on_device, refuse_backward, tl, use_triton
from cmae.kernels.images import KERNEL_DTYPES

_MAX_DIM = 512  # a program holds whole rows of queries and of gradients; half as many in two halves
_MAX_VALUES = 1 << 31  # offsets inside the kernels are 32-bit


def info_nce(
    query: Float[Tensor, "N D"],
    keys: Float[Tensor, "M D"],
    *,
    temperature: float,
    label_offset: int = 0,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    """Mean cross-entropy of softmax(cos(query, keys) / temperature) (CMAE, equation of L_c).

    Args:
        query: Queries of any length; normalised to length 1 here.
        keys: Bank of all ranks' keys, normalised alike. Gets a gradient only if it requires one.
        temperature: Divisor of the cosines, > 0.
        label_offset: Key that is the positive of row 0: rank * batch size. That of row i is i rows further.
        backend: Implementation; see `cmae.kernels.backend`.

    Returns:
        float32 scalar, computed in float32 even under autocast (float64 stays float64).

    Raises:
        ValueError: Shapes do not fit, or `temperature` or `label_offset` is out of range.
    """
    if query.ndim != 2 or not query.is_floating_point():
        raise ValueError(
            f"query has shape {tuple(query.shape)} and dtype {query.dtype}; expected floats (N, D)."
        )
    if keys.ndim != 2 or keys.shape[1] != query.shape[1] or not keys.is_floating_point():
        raise ValueError(
            f"keys has shape {tuple(keys.shape)} and dtype {keys.dtype}; expected floats "
            f"(M, {query.shape[1]}), the width of query."
        )
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be > 0; the paper uses 0.07.")
    if label_offset < 0 or label_offset + query.shape[0] > keys.shape[0]:
        raise ValueError(
            f"label_offset={label_offset} with {query.shape[0]} rows of query needs keys "
            f"0..{label_offset + query.shape[0] - 1}, but keys has {keys.shape[0]} rows; pass "
            "rank * batch size and the bank gathered over all ranks."
        )
    if use_triton("info_nce", backend, query.device, unsupported=_unsupported(query, keys)):
        with_grad = torch.is_grad_enabled() and (query.requires_grad or keys.requires_grad)
        loss: Tensor = torch.ops.cmae.info_nce(query, keys, temperature, label_offset, with_grad)[0]
        return loss
    return info_nce_reference(query, keys, temperature=temperature, label_offset=label_offset)


def info_nce_reference(
    query: Float[Tensor, "N D"],
    keys: Float[Tensor, "M D"],
    *,
    temperature: float,
    label_offset: int = 0,
) -> Float[Tensor, ""]:
    """`info_nce` in plain torch; holds the (N, M) logits."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Autocast would run the product in 16 bits, where a logit of 14 (1 / .07) is off by .004.
    with torch.autocast(query.device.type, enabled=False):
        unit_query = F.normalize(query.to(dtype), dim=1)
        unit_keys = F.normalize(keys.to(dtype), dim=1)
        logits = unit_query @ unit_keys.T / temperature
        labels = torch.arange(len(query), device=query.device) + label_offset
        return F.cross_entropy(logits, labels)


def _unsupported(query: Tensor, keys: Tensor) -> str | None:
    max_dim = _MAX_DIM // 2 if query.dtype == torch.float32 else _MAX_DIM
    for name, tensor in (("query", query), ("keys", keys)):
        if tensor.dtype not in KERNEL_DTYPES:
            return f"{name} has dtype {tensor.dtype}; use 16 or 32 bit or backend='torch'."
        if not 0 < tensor.shape[1] <= max_dim:
            return f"{name} has width {tensor.shape[1]}, not 1..{max_dim}; use backend='torch'."
        if tensor.numel() >= _MAX_VALUES or not len(tensor):
            return f"{name} has {len(tensor)} rows; split it or use backend='torch'."
    if keys.device != query.device:
        return f"keys is on {keys.device} and query on {query.device}; move one of them."
    return None


@jit()
def _unit_rows(x, inside, eps: tl.constexpr = 1e-12):  # type: ignore[no-untyped-def]
    """Rows of length 1, the inverse of their old length, and where that was not clamped."""
    norm = tl.sqrt_rn(tl.sum(tl.where(inside, x * x, 0), axis=1))[:, None]
    inverse = 1 / tl.where(norm < eps, eps, norm)  # not tl.maximum, which hides a NaN
    return x * inverse, inverse, norm > eps


@jit()
def _halves(x):  # type: ignore[no-untyped-def]
    """Float32 values as the sum of two in fp16: 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@jit()
def _dot(a, a_low, b, b_low, total, exact: tl.constexpr):  # type: ignore[no-untyped-def]
    """`total` + a @ b on fp16 tensor cores; with all 22 bits of the factors when `exact`."""
    total = tl.dot(a, b, total)
    if exact:
        total = tl.dot(a_low, b, total)
        total = tl.dot(a, b_low, total)
    return total


@jit()
def _load_halves(x, places, low_offset, exact: tl.constexpr):  # type: ignore[no-untyped-def]
    high = tl.load(x + places)
    low = high
    if exact:
        low = tl.load(x + low_offset + places)
    return high, low


@jit()
def _normalise_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    num_rows,
    dim,
    stride_row,
    stride_column,
    low_offset,
    exact: tl.constexpr,
    block_rows: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Rows of length 64 in fp16, in the padded shape of `out`; `exact` adds what fp16 leaves over.

    64 keeps the second halves of unit vectors above fp16's subnormal numbers.
    """
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)[:, None]
    columns = tl.arange(0, block_dim)[None, :]
    inside = (rows < num_rows) & (columns < dim)
    values = tl.load(x + rows * stride_row + columns * stride_column, mask=inside, other=0)
    unit, _, _ = _unit_rows(values.to(tl.float32), inside)
    high, low = _halves(64 * unit)
    tl.store(out + rows * block_dim + columns, high)
    if exact:
        tl.store(out + low_offset + rows * block_dim + columns, low)


# The offset changes with the micro-batch and must not be specialised: Triton would compile again.
@jit(do_not_specialize=["label_offset"])
def _split_kernel(  # type: ignore[no-untyped-def]
    query,
    unit_keys,
    split_max,
    split_sum,
    split_weight,
    split_mean,
    num_queries,
    num_keys,
    dim,
    keys_per_split,
    label_offset,
    scale,
    stride_row,
    stride_column,
    low_offset,
    with_grad: tl.constexpr,
    exact: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    """Softmax over one split of the negative keys, and with_grad its weighted sum of keys.

    Flash attention whose values are the keys. The positive key is left out: its column is nearly the
    sum of all others with the opposite sign, and in 16 bits the difference would be noise. Exponents
    are base 2 and 15 above the usual, so that small probabilities are normal numbers in fp16.
    """
    rows = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    columns = tl.arange(0, block_dim)
    is_query = rows < num_queries
    inside = is_query[:, None] & (columns < dim)[None, :]
    places = query + rows[:, None] * stride_row + columns[None, :] * stride_column
    unit, _, _ = _unit_rows(tl.load(places, mask=inside, other=0).to(tl.float32), inside)
    high, low = _halves(64 * unit)
    positive = rows + label_offset
    highest = tl.full((block_queries,), -1e30, tl.float32)
    total = tl.zeros((block_queries,), tl.float32)
    weight = tl.zeros((block_queries,), tl.float32)
    mean = tl.zeros((block_queries, block_dim), tl.float32)
    first = tl.program_id(1) * keys_per_split
    for start in range(first, min(first + keys_per_split, num_keys), block_keys):
        index = start + tl.arange(0, block_keys)
        offsets = index[:, None] * block_dim + columns[None, :]
        keys, keys_low = _load_halves(unit_keys, offsets, low_offset, exact)
        logits = tl.zeros((block_queries, block_keys), tl.float32)
        logits = _dot(high, low, tl.trans(keys), tl.trans(keys_low), logits, exact)
        logits = logits * (scale / 4096)
        is_negative = (index[None, :] != positive[:, None]) & (index < num_keys)[None, :]
        logits = tl.where(is_negative, logits, -1e30)
        new_highest = tl.maximum(highest, tl.max(logits, axis=1) - 15)
        probs = tl.where(is_negative, tl.exp2(logits - new_highest[:, None]), 0)
        decay = tl.exp2(highest - new_highest)
        total = total * decay + tl.sum(probs, axis=1)
        if with_grad:
            probs, probs_low = _halves(probs)
            # The weights that the product sees: with these the result is a true mean of keys.
            seen = probs.to(tl.float32)
            if exact:
                seen += probs_low.to(tl.float32)
            weight = weight * decay + tl.sum(seen, axis=1)
            mean = _dot(probs, probs_low, keys, keys_low, mean * decay[:, None], exact)
        highest = new_highest
    slots = tl.program_id(1) * num_queries + rows
    tl.store(split_max + slots, highest, mask=is_query)
    tl.store(split_sum + slots, total, mask=is_query)
    if with_grad:
        tl.store(split_weight + slots, weight, mask=is_query)
        outputs = split_mean + slots[:, None] * block_dim + columns[None, :]
        tl.store(outputs, mean * (1 / 64), mask=is_query[:, None])


@jit(do_not_specialize=["label_offset"])
def _combine_kernel(  # type: ignore[no-untyped-def]
    query,
    keys,
    split_max,
    split_sum,
    split_weight,
    split_mean,
    row_loss,
    grad_query,
    row_lse,
    row_weight,
    num_queries,
    num_splits,
    dim,
    label_offset,
    scale,
    grad_scale,
    query_stride_row,
    query_stride_column,
    keys_stride_row,
    keys_stride_column,
    with_grad: tl.constexpr,
    block_splits: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One program adds the splits of one query, in order, and brings in its positive key in float32."""
    row = tl.program_id(0)
    columns = tl.arange(0, block_dim)[None, :]
    inside = columns < dim
    places = query + row * query_stride_row + columns * query_stride_column
    unit, inverse, is_free = _unit_rows(
        tl.load(places, mask=inside, other=0).to(tl.float32), inside
    )
    places = keys + (row + label_offset) * keys_stride_row + columns * keys_stride_column
    positive, _, _ = _unit_rows(tl.load(places, mask=inside, other=0).to(tl.float32), inside)
    logit = tl.sum(unit * positive) * scale

    splits = tl.arange(0, block_splits)
    is_split = splits < num_splits
    places = splits * num_queries + row
    maxima = tl.load(split_max + places, mask=is_split, other=-1e30)
    highest = tl.max(maxima)
    shares = tl.where(is_split, tl.exp2(maxima - highest), 0)
    total = tl.sum(shares * tl.load(split_sum + places, mask=is_split, other=0))

    # Cross-entropy is softplus(gap), gap = log-sum-exp of the negatives - positive logit; in base 2.
    gap = tl.log2(total) + highest - logit
    small = tl.exp2(-tl.abs(gap))
    above_one = 1 + small
    # log(1 + small), right to the last bits where `small` vanishes beside 1.
    log1p = tl.where(
        above_one == 1,
        small,
        tl.log(above_one) * small / tl.where(above_one == 1, 1, above_one - 1),
    )
    loss = tl.where(gap > 0, gap, 0) * 0.6931471805599453 + log1p
    tl.store(row_loss + row, loss)
    if with_grad:
        negative_prob = tl.where(gap >= 0, 1, small) / above_one  # 1 - that of the positive key
        tl.store(row_lse + row, logit + loss * 1.4426950408889634)
        tl.store(row_weight + row, negative_prob)
        weight = tl.sum(shares * tl.load(split_weight + places, mask=is_split, other=0))
        mean = tl.zeros((1, block_dim), tl.float32)
        for split in range(num_splits):
            share = tl.exp2(tl.load(split_max + split * num_queries + row) - highest)
            offsets = (split * num_queries + row) * block_dim + columns
            mean += share * tl.load(split_mean + offsets)
        mean = mean / tl.where(weight == 0, 1, weight)  # 0: there is no other key
        grad = negative_prob * (mean - positive) * grad_scale
        along = tl.where(is_free, tl.sum(tl.where(inside, grad * unit, 0)), 0)
        tl.store(grad_query + row * dim + columns, (grad - along * unit) * inverse, mask=inside)


@jit(do_not_specialize=["label_offset"])
def _grad_keys_kernel(  # type: ignore[no-untyped-def]
    grad_loss,
    query,
    keys,
    unit_query,
    unit_keys,
    row_lse,
    row_weight,
    out,
    num_queries,
    num_keys,
    dim,
    label_offset,
    scale,
    grad_scale,
    query_stride_row,
    query_stride_column,
    keys_stride_row,
    keys_stride_column,
    query_low_offset,
    keys_low_offset,
    exact: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_dim: tl.constexpr,
):
    """One program sums the gradient of `block_keys` keys over all queries.

    The query to which a key is the positive is left out of the products, and probabilities are scaled by
    the largest so far, as in `_split_kernel`.
    """
    index = tl.program_id(0) * block_keys + tl.arange(0, block_keys)
    columns = tl.arange(0, block_dim)[None, :]
    places = index[:, None] * block_dim + columns
    high, low = _load_halves(unit_keys, places, keys_low_offset, exact)
    owner = index - label_offset
    highest = tl.full((block_keys,), -1e30, tl.float32)
    grad = tl.zeros((block_keys, block_dim), tl.float32)
    for start in range(0, num_queries, block_queries):
        rows = start + tl.arange(0, block_queries)
        is_query = rows < num_queries
        offsets = rows[:, None] * block_dim + columns
        queries, queries_low = _load_halves(unit_query, offsets, query_low_offset, exact)
        logits = tl.zeros((block_keys, block_queries), tl.float32)
        logits = _dot(high, low, tl.trans(queries), tl.trans(queries_low), logits, exact)
        logits = logits * (scale / 4096)
        lse = tl.load(row_lse + rows, mask=is_query, other=0)
        is_negative = (rows[None, :] != owner[:, None]) & is_query[None, :]
        exponents = tl.where(is_negative, logits - lse[None, :], -1e30)
        new_highest = tl.maximum(highest, tl.max(exponents, axis=1) - 15)
        probs = tl.where(is_negative, tl.exp2(exponents - new_highest[:, None]), 0)
        probs, probs_low = _halves(probs)
        grad = grad * tl.exp2(highest - new_highest)[:, None]
        grad = _dot(probs, probs_low, queries, queries_low, grad, exact)
        highest = new_highest
    grad = grad * (tl.exp2(highest) * (1 / 64))[:, None]
    is_owned = ((owner >= 0) & (owner < num_queries) & (index < num_keys))[:, None]
    inside = is_owned & (columns < dim)
    places = query + owner[:, None] * query_stride_row + columns * query_stride_column
    unit, _, _ = _unit_rows(tl.load(places, mask=inside, other=0).to(tl.float32), inside)
    negative_prob = tl.load(row_weight + owner[:, None], mask=is_owned, other=0)
    grad = (grad - negative_prob * unit) * grad_scale * tl.load(grad_loss)
    inside = (index < num_keys)[:, None] & (columns < dim)
    places = keys + index[:, None] * keys_stride_row + columns * keys_stride_column
    unit, inverse, is_free = _unit_rows(
        tl.load(places, mask=inside, other=0).to(tl.float32), inside
    )
    along = tl.sum(tl.where(inside, grad * unit, 0), axis=1)[:, None]
    grad = (grad - tl.where(is_free, along, 0) * unit) * inverse
    places = out + index[:, None] * dim + columns
    tl.store(places, grad.to(out.dtype.element_ty), mask=inside)


class _Tiles(NamedTuple):
    """How the products are cut. Factors are fp16: unit vectors need its precision, not bf16's range."""

    exact: bool
    """Two fp16 numbers for each value, three products for each: for float32 queries."""
    block_dim: int
    block_queries: int
    block_keys: int
    num_warps: int

    @classmethod
    def of(cls, query: Tensor) -> _Tiles:
        exact = query.dtype == torch.float32
        block_dim = max(16, 1 << (query.shape[1] - 1).bit_length())
        size = 64 if block_dim <= (64 if exact else 256) else 32  # larger ones spill registers
        return cls(exact, block_dim, size, size, 8 if block_dim >= 256 else 4)

    @property
    def launch(self) -> dict[str, Any]:
        return {**self._asdict(), "num_stages": 2}


def _normalise(x: Tensor, tiles: _Tiles, multiple: int) -> tuple[Tensor, int]:
    """Unit rows for the products, rows padded to a multiple; and where the low halves begin."""
    block_rows = min(multiple, 16)
    num_rows = -(-len(x) // multiple) * multiple
    out = x.new_empty((1 + tiles.exact, num_rows, tiles.block_dim), dtype=torch.float16)
    _normalise_kernel[(num_rows // block_rows,)](
        x,
        out,
        *x.shape,
        *x.stride(),
        out.stride(0),
        exact=tiles.exact,
        block_rows=block_rows,
        block_dim=tiles.block_dim,
        num_warps=4,
    )
    return out, out.stride(0)


def _forward(
    query: Tensor, keys: Tensor, temperature: float, label_offset: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; with_grad also its gradient for `query`, and per row the log-sum-exp and negative share."""
    tiles = _Tiles.of(query)
    num_queries, dim = query.shape
    num_keys = len(keys)
    # Only shapes decide, so that results do not depend on the GPU: some 128 programs, two blocks each.
    num_blocks, num_tiles = -(-num_queries // tiles.block_queries), -(-num_keys // tiles.block_keys)
    tiles_per_split = max(2, -(-num_tiles // max(1, 128 // num_blocks)))
    num_splits = -(-num_tiles // tiles_per_split)
    scale = math.log2(math.e) / temperature

    def empty(*shape: int) -> Tensor:
        return query.new_empty(shape if with_grad else (0,), dtype=torch.float32)

    split_max, split_sum = query.new_empty((2, num_splits, num_queries), dtype=torch.float32)
    split_weight = empty(num_splits, num_queries)
    split_mean = empty(num_splits, num_queries, tiles.block_dim)
    row_loss = query.new_empty(num_queries, dtype=torch.float32)
    grad_query, row_lse, row_weight = empty(*query.shape), empty(num_queries), empty(num_queries)
    parts = (split_max, split_sum, split_weight, split_mean)
    with on_device(query):
        unit_keys, low_offset = _normalise(keys, tiles, tiles.block_keys)
        _split_kernel[(num_blocks, num_splits)](
            query,
            unit_keys,
            *parts,
            num_queries,
            num_keys,
            dim,
            tiles_per_split * tiles.block_keys,
            label_offset,
            scale,
            *query.stride(),
            low_offset,
            with_grad=with_grad,
            **tiles.launch,
        )
        _combine_kernel[(num_queries,)](
            query,
            keys,
            *parts,
            row_loss,
            grad_query,
            row_lse,
            row_weight,
            num_queries,
            num_splits,
            dim,
            label_offset,
            scale,
            1 / (temperature * num_queries),
            *query.stride(),
            *keys.stride(),
            with_grad=with_grad,
            block_splits=max(2, 1 << (num_splits - 1).bit_length()),
            block_dim=tiles.block_dim,
            num_warps=2,
        )
    return row_loss.mean(), grad_query, row_lse, row_weight


def _forward_fake(
    query: Tensor, keys: Tensor, temperature: float, label_offset: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def empty(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    if not with_grad:
        return empty(), empty(0), empty(0), empty(0)
    num_queries, dim = query.shape
    return empty(), empty(num_queries, dim), empty(num_queries), empty(num_queries)


def _grad_query(grad_loss: Tensor, query: Tensor, grad_query: Tensor) -> Tensor:
    # One launch that multiplies in float32 and then rounds.
    return torch.mul(grad_query, grad_loss, out=_empty_grad(grad_loss, query))


def _grad_keys(
    grad_loss: Tensor,
    query: Tensor,
    keys: Tensor,
    row_lse: Tensor,
    row_weight: Tensor,
    temperature: float,
    label_offset: int,
) -> Tensor:
    tiles = _Tiles.of(query)
    if tiles.block_dim >= 256:  # the last step holds four such blocks in registers
        tiles = tiles._replace(block_keys=min(tiles.block_keys, 32))
    out = _empty_grad(grad_loss, keys)
    with on_device(query):
        unit_query, query_low_offset = _normalise(query, tiles, tiles.block_queries)
        unit_keys, keys_low_offset = _normalise(keys, tiles, tiles.block_keys)
        _grad_keys_kernel[(-(-len(keys) // tiles.block_keys),)](
            grad_loss,
            query,
            keys,
            unit_query,
            unit_keys,
            row_lse,
            row_weight,
            out,
            len(query),
            *keys.shape,
            label_offset,
            math.log2(math.e) / temperature,
            1 / (temperature * len(query)),
            *query.stride(),
            *keys.stride(),
            query_low_offset,
            keys_low_offset,
            **tiles.launch,
        )
    return out


def _empty_grad(grad_loss: Tensor, like: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, keys, ctx.temperature, ctx.label_offset, with_grad = inputs
    if not with_grad:
        raise RuntimeError(
            "cmae::info_nce was called with_grad=False on tensors that require a gradient."
        )
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, keys, *output[1:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    query, keys, grad_query, row_lse, row_weight = ctx.saved_tensors
    for_query, for_keys = None, None
    if ctx.needs_input_grad[0]:
        for_query = torch.ops.cmae.info_nce_grad_query(grad_loss, query, grad_query)
    if ctx.needs_input_grad[1]:
        for_keys = torch.ops.cmae.info_nce_grad_keys(
            grad_loss, query, keys, row_lse, row_weight, ctx.temperature, ctx.label_offset
        )
    return for_query, for_keys, None, None, None


torch.library.define(
    "cmae::info_nce",
    "(Tensor query, Tensor keys, float temperature, SymInt label_offset, bool with_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("cmae::info_nce", ("cpu", "cuda"), _forward)
torch.library.register_fake("cmae::info_nce", _forward_fake)
torch.library.register_autograd("cmae::info_nce", _backward, setup_context=_setup_context)
torch.library.define(
    "cmae::info_nce_grad_query", "(Tensor grad_loss, Tensor query, Tensor grad_query) -> Tensor"
)
torch.library.impl("cmae::info_nce_grad_query", ("cpu", "cuda"), _grad_query)
torch.library.register_fake("cmae::info_nce_grad_query", _empty_grad)
torch.library.register_autograd("cmae::info_nce_grad_query", refuse_backward)
torch.library.define(
    "cmae::info_nce_grad_keys",
    "(Tensor grad_loss, Tensor query, Tensor keys, Tensor row_lse, Tensor row_weight, float temperature, "
    "SymInt label_offset) -> Tensor",
)
torch.library.impl("cmae::info_nce_grad_keys", ("cpu", "cuda"), _grad_keys)
torch.library.register_fake(
    "cmae::info_nce_grad_keys", lambda grad_loss, query, keys, *_: _empty_grad(grad_loss, keys)
)
torch.library.register_autograd("cmae::info_nce_grad_keys", refuse_backward)
