import pytest


@pytest.fixture(autouse=True)
def _small_work_counts(request):
    """In all tests of this room but those about what ours leave to torch."""
    if "measured_thresholds" not in request.fixturenames:
        request.getfixturevalue("small_work_counts")


@pytest.fixture
def measured_thresholds():
    """The test is about what ours leave to torch because it does not gain."""
