"""Half precision on the CPU: its conversions are torch's, on every instruction set."""

import os
import subprocess
import sys

import pytest

# Every half times numbers that take it to ties, subnormals and infinity: in whole vectors, and in
# samples of 13, which fill none. Then group_norm_act, which has rows with others between them, of a
# group of 1 and -1: mean 0 and deviation 1 leave what the channels' own numbers make of it.
CONVERSIONS = """
import torch
import diffusion_ext as dx
from diffusion_ext import _C
from diffusion_ext.ops.backend import serves
from diffusion_ext.ops.perturb import perturb_by_table

every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    for x in (every.view(dtype)[None], every.view(dtype)[3:].reshape(-1, 13)):
        for factor in (1.0, 0.5, 1 / 3, 1 + 2.0**-11, 1 + 2.0**-8, 2.0**-10, 3.0):
            signal, sigma = torch.tensor([factor]), torch.zeros(1)
            t, noise = torch.zeros(len(x), dtype=torch.int64), torch.zeros_like(x)
            assert serves(x)
            ours, _ = perturb_by_table(x, t, signal, sigma, noise)
            expected = (factor * x.float() + 0).to(dtype)
            assert torch.equal(ours.isnan(), expected.isnan())
            numbers = ~expected.isnan()
            bits = [y[numbers].view(torch.int16) for y in (ours, expected)]
            assert torch.equal(*bits), (dtype, factor, x[numbers][bits[0] != bits[1]][:3])
    weight, bias = torch.randn(2, 1036, generator=torch.Generator().manual_seed(0))
    signs = (torch.arange(2 * 1036 * 9).reshape(2, 1036, 3, 3) % 2 * 2 - 1).to(dtype)
    per_channel = [p[:, None, None] for p in (weight, bias)]
    expected = (signs.float() * per_channel[0] + per_channel[1]).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = signs.contiguous(memory_format=layout)
        assert torch.equal(dx.group_norm_act(x, 1, weight, bias, 1e-30, "identity"), expected)
print(_C.cpu_capability())
"""
CAPABILITIES = ["baseline", "neon", "avx2", "avx512"]


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_half_is_loaded_and_rounded_as_torch_does(capability):
    # With torch's best, torch would serve group_norm_act where ours are the least.
    chosen = {"DIFFUSION_EXT_CPU_CAPABILITY": capability, "ATEN_CPU_CAPABILITY": "default"}
    run = subprocess.run(
        [sys.executable, "-c", CONVERSIONS],
        env=os.environ | chosen,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    used = CAPABILITIES.index(run.stdout.strip())  # a lower one where the processor has not this
    assert used <= CAPABILITIES.index(capability)
