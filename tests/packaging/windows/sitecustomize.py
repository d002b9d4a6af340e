"""Makes Python on Linux as poor as on Windows for diffusion_ext's modules: Python imports this file
at its start where its folder is on PYTHONPATH, in the processes that are spawned too.

Our modules see an os, a signal and a subprocess without what Windows lacks, and cannot import what
is not there; Python's own modules and torch see Linux. For all of them a file that this process has
open or mapped cannot be renamed, replaced or removed, /proc and /sys are not there, and processes
are spawned. Text of ours that leaves its encoding to the system is an error.

Not pretended: paths with backslashes, names that Windows forbids, files that other processes hold.
"""

import builtins
import errno
import functools
import io
import multiprocessing
import os
import signal
import subprocess
import types
import warnings

OURS = "diffusion_ext"
MISSING_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
OF_SIGNAL = """
    Handlers NSIG SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN Signals
    default_int_handler getsignal raise_signal set_wakeup_fd signal strsignal valid_signals
""".split()  # noqa: SIM905
NOT_OF_OS = """
    chown chroot confstr ctermid environb eventfd fchdir fchmod fchown fdatasync fork forkpty
    fpathconf fstatvfs getegid geteuid getgid getgrouplist getgroups getloadavg getpgid getpgrp
    getpriority getresgid getresuid getsid getuid initgroups killpg lchown lockf major makedev
    memfd_create minor mkfifo mknod nice openpty pathconf pipe2 pread pwrite readv register_at_fork
    sendfile setegid seteuid setgid setgroups setpgid setpriority setsid setuid splice statvfs sync
    sysconf sysconf_names tcgetpgrp tcsetpgrp ttyname uname wait wait3 wait4 waitid writev
""".split()  # noqa: SIM905
PREFIXES_NOT_OF_OS = (
    "posix_", "sched_", "SCHED_", "O_CLOEXEC", "O_DIRECT", "O_NO", "O_SYNC", "WE", "WI", "WN"
)  # fmt: skip
UNIX_OPTIONS = {"pass_fds", "preexec_fn", "start_new_session", "process_group", "user", "group"}
IN_USE = 32  # Windows' number for it

import_, open_ = builtins.__import__, io.open


def of_windows(name, globals=None, locals=None, fromlist=(), level=0):
    """`__import__`, for our modules that of Windows."""
    importer = (globals or {}).get("__name__", "")
    if importer.partition(".")[0] == OURS and not level:
        if name in MISSING_MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in POOR:
            return POOR[name]
    return import_(name, globals, locals, fromlist, level)


def without(module, missing, **others):
    poor = types.ModuleType(module.__name__)
    vars(poor).update({n: v for n, v in vars(module).items() if not missing(n)}, **others)
    return poor


class Popen(subprocess.Popen):
    def __init__(self, *arguments, **options):
        if unknown := UNIX_OPTIONS & options.keys():
            raise ValueError(f"{unknown}: not supported on Windows platforms")
        super().__init__(*arguments, **options)


def held_files():
    """What this process has open or mapped."""
    with open_("/proc/self/maps", encoding="utf-8") as maps:
        yield from {line.split(maxsplit=5)[5].rstrip() for line in maps if "/" in line}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # that of the listing itself
            continue


def refuse_held(path):
    real = os.path.realpath(path)
    for held in held_files():
        if held == real or held.startswith(real + os.sep):
            error = PermissionError(errno.EACCES, "used by a process", os.fspath(path))
            error.winerror = IN_USE
            raise error


def refusing(change):
    """A function of os that Windows refuses to do to files that are in use."""

    @functools.wraps(change)
    def refused(path, *arguments, **options):
        relative = options.get("dir_fd") is not None  # rmtree's, by names within an open folder
        for file in (path, *arguments[:1]) if not relative else ():
            refuse_held(file)
        return change(path, *arguments, **options)

    return refused


@functools.wraps(open_)
def open_without_proc(file, mode="r", buffering=-1, encoding=None, *others, **options):
    if not isinstance(file, int) and os.fsdecode(file).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(errno.ENOENT, "no such file", file)
    if "b" not in mode:
        encoding = io.text_encoding(encoding)  # warns the caller where there is none
    return open_(file, mode, buffering, encoding, *others, **options)


for name in ("rename", "replace", "remove", "unlink"):
    setattr(os, name, refusing(getattr(os, name)))
POOR = {
    "os": without(os, lambda n: n in NOT_OF_OS or n.startswith(PREFIXES_NOT_OF_OS), name="nt"),
    "signal": without(signal, lambda n: not n.startswith("_") and n not in OF_SIGNAL),
    "subprocess": without(subprocess, lambda n: False, Popen=Popen),
}
builtins.__import__ = of_windows
builtins.open = io.open = open_without_proc
multiprocessing.set_start_method("spawn")
warnings.filterwarnings("error", category=EncodingWarning, module=OURS)
