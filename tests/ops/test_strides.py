"""The strides of every op's outputs: those of the same formula in torch, on a CPU, for any input.

A view of an output, and the memory format of a convolution after it, depend on them, on those of
sizes of 1 too. Each test draws shapes and strides; a failure tells them.
"""

import random

import pytest
import torch
from harness import EMULATED, assert_close
from strides import lying_as, told, with_random_strides

import diffusion_ext as dx
from diffusion_ext.ops import reference
from diffusion_ext.ops.group_norm_act import ACTIVATIONS, MODULATIONS
from diffusion_ext.ops.sampler_step import step_of_row

KERNELS = pytest.mark.backends("cpu", *EMULATED)
EVERYWHERE = pytest.mark.backends("cpu", *EMULATED, "reference")
pytestmark = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

CASES = 150
SCHEDULE = dx.NoiseSchedule.linear(100)
TABLE = dx.ddim(SCHEDULE, 10, eta=0.7)
REMEMBERING = dx.unipc(SCHEDULE, 10, order=3)  # four slots, two writes a row


def drawn_shape(draw, least_dims=1) -> list[int]:
    """Most sizes are 1 or little more; in one case of eight some may be 0."""
    sizes = [0, 1, 1, 2, 3, 4] if draw.random() < 1 / 8 else [1, 1, 2, 3, 4]
    return [draw.choice(sizes) for _ in range(draw.randint(least_dims, 5))]


def drawn_operands(draw, dtype):
    """x, and how to make operands that lie as it does, or anyhow: where two operands differ, torch
    chooses the strides of sizes of 1 by both; our ops by x alone."""
    x = with_random_strides(draw, drawn_shape(draw), dtype)
    if draw.random() < 0.5:
        return x, lambda: lying_as(x)
    return x, lambda: with_random_strides(draw, x.shape, dtype)


def assert_lies_as_a_sum(y, x) -> None:
    """y has the strides of a·x + b·m in torch, where m lies as x does."""
    wanted = (2.0 * x + 3.0 * lying_as(x)).stride()
    assert y.stride() == wanted, told(x=x, y=y) + f", wanted {wanted}"


@EVERYWHERE
def test_group_norm_act(dtype, backend):
    """The modulations, which torch would broadcast, change no strides."""
    draw = random.Random(0)
    for case in range(2 * CASES):
        shape = drawn_shape(draw, least_dims=2)
        shape[1] = max(shape[1], 1)
        x = with_random_strides(draw, shape, dtype)
        groups, act = draw.choice([1, shape[1]]), draw.choice(ACTIVATIONS)
        options = {n: torch.randn(shape[:2]) for n in MODULATIONS if draw.random() < 0.2}
        x.requires_grad_(backend != "reference" and case % 2 == 1)
        y = dx.group_norm_act(x, groups, act=act, **options)
        # F.group_norm itself refuses groups of one element. On a CPU: CUDA's is always contiguous.
        like_x = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cpu")
        normalised = torch.group_norm(like_x, groups)
        wanted = reference.ACTIVATIONS[act](normalised).stride()
        assert y.stride() == wanted, told(x=x, y=y) + f", wanted {wanted}, {act}"
        exact = reference.group_norm_act(x.detach().double(), groups, act=act, **options)
        assert_close(y.detach(), exact, dtype, factor=8)
        if x.requires_grad:
            (gradient,) = torch.autograd.grad(y, x, lying_as(y))
            assert gradient.stride() == normalised.stride(), told(x=x, gradient=gradient)


