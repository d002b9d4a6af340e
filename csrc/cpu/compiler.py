"""setup.py's questions about the C++ compiler."""

import os
import pathlib
import shlex
import shutil
import subprocess

CSRC = pathlib.Path(__file__).resolve().parents[1]
NAMES = ("c++", "g++", "clang++")


def command() -> list[str]:
    """The words of CXX, else the first of NAMES that is on PATH.

    Raises: FileNotFoundError where there is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = next((name for name in wanted[:1] or NAMES if shutil.which(name)), None)
    if found is None:
        which = f"CXX={shlex.join(wanted)} is not" if wanted else f"none of {', '.join(NAMES)} is"
        raise FileNotFoundError(f"no C++ compiler: {which} on PATH")
    return wanted or [found]


def release(command: list[str]) -> str:
    """How the compiler calls itself, such as "g++ (Debian 12.2.0-14) 12.2.0"."""
    return ask(*command, "--version").partition("\n")[0]


def is_gcc(command: list[str]) -> bool:
    """clang says that it is GCC, too, and what else it is."""
    macros = ask(*command, "-dM", "-E", "-x", "c++", os.devnull)
    return "__GNUC__" in macros and "__clang__" not in macros


def flags(command: list[str]) -> list[str]:
    """flags.txt, and for GCC flags_gcc.txt, where clang knows none of the flags: without the pass
    that -fno-gcse-after-reload names the norms compile in 5 % less time."""
    return read("flags.txt", *(["flags_gcc.txt"] if is_gcc(command) else []))


def read(*files: str) -> list[str]:
    """The flags that files of csrc hold."""
    texts = ((CSRC / name).read_text(encoding="utf-8") for name in files)
    return [flag for text in texts for flag in shlex.split(text)]


def ask(*command: str) -> str:
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
