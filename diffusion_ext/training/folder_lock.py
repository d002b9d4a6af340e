"""One run to a folder: whoever comes second is told who is there."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

LOCK_NAME = ".lock"
HOLDER_NAME = ".lock-holder"  # a file of its own: Windows lets nobody read one that is locked
PATIENCE = 0.2  # seconds: a run that is just ending removes its lock, one that begins says its name


class FolderLock:
    """Holds a folder, which is made where it is not there, until it is closed or the process ends.

    The system's own lock: a process that is killed leaves none behind. Neither do the workers that
    it has forked, which outlive it for seconds: filelock, from 3.30 on, takes the lock's file from
    them. On Linux NFS carries it to its server, so that it holds between machines. A file system
    without locks is an error: a file that stands for one would outlive a killed run.

    Raises: BlockingIOError naming the folder and the process that holds it; OSError where the
    folder cannot be written to.
    """

    def __init__(self, folder: Path):
        from filelock import FileLock, Timeout  # here: it takes 0.05 s, a quarter of a command's

        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._holder = (folder.resolve() / name for name in (LOCK_NAME, HOLDER_NAME))
        self._lock = FileLock(self._file, thread_local=False, fallback_to_soft=False)
        me = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            self._lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            holder = self._name_of_holder()
            run = "another run of this process" if holder == me else "another run"
            raise BlockingIOError(f"folder: {run} writes into {folder}: {holder}") from error
        except OSError as error:
            reason = error.strerror or str(error)
            raise type(error)(
                error.errno, f"folder: no lock to be had ({reason})", str(folder)
            ) from error
        try:
            self._holder.write_text(me, encoding="utf-8")
        except OSError:
            self.close()
            raise

    def _name_of_holder(self) -> str:
        with contextlib.suppress(OSError):
            return self._holder.read_text(encoding="utf-8", errors="replace") or "unknown"
        return "unknown"

    def close(self) -> None:
        for file in (self._holder, self._file):
            with contextlib.suppress(OSError):  # Windows keeps what is open; filelock removes it
                file.unlink()
        self._lock.release()
