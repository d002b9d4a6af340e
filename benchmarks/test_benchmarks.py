"""The suite: see suite.py for the works, conftest.py for how a row is run.

No test asserts a time: the report compares them with benchmarks/targets.
"""

import pytest

from .turns import replay

pytestmark = [
    pytest.mark.benchmark(timer=replay),
    pytest.mark.filterwarnings("ignore"),  # torch.compile's advice
]


def test_sampler_step(measure, work, implementation):
    measure(work, implementation)


def test_perturb(measure, work, implementation):
    measure(work, implementation)


def test_denoising_loss(measure, work, implementation):
    measure(work, implementation)


def test_philox_normal(measure, work, implementation):
    measure(work, implementation)


def test_group_norm_act(measure, work, implementation):
    measure(work, implementation)


def test_forward(measure, work, implementation):
    measure(work, implementation)


def test_diffusers_forward(measure, work, implementation):
    measure(work, implementation)


def test_transformer_forward(measure, work, implementation):
    measure(work, implementation)


def test_training_step(measure, work, implementation):
    measure(work, implementation)


def test_sampling(measure, work, implementation):
    measure(work, implementation)


def test_pipeline(measure, work, implementation):
    measure(work, implementation)
