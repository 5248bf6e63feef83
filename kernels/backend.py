"""Names of the implementations an op can run on."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "torch", "triton"]


def check_backend(op: str, backend: Backend) -> None:
    """Refuse a backend that this version does not have, instead of falling back in silence.

    Raises:
        ValueError: `backend` is neither 'auto' nor 'torch'.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(
            f"{op}: backend={backend!r} is not available; this version has 'torch' "
            "('auto' picks it). Pass backend='auto' or backend='torch'."
        )
