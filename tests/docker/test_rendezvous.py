"""The manifest's own pods, started for real: each a network namespace with the names, environment and command
that docker/kubernetes/base says, on the entrypoint of the image."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.manifests import ROOT, container_of, job_of
from support.tiny_runs import arguments

NETWORK = "10.77.31."
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


def _can_make_networks() -> bool:
    if os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", "cmae-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "cmae-probe"], capture_output=True, check=False)
    return made.returncode == 0


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def _pods(names: list[str], subdomain: str) -> Iterator[list[str]]:
    """A network namespace for each pod on one bridge; names resolve as the headless service makes them."""
    with ExitStack() as stack:
        bridge = "br-cmae"
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("link", "set", bridge, "up")
        addresses = {name: f"{NETWORK}{10 + number}" for number, name in enumerate(names)}
        hosts = "127.0.0.1 localhost\n" + "".join(
            f"{address} {name}.{subdomain} {name}\n" for name, address in addresses.items()
        )
        for number, name in enumerate(names):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            outer = f"cmae-v{number}"
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outer, "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{addresses[name]}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)
            stack.callback(folder.rmdir)
            stack.callback((folder / "hosts").unlink)
        yield names


def _start(number: int, name: str, out: Path, words: list[str]) -> subprocess.Popen[str]:
    """A pod: its hostname, the manifest's environment and arguments, and the overrides of a small run."""
    environment = {
        one["name"]: one["value"] for one in container_of("base")["env"] if "value" in one
    }
    environment |= {
        "NODE_RANK": str(number),  # what the fieldRef of the completion index gives
        "NPROC_PER_NODE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
        "HOME": str(out),
    }
    command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c"]
    command += ['hostname "$0" && exec "$@"', name, str(ENTRYPOINT)]
    command += [*container_of("base")["args"], *words]
    log = (out / f"{name}.log").open("w")
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.skipif(not _can_make_networks(), reason="needs root and network namespaces (iproute2)")
def test_the_pods_of_the_manifest_meet_train_and_stop_together(
    small_shards: str, tmp_path: Path
) -> None:
    spec = job_of("base")["spec"]
    names = [f"{job_of('base')['metadata']['name']}-{n}" for n in range(spec["completions"])]
    run = tmp_path / "run"
    words = arguments(
        small_shards, run, **{"optim.total_steps": 1_000_000, "run.checkpoint_every": 1_000_000}
    )
    with _pods(names, spec["template"]["spec"]["subdomain"]):
        pods = [_start(number, name, tmp_path, words) for number, name in enumerate(names)]
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not (metrics.is_file() and metrics.stat().st_size):
            assert all(pod.poll() is None for pod in pods), _logs(tmp_path)
            time.sleep(0.2)
        # The kubelet stops one pod, as in a preemption: the manifest's policy must see 75 from all.
        pods[2].send_signal(signal.SIGTERM)
        codes = [pod.wait(timeout=120) for pod in pods]
    assert codes == [75] * 4, _logs(tmp_path)
    assert "on 4 x cpu" in _logs(tmp_path)
    (checkpoint,) = (run / "checkpoints").glob("step-*.pt")
    assert checkpoint.stat().st_size > 0


def _logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("cmae-*.log")))
