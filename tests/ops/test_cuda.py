"""The CUDA kernels: the CPU's bits, whatever the order of the threads, on every kind of device."""

import itertools

import pytest
import torch
from harness import DEVICES, DTYPES, EMULATED, assert_close, lay, pretend, same_bits

import diffusion_ext as dx
from diffusion_ext.ops.denoising_loss import loss_and_gradient

SCHEDULE = dx.NoiseSchedule.linear(100)

# Odd sizes; channels and pixels that four divides, each alone and both.
SHAPES = [(3, 1), (2, 257), (2, 3, 7, 5), (2, 3, 4, 4), (2, 8, 5, 3), (3, 4, 8, 8), (2, 6, 3, 4, 5)]

# Of x, and of what comes with it.
LAYOUTS = [
    ("contiguous", "contiguous"),
    ("contiguous", "misaligned contiguous"),
    ("misaligned contiguous", "contiguous"),
    ("channels_last", "channels_last"),
    ("channels_last", "misaligned channels_last"),
    ("misaligned channels_last", "channels_last"),
    ("strided", "channels_last"),
]


def on_cpu(call, *args, **options):
    """What the CPU kernels make of the same values."""
    with torch.device("cpu"), dx.use_backend("native"):
        args = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
        options = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return call(*args, **options)


def assert_same_bits_on_cpu(call, *args, **options):
    ours, theirs = call(*args, **options), on_cpu(call, *args, **options)
    for a, b in zip(ours, theirs, strict=True):
        assert a.stride() == b.stride()
        assert same_bits(a.cpu(), b)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000)])
def test_philox_normal_has_the_bits_of_the_cpu(dtype, shape):
    seeds = torch.tensor([3, -5, 2**62])[: shape[0]]
    for step, stream in ((0, 0), (99, 1), (2**32 - 1, 2**32 - 1)):
        assert_same_bits_on_cpu(dx.philox_normal, seeds, shape, step, stream, dtype)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_perturb_has_the_bits_of_the_cpu(dtype, shape, layouts):
    x0, noise = (lay(torch.randn(shape).to(dtype), layout) for layout in layouts)
    t = torch.tensor([100, 0, 57])[: shape[0]]
    for source in ({"noise": noise}, {"seeds": torch.arange(shape[0])}):
        for target, noising in (("noise", "standard"), ("v", "course")):
            options = {"target": target, "noising": noising, **source}
            assert_same_bits_on_cpu(dx.perturb, x0, t, SCHEDULE, **options)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_gradients_of_the_loss_have_the_bits_of_the_cpu(dtype, shape, layouts):
    def gradient(output, x0, t, seeds, prediction, delta):
        leaf = output.detach().requires_grad_()
        losses = dx.denoising_loss(
            leaf, x0, t, SCHEDULE, seeds=seeds, prediction=prediction, delta=delta
        )
        return torch.autograd.grad(losses, leaf, torch.full_like(losses, 0.3))[0]

    output, x0 = (lay(torch.randn(shape).to(dtype), layout) for layout in layouts)
    t, seeds = torch.tensor([100, 0, 57])[: shape[0]], torch.arange(shape[0])
    for prediction, delta in (("epsilon", None), ("v", 0.7), ("x0", None)):
        assert_same_bits_on_cpu(gradient, output, x0, t, seeds, prediction, delta)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("bytes_past", [4, 8, 16])
def test_the_alignment_of_float32_data_beside_a_half_precision_output(layout, bytes_past):
    """Four of float32 want 16 bytes, where four of bfloat16 are content with 8."""
    shape, t = (2, 8, 4, 4), torch.tensor([100, 57])
    output, x0, noise = (lay(torch.randn(shape), layout) for _ in range(3))
    past = bytes_past // 4

    def shifted(data):
        memory = data.new_empty(data.numel() + past)
        return memory.as_strided(shape, data.stride(), past).copy_(data)

    x0, noise, tables = shifted(x0), shifted(noise), [SCHEDULE.tensor("signal", x0.device)] * 2
    for dtype in (torch.bfloat16, torch.float16):
        for source in ((None, torch.arange(2)), (noise, None)):
            args = (output.to(dtype), t, *tables, x0, *source, None, torch.ones(2))
            (losses, ours), (_, theirs) = loss_and_gradient(*args), on_cpu(loss_and_gradient, *args)
            assert losses.isfinite().all()
            assert same_bits(ours.cpu(), theirs)


