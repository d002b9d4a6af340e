"""What the tests of the build share."""

import pytest
from toolkit import Toolkit


@pytest.fixture(scope="session")
def toolkit():
    """CUDA's, where there is one."""
    try:
        return Toolkit()
    except FileNotFoundError as error:
        pytest.skip(str(error))
