"""Values that people and programs hand over, right and odd, and what a call makes of them."""

import math
import os

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import diffusion_ext as dx

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)

SCHEDULES = [
    dx.NoiseSchedule.linear(1),
    dx.NoiseSchedule.linear(20),
    dx.NoiseSchedule.cosine(9),
    dx.NoiseSchedule.scaled_linear(30),
    dx.NoiseSchedule.course(20),
    dx.NoiseSchedule.cosine(12).zero_terminal_snr(),
]


@st.composite
def sized(draw, shape, dtype, kind=None):
    """A tensor of a shape and dtype, in any layout, with values ordinary or extreme."""
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    kind = kind or draw(st.sampled_from(["normal", "normal", "zero", "huge", "tiny", "mixed"]))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype.is_floating_point:
        largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
        scale = {"normal": 1.0, "zero": 0.0, "huge": largest / 8, "tiny": least, "mixed": 1.0}[kind]
        values = (values * scale).clamp(-largest, largest)
        if kind == "mixed":
            values = torch.where(values > 1, largest, values)
    elif not dtype.is_complex:
        values = values.abs() * 3
    x = values.to(dtype)
    layout = draw(st.sampled_from(["plain", "channels_last", "transposed", "sliced", "expanded"]))
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and x.dim() >= 1:
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and x.dim() >= 1 and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


shapes = st.lists(st.integers(0, 6), min_size=0, max_size=5).map(tuple)
sample_shapes = st.one_of(
    st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
)
floats = st.sampled_from(FLOATS)


@st.composite
def tensors(draw):
    """Any tensor at all."""
    return draw(sized(draw(shapes), draw(st.sampled_from(FLOATS + OTHERS))))


numbers = st.one_of(
    st.integers(-3, 50),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0, -1, 2**31, 2**63 - 1, 2**63, -(2**63), 2**64, 1e-300, 1e300, math.nan]),
)
anything = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.sampled_from(["", "epsilon", "no such thing", b"bytes"]),
    st.sampled_from([[], {}, (), (1,), [0.5, "x"], object(), int, torch.float32]),
    numbers.map(lambda v: np.float64(v) if isinstance(v, float) else np.array(v % 7)),
    st.sampled_from([np.array([1, 2]), np.array(["a"]), np.zeros((2, 0)), np.float32(0.5)]),
    tensors(),
    st.sampled_from([torch.tensor(3), torch.tensor([1, 2]), torch.zeros(2, 3).to_sparse()]),
    st.sampled_from([torch.empty(2, 3, device="meta"), torch.Generator(), *SCHEDULES]),
)


@st.composite
def call(draw, arguments):
    """Keyword arguments, of which none, one or two are odd, or missing, or too many.

    Args: arguments: name -> a strategy of right values.
    """
    chosen = draw(st.fixed_dictionaries(arguments))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        name = draw(st.sampled_from(sorted(chosen)))
        chosen[name] = draw(anything)
    return chosen


def is_finite(value) -> bool:
    """Whether every number in a value is finite and ordinary: what cannot overflow."""
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout is not torch.strided:
            return False
        if not value.is_floating_point():
            return True
        limit = torch.finfo(value.dtype).max ** 0.25
        return bool((value.isfinite() & (value.abs() <= limit)).all())
    if isinstance(value, float):
        return abs(value) < 1e4
    return True


def has_nan(value) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    if isinstance(value, (tuple, list)):
        return any(map(has_nan, value))
    if isinstance(value, dx.StepTable):
        return bool(np.isnan(value.weights).any())
    return False


CASES = int(os.environ.get("DIFFUSION_EXT_FUZZ", "12"))
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=CASES <= 12,
    database=None,
)
schedules = st.sampled_from(SCHEDULES)
DOCUMENTED = (ValueError, TypeError)


def survives(function, arguments):
    """A call ends in a result, without NaN where what came was finite, or in a documented error
    that names an argument."""
    result, said = None, " ".join(arguments)
    try:
        result = function(**arguments)
    except DOCUMENTED as error:
        said = str(error)
    assert any(name in said for name in arguments), said
    if all(map(is_finite, arguments.values())):
        assert not has_nan(result)
    return result
