"""An ARM Linux of its own in build/processors: Python, torch, and the kernels compiled for it here.

qemu runs its programs, one instruction after another of an ARM processor's; nothing is started as
another system, and nothing outside build/processors is written but what `tools` installs.
"""

from __future__ import annotations

import os
import pathlib
import platform
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = ROOT / "build" / "processors"
SYSTEM, SITE, KERNELS = HERE / "system", HERE / "site", HERE / "kernels"
PYTHON = HERE / "python"  # runs ARM's Python

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
X86_EMULATOR = "qemu-x86_64-static"
QEMU = "qemu-user-static"
TOOLS = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: QEMU, X86_EMULATOR: QEMU}
PROCESSOR = "neoverse-n1"  # older ones lack instructions that torch's own convolutions use

# The oldest torch that is promised, and of those for ARM the last without CUDA's gigabytes.
TORCH = "torch==2.10.0"
PACKAGES = (
    "filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions",  # torch
    "numpy", "pillow", "safetensors", "tqdm", "tyro",
    "hypothesis", "pybind11", "pytest", "pytest-timeout",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")

# What apt does in folders of its own, for a processor that is not this one's.
APT = """APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
Dir::State "{0}/state";
Dir::State::status "{0}/state/status";
Dir::Cache "{0}/cache";
"""
START = """#!/bin/sh
PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}} exec {emulator} -cpu {processor} -L {system} \\
    {python} "$@"
"""


def run(*command, quiet: bool = False, **environment: str) -> None:
    """Raises: SystemExit with what a quiet command said, where it fails."""
    kept = {"capture_output": True, "text": True} if quiet else {}
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, env={**os.environ, **environment}, **kept)
    if done.returncode:
        said = f"{done.stdout}{done.stderr}" if quiet else ""
        sys.exit(f"{said}{' '.join(arguments)}: status {done.returncode}")


def tools() -> None:
    """The compiler and the emulator, installed where they are missing."""
    missing = {package for program, package in TOOLS.items() if shutil.which(program) is None}
    if not missing:
        return
    if platform.freedesktop_os_release()["ID"] != "debian":
        sys.exit(f"make processors wants Debian's packages {' '.join(sorted(missing))}")
    root = [] if os.geteuid() == 0 else ["sudo"]
    run(*root, "apt-get", "update", quiet=True)
    install = ("apt-get", "install", "--yes", "--no-install-recommends")
    run(*root, "env", "DEBIAN_FRONTEND=noninteractive", *install, *missing, quiet=True)


def system() -> pathlib.Path:
    """Debian's Python for ARM, unpacked. Returns: its interpreter."""
    done = SYSTEM / "unpacked"
    if not done.exists():
        apt, debs = HERE / "apt", HERE / "apt" / "cache" / "archives"
        for folder in (apt / "state" / "lists" / "partial", debs / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        (apt / "state" / "status").touch()
        (apt / "apt.conf").write_text(APT.format(apt))
        ours = {"APT_CONFIG": str(apt / "apt.conf")}
        run("apt-get", "update", quiet=True, **ours)
        wanted = ("python3", "python3-dev", "libstdc++6")
        run("apt-get", "install", "--yes", "--download-only", *wanted, quiet=True, **ours)
        for deb in debs.glob("*.deb"):
            run("dpkg-deb", "--extract", deb, SYSTEM, quiet=True)
        if not (SYSTEM / "lib").exists():  # newer packages count on this link, and none has it
            (SYSTEM / "lib").symlink_to("usr/lib")
        done.touch()
    return (SYSTEM / "usr" / "bin" / "python3").resolve()


def site(python: pathlib.Path) -> None:
    """torch and what the tests import, for that Python."""
    done = SITE / TORCH
    if done.exists():
        return
    shutil.rmtree(SITE, ignore_errors=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", SITE]
    install += ["--only-binary", ":all:", "--python-version", python.name.removeprefix("python")]
    install += [word for platform in PLATFORMS for word in ("--platform", platform)]
    # Without its dependencies, which pip would judge by this processor.
    run(*install, "--no-deps", TORCH, quiet=True)
    run(*install, *PACKAGES, quiet=True)
    # Programs that start another Python shall start this one.
    (SITE / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(PYTHON)!r}\n")
    done.touch()


def start(python: pathlib.Path) -> None:
    """The program PYTHON."""
    path = f"{KERNELS / 'python'}:{SITE}"
    emulator = shutil.which(EMULATOR)
    PYTHON.write_text(
        START.format(
            path=path, emulator=emulator, processor=PROCESSOR, system=SYSTEM, python=python
        )
    )
    PYTHON.chmod(0o755)


def kernels() -> None:
    """The package of this tree beside its library for ARM, by the ordinary CMakeLists.txt."""
    programs = [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}", f"-DPython_EXECUTABLE={PYTHON}"]
    headers = f"-DCMAKE_CXX_FLAGS=-idirafter {SYSTEM / 'usr' / 'include'}"  # of Python for ARM
    compiler = f"-DCMAKE_CXX_COMPILER={COMPILER}", headers
    run("cmake", "-S", ROOT, "-B", KERNELS, "-G", "Ninja", *programs, *compiler, quiet=True)
    run("cmake", "--build", KERNELS, "--target", "_C")
