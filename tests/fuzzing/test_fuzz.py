"""Every public function with arguments right and odd: a result, or a documented error.

DIFFUSION_EXT_FUZZ=500 python -m pytest tests/fuzzing: 500 cases of each function, for a few.
"""

import contextlib
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from odd import (
    DOCUMENTED,
    SCHEDULES,
    anything,
    call,
    floats,
    fuzzed,
    sample_shapes,
    schedules,
    sized,
    survives,
)

import diffusion_ext as dx


def timesteps(batch, last, least=1):
    """An int, or int64 [batch]."""
    one = st.integers(least, last)
    return one | st.lists(one, min_size=batch, max_size=batch).map(
        lambda t: torch.tensor(t, dtype=torch.int64)
    )


def noise_or_seeds(data, shape, dtype, neither=True):
    """Right values of the arguments noise and seeds, of which one is wanted at most."""
    kinds = {
        "noise": {"noise": sized(shape, dtype), "seeds": st.none()},
        "generator": {"noise": st.just(torch.Generator()), "seeds": st.none()},
        "seeds": {"noise": st.none(), "seeds": seeds(shape[0])},
        "neither": {"noise": st.none(), "seeds": st.none()},
    }
    return kinds[data.draw(st.sampled_from([kind for kind in kinds if neither or kind == "seeds"]))]


def seeds(batch):
    one = st.integers(-(2**63), 2**63 - 1)
    return st.integers(0, 2**40) | st.lists(one, min_size=batch, max_size=batch).map(
        lambda t: torch.tensor(t, dtype=torch.int64)
    )


@st.composite
def noised(draw):
    """x, schedule and t that go together: (shape, dtype, schedule)."""
    shape = draw(sample_shapes)
    return shape, draw(floats), draw(schedules)


@fuzzed
@given(st.data())
def test_perturb(data):
    shape, dtype, schedule = data.draw(noised())
    arguments = {
        "x0": sized(shape, dtype),
        "t": timesteps(shape[0], schedule.timesteps, 0),
        "schedule": st.just(schedule),
        **noise_or_seeds(data, shape, dtype),
        "target": st.sampled_from(["noise", "v", None]),
        "noising": st.sampled_from(["standard", "course"]),
    }
    survives(dx.perturb, data.draw(call(arguments)))


@fuzzed
@given(st.data())
def test_denoising_loss(data):
    shape, dtype, schedule = data.draw(noised())
    arguments = {
        "model_output": sized(shape, dtype),
        "x0": sized(shape, dtype),
        "t": timesteps(shape[0], schedule.timesteps),
        "schedule": st.just(schedule),
        **noise_or_seeds(data, shape, dtype, neither=False),
        "prediction": st.sampled_from(["epsilon", "v", "x0", "flow"]),
        "delta": st.none() | st.floats(1e-3, 10),
        "noising": st.sampled_from(["standard", "course"]),
    }
    survives(dx.denoising_loss, data.draw(call(arguments)))


@fuzzed
@given(st.data())
def test_ddpm_step(data):
    shape, dtype, schedule = data.draw(noised())
    arguments = {
        "x": sized(shape, dtype),
        "model_output": sized(shape, dtype),
        "t": timesteps(shape[0], schedule.timesteps),
        "schedule": st.just(schedule),
        **noise_or_seeds(data, shape, dtype),
    }
    survives(dx.ddpm_step, data.draw(call(arguments)))


@fuzzed
@given(st.data())
def test_ddim_step(data):
    shape, dtype, schedule = data.draw(noised())
    arguments = {
        "x": sized(shape, dtype),
        "model_output": sized(shape, dtype),
        "t": timesteps(shape[0], schedule.timesteps),
        "t_prev": timesteps(shape[0], schedule.timesteps, 0),
        "schedule": st.just(schedule),
        "eta": st.floats(0, 1),
        **noise_or_seeds(data, shape, dtype),
    }
    survives(dx.ddim_step, data.draw(call(arguments)))


@fuzzed
@given(st.data())
def test_sampler_step(data):
    shape, dtype, _ = data.draw(noised())
    make = data.draw(st.sampled_from([dx.ddim, dx.dpmpp_2m, dx.unipc, dx.ipndm]))
    table = make(SCHEDULES[1], 5)
    coefficients, times = table.tensors("cpu", dtype)
    batch = data.draw(st.sampled_from([(), (shape[0],)]))
    source = data.draw(st.booleans())
    x = data.draw(sized(shape, dtype))
    arguments = {
        "x": st.just(x),
        "model_output": sized(shape, dtype),
        "coefficients": st.just(coefficients),
        "timesteps": st.just(times),
        "row": st.integers(0, 4).map(lambda i: torch.full(batch, i)),
        "noise": sized(shape, dtype) if source else st.none(),
        "seeds": st.none() if source else st.just(torch.arange(shape[0])),
        "history": st.none(),
        "clip": st.none() | st.floats(0.1, 3),
        "guidance": st.just(1.0) | st.floats(0, 8),
        "return_x0": st.booleans(),
        "slots": st.just(table.new_slots(x)),
    }
    survives(dx.sampler_step, data.draw(call(arguments)))


