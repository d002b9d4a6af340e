"""The CUDA library: compiled and linked for one GPU where nvcc is, without any; setup.py's knobs.

The build is setup.py's own, in build/cuda, where ninja compiles again only what has changed.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import compiler
import pytest
import torch
from small_tree import ROOT, SETUP, environment, grow, setup
from test_build import python, run
from toolkit import Toolkit

from diffusion_ext.ops import backend

ARCHITECTURE = "9.0"
BUILD = ROOT / "build" / "cuda"

# Kernels, by a pattern of their names, that may spill registers or have a stack, and why.
MAY_USE_LOCAL_MEMORY: dict[str, str] = {}

# What a torch with CUDA has of the shim, and one without has not.
OF_LIBTORCH_CUDA = {"aoti_torch_get_current_cuda_stream"}


@pytest.fixture(scope="session")
def built(toolkit, request):
    """(the library, what nvcc said by name of the source)"""
    command = [sys.executable, "-c", SETUP, "none", "._cuda", "build_ext"]
    command += ["--build-lib", str(BUILD / "lib"), "--build-temp", str(BUILD / "temp")]
    env = environment(
        DIFFUSION_EXT_CUDA="1",
        TORCH_CUDA_ARCH_LIST=ARCHITECTURE,
        PYTORCH_NVCC=f"{sys.executable} {ROOT / 'tests' / 'packaging' / 'logged_nvcc.py'}",
        NVCC=str(toolkit.nvcc),
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    said = ""
    # The one test that takes minutes, the first time: it shows where it is.
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\ncompiling what changed in csrc/cuda, nvcc {toolkit.release}", flush=True)
        with subprocess.Popen(command, cwd=ROOT, env=env, **pipes) as process:
            for line in process.stdout:
                said += line
                if line.startswith("nvcc: "):
                    print(line, end="", flush=True)
    assert process.returncode == 0, said
    (library,) = (BUILD / "lib" / "diffusion_ext").glob("_cuda*.so")
    objects = BUILD / "temp" / "csrc" / "cuda"
    names = [source.stem for source in (ROOT / "csrc" / "cuda").glob("*.cu")]
    return library, {name: (objects / f"{name}.log").read_text() for name in names}


def symbols(library, which):
    lines = run("nm", "-D", which, library).splitlines()
    return {line.split()[-1] for line in lines}


def test_the_library_needs_the_stable_shim_and_the_cuda_runtime(built, toolkit):
    library, _ = built
    undefined = symbols(library, "--undefined-only")
    versioned = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|@libcudart\.so\.\d+$")
    unversioned = {name for name in undefined if not versioned.search(name)}
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    of_torch = unversioned - weak
    assert "torch_library_impl" in of_torch  # the scan sees something
    assert {name for name in of_torch if not re.match(r"(aoti_)?torch_\w+$", name)} == set()
    libtorch_cpu = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert of_torch - symbols(libtorch_cpu, "--defined-only") <= OF_LIBTORCH_CUDA


def test_libraries_that_are_loaded_with_it(built, toolkit):
    dynamic = run("readelf", "-d", built[0])
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    foreign = {name for name in needed if re.match(r"lib(torch|c10|cu)", name)}
    cudart = f"libcudart.so.{toolkit.release.split('.')[0]}"
    assert foreign == {"libtorch.so", "libtorch_cpu.so", cudart}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


LOAD = """
import sys, torch, diffusion_ext
torch.ops.load_library(sys.argv[1])
def registered(key):
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name for name in names if name.startswith("diffusion_ext::")}
alone = ("attention", "context_unet", "conv", "linear")  # a GPU has libraries of its own
on_cpu = {name for name in registered("CPU") if not any(part in name for part in alone)}
assert registered("CUDA") == on_cpu != set(), registered("CUDA")
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch loads it in earnest")
def test_it_loads_beside_a_libtorch_that_names_libtorch_cuda(built, toolkit, tmp_path):
    """And has a kernel for each op that has one on the CPU, but for the convolutions."""
    stream = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }"
    (tmp_path / "stream.cpp").write_text(f'extern "C" {stream}')
    torch_lib = pathlib.Path(torch.__file__).parent / "lib"
    cxx = (*compiler.command(), "-shared", "-fPIC", "-Wl,--no-as-needed")
    cxx += (f"-L{tmp_path}", f"-L{torch_lib}")
    run(*cxx, "-o", tmp_path / "libtorch_cuda.so", tmp_path / "stream.cpp")
    names = ("-Wl,-soname,libtorch.so", "-ltorch_cpu", "-ltorch_cuda")
    run(*cxx, "-o", tmp_path / "libtorch.so", *names)
    path = ":".join([str(tmp_path), *toolkit.libraries])
    run(sys.executable, "-c", LOAD, built[0], cwd=ROOT, LD_LIBRARY_PATH=path)


