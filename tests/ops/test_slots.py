"""sampler_step with slots: what a row reads, what it keeps, on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import DTYPES, EMULATED, KERNELS, LAYOUTS, assert_close, lay, same_bits

import diffusion_ext as dx
from diffusion_ext.ops import reference
from diffusion_ext.ops.backend import kernels
from diffusion_ext.ops.row_shape import RowShape
from diffusion_ext.ops.sampler_step import step_of_row

# Of the slots; writes; scales of their own.
ROW_SHAPES = [RowShape(1, 1), RowShape(2, 1), RowShape(3, 2, True), RowShape(6, 2)]
SHAPES = [(3, 1), (2, 3, 7, 5), (3, 4, 8, 8), (2, 257), (2, 6, 3, 4, 5)]
ROWS = 5


def table(shape: RowShape, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of every kind: a write to no slot, to the same slot twice, weights of 0."""
    here = torch.empty(0).device
    with torch.device("cpu"):  # the same table for every device
        draw = torch.Generator().manual_seed(seed)
        weights = torch.randn(ROWS, shape.width, generator=draw)
        weights[torch.rand(ROWS, shape.width, generator=draw) < 0.3] = 0
        for i in range(shape.writes):
            slots = torch.randint(-1, shape.slots, (ROWS,), generator=draw)
            weights[:, shape.slot(i)] = slots.to(weights.dtype)
        if shape.writes == 2:
            weights[1, shape.slot(1)] = weights[1, shape.slot(0)] = 0
        if shape.guided:
            weights[:, -1] = torch.tensor([1.0, 2.5, 0.0, 1.0, -1.0])
        return weights.to(here), torch.arange(ROWS, 0, -1).to(here)


def slots_like(x: torch.Tensor, count: int, layout: str) -> torch.Tensor:
    slots = torch.randn(count, *x.shape).to(x.dtype).to(x.device)
    if layout == "as x":
        strides = (x.numel(), *torch.empty_like(x).stride())
        return x.new_empty_strided(slots.shape, strides).copy_(slots)
    return lay(slots, layout)


def sources(shape, dtype):
    return ({}, {"noise": torch.randn(shape).to(dtype)}, {"seeds": torch.arange(shape[0]) - 1})


