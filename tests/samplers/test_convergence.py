"""How fast the samplers approach the solution where it is known: benchmarks/convergence.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import diffusion_ext as dx

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.convergence import MU, SCHEDULE, C, best_model, error

# Sampler -> options, and the order: halving the step divides the error by 2^order.
ORDERS = {
    "euler": (dx.euler, {}, 1),
    "heun": (dx.heun, {}, 2),
    "dpm2": (dx.dpm2, {}, 2),
    "dpm2_ancestral": (dx.dpm2_ancestral, {"eta": 0.0}, 2),
    "dpmpp_2s_ancestral": (dx.dpmpp_2s_ancestral, {"eta": 0.0}, 2),
    "dpmpp_sde": (dx.dpmpp_sde, {"eta": 0.0}, 2),
    "dpmpp_2m, order 1": (dx.dpmpp_2m, {"order": 1}, 1),
    "dpmpp_2m": (dx.dpmpp_2m, {}, 2),
    "dpmpp_2m, heun": (dx.dpmpp_2m, {"solver": "heun"}, 2),
    # As the authors' code and diffusers weight the second difference; a smaller error, not faster.
    "dpmpp_2m, order 3": (dx.dpmpp_2m, {"order": 3}, 2),
    "dpmpp_3m_sde": (dx.dpmpp_3m_sde, {"eta": 0.0}, 2),
    "plms": (dx.plms, {}, 2),  # these two take the steps for even, which they are not
    "ipndm": (dx.ipndm, {}, 2),
    **{f"lms, order {k}": (dx.lms, {"order": k}, k) for k in (1, 2, 3, 4)},
    **{f"deis, order {k}": (dx.deis, {"order": k}, k) for k in (1, 2, 3, 4)},
    **{
        f"unipc {b}, order {k}": (dx.unipc, {"order": k, "variant": b}, k + 1)
        for k in (1, 2)
        for b in ("bh1", "bh2")
    },
    **{f"unip, order {k}": (dx.unipc, {"order": k, "corrector": False}, k) for k in (1, 2, 3)},
    "sa_solver, no corrector": (dx.sa_solver, {"corrector_order": 0, "tau": 0.0}, 2),
    "sa_solver, order 2 and 3": (dx.sa_solver, {"corrector_order": 3, "tau": 0.0}, 3),
}


@pytest.mark.parametrize("name", ORDERS)
def test_halving_the_step_divides_the_error(name):
    make, options, order = ORDERS[name]
    ratio = error(make, options, 160) / error(make, options, 320)
    assert math.log2(ratio) > order - 0.25


SDES = {
    "ddpm": lambda s, n: dx.ddim(s, n, eta=1.0, spacing="exponential", prediction="x0"),
    "euler_ancestral": lambda s, n: dx.euler_ancestral(s, n, "exponential", prediction="x0"),
    "euler, churn": lambda s, n: dx.euler(s, n, "exponential", prediction="x0", s_churn=20.0),
    "heun, churn": lambda s, n: dx.heun(s, n, "exponential", prediction="x0", s_churn=20.0),
    "dpm2_ancestral": lambda s, n: dx.dpm2_ancestral(s, n, "exponential", prediction="x0"),
    "dpmpp_2s_ancestral": lambda s, n: dx.dpmpp_2s_ancestral(s, n, "exponential", prediction="x0"),
    "dpmpp_sde": lambda s, n: dx.dpmpp_sde(s, n, "exponential", prediction="x0"),
    "dpmpp_2m_sde": lambda s, n: dx.dpmpp_2m_sde(s, n, "exponential", prediction="x0"),
    "dpmpp_3m_sde": lambda s, n: dx.dpmpp_3m_sde(s, n, "exponential", prediction="x0"),
    "sa_solver": lambda s, n: dx.sa_solver(s, n, "exponential", prediction="x0", interval=(0, 1e9)),
}


@pytest.mark.parametrize("name", SDES)
def test_samples_with_noise_are_the_datas(name):
    """300 steps, 40000 numbers: their mean and deviation are those of the Gaussian."""
    table, shape = SDES[name](SCHEDULE, 300), (4, 1, 100, 100)
    model = best_model(table)
    images = dx.sample(model, shape, table, dtype=torch.float64, progress=False).images
    assert images.mean().item() == pytest.approx(MU, abs=0.015)
    assert images.std().item() == pytest.approx(C, abs=0.03)
