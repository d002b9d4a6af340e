"""Wheels for a GPU's machine that has no network: `make gpu-wheels` puts them into .wheels.

What that machine has beside torch is in THERE; gpu_check.py installs the rest from .wheels for
itself. Raises where a wheel needs what neither has.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import zipfile
from email.parser import HeaderParser

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

FOLDER = pathlib.Path(__file__).resolve().parents[2] / ".wheels"
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
WANTED = ("diffusers>=0.42,<0.43", "tyro", "importlib_metadata", "zipp", "docstring-parser",
          "typeguard", "lazy-importer")  # fmt: skip
# What a machine with torch and transformers has.
THERE = {"torch", "numpy", "pillow", "transformers", "huggingface-hub", "safetensors", "filelock",
         "requests", "regex", "tqdm", "typing-extensions"}  # fmt: skip


def download(folder: pathlib.Path) -> None:
    platforms = [flag for name in PLATFORMS for flag in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    subprocess.run([*command, *platforms, "--dest", folder, *WANTED], check=True)


def needs(wheel: pathlib.Path) -> list[Requirement]:
    """Of a wheel, on PYTHON and Linux, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        fields = HeaderParser().parsestr(archive.read(name).decode())
    every = [Requirement(line) for line in fields.get_all("Requires-Dist", [])]
    there = {"python_version": PYTHON, "sys_platform": "linux", "extra": ""}
    return [r for r in every if r.marker is None or r.marker.evaluate(there)]


def missing(folder: pathlib.Path) -> list[str]:
    """What the wheels need that is neither among them, in a fitting version, nor THERE."""
    wheels = list(folder.glob("*.whl"))
    carried = {str(name): version for name, version, *_ in map(_parsed, wheels)}
    if len(carried) < len(wheels):
        return [f"two versions of a package in {folder.name}"]
    lacking = []
    for wheel in wheels:
        for need in needs(wheel):
            name = canonicalize_name(need.name)
            fits = name in carried and need.specifier.contains(carried[name], prereleases=True)
            if not fits and name not in THERE:
                lacking.append(f"{wheel.name} needs {need}")
    return lacking


def _parsed(wheel: pathlib.Path):
    return parse_wheel_filename(wheel.name)


def main() -> int:
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    download(FOLDER)
    if lacking := missing(FOLDER):
        print("\n".join(lacking))
        return 1
    print("\n".join(sorted(wheel.name for wheel in FOLDER.glob("*.whl"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