def expected_step(x, m, tensors, row, slots, options):
    options = {k: v.double() if k == "noise" else v for k, v in options.items()}
    arguments = (options.pop("noise", None), options.pop("seeds", None), slots.double())
    coefficients, timesteps = tensors
    return reference.sampler_step_with_slots(
        x.double(), m.double(), coefficients.double(), timesteps, row, *arguments,
        options.get("clip"), options.get("guidance", 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
def test_agrees_with_reference(dtype, shape, row_shape):
    x, m, m2 = (torch.randn(shape).to(dtype) for _ in range(3))
    tensors = table(row_shape)
    for row in (*map(torch.tensor, range(ROWS)), torch.tensor([4, 1, 2])[: shape[0]]):
        for source, clip in itertools.product(sources(shape, dtype), (None, 0.8)):
            slots = slots_like(x, row_shape.slots, "contiguous")
            output = torch.cat([m, m2]) if clip else m
            options = {**source, "clip": clip, "guidance": 2.0}
            wanted = expected_step(x, output, tensors, row, slots, options)
            out, x0 = dx.sampler_step(
                x, output, *tensors, row, **options, return_x0=True, slots=slots
            )
            for ours, theirs in zip((out, x0, slots), wanted, strict=True):
                assert_close(ours, theirs, dtype, 4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_slots", ["as x", "contiguous", "strided"])
def test_layouts_give_the_same_bits(layout, of_slots):
    values, m = torch.randn(2, 4, 8, 6), torch.randn(2, 4, 8, 6)
    x, shape = lay(values, layout), RowShape(2, 2)
    tensors, row = table(shape), torch.tensor([1, 3])
    slots = slots_like(x, 2, of_slots)
    plain = slots.clone(memory_format=torch.contiguous_format)
    options = {"seeds": torch.tensor([3, 4]), "clip": 1.0}
    wanted = dx.sampler_step(x.contiguous(), m, *tensors, row, **options, slots=plain)
    assert same_bits(dx.sampler_step(x, m, *tensors, row, **options, slots=slots), wanted)
    assert same_bits(slots, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row_shape", ROW_SHAPES, ids=str)
def test_slots_apart_are_read_and_left(dtype, layout, row_shape):
    """A tensor for each slot, and new ones for what a row writes: the bits of those in place."""
    x, m = (lay(torch.randn(2, 3, 7, 5).to(dtype), layout) for _ in range(2))
    coefficients, timesteps = table(RowShape(row_shape.slots, row_shape.writes))
    shape = RowShape(row_shape.slots, row_shape.writes)
    seeds = torch.tensor([3, 4])
    for i, row in enumerate(coefficients):
        apart = [lay(torch.randn(x.shape).to(dtype), layout) for _ in range(shape.slots)]
        before, slots = [slot.clone() for slot in apart], torch.stack(apart)
        out, x0, *written = step_of_row(x, m, row, int(timesteps[i]), None, seeds, apart, 0.8, True)
        wanted = dx.sampler_step(
            x, m, coefficients, timesteps, torch.tensor(i), seeds=seeds, clip=0.8, slots=slots,
            return_x0=True,
        )  # fmt: skip
        assert same_bits(out, wanted[0])
        assert same_bits(x0, wanted[1])
        assert len(written) == shape.writes
        assert all(same_bits(a, b) for a, b in zip(apart, before, strict=True))
        for write, made in enumerate(written):
            slot = int(row[shape.slot(write)])
            later = [int(row[shape.slot(w)]) for w in range(write + 1, shape.writes)]
            if slot >= 0 and slot not in later:  # of two writes to a slot the later one stays
                assert same_bits(made, slots[slot])


def test_a_row_without_slots():
    x, m = torch.randn(2, 3), torch.randn(2, 3)
    row = torch.tensor([1.0, -1.0, 0.5, 0.25, 0.1, 9.0, 0.0])  # 9: of a slot that is not there
    out, x0 = step_of_row(x, m, row, 1, None, None, [], None, True)
    assert_close(x0, x - m)
    assert_close(out, 0.5 * x + 0.25 * m + 0.1 * (x - m))
    (alone,) = step_of_row(x, m, row, 1, None, None, [], None, False)
    assert same_bits(alone, out)


def test_a_row_has_gradients():
    x, m, slot = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    row = torch.tensor([0.0, 0.0, 0.5, 0.25, 0.0, 2.0, 0.0])
    step_of_row(x, m, row, 1, None, None, [slot], None, False)[0].sum().backward()
    for tensor, weight in ((x, 0.5), (m, 0.25), (slot, 2.0)):
        assert_close(tensor.grad, torch.full((2, 3), weight))


SEVEN = [torch.zeros(2, 3)] * 7


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"slots": SEVEN}, ValueError, "slots: wanted at most 6, got 7"),
        ({"slots": [torch.zeros(2, 4)]}, ValueError, r"slots\[0\]"),
        ({"slots": [torch.zeros(2, 3).double()]}, TypeError, r"slots\[0\]"),
        ({"slots": SEVEN[:2]}, ValueError, r"row: wanted shape \[8\], .*got \[7\]"),
        ({"model_output": torch.zeros(4, 3)}, ValueError, "model_output"),
        ({"row": torch.zeros(1, 7)}, ValueError, r"row: wanted shape \[7\]"),
        ({"row": torch.zeros(7).double()}, TypeError, "row: wanted dtype"),
        ({"noise": torch.zeros(3)}, ValueError, "noise"),
    ],
)
def test_a_row_that_does_not_fit(given, error, message):
    arguments = {"x": SEVEN[0], "model_output": SEVEN[0], "row": torch.zeros(7), "timestep": 1}
    arguments |= {"noise": None, "seeds": None, "slots": [], "clip": None, "return_x0": True}
    with pytest.raises(error, match=message):
        step_of_row(**arguments | given)


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned contiguous"])
def test_in_place_has_the_same_bits(dtype, layout):
    x, m = (lay(torch.randn(2, 4, 7, 5).to(dtype), layout) for _ in range(2))
    tensors, row = table(RowShape(3, 2, True)), torch.tensor([2, 4])
    apart, in_place = (slots_like(x, 3, "as x") for _ in range(2))
    in_place.copy_(apart)
    wanted = dx.sampler_step(x, m, *tensors, row, slots=apart)
    kernels().sampler_step_(x, m, *tensors, row, None, None, in_place, None, 1.0)
    assert same_bits(x, wanted)
    assert same_bits(in_place, apart)


