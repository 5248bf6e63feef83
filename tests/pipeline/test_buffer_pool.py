from __future__ import annotations

import numpy as np
import pytest
import torch

from cmae.pipeline.buffer_pool import BufferPool

HOLDERS = {
    "slice": lambda data: data[3:5],
    "reshaped": lambda data: data.reshape(10, 10),
    "tensor": torch.from_numpy,
    "tensor view": lambda data: torch.from_numpy(data.reshape(4, 25))[1, 2:4],
    "numpy of a tensor": lambda data: torch.from_numpy(data).view(10, 10).numpy()[0],
    "dlpack": lambda data: torch.from_dlpack(data),
    "numpy of a dlpack": lambda data: np.from_dlpack(torch.from_numpy(data)),
    "memoryview": lambda data: data.data[:7],
}


def address(data: np.ndarray) -> int:
    return data.__array_interface__["data"][0]


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_buffer_is_not_given_out_again_while_something_refers_to_it(holder):
    pool = BufferPool()
    data = pool.take(100)
    place = address(data)
    kept = HOLDERS[holder](data)
    del data
    other = pool.take(100)
    assert address(other) != place
    del kept, other
    assert place in {address(a) for a in [pool.take(100), pool.take(100)]}


def test_a_larger_request_gets_memory_of_its_own_and_a_smaller_one_fits():
    pool = BufferPool()
    place = address(pool.take(1000))
    small = pool.take(10)
    assert address(small) == place
    assert small.size == 10
    assert pool.take(5000).size == 5000


def test_memory_of_many_batches_let_go_is_given_back():
    pool = BufferPool()
    held = [pool.take(100) for _ in range(50)]
    assert len({address(data) for data in held}) == 50
    held.clear()
    pool.take(100)
    assert len(pool._arrays) <= BufferPool._MAX_FREE + 1
