"""The build: what the library needs of torch, and every way an install can go."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import compiler
import pytest
import torch
from filelock import FileLock

import diffusion_ext as dx
from diffusion_ext import _C

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Held by what runs ninja on the tree's own objects: other workers of pytest-xdist may, too.
OBJECTS = FileLock(ROOT / "build" / "objects.lock")
SOURCE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "csrc")


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree, without what was built in it."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in SOURCE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json")
    shutil.copytree(ROOT / "diffusion_ext", tree / "diffusion_ext", ignore=ignore)
    return tree


def run(*command, cwd=None, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def pip(*arguments, **environment):
    flags = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-v")
    return run(sys.executable, "-m", "pip", *arguments[:1], *flags, *arguments[1:], **environment)


def python(code, path, **environment):
    """Runs code with the package that lies in path, and none that is installed for editing."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
    ) + code
    return run(sys.executable, "-c", code, cwd=path, PYTHONPATH=str(path), **environment)


def test_the_library_needs_only_the_stable_shim():
    """No symbol of c10 or ATen: the names that are torch's at all are C functions of the shim."""
    names = run("nm", "-D", "--undefined-only", "-C", _C.__file__).splitlines()
    undefined = [line.split(maxsplit=1)[1].removeprefix("U ") for line in names]
    assert any(name.startswith("aoti_torch_") for name in undefined)  # the scan sees something
    foreign = [n for n in undefined if re.search(r"\b(c10|at|torch|caffe2|aten)::", n)]
    assert foreign == []
    libraries = run("readelf", "-d", _C.__file__)
    needed = re.findall(r"NEEDED.*\[(.*?)\]", libraries)
    assert {n for n in needed if "torch" in n or "c10" in n} == {"libtorch_cpu.so"}


def test_info_says_what_serves_each_op():
    info = dx.info()
    assert set(info.backends) == {
        "sampler_step",
        "perturb",
        "denoising_loss",
        "philox_normal",
        "group_norm_act",
    }
    for devices in info.backends.values():
        assert devices["cpu"].startswith(f"native ({_C.cpu_capability()}, ")
        if torch.version.cuda is None:
            why = f"torch {torch.__version__} is a build without CUDA"
            assert devices["cuda"] == f"reference: {why}"
    assert "-ffp-contract=off" in info.build["flags"]
    assert info.build["compiler"]
    for part in (info.versions["torch"], info.build["flags"], "group_norm_act"):
        assert part in str(info)
    with dx.use_backend("reference"):
        assert dx.info().backends["perturb"]["cpu"].startswith("reference: chosen by")


def test_environment_chooses_the_backend():
    code = "import diffusion_ext as dx; print(dx.ops.current_backend())"
    chosen = python(code, ROOT, DIFFUSION_EXT_BACKEND="reference")
    assert chosen.split() == ["reference"]
    warned = python(code, ROOT, DIFFUSION_EXT_BACKEND="cuda")
    assert "DIFFUSION_EXT_BACKEND: wanted one of ('native', 'reference'), got 'cuda'" in warned
    warned = python(code, ROOT, DIFFUSION_EXT_CPU_CAPABILITY="AVX2")
    assert "DIFFUSION_EXT_CPU_CAPABILITY: wanted one of ('baseline', " in warned
    assert "got 'AVX2'; using the processor's best" in warned


USE = (
    "import torch, diffusion_ext as dx; print(dx.info()); "
    "print(dx.group_norm_act(torch.ones(1, 4, 2, 2), 2).sum(), dx.philox_normal(0, (1, 3)).shape)"
)


def test_no_compiler_leaves_a_package_that_works(source, tmp_path):
    site = tmp_path / "site"
    said = pip("install", "--target", site, source, CXX="no-such-compiler")
    assert "THE C++ LIBRARY WAS NOT BUILT; installing pure Python" in said
    assert not list(site.rglob("*.so"))
    report = python(USE, site)
    assert "reference: the C++ library was not built" in report
    assert "no C++ compiler: CXX=no-such-compiler is not on PATH" in report
    assert "not built" in json.loads((site / "diffusion_ext" / "_build.json").read_text())
    assert "tensor(0.) torch.Size([1, 3])" in report


def test_a_wanted_library_that_fails_is_an_error(source, tmp_path):
    with pytest.raises(AssertionError, match="no-such-compiler"):
        pip(
            "install", "--target", tmp_path / "site", source,
            CXX="no-such-compiler", DIFFUSION_EXT_NATIVE="1",
        )  # fmt: skip


def test_a_library_that_does_not_load_breaks_nothing(source):
    suffix = pathlib.Path(_C.__file__).name
    (source / "diffusion_ext" / suffix).write_bytes(b"not a library")
    assert "reference: the built library does not load" in python(USE, source)


def test_a_source_distribution_is_complete(source):
    run(sys.executable, "setup.py", "--quiet", "sdist", cwd=source, DIFFUSION_EXT_NATIVE="0")
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    files = [p for p in (source / "csrc").rglob("*.*") if "__pycache__" not in p.parts]
    assert {str(p.relative_to(source)) for p in files} <= packed


def test_the_wheel_carries_the_library(tmp_path):
    """Of the tree itself, for whose objects ninja has nothing to do."""
    command = (
        sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path,
        "build", "--build-lib", tmp_path / "lib",
        "bdist_wheel", "--bdist-dir", tmp_path / "wheel", "--dist-dir", tmp_path,
    )  # fmt: skip
    with OBJECTS:
        run(*command, cwd=ROOT, DIFFUSION_EXT_NATIVE="1", DIFFUSION_EXT_CUDA="0")
    (wheel,) = tmp_path.glob("diffusion_ext-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert (site / "diffusion_ext" / pathlib.Path(_C.__file__).name).exists()
    report = python(USE, site)
    assert f"native ({_C.cpu_capability()}" in report
    assert "-ffp-contract=off" in report


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_compiles_the_same_sources_with_the_same_flags(tmp_path):
    run("cmake", "-S", ROOT, "-B", tmp_path, f"-DPython_EXECUTABLE={sys.executable}")
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    compiled = {pathlib.Path(entry["file"]) for entry in commands}
    folders = ("csrc/*.cpp", "csrc/cpu/**/*.cpp", "csrc/cuda/**/*.cu")
    emulation = ("csrc/emulation/*.cpp", "tests/emulation/*.cu", "tests/stand_in/*.cpp")
    assert compiled == {path for glob in folders + emulation for path in ROOT.glob(glob)}
    kernels = [entry["command"].split() for entry in commands if "stand_in" not in entry["file"]]
    for flag in compiler.flags(compiler.command()):
        assert all(flag in command for command in kernels)
