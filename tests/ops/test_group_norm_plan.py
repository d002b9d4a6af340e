"""How group_norm_act divides its work on a GPU: host code, so that no GPU is needed to test it."""

import pytest

from diffusion_ext import _C

pytestmark = pytest.mark.backends("cpu")

H100 = {"multiprocessors": 132, "shared_bytes": 228352, "max_cluster": 8}
A100 = {"multiprocessors": 108, "shared_bytes": 162816, "max_cluster": 1}
T4 = {"multiprocessors": 40, "shared_bytes": 61440, "max_cluster": 1}


def plan(shape, groups, element_size=2, device=H100, **options):
    return _C.group_norm_plan(shape, groups, element_size, **device, **options)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [(8, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 2560, 8, 8)]
)
def test_unet_slabs_stay_on_chip(shape, channels_last):
    for backward in (False, True):
        p = plan(shape, 32, channels_last=channels_last, backward=backward)
        assert p["kind"] == "on chip"
        assert p["vector"] == 8


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 128, 20, 256, 256), (1, 128, 512, 512), (1, 64, 128, 128)])
@pytest.mark.parametrize("groups", [1, 32])
def test_one_sample_fills_the_gpu(shape, groups, channels_last):
    p = plan(shape, groups, channels_last=channels_last)
    assert p["blocks"] * p["threads"] >= 132 * 64


def test_without_clusters_a_large_slab_is_split():
    """80 KB of a group: on an A100 one block holds it, and 256 of them are enough."""
    assert plan((8, 320, 64, 64), 32, device=A100)["kind"] == "on chip"
    assert plan((1, 320, 64, 64), 32, 4, device=A100)["kind"] == "split"
    assert plan((8, 320, 64, 64), 32, 4, device=T4)["kind"] == "split"


def test_bad_problems():
    with pytest.raises(ValueError, match="groups: wanted a divisor"):
        plan((1, 4, 2), 3)
    with pytest.raises(ValueError, match="shape: wanted"):
        plan((4,), 1)
    with pytest.raises(ValueError, match="element_size: wanted 2 or 4"):
        plan((1, 4, 2), 2, 8)
