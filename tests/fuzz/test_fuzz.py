"""Some hundred mutated inputs for every parser, the same each time; a minute of others where time allows."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.fuzz.harnesses import Harness, build_harnesses
from tests.fuzz.run import SLOW_S, Outcome, fuzz

NAMES = [
    *("tar records", "verify and repair", "jpeg walk", "decoded images", "label cls", "label json"),
    *(
        "index bytes",
        "index columns",
        "dataset.json",
        "classes.json",
        "image list",
        "image archive",
        "urls",
        "recipe",
    ),
    *("checkpoint", "initial weights", "checkpoint config", "metrics", "ledger", "live status"),
    *("profile.json", "bench results"),
]


@pytest.fixture(scope="module")
def harnesses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Harness]:
    return build_harnesses(tmp_path_factory.mktemp("seeds"))


def check(name: str, outcome: Outcome) -> None:
    for where, (data, text) in outcome.unexpected.items():
        pytest.fail(f"{name}: {where} of {data[:300]!r}...\n{text}")
    assert outcome.inputs > 0
    assert outcome.slowest_s < SLOW_S, outcome.slowest[:300]


def test_every_parser_is_here(harnesses: dict[str, Harness]) -> None:
    assert list(harnesses) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_no_mutated_input_gives_a_traceback(harnesses: dict[str, Harness], name: str) -> None:
    harness = harnesses[name]
    inputs = max(8, int(200 * harness.share))
    check(name, fuzz(name, harness, seed=0, inputs=inputs, until=time.perf_counter() + 60))


@pytest.mark.parametrize("name", NAMES)
def test_seeds_are_good_inputs(harnesses: dict[str, Harness], name: str, tmp_path: Path) -> None:
    """A seed that its parser refuses would leave most of the parser untried."""
    if name in ("index columns", "checkpoint config", "image list", "urls", "initial weights"):
        pytest.skip("its seeds are only nearly good: files that are not there, weights of no model")
    for number, seed in enumerate(harnesses[name].seeds[:1]):
        (tmp_path / str(number)).mkdir()
        harnesses[name].run(seed, tmp_path / str(number))


@pytest.mark.slow
def test_half_a_minute_of_other_inputs(harnesses: dict[str, Harness]) -> None:
    """The same inputs each time, as far as the time goes: `make fuzz` tries new ones."""
    seconds = float(os.environ.get("CMAE_FUZZ_S", "30"))
    seed = int(os.environ.get("CMAE_FUZZ_SEED", "1"))
    for name, harness in harnesses.items():
        until = time.perf_counter() + seconds / len(harnesses)
        check(name, fuzz(name, harness, seed=seed, inputs=2**31, until=until))
