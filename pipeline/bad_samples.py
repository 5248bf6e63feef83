"""Bad records: counted, written to a ledger, and tolerated up to a rate."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO

from cmae.errors import CmaeError
from cmae.pipeline.errors import DataError
from cmae.printable import MAX_LINE, printable

logger = logging.getLogger(__name__)

LEDGER_FILE = "bad_samples.jsonl"
"""Name of the ledger in a run's folder."""

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


class NoGoodSamplesError(DataError):
    """No batch can be made any more; `bad` are the records that were met, which no batch brings along."""

    def __init__(self, message: str, bad: Sequence[BadSample]) -> None:
        super().__init__(message)
        self.bad = tuple(bad)


MAX_BAD_RUN = 100
"""Bad records or lost shards in a row, with no good one between them, after which none is looked for."""


@dataclass(frozen=True)
class BadLimit:
    """How many bad records a run bears.

    Raises:
        CmaeError: The fraction is not between 0 and 1.
    """

    max_fraction: float
    """Largest share of bad records among the samples handed out."""
    probation: int = 1000
    """Samples before the fraction is looked at: one early failure is no rate."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_fraction <= 1:
            raise CmaeError(f"max_bad_fraction={self.max_fraction} must be between 0 and 1")

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
        limit: Limit above which `add` raises. None = the caller decides, from the counts of all ranks.
        rank: Rank of this process, for the ledger.
        first_epoch: Epoch in which the run begins or continues: older lines of the ledger are not looked at.
    """

    def __init__(
        self, *, ledger: Path | None, limit: BadLimit | None, rank: int = 0, first_epoch: int = 0
    ) -> None:
        self._ledger = ledger
        self._shown = printable(str(ledger), limit=MAX_LINE)
        self._limit = limit
        self._rank = rank
        self._pending: list[bytes] = []
        self._is_refused = False
        try:
            self._listed = set() if ledger is None else _listed_since(ledger, first_epoch)
            self._is_torn = ledger is not None and _lacks_last_newline(ledger)
        except OSError as error:
            # Lines may come twice: better than a run that ends for its ledger.
            reason = printable(str(error), limit=MAX_LINE)
            logger.warning("%s cannot be read (%s); the run goes on", self._shown, reason)
            self._listed, self._is_torn = set(), False
        self._left_out: set[Identity] = set()
        self._samples = 0
        self.bad_samples = 0

    def add(self, num_samples: int, bad: Sequence[BadSample] = ()) -> None:
        """Note a batch, and write its bad records down.

        Raises:
            DataError: The fraction of bad records is above the limit, after the probation.
        """
        self._samples += num_samples
        self.note_left_out([one for one in bad if one.epoch == BEFORE_FIRST_EPOCH])
        bad = [one for one in bad if one.epoch != BEFORE_FIRST_EPOCH]
        if not bad:
            return
        if self.bad_samples == 0:
            where = "no ledger is kept" if self._ledger is None else f"see {self._shown}"
            logger.warning("bad sample replaced: %s; %s", describe_bad(bad[0]), where)
        self.bad_samples += len(bad)
        self._write(bad)
        counts = {"bad": self.bad_samples, "samples": self._samples}
        if self._limit is not None and self._limit.is_exceeded(**counts):
            message = self._limit.explain(**counts, ledger=self._ledger)
            raise DataError(f"{message}. The last one: {describe_bad(bad[-1])}")

    def note_left_out(self, bad: Sequence[BadSample]) -> None:
        """List what is left out of every epoch, once: it does not count."""
        new = [one for one in bad if _identity(one) not in self._left_out]
        self._left_out.update(map(_identity, new))
        if new:
            where = "" if self._ledger is None else f"; {self._shown} lists what is left out"
            logger.warning("left out of every epoch: %s%s", _summary(new), where)
            self._write(new)

    def _write(self, bad: Sequence[BadSample]) -> None:
        if self._ledger is None:
            return
        new = [one for one in bad if _identity(one) not in self._listed]
        self._listed.update(map(_identity, new))
        lines = [json.dumps(asdict(one) | {"rank": self._rank}) for one in new]
        self._pending += [f"{line}\n".encode() for line in lines]
        del self._pending[:-MAX_PENDING_LINES]
        try:
            self._append_pending(self._ledger)
        except OSError as error:
            if not self._is_refused:
                logger.warning(
                    "%s cannot be written (%s); its lines are kept and tried again",
                    self._shown,
                    printable(str(error), limit=MAX_LINE),
                )
            self._is_refused = True
        else:
            self._is_refused = False

    def _append_pending(self, ledger: Path) -> None:
        """Append the lines that are not in the ledger yet.

        Raises:
            OSError: Not all of them could be written.
        """
        ledger.parent.mkdir(parents=True, exist_ok=True)
        # One write in append mode: ranks share the file, and their lines must not mix.
        handle = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while self._pending:
                head = b"\n" * self._is_torn
                data = head + b"".join(self._pending)
                written = os.write(handle, data)
                # A disk that fills up takes a part, which may end inside a line.
                self._is_torn = data[:written][-1:] != b"\n"
                num_whole = data[len(head) : written].count(b"\n")
                del self._pending[:num_whole]
        finally:
            os.close(handle)


MAX_PENDING_LINES = 10_000
"""Lines that wait for a disk that refuses them; the oldest of more are lost."""

MAX_LINE_BYTES = 1 << 20
"""Longer lines of a ledger are damage: a line has a kilobyte or so."""


def read_ledger(path: Path) -> Iterator[BadSample]:
    """Records of a ledger in the order in which they were met, without the ranks.

    Lines that a kill or a power cut has damaged are passed over, and counted in one warning. Older ledgers
    call `record_number` position.
    """
    num_damaged, first = 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            record = _parse_line(line)
            if record is not None:
                yield record
            else:
                first = first or number
                num_damaged += 1
    if num_damaged:
        logger.warning(
            "%s: passed over %d line(s) that are no records, the first is line %d",
            printable(str(path), limit=MAX_LINE),
            num_damaged,
            first,
        )


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines of a file; of a longer one than MAX_LINE_BYTES the beginning."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)


def _parse_line(line: bytes) -> BadSample | None:
    """The record of a line; None where it holds none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    values.setdefault("record_number", values.get("position"))
    texts = [values.get(name) for name in ("shard", "key", "reason")]
    numbers = [values.get(name) for name in ("record_number", "epoch")]
    if not all(isinstance(one, str) for one in texts):
        return None
    if not all(isinstance(one, int) for one in numbers):
        return None
    return BadSample(**{one.name: values[one.name] for one in fields(BadSample)})


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
    if not ledger.exists():
        return False
    with ledger.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _summary(left_out: Sequence[BadSample]) -> str:
    """Records by number; what is in no record (`record_number` below 0) by reason and shard."""
    num_records = sum(one.record_number >= 0 for one in left_out)
    lines = [f"{one.reason} in {one.shard}" for one in left_out if one.record_number < 0]
    parts = [f"{num_records} records, no usable JPEGs"] if num_records else []
    parts += lines[:3] + ([f"{len(lines) - 3} more such lines"] if len(lines) > 3 else [])
    return printable("; ".join(parts), limit=MAX_LINE)


def describe_bad(bad: BadSample) -> str:
    """One line: reason, shard, key and number."""
    line = f"{bad.reason} in {bad.shard}, key {bad.key!r}, record {bad.record_number}"
    return printable(line, limit=MAX_LINE)
