"""The batches of a step, fetched together: every rank has its own and goes on, or all stop at one step."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmae.pipeline import Batch, DataError, Loader, LoaderState
from cmae.pipeline.bad_samples import BadLimit
from cmae.train.distributed import Gathering, World, gather_values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fetched:
    """Batches of a step that nobody has been given yet, and what the other ranks say about theirs."""

    batches: list[Batch]
    error: str
    state: LoaderState
    others: Gathering


class StepBatches:
    """Fetches the batches of a step, and counts good and bad samples over all ranks.

    One collective a step carries three numbers of every rank: the signal it got, its bad samples, and
    whether it could fetch its batches. A rank that decided alone would leave the others waiting for it.
    `fetch_ahead` starts it while the device works on the step before.

    Args:
        loader: Loader of this rank; it must leave the limit on bad samples to others (`limit_bad=False`).
        world: This process among all.
        limit: Limit on the bad samples of all ranks.
        ledger: File that lists them, for the message.
        global_batch_size: Samples in a step.
        stop_signal: Returns the signal that asked this rank to stop, 0 for none.
        deadline_s: Longest time to wait for a step's batches where other ranks wait meanwhile; each batch may
            come in time, and all of them too late for the collective.
        counts: Counts in the checkpoint that the run continues; see `state_dict`.
        doing: Function that is told what this rank does now.
    """

    def __init__(
        self,
        loader: Loader,
        world: World,
        *,
        limit: BadLimit,
        ledger: Path,
        global_batch_size: int,
        stop_signal: Callable[[], int],
        deadline_s: float = math.inf,
        counts: dict[str, int] | None = None,
        doing: Callable[[str], object] = str,
    ) -> None:
        self._loader = loader
        self._world = world
        self._limit = limit
        self._ledger = ledger
        self._global_batch_size = global_batch_size
        self._stop_signal = stop_signal
        self._doing = doing
        self._deadline_s = deadline_s if world.world_size > 1 else math.inf
        self._bad_before = counts["bad"] if counts else 0
        self._state: LoaderState = loader.state
        self._ahead: _Fetched | None = None
        self.samples = counts["samples"] if counts else 0
        """Handed out since step 0, on all ranks."""
        self.bad_samples = self._bad_before
        """Of them, replaced because they were bad."""
        self.signal = 0
        """What stopped the run, on whatever rank it arrived."""
        self.failure: str | None = None
        """Why the data cannot be used any more; the same text on every rank."""

    def fetch_ahead(self, count: int) -> None:
        """Fetch the batches of the next step and ask the other ranks about theirs; nothing is given out."""
        if self._ahead is None:
            self._doing("reading data")
            batches, error = self._fetch(count)
            self._doing("in the step")
            own = (self._stop_signal(), self._loader.bad_samples, int(error != ""))
            self._ahead = _Fetched(batches, error, self._loader.state, Gathering(own, self._world))

    def next_batches(self, count: int) -> list[Batch] | None:
        """This rank's batches of one step, or None when all ranks have to stop here. A collective."""
        self.fetch_ahead(count)
        assert self._ahead is not None
        fetched, self._ahead = self._ahead, None
        self._doing("waiting for the data of other ranks")
        signals, bad, failed = zip(*fetched.others.wait(), strict=True)
        self._doing("in the step")
        # Where there is nobody to agree with, a signal is heard that came after the asking.
        self.signal = max(signals) if self._world.world_size > 1 else self._stop_signal()
        counts = {
            "bad": self._bad_before + sum(bad),
            "samples": self.samples + self._global_batch_size,
        }
        if any(failed):
            self.failure = self._explain(fetched.error)
        elif self._limit.is_exceeded(**counts):
            self.failure = self._limit.explain(**counts, ledger=self._ledger)
        if self.signal or self.failure:
            return None  # as if nothing had been fetched: the checkpoint is that of the step before
        self.bad_samples, self.samples = counts["bad"], counts["samples"]
        self._state = fetched.state
        return fetched.batches

    def state_dict(self) -> dict[str, Any]:
        """Place in the data and counts after the last batches given out: two entries of a checkpoint."""
        counts = {"samples": self.samples, "bad": self.bad_samples}
        return {"loader": self._state.to_dict(), "data_health": counts}

    def _fetch(self, count: int) -> tuple[list[Batch], str]:
        try:
            return self._fetch_in_time(count), ""
        except (DataError, OSError) as error:
            return [], str(error)
        except Exception as error:  # unforeseen: the others must not wait for this rank in vain
            logger.exception("the data path of rank %d failed", self._world.rank)
            return [], f"{type(error).__name__}: {error}"

    def _fetch_in_time(self, count: int) -> list[Batch]:
        """The batches of a step.

        Raises:
            DataError: They come too slowly for the ranks that wait.
        """
        begun, batches = time.monotonic(), [next(self._loader)]
        while len(batches) < count:
            waited_s = time.monotonic() - begun
            if waited_s > self._deadline_s:
                raise DataError(
                    f"{len(batches)} of the {count} micro-batches of a step took {waited_s:.1f} s, more than "
                    f"data.remote_deadline_s={self._deadline_s:g}: the storage is too slow for so large a "
                    "share of optim.global_batch_size. Copy the shards to a local disk (data.cache_dir), "
                    "raise data.num_readers, or look with `cmae profile`"
                )
            batches.append(next(self._loader))
        return batches

    def _explain(self, error: str) -> str:
        errors = gather_values(error, self._world)
        return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(errors) if text)
