"""The C++ compilers: which one setup.py takes, what it is told, and what is kept of its errors."""

import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import time

import compiler
import compiler_log
import pybind11
import pytest
from small_tree import ROOT, grow, setup
from test_build import python
from torch.utils import cpp_extension

FOLDERS = [pathlib.Path(folder) for folder in os.get_exec_path()]
CLANGS = sorted({path.name for folder in FOLDERS for path in folder.glob("clang++*")})
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for glob in ("csrc/*.cpp", "csrc/cpu/**/*.cpp")
    for path in ROOT.glob(glob)
)
# All but the optimizer, which takes most of the time: a function that is inlined where its
# instructions are not allowed is found after the syntax.
NO_OPTIMIZER = ("-Xclang", "-emit-llvm-only", "-Xclang", "-disable-llvm-passes")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("clang", CLANGS or [None])
def test_clang_compiles_and_says_nothing(clang, source):
    if clang is None:
        pytest.skip("no clang++ is on PATH")
    folders = (pybind11.get_include(), sysconfig.get_path("include"))
    headers = [word for path in (*cpp_extension.include_paths(), *folders)
               for word in ("-isystem", path)]  # fmt: skip
    command = [clang, *compiler.flags([clang]), "-fPIC", *headers, *NO_OPTIMIZER, "-c", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_flags_of_gcc_are_for_gcc():
    """clang calls itself GCC too, and warns of each flag that it does not know."""
    common = shlex.split((ROOT / "csrc" / "flags.txt").read_text())
    of_gcc = shlex.split((ROOT / "csrc" / "flags_gcc.txt").read_text())
    for name in filter(shutil.which, ("g++", *CLANGS)):
        expected = common if "clang" in name else common + of_gcc
        assert compiler.flags([name]) == expected
        done = subprocess.run(
            [name, *expected, "-Werror", "-c", "-x", "c++", os.devnull, "-o", os.devnull],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def only(tmp_path, monkeypatch):
    """Leaves ninja on PATH, and the compiler that is here under these names alone."""
    real, path = compiler.command(), os.environ["PATH"]
    folder = tmp_path / "bin"

    def leave(*names):
        folder.mkdir()
        (folder / "ninja").symlink_to(shutil.which("ninja", path=path))
        for name in names:
            script = f'#!/bin/sh\nPATH={shlex.quote(path)} exec {shlex.join(real)} "$@"\n'
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.delenv("CC", raising=False)
        return folder

    return leave


@pytest.mark.parametrize(
    "there, wanted, taken",
    [
        (("c++", "g++", "clang++"), None, ["c++"]),
        (("clang++", "g++"), None, ["g++"]),
        (("clang++",), None, ["clang++"]),
        (("g++", "clang++"), "clang++ -v", ["clang++", "-v"]),
    ],
)
def test_the_compiler_that_is_taken(only, monkeypatch, there, wanted, taken):
    only(*there)
    if wanted:
        monkeypatch.setenv("CXX", wanted)
    assert compiler.command() == taken


def test_no_compiler_is_an_error_that_says_where_it_was_looked_for(only, monkeypatch):
    only()
    with pytest.raises(FileNotFoundError, match=r"none of c\+\+, g\+\+, clang\+\+ is on PATH"):
        compiler.command()
    monkeypatch.setenv("CXX", "icpx -v")
    with pytest.raises(FileNotFoundError, match="CXX=icpx -v is not on PATH"):
        compiler.command()


BUILD = ("build_ext", "--build-lib", "lib")


def test_a_machine_that_has_clang_alone(tmp_path, only):
    """setuptools would link with the compiler that Python was built with, torch compile by c++."""
    tree = grow(tmp_path / "tree")
    folder = only("clang++")
    said = setup(tree, "none", *BUILD, DIFFUSION_EXT_NATIVE="1")
    assert f"diffusion_ext: {folder}/clang++ compiles: " in said
    assert list(tree.glob("lib/diffusion_ext/_C*.so")), said


def test_nvcc_where_there_is_no_gcc(tmp_path, only, toolkit):
    tree = grow(tmp_path / "tree")
    knobs = {"CUDA_HOME": str(toolkit.home), "TORCH_CUDA_ARCH_LIST": "9.0"}
    only("clang++")
    said = setup(tree, "none", *BUILD, **knobs, DIFFUSION_EXT_CUDA="1")
    assert list(tree.glob("lib/diffusion_ext/_cuda*.so")), said
    said = setup(tree, toolkit.release, *BUILD, **knobs, NVCC_CCBIN="not_here")
    assert "THE CUDA LIBRARY WAS NOT BUILT; torch will serve CUDA tensors. nvcc fatal" in said
    record = json.loads((tree / "lib" / "diffusion_ext" / "_build.json").read_text())
    assert record["cuda"].startswith("not built: nvcc fatal ")


@pytest.mark.parametrize(
    "source, linker_flags, first",
    [
        ("int small;\nint no(\n", "", r"csrc/small\.cpp:\d:\d: error: "),
        ('#include "not_here.h"\n', "", r"csrc/small\.cpp:1:\d+: fatal error: '?not_here\.h"),
        ("int small;\n", "-lnot_here", r".*ld: cannot find -lnot_here"),
    ],
)
def test_info_shows_the_first_error(tmp_path, source, linker_flags, first):
    tree = grow(tmp_path / "tree")
    (tree / "csrc" / "small.cpp").write_text(source)
    said = setup(tree, "none", *BUILD, LDFLAGS=linker_flags)
    package = tree / "lib" / "diffusion_ext"
    reason = json.loads((package / "_build.json").read_text())["not built"]
    assert re.match(first, reason)
    assert f"THE C++ LIBRARY WAS NOT BUILT; installing pure Python. {reason}" in said
    assert said.count(reason.partition(": ")[2]) > 1  # where the compiler said it, among the rest
    shutil.copy(package / "_build.json", tree / "diffusion_ext")
    info = python("import diffusion_ext as dx; print(dx.info())", tree)
    assert re.search(rf"not built +{re.escape(reason)}\n", info)


@pytest.mark.parametrize(
    "line, has",
    [
        ("a.cpp:1:2: error: no", True),
        ("c++: fatal error: Killed signal terminated program cc1plus", True),
        ('a.cu(3): error: identifier "x" is undefined', True),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_1'", True),
        ("/usr/bin/ld: a.o: undefined reference to `f()'", True),
        ("ld: library 'torch_cpu' not found", True),
        ("Undefined symbols for architecture arm64:", True),
        ("c++ -I/home/error dir: -c a.cpp", False),
        ("c++ -Werror=format-security -Wno-error=x -c error.cpp -o a.o", False),
        ("a.cpp:1:2: warning: an error of rounding", False),
        ("In file included from error.h:3,", False),
    ],
)
def test_what_is_an_error(line, has):
    assert (compiler_log.first_error(["FAILED: a.o", line, "1 error: later"]) == line) == has


def test_a_server_that_a_compiler_began_is_not_waited_for():
    said, begun = [], time.monotonic()
    with compiler_log.remembered(said):
        subprocess.run(["sh", "-c", "sleep 20 & echo compiled"], check=True)
    assert time.monotonic() - begun < 10
    assert said == ["compiled\n"]


SUMS = """
#include <cstdio>
#include "math/portable.h"
namespace dx { const bool has_fma = false; }
int main() {
  float y[64];
#pragma omp simd
  for (int i = 0; i < 64; ++i) y[i] = dx::exact_fma(1.1f * i, 0.3f + i, 1e-3f / (1 + i));
  int wrong = 0;
  for (int i = 0; i < 64; ++i) wrong += y[i] != __builtin_fmaf(1.1f * i, 0.3f + i, 1e-3f / (1 + i));
  std::printf("%d", wrong);
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="ARM has the instruction")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("told", [(), ("-mavx",)])
def test_the_fma_of_four_has_the_name_that_gcc_asks_for(tmp_path, told):
    """Flags of a user's own, such as -march=ivybridge, make it another one."""
    source, program = tmp_path / "sums.cpp", tmp_path / "sums"
    source.write_text(SUMS, encoding="utf-8")
    fma = ROOT / "csrc" / "cpu" / "exact_fma.cpp"
    command = ["g++", *compiler.read("flags.txt"), *told, "-I", ROOT / "csrc", source, fma]
    subprocess.run([*map(str, command), "-o", program], check=True)
    assert "_ZGV" in subprocess.run(["nm", program], capture_output=True, text=True).stdout
    assert subprocess.run([program], capture_output=True, text=True).stdout == "0"
