"""Bad records: counted, written to a ledger, and tolerated up to a rate."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)


class DataError(RuntimeError):
    """The data cannot be used: too many bad records, or a shard that cannot be read at all."""


@dataclass(frozen=True)
class BadSample:
    """One line of the ledger."""

    shard: str
    key: str
    position: int
    """Number of the sample in its shard."""
    reason: str
    epoch: int


class Health:
    """Counts the samples and bad records behind the batches handed out, so read-ahead does not show.

    Args:
        ledger: JSON lines file; every bad record appends one line. None = count only.
        max_bad_fraction: Above this fraction of the samples, `add` raises.
        probation: Samples before the fraction is looked at: one early failure is no rate.
    """

    def __init__(
        self, *, ledger: Path | None, max_bad_fraction: float, probation: int = 1000
    ) -> None:
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction} must be between 0 and 1")
        self._ledger = ledger
        self._max_bad_fraction = max_bad_fraction
        self._probation = probation
        self._samples = 0
        self.bad_samples = 0

    def add(self, num_samples: int, bad: Sequence[BadSample] = ()) -> None:
        """Note a batch, and write its bad records down.

        Raises:
            DataError: The fraction of bad records is above the limit, after the probation.
        """
        self._samples += num_samples
        if not bad:
            return
        if self.bad_samples == 0:
            logger.warning("bad sample replaced: %s. %s", _describe(bad[0]), self._where())
        self.bad_samples += len(bad)
        self._write(bad)
        limit = self._max_bad_fraction * self._samples
        if self._samples >= self._probation and self.bad_samples > limit:
            raise DataError(
                f"{self.bad_samples} of {self._samples} samples are bad, more than max_bad_fraction="
                f"{self._max_bad_fraction}; the last one: {_describe(bad[-1])}. {self._where()}. "
                "Repair the shards, or raise the limit"
            )

    def _write(self, bad: Sequence[BadSample]) -> None:
        if self._ledger is None:
            return
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(asdict(one)) + "\n" for one in bad)
        # One write in append mode: ranks share the file, and their lines must not mix.
        handle = os.open(self._ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, lines.encode())
        finally:
            os.close(handle)

    def _where(self) -> str:
        return "No ledger is kept" if self._ledger is None else f"All are listed in {self._ledger}"


def _describe(bad: BadSample) -> str:
    return f"{bad.reason} in {bad.shard}, key {bad.key!r}, position {bad.position}"
