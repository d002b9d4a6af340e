"""The child's side of items.py: does one item after the other, as the parent asks for them.

A work has items(), facts() and do(name, given), where `given` is what the parent knows of the item
already, as JSON, such as a row. What do makes of it goes back, also where do raises halfway. Each
item ends with a synchronization, so that a fault of the GPU is blamed on the item that made it.
After such a fault no call of CUDA works any more in this process: it then ends itself.
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
    """{result, error, dead} of an item; do changes `given` in place."""
    error = ""
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_REAL, OWN_SHARE * seconds)
    try:
        work.do(name, given)
    except Exception as raised:
        error = one_line(raised)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        synchronize()
    except Exception as raised:
        return {"result": given, "error": error or one_line(raised), "dead": True}
    return {"result": given, "error": error, "dead": False}


def synchronize() -> None:
    """Raises where the GPU had a fault."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _out_of_time(*_):
    raise TimeoutError("took too long")


def one_line(error: BaseException) -> str:
    """Without the paths of a machine and what a table takes for itself."""
    said = re.sub(r"\S*/\S+|\|", "", str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {' '.join(said.split())[:100]}"
