"""A child of benchmarks/gpu/items.py for its tests: items that end well, and each way in which not.

The arguments are the items: a kind with a number.
"""

import argparse
import os
import pathlib
import signal
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.gpu.child import serve  # noqa: E402
from benchmarks.gpu.items import Item  # noqa: E402


class Tiny:
    def __init__(self, names):
        self.names, self.done = names, 0
        if "unready 0" in names:
            raise OSError("nothing here")

    def items(self):
        optional = {"optional": True, "least": 1e6}
        return [
            Item(name, name.split()[0], 0.7, **(optional if name.startswith("late") else {}))
            for name in self.names
        ]

    def facts(self):
        return {"device": "tiny"}

    def do(self, name, given):
        self.done += 1
        given |= {"pid": os.getpid(), "done": self.done}
        getattr(self, name.split()[0], lambda: None)()

    def raises(self):
        raise ValueError("no such thing")

    def crashes(self):
        print("about to crash", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)

    def exits(self):
        os._exit(7)

    def sleeps(self):
        """Python can interrupt this."""
        time.sleep(60)

    def hangs(self):
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        time.sleep(60)

    def faults(self):
        """As a kernel that writes where it may not: the next synchronization says so."""

        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access")

        cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--child", type=pathlib.Path)
    arguments = parser.parse_args()
    sys.exit(serve(arguments.child, lambda: Tiny(arguments.names)))
