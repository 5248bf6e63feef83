"""Give parsers mutated inputs for some seconds and tell what came out that is no documented error.

    make fuzz                                      ten minutes; FUZZ_S=3600 make fuzz for an hour
    PYTHONPATH=tests:. python -m tests.fuzz.run --only "jpeg walk" "recipe" --seconds 60 --seed 7

With atheris installed, `--atheris NAME` lets it choose the inputs by coverage.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.harnesses import EXPECTED, Harness, build_harnesses
from tests.fuzz.mutator import mutate

SLOW_S = 5.0
"""An input that takes longer is told: its cost is not that of its size."""


@dataclass
class Outcome:
    """What one parser did."""

    inputs: int = 0
    refused: int = 0
    unexpected: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """An input and the traceback, by the error and the line that raised it."""
    slowest_s: float = 0.0
    slowest: bytes = b""


def fuzz(name: str, harness: Harness, *, seed: int, inputs: int, until: float) -> Outcome:
    """Run one parser on mutated inputs.

    Args:
        name: Name of the parser, which seeds its inputs too.
        harness: The parser.
        seed: Seed of the inputs.
        inputs: Largest number of inputs.
        until: Value of `time.perf_counter` at which to end.
    """
    rng = random.Random(f"{name} {seed}")
    outcome = Outcome()
    logging.disable(logging.WARNING)  # of what is passed over
    with tempfile.TemporaryDirectory() as root:
        for number in range(inputs):
            if time.perf_counter() > until:
                break
            # The seeds themselves first.
            data = (
                harness.seeds[number]
                if number < len(harness.seeds)
                else mutate(rng.choice(harness.seeds), harness.seeds, rng)
            )
            folder = Path(root, str(number))
            folder.mkdir()
            _try(harness, data, folder, outcome)
            shutil.rmtree(folder, ignore_errors=True)
    logging.disable(logging.NOTSET)
    return outcome


def _try(harness: Harness, data: bytes, folder: Path, outcome: Outcome) -> None:
    outcome.inputs += 1
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            harness.run(data, folder)
    except EXPECTED as error:
        outcome.refused += 1
        text = str(error)
        if "weights_only" in text or "Traceback" in text:
            outcome.unexpected.setdefault("advice of a library", (data, text))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [one for one in frames if "/cmae/" in one.filename] or frames
        where = f"{type(error).__name__} in {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        outcome.unexpected.setdefault(where, (data, traceback.format_exc()))
    seconds = time.perf_counter() - started
    if seconds > outcome.slowest_s:
        outcome.slowest_s, outcome.slowest = seconds, data


def run_with_atheris(name: str, harness: Harness) -> None:
    """Let atheris choose the inputs, until it is stopped."""
    import atheris  # type: ignore[import-not-found,unused-ignore]

    root = Path(tempfile.mkdtemp())
    numbers = iter(range(2**62))

    def one(data: bytes) -> None:
        folder = root / str(next(numbers))
        folder.mkdir()
        try:
            harness.run(data, folder)
        except EXPECTED:
            pass
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    corpus = root / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(harness.seeds):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    """Fuzz all parsers, print a row for each, keep what was not expected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="for all parsers together")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--only", nargs="+", help="names of parsers")
    parser.add_argument("--atheris", metavar="NAME", help="one parser, inputs chosen by atheris")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder of findings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        harnesses = build_harnesses(Path(folder))
    if arguments.atheris:
        run_with_atheris(arguments.atheris, harnesses[arguments.atheris])
    names = arguments.only or list(harnesses)
    print(f"seed {arguments.seed}")
    kinds: Counter[str] = Counter()
    for name in names:
        until = time.perf_counter() + arguments.seconds / len(names)
        outcome = fuzz(name, harnesses[name], seed=arguments.seed, inputs=2**31, until=until)
        kinds[name] = len(outcome.unexpected)
        print(
            f"{name:<20} {outcome.inputs:>8} inputs, {outcome.refused:>8} refused, "
            f"{len(outcome.unexpected)} unexpected, slowest {outcome.slowest_s:.2f} s",
            flush=True,
        )
        for number, (where, (data, text)) in enumerate(outcome.unexpected.items()):
            arguments.keep.mkdir(parents=True, exist_ok=True)
            stem = arguments.keep / f"{name.replace(' ', '-')}-{number}"
            stem.with_suffix(".bin").write_bytes(data)
            stem.with_suffix(".txt").write_text(text)
            print(f"    {where}: {stem}.bin")
    return int(kinds.total() > 0)


if __name__ == "__main__":
    raise SystemExit(main())
