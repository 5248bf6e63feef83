"""`cmae doctor`: look at the machine and say what to fix, each check a function that returns one Check."""

from __future__ import annotations

import importlib.util
import io
import os
import platform
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from cmae.train.machine import cgroup_limit, driver_version
from cmae.train.monitor.console import PlainConsole

Status = Literal["ok", "warn", "fail"]

_GIB = 2**30

_MIN_DRIVER = {12: 525, 13: 580}
"""Oldest NVIDIA driver branch for each CUDA major version."""

_REINSTALL = "pip install --upgrade --force-reinstall {}"

_COLOURS: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


class Check(NamedTuple):
    """One row of the table; `fix` is empty when there is nothing to do."""

    name: str
    found: str
    status: Status
    fix: str = ""


QUICK = ("python", "torch", "CUDA", "memory", "/dev/shm", "disk", "caches")
"""Checks that take no more than the import of torch: what may change while a container runs."""


def doctor(*, quick: bool = False) -> int:
    """Check this machine: packages, GPU, memory, limits. Exit code 1 if something needed does not work.

    Args:
        quick: Only what may change while a container runs; nothing is decoded.
    """
    checks = collect_checks(QUICK if quick else None)
    table = Table(title="cmae doctor", title_justify="left")
    for column in ("check", "found", "status", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        colour = _COLOURS[check.status]
        table.add_row(check.name, check.found, Text(check.status, colour), check.fix)
    PlainConsole(highlight=True).print(table)
    failed = [check.name for check in checks if check.status == "fail"]
    warned = sum(check.status == "warn" for check in checks)
    counted = {0: "", 1: " with 1 warning"}.get(warned, f" with {warned} warnings")
    print(f"not ready: fix {', '.join(failed)}" if failed else f"ready{counted}")
    return 1 if failed else 0


def collect_checks(names: Collection[str] | None = None) -> list[Check]:
    """Run checks, all or those named; one that breaks becomes a failed row and does not stop the others."""
    single: dict[str, Callable[[], Check]] = {
        "python": check_python,
        "torch": check_torch,
        "CUDA": check_cuda,
        "torchvision": lambda: check_package("torchvision"),
        "timm": lambda: check_package("timm"),
        "triton": lambda: check_package("triton", needed=False),
        "webdataset": lambda: check_package("webdataset"),
        "numpy": lambda: check_package("numpy"),
        "DALI": check_dali,
        "nvJPEG": check_nvjpeg,
        "decoding on the GPU": check_gpu_decode,
        "apex": check_apex,
        "wandb": check_wandb,
        "CPU cores": check_cpu,
        "memory": check_memory,
        "/dev/shm": check_shared_memory,
        "open files": check_open_files,
        "disk": check_disk,
        "caches": check_caches,
        "OMP_NUM_THREADS": check_omp_threads,
    }
    checks: list[Check] = []
    for name, run in single.items():
        if names is not None and name not in names:
            continue
        try:
            checks.append(run())
            if name == "CUDA":
                checks += check_gpus()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            checks.append(Check(name, found, "fail", "this check itself failed: please report it"))
    return checks


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Python 3.11 or newer."""
    found = f"{'.'.join(map(str, version))} at {sys.executable}"
    if version < (3, 11):
        return Check("python", found, "fail", "make the environment with Python 3.11 or newer")
    return Check("python", found, "ok")


def check_package(name: str, *, needed: bool = True) -> Check:
    """Whether a package is there and can be imported."""
    missing: Status = "fail" if needed else "warn"
    if importlib.util.find_spec(name) is None:
        return Check(name, "not installed", missing, f"pip install {name}")
    try:
        importlib.import_module(name)
    except Exception as error:
        found = f"{metadata.version(name)}, but import fails: {_first_line(error)}"
        return Check(name, found, missing, _REINSTALL.format(name))
    return Check(name, metadata.version(name), "ok")


def check_torch() -> Check:
    """PyTorch and the CUDA version it was built for."""
    check = check_package("torch")
    if check.status != "ok":
        return check
    import torch

    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    return check._replace(found=f"{torch.__version__}, {build}")


def check_dali() -> Check:
    """DALI decodes one JPEG on the CPU."""
    name = "DALI"
    try:
        from nvidia import dali
        from nvidia.dali import fn
        from nvidia.dali.pipeline import Pipeline
    except Exception as error:
        found = f"cannot be imported: {_first_line(error)}"
        if platform.system() != "Linux":
            return Check(name, found, "fail", "DALI needs Linux: use WSL 2 or a container")
        return Check(name, found, "fail", "pip install nvidia-dali-cuda130")
    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(buffer, "JPEG")
    data = np.frombuffer(buffer.getvalue(), np.uint8)
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(lambda: [data]), device="cpu"))
    try:
        pipeline.build()
        shape = np.array(pipeline.run()[0].at(0)).shape
    except RuntimeError as error:
        found = f"{dali.__version__}, decoding fails: {_first_line(error)}"
        return Check(name, found, "fail", _REINSTALL.format("nvidia-dali-cuda130"))
    if shape != (24, 32, 3):
        return Check(name, f"{dali.__version__}, decoded {shape}", "fail", "please report it")
    return Check(name, f"{dali.__version__}, decodes on the CPU", "ok")


def check_nvjpeg() -> Check:
    """The nvJPEG that this process gets, which need not be the installed package."""
    from cmae.nvjpeg import NVJPEG, OLDEST_FOR_WINDOWS

    oldest = ".".join(map(str, OLDEST_FOR_WINDOWS))
    fix = f"pip install 'nvidia-nvjpeg>={oldest}' (only decoding on a GPU needs it)"
    if NVJPEG is None:
        return Check("nvJPEG", "absent", "warn", fix)
    is_new = NVJPEG.version[:2] >= OLDEST_FOR_WINDOWS
    found = f"{NVJPEG.name.split()[1]} at {NVJPEG.path}"
    return Check("nvJPEG", found, "ok" if is_new else "warn", "" if is_new else fix)


def check_gpu_decode() -> Check:
    """Windows of drawn JPEGs, decoded on the first GPU in a child process, are Pillow's."""
    import torch

    from cmae.pipeline.errors import DataError
    from cmae.pipeline.views.decode_check import choose_decode

    name = "decoding on the GPU"
    if not torch.cuda.is_available():
        return Check(name, "not tried: no GPU", "ok")
    try:
        choice = choose_decode(0)
    except DataError as error:
        return Check(name, _first_line(error), "fail", _REINSTALL.format("nvidia-dali-cuda130"))
    found, *passed_over = choice.describe().splitlines()
    return Check(name, found, "warn" if passed_over else "ok", "\n".join(passed_over))


def check_apex() -> Check:
    """NVIDIA's apex is needed for optim.impl=apex alone; PyPI has an unrelated package of that name.

    Nothing is imported: importing the wrong one may fail in surprising ways.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Check("apex", "absent (only optim.impl=apex needs it)", "ok")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        found = f"{_version_or_unknown('apex')}: not NVIDIA's, but another package of that name"
        return Check("apex", found, "warn", "pip uninstall apex (the one on PyPI is a web toolkit)")
    if importlib.util.find_spec("amp_C") is None:
        fix = "optim.impl=apex needs them: build it from source with its CUDA extensions"
        return Check("apex", "NVIDIA's, without fused kernels", "warn", fix)
    return Check("apex", "NVIDIA's, with fused kernels", "ok")


def check_wandb() -> Check:
    """Weights & Biases is optional."""
    if importlib.util.find_spec("wandb") is None:
        return Check("wandb", "absent (optional)", "ok")
    return Check("wandb", _version_or_unknown("wandb"), "ok")


def _version_or_unknown(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown version"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def check_cuda() -> Check:
    """Whether torch can use a GPU, and why not."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return explain_cuda(
        available=available,
        build=torch.version.cuda,
        driver=driver_version(),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        warning=str(caught[0].message).split("(")[0].strip() if caught else "",
    )