def test_no_kernel_spills_registers(built):
    """Nor has a stack: every array of a kernel is in registers or in shared memory."""
    report = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_90'\n"
        r"(?:.*\n)*?\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    for source, log in built[1].items():
        kernels = report.findall(log)
        assert len(kernels) == log.count("Compiling entry function") > 0, source
        for name, *bytes_used in kernels:
            if not any(re.search(pattern, name) for pattern in MAY_USE_LOCAL_MEMORY):
                assert bytes_used == ["0", "0", "0"], f"{source}: {name}"


def test_no_compiler_warns(built):
    warnings = [line for log in built[1].values() for line in log.splitlines() if "warning" in line]
    assert warnings == []


@pytest.fixture
def tree(tmp_path):
    return grow(tmp_path / "tree")


BOTH = "planned: diffusion_ext._C diffusion_ext._cuda\n"
ONLY_C = "planned: diffusion_ext._C\n"


def test_which_libraries_are_built(tree, toolkit):
    assert ONLY_C in setup(tree, "none")
    assert BOTH in setup(tree, "none", DIFFUSION_EXT_CUDA="1")
    assert BOTH in setup(tree, toolkit.release)
    assert ONLY_C in setup(tree, toolkit.release, DIFFUSION_EXT_CUDA="0")


def assert_no_cuda(why, *arguments, **extra):
    """An error where the library was asked for; by default the other one is left."""
    said = setup(*arguments, **extra)
    assert "THE CUDA LIBRARY WAS NOT BUILT; torch will serve CUDA tensors" in said
    assert why in said
    assert ONLY_C in said
    said = setup(*arguments, **extra, DIFFUSION_EXT_CUDA="1")
    assert why in said
    assert said.endswith("failed")


def test_no_toolkit(tree, tmp_path):
    home = str(tmp_path / "empty")
    assert_no_cuda(f"no CUDA toolkit: {home}/bin/nvcc", tree, "13.0", CUDA_HOME=home)


def test_a_toolkit_of_another_major_version_than_torch(tree, toolkit):
    assert_no_cuda(f"nvcc is of CUDA {toolkit.release}, torch", tree, "1.1")


def test_a_kernel_that_does_not_compile_leaves_the_cpu_library(tree, toolkit, tmp_path):
    (tree / "csrc" / "cuda" / "small.cu").write_text("no CUDA\n")
    package = tmp_path / "lib" / "diffusion_ext"
    package.mkdir(parents=True)
    (package / "_cuda.so").write_bytes(b"of an earlier build")
    arguments = ("build_ext", "--build-lib", str(package.parent))
    said = setup(tree, toolkit.release, *arguments, TORCH_CUDA_ARCH_LIST=ARCHITECTURE)
    assert "THE CUDA LIBRARY WAS NOT BUILT" in said
    assert [path.name.split(".")[0] for path in package.glob("*.so")] == ["_C"]
    record = json.loads((package / "_build.json").read_text())
    assert re.match(r"not built: csrc/cuda/small\.cu\(1\): error: ", record["cuda"])
    assert record["cuda"].removeprefix("not built: ") in said
    assert "FAILED: " in said  # and all else that ninja prints
    assert "flags" in record
    said = setup(tree, "none", *arguments, DIFFUSION_EXT_CUDA="1")
    assert said.endswith("failed")


