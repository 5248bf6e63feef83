"""Which implementation an op runs on: its Triton kernel or its torch reference.

Triton is absent on some systems (macOS). There `jit` leaves kernels as they are, and only the references
can be called.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from cmae.errors import CmaeError

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None
    tl = None

__all__ = [
    "Backend",
    "check_backend",
    "jit",
    "on_device",
    "refuse_backward",
    "tl",
    "use_backend",
    "use_triton",
]

Backend = Literal["auto", "torch", "triton"]

# Triton decides when a kernel is decorated, so the variable must be set before this import.
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)
OLDEST_CAPABILITY = (8, 0)

# The interpreter keeps its place in one global object, and the loader's thread draws masks during a step.
_interpreter_lock = threading.RLock()
_log = logging.getLogger(__name__)
_default: Backend = "auto"


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` where there is Triton."""
    return lambda function: function if triton is None else triton.jit(function, **options)


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Let ops that are called with backend='auto' run on `backend`, in all threads of the process.

    Raises:
        ValueError: `backend` is unknown.
    """
    global _default
    check_backend("use_backend", backend)
    before, _default = _default, backend
    try:
        yield
    finally:
        _default = before


def check_backend(op: str, backend: Backend) -> None:
    """Refuse a backend that does not exist.

    Raises:
        ValueError: `backend` is not one of the three.
    """
    if backend not in ("auto", "torch", "triton"):
        raise CmaeError(
            f"{op}: backend={backend!r} is unknown; choose 'auto', 'torch' or 'triton'."
        )


def use_triton(op: str, backend: Backend, device: torch.device, *, unsupported: str | None) -> bool:
    """True for the kernel, False for the reference.

    'auto' takes the kernel for CUDA tensors it supports, and logs what it took, once.

    Args:
        op: Name for messages.
        backend: Choice of the caller; 'auto' becomes the default of `use_backend`.
        device: Device of the tensors.
        unsupported: Reason why the kernel cannot take these arguments; None if it can.

    Raises:
        ValueError: `backend` is unknown, or 'triton' where the kernel cannot run.
    """
    check_backend(op, backend)
    if backend == "auto":
        backend = _default
    if backend == "torch":
        return False
    problem = unsupported or _problem(device.type, device.index)
    if backend == "triton" and problem is not None:
        raise CmaeError(f"{op}: backend='triton' cannot run: {problem}")
    if backend == "auto":
        problem = "the tensors are on the CPU" if device.type == "cpu" else problem
        _log_choice(op, problem)
    return problem is None


# Outer functions for torch.compile, which calls them while it traces and keeps their answer; it would trace
# into a cached function.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _problem(device_type: str, index: int | None) -> str | None:
    """Why no kernel runs on a device; None if one does."""
    return _find_problem(device_type, index)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _log_choice(op: str, problem: str | None) -> None:
    _log_once(op, problem)


@functools.cache
def _find_problem(device_type: str, index: int | None) -> str | None:
    if triton is None:
        return "Triton is not installed; use backend='torch' (or 'auto')."
    if device_type == "cpu":
        if INTERPRETED:
            return None
        return (
            "the tensors are on the CPU, and TRITON_INTERPRET=1 was not set before cmae was imported; move "
            "them to a GPU, or use backend='torch' (or 'auto')."
        )
    if device_type != "cuda":
        return f"there are no kernels for {device_type!r} tensors; use backend='torch' (or 'auto')."
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY and not INTERPRETED:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]} and the kernels need 8.0; use "
            "backend='torch' (or 'auto')."
        )
    return None


@functools.cache
def _log_once(op: str, problem: str | None) -> None:
    if problem is None:
        _log.info("%s: backend 'auto' takes the Triton kernel", op)
    else:
        _log.info("%s: backend 'auto' takes the torch reference: %s", op, problem)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's GPU the current one: Triton launches there, wherever its arguments lie."""
    if INTERPRETED:
        return _interpreter_lock
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def refuse_backward(ctx: Any, *grads: Tensor) -> Any:
    """The backward of ops that have none: without it torch would leave out their share in silence."""
    raise RuntimeError(
        "this Triton kernel has no gradient (of images, or of a gradient); use backend='torch'."
    )
