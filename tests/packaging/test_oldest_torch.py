"""Our sources compile with the headers of the oldest torch that pyproject.toml admits.

Those of the torch at hand may have what that one lacks, and nobody would see it here. They are
taken out of its wheel for macOS, which is the smallest and has the same headers as the others.
"""

import pathlib
import re
import shlex
import subprocess
import sys
import zipfile

import compiler
import pytest
from toolkit import Toolkit

ROOT = pathlib.Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
OLDEST = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1] + ".0"
CPU = [CSRC / "registration.cpp", *sorted((CSRC / "cpu").rglob("*.cpp"))]
CUDA = ["cuda/philox_normal.cu", "cuda/has_code.cu"]  # the others include the same headers


@pytest.fixture(scope="module")
def headers():
    """Compiler flags. The wheel is kept in build/headers."""
    folder = ROOT / "build" / "headers" / OLDEST
    if not (folder / "torch" / "include").is_dir():
        command = [sys.executable, "-m", "pip", "download", f"torch=={OLDEST}", "-d", folder]
        command += ["--no-deps", "--only-binary=:all:", "--platform=macosx_11_0_arm64"]
        command += ["--python-version=3.12", "--implementation=cp"]
        got = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if got.returncode:
            pytest.skip(f"torch {OLDEST} cannot be downloaded: {got.stderr.strip()[-200:]}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("torch/include/")]
            archive.extractall(folder, names)
        wheel.unlink()
    include = folder / "torch" / "include"
    version = (include / "torch" / "headeronly" / "version.h").read_text()
    assert all(
        f"TORCH_VERSION_{part} {number}\n" in version
        for part, number in zip(("MAJOR", "MINOR"), OLDEST.split("."), strict=False)
    )
    return ["-isystem", include, "-isystem", include / "torch" / "csrc" / "api" / "include"]


def compiles(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", CPU, ids=lambda path: path.stem)
def test_the_cpu_library(headers, source):
    cxx = compiler.command()
    compiles(*cxx, *compiler.flags(cxx), "-fsyntax-only", *headers, source)


@pytest.mark.parametrize("source", CUDA)
def test_the_cuda_library(headers, source, tmp_path):
    try:
        nvcc = Toolkit().nvcc
    except FileNotFoundError as error:
        pytest.skip(str(error))
    flags = [*shlex.split((CSRC / "flags_cuda.txt").read_text()), "-arch=sm_90"]
    compiles(nvcc, *flags, *headers, "-c", CSRC / source, "-o", tmp_path / "object.o")
