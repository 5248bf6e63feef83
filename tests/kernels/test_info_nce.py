"""InfoNCE against its formula, and who gets a gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cmae.kernels.info_nce import info_nce


def query_and_keys(rows: int = 5, keys: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, 7, dtype=torch.float64, generator=generator) * 3,
        torch.randn(keys, 7, dtype=torch.float64, generator=generator),
    )


def numpy_loss(query: torch.Tensor, keys: torch.Tensor, temperature: float, offset: int) -> float:
    q = query.numpy() / np.linalg.norm(query.numpy(), axis=1, keepdims=True)
    k = keys.numpy() / np.linalg.norm(keys.numpy(), axis=1, keepdims=True)
    logits = q @ k.T / temperature
    losses = [math.log(np.exp(row - row[i + offset]).sum()) for i, row in enumerate(logits)]
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.03, 0.07, 1.0])
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_equals_the_formula(temperature, offset, dtype, tolerance):
    query, keys = query_and_keys()
    loss = info_nce(query.to(dtype), keys.to(dtype), temperature=temperature, label_offset=offset)
    expected = numpy_loss(query, keys, temperature, offset)
    assert float(loss) == pytest.approx(expected, rel=tolerance)


def test_label_offset_names_the_rows_of_the_other_rank():
    query, keys = query_and_keys(rows=4, keys=8)
    keys[4:] = query
    aligned = info_nce(query, keys, temperature=0.07, label_offset=4)
    assert aligned < 0.1
    assert info_nce(query, keys, temperature=0.07, label_offset=0) > 5


def test_only_the_query_side_is_summed_over():
    """Rows are queries: swapping the two sides gives another number."""
    query, keys = query_and_keys(rows=6, keys=6)
    one = info_nce(query, keys, temperature=0.07)
    other = info_nce(keys, query, temperature=0.07)
    assert abs(float(one - other)) > 0.01


def test_keys_get_a_gradient_only_if_they_require_one():
    query, keys = query_and_keys()
    info_nce(query.requires_grad_(), keys, temperature=0.07).backward()
    assert query.grad is not None
    assert keys.grad is None
    info_nce(query, keys.requires_grad_(), temperature=0.07).backward()
    assert keys.grad.abs().sum() > 0


def test_autocast_does_not_touch_the_logits():
    query, keys = (x.float() for x in query_and_keys())
    expected = info_nce(query, keys, temperature=0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(info_nce(query, keys, temperature=0.07), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"label_offset": 5}, "label_offset=5"),
        ({"label_offset": -1}, "label_offset=-1"),
        ({"keys": torch.zeros(9, 6)}, "keys"),
        ({"query": torch.zeros(5, 7).int()}, "query"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_bad_arguments_are_named(change, named):
    query, keys = query_and_keys()
    arguments = {"query": query, "keys": keys, "temperature": 0.07} | change
    with pytest.raises(ValueError, match=named):
        info_nce(arguments.pop("query"), arguments.pop("keys"), **arguments)
