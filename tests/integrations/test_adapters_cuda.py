"""Adapters and k-diffusion's functions on a GPU: no wait in a call, for a CUDA graph to have it."""

import pytest
import torch
from harness import waits_are_errors
from torch import nn

import diffusion_ext as dx
from diffusion_ext.integrations import k_diffusion

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")

SCHEDULE = dx.NoiseSchedule.linear(50)


class Denoised(nn.Module):
    """x0 from x at a noise level sigma."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, sigma):
        return (x * self.scale / (1 + sigma.reshape(-1, 1, 1, 1))).tanh()


@pytest.mark.parametrize("engine", ["eager", "graph", "trace"])
def test_a_denoiser(engine):
    table = dx.dpmpp_2m(SCHEDULE, 5, prediction="x0")
    model = dx.adapters.from_denoiser(Denoised(), SCHEDULE)
    options = {"table": table, "shape": (2, 3, 8, 8), "progress": False}
    expected = dx.sample(model, **options).images
    ours = dx.sample(model.cuda(), engine=engine, **options).images
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-3, atol=1e-3)
    x, t = torch.randn(2, 3, 8, 8, device="cuda"), torch.tensor([0.3, 0.5], device="cuda")
    with waits_are_errors():
        model(x, t)


@pytest.mark.parametrize("name", ["sample_euler", "sample_euler_ancestral", "sample_dpmpp_2m"])
def test_a_step_of_k_diffusion(name):
    sigmas = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.0], device="cuda")
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        if len(calls) > 1:
            torch.cuda.set_sync_debug_mode("error")
        return x / (1 + sigma.reshape(-1, 1, 1, 1))

    x = torch.randn(2, 3, 8, 8, device="cuda")
    try:
        y = getattr(k_diffusion, name)(model, x, sigmas, disable=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 5
    assert y.isfinite().all()
