"""Class numbers in members of a tar and in list files, read strictly."""

from __future__ import annotations

import json

from cmae.pipeline.formats.members.member_counts import LABEL_OUT_OF_RANGE, UNREADABLE_LABEL
from cmae.printable import printable

LABEL_EXTENSIONS = frozenset({"cls", "json"})

NO_LABEL = -1

MAX_LABEL = 2**63 - 1
"""Largest class number: an index keeps labels as int64."""

MAX_LABEL_BYTES = 16 << 20
"""Longer members are no label: they are not parsed."""

_MAX_DIGITS = 4000
"""Longer numbers are refused before Python converts them (it refuses 4300 itself)."""


def read_label(extension: str, data: bytes) -> int | str:
    """Class number in a `.cls` or `.json` member.

    Returns:
        The number; NO_LABEL where the member states none; the fate of the member (see `member_counts`) where
        it states something else.
    """
    if len(data) > MAX_LABEL_BYTES:
        return UNREADABLE_LABEL
    return _json_label(data) if extension == "json" else parse_label(data)


def parse_label(text: bytes) -> int | str:
    """A class number in ASCII digits, or -1 for none; otherwise UNREADABLE_LABEL or LABEL_OUT_OF_RANGE."""
    text = text.strip()
    digits = text.removeprefix(b"-")
    if not digits.isdigit():  # of bytes: ASCII only, no sign, space or underscore
        return UNREADABLE_LABEL
    if len(digits) > _MAX_DIGITS:
        return LABEL_OUT_OF_RANGE
    return _in_range(int(text))


def label_text(data: bytes) -> str:
    """What a label says, for people: its beginning, control characters spelled out."""
    return printable(repr(data[:40])[1:])


def _json_label(data: bytes) -> int | str:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):  # of a number of more than 4300 digits, too
        return UNREADABLE_LABEL
    value = content.get("label") if isinstance(content, dict) else None
    if value is None:
        return NO_LABEL
    if isinstance(value, bool) or not isinstance(value, int):
        return UNREADABLE_LABEL
    return _in_range(value)


def _in_range(number: int) -> int | str:
    return number if NO_LABEL <= number <= MAX_LABEL else LABEL_OUT_OF_RANGE
