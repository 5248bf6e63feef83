"""Bad records: counted, written to a ledger, and tolerated up to a rate."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cmae.pipeline.errors import DataError

logger = logging.getLogger(__name__)

BEFORE_FIRST_EPOCH = -1
"""`BadSample.epoch` of a record that the index leaves out of every epoch."""


@dataclass(frozen=True)
class BadSample:
    """One line of the ledger."""

    shard: str
    key: str
    record_number: int
    """Number of the sample in its shard."""
    reason: str
    epoch: int


@dataclass(frozen=True)
class BadLimit:
    """How many bad records a run bears.

    Raises:
        ValueError: The fraction is not between 0 and 1.
    """

    max_fraction: float
    """Of the samples handed out."""
    probation: int = 1000
    """Samples before the fraction is looked at: one early failure is no rate."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_fraction} must be between 0 and 1")

    def is_exceeded(self, *, bad: int, samples: int) -> bool:
        """Whether to stop."""
        return samples >= self.probation and bad > self.max_fraction * samples

    def explain(self, *, bad: int, samples: int, ledger: Path | None) -> str:
        """Why the run stops, and what to do."""
        where = "No ledger is kept" if ledger is None else f"All are listed in {ledger}"
        return (
            f"{bad} of {samples} samples are bad, more than max_bad_fraction={self.max_fraction}. {where}. "
            "`cmae shards verify` looks at all shards and `cmae shards repair` writes clean ones; or raise "
            "the limit"
        )


class Health:
    """Counts the samples and bad records behind the batches handed out, so read-ahead does not show.

    Args:
        ledger: JSON lines file of all ranks; a bad record has one line for each epoch that met it, however
            often the run was interrupted and continued. None = count only.
        limit: Above it `add` raises. None = somebody else decides, from the counts of all ranks.
        rank: Of this process, for the ledger.
        first_epoch: Where the run begins or continues: older lines of the ledger are not looked at.
    """

    def __init__(
        self, *, ledger: Path | None, limit: BadLimit | None, rank: int = 0, first_epoch: int = 0
    ) -> None:
        self._ledger = ledger
        self._limit = limit
        self._rank = rank
        self._listed = set() if ledger is None else _listed_since(ledger, first_epoch)
        self._is_torn = ledger is not None and _lacks_last_newline(ledger)
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
            where = "no ledger is kept" if self._ledger is None else f"see {self._ledger}"
            logger.warning("bad sample replaced: %s; %s", _describe(bad[0]), where)
        self.bad_samples += len(bad)
        self._write(bad)
        counts = {"bad": self.bad_samples, "samples": self._samples}
        if self._limit is not None and self._limit.is_exceeded(**counts):
            message = self._limit.explain(**counts, ledger=self._ledger)
            raise DataError(f"{message}. The last one: {_describe(bad[-1])}")

    def note_left_out(self, bad: Sequence[BadSample]) -> None:
        """List records that the index leaves out: they are in no epoch, so they do not count."""
        if bad:
            where = "" if self._ledger is None else f"; {self._ledger} lists them"
            logger.warning("the index leaves out %d records, no usable JPEGs%s", len(bad), where)
            self._write(bad)

    def _write(self, bad: Sequence[BadSample]) -> None:
        if self._ledger is None:
            return
        new = [one for one in bad if _identity(one) not in self._listed]
        self._listed.update(map(_identity, new))
        lines = [json.dumps(asdict(one) | {"rank": self._rank}) for one in new]
        text = "\n" * self._is_torn + "".join(f"{line}\n" for line in lines)
        self._is_torn = False
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: ranks share the file, and their lines must not mix.
        handle = os.open(self._ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)


def read_ledger(path: Path) -> Iterator[BadSample]:
    """Records of a ledger in the order in which they were met, without the ranks.

    A line that a killed run left unfinished is passed over. Older ledgers call `record_number` position.
    """
    with path.open(encoding="utf-8") as file:
        for line in filter(str.strip, file):
            try:
                values = json.loads(line)
                del values["rank"]
                if "position" in values:
                    values["record_number"] = values.pop("position")
                yield BadSample(**values)
            except (json.JSONDecodeError, KeyError, TypeError):
                logger.warning("%s: passed over a line that is no record: %.60s", path, line)


Identity = tuple[str, int, int]


def _identity(one: BadSample) -> Identity:
    return one.shard, one.record_number, one.epoch


def _listed_since(ledger: Path, epoch: int) -> set[Identity]:
    """Records that need no further line: a run that continues meets some of them again."""
    if not ledger.exists():
        return set()
    return {
        _identity(one)
        for one in read_ledger(ledger)
        if one.epoch >= epoch or one.epoch == BEFORE_FIRST_EPOCH
    }


def _lacks_last_newline(ledger: Path) -> bool:
    """Whether a run was killed inside a line: the next one must not be glued to it."""
    return ledger.exists() and ledger.read_bytes()[-1:] not in (b"", b"\n")


def _describe(bad: BadSample) -> str:
    return f"{bad.reason} in {bad.shard}, key {bad.key!r}, record {bad.record_number}"
