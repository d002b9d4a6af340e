"""Ctrl-C and SIGTERM in a run: the first is for the run to save and end, the second ends it."""

from __future__ import annotations

import os
import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 30  # between torchrun's SIGTERM and its SIGKILL
SAID = b"\ninterrupted: saving after this step; once more ends at once, without saving\n"


class Interrupts:
    """Within it, the first SIGINT or SIGTERM is noted; at a second one the process exits at once.

    In a thread other than the main one, where Python has no signals, it notes nothing.

    Args:
        patient: a second one changes nothing. torchrun passes on to its processes what a scheduler
            has sent to all of them already, and ends them itself where it takes them too long.
    Attributes: signal: the number of the one that came; 0 before.
    """

    def __init__(self, patient: bool = False):
        self.signal, self.patient = 0, patient
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.signal and self.patient:
            return
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        os.write(2, SAID)  # print may have been interrupted itself


def exit_by(number: int) -> BaseException:
    """What a run raises that was ended by a signal: the process exits with 128 + number."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def outlive_interrupts() -> None:
    """For a process that reads data ahead: what is sent to the whole group is not for it.

    The run that it reads for still finishes a step and saves, so SIGTERM is obeyed late. Windows,
    which has no alarm either, sends none: it ends a process without a word.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, _end_late)


def _end_late(*_) -> None:
    signal.alarm(GRACE_SECONDS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
