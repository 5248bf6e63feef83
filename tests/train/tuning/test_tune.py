"""`cmae tune`: the search under noise, the file of settings, and what a run takes from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmae.train.commands.main import main
from cmae.train.config import Config, SpeedConfig
from cmae.train.config_parser import build_config_parser, read_config
from cmae.train.loop.loader_settings import LoaderSettings, default_settings, loader_settings
from cmae.train.tuning.run import TuneOptions, build_grid
from cmae.train.tuning.search import Result, Search, Window
from cmae.train.tuning.tuned import (
    TunedEntry,
    describe_circumstances,
    find_tuned,
    store_tuned,
    tune_path,
)

CPU = torch.device("cpu")
DEFAULT = LoaderSettings(num_threads=8, prefetch=2, num_readers=4, hw_decoder_load=0.65)
GRID = {
    "num_threads": [4, 6, 8, 10, 12],
    "hw_decoder_load": [0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95],
    "num_readers": [1, 2, 4, 8],
    "prefetch": [2, 3, 5],
}


class FakeLoader:
    """A machine with an optimum, noise, and bursts of other work; every window takes two seconds."""

    def __init__(
        self,
        rate: Callable[[LoaderSettings], float],
        *,
        seed: int,
        noise: float = 0.03,
        bursts: float = 0.05,
        cpu: Callable[[LoaderSettings], float] = lambda settings: 5.0,
        needed_prefetch: int = 2,
    ) -> None:
        self.time = 0.0
        self.asked: list[LoaderSettings] = []
        self._rate, self._noise, self._cpu = rate, noise, cpu
        self._bursts = bursts
        self._needed_prefetch = needed_prefetch
        self._rng = np.random.default_rng(seed)

    def __call__(self, settings: LoaderSettings, pace: float | None) -> Window:
        self.time += 2.0
        self.asked.append(settings)
        rate = self._rate(settings)
        if pace is not None:
            rate = min(rate, pace) * (1 if settings.prefetch >= self._needed_prefetch else 0.8)
        if self._rng.random() < self._bursts:  # something else ran
            rate *= 0.6
        return Window(rate * (1 + self._noise * self._rng.normal()), self._cpu(settings))

    def search(
        self, *, budget_s: float = 150, target: float | None = None, **grid: list[float]
    ) -> Result:
        search = Search(
            self, budget_s=budget_s, clock=lambda: self.time, target_images_per_s=target
        )
        return search.run(DEFAULT, grid or GRID)


def hill(settings: LoaderSettings) -> float:
    """Best at 12 threads, hw_decoder_load .2, 8 readers; the defaults are at 54 % of it."""
    return (
        4000
        * (1 - 0.05 * (12 - settings.num_threads))
        * (1 - 0.5 * abs(settings.hw_decoder_load - 0.2))
        * (1 - 0.02 * (8 - settings.num_readers))
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_the_planted_optimum_under_noise(seed: int) -> None:
    found = FakeLoader(hill, seed=seed).search().settings
    best = replace(DEFAULT, num_threads=12, hw_decoder_load=0.2, num_readers=8)
    assert hill(found) > 0.85 * hill(best)  # the defaults: 0.57


def test_without_noise_it_is_exactly_the_optimum() -> None:
    found = FakeLoader(hill, seed=1, noise=0, bursts=0).search().settings
    assert found == replace(DEFAULT, num_threads=12, hw_decoder_load=0.2, num_readers=8)


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_seldom_moves_the_defaults_and_never_claims_much(seed: int) -> None:
    result = FakeLoader(lambda settings: 1000.0, seed=seed).search()
    gain = result.chosen.images_per_s / result.default.images_per_s
    assert result.settings == DEFAULT or gain < 1.15


def test_noise_alone_keeps_the_defaults_in_most_searches() -> None:
    kept = [
        FakeLoader(lambda s: 1000.0, seed=seed).search().settings == DEFAULT for seed in range(40)
    ]
    assert np.mean(kept) > 0.7


def test_a_lucky_candidate_loses_when_it_is_measured_again() -> None:
    class Lucky(FakeLoader):
        def __call__(self, settings: LoaderSettings, pace: float | None) -> Window:
            window = super().__call__(settings, pace)
            is_new = settings.num_threads == 10 and self.asked.count(settings) <= 3
            return Window(1500.0 if is_new else 1000.0, window.cpu_s_per_1000)

    result = Lucky(lambda settings: 1000.0, seed=0).search(num_threads=[8, 10])
    assert result.phases[0].chosen.num_threads == 10
    assert result.settings == DEFAULT
    assert "defaults stay" in result.phases[-1].why


def test_the_budget_is_kept() -> None:
    fake = FakeLoader(hill, seed=0)
    result = fake.search(budget_s=150)
    assert fake.time <= 150
    assert not result.out_of_time

    short = FakeLoader(hill, seed=0)
    result = short.search(budget_s=20)
    assert short.time <= 20 + 4 * 2 + 4  # the two pairs at the end and what had begun
    assert result.out_of_time
    assert result.phases[-1].trials


def test_when_both_feed_the_step_the_one_with_less_cpu_wins() -> None:
    result = FakeLoader(
        lambda settings: 1000.0 + 10 * settings.num_threads,
        seed=0,
        cpu=lambda settings: float(settings.num_threads),
    ).search(target=500, num_threads=GRID["num_threads"])
    assert result.settings.num_threads == 4
    assert "both feed the step" in result.phases[0].why


def test_a_step_that_is_not_fed_takes_the_fastest() -> None:
    result = FakeLoader(hill, seed=0, cpu=lambda settings: float(settings.num_threads)).search(
        target=5000, num_threads=GRID["num_threads"]
    )
    assert result.settings.num_threads >= 10


@pytest.mark.parametrize("needed", [2, 3, 5])
def test_prefetch_is_the_smallest_that_keeps_the_pace(needed: int) -> None:
    fake = FakeLoader(lambda settings: 1000.0, seed=3, noise=0, bursts=0, needed_prefetch=needed)
    assert fake.search(prefetch=GRID["prefetch"]).settings == replace(DEFAULT, prefetch=needed)


def test_the_grid_holds_the_defaults_and_only_what_has_an_effect() -> None:
    default = default_settings()
    for device, has_readers in (("cpu", True), ("cpu", False), ("cuda", True)):
        grid = build_grid(default, torch.device(device), has_readers=has_readers)
        assert ("hw_decoder_load" in grid) == (device == "cuda")
        assert ("num_readers" in grid) == has_readers
        assert all(getattr(default, name) in values for name, values in grid.items())


# --- the file -------------------------------------------------------------------------------------


def entry(date: str = "2026-11-24", **changes: object) -> TunedEntry:
    circumstances = {
        "cpu": "A",
        "cores": 8,
        "gpu": None,
        "shards": "0123",
        "versions": {"torch": "2"},
    }
    return TunedEntry({**circumstances, **changes}, DEFAULT, date, {"images_per_s": 1.0})


def test_what_is_stored_is_found_again_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "tune.json"
    assert find_tuned(path, entry().circumstances) == (None, "")
    store_tuned(path, entry())
    store_tuned(path, entry(cpu="B"))
    assert find_tuned(path, entry().circumstances) == (entry(), "")
    store_tuned(path, entry(date="2026-12-01"))
    assert find_tuned(path, entry().circumstances)[0] == entry(date="2026-12-01")
    assert len(json.loads(path.read_text())["entries"]) == 2


def test_other_machines_and_other_shards_are_passed_over_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    store_tuned(path, entry())
    for change in ({"cpu": "B"}, {"cores": 4}, {"gpu": "H100"}, {"shards": "4567"}):
        assert find_tuned(path, entry(**change).circumstances) == (None, "")


def test_an_entry_of_another_version_is_ignored_and_named(tmp_path: Path) -> None:
    path = tmp_path / "tune.json"
    store_tuned(path, entry())
    found, note = find_tuned(path, entry(versions={"torch": "3"}).circumstances)
    assert found is None
    assert "of 2026-11-24 are ignored: versions.torch was 2 and is 3; run `cmae tune`" in note


@pytest.mark.parametrize(
    "content", ["not json", '{"format": 99, "entries": []}', '{"format": 1, "entries": [{}]}', "[]"]
)
def test_an_unreadable_file_is_ignored_with_a_message_and_written_again(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "tune.json"
    path.write_text(content)
    found, note = find_tuned(path, entry().circumstances)
    assert found is None
    assert f"{path} is ignored" in note
    store_tuned(path, entry())
    assert find_tuned(path, entry().circumstances) == (entry(), "")


def test_a_folder_that_cannot_be_written_is_an_error_with_the_repair(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    path = tmp_path / "cache" / "cmae" / "tune.json"
    assert find_tuned(path, entry().circumstances)[0] is None  # reading is no error
    with pytest.raises(OSError, match=r"XDG_CACHE_HOME.*--speed\.num_threads 8"):
        store_tuned(path, entry())


def test_the_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tune_path() == tmp_path / "cmae" / "tune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tune_path() == tmp_path / ".cache" / "cmae" / "tune.json"


# --- what a run takes -----------------------------------------------------------------------------


@pytest.fixture
def tuned_config(
    small_shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """Makes a configuration of the small shards, for which 5 threads, prefetch 3, 7 readers are stored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = Config()
    base = replace(base, data=replace(base.data, shards=small_shards))
    settings = LoaderSettings(5, prefetch=3, num_readers=7, hw_decoder_load=0.2)
    circumstances = describe_circumstances(base, CPU)
    store_tuned(tune_path(), TunedEntry(circumstances, settings, "2026-11-24", {}))
    return lambda **speed: replace(base, speed=SpeedConfig(**speed))