def explain_cuda(
    *, available: bool, build: str | None, driver: str | None, visible: str | None, warning: str
) -> Check:
    """Turn what torch, the driver and the environment say into one row.

    Args:
        available: Answer of torch.cuda.is_available().
        build: CUDA version that torch was built for; None for a CPU build.
        driver: Version of the driver; None if there is none.
        visible: Value of CUDA_VISIBLE_DEVICES.
        warning: Warning that torch gave while it looked.
    """
    cpu_only = "fine for demo and tests; "
    if available:
        return Check("CUDA", f"CUDA {build}, driver {driver or 'unknown'}", "ok")
    if build is None:
        fix = f"{cpu_only}for a GPU install a CUDA build of torch (pytorch.org)"
        return Check("CUDA", "torch is a CPU build", "warn", fix)
    if driver is None:
        fix = f"{cpu_only}for a GPU install its driver, or start the container with --gpus all"
        return Check("CUDA", "no NVIDIA driver", "warn", fix)
    if visible is not None and visible.strip() in ("", "-1"):
        fix = "unset CUDA_VISIBLE_DEVICES"
        return Check("CUDA", f"hidden by CUDA_VISIBLE_DEVICES={visible!r}", "warn", fix)
    needed = _MIN_DRIVER.get(int(build.split(".")[0]), 0)
    if int(driver.split(".")[0]) < needed:
        fix = f"update the driver to {needed} or newer, or install torch and DALI for an older CUDA"
        return Check("CUDA", f"driver {driver} is too old for CUDA {build}", "warn", fix)
    fix = (
        "a GPU is there but torch cannot use it: see nvidia-smi, and restart after a driver update"
    )
    return Check("CUDA", warning or f"driver {driver}, but not available", "warn", fix)


