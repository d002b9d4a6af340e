"""A bar for each phase of a measurement, with the phase's name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tqdm import tqdm

Bar = Callable[..., Iterable[Any]]  # (parts, name, unit=...) -> the parts, as they are done


def bars(shown: bool) -> Bar:
    interval = 0.5 if sys.stderr.isatty() else 10.0  # seconds; a log keeps every state
    return partial(tqdm, disable=not shown, leave=False, mininterval=interval)


SILENT = bars(False)
