"""What of a file lies in the kernel's page cache, and how to put it there or take it away, without root."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from cmae.pipeline.sources.records import Extent

# The kernel caches in pieces of up to this size, and drops whole ones only.
_LARGEST_FOLIO = 2 << 20
_MAX_PROBES = 400


def resident_fraction(extents: Sequence[Extent]) -> float | None:
    """Share of the extents whose middle page can be read without the disk; None where no one can tell.

    Looks at up to 400 of them. Reading with RWF_NOWAIT answers for a page that is not there with an error
    instead of waiting; network file systems do not have it. The kernel then begins to read the page, so ask
    once, and about files that nothing is going to time. mincore would leave no trace, but says nothing of
    files that belong to someone else.
    """
    chosen = extents[:: max(1, len(extents) // _MAX_PROBES)]
    found = []
    with _Files() as files:
        for extent in chosen:
            present = _is_resident(files, extent)
            if present is None:
                return None
            found.append(present)
    return sum(found) / len(found) if found else None


def evict(extents: Sequence[Extent]) -> None:
    """Ask the kernel to forget these bytes and their surroundings of up to 2 MB.

    What another process has mapped stays, and so does what has not been written to the disk yet.
    """
    with _Files() as files:
        for extent in extents:
            start = extent.byte_offset // _LARGEST_FOLIO * _LARGEST_FOLIO
            pieces = -(-(extent.byte_offset + extent.size - start) // _LARGEST_FOLIO)
            length = pieces * _LARGEST_FOLIO
            os.posix_fadvise(files.open(extent.path), start, length, os.POSIX_FADV_DONTNEED)


def touch(extents: Sequence[Extent]) -> None:
    """Read these bytes, so that they lie in the page cache."""
    with _Files() as files:
        for extent in extents:
            os.pread(files.open(extent.path), extent.size, extent.byte_offset)


class _Files(contextlib.ExitStack):
    """Descriptors that stay open while extents are worked through; one a file."""

    def __init__(self) -> None:
        super().__init__()
        self._descriptors: dict[str, int] = {}

    def open(self, path: str) -> int:
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY)
            self.callback(os.close, self._descriptors[path])
        return self._descriptors[path]


def _is_resident(files: _Files, extent: Extent) -> bool | None:
    middle = extent.byte_offset + extent.size // 2
    try:
        return os.preadv(files.open(extent.path), [bytearray(1)], middle, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:  # the file system does not know RWF_NOWAIT
        return None
