"""One run to a folder: whoever comes second is told who is there."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

LOCK_NAME = ".lock"
_held: set[Path] = set()  # by this process, which its own locks would not keep out


class FolderLock:
    """Holds a folder, which is made where it is not there, until it is closed or the process ends.

    POSIX's record locks: a process that is killed leaves none behind, and neither do the workers
    that it has forked, which would keep a lock of flock's for the seconds that they outlive it.

    Raises: BlockingIOError naming the folder and the process that holds it; OSError where the
    folder cannot be written to.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder.resolve() / LOCK_NAME
        if self.path in _held:
            raise BlockingIOError(f"folder: another run of this process writes into {folder}")
        self._file = self._locked(folder)
        _held.add(self.path)
        os.truncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _locked(self, folder: Path) -> int:
        """The lock's file, locked, and still the one of that name."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.path.exists() and os.path.samestat(os.fstat(file), self.path.stat()):
                    return file
            except (BlockingIOError, PermissionError) as error:  # POSIX allows either
                holder = os.read(file, 1000).decode(errors="replace").strip()
                os.close(file)
                raise BlockingIOError(
                    f"folder: another run writes into {folder}: {holder or 'unknown'}"
                ) from error
            os.close(file)  # its run has ended, and removed it

    def close(self) -> None:
        _held.discard(self.path)
        self.path.unlink(missing_ok=True)
        os.close(self._file)
