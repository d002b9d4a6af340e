"""How fast the samplers approach the solution where it is known: data that are one Gaussian.

For data of mean MU and deviation C the best x0 of y = x/signal is MU + C²/(C² + r²)·(y - MU), and
the probability flow ODE keeps (y - MU)/√(C² + r²).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from counterparts import draw, ratios, run

import diffusion_ext as dx

MU, C = 0.3, 0.7
# r = sigma/signal from 0.05 to 1e5: so much noise that the first steps, of lower order while there
# is little to look back at, do not hide the order of the rest.
RATIOS = np.geomspace(0.05, 1e5, 1000)
ALPHA_BAR = 1 / (1 + RATIOS**2)
SCHEDULE = dx.NoiseSchedule.from_betas(1 - ALPHA_BAR / np.append(1, ALPHA_BAR[:-1]))

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


def best_x0(y, r):
    return MU + C * C / (C * C + r * r) * (y - MU)


def error(make, steps: int, options: dict) -> float:
    """At the last level above 0, where the last step, of first order, starts from."""
    table = make(SCHEDULE, steps + 1, "exponential", prediction="x0", **options)
    r = ratios(table)
    y = draw(0) * r[0]
    last = len(table) - 1
    solution = MU + (y - MU) * math.hypot(C, r[last]) / math.hypot(C, r[0])
    return (run(table, y, best_x0)[last] - solution).abs().max().item()


@pytest.mark.parametrize("name", ORDERS)
def test_halving_the_step_divides_the_error(name):
    make, options, order = ORDERS[name]
    ratio = error(make, 160, options) / error(make, 320, options)
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

    def model(x, t, c):
        r = torch.from_numpy(ratios(table)[:-1].numpy())[(table.times == t[0].item()).argmax()]
        return best_x0(x * (1 + r * r).sqrt(), r)

    images = dx.sample(model, shape, table, dtype=torch.float64, progress=False).images
    assert images.mean().item() == pytest.approx(MU, abs=0.015)
    assert images.std().item() == pytest.approx(C, abs=0.03)
