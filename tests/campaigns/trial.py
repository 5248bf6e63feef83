"""One run that something is done to, and what of it differs in the end from a run that had peace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from support.shard_data import jpeg, write_tar
from support.tiny_runs import arguments

from cmae.model.export.stored import list_checkpoints, load_checkpoint
from cmae.pipeline.formats.dataset_index import build_indices

STEPS = 60
EXACT = ("step", "model", "optimizer", "scaler", "loader", "data_health")
"""What of the last checkpoint has to be equal, bit by bit."""
TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Kind:
    """How the run is started."""

    ranks: int = 1
    settings: Mapping[str, object] = field(default_factory=dict)


def write_shards(folder: Path) -> str:
    """Two shards of 20 images, indexed; returns their pattern."""
    folder.mkdir(parents=True)
    for number in range(2):
        members: dict[str, bytes] = {}
        for position in range(20):
            members[f"{position:03d}.jpg"] = jpeg(20 * number + position, (56, 48))
            members[f"{position:03d}.cls"] = b"1"
        write_tar(folder / f"small-{number:06d}.tar", members)
    build_indices([str(path) for path in sorted(folder.glob("*.tar"))])
    return str(folder / "small-*.tar")


class Run:
    """A run in a folder of its own, which is started as often as it takes."""

    def __init__(self, shards: str, out: Path, kind: Kind) -> None:
        self.shards, self.out, self.kind = shards, out, kind
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.out / "checkpoints")

    def start(self, launch: Sequence[str] = (), **limits: Any) -> None:
        """Start the command; its output is appended to `output.txt`.

        Args:
            launch: Flags of `cmae launch`, for one node of several.
            limits: Options of `Popen`.
        """
        settings = {
            "optim.total_steps": STEPS,
            "run.checkpoint_every": 5,
            "optim.epochs": 12,
            "speed.torch_threads": 1,
            "run.checkpoint_patience_min": 0.05,
            **self.kind.settings,
        }
        command = [sys.executable, "-m", "cmae.train"]
        if launch:
            command += ["launch", *launch]
        elif self.kind.ranks > 1:
            command += ["launch", "--standalone", "--nproc-per-node", str(self.kind.ranks)]
        command += ["pretrain", *arguments(self.shards, self.out, **settings)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}
        self.starts += 1
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with (self.out.parent / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, **limits
            )

    def processes(self) -> list[psutil.Process]:
        """The command's own process and all below it, ranks last."""
        assert self.process is not None
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait(self) -> int:
        """Its exit code; ranks that a killed launcher has left are ended too."""
        assert self.process is not None
        below = self.processes()
        code = self.process.wait(timeout=TIMEOUT_S)
        for one in below:
            if one.is_running() and one.pid != self.process.pid:
                one.kill()
        psutil.wait_procs(below, timeout=30)
        return code

    def finish(self, most: int = 4) -> None:
        """Start it until it ends well.

        Raises:
            AssertionError: It does not.
        """
        codes = []
        for _ in range(most):
            self.start()
            codes.append(self.wait())
            if codes[-1] == 0:
                return
        text = (self.out.parent / "output.txt").read_text(errors="replace")
        raise AssertionError(f"exit codes {codes}: {text[-1500:]}")

    def wait_for_steps(self, count: int) -> None:
        """Wait until so many steps are in the metrics, or the command has ended."""
        end = time.monotonic() + TIMEOUT_S
        path = self.out / "metrics.jsonl"
        assert self.process is not None
        while time.monotonic() < end and self.process.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") >= count:
                return
            time.sleep(0.005)


def differences(one: Path, other: Path, *, rounding: float = 0.0) -> list[str]:
    """What differs between the ends of two runs: entries of the last checkpoint, and lines of the metrics.

    Args:
        one: Folder of a run.
        other: Folder of the other.
        rounding: Relative difference that losses may have, where sums were taken in another order; weights
            and moments are not compared then.
    """
    ends = [load_checkpoint(list_checkpoints(out / "checkpoints")[-1]) for out in (one, other)]
    names = EXACT if not rounding else ("step", "loader", "data_health")
    found = [name for name in names if not _equal(ends[0][name], ends[1][name])]
    records = [_losses(out / "metrics.jsonl") for out in (one, other)]
    is_near = [step for step, _ in records[0]] == [step for step, _ in records[1]] and all(
        abs(a - b) <= rounding * abs(b)
        for (_, a), (_, b) in zip(records[0], records[1], strict=True)
    )
    if not is_near:
        steps = [[step for step, _ in record] for record in records]
        found.append(f"metrics: {len(steps[0])} and {len(steps[1])} records")
    return found


def _losses(path: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["total"]) for line in lines if "total" in line]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
