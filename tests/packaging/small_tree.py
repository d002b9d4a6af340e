"""A source tree whose libraries are compiled in a moment, and setup.py's word on it."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

# setup.py as a torch with this CUDA sees it; only the libraries whose name has this in it.
SETUP = """
import setuptools, sys, torch
from distutils.core import run_setup
torch.version.cuda, only, *arguments = [None if a == "none" else a for a in sys.argv[1:]]
distribution = run_setup("setup.py", arguments, stop_after="commandline")
distribution.ext_modules = [e for e in distribution.ext_modules if only in e.name]
print("planned:", *[e.name for e in distribution.ext_modules])
distribution.run_commands()
"""


def environment(**extra: str) -> dict[str, str]:
    """This process's, without what a user set for builds of their own."""
    knobs = ("DIFFUSION_EXT_NATIVE", "DIFFUSION_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "PYTORCH_NVCC")
    return {k: v for k, v in os.environ.items() if k not in knobs} | extra


def grow(tree: pathlib.Path) -> pathlib.Path:
    """Makes the tree in a folder that does not exist."""
    cuda = tree / "csrc" / "cuda"
    cuda.mkdir(parents=True)
    (tree / "csrc" / "cpu").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for path in (*ROOT.glob("csrc/*.txt"), *ROOT.glob("csrc/*/*.py")):
        shutil.copy(path, tree / path.relative_to(ROOT))
    (tree / "csrc" / "small.cpp").write_text("int small;\n")
    (cuda / "small.cu").write_text("__global__ void small() {}\n")
    shutil.copytree(
        ROOT / "diffusion_ext",
        tree / "diffusion_ext",
        ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.json"),
    )
    return tree


def setup(tree: pathlib.Path, cuda: str, *arguments: str, **extra: str) -> str:
    """What setup.py says as a torch with this CUDA sees it, or "none"."""
    command = [sys.executable, "-c", SETUP, cuda, "", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=tree, env=environment(**extra), **streams)
    return done.stdout + ("failed" if done.returncode else "")
