"""What the tests of several processes start from."""

import pytest
from many_processes import EPOCHS, TINY, run, write_images


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "set.npz")


@pytest.fixture(scope="session")
def alone(tmp_path_factory, images):
    """The folder of the run in one process, without torchrun."""
    folder = tmp_path_factory.mktemp("alone")
    done = run(None, "train", "--data", images, "--out", folder, *TINY, *EPOCHS)
    assert done.returncode == 0, done.stderr
    return folder
