"""The CPU's code without GCC's words (-DDX_PLAIN_CXX), as MSVC compiles it."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pybind11
import pytest
from torch.utils.cpp_extension import include_paths

from diffusion_ext import _C

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
FOLDERS = (CSRC, CSRC / "cpu", CSRC / "cpu" / "instances")
SOURCES = sorted(file for folder in FOLDERS for file in folder.glob("*.cpp"))
HEADERS = [pybind11.get_include(), sysconfig.get_path("include"), *include_paths()]
PLAIN = [
    "-std=c++20", "-DDX_PLAIN_CXX", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wpedantic",
    "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas",
]  # fmt: skip
NORMALS = """
#include <cstdio>
#include "math/normal.h"
#include "math/philox.h"
int main() {
  uint32_t c0, c1, c2, c3, k0, k1;
  while (std::scanf("%u %u %u %u %u %u", &c0, &c1, &c2, &c3, &k0, &k1) == 6) {
    const dx::Words4 w = dx::philox4x32({c0, c1, c2, c3}, k0, k1);
    float a, b;
    dx::box_muller(w.r0, w.r1, a, b);
    std::printf("%u %u %u %u %u %u\\n", w.r0, w.r1, w.r2, w.r3, dx::bits_of(a), dx::bits_of(b));
  }
}
"""

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(sys.platform == "win32", reason="MSVC compiles it there"),
]


def gxx(*arguments) -> str:
    """What it complains of."""
    done = subprocess.run(["g++", *PLAIN, *arguments], capture_output=True, encoding="utf-8")
    return done.stderr if done.returncode else ""


def test_every_source_is_plain_cxx():
    found = [flag for path in HEADERS for flag in ("-isystem", path)]
    with ThreadPoolExecutor(2) as threads:
        said = threads.map(lambda source: gxx("-fsyntax-only", *found, source), SOURCES)
    assert len(SOURCES) > 15
    assert "".join(said) == ""


def test_a_seed_has_the_same_bits_in_plain_cxx(tmp_path):
    source, program = tmp_path / "normals.cpp", tmp_path / "normals"
    source.write_text(NORMALS, encoding="utf-8")
    fma = [CSRC / "cpu" / name for name in ("simd.cpp", "exact_fma.cpp")]
    assert gxx("-O2", "-ffp-contract=off", "-I", CSRC, source, *fma, "-o", program) == ""
    random = np.random.default_rng(0)
    asked = random.integers(0, 2**32, (10_000, 6), np.uint32)
    asked[:2] = [[0] * 6, [2**32 - 1] * 6]
    lines = "\n".join(" ".join(map(str, row)) for row in asked)
    told = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout
    found = np.array([line.split() for line in told.splitlines()], np.uint32)
    assert [hex(word) for word in found[0, :4]] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip
    words = _C.philox4x32(asked[:, :4], asked[:, 4:])
    assert np.array_equal(found[:, :4], words)
    assert np.array_equal(found[:, 4:], _C.box_muller(words[:, :2]).view(np.uint32))
