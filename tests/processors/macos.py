"""The CPU kernels, compiled for macOS on ARM: by LLVM, with its library and Apple's C headers, all
of which the package ziglang brings. Nothing is linked or run, and csrc/module.cpp is left out: no
package brings Python's headers for macOS."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import machine

COMPILER = machine.HERE / "zig" / "ziglang" / "zig"
PACKAGE = "ziglang==0.17.1"
TARGET = "aarch64-macos.11.0"  # the oldest that a wheel may say
# A flag of GCC's alone is one that Apple's compiler, too, only warns of.
WARNINGS = ("-Werror", "-Wno-ignored-optimization-argument")


def compiler() -> None:
    if not COMPILER.exists():
        folder = COMPILER.parents[1]
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder)
        machine.run(*pip, PACKAGE, quiet=True)


def command() -> list[str]:
    flags = shlex.split((machine.ROOT / "csrc" / "flags.txt").read_text(encoding="utf-8"))
    headers = ("-isystem", str(machine.SITE / "torch" / "include"))
    return [str(COMPILER), "c++", "-target", TARGET, *flags, *WARNINGS, *headers, "-c"]


def compile_all() -> int:
    """Returns: the number of files. Raises: SystemExit with what the compiler said."""
    csrc, cache = machine.ROOT / "csrc", str(COMPILER.parent / "cache")
    files = [f for name in ("registration.cpp", "cpu/**/*.cpp") for f in csrc.glob(name)]
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}

    def one(file) -> str:
        line = [*command(), str(file), "-o", str(COMPILER.parent / f"{file.stem}.o")]
        return subprocess.run(line, env=environment, capture_output=True, text=True).stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if said := "".join(pool.map(one, files)):
            sys.exit(said)
    return len(files)
