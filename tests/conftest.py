"""Settings for the whole suite."""

import pathlib

import numpy as np
import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # the property tests are skipped; the others do without
    pass
else:
    settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True)
    settings.load_profile("suite")

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
    """For pytest-xdist with --dist=loadgroup: a file is one worker's, and so is what compiles
    (the group "builds"), which takes longest and so comes first."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != ("builds",))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def loops():
    """The float64 oracles of the sampling loops."""
    with np.load(FIXTURES / "sampling_loops.npz") as file:
        return {name: file[name] for name in file.files}
