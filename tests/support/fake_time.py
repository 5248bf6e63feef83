"""Time that passes only when a test says so, for code that measures: a busy machine changes nothing."""

from __future__ import annotations

import threading
import time


class FakeTime:
    """Stands in for the module `time`; only the thread that made it moves it."""

    def __init__(self) -> None:
        self.wall_s = 1000.0
        self.cpu_s = 0.0
        self._owner = threading.get_ident()

    def wait(self, seconds: float) -> None:
        """Let wall time pass."""
        if threading.get_ident() == self._owner:
            self.wall_s += seconds

    def compute(self, seconds: float) -> None:
        """Let wall time and CPU time pass."""
        if threading.get_ident() == self._owner:
            self.wall_s += seconds
            self.cpu_s += seconds

    def perf_counter(self) -> float:
        """Wall time."""
        return self.wall_s

    def monotonic(self) -> float:
        """Wall time."""
        return self.wall_s

    def thread_time(self) -> float:
        """CPU time of the thread that made it."""
        return self.cpu_s

    def time(self) -> float:
        """Unix time, the real one."""
        return time.time()