def test_tuned_settings_fill_what_is_null_and_are_named(
    tuned_config: Callable[..., Config],
) -> None:
    settings, note = loader_settings(tuned_config(), CPU)
    assert (settings.num_threads, settings.prefetch, settings.num_readers) == (5, 3, 7)
    assert note == "tuned settings of 2026-11-24: 5 threads, prefetch 3, 7 readers"


def test_explicit_settings_win_and_off_means_off(tuned_config: Callable[..., Config]) -> None:
    settings, note = loader_settings(tuned_config(num_threads=1), CPU)
    assert (settings.num_threads, settings.prefetch) == (1, 3)
    assert note == "tuned settings of 2026-11-24: prefetch 3, 7 readers"
    assert loader_settings(tuned_config(tuned="off"), CPU) == (default_settings(), "")
    explicit = tuned_config(num_threads=1, prefetch=4, num_readers=2)
    assert loader_settings(explicit, CPU)[1] == ""


def test_other_views_are_other_circumstances(tuned_config: Callable[..., Config]) -> None:
    config = tuned_config()
    config = replace(
        config, data=replace(config.data, views=replace(config.data.views, color="none"))
    )
    settings, note = loader_settings(config, CPU)
    assert settings == default_settings()
    assert "views.color was exact and is none" in note