def test_a_weight_of_0_reads_nothing():
    """Slots hold NaN until they are written; a row that does not want them does not see it."""
    x, m = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    shape = RowShape(2, 1)
    weights = torch.zeros(1, shape.width)
    weights[0, :5] = torch.tensor([1.0, -1.0, 0.5, 0.25, 0.0])
    weights[0, shape.slot(0)] = 1
    weights[0, shape.write(0)] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    slots = torch.full((2, *x.shape), torch.nan)
    out = dx.sampler_step(x, m, weights, torch.tensor([1]), torch.tensor(0), slots=slots)
    assert_close(out, 0.5 * x + 0.25 * m)
    assert slots[0].isnan().all()
    assert_close(slots[1], x - m)


def test_a_slot_is_read_before_it_is_written():
    """x' and the write both read slot 0, which the write replaces."""
    x, m, shape = torch.randn(2, 3, 4), torch.randn(2, 3, 4), RowShape(1, 1)
    weights = torch.zeros(1, shape.width)
    weights[0, shape.next] = torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0])
    weights[0, shape.write(0)] = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0])
    slots = torch.randn(1, *x.shape)
    before = slots.clone()
    out = dx.sampler_step(x, m, weights, torch.tensor([1]), torch.tensor(0), slots=slots)
    assert_close(out, x + 2 * before[0])
    assert_close(slots[0], m - before[0])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty(shape):
    x, slots = torch.zeros(shape), torch.zeros(2, *shape)
    out = dx.sampler_step(x, x, *table(RowShape(2, 1)), torch.tensor(1), slots=slots)
    assert out.shape == shape


def test_one_slot_without_writes_receives_x0():
    tensors = dx.dpmpp_2m(dx.NoiseSchedule.linear(100), 10, clip=0.7).tensors(torch.empty(0).device)
    x, m, row = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor(4)
    history = torch.randn_like(x)
    slots = history[None].clone()
    wanted = dx.sampler_step(x, m, *tensors, row, history=history, clip=0.7, return_x0=True)
    ours = dx.sampler_step(x, m, *tensors, row, slots=slots, clip=0.7, return_x0=True)
    assert all(map(same_bits, ours, wanted))
    assert same_bits(slots[0], wanted[1])
    out = dx.sampler_step(x, m, *tensors, row, slots=history[None], clip=0.7)
    assert same_bits(out, wanted[0])


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_the_one_slot_may_be_a_sample_of_its_own(layout):
    """The kernels take [B, *] for [1, B, *]."""
    x, m, history = (lay(torch.randn(2, 4, 6, 5), layout) for _ in range(3))
    step = (*dx.dpmpp_2m(dx.NoiseSchedule.linear(100), 10).tensors(x.device), torch.tensor(4))
    slots, other = history.clone()[None], x.clone()
    kernels().sampler_step_(x, m, *step, None, None, history, None, 1.0)
    kernels().sampler_step_(other, m, *step, None, None, slots, None, 1.0)
    assert same_bits(x, other)
    assert same_bits(history, slots[0])


