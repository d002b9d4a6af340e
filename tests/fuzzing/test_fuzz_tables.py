"""Schedules and the samplers' tables, with arguments right and odd; see test_fuzz.py."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from odd import SCHEDULES, anything, call, fuzzed, is_finite, schedules, survives

import diffusion_ext as dx
from diffusion_ext.samplers import SAMPLERS, SPACINGS

COMMON = {
    "schedule": schedules,
    "steps": st.integers(1, 30),
    "spacing": st.sampled_from(SPACINGS),
    "clip": st.none() | st.floats(0.1, 3),
    "prediction": st.sampled_from(["epsilon", "v", "x0"]),
}
OWN = {
    "eta": st.floats(0, 1),
    "order": st.integers(1, 4),
    "s_churn": st.floats(0, 40),
    "s_tmin": st.floats(0, 1),
    "s_tmax": st.floats(1, 100),
    "s_noise": st.floats(0.9, 1.1),
    "solver": st.sampled_from(["midpoint", "heun"]),
    "r": st.floats(0.1, 0.9),
    "original_steps": st.integers(1, 30),
    "tau": st.floats(0, 1.5),
    "corrector_order": st.integers(0, 3),
    "interval": st.just((0.1, 0.9)),
    "variant": st.sampled_from(["bh1", "bh2"]),
    "corrector": st.booleans(),
    "shift": st.floats(0.5, 5),
}
TABLES = {
    **SAMPLERS,
    "ddpm": dx.ddpm,
    "ddim_inversion": dx.ddim_inversion,
    "flow_euler": dx.flow_euler,
    "flow_heun": dx.flow_heun,
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    known = inspect.signature(TABLES[name]).parameters
    options = {key: value for key, value in {**COMMON, **OWN}.items() if key in known}

    @fuzzed
    @given(call(options))
    def check(arguments):
        table = survives(TABLES[name], arguments)
        if table is not None and len(table.timesteps) <= 30:
            finite = all(map(is_finite, arguments.values()))
            images = dx.sample(
                lambda x, t, c: 0.1 * x, (1, 1, 2, 2), table, progress=False, dtype=torch.float64
            ).images
            assert not finite or bool(images.isfinite().all())

    check()


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear", "course", "constant"])
def test_schedules(name):
    make = getattr(dx.NoiseSchedule, name)
    right = {
        "timesteps": st.integers(1, 40),
        "beta_start": st.floats(1e-5, 1e-2),
        "beta_end": st.floats(1e-2, 0.5),
        "beta": st.floats(1e-3, 0.5),
        "offset": st.floats(1e-4, 0.1),
        "beta_max": st.floats(0.5, 0.999),
    }
    known = inspect.signature(make).parameters
    options = {key: right.get(key, anything) for key in known}

    @fuzzed
    @given(call(options))
    def check(arguments):
        survives(make, arguments)

    check()


@fuzzed
@given(st.lists(st.floats(0, 1), max_size=5) | anything)
def test_betas(betas):
    survives(dx.NoiseSchedule.from_betas, {"betas": betas})


right_tables = st.lists(st.floats(0, 1), min_size=1, max_size=4).map(np.array)


@fuzzed
@given(right_tables | anything, right_tables | anything)
def test_a_schedule_of_tables(beta, alpha_bar):
    survives(dx.NoiseSchedule, {"beta": beta, "alpha_bar": alpha_bar})


@fuzzed
@given(
    call(
        {"table": st.just(dx.ddim(SCHEDULES[1], 4)), "scale": st.floats(0, 9), "interval": anything}
    )
)
def test_guided(arguments):
    survives(dx.guided, arguments)