@fuzzed
@given(st.data())
def test_group_norm_act(data):
    groups, per_group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    channels, batch = groups * per_group, data.draw(st.integers(0, 3))
    rest = data.draw(st.lists(st.integers(1, 9), max_size=3).map(tuple))
    dtype = data.draw(floats)

    def optional(*shape):
        return st.none() | sized(shape, dtype)

    arguments = {
        "x": sized((batch, channels, *rest), dtype),
        "num_groups": st.just(groups),
        "weight": optional(channels),
        "bias": optional(channels),
        "eps": st.floats(1e-8, 1),
        "act": st.sampled_from(["silu", "gelu", "gelu_tanh", "mish", "identity", "relu"]),
        "scale": optional(batch, channels),
        "shift": optional(batch, channels),
        "post_scale": optional(batch, channels),
        "post_shift": optional(batch, channels),
        "pre_shift": optional(batch, channels),
    }
    survives(dx.group_norm_act, data.draw(call(arguments)))


@fuzzed
@given(st.data())
def test_attention(data):
    """Of enough queries and keys that a kernel serves, and of fewer."""
    batch, heads, size = (data.draw(st.integers(0, most)) for most in (2, 3, 20))
    queries, keys = (data.draw(st.integers(0, 9) | st.integers(60, 300)) for _ in range(2))
    dtype = data.draw(floats)
    lead = data.draw(st.sampled_from([(batch,), (batch, heads)]))
    shapes = {"q": (*lead, queries, size), "k": (*lead, keys, size), "v": (*lead, keys, size)}
    masks = sized((queries, keys), torch.bool) | sized((1, keys), dtype, "normal")
    arguments = {
        **{name: sized(shape, dtype) for name, shape in shapes.items()},
        "mask": st.none() | masks,
        "scale": st.none() | st.floats(-2, 2),
        "causal": st.booleans(),
    }
    survives(dx.attention, data.draw(call(arguments)))


@fuzzed
@given(st.data())
def test_philox_normal(data):
    shape = data.draw(sample_shapes)
    arguments = {
        "seeds": seeds(shape[0]),
        "shape": st.just(shape),
        "step": st.integers(0, 2**31),
        "stream": st.integers(0, 3),
        "dtype": floats,
        "device": st.none() | st.just("cpu"),
    }
    result = survives(dx.philox_normal, data.draw(call(arguments)))
    assert result is None or bool(result.isfinite().all())


MODEL = dx.nn.ContextUnet(3, 8, 4, 8, norm="group").eval()


@fuzzed
@given(st.data())
def test_sample(data):
    batch = data.draw(st.integers(1, 3))
    shape = (batch, 3, 8, 8)
    table = dx.ddim(SCHEDULES[1], 2, eta=0.5)
    arguments = {
        "model": st.just(MODEL),
        "shape": st.just(shape),
        "table": st.just(table),
        "context": st.none() | st.just(torch.zeros(batch, dtype=torch.int64)),
        "guidance_scale": st.just(1.0) | st.floats(0, 4),
        "seeds": seeds(batch),
        "x_T": st.none() | sized(shape, torch.float32, "normal"),
        "noise": st.none() | st.just(lambda i, t: torch.zeros(shape)),
        "save_rate": st.none() | st.integers(1, 4),
        "engine": st.just("eager"),
        "progress": st.just(False),
        "callback": st.none() | st.just(lambda *_: None),
        "device": st.none() | st.just("cpu"),
        "dtype": st.none() | st.just(torch.float32),
        "null_context": st.none(),
        "start": st.none() | sized(shape, torch.float32, "normal"),
        "first_step": st.integers(0, 1),
        "mask": st.none() | st.just(torch.ones(1, 1, 8, 8)),
    }
    survives(lambda **given: dx.sample(**given).images, data.draw(call(arguments)))


@fuzzed
@given(st.data())
def test_context_unet(data):
    batch = data.draw(st.integers(0, 3))
    arguments = {
        "x": sized((batch, 3, 8, 8), torch.float32, "normal"),
        "t": sized((batch,), torch.float32, "normal"),
        "c": st.none() | sized((batch, 4), torch.float32, "normal"),
    }
    with torch.no_grad():
        survives(MODEL, data.draw(call(arguments)))


@fuzzed
@given(
    call(
        {
            "in_channels": st.integers(1, 3),
            "n_feat": st.just(8),
            "n_cfeat": st.integers(1, 4),
            "height": st.sampled_from([4, 8]),
            "norm": st.sampled_from(["batch", "group"]),
            "shortcut": st.sampled_from(["scaled", "zero", "random"]),
            "pool_window": st.none() | st.just(2),
        }
    )
)
def test_building_a_context_unet(arguments):
    with torch.device("meta"):
        survives(dx.nn.ContextUnet, arguments)


@fuzzed
@given(
    call(
        {
            "num_groups": st.integers(1, 4),
            "num_channels": st.just(12),
            "act": st.sampled_from(["silu", "gelu", "relu"]),
            "eps": st.floats(1e-6, 1),
            "affine": st.booleans(),
        }
    )
)
def test_building_a_group_norm(arguments):
    with torch.device("meta"):
        survives(dx.nn.GroupNormAct, arguments)


@pytest.mark.parametrize(
    "function", [dx.fuse, dx.unfuse, dx.optimize_for_sampling, dx.nn.load_context_unet]
)
def test_one_argument(function):
    @fuzzed
    @given(anything)
    def check(argument):
        with contextlib.suppress(*DOCUMENTED, FileNotFoundError):
            function(argument)

    check()


def test_the_library_is_the_one_that_is_to_be_fuzzed():
    """Under the sanitizers another one, which lies elsewhere than the package's source."""
    wanted = os.environ.get("DIFFUSION_EXT_FUZZED")
    library = pytest.importorskip("diffusion_ext._C").__file__
    assert wanted is None or library.startswith(wanted)
