"""The lock of a run's folder, as its processes come and go."""

import errno
import fcntl
import os
import re
import signal
import threading

import pytest

from diffusion_ext.training.folder_lock import HOLDER_NAME, FolderLock


def held_by(folder, then=lambda: None) -> int:
    """A process that holds a folder and then waits."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            lock = FolderLock(folder)  # noqa: F841  # one that nobody refers to is let go
            then()
            os.write(writer, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 1) == b"."
    os.close(reader)
    return child


def end(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_the_second_is_told_and_a_killed_one_leaves_nothing(tmp_path):
    process = held_by(tmp_path)
    try:
        said = f"folder: another run writes into {tmp_path}: process {process} on "
        with pytest.raises(BlockingIOError, match=re.escape(said)):
            FolderLock(tmp_path)
    finally:
        end(process)
    FolderLock(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_outlives_a_killed_run_does_not_hold_its_lock(tmp_path):
    reader, writer = os.pipe()

    def fork_worker():
        worker = os.fork()
        if not worker:
            signal.pause()
        os.write(writer, f"{worker}\n".encode())

    end(held_by(tmp_path, fork_worker))
    worker = int(os.read(reader, 100))
    try:
        FolderLock(tmp_path).close()
        os.kill(worker, 0)  # it is there
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def test_one_process_holds_it_once_and_any_of_its_threads_lets_go(tmp_path):
    lock = FolderLock(tmp_path)
    said = f"folder: another run of this process writes into {tmp_path}: process {os.getpid()} on "
    with pytest.raises(BlockingIOError, match=re.escape(said)):
        FolderLock(tmp_path)
    thread = threading.Thread(target=lock.close)
    thread.start()
    thread.join()
    FolderLock(tmp_path).close()


def test_a_file_system_without_locks_is_an_error(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(OSError, match=rf"folder: no lock to be had .*not implemented.*{tmp_path}"):
        FolderLock(tmp_path)


def test_a_run_that_cannot_say_its_name_holds_nothing(tmp_path):
    (tmp_path / HOLDER_NAME).mkdir()
    with pytest.raises(IsADirectoryError) as kept:
        FolderLock(tmp_path)
    (tmp_path / HOLDER_NAME).rmdir()
    FolderLock(tmp_path).close()
    assert kept.value.filename == str(tmp_path / HOLDER_NAME)  # nor while somebody has the error
