"""Where the time of a training step goes: phases, a closed account, a verdict, predictions and reports."""

from cmae.train.profiling.any_loader import profile_loader

__all__ = ["profile_loader"]
