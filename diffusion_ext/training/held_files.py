"""Files that somebody has open: Windows refuses to replace or remove them until they are closed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 10.0  # seconds: a checkpoint is read in less
HELD = (5, 32, 1224)  # Windows' numbers of access denied, a sharing violation and a mapped file


def patiently(change: Callable[..., Any], *arguments: Any) -> None:
    """Replaces or removes files by a function of os or shutil, at once where nobody has them open.

    Whoever reads a checkpoint while its run goes on, or a virus scanner, is waited for.

    Raises: OSError, the function's: at once for any other reason, and after PATIENCE for this one.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            change(*arguments)
            return
        except OSError as error:
            if getattr(error, "winerror", None) not in HELD or time.monotonic() > end:
                raise
        time.sleep(0.05)