@KERNELS
def test_sampler_step(dtype):
    draw = random.Random(1)
    for _ in range(CASES):
        x, another = drawn_operands(draw, dtype)
        options, given = {}, draw.choice(["noise", "seeds", "history", "guidance", "nothing"])
        if given in ("noise", "history"):
            options[given] = another()
        elif given == "seeds":
            options[given] = torch.arange(len(x))
        elif given == "guidance":
            options[given] = 2.5
        m = torch.cat([another(), another()]) if given == "guidance" else another()
        row = draw.choice([torch.tensor(3), torch.full((len(x),), 4)])
        args = x, m, *TABLE.tensors(x.device), row
        out, x0 = dx.sampler_step(*args, return_x0=True, **options)
        assert_lies_as_a_sum(out, x)
        assert_lies_as_a_sum(x0, x)
        wide = {n: t.double() if n in ("noise", "history") else t for n, t in options.items()}
        tables = TABLE.tensors(x.device, torch.float64)
        exact = reference.sampler_step(x.double(), m.double(), *tables, row, **wide)
        assert_close(out, exact[0], dtype)
        assert_close(x0, exact[1], dtype)


@KERNELS
def test_sampler_step_that_remembers(dtype):
    draw = random.Random(2)
    coefficients, timesteps = REMEMBERING.tensors(torch.empty(0).device)
    for _ in range(CASES):
        x, another = drawn_operands(draw, dtype)
        m, slots, seeds = another(), [another() for _ in range(4)], torch.arange(len(x))
        kept = torch.stack(slots)
        row = torch.tensor(3)
        out, x0 = dx.sampler_step(
            x, m, coefficients, timesteps, row, seeds=seeds, slots=kept, return_x0=True
        )
        timestep = int(timesteps[3])
        apart = step_of_row(x, m, coefficients[3], timestep, None, seeds, slots, None, True)
        for result in (out, x0, *apart):
            assert_lies_as_a_sum(result, x)
        assert_close(apart[0], out.double(), dtype)
        assert_close(apart[1], x0.double(), dtype)


@KERNELS
@pytest.mark.parametrize("target", ["noise", "v", None])
def test_perturb(dtype, target):
    draw = random.Random(3)
    for _ in range(CASES // 2):
        x0, another = drawn_operands(draw, dtype)
        t = torch.randint(0, 100, (len(x0),))
        source = draw.choice([{"seeds": torch.arange(len(x0))}, {"noise": another()}])
        x_t, learned = dx.perturb(x0, t, SCHEDULE, target=target, **source)
        wide = {n: s if n == "seeds" else s.double() for n, s in source.items()}
        exact = dx.perturb(x0.double(), t, SCHEDULE, target=target, **wide)
        assert_lies_as_a_sum(x_t, x0)
        assert_close(x_t, exact[0], dtype)
        if target is None:
            continue
        assert_close(learned, exact[1], dtype)
        if learned is not source.get("noise"):
            assert_lies_as_a_sum(learned, x0)


@KERNELS
def test_single_steps(dtype):
    draw = random.Random(4)
    for _ in range(CASES // 2):
        x, another = drawn_operands(draw, dtype)
        m, noise = another(), another()
        for out in (
            dx.ddim_step(x, m, 50, 40, SCHEDULE),
            dx.ddpm_step(x, m, 50, SCHEDULE, noise=noise),
        ):
            assert_lies_as_a_sum(out, x)


@KERNELS
def test_the_gradient_of_denoising_loss(dtype):
    """Of strides of sizes above 1: torch, which multiplies by factors of the samples last, chooses
    the others by those."""
    draw = random.Random(5)
    for _ in range(CASES // 2):
        output, another = drawn_operands(draw, dtype)
        leaf, t = output.detach().requires_grad_(), torch.randint(0, 100, (len(output),))
        losses = dx.denoising_loss(leaf, another(), t, SCHEDULE, seeds=torch.arange(len(output)))
        assert losses.is_contiguous()
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        wanted = (2.0 * output).stride()
        for size, ours, torchs in zip(output.shape, gradient.stride(), wanted, strict=True):
            assert size < 2 or output.numel() == 0 or ours == torchs, told(x=output, y=gradient)


@EVERYWHERE
def test_philox_normal_is_contiguous(dtype):
    draw = random.Random(6)
    for _ in range(CASES // 2):
        shape = drawn_shape(draw)
        noise = dx.philox_normal(torch.arange(shape[0]), shape, dtype=dtype)
        assert noise.stride() == torch.empty(shape).stride()
