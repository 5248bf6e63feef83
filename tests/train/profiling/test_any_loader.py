"""Loaders that are not ours are profiled too. Time is simulated: a busy machine changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from support.fake_time import FakeTime
from torch.utils.data import DataLoader

from cmae.train.profiling import profile_loader
from cmae.train.profiling.analysis.records import Profile
from cmae.train.profiling.measure import timing


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    found = FakeTime()
    monkeypatch.setattr(timing, "time", found)
    for name in ("process_cpu_s", "_busy_s", "_run_delay_s"):
        monkeypatch.setattr(timing, name, lambda: 0.0)
    return found


class Workers:
    """A loader with workers, which make a batch every `batch_s` until two are ready."""

    num_workers = 2

    def __init__(self, fake: FakeTime, batch_s: float) -> None:
        self._fake, self._batch_s = fake, batch_s

    def __iter__(self) -> Iterator[torch.Tensor]:
        done_at = self._fake.wall_s
        while True:
            done_at = max(done_at + self._batch_s, self._fake.wall_s - self._batch_s)
            self._fake.wait(max(0.0, done_at - self._fake.wall_s))
            yield torch.zeros(8, 1)


def profiled(loader: object, step: Callable[[torch.Tensor], object]) -> Profile:
    return profile_loader(loader, step, rounds=3, steps=4, device="cpu")


def components_of(found: Profile) -> dict[str, float]:
    components = {one.name: one.ms.value for one in found.breakdown}
    assert sum(components.values()) == pytest.approx(found.step_ms.value)
    return components


def test_a_loader_that_is_too_slow_is_named_with_its_workers(fake: FakeTime) -> None:
    found = profiled(Workers(fake, 0.08), lambda batch: fake.wait(0.02))
    assert found.diagnosis.bottleneck == "loader"
    assert "the loader (2 workers)" in found.diagnosis.sentence
    assert components_of(found)["model"] == pytest.approx(20)
    assert components_of(found)["loader"] == pytest.approx(60)
    assert found.global_batch_size == 8
    # Twice the workers: a batch every 40 ms.
    doubled = next(one for one in found.actions if one.what == "num_workers=4")
    assert doubled.predicted_images_per_s == pytest.approx(8 / 0.04)


def test_a_loader_with_room_leaves_the_model_to_be_named(fake: FakeTime) -> None:
    found = profiled(Workers(fake, 0.02), lambda batch: fake.wait(0.15))
    assert found.diagnosis.bottleneck == "model"
    assert found.diagnosis.headroom == pytest.approx(7.5)


def test_a_loader_that_works_in_the_training_thread_is_named(fake: FakeTime) -> None:
    def batches() -> Iterator[torch.Tensor]:
        while True:
            fake.compute(0.02)
            yield torch.zeros(8, 1)

    found = profiled(batches(), lambda batch: fake.wait(0.02))
    assert found.diagnosis.bottleneck == "python"
    assert "the loader works in the training thread" in found.diagnosis.sentence
    assert components_of(found)["python"] == pytest.approx(20)


def test_a_data_loader_is_profiled_as_it_is() -> None:
    loader = DataLoader([torch.zeros(3, 8, 8)] * 24, batch_size=8)
    found = profile_loader(loader, lambda batch: batch.sum(), rounds=2, steps=2)
    components_of(found)
    assert {one.name for one in found.phases} == {"full", "replay", "interference", "loader_full"}
    assert found.config == {"loader": "DataLoader", "num_workers": 0}


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        profile_loader([], lambda batch: None)


def test_a_loader_that_cannot_begin_again_is_refused() -> None:
    with pytest.raises(ValueError, match="used up after 5 batches"):
        profile_loader(iter([torch.zeros(2)] * 5), lambda batch: None, rounds=2, steps=2)


def test_a_batch_without_a_length_asks_for_batch_size() -> None:
    with pytest.raises(ValueError, match="give batch_size"):
        profile_loader(["x"], lambda batch: None)


@pytest.mark.gpu
def test_slow_copies_to_the_device_are_named() -> None:
    weight = torch.randn(1024, 1024, device="cuda")
    # 64 MB each, pageable.
    batches = [torch.randn(16, 1_000_000) for _ in range(4)]

    def step(batch: torch.Tensor) -> None:
        on_device = batch.to("cuda")
        for _ in range(20):
            torch.mm(weight, on_device[:1, :1024].expand(1024, 1024))

    found = profile_loader(batches, step, rounds=3, device="cuda")
    assert found.diagnosis.bottleneck == "host_to_device"
    assert components_of(found)["host_to_device"] > 0.5 * found.step_ms.value