def check_gpus() -> list[Check]:
    """A row for each GPU that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    checks = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        capability = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        checks.append(describe_gpu(number, name, capability=capability, free=free, total=total))
    return checks


def describe_gpu(
    number: int, name: str, *, capability: tuple[int, int], free: int, total: int
) -> Check:
    """Row of one GPU; `free` and `total` are bytes of its memory."""
    memory = f"{free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
    found = f"{name}, compute {capability[0]}.{capability[1]}, {memory}"
    status: Status = "ok"
    fix = ""
    if capability < (8, 0):
        status, fix = "warn", "slow: kernels are made for compute 8.0 and newer; no bf16"
    elif free < 0.8 * total:
        status, fix = "warn", "another process uses this GPU: see nvidia-smi"
    return Check(f"GPU {number}", found, status, fix)


def check_cpu() -> Check:
    """Cores of the machine, and those this process may use."""
    import torch

    return describe_cpu(
        cores=os.cpu_count() or 1,
        allowed=len(os.sched_getaffinity(0)),
        quota=cgroup_limit(),
        num_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
    )


def describe_cpu(*, cores: int, allowed: int, quota: float | None, num_gpus: int) -> Check:
    """Row of the CPU: affinity and container quota may leave fewer cores than the machine has."""
    usable = min(float(allowed), quota or float(allowed))
    found = f"{usable:g} usable of {cores}"
    if quota is not None and quota < allowed:
        fix = "the container's quota holds it back: raise it (--cpus), or set OMP_NUM_THREADS to it"
        return Check("CPU cores", found, "warn", fix)
    if num_gpus and usable < 8 * num_gpus:
        fix = f"decoding may hold back {num_gpus} GPU(s): ask for 8 to 16 cores a GPU"
        return Check("CPU cores", found, "warn", fix)
    if allowed < cores:
        return Check("CPU cores", f"{found} (affinity)", "ok")
    return Check("CPU cores", found, "ok")


def check_memory(available: int | None = None) -> Check:
    """Free memory in bytes; 4 GiB do for small runs."""
    free = _available_memory() if available is None else available
    if free < 4 * _GIB:
        return Check("memory", f"{free / _GIB:.1f} GiB free", "warn", "close other programs")
    return Check("memory", f"{free / _GIB:.1f} GiB free", "ok")


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    return 1024 * int(facts["MemAvailable"].split()[0])


def check_shared_memory(path: str = "/dev/shm", *, size: int | None = None) -> Check:
    """NCCL passes data between the GPUs of a machine through /dev/shm; containers get only 64 MiB of it."""
    if not os.path.isdir(path):
        return Check("/dev/shm", "absent", "warn", "several GPUs need it: mount a tmpfs there")
    total = shutil.disk_usage(path).total if size is None else size
    if total < _GIB:
        fix = "several GPUs need more: start the container with --ipc=host or --shm-size=8g"
        return Check("/dev/shm", f"{total / 2**20:.0f} MiB", "warn", fix)
    return Check("/dev/shm", f"{total / _GIB:.1f} GiB", "ok")


def check_open_files(soft: int | None = None) -> Check:
    """Every open shard takes one of these."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if soft is None else soft
    if 0 <= limit < 4096:
        return Check(
            "open files", f"limit {limit}", "warn", "many shards need more: ulimit -n 65536"
        )
    return Check("open files", f"limit {limit}", "ok")


def check_disk(folder: str = ".", *, free: int | None = None) -> Check:
    """Room for checkpoints (2 GiB each for ViT-B) where the program is started."""
    left = shutil.disk_usage(folder).free if free is None else free
    found = f"{left / _GIB:.0f} GiB free in {os.path.abspath(folder)}"
    if left < 20 * _GIB:
        return Check("disk", found, "warn", "a ViT-B checkpoint takes 2 GiB: make room")
    return Check("disk", found, "ok")


_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")


def check_caches(environment: Mapping[str, str] = os.environ) -> Check:
    """Folders for compiled kernels can be written: torch asks for one when it is imported beside Triton."""
    named = {name: Path(environment[name]) for name in _CACHES if environment.get(name)}
    for name, folder in named.items() or {"HOME": Path.home()}.items():
        existing = next(one for one in (folder, *folder.parents) if one.exists())
        try:
            tempfile.TemporaryFile(dir=existing).close()
        except OSError:
            fix = f"make {folder} writable, or mount a volume there; imports of torch fail without"
            return Check("caches", f"{name}={folder} cannot be written", "fail", fix)
    found = ", ".join(str(folder) for folder in named.values()) or "in the home folder"
    return Check("caches", found, "ok")


def check_omp_threads(environment: dict[str, str] | None = None) -> Check:
    """Threads of the CPU maths: more than there are cores make each other slow."""
    value = (os.environ if environment is None else environment).get("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    if value is None:
        return Check("OMP_NUM_THREADS", "not set (torchrun sets it to 1)", "ok")
    if not value.isdigit() or int(value) > cores:
        fix = f"unset it, or set at most {cores} divided by the processes on this machine"
        return Check("OMP_NUM_THREADS", f"{value} for {cores} cores", "warn", fix)
    return Check("OMP_NUM_THREADS", value, "ok")
