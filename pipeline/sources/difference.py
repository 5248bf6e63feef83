"""How the shards of a run differ from those of a checkpoint."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

from cmae.printable import printable

_MOST_LINES = 10


class ShardFacts(NamedTuple):
    """What a checkpoint keeps of a shard."""

    name: str
    """File name, or a URL's path without what may be secret."""
    num_samples: int
    """-1 in a stream, which does not know."""
    digest: str
    """Of the tar's size and ends; '' in a stream."""


def describe_difference(before: Sequence[Sequence[object]], now: Sequence[ShardFacts]) -> str:
    """Lines that name shards which came, went, changed or stand elsewhere in the order; '' if none does.

    Args:
        before: `ShardFacts` as a checkpoint holds them: lists.
        now: Shards that are given now.
    """
    then = [ShardFacts(str(one[0]), int(str(one[1])), str(one[2])) for one in before]
    old, new = {one.name: one for one in then}, {one.name: one for one in now}
    lines = [f"missing now: {_told(one)}" for name, one in old.items() if name not in new]
    lines += [f"not there before: {_told(one)}" for name, one in new.items() if name not in old]
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            lines.append(f"changed: {_told(old[name])} before, {_told(new[name])} now")
    if not lines and [one.name for one in then] != [one.name for one in now]:
        place = next(i for i, pair in enumerate(zip(then, now, strict=False)) if pair[0] != pair[1])
        lines.append(
            f"in another order: shard {place} was {_told(then[place])} and is {_told(now[place])}"
        )
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n  ".join([*lines[:_MOST_LINES], *more])


def file_name(shard: str) -> str:
    """Last part of a path or URL, without a query; a command is named by its kind alone."""
    return "pipe:" if shard.startswith("pipe:") else posixpath.basename(urlsplit(shard).path)


def _told(shard: ShardFacts) -> str:
    size = "" if shard.num_samples < 0 else f" ({shard.num_samples} samples)"
    return printable(shard.name) + size
