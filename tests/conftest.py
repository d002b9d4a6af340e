"""Settings for the whole suite."""

import itertools
import pathlib

import numpy as np
import pytest
import torch
from faults import pytest_runtest_makereport  # noqa: F401  # a hook

try:
    from hypothesis import settings
except ImportError:  # the property tests are skipped; the others do without
    pass
else:
    settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True)
    settings.load_profile("suite")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


# With pytest-xdist a file is one worker's (--dist=loadfile): these, which compile or train, begin.
LONGEST = ["test_cuda_build.py", "test_gpu_check.py", "test_build.py", "test_fuse_resnet_blocks.py",
           "test_engines.py", "test_training.py", "test_fuse_torch.py"]  # fmt: skip


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


_counter = itertools.count()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch):
    """cuDNN would round float32 to TF32."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def small_work_counts(monkeypatch):
    """The test's network is small; ours serve its convolutions and linear layers nevertheless."""
    from diffusion_ext.nn import kept_filters, kept_filters_3d, kept_linear
    from diffusion_ext.ops.conv2d import SHARES_OF_TORCH

    for module in (kept_filters, kept_filters_3d, kept_linear):
        monkeypatch.setattr(module, "LEAST_SUM", 0)
        monkeypatch.setattr(module, "LEAST_PRODUCTS", 0)
        monkeypatch.setattr(module, "LEAST_OF_SLOW", 0)
    for dtype in list(SHARES_OF_TORCH):
        monkeypatch.delitem(SHARES_OF_TORCH, dtype)
    monkeypatch.setattr(kept_linear, "LEAST_OUTPUTS", 0)


@pytest.fixture(autouse=True)
def _own_choices(monkeypatch, tmp_path_factory):
    """No test takes what another one, or this machine's user, has measured."""
    folder = tmp_path_factory.getbasetemp() / f"choices{next(_counter)}"
    monkeypatch.setenv("DIFFUSION_EXT_CACHE", str(folder))


@pytest.fixture(scope="session")
def loops():
    """The float64 oracles of the sampling loops."""
    with np.load(FIXTURES / "sampling_loops.npz") as file:
        return {name: file[name] for name in file.files}