def test_a_wheel_carries_the_cuda_library(tree, toolkit, tmp_path):
    flags = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    knobs = {"DIFFUSION_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    run(sys.executable, "-m", "pip", "wheel", *flags, "--wheel-dir", tmp_path, tree, **knobs)
    (wheel,) = tmp_path.glob("diffusion_ext-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert any(re.match(r"diffusion_ext/_cuda.*\.so$", name) for name in archive.namelist())
        record = json.loads(archive.read("diffusion_ext/_build.json"))
    assert record["cuda"].startswith(f"nvcc {toolkit.release} for {ARCHITECTURE}: ")
    assert "--fmad=false" in record["cuda"]


def test_a_cuda_library_that_does_not_load_breaks_nothing(tmp_path):
    package = tmp_path / "diffusion_ext"
    shutil.copytree(ROOT / "diffusion_ext", package, ignore=shutil.ignore_patterns("_cuda*"))
    (package / "_cuda.so").write_bytes(b"not a library")
    (package / "_build.json").write_text(json.dumps({"cuda": "nvcc 13.0 for 9.0"}))
    said = python("import diffusion_ext as dx; print(dx.info())", tmp_path)
    assert "native (" in said
    assert "nvcc 13.0 for 9.0" in said
    if torch.version.cuda is None:
        assert f"reference: torch {torch.__version__} is a build without CUDA" in said
    else:
        assert "reference: the built library does not load" in said


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program of this name on PATH, ahead of any other."""

    def put(name, prints):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{prints}\n")
        path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return put


@pytest.mark.parametrize(
    "gpus, known, chosen",
    [
        ("echo 9.0; echo 8.0; echo 9.0", "sm_80 sm_90 sm_100", "8.0 9.0"),
        ("exit 9", "sm_80 sm_90 sm_90a sm_100", "8.0 9.0 10.0+PTX"),  # no driver
        ("echo 12.0", "sm_75 sm_80 sm_90", "7.5 8.0 9.0+PTX"),  # newer than nvcc: its PTX serves
    ],
)
def test_architectures(program, tmp_path, gpus, known, chosen, monkeypatch):
    program("nvidia-smi", gpus)
    program("nvcc", f"echo {known}")
    toolkit = Toolkit.__new__(Toolkit)
    toolkit.nvcc = tmp_path / "bin" / "nvcc"
    assert toolkit.architectures() == chosen
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5+PTX")
    assert toolkit.architectures() == "7.5+PTX"


@pytest.mark.parametrize("name", ["libcudart.so", "libcudart.so.13"])
def test_a_toolkit_whose_runtime_is_in_lib(program, tmp_path, monkeypatch, name):
    """As in the wheels of a package index, which have no libcudart.so without a version."""
    plan = f'#$ TOP={tmp_path}\n#$ LIBRARIES= "-L{tmp_path}/lib64"'
    program("nvcc", f"echo '{plan}'; echo release 13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no libcudart\.so in .*lib64"):
        Toolkit()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / name).touch()
    assert Toolkit().runtime == tmp_path / "lib" / name


@pytest.mark.parametrize(
    "release, why", [("12.8", "the CUDA library is of CUDA 13, torch of CUDA 12.8"), ("13.2", None)]
)
def test_a_library_of_another_major_version_is_not_loaded(monkeypatch, tmp_path, release, why):
    loaded = []
    (tmp_path / "_cuda.so").touch()
    monkeypatch.setattr(backend, "PACKAGE", tmp_path)
    monkeypatch.setattr(backend, "build_record", lambda: {"cuda": "nvcc 13.0 for 9.0: -O3"})
    monkeypatch.setattr(torch.version, "cuda", release)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.delitem(backend.missing, "cpu", raising=False)
    assert backend._load_cuda() == why
    assert loaded == ([] if why else [str(tmp_path / "_cuda.so")])
