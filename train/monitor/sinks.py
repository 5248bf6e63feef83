"""Output that training can do without: when it fails, it says so once and the run goes on."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import IO


class Sink:
    """One place that output goes to, given up after its first failure.

    Args:
        name: Name for the warning, such as 'TensorBoard'.
        warn: Function that takes the one warning.
    """

    def __init__(self, name: str, warn: Callable[[str], None]) -> None:
        self.name = name
        self.is_open = True
        self._warn = warn

    def run(self, action: Callable[[], object]) -> None:
        """Do something that writes there, whatever it may raise; do nothing after a failure."""
        if not self.is_open:
            return
        # A plotting library or a service's client may raise anything: the run needs none of them.
        try:
            action()
        except Exception as error:
            self.is_open = False
            what = f"{type(error).__name__}: {error}"
            self._warn(f"no more output to {self.name} ({what}); the run goes on without it")


class LastingStream(io.TextIOBase):
    """A terminal or pipe that may go away: what it no longer takes goes to a file, or else nowhere.

    Args:
        stream: Terminal, pipe or file.
        fallback: File for what is printed after the stream is gone; None gives up what is printed.
    """

    def __init__(self, stream: IO[str], fallback: Path | None = None) -> None:
        self._stream: IO[str] | None = stream
        self._fallback = fallback

    def write(self, text: str) -> int:
        """Write to the stream, or what stands in for it; never raises an OSError."""
        if self._stream is not None:
            try:
                return self._stream.write(text)
            # A dead pipe, a closed terminal, a full disk, or a file that is closed already.
            except (OSError, ValueError) as error:
                self._leave(error)
        self._append(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream while it is there."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._leave(error)

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

    def _leave(self, error: BaseException) -> None:
        self._stream = None
        self._append(f"the terminal or pipe is gone ({error}); output goes on here\n")

    def _append(self, text: str) -> None:
        if self._fallback is None:
            return
        try:
            with self._fallback.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            self._fallback = None
