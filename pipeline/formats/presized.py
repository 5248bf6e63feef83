"""The mark of images that were made smaller when the shards were written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

JFIF_BYTES = 20
"""Start-of-image and JFIF segments, with which every file that Pillow writes begins; the mark follows."""

_MARK = re.compile(
    rb"\xff\xfe..cmae presized (\d+x\d+ -> \d+x\d+, max_size \d+, quality \d+)", re.DOTALL
)


def downscale_mark(data: bytes) -> str:
    """What was done to this file: '640x600 -> 546x512, max_size 512, quality 95'; '' if nothing."""
    found = _MARK.match(data, JFIF_BYTES)
    return found[1].decode() if found else ""


def summarise_marks(marks: Iterable[str]) -> dict[str, int]:
    """Images by setting: {'max_size 512, quality 95': 42}; images without a mark are not counted."""
    settings = (mark.split(", ", 1)[1] for mark in marks if mark)
    return dict(sorted(Counter(settings).items()))


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts of several shards in one."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def downscaled_line(counts: dict[str, int], num_samples: int) -> str:
    """For people: '42 of 1000 images downscaled (max_size 512, quality 95)'; '' if there is none."""
    if not counts:
        return ""
    how = "; ".join(counts) if len(counts) == 1 else _each(counts)
    return f"{sum(counts.values())} of {num_samples} images downscaled ({how})"


def _each(counts: dict[str, int]) -> str:
    return "; ".join(f"{count} with {setting}" for setting, count in counts.items())
