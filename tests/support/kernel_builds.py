"""Compile kernels for GPUs that are not there, exactly as their launchers would launch them."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

TYPES = {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}
# Bytes a block may take.
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}


# What a streaming multiprocessor holds: warps, blocks, bytes of shared memory (CUDA programming guide,
# table of compute capabilities). Registers are 65536 on all, handed to a warp 256 at a time.
MULTIPROCESSOR = {
    80: (64, 32, 164 * 1024),
    86: (48, 16, 100 * 1024),
    89: (48, 24, 100 * 1024),
    90: (64, 32, 228 * 1024),
    100: (64, 32, 228 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """What a launcher asked of one kernel."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Build:
    """A kernel in machine code, and what ptxas and the disassembler say about it."""

    name: str
    sass: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    capability: int

    @property
    def resident_warps(self) -> int:
        """Warps of this kernel that one multiprocessor runs at the same time."""
        most_warps, most_blocks, shared = MULTIPROCESSOR[self.capability]
        per_warp = -(-32 * self.registers // 256) * 256
        by_registers = 65536 // per_warp // self.num_warps
        by_shared = shared // (self.shared_bytes + 1024)  # one kilobyte a block is the driver's
        blocks = min(by_registers, by_shared, most_blocks, most_warps // self.num_warps)
        return int(blocks * self.num_warps)

    def count(self, pattern: str) -> int:
        """How many machine instructions match."""
        return len(re.findall(pattern, self.sass))


def record_launches(
    monkeypatch: pytest.MonkeyPatch, module: Any, run: Callable[[], object]
) -> list[Launch]:
    """The launches that `run` would make; no kernel of `module` runs, so outputs are not written."""
    launches: list[Launch] = []

    class RunLog:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(size > 0 for size in grid)
            return lambda *args, **options: launches.append(Launch(self.kernel, args, options))

    with monkeypatch.context() as patch:
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel"):
                patch.setattr(module, name, RunLog(value))
        run()
    return launches


def check_binding(launch: Launch, capability: int) -> None:
    """Bind the arguments by the function that Triton writes for the kernel, as a launch on a GPU does.

    That function has local names of its own: a parameter called like one of them is lost.
    """
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*launch.args, **launch.options)
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, launch.args, strict=False)) | launch.options
    assert list(bound) == names
    assert all(bound[name] is given[name] for name in names), kernel.__name__
    assert len(specialisation) == len(names)


def build(launch: Launch, capability: int) -> Build:
    """Compile a launch for a compute capability such as 90, with the specialisation Triton would choose."""
    check_binding(launch, capability)
    names = [parameter.name for parameter in launch.kernel.params]
    options = {key: value for key, value in launch.options.items() if key not in names}
    values = dict(zip(names, launch.args, strict=False)) | launch.options
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        kind, divisible = _specialise(value, parameter)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _report("-res-usage", compiled.asm["cubin"])
    return Build(
        name=launch.kernel.__name__,
        sass=_report("-sass", compiled.asm["cubin"]),
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        spilled_bytes=sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        capability=capability,
    )


def _specialise(value: Any, parameter: Any) -> tuple[str, bool]:
    if parameter.is_constexpr or value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    assert type(value) is int
    if value == 1 and not parameter.do_not_specialize:
        return "constexpr", False
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    return kind, value % 16 == 0 and not parameter.do_not_specialize


@cache
def _report(option: str, cubin: bytes) -> str:
    tool = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(f"/tmp/{abs(hash(cubin))}.cubin")
    path.write_bytes(cubin)
    try:
        done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    finally:
        path.unlink()
    return done.stdout
