"""`cmae tune`: the search under noise, the recipe of settings, and what a run takes from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmae.errors import CmaeError
from cmae.pipeline import LoaderConfig
from cmae.train.commands.main import main
from cmae.train.config_parser import load_recipe, parse_config
from cmae.train.loop.loader_settings import LoaderSettings, default_settings, loader_settings
from cmae.train.tuning.config import TuneConfig
from cmae.train.tuning.recipe import Circumstances, check_writable, write_tuned
from cmae.train.tuning.run import build_grid
from cmae.train.tuning.search import Phase, Result, Search, Trial, Window

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


def test_every_phase_is_handed_on_as_it_ends() -> None:
    seen: list[Phase] = []

    class Stopped(FakeLoader):
        def __call__(self, settings: LoaderSettings, pace: float | None) -> Window:
            if len(seen) == 2:
                raise KeyboardInterrupt
            return super().__call__(settings, pace)

    fake = Stopped(hill, seed=0, noise=0, bursts=0)
    search = Search(fake, budget_s=150, clock=lambda: fake.time, on_phase=seen.append)
    with pytest.raises(KeyboardInterrupt):
        search.run(DEFAULT, GRID)
    assert [phase.name for phase in seen] == ["num_threads", "hw_decoder_load"]
    assert seen[-1].chosen == replace(DEFAULT, num_threads=12, hw_decoder_load=0.2)
    assert not any(phase.is_last for phase in seen)


# --- the recipe -----------------------------------------------------------------------------------

AROUND = Circumstances(
    {"device": "A CPU", "cores": 8.0, "versions": {"cmae": "1", "torch": "2"}},
    "/data/train-*.tar",
    local_ranks=2,
    names=("num_threads", "prefetch", "num_readers"),
)


def phases(is_last: bool) -> list[Phase]:
    trial = Trial(replace(DEFAULT, num_threads=12), [Window(900.0, 5.0)])
    return [Phase("num_threads", [trial], trial.settings, "+20 % images/s", is_last)]


def test_the_recipe_sets_what_was_found_and_says_where_it_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "tuned.yaml"
    write_tuned(path, AROUND, phases(is_last=True), is_done=True)
    data = load_recipe("cmae_vit_s", path).data
    assert (data.num_threads, data.prefetch, data.num_readers) == (12, 2, 4)
    assert data.hw_decoder_load == 0.65
    text = path.read_text()
    for fact in (
        "A CPU, 8 cores, 2 rank(s)",
        "cmae 1, torch 2",
        "/data/train-*.tar",
        "900 images/s",
    ):
        assert fact in text
    assert f"date      {date.today().isoformat()}" in text
    assert "stopped early" not in text


def test_a_recipe_of_a_stopped_search_says_so(tmp_path: Path) -> None:
    write_tuned(tmp_path / "tuned.yaml", AROUND, phases(is_last=False), is_done=False)
    assert "stopped early: not compared with the defaults" in (tmp_path / "tuned.yaml").read_text()


def test_a_recipe_that_cannot_be_written_is_refused_before_the_search(tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text("")
    with pytest.raises(CmaeError, match="is there already; delete it"):
        check_writable(tmp_path / "tuned.yaml")
    with pytest.raises(CmaeError, match="is no folder that can be written to"):
        check_writable(tmp_path / "nowhere" / "tuned.yaml")
    check_writable(tmp_path / "other.yaml")


# --- what a run takes -----------------------------------------------------------------------------


def test_settings_of_the_configuration_win_over_the_defaults() -> None:
    assert loader_settings(LoaderConfig()) == default_settings()
    found = loader_settings(LoaderConfig(num_threads=1, hw_decoder_load=0.0))
    assert found == replace(default_settings(), num_threads=1, hw_decoder_load=0.0)


def run_arguments(shards: str) -> list[str]:
    batch = "--optim.global_batch_size 8 --optim.precision fp32"
    return f"--recipe demo --speed.device cpu {batch} --data.shards {shards}".split()


@pytest.mark.slow
def test_the_command_tunes_and_a_run_takes_the_recipe(
    small_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    before, out = os.sched_getaffinity(0), tmp_path / "tuned.yaml"
    arguments = [*run_arguments(small_shards), "--out", str(out)]
    assert main(["tune", *arguments, "--budget_s", "4", "--step_images_per_s", "50"]) == 0
    assert os.sched_getaffinity(0) == before
    printed = capsys.readouterr().out
    assert "CPU-s per 1000" in printed
    assert "the step's 50 images/s" in printed
    assert small_shards in out.read_text()

    config = parse_config([*run_arguments(small_shards), "--recipe", str(out)])
    assert config.data.num_threads is not None
    assert config.speed.torch_threads == 1  # the other recipe's
    assert main(["tune", *arguments]) == 1
    assert "is there already" in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_found(
    small_shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*args: Any, on_phase: Callable[[Phase], None], **options: Any) -> None:
        for phase in found:
            on_phase(phase)
        raise KeyboardInterrupt

    monkeypatch.setattr("cmae.train.tuning.run.search", stopped)
    out = tmp_path / "tuned.yaml"
    arguments = ["tune", *run_arguments(small_shards), "--out", str(out)]
    found: list[Phase] = []
    assert main(arguments) == 130
    assert "nothing was found yet" in capsys.readouterr().out
    assert not out.exists()
    found = phases(is_last=False)
    assert main(arguments) == 130
    assert "holds what was found" in capsys.readouterr().out.replace("\n", " ")
    assert load_recipe(out).data.num_threads == 12


def test_settings_given_to_the_command_are_not_searched(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned.yaml"
    fixed = f"--data.num_threads 1 --data.prefetch 3 --budget_s 1 --out {out}"
    assert main(["tune", *run_arguments(small_shards), *fixed.split()]) == 0
    assert "searching num_readers for" in capsys.readouterr().out
    assert load_recipe(out).data.num_threads == 1


def test_nothing_to_search_and_no_shards_are_errors_that_name_the_repair(
    small_shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "--recipe", "demo"]) == 1
    assert "data.shards is empty" in capsys.readouterr().err
    fixed = "--data.num_threads 1 --data.prefetch 3 --data.num_readers 2"
    arguments = [*run_arguments(small_shards), "--out", str(tmp_path / "tuned.yaml")]
    assert main(["tune", *arguments, *fixed.split()]) == 1
    assert "are all given: leave one of them out" in capsys.readouterr().err


def test_options_out_of_range_name_the_repair() -> None:
    with pytest.raises(ValueError, match="budget_s is 0; it must be at least 1"):
        TuneConfig(budget_s=0)
    with pytest.raises(ValueError, match="local_ranks is 1000; it must be 1"):
        TuneConfig(local_ranks=1000)
    with pytest.raises(ValueError, match="step_images_per_s is -1"):
        TuneConfig(step_images_per_s=-1)
    for name, value in (("prefetch", 0), ("num_readers", 0), ("hw_decoder_load", 1.5)):
        with pytest.raises(ValueError, match=f"{name} is"):
            LoaderConfig(**{name: value})
