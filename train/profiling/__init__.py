"""Where the time of a training step goes: phases, breakdown, diagnosis, predictions and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmae.train.profiling.any_loader import profile_loader

__all__ = ["profile_loader"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cmae.train.profiling import any_loader

    return getattr(any_loader, name)
