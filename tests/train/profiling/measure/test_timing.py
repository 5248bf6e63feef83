"""A measurement window: what is counted as waiting, as work and as somebody else's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.fake_time import FakeTime

from cmae.train.profiling.measure import timing
from cmae.train.profiling.measure.timing import background_consumer, measure_window


def test_a_window_tells_waiting_from_work(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeTime()
    monkeypatch.setattr(timing, "time", fake)
    monkeypatch.setattr(timing, "process_cpu_s", lambda: 2 * fake.cpu_s)
    monkeypatch.setattr(timing, "_busy_s", lambda: 5 * fake.cpu_s)
    monkeypatch.setattr(timing, "_run_delay_s", lambda: fake.cpu_s)
    ends = iter((0.0, 0.5))

    found = measure_window(
        "full",
        lambda: (fake.wait(0.03), fake.compute(0.01)),
        lambda batch: fake.compute(0.1),
        count=4,
        images_per_step=8,
        # The device is behind by half a second in the end.
        synchronise=lambda: fake.wait(next(ends)),
    )
    assert found.wall_s == pytest.approx(4 * 0.14 + 0.5)
    assert found.step_times_ms[:3] == pytest.approx((140, 140, 140))
    assert found.step_times_ms[3] == pytest.approx(640)
    assert (found.next_ms, found.next_cpu_ms) == (pytest.approx(40), pytest.approx(10))
    assert found.step_cpu_ms == pytest.approx(100)
    assert found.images_per_s == pytest.approx(32 / 1.06)
    assert found.process_cpu_s == pytest.approx(2 * 0.44)
    assert found.others_cpu_s == pytest.approx(3 * 0.44)
    assert found.run_delay_s == pytest.approx(0.44)


def test_the_background_consumer_takes_one_batch_a_call() -> None:
    taken = threading.Semaphore(0)
    with background_consumer(taken.release) as release:
        for _ in range(3):
            release()
            taken.acquire()
    assert not taken.acquire(blocking=False)


@contextmanager
def taking(take: Callable[[], None], begun: threading.Event) -> Iterator[None]:
    """A consumer that has begun to take one batch."""
    with background_consumer(take) as release:
        release()
        begun.wait()
        yield


def test_the_background_consumer_hands_on_its_failure() -> None:
    begun = threading.Event()

    def take() -> None:
        begun.set()
        raise ValueError("the file is bad")

    with pytest.raises(ValueError, match="the file is bad"), taking(take, begun):
        pass
