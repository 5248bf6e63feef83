"""What a trace of the CUDA stub proves: which work comes before which, and where a copy or the host waits."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

Clock = dict[str, int]
"""For each stream, how many of its operations have certainly passed."""
HOST_TO_DEVICE = "1"


@dataclass
class Work:
    """One operation on a stream."""

    kind: str
    stream: str
    number: int
    """Its place among the operations of its stream, from 1."""
    after: Clock
    """What has certainly passed before it begins."""
    marks: tuple[str, ...]
    """The program's marks before it: the last of each word."""


@dataclass
class Trace:
    """Everything in order."""

    work: list[Work] = field(default_factory=list)
    host_waits: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Calls in which the host waits, with the marks before them."""
    pageable: list[str] = field(default_factory=list)
    """Copies from memory of the host that is not pinned: they wait for the stream."""


def read_trace(path: Path) -> Trace:
    """Replay a trace with a clock for every stream and for the host.

    Work comes after: what is before it on its stream, events that the stream waits for, and all that the
    host had waited for when it queued the work.
    """
    trace = Trace()
    clocks: defaultdict[str, Clock] = defaultdict(dict)
    events: dict[str, Clock] = {}
    host: Clock = {}
    pinned: list[tuple[int, int]] = []
    marks: dict[str, str] = {}
    for line in path.read_text().splitlines():
        word, *rest = line.split()
        now = tuple(" ".join((name, value)) for name, value in marks.items())
        if word == "mark":
            marks[rest[0]] = " ".join(rest[1:])
        elif word == "pin":
            pinned.append((int(rest[0], 16), int(rest[1])))
        elif word == "record":
            events[rest[0]] = dict(clocks[rest[1]])
        elif word == "wait":
            _join(clocks[rest[0]], events.get(rest[1], {}))
        elif word == "host_waits":
            trace.host_waits.append((rest[0], now))
            _join(host, _waited_for(rest, clocks, events))
        elif word in ("launch", "set", "copy", "copy_and_wait"):
            stream = rest[-1] if word != "copy_and_wait" else "(nil)"
            _join(clocks[stream], host)
            before = dict(clocks[stream])
            clocks[stream][stream] = number = before.get(stream, 0) + 1
            trace.work.append(Work(word, stream, number, before, now))
            if word.startswith("copy") and rest[3] == HOST_TO_DEVICE:
                source = int(rest[1], 16)
                if not any(start <= source < start + size for start, size in pinned):
                    trace.pageable.append(f"{line} after {now}")
    return trace


def _waited_for(rest: list[str], clocks: dict[str, Clock], events: dict[str, Clock]) -> Clock:
    if rest[0] == "event":
        return events.get(rest[1], {})
    if rest[0] == "stream":
        return clocks[rest[1]]
    passed: Clock = {}
    for clock in clocks.values():
        _join(passed, clock)
    return passed


def _join(clock: Clock, other: Clock) -> None:
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)
