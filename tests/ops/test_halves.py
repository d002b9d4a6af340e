"""Half precision on the CPU: its conversions are torch's, on every instruction set."""

import os
import subprocess
import sys

import pytest

# Every half times numbers that take it to ties, subnormals and infinity: in whole vectors, and in
# samples of 13, which fill none.
CONVERSIONS = """
import sys
import torch
from diffusion_ext import _C
from diffusion_ext.ops.perturb import perturb_by_table

every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    for x in (every.view(dtype)[None], every.view(dtype)[3:].reshape(-1, 13)):
        for factor in (1.0, 0.5, 1 / 3, 1 + 2.0**-11, 1 + 2.0**-8, 2.0**-10, 3.0):
            signal, sigma = torch.tensor([factor]), torch.zeros(1)
            t, noise = torch.zeros(len(x), dtype=torch.int64), torch.zeros_like(x)
            ours, _ = perturb_by_table(x, t, signal, sigma, noise)
            expected = (factor * x.float() + 0).to(dtype)
            assert torch.equal(ours.isnan(), expected.isnan())
            numbers = ~expected.isnan()
            bits = [y[numbers].view(torch.int16) for y in (ours, expected)]
            assert torch.equal(*bits), (dtype, factor, x[numbers][bits[0] != bits[1]][:3])
print(_C.cpu_capability())
"""


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_half_is_loaded_and_rounded_as_torch_does(capability):
    run = subprocess.run(
        [sys.executable, "-c", CONVERSIONS],
        env={**os.environ, "DIFFUSION_EXT_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] in ("baseline", "avx2", "avx512")
