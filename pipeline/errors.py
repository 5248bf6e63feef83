"""Errors of the data path that end a run."""

from __future__ import annotations

from cmae.errors import CmaeError


class DataError(CmaeError, RuntimeError):
    """The data cannot be used: too many bad records, or a shard that cannot be read at all."""


class RemoteError(DataError):
    """A remote shard could not be read in time, or not at all."""
