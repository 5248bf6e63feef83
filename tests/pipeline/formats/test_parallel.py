from __future__ import annotations

import threading

import pytest

from cmae.pipeline.formats.parallel import run_threads


def test_run_threads_keeps_order_and_drops_the_rest_after_an_error() -> None:
    assert run_threads(lambda x: x * x, range(50), workers=4) == [x * x for x in range(50)]
    done: list[int] = []
    stop = threading.Event()

    def work(x: int) -> None:
        if x == 2:
            raise KeyError(x)
        if x > 2:
            stop.wait(timeout=10)
        done.append(x)

    with pytest.raises(KeyError):
        run_threads(work, range(1000), workers=1, stop=stop.set)
    assert stop.is_set()
    assert len(done) <= 3
