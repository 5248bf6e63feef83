"""What is done to a run. Each fault knows what may be lost by it: nothing, unless it says so."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from support.remote_servers import serve

from tests.campaigns.trial import STEPS, Kind, Run

ONE, TWO = Kind(), Kind(ranks=2)

Inject = Callable[[Run, random.Random], str]
"""Starts the run, does something to it, and says where."""


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    inject: Inject
    kind: Kind = ONE
    needs_root: bool = False
    rounding: float = 0.0
    """Relative difference that losses may have after it."""


def _at_random(run: Run, rng: random.Random) -> str:
    """Wait for a random instant: of the start, of training, of a checkpoint, of the end."""
    run.start()
    moment = rng.choice(["start", "step", "checkpoint", "end"])
    if moment == "start":
        time.sleep(rng.uniform(0.0, 5.0))
    elif moment == "step":
        run.wait_for_steps(rng.randrange(1, STEPS))
        time.sleep(rng.uniform(0.0, 0.05))
    elif moment == "checkpoint":
        run.wait_for_steps(5 * rng.randrange(1, STEPS // 5))
        time.sleep(rng.uniform(0.0, 0.02))
    else:
        run.wait_for_steps(STEPS - 1)
        time.sleep(rng.uniform(0.0, 0.1))
    return moment


def _signal(number: int) -> Inject:
    def inject(run: Run, rng: random.Random) -> str:
        moment = _at_random(run, rng)
        for process in run.processes()[:1]:
            process.send_signal(number)
        return f"{moment}: exit code {run.wait()}"

    return inject


def _kill_a_rank(run: Run, rng: random.Random) -> str:
    moment = _at_random(run, rng)
    below = run.processes()[1:]
    if below:
        rng.choice(below).kill()
    return f"{moment}: exit code {run.wait()}"


def _pause(run: Run, rng: random.Random) -> str:
    moment = _at_random(run, rng)
    for process in rng.sample(below := run.processes(), k=min(1, len(below))):
        try:
            process.suspend()
            time.sleep(rng.uniform(0.5, 3.0))
            process.resume()
        except psutil.NoSuchProcess:
            pass
    return f"{moment}: exit code {run.wait()}"


def _killed_with_checkpoints(run: Run, rng: random.Random) -> None:
    run.start()
    run.wait_for_steps(rng.randrange(12, STEPS - 5))
    for process in run.processes():
        process.kill()
    run.wait()


def _torn_checkpoint(run: Run, rng: random.Random) -> str:
    _killed_with_checkpoints(run, rng)
    newest = run.checkpoints[-1]
    size = newest.stat().st_size
    kept = rng.choice([0, 1, 100, size // 3, size // 2, size - 300, size - 1])
    os.truncate(newest, kept)
    return f"{kept} of {size} bytes left"


def _flip(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"bit of byte {place} of {path.name}"


def _flipped_checkpoint(run: Run, rng: random.Random) -> str:
    _killed_with_checkpoints(run, rng)
    return _flip(run.checkpoints[-1], rng)


def _flipped_beside(run: Run, rng: random.Random) -> str:
    """In files that a run can do without; what it lost of the metrics is compared without them."""
    _killed_with_checkpoints(run, rng)
    names = ["config.yaml", "live/rank-0000.json", "checkpoints/.lock", "checkpoints/.holder"]
    path = run.out / rng.choice(names)
    if not path.exists() or not path.stat().st_size:
        path.write_bytes(rng.randbytes(40))
        return f"{path.name} made of noise"
    return _flip(path, rng)


def _torn_metrics(run: Run, rng: random.Random) -> str:
    """The last line, after the newest checkpoint: written again by the run."""
    run.start()
    run.wait_for_steps(5 * rng.randrange(2, STEPS // 5) + 3)
    for process in run.processes():
        process.kill()
    run.wait()
    path = run.out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    newest = int(run.checkpoints[-1].stem[-8:])
    if len(lines) <= newest:
        return "no line after the checkpoint"
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][: rng.randrange(len(lines[-1]))])
    return f"line {len(lines)} cut off"


def _foreign_checkpoint(run: Run, rng: random.Random) -> str:
    _killed_with_checkpoints(run, rng)
    (run.out / "checkpoints" / "step-00000999.pt").write_bytes(
        rng.randbytes(rng.randrange(1, 5000))
    )
    return "noise named as a newer checkpoint"


def _flipped_index(run: Run, rng: random.Random) -> str:
    """An index that is damaged while the run is down: refused by name, or made no use of; then made again."""
    _killed_with_checkpoints(run, rng)
    tar = rng.choice(sorted(Path(run.shards).parent.glob("*.tar")))
    index = tar.with_name(tar.name.replace(".tar", ".index.npz"))
    before = index.read_bytes()
    where = _flip(index, rng)
    run.start()
    code = run.wait()
    index.write_bytes(before)
    return f"{where}: exit code {code}"


def _few_files(run: Run, rng: random.Random) -> str:
    limit = rng.randrange(6, 24)
    run.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)))
    return f"{limit} file handles: exit code {run.wait()}"


def _little_memory(run: Run, rng: random.Random) -> str:
    """The system's killer takes the process."""
    run.start()
    run.wait_for_steps(rng.randrange(1, STEPS))
    for process in run.processes()[:1]:
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        process.send_signal(signal.SIGKILL)
    return f"exit code {run.wait()}"


