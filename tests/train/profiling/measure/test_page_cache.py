"""What lies in the page cache can be seen and changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cmae.pipeline.sources.records import Extent
from cmae.train.profiling.measure.page_cache import evict, resident_fraction, touch


def test_pages_leave_the_cache_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    extents = [Extent(str(path), start, 1 << 16) for start in range(0, 1 << 20, 1 << 16)]
    if resident_fraction(extents) is None:
        pytest.skip("this file system does not say what is cached")
    touch(extents)
    assert resident_fraction(extents) == 1
    evict(extents)
    assert resident_fraction(extents) == 0
