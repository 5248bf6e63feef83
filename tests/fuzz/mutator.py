"""Inputs that are nearly right: what a bad disk, a bad program or a bad person makes of good ones."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

MAX_BYTES = 1 << 16
"""Longest input; what grows with it is tested elsewhere, by ratios of times."""

WORDS = [
    *(
        b"",
        b"\0",
        b"\xff",
        b"\xff\xd8\xff",
        b"\xff\xd9",
        b"\xff\xda",
        b"-1",
        b"0",
        b"1e999",
        b"NaN",
    ),
    *(
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'"',
        b"\n",
        b"\r\n",
        b"\t",
        b"../",
        b"/",
        b"~",
        b"%",
        b"{0..9}",
    ),
    *(b"99999999999999999999", b"18446744073709551615", b"\x1b[31m", b"[/red]", "ü\u202e".encode()),
    *(
        b"ustar\x0000",
        b"GNU.sparse.major=1",
        b"path=",
        b"size=",
        b"pipe:true",
        b"&a [*a]",
        b"!!python/",
    ),
]
"""Pieces that mean something to some parser."""

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), "", "x", "a" * 300, "\x1b[2J", "[/x]", "é", "../..", [], {}),
    *([[]], [None], {"": None}, [1, "2"], "1", "-5", "2026-99-99"),
]
"""What may stand where a JSON document has something else."""


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """An input made from one seed, and parts of others.

    Args:
        data: Seed.
        others: All seeds of the parser.
        rng: Source of all choices.
    """
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        data = rng.choice(_WAYS)(data, others, rng)[:MAX_BYTES]
    return data


def _flip(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 3, 10))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_number(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), rng.getrandbits(8 * size)))
    start = rng.randrange(len(data) + 1)
    return (
        data[:start] + number.to_bytes(size, rng.choice(("big", "little"))) + data[start + size :]
    )


def _cut(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def _repeat(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:end] + data[start:end] * rng.choice((1, 2, 20)) + data[end:]


def _insert_word(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.choice(WORDS) + data[start + rng.choice((0, 0, 1, 4)) :]


def _splice(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _change_json(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return _flip(data, others, rng)
    return json.dumps(change_value(document, rng)).encode()


def change_value(document: Any, rng: random.Random) -> Any:
    """A document with one value replaced, dropped, doubled or nested deeply."""
    if isinstance(document, dict) and document and rng.random() < 0.9:
        key = rng.choice(list(document))
        match rng.randrange(5):
            case 0:
                return {name: value for name, value in document.items() if name != key}
            case 1:
                return document | {rng.choice(("", "x", key.upper())): document[key]}
            case _:
                return document | {key: change_value(document[key], rng)}
    if isinstance(document, list) and document and rng.random() < 0.8:
        place = rng.randrange(len(document))
        return [*document[:place], change_value(document[place], rng), *document[place + 1 :]]
    if rng.random() < 0.05:
        nested: Any = document
        for _ in range(rng.choice((10, 200))):
            nested = [nested]
        return nested
    return rng.choice(VALUES)


_WAYS: list[Callable[[bytes, Sequence[bytes], random.Random], bytes]] = [
    *(_flip, _set_number, _cut, _repeat, _insert_word, _splice, _change_json, _change_json),
]
