"""Output that training can do without: terminals and pipes that go away, and what stands in for them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cmae.train.monitor.sinks import LastingStream, Sink


def open_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    return reader, writer


def test_a_sink_is_given_up_after_its_first_failure_with_one_warning() -> None:
    warnings: list[str] = []
    calls: list[int] = []
    sink = Sink("pictures", warnings.append)

    def draw(number: int) -> None:
        calls.append(number)
        if number == 2:
            raise MemoryError("no room for the canvas")

    for number in range(1, 5):
        sink.run(lambda number=number: draw(number))
    assert calls == [1, 2]
    assert warnings == [
        "no more output to pictures (MemoryError: no room for the canvas); the run goes on without it"
    ]


def test_a_sink_does_not_swallow_a_wish_to_stop() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sink("pictures", print).run(interrupt)


def test_what_a_dead_pipe_does_not_take_goes_to_the_file(tmp_path: Path) -> None:
    reader, writer = open_pipe()
    fallback = tmp_path / "output.log"
    with os.fdopen(writer, "w", buffering=1) as pipe:
        stream = LastingStream(pipe, fallback)
        stream.write("before\n")
        assert os.read(reader, 100) == b"before\n"
        os.close(reader)
        for number in range(3):
            stream.write(f"line {number}\n")
            stream.flush()
        assert not stream.isatty()
        pipe.flush()  # nothing is left in it that could fail at the interpreter's end
    lines = fallback.read_text().splitlines()
    assert lines[0].startswith("the terminal or pipe is gone")
    assert lines[1:] == ["line 0", "line 1", "line 2"]


def test_a_pipe_that_died_unnoticed_is_settled_at_the_end(tmp_path: Path) -> None:
    reader, writer = open_pipe()
    with os.fdopen(writer, "w") as pipe:  # with a buffer, so that nothing has failed yet
        stream = LastingStream(pipe)
        stream.write("late\n")
        os.close(reader)
        stream.settle()
        pipe.flush()


def test_a_full_disk_is_asked_again(tmp_path: Path) -> None:
    class Full:
        encoding = "utf-8"
        lines: list[str] = []  # noqa: RUF012
        is_full = True

        def write(self, text: str) -> int:
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.lines.append(text)
            return len(text)

    disk, fallback = Full(), tmp_path / "output.log"
    stream = LastingStream(disk, fallback)
    stream.write("one\n")
    disk.is_full = False
    stream.write("two\n")
    assert disk.lines == ["two\n"]
    assert fallback.read_text() == "one\n"


def test_no_stream_and_no_file_take_everything() -> None:
    stream = LastingStream(None, Path("/proc/no/such/folder"))
    assert stream.write("x") == 1
    stream.flush()
    stream.settle()
    assert stream.encoding == "utf-8"
