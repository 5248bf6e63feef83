"""Do harm to small runs at random instants, start them again, and compare them with a run that had peace.

    make campaign                                   200 faults, an hour on two cores
    PYTHONPATH=tests:. python -m tests.campaigns.run --faults 20 --seed 3 --only "kill -9" "torn checkpoint"

After each fault the same command is given again until it ends; weights, optimiser, loss scale, place in the
data and the losses of every step have to be those of the undisturbed run, bit by bit. The table is written to
--out, the folders of what differs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.campaigns.faults import FAULTS, Fault
from tests.campaigns.trial import Kind, Run, differences, write_shards


@dataclass(frozen=True)
class Result:
    """What one fault left."""

    fault: str
    seed: int
    where: str
    starts: int
    lost: list[str]
    """What differs from the undisturbed run."""


def campaign(names: Sequence[str], *, count: int, seed: int, work: Path, jobs: int) -> list[Result]:
    """Inject `count` faults, of the kinds `names` in turn."""
    shards = write_shards(work / "shards")
    references = {}
    for kind in {FAULTS[name].kind.ranks: FAULTS[name].kind for name in names}.values():
        references[kind.ranks] = _reference(shards, work / f"reference-{kind.ranks}", kind)
    todo = [(names[number % len(names)], seed + number) for number in range(count)]

    def one(item: tuple[str, int]) -> Result:
        name, number = item
        reference = references[FAULTS[name].kind.ranks]
        result = _try(name, FAULTS[name], number, reference, work / f"trial-{number}")
        print(
            f"{result.fault}, seed {number}: {result.where}; {result.starts} starts; lost: "
            f"{', '.join(result.lost) or 'nothing'}",
            flush=True,
        )
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, todo))


def _reference(shards: str, folder: Path, kind: Kind) -> Path:
    run = Run(shards, folder / "run", kind)
    run.finish(most=1)
    return folder / "run"


def _try(name: str, fault: Fault, seed: int, reference: Path, folder: Path) -> Result:
    rng = random.Random(f"{name} {seed}")
    run = Run(write_shards(folder / "shards"), folder / "run", fault.kind)
    where, lost = "", ["the run"]
    try:
        where = fault.inject(run, rng)
        run.finish()
        lost = differences(run.out, reference, rounding=fault.rounding)
    except Exception as error:  # told in the table, and the next fault is tried
        where += f" {type(error).__name__}: {error}"
    finally:
        for process in run.processes():
            process.kill()
        if os.path.ismount(run.out):
            subprocess.run(["umount", "-l", str(run.out)], check=False)
    if not lost:
        shutil.rmtree(folder, ignore_errors=True)
    return Result(name, seed, where, run.starts, lost)


def table(results: Sequence[Result]) -> str:
    """Markdown: how often each fault was injected, and what was lost."""
    lines = ["| fault | injected | starts | lost |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(result.fault for result in results):
        own = [result for result in results if result.fault == name]
        bad = [result for result in own if result.lost]
        lost = "nothing" if not bad else f"{len(bad)} times: {', '.join(bad[0].lost)}"
        starts = sum(result.starts for result in own) / len(own)
        lines.append(f"| {name} | {len(own)} | {starts:.1f} | {lost} |")
    return "\n".join(lines) + "\n"


def can_run(name: str) -> bool:
    """Whether this machine lets the fault be made."""
    return not FAULTS[name].needs_root or os.geteuid() == 0


def main() -> int:
    """Run the campaign; exit code 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/campaign"))
    arguments = parser.parse_args()
    names = [name for name in arguments.only if can_run(name)]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="cmae-campaign-") as work:
        results = campaign(
            names,
            count=arguments.faults,
            seed=arguments.seed,
            work=Path(work),
            jobs=arguments.jobs,
        )
        arguments.out.mkdir(parents=True, exist_ok=True)
        for result in results:
            if result.lost:
                kept = arguments.out / f"trial-{result.seed}"
                shutil.copytree(Path(work) / f"trial-{result.seed}", kept, dirs_exist_ok=True)
    text = table(results)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    lines = [json.dumps(asdict(result)) + "\n" for result in results]
    (arguments.out / "results.jsonl").write_text("".join(lines), encoding="utf-8")
    left_out = sorted(set(arguments.only) - set(names))
    print(
        text + (f"left out, as they need root: {', '.join(left_out)}\n" if left_out else ""), end=""
    )
    print(f"{len(results)} faults, {time.perf_counter() - start:.0f} s, wrote {arguments.out}")
    return 1 if any(result.lost for result in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
