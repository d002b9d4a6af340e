"""Where nobody has timed our convolutions and linear layers, as on ARM: torch's serve, but for a
network that was timed with both on the machine itself."""

import pytest
import torch

import diffusion_ext as dx
from diffusion_ext.nn import kept_filters, kept_linear, optimized
from diffusion_ext.nn.optimized import OptimizedContextUnet
from diffusion_ext.nn.winograd_conv2d import WinogradConv2d
from diffusion_ext.ops import measuring
from diffusion_ext.ops.conv2d import VECTORISED

pytestmark = pytest.mark.skipif(not VECTORISED, reason="no kernel of ours")
BATCH, SIDE = 3, 16


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    monkeypatch.setattr(kept_filters, "TIMED", False)
    monkeypatch.setattr(kept_linear, "TIMED", False)
    monkeypatch.setattr(optimized, "TIMED", False)


@pytest.fixture
def model():
    return dx.nn.ContextUnet(3, 16, 5, SIDE).eval()


def inputs():
    images = torch.randn(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    return images, torch.rand(BATCH), torch.randn(BATCH, 5)


def ops_of(call) -> set[str]:
    """The ops of ours that it calls."""
    with torch.profiler.profile() as profile, torch.no_grad():
        call()
    found = {event.key for event in profile.key_averages()}
    return {key.split("::")[1] for key in found if key.startswith("diffusion_ext::")}


@pytest.mark.parametrize("grad", [False, True])
def test_torch_serves_a_module(grad):
    conv = WinogradConv2d(16, 32, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(9, 16, 32, 32).to(memory_format=torch.channels_last)
    with torch.profiler.profile() as profile, torch.set_grad_enabled(grad):
        conv(x)
    keys = {event.key for event in profile.key_averages()}
    assert "aten::conv2d" in keys
    assert not any("diffusion_ext" in key for key in keys)


def test_torch_serves_a_linear_layer():
    layer = torch.nn.Linear(320, 320)
    dx.fuse(layer)
    assert ops_of(lambda: layer(torch.randn(64, 320))) == set()


def test_torch_serves_a_network_that_was_not_timed(model):
    with torch.no_grad():
        network = OptimizedContextUnet(model, BATCH, torch.float32, torch.channels_last, ours=False)
    assert ops_of(lambda: network(*inputs())) == {"group_norm_act"}


@pytest.mark.parametrize("faster", [False, True])
def test_ours_serve_where_they_took_less_time(model, monkeypatch, faster):
    def timed(forward, device):
        return 1.0 if forward.func.ours == faster else 2.0

    monkeypatch.setattr(measuring, "seconds", timed)
    monkeypatch.setattr(measuring, "waited", lambda: 0.0)
    for _ in range(2):  # measured, and as it was found
        network = dx.optimize_for_sampling(model, BATCH)
        assert network.ours == faster
    ours = ops_of(lambda: network(*inputs()))
    assert ours & {"context_unet", "conv2d"} == ({"context_unet", "conv2d"} if faster else set())
    if faster:
        assert dx.info().choices[0].taken == "torch.channels_last, our convolutions"
    arguments = inputs()
    with torch.no_grad():
        torch.testing.assert_close(network(*arguments), model(*arguments), rtol=0, atol=1e-4)
