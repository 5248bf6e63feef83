"""Bad records: counted, written to a ledger, and tolerated up to a rate."""

from __future__ import annotations

import json
import logging
import os
import threading
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
    """Counts samples and bad records of one rank; safe to use from several threads.

    Args:
        ledger: JSON lines file; every bad record appends one line. None = count only.
        max_bad_fraction: Above this fraction of the samples read, `report` raises.
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
        self._lock = threading.Lock()
        self._samples = 0
        self.bad_samples = 0

    def count(self, num_samples: int) -> None:
        """Note samples that were read, good or bad."""
        with self._lock:
            self._samples += num_samples

    def report(self, bad: BadSample) -> None:
        """Write a bad record down.

        Raises:
            DataError: The fraction of bad records is above the limit, after the probation.
        """
        with self._lock:
            self.bad_samples += 1
            self._write(bad)
            samples, count = self._samples, self.bad_samples
        if samples >= self._probation and count > self._max_bad_fraction * samples:
            raise DataError(
                f"{count} of {samples} samples are bad, more than max_bad_fraction="
                f"{self._max_bad_fraction}; the last one: {bad.reason} in {bad.shard}, key {bad.key!r}. "
                f"{self._where()}. Repair the shards, or raise the limit"
            )

    def _write(self, bad: BadSample) -> None:
        if self.bad_samples == 1:
            logger.warning(
                "bad sample replaced: %s in %s, key %r. %s",
                bad.reason,
                bad.shard,
                bad.key,
                self._where(),
            )
        if self._ledger is None:
            return
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(bad)) + "\n"
        # One write in append mode: ranks share the file, and their lines must not mix.
        handle = os.open(self._ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def _where(self) -> str:
        return "No ledger is kept" if self._ledger is None else f"All are listed in {self._ledger}"
