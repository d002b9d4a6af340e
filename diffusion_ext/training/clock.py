"""A clock that rings every so many minutes."""

from __future__ import annotations

import time


class Clock:
    """Args: minutes: between the rings; None: it never does."""

    def __init__(self, minutes: float | None):
        self.minutes, self._start = minutes, time.perf_counter()

    def rings(self) -> bool:
        """Whether the minutes are over; they then begin anew."""
        over = self.minutes is not None and time.perf_counter() - self._start > 60 * self.minutes
        if over:
            self._start = time.perf_counter()
        return over
