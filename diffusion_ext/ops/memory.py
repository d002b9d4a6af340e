"""How much memory there is."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None


@functools.cache
def memory_in_all() -> int:
    """Bytes of the machine; 0 where nothing tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def memory_available() -> int:
    """Bytes that this process can take without pushing others out, as Linux, its control group and
    its own limit tell; without end where nothing tells."""
    limits = [sys.maxsize]
    if resource is not None:
        own, _ = resource.getrlimit(resource.RLIMIT_AS)
        with contextlib.suppress(OSError):
            if own != resource.RLIM_INFINITY:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limits.append(own - pages * resource.getpagesize())
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError):
        group = Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text().strip()
        if most != "max":
            limits.append(int(most) - int((group / "memory.current").read_text()))
    return max(min(limits), 0)
