"""The child's side of items.py: does one item after the other, as the parent asks for them.

A work has items(), facts() and do(name, given), where `given` is what the parent knows of the item
already, as JSON, such as a row. The child sends `given` back as `do` left it, even if `do` raised.
Each item ends with a synchronization, so that a fault of the GPU is blamed on its item. After such
a fault no call of CUDA works any more in this process: it then ends itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable

DEAD = 3  # the exit status after a fault of the GPU
# Of an item's time: then Python interrupts it. The parent ends the process if that does not help.
OWN_SHARE = 0.9


def serve(folder: pathlib.Path, make: Callable) -> int:
    """Args: folder: where the parent has its two pipes. make: makes the work."""
    with (folder / "asked").open() as asked, (folder / "said").open("w", buffering=1) as said:

        def say(**what) -> None:
            said.write(json.dumps(what) + "\n")

        work = make()
        say(items=[dataclasses.asdict(item) for item in work.items()], facts=work.facts())
        for line in asked:
            answer = answered(work, **json.loads(line))
            say(**answer)
            if answer["dead"]:
                said.flush()
                os._exit(DEAD)
    return 0


def answered(work, name: str, seconds: float, given: dict) -> dict:
    """{result, error, dead, late} of an item; do changes `given` in place."""
    error, late = "", False
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, OWN_SHARE * seconds)
    try:
        work.do(name, given)
    except Exception as raised:
        error, late = one_line(raised), isinstance(raised, OutOfTime)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        synchronize()
    except Exception as raised:
        error = error or one_line(raised)
        return {"result": given, "error": error, "dead": True, "late": late}
    return {"result": given, "error": error, "dead": False, "late": late}


def synchronize() -> None:
    """Raises where the GPU had a fault."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


class OutOfTime(Exception):
    """An item took longer than it may."""


def _out_of_time(*_):
    raise OutOfTime("took too long")


def one_line(error: BaseException) -> str:
    """Without the paths of a machine and what a table takes for itself."""
    said = re.sub(r"\S*/\S+|\|", "", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {' '.join(said.split())[:100]}"
