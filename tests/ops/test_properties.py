"""group_norm_act by hypothesis, which an environment may lack: the other files do without."""

import math

import pytest
import torch
from harness import assert_close, lay
from test_group_norm_act import MODULATIONS
from test_group_norm_plan import A100, H100, T4, plan

import diffusion_ext as dx
from diffusion_ext.ops import reference
from diffusion_ext.ops.group_norm_act import ACTIVATIONS

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies


@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 6),
    size=st.integers(1, 7),
    spatial=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    channels_last=st.booleans(),
    act=st.sampled_from(ACTIVATIONS),
)
def test_any_shape(batch, groups, size, spatial, channels_last, act):
    shape = (batch, groups * size, *spatial)
    x = lay(torch.randn(shape), "channels_last" if channels_last else "contiguous")
    options = {name: torch.randn(shape[:2]) for name in MODULATIONS}
    wide = {k: v.double() for k, v in options.items()}
    y = dx.group_norm_act(x, groups, act=act, **options)
    expected = reference.group_norm_act(x.double(), groups, act=act, **wide)
    assert_close(y, expected, torch.float32, factor=4)


@pytest.mark.backends("cpu")
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
