"""The oldest diffusers that we serve: our tests of the schedulers pass with it in place of ours."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

diffusers = pytest.importorskip("diffusers")

from diffusion_ext.integrations import diffusers as ours  # noqa: E402
from diffusion_ext.integrations.diffusers.drop_in import (  # noqa: E402
    OLDEST,
    check_release,
    drop_in,
)

ROOT = pathlib.Path(__file__).parents[2]
# With what its pipelines import, of the same time.
PACKAGES = ["diffusers==0.32.0", "transformers==4.48.3", "huggingface_hub==0.27.1"]
PACKAGES += ["tokenizers==0.21.0"]


@pytest.fixture(scope="module")
def oldest():
    folder = ROOT / "build" / "diffusers-0.32.0"
    if not (folder / "diffusers").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        got = subprocess.run(
            [*pip, "--target", str(folder), *PACKAGES], capture_output=True, text=True
        )
        if got.returncode:
            pytest.skip(f"diffusers 0.32 cannot be downloaded: {got.stderr.strip()[-200:]}")
    return folder


def test_schedulers_and_fused_models(oldest):
    tests = ["schedulers", "differences", "pipelines"]
    files = [f"tests/integrations/test_diffusers_{name}.py" for name in tests]
    tests = ["runs", "schedulers", "steps"]
    files += [f"tests/integrations/test_traced_{name}.py" for name in tests]
    files += ["tests/fusing/test_fuse_resnet_blocks.py"]
    environment = {**os.environ, "PYTHONPATH": str(oldest)}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *files]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    version = "import diffusers; print(diffusers.__version__)"
    run = [sys.executable, "-W", "ignore", "-c", version]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "0.32.0"


def test_releases_that_we_cannot_serve(monkeypatch):
    check_release(".".join(map(str, OLDEST)) + ".0.dev0")
    check_release("1.0.0")
    with pytest.raises(ImportError, match=r"diffusers 0.31.0 is older than 0.32.*pip install"):
        check_release("0.31.0")

    class Newer(ours.DDIMScheduler.theirs):  # with an argument more
        def step(self, model_output, timestep, sample, temperature=1.0):
            pass

    monkeypatch.setattr(diffusers, "DDIMScheduler", Newer)

    with pytest.raises(ImportError, match=r"Newer.step.*temperature.*another release"):
        drop_in()(ours.DDIMScheduler)
