import pytest

from diffusion_ext.nn import kept_filters


@pytest.fixture(autouse=True)
def small_work_counts(request, monkeypatch):
    """The tests' networks are small. Ours serve them nevertheless, but for tests about that."""
    if "measured_thresholds" not in request.fixturenames:
        monkeypatch.setattr(kept_filters, "LEAST_SUM", 0)
        monkeypatch.setattr(kept_filters, "LEAST_PRODUCTS", 0)


@pytest.fixture
def measured_thresholds():
    """The test is about what ours leave to torch because it does not gain."""
