"""How much memory there is."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

GROUP = Path("/sys/fs/cgroup")


def memory_in_all() -> int:
    """Bytes that this process may have, as Linux, its control group (a container's) and its own
    limit tell; without end where nothing tells."""
    return min((most for most, _ in _limits()), default=sys.maxsize)


def memory_available() -> int:
    """Bytes of them that it can take without pushing others out."""
    return max(min((free for _, free in _limits()), default=sys.maxsize), 0)


def peak_memory() -> int:
    """The most bytes that this process has held at once; 0 where Linux does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def _limits() -> Iterator[tuple[int, int]]:
    """(bytes in all, bytes that are free) of everything that limits this process."""
    for limit in (_of_process, _of_machine, _of_group):
        with contextlib.suppress(OSError, KeyError, ValueError):
            if (found := limit()) is not None:
                yield found


def _of_process() -> tuple[int, int] | None:
    own = resource.getrlimit(resource.RLIMIT_AS)[0] if resource else None
    if own is None or own == resource.RLIM_INFINITY:
        return None
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    return own, own - pages * os.sysconf("SC_PAGE_SIZE")


def _of_machine() -> tuple[int, int]:
    kilobytes = _table(Path("/proc/meminfo"))
    return 1024 * kilobytes["MemTotal:"], 1024 * kilobytes["MemAvailable:"]


def _of_group() -> tuple[int, int] | None:
    most = (GROUP / "memory.max").read_text(encoding="utf-8").strip()
    if most == "max":
        return None
    used = int((GROUP / "memory.current").read_text(encoding="utf-8"))
    files = _table(GROUP / "memory.stat")["inactive_file"]  # which Linux gives up when asked
    return int(most), int(most) - used + files


def _table(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {words[0]: int(words[1]) for words in map(str.split, lines)}