def _full_disk(run: Run, rng: random.Random) -> str:
    """A small disk of its own, that is full at a random write and gets room later."""
    run.out.mkdir(parents=True, exist_ok=True)
    size = rng.randrange(200, 4000)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(run.out)]
    subprocess.run(mount, check=True)
    run.start()
    time.sleep(rng.uniform(6.0, 12.0))
    subprocess.run(["mount", "-o", "remount,size=64m", str(run.out)], check=True)
    return f"{size} KiB: exit code {run.wait()}"


def _bad_store(run: Run, rng: random.Random) -> str:
    """Shards behind a web server that fails in all ways it knows, while the run reads."""
    folder, shards = Path(run.shards).parent, run.shards
    faults = ["500", "503", "truncated", "reset", "too_short", "too_long"]
    with serve(folder) as server:
        for _ in range(rng.randrange(3, 12)):
            server.fail(".tar", rng.choice(faults), after=rng.randrange(20))
        run.shards = f"{server.url}/small-{{000000..000001}}.tar"
        run.start()
        code = run.wait()
        run.shards = shards
    return f"exit code {code}"


def _node_leaves(run: Run, rng: random.Random) -> str:
    """One of two nodes loses power, another comes later: the run goes on with one, then with two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "9"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "x"),
        *("--rdzv-conf", "last_call_timeout=3"),
    ]
    run.start(flags)
    first = run.process
    run.start(flags)
    leaves_at = rng.randrange(5, STEPS // 3)
    run.wait_for_steps(leaves_at)
    for process in run.processes():
        process.kill()
    run.process, lost = first, run.process
    assert lost is not None
    lost.wait()
    run.wait_for_steps(2 * STEPS // 3)
    run.start(flags)
    second, run.process = run.process, first
    assert second is not None
    code = run.wait()
    return f"after step {leaves_at}: exit codes {code}, {second.wait(timeout=60)}"


FAULTS = {
    "kill -9": Fault(_signal(signal.SIGKILL)),
    "kill -9 of a rank": Fault(_kill_a_rank, TWO),
    "kill -9 of the launcher": Fault(_signal(signal.SIGKILL), TWO),
    "SIGTERM": Fault(_signal(signal.SIGTERM)),
    "SIGTERM to the launcher": Fault(_signal(signal.SIGTERM), TWO),
    "SIGUSR1": Fault(_signal(signal.SIGUSR1)),
    "SIGINT": Fault(_signal(signal.SIGINT)),
    "SIGSTOP, SIGCONT": Fault(_pause),
    "SIGSTOP, SIGCONT of a rank": Fault(_pause, TWO),
    "torn checkpoint": Fault(_torn_checkpoint),
    "bit flip in a checkpoint": Fault(_flipped_checkpoint),
    "foreign checkpoint": Fault(_foreign_checkpoint),
    "bit flip beside": Fault(_flipped_beside),
    "torn metrics": Fault(_torn_metrics),
    "bit flip in an index": Fault(_flipped_index),
    "disk full": Fault(_full_disk, needs_root=True),
    "no file handles": Fault(_few_files),
    "out of memory": Fault(_little_memory),
    "store that fails": Fault(_bad_store),
    "node leaves, node comes": Fault(_node_leaves, TWO, rounding=0.02),
}
