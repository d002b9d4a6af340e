"""How group_norm_act divides its work on a GPU: host code, so that no GPU is needed to test it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_ext import _C

pytestmark = pytest.mark.backends("cpu")

H100 = {"multiprocessors": 132, "shared_bytes": 228352, "max_cluster": 8}
A100 = {"multiprocessors": 108, "shared_bytes": 162816, "max_cluster": 1}
T4 = {"multiprocessors": 40, "shared_bytes": 61440, "max_cluster": 1}


def plan(shape, groups, element_size=2, device=H100, **options):
    return _C.group_norm_plan(shape, groups, element_size, **device, **options)


@given(
    samples=st.integers(1, 9),
    groups=st.integers(1, 40),
    group_channels=st.integers(1, 130) | st.integers(1, 2048),
    spatial=st.integers(1, 1 << 20),
    element_size=st.sampled_from([2, 4]),
    channels_last=st.booleans(),
    backward=st.booleans(),
    aligned=st.booleans(),
    device=st.sampled_from([H100, A100, T4]),
)
def test_every_plan_can_be_launched(
    samples, groups, group_channels, spatial, element_size, channels_last, backward, aligned, device
):
    channels = groups * group_channels
    options = {"channels_last": channels_last, "backward": backward, "aligned": aligned}
    p = plan([samples, channels, spatial], groups, element_size, device, **options)
    assert p["threads"] % 32 == 0
    assert 32 <= p["threads"] <= (512 if p["kind"] == "on chip" and not channels_last else 256)
    assert p["shared_bytes"] <= device["shared_bytes"]
    slabs = samples * math.ceil(groups / p["bundle"])
    assert p["blocks"] == slabs * p["parts"]
    if p["kind"] == "on chip":
        assert p["parts"] in (1, 2, 4, 8)
        assert p["parts"] <= device["max_cluster"]
        # What the threads keep has room for all of a slab.
        kept = p["kept"] * p["threads"] * p["vector"] * p["parts"]
        assert kept >= group_channels * min(p["bundle"], groups) * spatial
    else:
        assert p["kept"] == 0
        assert p["parts"] <= 512
    # Accesses of 16 bytes only where every one of them is aligned.
    assert p["vector"] in (1, 16 // element_size)
    if p["vector"] > 1:
        assert aligned
        assert (channels if channels_last else spatial) % p["vector"] == 0
        bundle_width = p["bundle"] * group_channels
        assert not channels_last or p["bundle"] >= groups or bundle_width % p["vector"] == 0
    if not channels_last:
        assert p["lanes"] * p["run"] * p["pieces"] * p["vector"] >= spatial


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