@pytest.mark.backends("cuda")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layouts", LAYOUTS, ids=str)
def test_sampler_step_has_the_bits_of_the_cpu(dtype, shape, layouts):
    x = lay(torch.randn(shape).to(dtype), layouts[0])
    m, m2, noise, history = (lay(torch.randn(shape).to(dtype), layouts[1]) for _ in range(4))
    coefficients, timesteps = dx.ddim(SCHEDULE, 10, eta=0.7).tensors(x.device)
    coefficients = coefficients + torch.tensor([0, 0, 0, 0, 0, 0.25, 0])  # history's weight
    rows = [torch.tensor(3), torch.tensor([9, 1, 4])[: shape[0]]]  # az is 0 in row 9
    sources = [{}, {"noise": noise}, {"seeds": torch.arange(shape[0]) - 1}]
    ways = [{}, {"history": history, "clip": 0.8}]
    for row, source, way in itertools.product(rows, sources, ways):
        options = {"return_x0": True, **source, **way}
        for guided in ({}, {"guidance": 2.5}):
            output = torch.cat([m, m2]) if guided else m
            args = (x, output, coefficients, timesteps, row)
            assert_same_bits_on_cpu(dx.sampler_step, *args, **options, **guided)


def results_of_every_op(dtype, layout):
    """name -> result, of inputs that every dtype can hold."""
    torch.manual_seed(1)

    def draw(*shape):
        return torch.randn(shape).bfloat16().to(dtype)

    shape, seeds, t = (2, 8, 9, 4), torch.tensor([5, 6]), torch.tensor([100, 57])
    x, m, history = (lay(draw(*shape), layout) for _ in range(3))
    tensors, row = dx.ddim(SCHEDULE, 10, eta=0.7).tensors(x.device, dtype), torch.tensor([1, 4])
    results = {"philox_normal": dx.philox_normal(seeds, shape, dtype=dtype)}
    results["x_t"], results["v"] = dx.perturb(x, t, SCHEDULE, seeds=seeds, target="v")
    results["loss"] = dx.denoising_loss(m, x, t, SCHEDULE, seeds=seeds, prediction="v")
    step = {"seeds": seeds, "history": history, "clip": 1.0, "return_x0": True}
    results["step"], results["x0"] = dx.sampler_step(x, m, *tensors, row, **step)

    # What a block holds on every device, a cluster on some, nothing on others.
    for shape, groups in (((3, 6, 7, 5), 3), ((1, 16, 23, 20), 1), ((1, 32, 24, 24), 1)):
        nc = dict.fromkeys(("scale", "shift", "post_scale", "post_shift", "pre_shift"), shape[:2])
        sizes = {"weight": shape[1:2], "bias": shape[1:2], **nc}
        inputs = {"x": lay(draw(*shape), layout), **{k: draw(*s) for k, s in sizes.items()}}
        leaves = {k: v.requires_grad_() for k, v in inputs.items()}
        y = dx.group_norm_act(num_groups=groups, **leaves)
        y.backward(lay(draw(*shape), layout))
        results[f"group_norm_act {shape}"] = y.detach()
        results |= {f"gradient of {k} {shape}": v.grad for k, v in leaves.items()}
    return results


@pytest.mark.backends(*EMULATED)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_order_of_the_threads_changes_no_bits(device, dtype, layout):
    exact = results_of_every_op(torch.float64, layout)
    pretend(0, device)
    first = results_of_every_op(dtype, layout)
    for name, result in first.items():
        assert_close(result, exact[name], factor=4 if "gradient" in name else 1)
    for seed in range(1, 6):
        pretend(seed, device)
        for name, result in results_of_every_op(dtype, layout).items():
            assert same_bits(result, first[name]), name