def run_arguments(shards: str) -> list[str]:
    batch = "--optim.global_batch_size 8 --optim.precision fp32"
    return f"--recipe demo --speed.device cpu {batch} --data.shards {shards}".split()


def test_the_command_tunes_and_the_next_run_uses_it(
    small_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    before = os.sched_getaffinity(0)
    arguments = run_arguments(small_shards)
    assert main(["tune", *arguments, "--budget_s", "4", "--step_images_per_s", "50"]) == 0
    assert os.sched_getaffinity(0) == before
    printed = capsys.readouterr().out
    assert "CPU-s per 1000" in printed
    assert "the step's 50 images/s" in printed
    (stored,) = json.loads(tune_path().read_text())["entries"]
    threads = stored["settings"]["num_threads"]

    config = read_config(build_config_parser("cmae pretrain", ""), arguments)
    settings, note = loader_settings(config, CPU)
    assert settings.num_threads == threads
    run = [*arguments, "--run.out", str(tmp_path / "run"), "--optim.total_steps", "1"]
    assert main(["pretrain", *run, "--run.progress", "false"]) == 0
    assert note in capsys.readouterr().err.replace("\n", " ")


def test_settings_given_to_the_command_are_not_searched(
    small_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = run_arguments(small_shards)
    fixed = "--speed.num_threads 1 --speed.prefetch 2 --budget_s 1"
    assert main(["tune", *arguments, *fixed.split()]) == 0
    assert "searching num_readers for" in capsys.readouterr().out
    (stored,) = json.loads(tune_path().read_text())["entries"]
    assert stored["settings"]["num_threads"] == 1


def test_nothing_to_search_and_no_shards_are_errors_that_name_the_repair(
    small_shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--recipe", "demo"]) == 1
    assert "data.shards is empty" in capsys.readouterr().err
    fixed = "--speed.num_threads 1 --speed.prefetch 2 --speed.num_readers 2"
    assert main(["tune", *run_arguments(small_shards), *fixed.split()]) == 1
    assert "are all given: leave one of them out" in capsys.readouterr().err


def test_options_out_of_range_name_the_repair() -> None:
    with pytest.raises(ValueError, match="budget_s is 0; it must be at least 1"):
        TuneOptions(budget_s=0)
    with pytest.raises(ValueError, match="local_ranks is 1000; it must be 1"):
        TuneOptions(local_ranks=1000)
    with pytest.raises(ValueError, match="step_images_per_s is -1"):
        TuneOptions(step_images_per_s=-1)
    for name, value in (("prefetch", 0), ("num_readers", 0), ("hw_decoder_load", 1.5)):
        with pytest.raises(ValueError, match=f"speed.{name} is"):
            SpeedConfig(**{name: value})
