"""The folder for Hugging Face's `kernels`: loaded as that does, alone and beside this package."""

import json
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from diffusion_ext import version

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "release"))

LOAD = """
import importlib.util, json, pathlib, sys

import torch

def load(folder):
    name = json.loads((pathlib.Path(folder) / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, pathlib.Path(folder) / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def results(dx):
    x = dx.philox_normal(7, (2, 8, 4, 4))
    model = dx.nn.ContextUnet(3, n_feat=8, n_cfeat=2, height=8).eval()
    drawn = dx.sample(model, (2, 3, 8, 8), dx.ddim(dx.NoiseSchedule.linear(), 3), progress=False)
    assert drawn.images.isfinite().all()
    return x, dx.group_norm_act(x, 4)

def agree(one, two):
    torch.manual_seed(0)
    for a, b in zip(results(one), results(two)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from hub_kernel import add

    place = tmp_path_factory.mktemp("hub")
    wheel = place / f"diffusion_ext-{version.__version__}-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted((ROOT / "diffusion_ext").rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, path.relative_to(ROOT))
    return add(wheel, place / "kernel")


def run(code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD + code, *map(str, arguments)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_folder(folder):
    assert folder.name == "torch-stable-abi210-cpu-x86_64-linux"
    about = json.loads((folder / "metadata.json").read_text())
    assert about["id"].isidentifier()
    assert about["backend"] == {"type": "cpu"}
    header = (ROOT / "csrc" / "common.h").read_text()
    assert "TORCH_TARGET_VERSION 0x020A" in header  # 2.10, as the folder says


def test_alone(folder):
    code = """
dx = load(sys.argv[1])
assert "diffusion_ext" not in sys.modules
results(dx)
print(dx.__version__, dx.info().backends["perturb"]["cpu"])
"""
    said = run(code, folder)
    assert said.startswith(f"{version.__version__} native (")


@pytest.mark.parametrize("first", ["package", "hub"])
def test_beside_an_installed_one(folder, first):
    """The second copy is served by torch, and says why; the process lives."""
    code = """
makers = {"package": lambda: __import__("diffusion_ext"), "hub": lambda: load(sys.argv[1])}
order = [sys.argv[2], *sorted(makers.keys() - {sys.argv[2]})]
one, two = (makers[name]() for name in order)
agree(one, two)
print(one.info().backends["perturb"]["cpu"], two.info().backends["perturb"]["cpu"], sep="\\n")
"""
    said = run(code, folder, first).splitlines()
    assert said[0].startswith("native (")
    why = "reference: another copy of diffusion_ext is loaded in this process, that of "
    assert said[1] == why + str(ROOT / "diffusion_ext" if first == "package" else folder)
