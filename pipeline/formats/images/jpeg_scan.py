"""Has a block of a JPEG's compressed pixels been lost? Two signs that do not depend on each other.

A lost block of a disk or a network reads as zeros, and decoders draw grey for them without an error. But a
blank image may hold as many zeros, and files carry zeros in front of and behind their pixels. So a run of
zeros inside a scan is a suspicion. The second sign is the Huffman code itself: a whole scan ends exactly
where its last block does; after a lost block the code falls out of step, and does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cmae.pipeline.formats.images.jpeg import find_frame, iter_segments, scan_end

ZERO_BLOCK_BYTES = 4096
"""The page of memory, and the block of most file systems."""

MAX_WALK_BYTES = 8 << 20
"""Longer scans are not followed code by code (about a second for each MiB)."""

_SOF0, _SOF1, _DHT, _SOS, _DRI = 0xC0, 0xC1, 0xC4, 0xDA, 0xDD
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")


class ZeroBlock(NamedTuple):
    """A run of zeros in the compressed pixels."""

    start: int
    """Byte of the file at which it begins."""
    fault: str
    """What the code that follows shows; '' where it shows no damage, or cannot be followed."""

    def __str__(self) -> str:
        zeros = f"{ZERO_BLOCK_BYTES} zero bytes from byte {self.start} on"
        if self.fault:
            return f"{zeros}, and {self.fault}: a block was lost or overwritten"
        return f"{zeros}, which a blank image may hold: nothing else shows that a block was lost"


class _Scan(NamedTuple):
    """One scan: its compressed bytes, and the Huffman tables of the blocks of one MCU."""

    start: int
    end: int
    tables: Sequence[tuple[Sequence[int], Sequence[int]]]
    num_mcus: int
    restart_interval: int


class _UnreadableError(ValueError):
    """A header that this module does not follow."""


def find_zero_block(data: bytes) -> ZeroBlock | None:
    """The first run of ZERO_BLOCK_BYTES zeros in a scan, judged; None without one.

    What lies in front of the scans or behind the end of the image does not count. The file must have passed
    `inspect_jpeg`.
    """
    zeros = bytes(ZERO_BLOCK_BYTES)
    if zeros not in data:
        return None
    try:
        for segment in iter_segments(data, find_frame(data)[1]):
            if segment.marker == _SOS:
                end = scan_end(data, segment.end)
                start = data.find(zeros, segment.end, end)
                if start >= 0:
                    return ZeroBlock(start, _scan_fault(data))
    except (IndexError, ValueError):  # the file ends inside a segment
        return None
    return None


def _scan_fault(data: bytes) -> str:
    """How the scans of a sequential JPEG break off; '' where they do not, or are coded in another way."""
    try:
        for scan in _scans(data):
            if scan.end - scan.start > MAX_WALK_BYTES:
                return ""
            if fault := _walk(data, scan):
                return fault
    except (IndexError, ValueError):
        return ""
    return ""


def _scans(data: bytes) -> Iterator[_Scan]:
    """Scans of a sequential JPEG with its own Huffman tables.

    Raises:
        IndexError, ValueError: Another coding, or a broken header.
    """
    marker, frame, _ = find_frame(data)
    if marker not in (_SOF0, _SOF1):
        raise _UnreadableError
    height, width = data[frame + 5] << 8 | data[frame + 6], data[frame + 7] << 8 | data[frame + 8]
    layout = {
        data[at]: (data[at + 1] >> 4, data[at + 1] & 15)
        for at in range(frame + 10, frame + 10 + 3 * data[frame + 9], 3)
    }
    tables: dict[int, list[int]] = {}
    restart_interval = 0
    for one, position, end in iter_segments(data):
        if one == _DHT:
            tables |= _huffman_tables(data[position + 4 : end])
        elif one == _DRI:
            restart_interval = data[position + 4] << 8 | data[position + 5]
        elif one == _SOS:
            count = data[position + 4]
            chosen = [
                (data[at], data[at + 1]) for at in range(position + 5, position + 5 + 2 * count, 2)
            ]
            blocks = _blocks_of_mcu(chosen, layout)
            try:
                used = [(tables[ids >> 4], tables[16 + (ids & 15)]) for ids in blocks]
                num_mcus = _num_mcus(height, width, [name for name, _ in chosen], layout)
            except (KeyError, ZeroDivisionError):
                raise _UnreadableError from None
            yield _Scan(end, scan_end(data, end), used, num_mcus, restart_interval)


def _blocks_of_mcu(
    chosen: Sequence[tuple[int, int]], layout: dict[int, tuple[int, int]]
) -> list[int]:
    """Numbers of the two tables of each block of an MCU; that of one component is a single block."""
    if len(chosen) == 1:
        return [chosen[0][1]]
    if any(name not in layout for name, _ in chosen):
        raise _UnreadableError
    return [ids for name, ids in chosen for _ in range(layout[name][0] * layout[name][1])]


def _num_mcus(
    height: int, width: int, names: Sequence[int], layout: dict[int, tuple[int, int]]
) -> int:
    most_x = max(x for x, _ in layout.values())
    most_y = max(y for _, y in layout.values())
    if len(names) > 1:
        return -(-width // (8 * most_x)) * -(-height // (8 * most_y))
    x, y = layout[names[0]]
    columns, rows = -(-width * x // most_x), -(-height * y // most_y)
    return -(-columns // 8) * -(-rows // 8)


def _huffman_tables(segment: bytes) -> dict[int, list[int]]:
    """Tables by number (AC from 16 on): what the next 16 bits mean, as length << 8 | value; 0 = no code."""
    tables: dict[int, list[int]] = {}
    while segment:
        number, counts = segment[0], segment[1:17]
        values = segment[17 : 17 + sum(counts)]
        table: list[int] = []
        at = 0
        for length, count in enumerate(counts, start=1):
            for value in values[at : at + count]:
                table += [length << 8 | value] * (1 << (16 - length))
            at += count
        if len(table) > 1 << 16 or len(counts) < 16:
            raise _UnreadableError
        tables[number] = table + [0] * ((1 << 16) - len(table))
        segment = segment[17 + len(values) :]
    return tables


def _walk(data: bytes, scan: _Scan) -> str:
    """Follow the code of one scan; return where it breaks off, '' if it ends where it must."""
    parts = _RESTART.split(data[scan.start : scan.end])
    per_part = scan.restart_interval or scan.num_mcus
    if len(parts) != -(-scan.num_mcus // per_part):
        return f"{len(parts)} restart intervals stand where {-(-scan.num_mcus // per_part)} must be"
    left = scan.num_mcus
    for part in parts:
        if fault := _walk_codes(part.replace(b"\xff\0", b"\xff"), scan, min(left, per_part)):
            return fault
        left -= per_part
    return ""


def _walk_codes(codes: bytes, scan: _Scan, num_mcus: int) -> str:
    num_bits, bit = 8 * len(codes), 0
    codes += bytes(8)
    for _ in range(num_mcus):
        for dc, ac in scan.tables:
            found = dc[int.from_bytes(codes[bit >> 3 : (bit >> 3) + 3]) >> (8 - (bit & 7)) & 0xFFFF]
            if not found or found & 0xFF > 11:
                return "no code of the image fits what follows"
            bit += (found >> 8) + (found & 0xFF)
            place = 1
            while place < 64:
                at = bit >> 3
                found = ac[int.from_bytes(codes[at : at + 3]) >> (8 - (bit & 7)) & 0xFFFF]
                if not found:
                    return "no code of the image fits what follows"
                size = found & 15
                bit += (found >> 8) + size
                if size == 0 and found & 0xF0 != 0xF0:  # end of block
                    break
                place += (found >> 4 & 15) + 1
            if place > 64:
                return "a block of pixels has more than 64 coefficients"
            if bit > num_bits:
                return "the pixels end before the image is full"
    # Encoders may pad with zeros, and fill before a marker.
    if codes[-(-bit // 8) : -8].strip(b"\0\xff"):
        return "data is left when the image is full"
    return ""
