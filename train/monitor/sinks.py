"""Output that training can do without: when it fails, it says so once and the run goes on."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


class Sink:
    """One place that output goes to, whose failures end nothing.

    What the system refuses, as a full disk does, is tried again with the next output; any other failure is
    that of a library, and its sink is given up.

    Args:
        name: Name for the warnings, such as 'TensorBoard'.
        warn: Function that takes a warning: one for all failures in a row.
        reopen: Called before the next output after a failure.
    """

    def __init__(
        self,
        name: str,
        warn: Callable[[str], None],
        *,
        reopen: Callable[[], object] = lambda: None,
    ) -> None:
        self.name = name
        self.is_open = True
        """Whether it is not given up."""
        self._has_failed = False
        self._warn, self._reopen = warn, reopen

    def run(self, action: Callable[[], object]) -> None:
        """Do something that writes there, whatever it may raise; do nothing once it is given up."""
        if not self.is_open:
            return
        # A plotting library or a service's client may raise anything: the run needs none of them.
        try:
            if self._has_failed:
                self._reopen()
            action()
            self._has_failed = False
        except OSError as error:
            if not self._has_failed:
                self._warn(
                    f"{self.name}: output failed ({error}) and is tried again; the run goes on"
                )
            self._has_failed = True
        except Exception as error:
            self.is_open = False
            what = f"{type(error).__name__}: {error}"
            self._warn(f"no more output to {self.name} ({what}); the run goes on without it")


class LastingStream(io.TextIOBase):
    """A terminal or pipe that may go away: what it no longer takes goes to a file, or else nowhere.

    A full disk under it is asked again with the next text.

    Args:
        stream: Terminal, pipe or file; None, as Python has it where it was closed before, takes nothing.
        fallback: File for what is printed after the stream is gone; None gives up what is printed.
    """

    def __init__(self, stream: IO[str] | None, fallback: Path | None = None) -> None:
        self._stream = stream
        self.fallback = fallback
        """File for what is printed after the stream is gone; a run sets it when it has a folder."""

    def write(self, text: str) -> int:
        """Write to the stream, or what stands in for it; never raises an OSError.

        What its encoding has no character for is spelled out.
        """
        text = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        if not self._try(lambda stream: stream.write(text)):
            self._append(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream while it is there."""
        self._try(lambda stream: stream.flush())

    def settle(self) -> None:
        """Flush for the last time, so that the interpreter's own flush finds nothing to fail on."""
        if not self._try(lambda stream: stream.flush()):
            self._leave()

    def isatty(self) -> bool:
        """Whether the stream is a terminal that is still there."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's file descriptor, for the terminal's size."""
        if self._stream is None:
            raise io.UnsupportedOperation("the stream is gone")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _try(self, action: Callable[[IO[str]], object]) -> bool:
        if self._stream is None:
            return False
        try:
            action(self._stream)
        # ValueError: it is closed already.
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) not in _PASSING:
                self._append(f"the terminal or pipe is gone ({error}); output goes on here\n")
                self._leave()
            return False
        return True

    def _leave(self) -> None:
        stream, self._stream = self._stream, None
        # What the stream still holds, and what libraries print, must have somewhere to go.
        with suppress(OSError, ValueError, AttributeError):
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, stream.fileno())  # type: ignore[union-attr]
            os.close(handle)

    def _append(self, text: str) -> None:
        if self.fallback is None:
            return
        try:
            with self.fallback.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            self.fallback = None


_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EINTR)
"""Reasons of a refusal that may be gone with the next text."""