def test_a_scale_of_1_is_the_conditional_output():
    """To the bit, and whatever the other half is: the loop leaves it out."""
    x, cond = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    weights = torch.cat([torch.randn(1, 7), torch.ones(1, 1)], dim=1)
    tensors = (weights.to(x.device), torch.tensor([1]), torch.tensor(0))
    both = torch.cat([torch.full_like(cond, torch.nan), cond])
    assert same_bits(dx.sampler_step(x, both, *tensors), dx.sampler_step(x, cond, *tensors))
    plain = (weights[:, :7], *tensors[1:])
    assert same_bits(dx.sampler_step(x, both, *plain), dx.sampler_step(x, cond, *plain))


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned contiguous"])
def test_the_bits_of_the_cpu(dtype, shape, layout):
    x, m, m2 = (lay(torch.randn(shape).to(dtype), layout) for _ in range(3))
    rows = torch.tensor([4, 1, 2])[: shape[0]]
    for row_shape, source in itertools.product(ROW_SHAPES, sources(shape, dtype)):
        tensors, slots = table(row_shape), slots_like(x, row_shape.slots, "as x")
        output, on_cpu = torch.cat([m, m2]), slots.clone().cpu()
        arguments = (x, output, *tensors, rows)
        ours = dx.sampler_step(*arguments, **source, clip=0.8, slots=slots)
        with torch.device("cpu"), dx.use_backend("native"):
            arguments = [a.cpu() for a in arguments]
            source = {k: v.cpu() for k, v in source.items()}
            theirs = dx.sampler_step(*arguments, **source, clip=0.8, slots=on_cpu)
        assert same_bits(ours.cpu(), theirs)
        assert same_bits(slots.cpu(), on_cpu)


def test_gradients_flow_through_slots():
    """Of two steps, the second of which reads what the first has kept."""
    shape, draw = RowShape(2, 1), torch.Generator().manual_seed(0)
    drawn = torch.randn(2, shape.width, generator=draw, dtype=torch.float64, device="cpu")
    weights = drawn.to(torch.empty(0).device)
    weights[:, shape.slot(0)] = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def two_steps(x, m, n, kept):
        slots = torch.stack([kept, torch.zeros_like(kept)])
        x = dx.sampler_step(x, m, weights, torch.tensor([2, 1]), torch.tensor(0), slots=slots)
        x = dx.sampler_step(x, n, weights, torch.tensor([2, 1]), torch.tensor(1), slots=slots)
        return x, slots.clone()

    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(two_steps, inputs)


BAD = {
    "of other samples": (torch.zeros(1, 2, 3), ValueError, r"slots: wanted shape \[S, 2, 4\]"),
    "of one dimension less": (torch.zeros(2, 4), ValueError, "slots: wanted shape"),
    "too many": (torch.zeros(7, 2, 4), ValueError, "slots: wanted shape"),
    "of another dtype": (torch.zeros(1, 2, 4).half(), TypeError, "slots: wanted x's dtype"),
    "no tensor": (3, TypeError, "slots: wanted a tensor, got int"),
    "for other rows": (torch.zeros(3, 2, 4), ValueError, "coefficients: wanted .* 3 slots"),
}


@pytest.mark.backends("cpu", "reference")
@pytest.mark.parametrize("bad", BAD)
def test_bad_slots(bad):
    slots, error, message = BAD[bad]
    x, tensors = torch.zeros(2, 4), table(RowShape(1, 1))
    with pytest.raises(error, match=message):
        dx.sampler_step(x, x, *tensors, torch.tensor(0), slots=slots)


def test_history_and_slots_are_one_too_many():
    x, tensors = torch.zeros(2, 4), table(RowShape(1, 1))
    with pytest.raises(ValueError, match="history, slots: wanted one"):
        dx.sampler_step(x, x, *tensors, torch.tensor(0), history=x, slots=x[None])


@pytest.mark.backends("cpu", *EMULATED)
def test_the_kernels_check_where_they_write(backend):
    """A table that nobody made: a slot beyond those that are there."""
    shape, x = RowShape(2, 1), torch.zeros(2, 3, 4)
    weights, timesteps = table(shape)
    weights[:, shape.slot(0)] = 2.0
    wanted = "writes to a slot beyond the 2" if backend == "cpu" else "slot out of range"
    with pytest.raises(RuntimeError, match=wanted):
        dx.sampler_step(x, x, weights, timesteps, torch.tensor(0), slots=torch.zeros(2, *x.shape))
