"""Ledger lines for the entries of a shard that no sample holds."""

from __future__ import annotations

from cmae.pipeline.bad_samples import BEFORE_FIRST_EPOCH, BadSample
from cmae.pipeline.formats.members.member_counts import MemberCounts


def lost_members(shard: str, members: MemberCounts) -> list[BadSample]:
    """One line for each reason for which images and labels of a shard are in no sample.

    They are no records: their `record_number` is -1, -2, ...; and in no epoch: they do not count.
    """
    return [
        BadSample(shard, members.examples[fate], -1 - number, line, BEFORE_FIRST_EPOCH)
        for number, (fate, line) in enumerate(zip(members.lost, members.lost_lines(), strict=True))
    ]
