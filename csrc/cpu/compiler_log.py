"""setup.py's record of what compilers say: torch tells only that one of them has failed."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

# g++ and clang: "FILE:LINE:COLUMN: error: WHY", "g++: fatal error: WHY"; nvcc: "FILE(LINE): error:
# WHY", "nvcc fatal : WHY". The linkers, Apple's too, have no such word, and the compiler's comes
# after theirs.
ERROR = re.compile(
    r"(?<![-\w/])error\b[^:]*: |^nvcc fatal|\bld: (?:cannot find|library)|undefined reference to"
    r"|^Undefined symbols"
)
PATIENCE = 1.0  # seconds for what was printed last: a server that a compiler began keeps the pipe


def first_error(said: list[str]) -> str | None:
    """The first line of a compiler's or linker's output that has an error."""
    return next((line.strip() for line in said if ERROR.search(line)), None)


@contextlib.contextmanager
def remembered(said: list[str]) -> Iterator[None]:
    """What this process and those that it starts print goes on, and its lines into `said`, too."""
    with contextlib.ExitStack() as stack:
        for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
            stack.enter_context(_remembered(stream, descriptor, said))
        yield


@contextlib.contextmanager
def _remembered(stream, descriptor: int, said: list[str]) -> Iterator[None]:
    stream.flush()
    terminal = os.dup(descriptor)
    read, write = os.pipe()
    os.dup2(write, descriptor)
    os.close(write)

    def copy() -> None:
        with os.fdopen(read, "rb") as pipe:
            for line in pipe:
                os.write(terminal, line)
                said.append(line.decode(errors="replace"))
        os.close(terminal)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stream.flush()
        os.dup2(terminal, descriptor)  # the pipe ends here, and with it the thread
        thread.join(PATIENCE)
